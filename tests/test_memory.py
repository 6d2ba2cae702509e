"What needs memory and what does not change: micro-batches, gradients in place, states on the host."

from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch

from collectionlora.core import load_state, save_state, UserError
from collectionlora.engine import state, terms
from collectionlora.engine.parallel import optimiser, Ranks
from collectionlora.engine.pools import load_pools, samples_of
from collectionlora.engine.rollouts import Engine
from collectionlora.engine.settings import resolved, schedule_of
from collectionlora.engine.state import Guard, State

from collectionlora.files.lora import read_lora

from test_distill import engine_of, fails, make_world, open_world, run, same_history, SMALL

BATCH = replace(SMALL, batch=5, fake_targets=0.5, p_switch=0.7)


def close(a, b, tol=1e-4):
    "Whether two flat tensors are equal to rounding."
    return (a - b).norm() <= tol * b.norm() and b.norm() > 0


def everything(engine, ids, step=0):
    "What a step computes: each term's gradient, loss and monitors, and the fake score's gradient and losses."
    found = terms.gradients(engine, ids, step)
    fake, losses = engine.buffer(0, 'fake'), []
    for loss, n in terms.fake_score_losses(engine, next(filter(None, ids), None), 4):
        loss = loss * (n / engine.s.batch)
        terms.flat_gradient(engine.backbone, loss, 'fake', fake)
        losses.append(loss.item())
    return found, fake.clone(), sum(losses)


def agree(one, other):
    "Whether two answers of `everything` are equal to rounding."
    (a, fake_a, loss_a), (b, fake_b, loss_b) = one, other
    assert a.keys() == b.keys() and a
    for name in a:
        assert close(a[name][0], b[name][0]), name
        assert a[name][1] == pytest.approx(b[name][1], rel=1e-4)
        assert a[name][2] == pytest.approx(b[name][2], rel=1e-3, abs=1e-4)
    assert close(fake_a, fake_b) and loss_a == pytest.approx(loss_b, rel=1e-4)


@pytest.fixture
def micro(roles):
    yield lambda n: setattr(roles, 'micro_batch', n)
    roles.micro_batch = 0


@pytest.mark.parametrize(
    'change',
    [
        dict(),
        dict(sampler='stochastic', shared_rollout=True, fake_per_generator=3),
        dict(routes=2, guidance=1.0),
        dict(fake_batch='same', anchor_after_critic=True, few_shift=3.0),
    ],
)
def test_micro_batches_change_memory_and_not_the_result(world, roles, micro, change):
    "One sample at a time, two at a time and all at once: the same gradients, losses and monitors to rounding."
    s = replace(BATCH, **change)
    ids = ['one', 'two'] if s.routes == 2 else ['one']
    whole = everything(engine_of(world, s), ids)
    for n in (1, 2):
        micro(n)
        agree(everything(engine_of(world, s), ids), whole)


def test_the_gradient_is_the_sum_of_its_shares_in_their_order(world, roles, micro):
    "To the last bit: what micro-batches add up is what each of them gives by itself, added in the batch's order."
    micro(2)
    engine = engine_of(world, BATCH)
    found = terms.gradients(engine, ['one'], 0)
    summed = {k: torch.zeros_like(roles.flat('student')) for k in found}
    jobs = terms.jobs_of(engine, ['one'], 0)
    assert [len(job.share) for job in jobs] == [1, 2, 2]
    for job in jobs:
        b = terms.batch_of(engine, job.id, job.share)
        for name, loss, _ in terms.terms(engine, b, job.g):
            summed[name] += terms.flat_gradient(roles, loss * (len(job.share) / engine.s.batch), 'student')
    assert all(torch.equal(found[k][0], summed[k]) for k in found)


def test_no_forward_is_larger_than_a_micro_batch(world, roles, micro, monkeypatch):
    "In training, guidance and looks alike."
    seen, true = [], type(roles)._forward
    monkeypatch.setattr(type(roles), '_forward', lambda b, role, x, *a: (seen.append(len(x)), true(b, role, x, *a))[1])
    micro(2)
    engine = engine_of(world, BATCH)
    everything(engine, ['one'])
    terms.few_rows(engine, 'one', 0)
    cond = engine.pools[0].student.index([0, 1, 2])
    with torch.no_grad():
        roles.guided('base', torch.randn(3, 64, 16), torch.full((3,), 0.5), cond, cond, 2.0)
    assert max(seen) == 2 and len(seen) > 10


