"Named diagnoses on recorded runs, healthy and broken on purpose; boards that are only contacted when asked."

import copy
import json
import sys
import types
from pathlib import Path

import pytest
import torch

from collectionlora.core import UserError
from collectionlora.engine import monitors
from collectionlora.engine.monitors import apart, better_by, Boards, diagnose, due, is_best, late, scalars, val_distance

RECORDED = {
    f'{file.stem}: {name}': (name, history)
    for file in sorted((Path(__file__).parent / 'histories').glob('*.json'))
    for name, history in json.loads(file.read_text()).items()
}


def names(history):
    return [f.name for f in diagnose(history)]


@pytest.mark.parametrize('which', RECORDED)
def test_recorded_runs_are_diagnosed_by_name_and_healthy_ones_raise_no_alarm(which):
    name, history = RECORDED[which]
    assert names(history) == ([] if name.startswith('healthy') else [name])


def test_recorded_are_three_of_each():
    healthy = [n for n, _ in RECORDED.values() if n.startswith('healthy')]
    assert len(healthy) >= 3 and {n for n, _ in RECORDED.values()} >= {
        'fake score starved',
        'rate too high',
        'a teacher is the base',
    }


@pytest.mark.parametrize('which', [w for w, (n, _) in RECORDED.items() if n.startswith('healthy')])
def test_no_alarm_at_any_moment_of_a_healthy_run(which):
    history = RECORDED[which][1]
    assert not [names(history[:k]) for k in range(1, len(history)) if names(history[:k])]


