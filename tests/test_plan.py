"The plan from configuration files: what it counts, what it advises, and what it refuses."

import json
import shutil
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from collectionlora import core
from collectionlora.bases import counted, sizes
from collectionlora.bases.counted import weights_of_base
from collectionlora.bases.families import configured
from collectionlora.bases.tiny import tiny_base
from collectionlora.core import UserError
from collectionlora.engine import fits
from collectionlora.engine.costs import passes
from collectionlora.engine.settings import Settings
from collectionlora.run.cli import app


@pytest.fixture(scope='module')
def small(tmp_path_factory):
    return fits.planned_base(tiny_base(tmp_path_factory.mktemp('base') / 'tiny'), text=20)


@pytest.fixture(scope='module')
def work():
    return fits.Work(Settings.preset('paper', batch=4, rank_student=8, rank_fake=8), teacher_rank=4, general=100)


def total(rows):
    return sum(rows.values())


def test_weights_are_those_of_the_model_that_the_files_describe(small):
    from collectionlora.bases.pipeline import load_base

    pipe, w = load_base(small.folder).pipe, weights_of_base(small.folder)
    size = lambda m: sum(p.numel() for p in m.parameters())
    assert w.transformer == size(pipe.transformer) and w.autoencoder == size(pipe.vae)
    assert w.encoder == size(pipe.text_encoder)


def test_a_way_that_saves_memory_needs_less_and_never_more(small, work):
    at = lambda **kw: fits.peak(small, work, fits.Way(**{'micro_batch': 0, 'checkpointing': False} | kw))[1]
    plain = at()
    assert at(micro_batch=1) < plain and at(moments='8bit') < plain and at(frozen='nf4') < plain
    assert at(processes=4) < plain and at(spread_moments=True, processes=4) < at(processes=4)
    rows = fits.device_bytes(small, work, fits.Way())['distilling']
    assert rows['gradients'] == 2 * rows['student'] and rows["AdamW's moments"] == 4 * rows['student']


def test_the_verdict_names_the_cheapest_change_that_fits(small, work):
    way = fits.Way(micro_batch=0)
    asked = fits.peak(small, work, way)[1]
    assert fits.verdict(small, work, way, 2 * asked).fits
    one = fits.peak(small, work, fits.Way(micro_batch=1))[1]
    found = fits.verdict(small, work, way, one * 1.035)
    assert found.changes == {'micro_batch': 1} and str(found).startswith('fits with micro_batch 1: ')
    nothing = fits.verdict(small, work, way, 1000)
    assert nothing.changes is None and 'does not fit' in str(nothing)


@pytest.mark.parametrize(
    'room, said', [((1e3, 1e15, 1e15), 'the card'), ((1e15, 1e3, 1e15), 'memory of the host'), ((1e15, 1e15, 1e3), 'the disk')]
)
def test_what_is_missing_is_said_in_bytes(small, work, room, said):
    with pytest.raises(UserError, match=rf'{said}.* GB are needed, 0\.0 are there, .* GB are missing; '):
        fits.check_room(small, work, fits.Way(), *room)
    fits.check_room(small, work, fits.Way(), 1e15, 1e15, 1e15)


def test_hours_shrink_with_cards_as_far_as_the_batch_goes(small, work):
    card = fits.card_of(80)
    at = lambda n: fits.hours(small, work, fits.Way(processes=n), card)
    assert at(2)['painting'] == pytest.approx(at(1)['painting'] / 2)
    assert at(4)['distilling'] == pytest.approx(at(1)['distilling'] / 4)
    assert at(8)['distilling'] == pytest.approx(at(4)['distilling'])  # a batch of 4 keeps four busy


def test_a_start_by_flow_matching_is_a_stage_of_its_own(small):
    given = dict(steps=260, batch=4, rank=8, anchor_first=240, start_batch=8, teacher_rank=4, targets=2, effects=3)
    work, way = fits.asked_for('default', given)
    assert (work.start_steps, work.s.steps, work.s.anchor_first) == (240, 20, 0)
    card = fits.card_of(80)
    found, at = fits.hours(small, work, way, card), fits.seconds_of(small, work, way, card)
    assert found['starting'] * 3600 == pytest.approx(240 * 8 * at['gradient'])
    assert found['teaching'] * 3600 == pytest.approx(3 * 2000 * at['gradient'])
    many = fits.hours(small, work, replace(way, processes=8), card)
    assert many['starting'] == pytest.approx(found['starting'] / 8)
    assert many['teaching'] == pytest.approx(found['teaching'] / 3)  # three teachers, one a card
    held = fits.device_bytes(small, work, way)
    assert total(held['teaching']) < total(held['starting']) < total(held['distilling'])
    anchored, _ = fits.asked_for('default', given | {'start_steps': 0})
    assert (anchored.start_steps, anchored.s.steps, anchored.s.anchor_first) == (0, 260, 240)
    for rows in (fits.hours(small, anchored, way, card), fits.device_bytes(small, anchored, way)):
        assert 'starting' not in rows
    assert fits.asked_for('paper', {})[0].start_steps == 0


