"Extending a collection: the parent is read and kept, what does not fit is refused, what the old effects lost is measured."

from dataclasses import replace

import pytest
import torch

from collectionlora.core import sha256_file, UserError
from collectionlora.engine.ahead import AheadBank
from collectionlora.engine.looks import few_step_sample
from collectionlora.engine.loop import learning_roles, prepare
from collectionlora.engine.parallel import Ranks
from collectionlora.engine.rollouts import Engine
from collectionlora.engine.settings import resolved, schedule_of, Settings
from collectionlora.engine.terms import gradients
from collectionlora.files.header import catalogue, read_header
from collectionlora.files.lora import read_lora, write_lora
from collectionlora.flow import few_step_times
from collectionlora.use import extend as ext

from test_distill import make_world, open_world, run, SMALL

SHORT = dict(batch=2, fake_per_generator=1, fake_warmup=0, rank_fake=2, ema=0.5, lr_warmup=0, lr_student=0.01, steps=2)


@pytest.fixture(scope='module')
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp('world')
    args = open_world(folder, make_world(folder))
    yield args
    args[1].close()


@pytest.fixture(scope='module')
def parent(world, tmp_path_factory):
    base, bank, effects, general, cache = world
    out = tmp_path_factory.mktemp('parent')
    run((base, bank, effects[:1], general, cache), replace(SMALL, steps=2, rank_student=3), out)
    return ext.read_parent(out / 'collection.safetensors', base)


def test_a_parent_knows_what_its_file_says(world, parent):
    base, _, effects, _, _ = world
    assert list(parent.entries) == ['one'] and parent.rank == 3 and parent.sha256 == sha256_file(parent.file)
    assert parent.times == pytest.approx(schedule_of(resolved(SMALL, base.info['shift'])))
    assert effects[0].trigger in parent.prompt('one') and 'turn it into one' in parent.prompt('one')


@pytest.mark.parametrize('steps, shift', [(1, 1.0), (4, 1.0), (8, 3.0), (5, 2.2)])
def test_the_shift_is_found_from_the_levels(steps, shift):
    assert ext.shift_of(few_step_times(steps, shift)) == pytest.approx(1.0 if steps == 1 else shift)


def test_a_child_is_sampled_as_its_parent(parent):
    s = ext.child_settings(parent, dict(SHORT, few_shift=ext.shift_of(parent.times)))
    assert (
        schedule_of(s) == pytest.approx(list(parent.times)) and s.init == parent.file.as_posix() and s.rank_student == 3
    )
    assert ext.child_settings(parent, dict(SHORT, rank_student=5)).rank_student == 5
    for given, words in (
        (dict(few_steps=3), 'few_steps'),
        (dict(few_shift=1.3), 'few_shift'),
        (dict(rank_student=2), 'rank 3'),
        (dict(stesp=3), "'steps'"),
    ):
        with pytest.raises(UserError, match=words):
            ext.child_settings(parent, {**SHORT, **given})


def test_a_truncated_schedule_of_the_authors_is_close_enough_to_be_extended(world, parent, tmp_path):
    header = {k: v for k, v in read_header(parent.file).items() if not k.endswith(('schema', 'sha256'))}
    times = schedule_of(Settings.preset('authors'))
    write_lora(
        tmp_path / 'a.safetensors',
        read_lora(parent.file),
        header | {'collectionlora.sampling': {'steps': 8, 'shift': 3.0, 'times': times, 'stochastic': True}},
    )
    authors = ext.read_parent(tmp_path / 'a.safetensors', world[0])
    assert ext.child_settings(authors, dict(SHORT, few_shift=3.0)).few_steps == 8


def test_the_family_is_new_effects_and_rehearsed_old_ones_under_the_words_that_the_weights_know(world, parent):
    _, _, (one, two), _, _ = world
    both = ext.family(parent, [two], [replace(one, description='Other words.', trigger='other')])
    assert (
        [e.id for e in both] == ['two', 'one']
        and both[1].trigger == one.trigger
        and both[1].description == 'Turn it into one.'
    )
    for args, words in (
        (([],), 'nothing to add'),
        (([one],), "'one' is already in"),
        (([replace(two, trigger=one.trigger)],), 'cannot be told'),
        (([replace(two, trigger='')],), 'effect.yaml: has no trigger'),
        (([replace(two, trigger=None)],), 'effect.yaml: has no trigger'),
        (([two], [two]), 'cannot be rehearsed'),
    ):
        with pytest.raises(UserError, match=words):
            ext.family(parent, *args)


