"What can happen to a run: teachers that are replaced or broken, divergence, memory and disk that run out, and kill -9 of kernel and runner."

import errno
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace

import pytest
import torch

from collectionlora.bases.pipeline import load_base
from collectionlora.core import seed_of, UserError
from collectionlora.engine import looks, loop, monitors
from collectionlora.engine.ahead import AheadBank
from collectionlora.engine.finetune import finish
from collectionlora.engine.loop import distill
from collectionlora.engine.plan import measured_plan
from collectionlora.engine.pools import load_pools, samples_of
from collectionlora.engine.settings import resolved
from collectionlora.engine.state import Diverged
from collectionlora.engine.terms import generator_update, rate_at
from collectionlora.files.dialects import Lora, lora_hash
from collectionlora.files.lora import read_lora, write_lora
from collectionlora.teachers import TeacherBank

from test_distill import fails, open_world, run, same_history, SMALL

S = replace(SMALL, steps=6, fake_warmup=2, p_switch=0.8)


@pytest.fixture(scope='module')
def straight(world, tmp_path_factory):
    out = tmp_path_factory.mktemp('straight')
    return run(world, S, out), (out / 'collection.safetensors').read_bytes()


# --- teachers
def test_a_teacher_replaced_during_the_run_stops_it_and_the_old_file_lets_it_go_on(world, folder, straight, tmp_path):
    base, _, effects, general, cache = world
    files = {
        id: shutil.copy(folder / 'teachers' / f'{id}.safetensors', tmp_path / f'{id}.safetensors')
        for id in ('one', 'two')
    }
    bank = AheadBank(base.backbone, files, role='lent')
    try:
        training = distill(base, bank, effects, general, cache, S, tmp_path / 'out', save_every=1)
        next(training)
        old = (tmp_path / 'two.safetensors').read_bytes()
        shutil.copy(files['one'], files['two'])
        with pytest.raises(UserError, match='two.safetensors: was replaced while the bank is in use'):
            list(training)
        assert {'student', 'fake'}.isdisjoint(base.backbone.roles)
        (tmp_path / 'two.safetensors').write_bytes(old)
        assert same_history(list(distill(base, bank, effects, general, cache, S, tmp_path / 'out')), straight[0])
        assert (tmp_path / 'out' / 'collection.safetensors').read_bytes() == straight[1]
    finally:
        bank.close()


@pytest.mark.parametrize('ahead', [0, 1, 3])
def test_what_is_laid_out_ahead_changes_nothing(world, folder, straight, tmp_path, ahead):
    base, _, effects, general, cache = world
    bank = AheadBank(
        base.backbone,
        {e.id: folder / 'teachers' / f'{e.id}.safetensors' for e in effects},
        capacity=1,
        role='lent',
        ahead=ahead,
    )
    try:
        list(distill(base, bank, effects, general, cache, S, tmp_path))
    finally:
        bank.close()
    assert (tmp_path / 'collection.safetensors').read_bytes() == straight[1]


def test_a_teacher_that_answers_nan_is_named_as_the_step_and_term_it_spoils(world, tmp_path, monkeypatch, capsys):
    base = world[0]
    true, asked = type(base.backbone).guided, []

    def guided(self, role, *args):
        asked.append(role)
        return true(self, role, *args) * (float('nan') if role == 'teacher' else 1)

    monkeypatch.setattr(type(base.backbone), 'guided', guided)
    said = fails(world, S, tmp_path, save_every=1)
    assert said.startswith('step ') and 'is nan' in said and 'simulation' in said and 'lower lr_student' in said
    assert capsys.readouterr().err.count('going back to step') == S.rollbacks and set(base.backbone.roles) == {
        world[1].role
    }


def test_a_teacher_that_is_the_base_is_named_while_the_run_goes_on(world, folder, tmp_path, capsys):
    base, bank, effects, general, cache = world
    empty = {n: (A, 0 * B) for n, (A, B) in bank.get('two').factors.items()}
    write_lora(tmp_path / 'two.safetensors', Lora(empty), {'collectionlora.base': {'hash': base.hash}})
    other = TeacherBank(
        base.backbone,
        {'one': folder / 'teachers' / 'one.safetensors', 'two': tmp_path / 'two.safetensors'},
        role='lent',
    )
    try:
        history = list(distill(base, other, effects, general, cache, S, tmp_path, look_every=1))
    finally:
        other.close()
    assert next(h['findings'] for h in reversed(history) if 'findings' in h) == ['a teacher is the base']
    said = capsys.readouterr().err
    assert (
        said.count("a teacher is the base: the teacher of 'two' answers as the base") == 1
        and 'collectionlora inspect' in said
    )