def test_plain_values_are_checked():
    work, way = fits.asked_for('paper', dict(rank=64, effects=180, moments='8bit', guidance=1.0))
    assert (work.s.rank_student, work.s.rank_fake, work.effects, way.moments) == (64, 64, 180, '8bit')
    for wrong in (dict(effects='many'), dict(moments='4bit'), dict(frozen='nf5'), dict(micro_batch=-1), dict(rnak=3)):
        with pytest.raises(UserError, match=next(iter(wrong))):
            fits.asked_for('paper', wrong)


def test_a_term_that_there_is_not_is_no_part_of_a_plan():
    with pytest.raises(UserError, match="the term 'kep'.*did you mean 'keep'"):
        fits.asked_for('paper', {'further': {'kep': 1.0}})


def test_rehearsed_effects_cost_their_share():
    s = Settings.preset('default', batch=1, p_switch=1.0, further={'keep': 1.0})
    none, all_ = passes(s, 0.0), passes(s, 1.0)
    n = s.fake_per_generator
    assert none['gradient'] == 3 + n and all_['gradient'] == 1 + n


def test_the_command_plans_from_configuration_files_alone(small, tmp_path):
    folder = tmp_path / 'config only'
    shutil.copytree(small.folder, folder, ignore=shutil.ignore_patterns('*.safetensors'))
    args = ['plan', '--base', str(folder), '--card', '24', '-p', 'rank=4', '-p', 'batch=2']
    shown = CliRunner().invoke(app, args)
    assert shown.exit_code == 0 and 'fits: ' in shown.output and 'distilling: sum' in shown.output
    (folder / 'transformer' / 'config.json').unlink()
    refused = CliRunner().invoke(app, args)
    assert refused.exit_code == 2 and 'config.json: no such file' in refused.output.replace('\n', '')


NAMES = ('qwen_image_edit_2509', 'nano', 'qwen-image-2.1')  # the last one's files are written by its family
MADE_BY = 'run python tools/counted.py again'


@pytest.fixture(scope='module')
def shipped(tmp_path_factory):
    "Folder of configuration files by name."
    second = configured(NAMES[2], tmp_path_factory.mktemp('counted') / NAMES[2])
    return dict(zip(NAMES, (core.data_dir() / NAMES[0], core.nano_dir(), second)))


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('n, rank, checkpointing', [(1, 48, False), (3, 24, True)])
def test_counts_that_ship_are_those_of_the_model_to_the_byte(shipped, name, n, rank, checkpointing):
    folder = shipped[name]
    sample = sizes.sample_of(folder)
    assert sizes.known(folder), MADE_BY
    counted_here = counted.pass_of(folder, sample, n, rank, torch.bfloat16, checkpointing)
    assert sizes.pass_of(folder, sample, n, rank, 'bfloat16', checkpointing) == counted_here, MADE_BY