def test_files_that_cannot_be_extended(world, parent, tmp_path):
    header = {k: v for k, v in read_header(parent.file).items() if not k.endswith(('schema', 'sha256'))}
    broken = {
        'catalogue': {k: v for k, v in header.items() if k != 'collectionlora.effects'},
        'empty': header | {'collectionlora.effects': []},
        'times or steps': {k: v for k, v in header.items() if k != 'collectionlora.sampling'},
        'base': header | {'collectionlora.base': {'hash': '0' * 64}},
        'guidance': header | {'collectionlora.sampling': {'steps': 8, 'stochastic': False, 'cfg': 4.0}},
    }
    for words, said in broken.items():
        write_lora(tmp_path / 'x.safetensors', read_lora(parent.file), said)
        with pytest.raises(UserError, match=words):
            ext.read_parent(tmp_path / 'x.safetensors', world[0])


@pytest.fixture(scope='module')
def child(world, parent, tmp_path_factory):
    "Effect two added, effect one rehearsed, at a larger rank."
    base, bank, (one, two), general, cache = world
    out = tmp_path_factory.mktemp('child')
    run(
        (base, bank, ext.family(parent, [two], [one]), general, cache),
        ext.child_settings(parent, dict(SHORT, rank_student=4)),
        out,
    )
    return out / 'collection.safetensors'


def test_the_child_lists_all_effects_and_its_parents(world, parent, child):
    header = read_header(child)
    assert [e['id'] for e in catalogue(child)] == ['one', 'two'] and read_lora(child).rank == 4
    first, *teachers = header['collectionlora.parents']
    assert first == {'sha256': parent.sha256, 'kind': 'start', 'effects': ['one']}
    assert {(p['kind'], p['effect'], p['sha256']) for p in teachers} == {
        ('teacher', id, world[1].shas[id]) for id in ('one', 'two')
    }
    assert ext.read_parent(child, world[0]).entries.keys() == {'one', 'two'}  # it can be a parent itself


def test_what_was_lost_is_measured_per_old_effect_and_nothing_by_the_parent_itself(world, parent, child):
    base, _, (one, two), general, cache = world
    known, unknown = ext.probes(parent, cache, [one], [], 2), ext.probes(parent, cache, [], [p for p, _ in general], 3)
    assert (
        len(known[0].cond) == 2
        and known[0].targets.shape[0] == 3
        and len(unknown[0].cond) == 3
        and unknown[0].targets is None
    )
    (line,) = ext.regressions(base, parent, child, known)
    assert line['id'] == 'one' and line['drift'] > 0 and line['distance_before'] != line['distance_after']
    assert line['to'] == 'targets'
    (same,) = ext.regressions(base, parent, parent.file, unknown)
    natural = same.pop('distance_before')
    assert natural == same.pop('distance_after') > 0  # other noise gives other samples
    assert (
        same == {'id': 'one', 'n': 3, 'drift': 0.0, 'to': 'parent', 'detail_before': 1.0, 'detail_after': 1.0}
        and 'looked_at' not in base.backbone.roles
    )
    with pytest.raises(UserError, match="'one': no pictures"):
        ext.probes(parent, cache, [two], [], 2)


def test_a_foreign_lora_without_a_catalogue_can_still_be_a_start(world, tmp_path):
    base, bank, effects, general, cache = world
    b = base.backbone
    b.add_role('foreign', 2, seed=3)
    write_lora(tmp_path / 'foreign.safetensors', b.lora('foreign'))
    b.remove('foreign')
    run(
        (base, bank, effects, general, cache),
        replace(SMALL, steps=1, fake_warmup=0, init=str(tmp_path / 'foreign.safetensors')),
        tmp_path / 'out',
    )
    assert read_header(tmp_path / 'out' / 'collection.safetensors')['collectionlora.parents'][0]['effects'] == []


@pytest.fixture(scope='module')
def rehearsal(world, parent):
    base, _, _, general, cache = world
    pictures = ext.rehearsed_on(parent, [], [p for p, _ in general], 3)
    (found,) = ext.rehearsals(base, parent, cache, pictures, groups=4)
    return found


def test_old_effects_are_rehearsed_by_what_the_parent_itself_draws(world, parent, rehearsal):
    base, _, _, general, cache = world
    assert len(rehearsal) == 3 and 'rehearsed' not in base.backbone.roles
    for row, (picture, _) in zip(rehearsal.samples, general):
        assert row.source == picture and row.student == row.teacher == parent.prompt('one')
    ext.load_role(base, parent.file, 'again')
    seeds = [ext.seed_of('rehearsal', 0, 'one', i) for i in range(3)]
    cond = cache.cond([(r.source, r.student) for r in rehearsal.samples])
    again = few_step_sample(base.backbone, 'again', cond, parent.times, seeds, sampler=parent.sampler)
    base.backbone.remove('again')
    assert torch.equal(torch.stack([r.target for r in rehearsal.samples]), again)
    with pytest.raises(UserError, match="'one': no pictures to rehearse"):
        ext.rehearsals(base, parent, cache, {'one': []})