# --- looking changes nothing
def test_looks_change_no_bit_and_have_all_numbers(world, straight, tmp_path):
    history = run(world, S, tmp_path, look_every=1)
    assert (tmp_path / 'collection.safetensors').read_bytes() == straight[1]
    looks = [h for h in history if 'probe_lead' in h]
    assert len(looks) == sum(h['effect'] is not None for h in history) and all(
        h['probe_move'] > 0 and h['probe_shift'] > 0 and 'findings' in h for h in looks
    )
    seen = ('probe', 'cosine', 'findings')  # only a look computes these
    drop = lambda h: [{k: v for k, v in i.items() if not k.startswith(seen)} for i in h]
    assert same_history(drop(history), drop(straight[0]))
    alone = run((world[0], None, [], *world[3:]), replace(S, p_switch=0.0, steps=2), tmp_path / 'general', look_every=1)
    assert all('probe_lead' in h and 'probe_shift' not in h for h in alone)


def test_the_best_look_is_a_file(world, tmp_path):
    history = run(world, S, tmp_path / 'a', val_every=1, val_per_effect=1)
    best = min(history, key=monitors.val_distance)['step']
    run(world, replace(S, steps=best), tmp_path / 'b')
    of = lambda path: lora_hash(read_lora(path))
    assert of(tmp_path / 'a' / 'best.safetensors') == of(tmp_path / 'b' / 'collection.safetensors')


# --- divergence
def explodes(monkeypatch, at, halved):
    "From here on the generator update after `at` steps diverges until the rates were halved `halved` times."
    true = generator_update

    def update(engine, state, *args, **kw):
        if state.step == at and state.slower < halved:
            raise Diverged(f'step {at + 1}: boom')
        return true(engine, state, *args, **kw)

    monkeypatch.setattr(loop, 'generator_update', update)


@pytest.mark.parametrize('at, halved, every', [(3, 1, 2), (4, 2, 2), (2, 1, 2), (1, 1, 50)])
def test_a_diverging_run_goes_back_and_takes_smaller_steps(world, tmp_path, monkeypatch, capsys, at, halved, every):
    explodes(monkeypatch, at, halved)
    _, history = finish(distill(*world, S, tmp_path, save_every=every), S.steps)
    back = max(k for k in range(at) if k % every == 0)
    assert [h['step'] for h in history] == list(range(1, S.steps + 1))
    full = lambda k: S.lr_student * rate_at(S, k, k)
    assert [h['lr'] for h in history] == [full(k) / (1 if k < back else 2**halved) for k in range(S.steps)]
    assert capsys.readouterr().err.count(f'going back to step {back}') == halved


@pytest.fixture(scope='module')
def rolled_back(world, tmp_path_factory):
    "The file of a run that went back once, after step 4, and was not interrupted."
    out = tmp_path_factory.mktemp('rolled_back')
    with pytest.MonkeyPatch.context() as monkeypatch:
        explodes(monkeypatch, 4, 1)
        finish(distill(*world, S, out, save_every=2), S.steps)
    return (out / 'collection.safetensors').read_bytes()


@pytest.mark.parametrize('stop', [1, 3, 5])
def test_a_rollback_ends_in_the_same_bits_whenever_it_was_interrupted(world, rolled_back, tmp_path, monkeypatch, stop):
    explodes(monkeypatch, 4, 1)
    training, seen = distill(*world, S, tmp_path / 'cut', save_every=2), []
    for info in training:
        seen.append(info['step'])
        if len(seen) == stop + 1:
            break
    training.close()
    finish(distill(*world, S, tmp_path / 'cut', save_every=2), S.steps)
    assert (tmp_path / 'cut' / 'collection.safetensors').read_bytes() == rolled_back


def test_killed_between_the_rollback_and_the_removal_of_what_it_replaces(world, rolled_back, tmp_path, monkeypatch):
    explodes(monkeypatch, 4, 1)
    training = distill(*world, S, tmp_path / 'cut', save_every=2)
    for info in training:
        if info['step'] == 4:
            break
    training.close()  # a checkpoint at step 4, with full rates
    newer = {p.name: p.read_bytes() for p in (tmp_path / 'cut' / 'checkpoints').glob('0000004*')}
    training = distill(*world, S, tmp_path / 'cut', save_every=2)
    for _ in range(5):
        next(training)  # recorded steps 1 to 4, then the first after the rollback
    training.close()
    for name, data in newer.items():
        (tmp_path / 'cut' / 'checkpoints' / name).write_bytes(data)
    finish(distill(*world, S, tmp_path / 'cut', save_every=2), S.steps)
    assert (tmp_path / 'cut' / 'collection.safetensors').read_bytes() == rolled_back


