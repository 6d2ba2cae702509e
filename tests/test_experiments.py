"Experiments as a user runs them: what a distillation leaves, the size ladder and the rivals without training, with files of every kind that they take."

import json

import pytest
import torch

from collectionlora import core, world
from collectionlora.bases.pipeline import load_base
from collectionlora.bases.tiny import tiny_base
from collectionlora.core import UserError
from collectionlora.files.dialects import Lora
from collectionlora.files.effects import write_effect
from collectionlora.files.header import catalogue, read_header
from collectionlora.files.lora import read_lora, write_lora
from collectionlora.files.workflow import simple_sigmas
from collectionlora.judge.evaluate import held_out
from collectionlora.judge.gate import read_rows
from collectionlora.judge.tables import by_method, REFERENCES
from collectionlora.run import execute

EFFECTS = {'oil_painting': 'animal', 'confetti_party': 'portrait'}


@pytest.fixture(scope='module')
def base(tmp_path_factory):
    torch.set_num_threads(1)
    return load_base(tiny_base(tmp_path_factory.mktemp('base')))


def lora_file(path, base, effects, rank, seed, few=True):
    "A file of random weights whose spectrum decays."
    g, decay = torch.Generator().manual_seed(seed), torch.logspace(0, -1, rank)
    factors = {
        n: (torch.randn(rank, i, generator=g) / i**0.5 * decay[:, None], 0.1 * torch.randn(o, rank, generator=g))
        for n, (i, o) in base.backbone.modules().items()
    }
    entries = [
        dict(
            id=e,
            category=c,
            trigger=f'trigger{k}',
            description=world.describe(e),
            teacher_prompt=world.EFFECTS[e].prompt,
        )
        for k, (e, c) in enumerate(effects.items())
    ]
    write_lora(
        path,
        Lora(factors),
        {
            'collectionlora.base': {'hash': base.hash},
            'collectionlora.effects': entries,
            **({'collectionlora.sampling': {'steps': 2, 'shift': 1.0}} if few else {}),
        },
    )
    return path