def test_updates_of_a_batch_in_parts_end_in_the_same_weights(world, roles, micro):
    "Fake updates and a generator update, in micro-batches and not."
    found = {}
    for n in (0, 1):
        micro(n)
        for k, role in enumerate(('student', 'fake')):
            with torch.no_grad():
                roles.flat(role).normal_(0, 0.1, generator=torch.Generator().manual_seed(10 + k))
        engine = engine_of(world, BATCH)
        state, guard = State.fresh(roles, engine.s), Guard(0)
        for _ in range(2):
            terms.fake_update(engine, state, 'one', guard)
        info = terms.generator_update(engine, state, ['one'], guard, look=True)
        found[n] = info, state.student.detach().clone(), state.fake.detach().clone(), state.mean.clone()
        assert len(engine.buffers) == 2 and state.mean.device.type == 'cpu'
    (a, *first), (b, *second) = found[0], found[1]
    assert {k for k in a if k.startswith('cosine')} == {'cosine_bs_ts', 'cosine_bs_fm', 'cosine_ts_fm'}
    assert all(a[k] == pytest.approx(b[k], rel=1e-2, abs=1e-3) for k in a if isinstance(a[k], float))
    assert all(close(x, y, 1e-2) for x, y in zip(first, second))


def test_cosines_are_those_of_the_whole_gradients_and_only_there_on_a_look(world, roles):
    engine = engine_of(world, SMALL)
    state, guard = State.fresh(roles, engine.s), Guard(0)
    found = terms.gradients(engine, ['one'], 0)
    wanted = torch.nn.functional.cosine_similarity(found['bs'][0], found['fm'][0], 0).item()
    total, info = terms.guarded(engine, state, ['one'], guard, True)
    assert info['cosine_bs_fm'] == pytest.approx(wanted, abs=1e-4)
    assert torch.equal(total, sum(g for g, _, _ in found.values()))
    assert not any(k.startswith('cosine') for k in terms.guarded(engine, state, ['one'], guard, False)[1])


@pytest.fixture(scope='module')
def shapes(tmp_path_factory):
    "A world whose pictures have three shapes."
    folder = tmp_path_factory.mktemp('shapes')
    args = open_world(folder, make_world(folder, sizes=((64, 64), (128, 32), (32, 128))))
    yield args
    args[1].close()


def test_one_batch_holds_pictures_of_all_shapes(shapes):
    "Three pictures in three shapes: a batch of three sees all three, in every step, whatever the micro-batch."
    base, bank, effects, general, cache = shapes
    b, s = base.backbone, resolved(replace(BATCH, batch=3), 1.0)
    for k, role in enumerate(('student', 'fake')):
        b.add_role(role, 2, seed=k)
        with torch.no_grad():
            b.flat(role).normal_(0, 0.1, generator=torch.Generator().manual_seed(10 + k))
    engine = Engine(b, bank, load_pools(cache, samples_of(effects, general)), s, schedule_of(s))
    assert len(engine.pools) == 3
    try:
        for step in range(4):
            shares = terms.shares_of(engine, 'one', step)
            assert {share.pool for share in shares} == {0, 1, 2} and sorted(i for x in shares for i in x.places) == [
                0,
                1,
                2,
            ]
        whole = everything(engine, ['one'])
        b.micro_batch = 1
        agree(everything(engine, ['one']), whole)
    finally:
        b.micro_batch = 0
        for role in ('student', 'fake'):
            b.remove(role)


# --- checkpoints
def stopping(where, times, monkeypatch):
    "Makes a function of the loop run out of memory on these calls (from 1)."
    from collectionlora.engine import loop

    true, calls = getattr(loop, where), []

    def short(*args, **kw):
        calls.append(1)
        if len(calls) in times:
            raise RuntimeError('CUDA out of memory. Tried to allocate 3.63 GiB')
        return true(*args, **kw)

    monkeypatch.setattr(loop, where, short)


