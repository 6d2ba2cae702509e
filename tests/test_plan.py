"The plan from configuration files: what it counts, what it advises, and what it refuses."

import json
import shutil

import pytest
from typer.testing import CliRunner

from collectionlora import core
from collectionlora.bases.counted import weights_of_base
from collectionlora.bases.tiny import tiny_base
from collectionlora.core import UserError
from collectionlora.engine import fits
from collectionlora.engine.plan import passes
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


def test_plain_values_are_checked():
    work, way = fits.asked_for('paper', dict(rank=64, effects=180, moments='8bit', guidance=1.0))
    assert (work.s.rank_student, work.s.rank_fake, work.effects, way.moments) == (64, 64, 180, '8bit')
    for wrong in (dict(effects='many'), dict(moments='4bit'), dict(frozen='nf5'), dict(micro_batch=-1), dict(rnak=3)):
        with pytest.raises(UserError, match=next(iter(wrong))):
            fits.asked_for('paper', wrong)


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


def test_the_full_model_ships_as_configuration_files():
    folder = core.data_dir() / 'qwen_image_edit_2509'
    assert not list(folder.rglob('*.safetensors'))
    assert json.loads((folder / 'transformer' / 'config.json').read_text())['num_layers'] == 60


@pytest.mark.slow
def test_the_papers_run_fits_one_card_of_80():
    full = fits.planned_base(core.data_dir() / 'qwen_image_edit_2509')
    found = fits.verdict(full, fits.Work(Settings.preset('paper')), fits.Way(), fits.card_of(80).room)
    assert found.changes == {'moments': '8bit'} and 65e9 < found.needed < 75e9


def test_a_base_that_does_not_fit_is_refused_before_anything_is_loaded(small, tmp_path, monkeypatch):
    from types import SimpleNamespace

    import psutil

    from collectionlora.files.drawn import write_world_effect
    from collectionlora.run import chain

    effects = {'confetti_party': write_world_effect(tmp_path / 'confetti_party', 'confetti_party', 2, 0).folder}
    job, values = chain.Job(tmp_path, small.folder, 'paper'), dict(device='cpu', checkpointing=True, frozen='')
    s = Settings.preset('paper', batch=2, rank_student=4, rank_fake=4)
    chain.check_machine(job, s, values, effects, None)  # a small base is not asked
    monkeypatch.setattr(psutil, 'virtual_memory', lambda: SimpleNamespace(available=1e6))
    with pytest.raises(UserError, match='the card, while .*GB are missing'):
        chain.check_machine(job, s, values, effects, None, least=1)