def test_the_guard_remembers_across_a_resume(world, tmp_path):
    training = distill(*world, S, tmp_path / 'cut')
    for info in training:
        if info['step'] == 3:
            break
    training.close()
    saved = torch.load(next((tmp_path / 'cut' / 'checkpoints').glob('*.pt')), weights_only=True)
    assert (
        len(saved['seen']['loss_fake']) == saved['fakes']
        and sum(len(v) for k, v in saved['seen'].items() if k.startswith('norm_bs')) == 3
        and saved['slower'] == 0
    )


def test_it_gives_up_after_the_last_rollback(world, tmp_path, monkeypatch):
    explodes(monkeypatch, 3, 99)
    assert fails(world, S, tmp_path, save_every=2) == 'step 4: boom'
    assert fails(world, replace(S, rollbacks=0), tmp_path / 'b') == 'step 4: boom'


# --- memory and disk
@pytest.mark.parametrize(
    'error',
    [
        torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB'),
        MemoryError('x'),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes"
        ),
    ],
)
def test_out_of_memory_says_which_knob_helps(world, straight, tmp_path, monkeypatch, error):
    training = distill(*world, S, tmp_path, save_every=1)
    next(training)

    def full(*_):
        raise error

    monkeypatch.setattr(type(world[0].backbone), 'velocity', full)
    with pytest.raises(UserError, match='batch 3, ranks 3 and 3.*checkpointing=true.*frozen=int8'):
        list(training)
    monkeypatch.undo()
    assert (
        same_history(run(world, S, tmp_path), straight[0])
        and (tmp_path / 'collection.safetensors').read_bytes() == straight[1]
    )


def test_other_errors_are_not_taken_for_it(world, tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError('shapes do not match')

    monkeypatch.setattr(type(world[0].backbone), 'velocity', broken)
    with pytest.raises(RuntimeError, match='shapes do not match'):
        run(world, S, tmp_path)


@pytest.mark.parametrize('where, what', [(loop, 'write_lora'), (looks, 'contact_sheet')])
def test_a_disk_that_fills_up_at_the_end(world, straight, tmp_path, monkeypatch, where, what):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, 'No space left on device')

    monkeypatch.setattr(where, what, full)
    assert (
        'No space left on device' in (said := fails(world, S, tmp_path, val_every=6, val_per_effect=1))
        and 'make room' in said
    )
    monkeypatch.undo()
    run(world, S, tmp_path)
    assert (tmp_path / 'collection.safetensors').read_bytes() == straight[1]


# --- options of the base
def test_checkpointing_and_offload_may_change_between_resumes_and_eight_bits_may_not(world, folder, straight, tmp_path):
    b = world[0].backbone
    run(world, replace(S, steps=2), tmp_path)
    b.checkpointing(True)
    b.offload(True)
    try:
        run(world, S, tmp_path)
    finally:
        b.checkpointing(False)
        b.offload(False)
    assert (tmp_path / 'collection.safetensors').read_bytes() == straight[1]
    low = open_world(folder, load_base(folder / 'base', frozen='int8'))
    try:
        assert 'numerics / frozen' in fails(low, S, tmp_path)
        history = run(low, S, tmp_path / 'int8')
        assert [h['loss_fm'] for h in history if 'loss_fm' in h] == pytest.approx(
            [h['loss_fm'] for h in straight[0] if 'loss_fm' in h], rel=0.05
        )
    finally:
        low[1].close()


def test_encoders_go_once_all_is_cached(folder, straight, tmp_path):
    own = open_world(folder, load_base(folder / 'base'))
    assert own[0].encoder_bytes > 0
    run(own, S, tmp_path, val_every=3, val_per_effect=1, drop_encoders=True)
    assert own[0].encoder_bytes == 0 and (tmp_path / 'validation' / '0000003.png').is_file()
    assert (tmp_path / 'collection.safetensors').read_bytes() == straight[1]


def test_the_plan_counts_memory_and_disk(world):
    base, _, effects, general, cache = world
    planned = lambda s, **kw: measured_plan(base, effects, general, cache, resolved(s, 1.0), **kw)
    plan = planned(S, teacher_rank=3)
    held, disk = plan['memory'], plan['disk']
    assert held['encoders, while they encode'] == base.encoder_bytes and min(held.values()) > 0
    double = planned(replace(S, batch=6), teacher_rank=2)
    kept = lambda p: p['memory']['activations of a gradient pass']
    assert 1.7 < kept(double) / kept(plan) < 2.1
    assert disk['collection and best look'] == 2 * held['student'] and held['teacher slot'] == held['student']
    load_pools(cache, samples_of(effects, general))
    written = sum(f.stat().st_size for f in cache.folder.rglob('*.safetensors'))
    assert 0.6 < disk['condition cache, shared between runs'] / written < 1.7