def test_weights_and_pictures_that_ship_are_those_of_the_model(shipped):
    for folder in shipped.values():
        sample = sizes.sample_of(folder)
        assert sizes.weights_of(folder) == weights_of_base(folder), MADE_BY
        assert sizes.picture_costs(folder, sample, 'bfloat16') == counted.picture_costs(folder, sample, torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize('name', NAMES)
def test_the_entries_that_ship_are_made_again(shipped, name):
    folder = shipped[name]
    entry = core.read_json(core.data_dir() / 'counted.json')[sizes.key_of(folder)]
    assert {'base': folder.name, **core.plain(counted.entry_of(folder))} == entry, MADE_BY


def test_what_does_not_ship_is_counted(small, shipped, monkeypatch):
    sizes.pass_of.cache_clear()
    assert sizes.known(small.folder) is None
    asked = [small.folder, small.sample, 1, 4]
    found = sizes.pass_of(*asked, 'float32', True)
    assert found == counted.pass_of(*asked, torch.float32, True)
    own = sizes.sample_of(shipped['nano'])
    other = replace(own, text=own.text + 1)  # another sample, or precision, than the file's
    called = []
    monkeypatch.setattr(counted, 'pass_of', lambda *of: called.append(of))
    sizes.pass_of(shipped['nano'], other, 1, 4, 'bfloat16', True)
    sizes.pass_of(shipped['nano'], own, 1, 4, 'float32', True)
    assert [(of[1], of[4]) for of in called] == [(other, torch.bfloat16), (own, torch.float32)]
    sizes.pass_of.cache_clear()


def test_the_number_of_blocks_is_no_part_of_what_identifies_a_base(shipped, tmp_path):
    folder = shutil.copytree(shipped[NAMES[0]], tmp_path / 'base')
    path = folder / 'transformer' / 'config.json'
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {'num_layers': 7, '_name_or_path': 'here'}))
    assert sizes.weights_of(folder) == weights_of_base(folder) and sizes.weights_of(folder).blocks == 7
    path.write_text(json.dumps(config | {'attention_head_dim': 64}))
    sizes.key_of.cache_clear()
    assert sizes.known(folder) is None


def test_the_full_model_ships_as_configuration_files():
    folder = core.data_dir() / 'qwen_image_edit_2509'
    assert not list(folder.rglob('*.safetensors'))
    assert json.loads((folder / 'transformer' / 'config.json').read_text())['num_layers'] == 60


@pytest.mark.slow
def test_the_papers_run_fits_one_card_of_80():
    full = fits.planned_base(core.data_dir() / 'qwen_image_edit_2509')
    found = fits.verdict(full, fits.Work(Settings.preset('paper')), fits.Way(), fits.card_of(80).room)
    assert found.changes == {'moments': '8bit'} and 65e9 < found.needed < 75e9


@pytest.mark.parametrize('command', ['teach', 'distill', 'extend'])
def test_a_base_that_does_not_fit_is_refused_before_anything_runs(small, tmp_path, monkeypatch, command):
    from types import SimpleNamespace

    import psutil

    from collectionlora.files.drawn import write_world_effect
    from collectionlora.run import chain

    effects = {'confetti_party': write_world_effect(tmp_path / 'confetti_party', 'confetti_party', 2, 0).folder}
    s = Settings.preset('paper', batch=2, rank_student=4, rank_fake=4)
    monkeypatch.setattr(chain, 'execute', lambda *_, **__: pytest.fail('something ran'))
    monkeypatch.setattr(chain, 'distill_settings', lambda *_, **__: (dict(device='cpu', preset='paper'), s))
    monkeypatch.setattr(chain, '_stream', lambda *_: [])
    monkeypatch.setattr(chain.check_machine, '__defaults__', (1, False, None))  # as if every base were a large one
    run = {
        'teach': lambda job: chain.teach(job, effects, {'rank': 4, 'batch': 2}),
        'distill': lambda job: chain.distill(job, effects, {}),
        'extend': lambda job: chain.extend(job, tmp_path / 'c', effects, {}),
    }[command]
    for there, disk, what in ((1e6, 1e15, 'the memory, while '), (1e12, 1e3, 'the disk')):
        monkeypatch.setattr(psutil, 'virtual_memory', lambda: SimpleNamespace(available=there))
        monkeypatch.setattr(chain.shutil, 'disk_usage', lambda _: SimpleNamespace(free=disk))
        for processes in (1, 2):
            with pytest.raises(UserError, match=f'{what}.*GB are needed.*GB are missing'):
                run(chain.Job(tmp_path, small.folder, 'paper', processes=processes))
    with pytest.raises(UserError, match='--processes 3: a batch has 2 samples, so some .*give at most 2'):
        run(chain.Job(tmp_path, small.folder, 'paper', processes=3))


def test_a_refusal_says_what_to_type():
    "The words of a refusal are arguments that `distill` takes; a teacher is told only what `teach` takes."
    full = fits.planned_base(core.data_dir() / 'qwen_image_edit_2509')
    work, way = fits.asked_for('paper', {})
    card = fits.peak(full, work, way)[1]
    with pytest.raises(UserError, match="moments 8bit makes it fit: -p 'settings={moments: 8bit}'"):
        fits.check_room(full, work, way, 1.01 * card, 1e15, 1e15)
    teacher = replace(work, teacher_rank=128)
    need = fits.peak(full, teacher, way, fits.TEACHING)[1]
    with pytest.raises(UserError, match='frozen int8 makes it fit: -p frozen=int8'):
        fits.check_room(full, teacher, way, need, 1e15, 1e15, True)
    with pytest.raises(UserError, match='the memory, while .* take a machine with more of it'):
        fits.check_room(full, work, way, 1e6, 1e15, 1e15, place='the memory')