def made(**changes):
    "Forty steps of a healthy run, looked at every fourth; changes: monitor -> value or function of the step."
    history = []
    for k in range(1, 41):
        h = {'step': k, 'norm': 1.0, 'contrast_bs': 0.9, 'cosine_bs_ts': 0.3, 'cosine_bs_fm': 0.1, 'loss_fm': 1.0}
        if k % 4 == 0:
            h |= {
                'probe_effect': 'ab'[k // 4 % 2],
                'probe_lead': 0.1,
                'probe_lead_targets': 0.05,
                'probe_shift': 0.3,
                'probe_gain': 0.1,
                'probe_move': 0.02,
            }
        for name, value in changes.items():
            if name in h:
                h[name] = value(k) if callable(value) else value
        history.append(h)
    return history


@pytest.mark.parametrize(
    'changes, name',
    [
        ({}, None),
        (dict(probe_lead=0.0), 'fake score starved'),
        (dict(probe_lead=lambda k: 0.3 if k < 20 else -0.1), 'fake score starved'),
        (dict(probe_lead=lambda k: 0.0 if k < 20 else 0.1), None),
        (dict(probe_move=0.5), 'rate too high'),
        (dict(probe_move=0.5, probe_lead=-0.2, contrast_bs=lambda k: k), 'rate too high'),
        (dict(probe_shift=0.0, probe_gain=0.0), 'a teacher is the base'),
        (dict(probe_shift=lambda k: 0.0 if k // 4 % 2 else 0.3), 'a teacher is the base'),
        (dict(probe_gain=-0.5), 'a teacher does not know its targets'),
        (dict(norm=0.0), 'no gradient'),
        (dict(contrast_bs=lambda k: 0.9 + 0.1 * k), 'samples drift'),
        (dict(contrast_bs=lambda k: 0.9 * 0.95**k), 'samples drift'),
        (dict(contrast_bs=lambda k: 0.3 + 0.015 * k), None),
        (dict(cosine_bs_fm=-0.6), 'terms fight'),
        (dict(cosine_bs_fm=-0.6, probe_lead=0.0), 'fake score starved'),
    ],
)
def test_each_pattern_has_its_name(changes, name):
    found = diagnose(made(**changes))
    assert [f.name for f in found] == ([name] if name else [])
    assert all(f.seen and f.advice and str(f).startswith(f'{f.name}: ') for f in found)


def test_only_the_replaced_teacher_is_named():
    (found,) = diagnose(made(probe_shift=lambda k: 0.0 if k // 4 % 2 else 0.3))
    assert "'b'" in found.seen and "'a'" not in found.seen


def test_a_young_run_is_given_time():
    assert not diagnose([]) and not diagnose(made(probe_lead=0.0)[:16]) and not diagnose([{'step': 1, 'norm': 1.0}])


def test_without_effects_a_fake_score_need_not_lead_but_must_not_trail():
    bare = lambda lead: [
        {k: v for k, v in h.items() if k not in ('probe_shift', 'probe_gain', 'probe_lead_targets', 'contrast_bs')}
        for h in made(probe_lead=lead)
    ]
    assert names(bare(0.0)) == [] and names(bare(-0.05)) == ['fake score starved']


def test_ratios():
    truth = torch.randn(3, 5)
    assert (
        better_by(truth, truth + 1, truth) == 1
        and better_by(truth + 1, truth + 1, truth) == 0
        and apart(truth, truth) == 0
    )
    assert better_by(truth + 2, truth + 1, truth) == pytest.approx(-3, abs=1e-4) and apart(
        2 * truth, truth
    ) == pytest.approx(1)
    assert late([{'a': 1}, {}, {'a': 2}, {'a': 3}], 'a') == [2, 3] and late([], 'a') == []


def test_looks_come_when_they_are_due():
    history = [{'step': k} | ({'probe_lead': 0.0} if k == 4 else {}) for k in range(1, 8)]
    assert (
        due(history, 8, 4, 'clay', True) and not due(history, 8, 5, 'clay', True) and not due(history, 8, 4, None, True)
    )
    assert (
        due(history, 8, 4, None, False)
        and not due(history, 8, 0, 'clay', True)
        and due([], 3, 3, 'clay', True)
        and not due([], 2, 3, 'clay', True)
    )


def test_the_best_look():
    look = lambda d, c=1.0, k=0.0: {'val_detail': d, 'val_contrast': c, 'val_colour': k}
    assert (
        val_distance(look(1.0)) == 0
        and val_distance(look(2.0)) == pytest.approx(val_distance(look(0.5)))
        and val_distance({'step': 3}) is None
    )
    assert (
        is_best([], look(0.5))
        and is_best([look(0.2), {'step': 2}], look(0.5))
        and not is_best([look(0.9)], look(0.5))
        and not is_best([], look(1.0, 1.0, float('nan')))
    )


# --- boards
INFO = {
    'step': 3,
    'effect': 'clay',
    'loss_fm': 0.8,
    'detail_bs': 0.5,
    'probe_lead': 0.1,
    'warmup': [1.0],
    'findings': ['x'],
    'val': {'clay': {'detail': 0.7}},
}


def test_boards_get_numbers_under_grouped_names(monkeypatch, tmp_path):
    class Writer:
        def __init__(self, folder):
            self.folder, self.said, self.closed = folder, [], False

        def add_text(self, *a):
            self.said.append(a)

        def add_scalar(self, *a):
            self.said.append(a)

        def close(self):
            self.closed = True

    made = []
    monkeypatch.setitem(
        sys.modules,
        'torch.utils.tensorboard',
        types.SimpleNamespace(SummaryWriter=lambda folder: made.append(Writer(folder)) or made[-1]),
    )
    logged = []
    board = types.SimpleNamespace(
        log=lambda d, step: logged.append((d, step)), finish=lambda: logged.append('finished')
    )
    monkeypatch.setitem(
        sys.modules, 'wandb', types.SimpleNamespace(init=lambda **kw: logged.append(kw['name']) or board)
    )
    boards = Boards(['tensorboard', 'wandb'], tmp_path, 'run', {'steps': 3})
    assert boards(INFO) == {'fm': '0.8', 'detail': '0.5', 'lead': '0.1'}
    boards.close()
    wanted = {'loss/fm': 0.8, 'detail/bs': 0.5, 'probe/lead': 0.1, 'val/clay/detail': 0.7}
    assert scalars(INFO) == wanted and logged == ['run', (wanted, 3), 'finished'] and made[0].closed
    assert {a[0]: a[1:] for a in made[0].said if a[0] != 'settings'} == {k: (v, 3) for k, v in wanted.items()}


def test_boards_that_are_absent_or_unknown(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, 'wandb', None)
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', None)
    for name in ('wandb', 'tensorboard'):
        with pytest.raises(UserError, match=f'{name}.*pip install {name}'):
            Boards([name], tmp_path, 'run')
    with pytest.raises(UserError, match="did you mean 'wandb'"):
        Boards(['wandbe'], tmp_path, 'run')
    assert Boards([], tmp_path, 'run')(copy.deepcopy(INFO)) and not list(tmp_path.iterdir())


def test_every_rule_that_explains_others_names_rules():
    known = {
        'fake score starved',
        'rate too high',
        'samples drift',
        'terms fight',
        'a teacher is the base',
        'a teacher does not know its targets',
        'no gradient',
    }
    assert set(monitors.FOLLOWS) | set().union(*monitors.FOLLOWS.values()) <= known