def test_old_pictures_come_first_and_those_to_look_at_are_spared(world, parent):
    one, general = world[2][0], ['a', 'b', 'c']
    assert ext.rehearsed_on(parent, [], general, 9, spared=1) == {'one': ['b', 'c']}
    assert ext.rehearsed_on(parent, [], general, 9, spared=7) == {'one': general}
    assert ext.rehearsed_on(parent, [one], general, 2, spared=1)['one'] == [*one.sources[1:], 'b', 'c'][:2]


@pytest.mark.parametrize('guidance', [1.0, 4.0])
def test_rehearsal_pulls_at_nothing_before_the_student_has_moved(world, parent, rehearsal, guidance):
    base, bank, (_, two), general, cache = world
    few = dict(SHORT, rank_fake=3, fake_init='student', guidance=guidance, weight_fm=0.0)
    s = resolved(ext.child_settings(parent, few), base.info['shift'])
    own = AheadBank(base.backbone, {rehearsal.id: parent.file}, role='own')
    with learning_roles(base.backbone):
        pools = prepare(base, [rehearsal], general, cache, s)
        base.backbone.flat('fake').data.copy_(base.backbone.flat('student').data)
        found = {}
        for plain in (True, False):
            named = frozenset([rehearsal.id] if plain else [])
            engine = Engine(base.backbone, own, pools, s, schedule_of(s), Ranks(), plain=named)
            found[plain] = {k: g.norm().item() for k, (g, _, _) in gradients(engine, [rehearsal.id], 0).items()}
        base.backbone.flat('student').data.mul_(1.5)
        moved = gradients(Engine(base.backbone, own, pools, s, schedule_of(s), Ranks(), plain=named), [None], 0)
        engine = Engine(base.backbone, own, pools, s, schedule_of(s), Ranks(), plain=frozenset([rehearsal.id]))
        pull = gradients(engine, [rehearsal.id], 0)['keep'][0].norm().item()
    own.close()
    assert [*found[True]] == ['keep'] and found[True]['keep'] < min(1e-5, pull / 100)
    assert {*found[False]} == {'bs', 'ts'} and {*moved} == {'bs'}  # matching belongs to the other effects


def test_a_rehearsed_child_keeps_the_entries_of_its_parent(world, parent, rehearsal, tmp_path):
    base, bank, (_, two), general, cache = world
    both = AheadBank(base.backbone, {'two': bank.files['two'], rehearsal.id: parent.file}, role='both')
    s = ext.child_settings(parent, dict(SHORT, rank_fake=3, fake_init='student', p_switch=1.0))
    history = run((base, both, [*ext.family(parent, [two]), rehearsal], general, cache), s, tmp_path)
    both.close()
    child = tmp_path / 'collection.safetensors'
    entries, header = {e['id']: e for e in catalogue(child)}, read_header(child)
    assert list(entries) == ['one', 'two'] and entries['one'] == parent.entries['one']
    kinds = [(p['kind'], p.get('effect')) for p in header['collectionlora.parents']]
    assert kinds == [('start', None), ('teacher', 'two')]
    assert {h['effect'] for h in history} == {'two', rehearsal.id}


def a_line(id, **more):
    same = dict(n=4, to='parent', drift=0.1, distance_before=1.0, distance_after=1.0, detail_before=1, detail_after=1)
    return same | dict(id=id) | more


def test_only_a_change_beyond_the_bound_is_warned_of():
    fine = [a_line('a', distance_after=1.2), a_line('b', distance_after=0.2)]
    assert ext.warning(fine, True) == '' and [r[''] for r in ext.table(fine)] == ['', '']
    worse = [*fine, a_line('c', distance_after=1.3)]
    assert '1 of 3' in ext.warning(worse, True) and 'c (distance 1.00 → 1.30)' in ext.warning(worse, True)
    assert 'rehearse the old effects' in ext.warning(worse, False)
    assert [l['id'] for l in ext.worst_first(worse)] == ['c', 'a', 'b']
    judged = lambda was, now, n, far=9.0: a_line('j', distance_after=far, bad_before=was, bad_after=now, judged=n)
    assert ext.beyond(judged(0.25, 0.5, 4, 1.2)) == ''  # one picture more is chance
    assert ext.beyond(judged(0.5, 0.5, 2)) == 'distance 1.00 → 9.00'  # two pictures judged say little
    assert ext.beyond(judged(0.9, 0.9, 40)) == 'distance 1.00 → 9.00'  # the judge has no room to see it
    assert ext.beyond(judged(0.25, 0.75, 4)) == 'bad cases 25% → 75%'
    assert ext.beyond(judged(0.5, 0.6, 40)) == '' and ext.beyond(judged(0.5, 0.7, 40))
    assert ext.worst_first([*worse, judged(0.2, 0.6, 20)])[0]['id'] == 'j'