LOOKED = replace(SMALL, steps=3, fake_warmup=1)


@pytest.fixture(scope='module')
def looked(world, tmp_path_factory):
    out = tmp_path_factory.mktemp('looked')
    return run(world, LOOKED, out, val_every=2, save_every=3), (out / 'collection.safetensors').read_bytes()


def test_out_of_memory_at_a_look_loses_no_step(world, looked, tmp_path, monkeypatch):
    "The step before a look is on disk, and the run goes on with the look it missed."
    stopping('validate', {1}, monkeypatch)
    assert 'micro_batch' in fails(world, LOOKED, tmp_path, val_every=2, save_every=3)
    assert [p.name[:7] for p in (tmp_path / 'checkpoints').glob('*.pt')] == ['0000002']
    history = run(world, LOOKED, tmp_path, val_every=2, save_every=3)
    assert same_history(history, looked[0]) and 'val' in history[1]
    assert (tmp_path / 'collection.safetensors').read_bytes() == looked[1]


def test_out_of_memory_at_a_checkpoint_loses_only_what_came_after_the_last(world, looked, tmp_path, monkeypatch):
    def short(path, packed):
        if packed['step'] == 2:
            raise MemoryError('out of memory')
        save_state(path, packed)

    monkeypatch.setattr(state, 'save_state', short)
    assert 'the last checkpoint is whole' in fails(world, LOOKED, tmp_path, val_every=2, save_every=1)
    monkeypatch.undo()
    assert [p.name[:7] for p in (tmp_path / 'checkpoints').glob('*.pt')] == ['0000001']
    assert same_history(run(world, LOOKED, tmp_path, val_every=2, save_every=3), looked[0])
    assert (tmp_path / 'collection.safetensors').read_bytes() == looked[1]


def test_checkpoints_come_by_time_too_and_within_a_step(world, tmp_path, monkeypatch):
    from collectionlora.engine import loop

    written, true = [], loop.save_checkpoint
    monkeypatch.setattr(loop, 'save_checkpoint', lambda *a: written.append(true(*a).stem))
    run(world, replace(LOOKED, steps=1, fake_warmup=2), tmp_path, save_every=50, save_minutes=0.0, keep=2)
    assert written[:3] == ['0000000-00000001', '0000000-00000002', '0000000-00000003'] and len(written) == 5
    left = sorted(p.stem for p in (tmp_path / 'checkpoints').glob('*.pt'))
    assert left == [written[0], *written[-2:]]  # the first of step 0, and the last two


def test_what_a_killed_write_has_left_is_removed_when_the_run_goes_on(world, tmp_path):
    left = tmp_path / 'checkpoints' / '.0000002-00000003.123.pt.part'
    left.parent.mkdir()
    left.write_bytes(b'x')
    run(world, replace(LOOKED, steps=1), tmp_path)
    assert not left.exists() and list(left.parent.glob('*.pt'))


def test_a_resumed_state_keeps_nothing_of_its_file(world, roles, tmp_path):
    engine = engine_of(world, SMALL)
    now, guard = State.fresh(roles, engine.s), Guard(0)
    terms.fake_update(engine, now, 'one', guard)
    packed = now.pack({})
    assert packed['student'].data_ptr() == now.student.data_ptr()  # no copy is made to be written
    save_state(tmp_path / 'c.pt', packed)
    again = State.fresh(roles, engine.s)
    saved = load_state(tmp_path / 'c.pt', mapped=True)
    again.unpack(saved)
    of_file = {t.untyped_storage().data_ptr() for t in saved['opt_fake']['state'][0].values()} | {
        saved[k].untyped_storage().data_ptr() for k in ('student', 'fake', 'mean')
    }
    held = [again.student, again.fake, again.mean, *again.opt_fake.state[again.fake].values()]
    assert not of_file & {t.untyped_storage().data_ptr() for t in held}
    assert torch.equal(again.opt_fake.state[again.fake]['exp_avg'], saved['opt_fake']['state'][0]['exp_avg'])