def test_a_command_is_planned_with_the_batches_of_its_stages(small, tmp_path, monkeypatch):
    from collectionlora.files.drawn import write_world_effect
    from collectionlora.run import chain

    seen, effects = [], {'oil': write_world_effect(tmp_path / 'oil', 'confetti_party', 2, 0).folder}
    monkeypatch.setattr(fits, 'check_room', lambda base, work, *_: seen.append(work))
    s = Settings.preset('default', batch=6, steps=30, anchor_first=20, rank_student=4, rank_fake=4)
    job, values = chain.Job(tmp_path, small.folder, 'full'), dict(device='cpu', micro_batch=6, preset='default')
    for teaching in (True, False):
        chain.check_machine(job, s, values, effects, None, 1, teaching, None if teaching else {'rank': 4})
    assert (seen[0].teacher_rank, seen[0].teacher_batch, seen[0].start_steps) == (4, 6, 0)
    first = chain.differences('baseline_fm', 'full')
    assert (seen[1].start_steps, seen[1].start_batch) == (first['steps'], first['batch'])


def test_processes_share_the_memory_of_a_cpu_and_need_more_of_the_host(small, work):
    one, two = (fits.host_bytes(small, work, fits.Way(processes=n)) for n in (1, 2))
    assert total(two) == pytest.approx(2 * total(one))
    with pytest.raises(UserError, match='memory of the host: .* are missing; start fewer processes here'):
        fits.check_room(small, work, fits.Way(processes=2), 1e15, 1.5 * total(one), 1e15)
    teaching = fits.host_bytes(small, work, fits.Way(), teaching=True)
    assert total(teaching) <= total(one) and fits.check_room(small, work, fits.Way(), 1e15, 1e15, 1e15, True)


def test_a_folder_that_is_no_whole_base_is_refused_before_anything_runs(small, tmp_path, monkeypatch):
    from collectionlora.files.drawn import write_world_effect
    from collectionlora.run import chain

    def bare(name):
        return shutil.copytree(small.folder, tmp_path / name, ignore=shutil.ignore_patterns('*.safetensors'))

    effect = write_world_effect(tmp_path / 'confetti_party', 'confetti_party', 2, 0).folder
    other, lacking = (shutil.copytree(small.folder, tmp_path / name) for name in ('other', 'lacking'))
    (other / 'model_index.json').write_text((other / 'model_index.json').read_text().replace('QwenImageEditPlus', 'Flux'))
    shards = {'weight_map': {f'w{k}': f'model-0000{k}-of-00002.safetensors' for k in (1, 2)}}
    (lacking / 'transformer' / 'model.safetensors.index.json').write_text(json.dumps(shards))
    monkeypatch.setattr(chain, 'execute', lambda *_, **__: pytest.fail('something ran'))
    deeper = shutil.copytree(small.folder, tmp_path / 'deeper')
    config = core.read_json(deeper / 'transformer' / 'config.json')
    core.write_json(deeper / 'transformer' / 'config.json', config | {'num_layers': 9})
    wrong = {bare('config'): 'has no *.safetensors', other: '_class_name is', deeper: 'config.json says 9'}
    wrong[lacking] = '00001-of-00002.safetensors: missing'
    for base, said in wrong.items():
        for command in (['teach', effect], ['distill', effect, '-t', effect]):
            shown = CliRunner().invoke(app, [*map(str, command), '--out', str(tmp_path / 'out'), '--base', str(base)])
            assert shown.exit_code == 2 and said in shown.output.replace('\n', ''), shown.output


@pytest.mark.parametrize(
    'given, said',
    [
        (dict(spread_base=True, frozen='nf4'), 'cannot be spread'),
        (dict(spread_moments=True, moments='8bit'), 'cannot be spread'),
        (dict(low_precision=True, moments='8bit'), 'low_precision'),
    ],
)
def test_a_plan_refuses_what_a_run_refuses(given, said):
    with pytest.raises(UserError, match=said):
        fits.asked_for('paper', given)