def test_both_plans_count_what_learns_and_what_is_left_alike(world, folder):
    from collectionlora.engine import fits

    base, _, effects, general, cache = world
    for moments, parts in (('fp32', 1), ('fp32', 2), ('8bit', 1)):
        s = resolved(replace(S, moments=moments, rank_student=16, rank_fake=16), 1.0)
        way = fits.Way(moments=moments, processes=parts, spread_moments=parts > 1)
        counted = fits.planned_base(folder / 'base', dtype='float32')
        plan = measured_plan(base, effects, general, cache, s, parts, 2, parts > 1)
        bytes_ = fits.learning_bytes(counted, fits.Work(s, teacher_rank=2), way)
        assert {k: plan['memory'][k] for k in bytes_} == pytest.approx(bytes_, rel=0.02)  # slots are aligned
        left = fits.disk_bytes(counted, fits.Work(s, teacher_rank=2), way)
        assert plan['disk']['checkpoints, at most'] == pytest.approx(left['checkpoints, at most'], rel=0.02)
    assert plan['memory']["AdamW's moments"] < 1.02 * plan['memory']['student']  # in eight bits


# --- the real thing: kill -9 of kernel and runner
RUNNER = """
import sys
from pathlib import Path
from collectionlora.run.execute import execute
world = Path({folder!r})
small = dict(fake_per_generator=2, fake_warmup=3, few_steps=4, rank_fake=2)
execute('distill', {out!r}, 'all', dict(steps=150, batch=2, rank=2, settings=small, save_every=1, val_every=0),
        dict(base=world/'base', effects=[world/'effects'], teachers=[world/'labelled'/f'{{i}}.safetensors' for i in ('one', 'two')], general=world/'general'))
"""


@pytest.fixture(scope='module')
def labelled(world, folder):
    "The teachers again, with their effect in the header."
    for id in ('one', 'two'):
        header = {
            'collectionlora.base': {'hash': world[0].hash},
            'collectionlora.effects': [
                {'id': id, 'category': 'animal', 'trigger': '', 'teacher_prompt': f'apply {id}'}
            ],
        }
        write_lora(folder / 'labelled' / f'{id}.safetensors', world[1].get(id), header)


def launch(folder, out):
    code = textwrap.dedent(RUNNER).format(folder=str(folder), out=str(out))
    return subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def kernels(runner):
    import psutil

    try:
        return [p for p in psutil.Process(runner.pid).children() if 'ipykernel_launcher' in ' '.join(p.cmdline())]
    except psutil.NoSuchProcess:
        return []


def strike(runner, victim, r):
    "kill -9 of the kernel, the runner, or both; a kernel without its runner ends by itself."
    of = kernels(runner)
    for p in of if victim in ('kernel', 'both') else []:
        p.kill()
    if victim in ('runner', 'both'):
        runner.send_signal(signal.SIGKILL)
    runner.wait(timeout=300)
    for p in of:
        p.wait(timeout=60)
    return bool(of)


@pytest.mark.slow
def test_kill_nine_of_kernel_and_runner_at_twenty_random_moments(folder, labelled, tmp_path):
    whole = launch(folder, tmp_path / 'whole')
    assert whole.wait(timeout=900) == 0, whole.stderr.read()
    r, struck, steps = random.Random(seed_of('kernel and runner')), 0, set()
    while struck < 20:
        runner, out = launch(folder, tmp_path / 'killed'), tmp_path / 'killed' / '.all' / 'checkpoints'
        wanted, deadline, patience = r.random(), time.time() + 300, r.random()
        while runner.poll() is None and time.time() < deadline:  # mostly while it trains, sometimes while it starts
            if kernels(runner) and (
                wanted < 0.25
                or list(out.glob('*.pt'))
                and sorted(out.glob('*.pt'))[-1].stat().st_mtime > time.time() - 2
            ):
                break
            time.sleep(0.1)
        time.sleep(patience)
        if runner.poll() is not None:
            break  # it has finished
        struck += strike(runner, ('kernel', 'runner', 'both')[struck % 3], r)
        steps |= {p.stem for p in out.glob('*.pt')}
    last = launch(folder, tmp_path / 'killed')
    assert last.wait(timeout=900) == 0, last.stderr.read()
    assert struck >= 20 and len(steps) >= 10
    assert (tmp_path / 'killed' / 'all.safetensors').read_bytes() == (
        tmp_path / 'whole' / 'all.safetensors'
    ).read_bytes()