def test_files_are_in_the_bases_numbers(world, tmp_path):
    "A collection for a base in half precision is half as large; on an fp32 base it is asked for."
    run(world, replace(LOOKED, steps=1), tmp_path / 'half', file_dtype=torch.bfloat16)
    run(world, replace(LOOKED, steps=1), tmp_path / 'full')
    half, full = (read_lora(tmp_path / n / 'collection.safetensors') for n in ('half', 'full'))
    for name, (A, B) in full.factors.items():
        assert torch.equal(half.factors[name][0].float(), A.bfloat16().float())


def test_a_large_file_is_hashed_once_and_again_when_it_changes(tmp_path, monkeypatch):
    import hashlib

    from collectionlora import core

    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'home'))
    monkeypatch.setattr(core, 'LARGE_FILE', 1000)
    monkeypatch.setattr(core, 'SETTLED', -1.0)
    file, small = tmp_path / 'base.safetensors', tmp_path / 'small'
    file.write_bytes(b'a' * 2000)
    small.write_bytes(b'a' * 10)
    true = hashlib.sha256(b'a' * 2000).hexdigest()
    assert core.sha256_file(file) == true and core.sha256_file(small) == hashlib.sha256(b'a' * 10).hexdigest()
    (note,) = (p for p in (tmp_path / 'home').rglob('*') if p.is_file())
    note.write_text('0' * 64)
    assert core.sha256_file(file) == '0' * 64  # it was not read again
    file.write_bytes(b'b' * 2000)
    assert core.sha256_file(file) == hashlib.sha256(b'b' * 2000).hexdigest()
    monkeypatch.setattr(core, 'SETTLED', 60.0)
    file.write_bytes(b'c' * 2000)
    core.sha256_file(file)
    assert len([p for p in (tmp_path / 'home').rglob('*') if p.is_file()]) == 2  # too fresh to be trusted


# --- moments in eight bits
def test_eight_bit_moments_are_refused_where_they_cannot_be():
    with pytest.raises(UserError, match='low_precision rounds moments'):
        replace(SMALL, moments='8bit', low_precision=True)
    with pytest.raises(UserError, match="moments is '4bit'"):
        replace(SMALL, moments='4bit')
    with pytest.raises(UserError, match='blocks of 256'):
        optimiser(torch.nn.Parameter(torch.zeros(100)), Ranks(), '8bit', lr=1e-3)
    if find_spec('torchao') is None:
        with pytest.raises(UserError, match='pip install torchao'):
            optimiser(torch.nn.Parameter(torch.zeros(512)), Ranks(), '8bit', lr=1e-3)


@pytest.mark.slow
@pytest.mark.skipif(find_spec('torchao') is None, reason='torchao is not installed')
def test_eight_bit_moments_resume_to_the_same_bits_in_a_quarter_of_the_memory(tmp_path):
    "The first step compiles, which takes a minute; the moments come back from a file bit for bit."
    g = torch.Generator().manual_seed(0)
    grads, start = torch.randn(4, 8192, generator=g) * 1e-3, torch.randn(8192, generator=g)
    begin = lambda kind, w: optimiser(torch.nn.Parameter(w.clone()), Ranks(), kind, lr=1e-3, betas=(0.0, 0.99))
    full, eight = begin('fp32', start), begin('8bit', start)
    weights = lambda opt: opt.param_groups[0]['params'][0]
    for grad in grads[:3]:
        for opt in (full, eight):
            terms.apply_gradient(weights(opt), grad.clone(), opt, 1e-3, SMALL)
    moved, wanted = weights(eight).detach() - start, weights(full).detach() - start
    assert (moved - wanted).norm() < 0.1 * wanted.norm()
    moment = eight.state[weights(eight)]['exp_avg_sq']
    held = sum(getattr(moment, name).nbytes for name in moment.__tensor_flatten__()[0])
    assert held < 0.27 * start.nbytes + 1100  # the table of 256 numbers is held once for each moment
    save_state(tmp_path / 'c.pt', eight.state_dict())
    again = begin('8bit', weights(eight).detach())
    state.restore(again, load_state(tmp_path / 'c.pt', mapped=True))
    for opt in (eight, again):
        terms.apply_gradient(weights(opt), grads[3].clone(), opt, 1e-3, SMALL)
    assert torch.equal(weights(eight), weights(again))