@pytest.fixture
def job(small, tmp_path, monkeypatch):
    "A job on a small base in which nothing may run, and an effect of it."
    from collectionlora.files.drawn import write_world_effect
    from collectionlora.run import chain

    monkeypatch.setattr(chain, 'execute', lambda *_, **__: pytest.fail('something ran'))
    effects = {'confetti_party': write_world_effect(tmp_path / 'confetti_party', 'confetti_party', 2, 0).folder}
    return chain.Job(tmp_path / 'out', small.folder, 'paper', processes=2), effects


@pytest.mark.parametrize(
    'given, said',
    [
        (dict(spread_base=True, frozen='int8'), 'cannot be spread'),
        (dict(spread_base=True, settings={'routes': 2, 'fake_batch': 'mixed'}), 'all compute in step'),
        (dict(spread_base=True, offload=True), 'use checkpointing instead'),
        (dict(spread_moments=True, settings={'moments': '8bit'}), 'cannot be spread'),
        (dict(settings={'moments': '8bit'}), 'pip install torchao'),
        (dict(frozen='torchao_int8'), 'torchao_int8'),
    ],
)
def test_what_the_loop_would_refuse_is_said_before_anything_is_painted(job, monkeypatch, given, said):
    import importlib.util
    import sys

    from collectionlora.run import chain

    monkeypatch.setitem(sys.modules, 'torchao', None)
    monkeypatch.setitem(sys.modules, 'torchao.optim', None)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None if name == 'torchao' else find(name))
    given = {'rank': 4, 'batch': 2} | given
    given['settings'] = {'p_switch': 1, 'one_exit': True} | given.get('settings', {})
    for ask in (chain.distill, chain.plan):
        with pytest.raises(UserError, match=said):
            ask(job[0], job[1], None if ask is chain.plan else {}, given=given)


def test_the_slot_of_teachers_is_planned_at_their_rank(job, monkeypatch):
    from collectionlora.run import chain

    seen = []
    monkeypatch.setattr(fits, 'check_room', lambda base, work, *_: seen.append(work.teacher_rank))
    monkeypatch.setattr(chain, 'rank_of', {'low': 4, 'high': 96, 'none': 0}.get)
    s = Settings.preset('paper', batch=2, rank_student=4, rank_fake=4)
    for lent in (['low', 'high'], ['low'], ['none'], []):
        chain.check_machine(job[0], s, dict(device='cpu'), job[1], None, 1, lent=lent)
    assert seen == [96, 4, 32, 32]


def test_a_run_that_goes_on_is_not_asked_for_the_room_of_what_it_has_written(small, work):
    way = fits.Way()
    rows = fits.disk_bytes(small, work, way)
    needed = sum(v for k, v in rows.items() if k != 'base')
    kept = {'condition cache': rows['condition cache'], 'checkpoints, at most': rows['checkpoints, at most'] // 2}
    left = needed - sum(kept.values())
    ask = lambda disk, *more: fits.check_room(small, work, way, 1e15, 1e15, disk, False, *more)
    for disk, more in ((needed, ()), (left, (kept,))):
        assert ask(disk, *more)
        with pytest.raises(UserError, match='the disk'):
            ask(disk - 1, *more)
    alone = needed - rows['condition cache']
    assert ask(alone, {}, rows['condition cache'])
    with pytest.raises(UserError, match='the disk of the condition cache: .* are missing'):
        ask(alone, {}, rows['condition cache'] - 1)
    waiting = fits.disk_bytes(small, work, fits.Way(frozen='disk', processes=2))
    assert waiting['frozen weights that wait'] == 2 * small.weights.adapted * small.bytes


def test_what_an_earlier_start_has_left_is_counted(job):
    from collectionlora.run import chain

    out, cache = job[0].out, job[0].out / 'cache'
    for place, n in (('.collection/checkpoints/1.pt', 5), ('targets/a/target/0.png', 7), ('cache/ab/x.safetensors', 9)):
        (out / place).parent.mkdir(parents=True, exist_ok=True)
        (out / place).write_bytes(bytes(n))
    assert chain._kept(job[0], {'cache': str(cache)})['condition cache'] == 0  # of other runs
    (out / 'prompts.json').write_text('{}')
    found = chain._kept(job[0], {'cache': str(cache)})
    assert found == {'checkpoints, at most': 5, 'painted targets': 7, 'condition cache': 9}
    assert chain._cache_room(job[0], {'cache': str(cache)}) is None