@pytest.fixture(scope='module')
def files(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp('files')
    teachers = [
        lora_file(folder / f'{e}.safetensors', base, {e: c}, 3 + k, k, few=False)
        for k, (e, c) in enumerate(EFFECTS.items())
    ]
    return dict(
        base=base.folder,
        collection=lora_file(folder / 'c.safetensors', base, EFFECTS, 6, 7),
        teachers=teachers,
        acceleration=lora_file(folder / 'acc.safetensors', base, {}, 2, 8),
    )


@pytest.mark.slow
def test_a_distillation_leaves_a_file_that_shows_and_explains_itself(tmp_path):
    record = execute.execute('distill', tmp_path, 'c', dict(steps=1, val_every=0, pictures=32))
    assert {'c.safetensors', 'c.README.md', 'c.html', 'c.comfyui.json'} <= set(record['outputs'])
    entries = catalogue(tmp_path / 'c.safetensors')
    assert (
        len(entries) == 2
        and all(e['thumbnail'].startswith('data:image/jpeg;base64,') for e in entries)
        and read_lora(tmp_path / 'c.safetensors').rank == 8
    )
    card, page = (tmp_path / 'c.README.md').read_text(), (tmp_path / 'c.html').read_text()
    assert (
        record['metrics']['sha256'] == core.sha256_file(tmp_path / 'c.safetensors')
        and record['metrics']['sha256'] in card
    )
    assert all(e['trigger'] in card and e['thumbnail'] in page for e in entries)
    nodes = {n['class_type']: n['inputs'] for n in json.loads((tmp_path / 'c.comfyui.json').read_text()).values()}
    sampling = read_header(tmp_path / 'c.safetensors')['collectionlora.sampling']
    times, sampler = sampling['times'], 'lcm' if sampling['stochastic'] else 'euler'
    made = simple_sigmas(nodes['ModelSamplingAuraFlow']['shift'], nodes['BasicScheduler']['steps'])
    assert (
        made == pytest.approx([t for t in times if t], abs=1e-5) and nodes['KSamplerSelect']['sampler_name'] == sampler
    )
    again = execute.execute('distill', tmp_path / 'bare', 'c', dict(steps=1, val_every=0, pictures=0))['metrics']
    assert again['lora'] == record['metrics']['lora'] and not any(
        'thumbnail' in e for e in catalogue(tmp_path / 'bare' / 'c.safetensors')
    )  # pictures change no weight


@pytest.mark.slow
def test_the_ladder_leaves_files_a_table_and_a_record(files, tmp_path):
    record = execute.execute(
        'ladder',
        tmp_path,
        'l',
        dict(fractions=[0.5], ranks=[1], energies=[0.9], dtype='bfloat16', images=1),
        {k: files[k] for k in ('base', 'collection')},
    )
    rungs, methods = record['metrics']['rungs'], record['metrics']['methods']
    assert list(rungs) == ['rank 6, whole', 'rank 3', 'rank 1', '0.9 of the energy'] and {
        'rank 0, the base alone',
        *rungs,
        *REFERENCES,
    } <= set(methods)
    assert (
        rungs['rank 6, whole']['energy_kept'] == 1 > rungs['rank 3']['energy_kept'] > rungs['rank 1']['energy_kept']
        and rungs['0.9 of the energy']['energy_kept'] >= 0.9
    )
    assert rungs['rank 6, whole']['bytes'] > rungs['rank 3']['bytes'] > rungs['rank 1']['bytes']
    for name, kind in (('rank 3', 'rank3'), ('rank 1', 'rank1'), ('0.9 of the energy', 'energy0.9')):
        file = tmp_path / f'l.{kind}.safetensors'
        assert (
            core.sha256_file(file) == rungs[name]['sha256'] == record['outputs'][file.name]
            and read_lora(file).rank == rungs[name]['rank']
        )
        assert (
            read_header(file)['collectionlora.parents'][0]['sha256'] == core.sha256_file(files['collection'])
            and len(read_header(file)['collectionlora.effects']) == 2
        )
    assert len(read_rows(tmp_path / 'l.rows.jsonl')) == 2 * (5 + 4) and all(methods[n]['n'] == 2 for n in rungs)
    assert [c['a'] for c in record['metrics']['contrasts']['bcr']] == [
        'rank 3',
        'rank 1',
        '0.9 of the energy',
        'rank 0, the base alone',
    ] and (tmp_path / 'l.png').is_file()


@pytest.mark.slow
def test_the_ladder_measures_distances_where_there_is_no_oracle(base, files, tmp_path):
    truth = held_out({'oil_painting': 'animal'}, 3)
    effect = write_effect(
        tmp_path / 'mine', id='mine', category='animal', prompt='oil', pairs=[(i.source, i.truth) for i in truth]
    )
    g = torch.Generator().manual_seed(0)
    lora = Lora(
        {
            n: (torch.randn(2, i, generator=g), 0.01 * torch.randn(o, 2, generator=g))
            for n, (i, o) in base.backbone.modules().items()
        }
    )
    write_lora(
        tmp_path / 'c.safetensors',
        lora,
        {
            'collectionlora.effects': [dict(id='mine', category='animal', trigger='zorvik', description='oil paint')],
            'collectionlora.sampling': {'steps': 2},
        },
    )
    given = (
        dict(fractions=[0.5], energies=[], images=2),
        {'base': base.folder, 'collection': tmp_path / 'c.safetensors'},
    )
    with pytest.raises(UserError, match='effect folders'):
        execute.execute('ladder', tmp_path / 'out', 'l', *given)
    record = execute.execute('ladder', tmp_path / 'out', 'l', given[0], {**given[1], 'effects': [effect.folder]})
    assert not record['metrics']['oracle'] and [d['n'] for d in record['metrics']['distances']] == [2] * 3


@pytest.mark.slow
def test_rivals_share_subjects_and_sampler_with_ours(files, tmp_path):
    given = dict(merges=['cat', 'linear', 'svd', 'dare_ties_svd', 'ctm'], weights=[1.0, 0.0], teacher_steps=2, images=1)
    found = execute.execute('rivals', tmp_path, 'r', given, files)['metrics']
    assert {f'{m}, w = {w}' for m in ('cat', 'svd', 'dare_ties_svd', 'ctm') for w in ('1', '0.5')} == set(
        found['merges']
    )
    assert (
        set(found['refused']) == {'linear, w = 1', 'linear, w = 0.5'}
        and 'one rank' in found['refused']['linear, w = 1']
    )  # the teachers' ranks differ
    assert (
        found['merges']['cat, w = 1']['sum_error'] < 1e-5
        and found['merges']['cat, w = 1']['rank'] == 7
        and found['merges']['svd, w = 1']['rank'] == 6
    )
    rows = by_method(read_rows(tmp_path / 'r.rows.jsonl'))
    names = {
        'ours, 2 steps',
        'teacher + acceleration, 2 steps',
        'teacher, 2 steps × CFG',
        'switch',
        'composite',
        *found['merges'],
    }
    assert names <= set(rows) and len({tuple(r.pair for r in rows[n]) for n in names}) == 1  # same subjects, same noise
    assert {n: rows[n][0].nfe for n in ('cat, w = 1', 'switch', 'composite', 'teacher, 2 steps × CFG')} == {
        'cat, w = 1': 2,
        'switch': 2,
        'composite': 4,
        'teacher, 2 steps × CFG': 4,
    }
    assert found['own'] == 'ours, 2 steps' and {c['b'] for c in found['contrasts']['score']} >= names - {found['own']}
    assert read_header(tmp_path / 'r.svd-1.safetensors')['collectionlora.parents'] == [
        {'sha256': core.sha256_file(f)} for f in files['teachers']
    ]


@pytest.mark.slow
def test_rivals_refuse_what_does_not_belong_together(files, tmp_path):
    with pytest.raises(UserError, match='give both or none'):
        execute.execute('rivals', tmp_path, 'r', {}, {k: files[k] for k in ('base', 'collection')})
    with pytest.raises(UserError, match="did you mean 'ties_svd'"):
        execute.execute('rivals', tmp_path, 'r', dict(merges=['tise_svd']), files)


@pytest.mark.slow
def test_single_effects_go_on_where_they_were(base, tmp_path):
    asked = dict(effects=1, steps=1, changes=[{}, {'lr': 0.01}])
    first = execute.execute('single', tmp_path, 's', asked, {'base': base.folder})['metrics']['table']
    files = {f: f.stat().st_mtime_ns for f in (tmp_path / '.loras').rglob('*.safetensors')}
    more = execute.execute('single', tmp_path, 's', {**asked, 'effects': 2}, {'base': base.folder}, replace=True)[
        'metrics'
    ]['table']
    assert (
        len(files) == 2
        and list(first) == list(more)
        and len({f for f in (tmp_path / '.loras').rglob('*.safetensors')}) == 4
    )
    assert all(f.stat().st_mtime_ns == t for f, t in files.items())  # what was trained and judged stands
    assert all(set(first[n]['good'].items()) <= set(more[n]['good'].items()) for n in first)
    execute.execute('single', tmp_path, 's', {**asked, 'steps': 2}, {'base': base.folder}, replace=True)
    assert (
        all(f.stat().st_mtime_ns == t for f, t in files.items())
        and len(list((tmp_path / '.loras').rglob('*.safetensors'))) == 6
    )  # other training is another result
    cost = execute.execute('single', tmp_path, 's', {**asked, 'images': 2}, {'base': base.folder}, replace=True)['cost']
    assert (
        cost['reused'] == 2 and len(list((tmp_path / '.loras').rglob('*.safetensors'))) == 6
    )  # more pictures need no more training


@pytest.mark.slow
def test_a_student_is_asked_and_painted_beside_the_teachers(base, files, tmp_path):
    found = execute.execute(
        'knowledge', tmp_path, 'k', dict(students=[str(files['collection'])]), {'base': base.folder}
    )['metrics']
    assert [*found['asked']] == ['base', 'teachers', "teachers, student's words", 'c'] and found['asked']['teachers'][
        'against_teachers'
    ][0] == 0
    assert {n.rpartition(', ')[2] for n in found['painted'] if n.startswith('c, ')} == {'2 steps', '2 stochastic steps'}
    assert 'against' in found['painted']['c, 2 steps'] and 'against' not in found['painted']['teachers, 2 steps']
    with pytest.raises(UserError, match='same name'):
        execute.execute(
            'knowledge', tmp_path, 'l', dict(students=[str(files['collection'])] * 2), {'base': base.folder}
        )


@pytest.mark.slow
def test_the_bench_counts_one_base_against_three_copies(tmp_path):
    found = execute.execute('bench', tmp_path, 'b', dict(memory=True, batch=4, effects=4, repeats=2))['metrics']
    assert found['memory']['weights_ratio'] == pytest.approx(1 / 3, rel=0.01) and found['ratios']['early rollout / full'] < 1


@pytest.mark.slow
def test_a_distillation_that_is_struck_once_ends_in_the_same_bits(tmp_path):
    found = execute.execute('kills', tmp_path, 'k', dict(moments=1))['metrics']
    assert found['kills'] == 1 and all(found['equal'].values()) and {*found['sha256_after_kills']} == {found['sha256']}
