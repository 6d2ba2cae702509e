"The three studies: a demo's folder as a stage, runs that end early, experiments as a user runs them, and analyses that need a record and no torch."

import json
import shutil
import subprocess
import sys

import pytest
import torch

from collectionlora import core, vanishing
from collectionlora.bases.pipeline import load_base
from collectionlora.bases.tiny import tiny_base
from collectionlora.core import read_yaml, UserError, write_yaml
from collectionlora.engine import settings
from collectionlora.files.conditions import ConditionCache
from collectionlora.judge import studies
from collectionlora.judge.evaluate import held_out
from collectionlora.judge.methods import Method
from collectionlora.run import execute
from collectionlora.use.edit import Recipe

NAMES = ('vanishing', 'branches', 'dynamics')
ROOT = core.repo_root()


@pytest.fixture(scope='module')
def tiny(tmp_path_factory):
    torch.set_num_threads(1)
    return tiny_base(tmp_path_factory.mktemp('base'))


@pytest.fixture(scope='module')
def demo(tiny, tmp_path_factory):
    "A folder such as a demo leaves, in small."
    folder, base = tmp_path_factory.mktemp('demo'), load_base(tiny)
    sets, _, _ = studies.invent(
        base, ConditionCache(base, folder / '.cache'), folder, effects=2, pairs=2, teacher_steps=1, seed=0
    )
    (folder / 'effects').rename(folder / 'targets')
    for e in sets:
        file = folder / 'targets' / e.id / 'effect.yaml'
        write_yaml(file, {**read_yaml(file), 'trigger': e.trigger, 'description': e.description})
    return folder


def test_the_toy_is_bounded_and_vanishes_where_both_agree():
    x = torch.linspace(-9, 9, 91, dtype=torch.float64)
    for t in (0.05, 0.5, 1.0):
        assert vanishing.difference(x, t, 0.86, 0.86).abs().max() == 0
        assert (
            vanishing.difference(x, t, 1e-6, 0.86).abs().max()
            <= (vanishing.PLACES[1] - vanishing.PLACES[0]) * t**2 / vanishing.spread_at(t) ** 2
        )
    assert (
        0
        == vanishing.lives_from(1e-60)
        < vanishing.lives_from(1e-9)
        < vanishing.lives_from(1e-3)
        < vanishing.lives_from(0.86)
        < 1
    )
    fine, coarse = (vanishing.toy_signal(0.86, 1e-6, 0.86, 0.4, 0.6, *n) for n in ((1281, 96), (321, 48)))
    assert fine == pytest.approx(coarse, rel=2e-3)


def test_a_box_without_points_and_too_few_looks_are_refused():
    with pytest.raises(UserError, match='no point of the grid'):
        vanishing.box_mean([[1.0]], [0.8], [0.3], tau_max=0.5)
    with pytest.raises(UserError, match='give 2 or more'):
        studies.look_steps(10, 1)
    assert studies.look_steps(1, 5) == [1] and studies.look_steps(3, 9) == [1, 2, 3]


def test_the_error_of_a_prediction_depends_on_its_item_alone(tiny):
    "However items are grouped and ordered, each meets its own noise; and a LoRA that changes the base changes the error."
    base, levels = load_base(tiny), [0.1, 1.0]
    items = held_out({'oil_painting': 'animal', 'gold_statue': 'portrait'}, 2)
    told = lambda role, shared=True: Method(
        'm', lambda e: role, lambda e: f'make it {e}', Recipe.ode(1, guidance=1.0), shared
    )
    ask = lambda method, items, **kw: studies.prediction_errors(base, method, items, levels, **kw)
    whole = ask(told('base'), items)
    assert whole.shape == (4, 2) and (whole > 0).all()
    assert torch.allclose(whole, ask(told('base', False), items[::-1], batch=1).flip(0), rtol=1e-4)
    base.backbone.add_role('drawn', 2, seed=0)
    with torch.no_grad():
        base.backbone.flat('drawn').normal_(0, 0.3, generator=torch.Generator().manual_seed(0))
    assert (ask(told('drawn'), items) - whole).abs().min() > 1e-4


def test_a_stage_is_read_from_a_demo_or_says_what_is_absent(demo, tiny, tmp_path):
    stage = studies.set_stage(tmp_path, demo, tiny)
    assert (
        stage.ids == sorted(stage.ids)
        and len(stage.ids) == 2
        and len(stage.stream) == 4
        and set(stage.bank.files) == set(stage.ids)
    )
    assert {'base', 'general', *(f'teacher {i}' for i in stage.ids)} <= set(stage.inputs) and all(
        len(h) == 64 for h in stage.inputs.values()
    )
    stage.bank.close()
    with pytest.raises(UserError, match='targets: no such folder; run `make demo`'):
        studies.set_stage(tmp_path, tmp_path / 'nowhere', tiny)
    (tmp_path / 'half').mkdir()
    for name in ('targets', 'teachers', 'general'):
        (tmp_path / 'half' / name).mkdir()
    with pytest.raises(UserError, match='holds no effect'):
        studies.read_demo(tmp_path / 'half')


def test_a_run_that_diverges_keeps_what_was_seen_and_says_why(demo, tiny, tmp_path):
    stage = studies.set_stage(tmp_path, demo, tiny)
    s = settings.Settings.preset(
        steps=3,
        batch=2,
        rank_student=2,
        rank_fake=2,
        few_steps=4,
        fake_warmup=1,
        fake_per_generator=1,
        rollbacks=0,
        p_switch=1.0,
    )

    def look(step):
        if step == 2:
            with torch.no_grad():
                stage.base.backbone.flat('student').fill_(float('nan'))
        return step

    history, seen, why = studies.course(stage, s, tmp_path / 'run', [1, 2, 3], look)
    assert seen == {1: 1, 2: 2} and [h['step'] for h in history] == [1, 2] and 'step 3' in why
    assert 'student' not in stage.base.backbone.roles
    stage.bank.close()


def cells(name):
    nb = json.loads((ROOT / 'nbs' / 'analysis' / f'{name}.ipynb').read_text(encoding='utf-8'))
    return '\n'.join(''.join(c['source']) for c in nb['cells'] if c['cell_type'] == 'code')


def analysed(name, results):
    "Runs an analysis in a process that cannot import torch; returns what it printed."
    head = f'import sys; sys.modules["torch"] = None\nfrom pathlib import Path\nfrom collectionlora import core\ncore.results_dir = lambda: Path({str(results)!r})\n'
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', head + cells(name)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize('name', NAMES)
def test_an_analysis_needs_a_record_and_no_torch(name, tmp_path):
    (tmp_path / name).mkdir()
    shutil.copy(ROOT / 'results' / name / 'demo.json', tmp_path / name / 'smoke.json')
    assert (
        'A smoke run of seconds' in analysed(name, tmp_path)
        and not (tmp_path / 'figures').exists()
        and not (tmp_path / 'tables').exists()
    )
    record = core.read_json(tmp_path / name / 'smoke.json')
    core.write_json(
        tmp_path / name / 'full.json', {**record, 'status': 'running'}
    )  # one that is under way is passed over
    core.write_json(tmp_path / name / 'demo.json', record)
    said = analysed(name, tmp_path)
    assert said.startswith('run demo') and 'smoke' not in said
    assert list((tmp_path / 'figures').glob(f'{name}*.png')) and (
        tmp_path / 'tables' / f'{name}.md'
    ).read_text().startswith('|')


@pytest.mark.slow
@pytest.mark.parametrize('name', NAMES)
def test_a_study_runs_on_a_demo_and_its_analysis_draws_it(name, demo, tiny, tmp_path):
    record = execute.execute(name, tmp_path / name, 'smoke', dict(rank=2), {'base': tiny, 'demo': demo})
    m = record['metrics']
    if name == 'vanishing':
        assert (
            set(m['grids']['constrained']) == {'1', '2'}
            and len(m['grids']['constrained']['1']['ts']['signal']) == len(m['t_gens']) == 4
        )
    if name == 'branches':
        assert {k: list(f['looks']) for k, f in m['runs'].items()} == dict.fromkeys(m['runs'], ['1', '2']) and len(
            m['runs']
        ) == 5
    if name == 'dynamics':
        assert (
            list(m['runs']) == ['bs', 'bs + ts', 'bs + fm', 'bs + ts + fm']
            and m['references']['another true target']['recognised'] > 0.5
        )
    assert 'run smoke' in analysed(name, tmp_path)
