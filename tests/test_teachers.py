"Flow matching that is killed, starved of disk and given other data; the bank's slot; targets that are painted once."

import errno
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings as hyp, strategies as st
from PIL import Image

from collectionlora.bases.pipeline import load_base
from collectionlora.bases.tiny import tiny_base
from collectionlora.core import rng, UserError
from collectionlora.engine import targets as painting
from collectionlora.engine.ahead import AheadBank
from collectionlora.engine.finetune import (
    balanced_rows,
    draw_batch,
    Example,
    examples,
    finish,
    flow_data,
    FlowSettings,
    train_fm,
    train_teacher,
)
from collectionlora.engine.targets import make_targets, sample_targets, target_latents
from collectionlora.files import lora as lora_files
from collectionlora.files.conditions import ConditionCache
from collectionlora.files.dialects import Lora, lora_hash
from collectionlora.files.effects import write_effect
from collectionlora.files.header import read_header
from collectionlora.files.lora import write_lora
from collectionlora.files.merging import merge
from collectionlora.flow import ode_times, sample_ode
from collectionlora.roles import TARGETS
from collectionlora.teachers import teacher_files, TeacherBank, training_times
from collectionlora.use.edit import load_role

SMALL = FlowSettings(steps=12, batch=2, lr=5e-3, rank=2, save_every=4)


def picture(seed, size=(64, 64)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8)).resize(
        size, Image.BICUBIC
    )


def effect_at(folder, id, n=3, size=(64, 64)):
    return write_effect(
        folder / id,
        id=id,
        category='animal',
        prompt=f'apply {id}',
        pairs=[(picture(i, size), picture(i + 50, size)) for i in range(n)],
    )


@pytest.fixture(scope='module')
def base(tmp_path_factory):
    return load_base(tiny_base(tmp_path_factory.mktemp('tiny')))


@pytest.fixture(scope='module')
def world(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp('data')
    effect = effect_at(folder, 'one')
    cache = ConditionCache(base, folder / 'cache')
    return effect, cache, flow_data(cache, examples(effect))


@pytest.fixture(scope='module')
def whole(base, world):
    return finish(train_fm(base.backbone, world[2], SMALL), SMALL.steps)


def same(a: Lora, b: Lora) -> bool:
    return lora_hash(a) == lora_hash(b)


# --- drawing
@hyp(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from('abcd'), min_size=1, max_size=30), st.integers(1, 40), st.integers(0, 999))
def test_batches_are_balanced(groups, n, seed):
    rows = balanced_rows(groups, n, rng(seed))
    counts = {g: sum(groups[r] == g for r in rows) for g in set(groups)}
    assert len(rows) == n and max(counts.values()) - min(counts.values()) <= 1
    for g, c in counts.items():
        uses = [rows.count(i) for i, h in enumerate(groups) if h == g]
        assert max(uses) - min(uses) <= 1


def test_times():
    g = torch.Generator().manual_seed(0)
    uniform, middle, shifted = (
        training_times(20000, k, s, g) for k, s in (('uniform', 1), ('logit_normal', 1), ('uniform', 3))
    )
    assert all(0 <= t.min() and t.max() <= 1 for t in (uniform, middle, shifted))
    assert abs(uniform.mean() - 0.5) < 0.01 and middle.std() < uniform.std() and abs(shifted.median() - 0.75) < 0.01
    with pytest.raises(UserError, match="'uniform'"):
        training_times(1, 'unifrm', 1, g)


@pytest.mark.parametrize(
    'bad',
    [
        dict(steps=0),
        dict(batch=0),
        dict(rank=0),
        dict(dropout=1.0),
        dict(lr=0.0),
        dict(times='gauss'),
        dict(save_every=0),
    ],
)
def test_settings_are_checked(bad):
    with pytest.raises(UserError):
        FlowSettings(**bad)


def test_a_batch_is_a_function_of_its_step(world):
    data = world[2]
    a, b, c = (draw_batch(data, SMALL, k)[0] for k in (3, 3, 4))
    assert all(torch.equal(x, y) for x, y in zip(a[:3], b[:3])) and torch.equal(a[3].emb, b[3].emb)
    assert not torch.equal(a[1], c[1])


def test_instructions_are_dropped_at_the_asked_rate(world):
    data, s = world[2], replace(SMALL, batch=4, dropout=0.25)
    bucket, M = data.buckets[0], len(data.buckets[0].groups)
    empty = bucket.cond.index([M])
    dropped = 0
    for step in range(100):
        cond = draw_batch(data, s, step)[0][3]
        for i in range(4):
            row = cond.index([i])
            dropped += row.emb.shape == empty.emb.shape
    assert empty.emb.shape != bucket.cond.index([0]).emb.shape and 70 < dropped < 130


def test_targets_must_share_their_sources_grid(base, world, tmp_path):
    picture(1, (160, 64)).save(tmp_path / 'wide.png')
    with pytest.raises(UserError, match='wide.png: lands on the latent grid'):
        flow_data(world[1], [Example(world[0].sources[0], tmp_path / 'wide.png', 'x', 'x')])
    with pytest.raises(UserError, match='no examples'):
        flow_data(world[1], [])


def test_two_shapes_and_flips_train_together(base, world, tmp_path):
    wide = effect_at(tmp_path, 'wide', 2, (160, 64))
    data = flow_data(world[1], examples(world[0]) + examples(wide, 'other words'), flip=True)
    assert [len(b.groups) for b in data.buckets] == [6, 4] and data.hash != flow_data(world[1], examples(world[0])).hash
    seen = {x0.shape[1] for k in range(20) for x0, *_ in draw_batch(data, SMALL, k)}
    assert len(seen) == 2
    lora, infos = finish(train_fm(base.backbone, data, replace(SMALL, steps=3)), 3)
    assert len(infos) == 3


def test_conditions_are_read_row_by_row_mirrored_ones_too(world):
    effect, cache, _ = world
    (bucket,) = flow_data(cache, examples(effect), flip=True).buckets
    asked = [(e.source, e.prompt) for e in examples(effect)]
    n = len(asked)
    wanted = [cache.cond(asked, flip=f) for f in (False, True)] + [
        cache.uncond([p for p, _ in asked], flip=f) for f in (False, True)
    ]
    for k, cond in enumerate(wanted):
        for i in range(n):
            row, want = bucket.cond.index(k * n + i), cond.index([i])
            assert torch.equal(row.source, want.source) and torch.equal(row.emb, want.emb)
    held = [v for v in vars(bucket.cond).values() if isinstance(v, torch.Tensor)]
    assert not held and bucket.x0.device.type == 'cpu'  # a card holds the samples of one forward alone


# --- training
def test_one_pair_can_be_learned(base, world):
    data = flow_data(world[1], examples(world[0])[:1])
    s = FlowSettings(steps=60, batch=4, lr=2e-2, rank=8, dropout=0.0, clip=10.0)
    losses = [i['loss'] for i in finish(train_fm(base.backbone, data, s), 60)[1]]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10]) and not base.backbone.roles


@pytest.mark.parametrize('calls', [(1,), (6,), (5, 3, 4)])
def test_killed_anywhere_ends_in_the_same_bits(base, world, whole, tmp_path, monkeypatch, calls):
    original, left = type(base.backbone).velocity, []

    def velocity(self, *args):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return original(self, *args)

    monkeypatch.setattr(type(base.backbone), 'velocity', velocity)
    for n in calls:
        left[:] = [n]
        with pytest.raises(KeyboardInterrupt):
            finish(train_fm(base.backbone, world[2], SMALL, tmp_path / 'c.pt'), 12)
        assert not base.backbone.roles
    left[:] = [0]
    lora, infos = finish(train_fm(base.backbone, world[2], SMALL, tmp_path / 'c.pt'), 12)
    assert (
        same(lora, whole[0])
        and [i['loss'] for i in infos] == [i['loss'] for i in whole[1]]
        and not list(tmp_path.glob('.*'))
    )
    assert same(
        finish(train_fm(base.backbone, world[2], SMALL, tmp_path / 'c.pt'), 12)[0], whole[0]
    )  # finished: nothing left to do, same result


def out_of_memory_at(call, f, error):
    "f, which runs out of memory at one of its calls."
    calls = []

    def short(*args, **kw):
        calls.append(1)
        if len(calls) == call:
            raise error
        return f(*args, **kw)

    return short


OUT = [MemoryError(), RuntimeError("[enforce fail] . DefaultCPUAllocator: can't allocate memory: you tried 8 bytes")]


@pytest.mark.parametrize('error', OUT)
def test_out_of_memory_while_a_teacher_trains_loses_no_step(base, world, whole, tmp_path, monkeypatch, error):
    short = out_of_memory_at(6, type(base.backbone).velocity, error)
    monkeypatch.setattr(type(base.backbone), 'velocity', short)
    with pytest.raises(UserError, match='out of memory at batch .*; checkpointing=true goes on from here'):
        finish(train_fm(base.backbone, world[2], SMALL, tmp_path / 'c.pt'), 12)
    assert torch.load(tmp_path / 'c.pt', weights_only=True)['step'] == 5 and not base.backbone.roles
    assert same(finish(train_fm(base.backbone, world[2], SMALL, tmp_path / 'c.pt'), 12)[0], whole[0])


def test_out_of_memory_while_encoding_or_painting_keeps_what_is_made(base, bank, world, tmp_path, monkeypatch):
    effect, how = replace(world[0], id='wide'), dict(per_source=2, steps=2, w=2.0, batch=2)
    pairs = [(p, effect.prompt) for p in effect.sources]
    with monkeypatch.context() as m:
        m.setattr(type(base), 'encode_images', out_of_memory_at(3, type(base).encode_images, MemoryError()))
        words = 'out of memory at . pictures or prompts .*; micro_batch=1 encodes them one by one'
        with pytest.raises(UserError, match=words):
            ConditionCache(base, tmp_path / 'c').warm(pairs)
    assert ConditionCache(base, tmp_path / 'c').warm(pairs) == 2 * len(pairs) - 2
    with monkeypatch.context() as m:
        m.setattr(painting, 'sample_ode', out_of_memory_at(2, painting.sample_ode, OUT[1]))
        with pytest.raises(UserError, match='out of memory at batch 2 .*; a smaller batch, or at 1 frozen=host, goes on'):
            make_targets(base, bank, effect, world[1], tmp_path / 't', **how)
    calls, original = [], painting.sample_ode
    monkeypatch.setattr(painting, 'sample_ode', lambda *args: calls.append(1) or original(*args))
    made = make_targets(base, bank, effect, world[1], tmp_path / 't', **how)
    assert len(calls) == 2 and len(made) == 6  # the first of three batches was kept


def test_an_update_cut_in_half_is_not_saved(base, world, whole, tmp_path, monkeypatch):
    original, calls = torch.optim.AdamW.step, []

    def step(self, *args):
        original(self, *args)
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt  # the weights have moved, the step has not been counted

    monkeypatch.setattr(torch.optim.AdamW, 'step', step)
    with pytest.raises(KeyboardInterrupt):
        finish(train_fm(base.backbone, world[2], SMALL, tmp_path / 'c.pt'), 12)
    assert torch.load(tmp_path / 'c.pt', weights_only=True)['step'] == 4
    assert same(finish(train_fm(base.backbone, world[2], SMALL, tmp_path / 'c.pt'), 12)[0], whole[0])


def test_full_disk_leaves_the_checkpoint_before_it(base, world, whole, tmp_path, monkeypatch):
    original, calls = torch.save, []

    def save(state, path):
        calls.append(1)
        if len(calls) == 2:
            path.write_bytes(b'half')
            raise OSError(errno.ENOSPC, 'No space left on device')
        original(state, path)

    monkeypatch.setattr(torch, 'save', save)
    with pytest.raises(UserError, match=r'c.pt: cannot be written \(\[Errno 28\] No space left'):
        finish(train_fm(base.backbone, world[2], SMALL, tmp_path / 'c.pt'), 12)
    assert [p.name for p in tmp_path.iterdir()] == ['c.pt'] and torch.load(tmp_path / 'c.pt', weights_only=True)[
        'step'
    ] == 4
    assert same(finish(train_fm(base.backbone, world[2], SMALL, tmp_path / 'c.pt'), 12)[0], whole[0])


@pytest.mark.parametrize('error', [OSError(errno.ENOSPC, 'No space left on device'), RuntimeError('unexpected pos 704')])
def test_a_full_disk_is_said_however_torch_says_it(tmp_path, monkeypatch, error):
    from collectionlora.engine import finetune

    def full(*_):
        raise error

    monkeypatch.setattr(torch, 'save', full)
    with pytest.raises(UserError, match='a.pt: cannot be written .*make room'):
        finetune._save(tmp_path / 'a.pt', {})


def test_what_a_killed_write_has_left_is_removed(base, world, tmp_path):
    mine, other = tmp_path / '.a.123.pt.part', tmp_path / '.b.123.pt.part'
    for part in (mine, other):
        part.write_bytes(b'x')
    finish(train_fm(base.backbone, world[2], replace(SMALL, steps=1), tmp_path / 'a.pt'), 1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['.b.123.pt.part', 'a.pt']


def test_checkpoints_of_others_are_refused(base, world, tmp_path):
    finish(train_fm(base.backbone, world[2], replace(SMALL, steps=4), tmp_path / 'c.pt'), 4)
    held = dict(base.backbone.numerics, frozen='int8')
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match="made with frozen = 'as it is'"):
        patch.setattr(type(base.backbone), 'numerics', held)
        next(train_fm(base.backbone, world[2], replace(SMALL, steps=4), tmp_path / 'c.pt'))
    for change in (dict(lr=1e-4), dict(rank=3), dict(seed=1), dict(steps=5)):
        with pytest.raises(UserError, match=f'made with {next(iter(change))}'):
            next(train_fm(base.backbone, world[2], replace(SMALL, **{'steps': 4, **change}), tmp_path / 'c.pt'))
    with pytest.raises(UserError, match='other images'):
        next(
            train_fm(
                base.backbone,
                flow_data(world[1], examples(world[0], 'new words')),
                replace(SMALL, steps=4),
                tmp_path / 'c.pt',
            )
        )
    (tmp_path / 'c.pt').write_bytes((tmp_path / 'c.pt').read_bytes()[:300])
    with pytest.raises(UserError, match='damaged checkpoint'):
        next(train_fm(base.backbone, world[2], replace(SMALL, steps=4), tmp_path / 'c.pt'))
    assert not base.backbone.roles


def test_diverged_training_stops(base, world, monkeypatch):
    original = type(base.backbone).velocity
    monkeypatch.setattr(type(base.backbone), 'velocity', lambda self, *a: original(self, *a) * math.nan)
    with pytest.raises(UserError, match='lower lr'):
        finish(train_fm(base.backbone, world[2], SMALL), 12)


def test_interruption_says_how_to_go_on(base, world, tmp_path, capsys):
    def watch(info):
        if info['step'] == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finish(train_fm(base.backbone, world[2], SMALL, tmp_path / 'c.pt'), 12, 'one', watch)
    assert (
        'stopped after step 5' in capsys.readouterr().err
        and torch.load(tmp_path / 'c.pt', weights_only=True)['step'] == 5
    )


def test_teacher_file_says_what_it_is(base, world, tmp_path):
    lora, _ = finish(train_teacher(base, world[0], world[1], SMALL), 12)
    write_lora(tmp_path / 't.safetensors', lora, lora.meta['header'])
    header = read_header(tmp_path / 't.safetensors')
    assert (
        header['collectionlora.base']['hash'] == base.hash
        and header['collectionlora.effects'][0]['teacher_prompt'] == 'apply one'
    )
    assert header['collectionlora.train']['settings'] == asdict(SMALL)


# --- the bank
def random_lora(base, rank, seed, targets=TARGETS):
    b = base.backbone
    b.add_role('tmp', rank, targets=targets)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in b.parameters('tmp'):
            p.normal_(0, 0.3, generator=g)
    lora = b.lora('tmp')
    b.remove('tmp')
    return lora


@pytest.fixture
def files(base, tmp_path):
    made = {
        'wide': random_lora(base, 6, 0),
        'narrow': random_lora(base, 2, 1, ['attn.to_q', 'attn.to_k']),
        'third': random_lora(base, 4, 2),
    }
    for id, lora in made.items():
        write_lora(tmp_path / f'{id}.safetensors', lora, {'collectionlora.base': {'hash': base.hash}})
    return {id: tmp_path / f'{id}.safetensors' for id in made}


@pytest.fixture
def bank(base, files):
    bank = AheadBank(base.backbone, files)
    yield bank
    bank.close()


@pytest.fixture
def asked(world):
    cond = world[1].cond([(world[0].sources[0], 'apply one')])
    g = torch.Generator().manual_seed(3)
    return torch.randn(cond.source.shape, generator=g), torch.tensor([0.6]), cond


@torch.no_grad()
def v(base, role, asked):
    return base.backbone.velocity(role, *asked)


def test_nothing_of_the_previous_teacher_remains(base, bank, files, asked):
    expected = {}
    for id in files:
        fresh = TeacherBank(base.backbone, {id: files[id]}, rank=6, role='fresh')
        expected[id] = v(base, fresh.use(id), asked)
        fresh.close()
    for id in ('wide', 'narrow', 'third', 'narrow', 'wide'):
        assert torch.equal(v(base, bank.use(id), asked), expected[id])
    assert bank.copies == 5 and bank.use('wide') == bank.use('wide') == 'teacher' and bank.copies == 5


def test_stacking_adds(base, bank, asked):
    lora = random_lora(base, 3, 9)
    base.backbone.add_role('acc', 3)
    base.backbone.load('acc', lora)
    try:
        stacked = v(base, bank.stack('third', 'acc'), asked)
        assert torch.equal(stacked, v(base, {'teacher': 1.0, 'acc': 1.0}, asked)) and not torch.allclose(
            stacked, v(base, bank.use('third'), asked)
        )
    finally:
        base.backbone.remove('acc')


def test_small_capacity_reads_again_and_gives_the_same(base, files, asked):
    large, small = (
        TeacherBank(base.backbone, files, role='large'),
        TeacherBank(base.backbone, files, capacity=1, role='small'),
    )
    try:
        for id in ('wide', 'narrow', 'third', 'wide'):
            assert torch.equal(v(base, large.use(id), asked), v(base, small.use(id), asked)) and len(small._kept) == 1
    finally:
        large.close()
        small.close()


def test_unknown_effect_is_never_the_previous_teacher(bank):
    bank.use('wide')
    with pytest.raises(UserError, match="'narow'.*did you mean 'narrow'"):
        bank.use('narow')


def test_replaced_and_lost_files(base, bank, files):
    bank.use('wide')
    files['narrow'].touch()  # same content, new time: fine
    bank.use('narrow')
    write_lora(files['third'], random_lora(base, 4, 77), {'collectionlora.base': {'hash': base.hash}})
    with pytest.raises(UserError, match='third.safetensors: was replaced'):
        bank.use('third')
    files['wide'].unlink()
    with pytest.raises(UserError, match='wide.safetensors: no such file'):
        bank.use('wide')


def test_a_lora_of_ones_own_is_found_by_its_name(base, files, tmp_path):
    found = teacher_files([tmp_path], ['wide', 'third'])
    assert found == {'wide': files['wide'], 'third': files['third']}
    write_lora(
        tmp_path / 'third.safetensors',
        lora_files.read_lora(files['narrow']),
        {
            'collectionlora.base': {'hash': base.hash},
            'collectionlora.effects': [dict(id='somebody_elses', category='x', trigger='')],
        },
    )
    assert teacher_files([tmp_path], ['wide', 'third']) == found  # the name wins over an id that nobody asked for
    (tmp_path / 'empty').mkdir()
    with pytest.raises(UserError, match='no LoRA files among .*empty; give files'):
        teacher_files([tmp_path / 'empty'])
    assert teacher_files([files['wide'], files['third']]) == {
        'wide': files['wide'],
        'somebody_elses': files['third'],
    }  # nothing asked for: the header's id
    with pytest.raises(UserError, match="a second teacher for effect 'wide'"):
        teacher_files([files['wide'], files['wide']])
    files['wide'].rename(tmp_path / 'My Style v2.safetensors')
    with pytest.raises(
        UserError, match=r"'wide' has no teacher.*My Style v2.safetensors.*call a LoRA of your own wide.safetensors"
    ):
        teacher_files([tmp_path], ['wide'])


def test_bad_teachers_are_found_before_anything_runs(base, files, tmp_path):
    def refused(file, said, **kw):
        with pytest.raises(UserError, match=said):
            TeacherBank(base.backbone, {**files, 'bad': file}, **kw)
        assert 'teacher' not in base.backbone.roles

    bad = tmp_path / 'bad.safetensors'
    refused(bad, 'bad.safetensors')  # absent
    write_lora(bad, random_lora(base, 2, 0), {'collectionlora.base': {'hash': 'f' * 64}})
    refused(bad, 'bad.safetensors.*base')
    bad.write_bytes(files['wide'].read_bytes()[:-8])
    refused(bad, 'bad.safetensors')
    refused(files['wide'], 'rank 6', rank=4)
    with pytest.raises(UserError, match='no teachers'):
        TeacherBank(base.backbone, {})


def test_expected_teachers_are_the_same_and_come_in_any_order(base, files, asked):
    plain, told = (
        AheadBank(base.backbone, files, role='plain', ahead=0),
        AheadBank(base.backbone, files, role='told', capacity=1),
    )
    try:
        expected = {id: v(base, plain.use(id), asked) for id in files}
        order = ['wide', 'narrow', 'third', 'narrow', 'narrow', 'wide', 'third', 'wide', 'narrow'] * 3
        for k, id in enumerate(order):
            told.expect(order[k + k % 2 : k + 3])  # now with, now without the one that is asked next
            if k % 3 == 0:
                told._ahead.coming and next(iter(told._ahead.coming.values())).result()
            assert torch.equal(v(base, told.use(id), asked), expected[id])
            assert len(told._kept) == 1 and len(told._ahead.coming) <= 2 and len(told._ahead.buffers) <= 2
        assert not plain._ahead.coming and plain._ahead.pool is None
        with pytest.raises(UserError, match="'narow'"):
            told.expect(['narow'])
    finally:
        plain.close()
        told.close()


def test_a_thread_never_touches_the_slot(base, bank, asked):
    first = v(base, bank.use('wide'), asked)
    bank.expect(['narrow', 'third'])
    for job in list(bank._ahead.coming.values()):
        job.result()
    assert bank._ahead.ready('narrow') and torch.equal(v(base, bank.role, asked), first) and bank.current == 'wide'


@pytest.mark.parametrize('when', ['before', 'after'])
def test_a_teacher_replaced_or_lost_under_the_threads_hands(base, bank, files, when):
    bank.use('wide')
    if when == 'after':  # it was laid out from the old file, and is still not lent
        bank.expect(['third'])
        bank._ahead.coming['third'].result()
    write_lora(files['third'], random_lora(base, 4, 77), {'collectionlora.base': {'hash': base.hash}})
    bank.expect(['third'])
    with pytest.raises(UserError, match='third.safetensors: was replaced'):
        bank.use('third')
    bank.expect(['narrow'])
    files['narrow'].unlink()
    with pytest.raises(UserError, match='narrow.safetensors: no such file'):
        bank.use('narrow')
    assert bank.use('wide') == 'teacher'


class OneStream:
    "Stands in for CUDA streams where there is no GPU: notes who waits for whom."

    said = []

    def __init__(self, name):
        self.name = name

    def wait_stream(self, other):
        self.said.append((self.name, other.name))

    def record_event(self):
        return self

    def synchronize(self):
        self.said.append('filled again')


def test_moving_ahead_waits_for_the_slot_and_using_waits_for_the_move(base, bank, asked, monkeypatch):
    import contextlib

    expected = {id: v(base, bank.use(id), asked) for id in ('wide', 'third', 'narrow')}
    main, empty = OneStream('main'), torch.empty
    monkeypatch.setattr(torch, 'empty', lambda *a, pin_memory=False, **kw: empty(*a, **kw))
    monkeypatch.setattr(torch.cuda, 'current_stream', lambda *a: main)
    monkeypatch.setattr(torch.cuda, 'stream', lambda s: contextlib.nullcontext())
    for id in ('wide', 'third'):
        bank.expect([id])
        bank._ahead.coming[id].result()
    bank._stream = OneStream('side')
    bank.move('wide')  # forgotten again: not ready, so nothing happens
    assert bank.current == 'narrow' and not OneStream.said
    bank.move('third')
    assert (
        OneStream.said == [('side', 'main')]
        and bank.current == 'third'
        and torch.equal(v(base, bank.use('third'), asked), expected['third'])
    )
    assert OneStream.said[1:] == [('main', 'side')]
    assert torch.equal(v(base, bank.use('wide'), asked), expected['wide']) and OneStream.said[2:] == [('main', 'side')]
    bank.expect(['narrow'])
    assert torch.equal(v(base, bank.use('narrow'), asked), expected['narrow']) and 'filled again' in OneStream.said
    bank._stream = None


def test_a_hundred_and_eighty_teachers_in_bounded_memory(base, tmp_path, asked):
    made = random_lora(base, 1, 0)
    factors = lambda k: {n: (A * (1 + k), B) for n, (A, B) in made.factors.items()}
    files = {f'e{k:03d}': tmp_path / f'{k}.safetensors' for k in range(180)}
    for k, file in enumerate(files.values()):
        write_lora(file, Lora(factors(k)), {'collectionlora.base': {'hash': base.hash}})
    size = sum(t.nbytes for ab in made.factors.values() for t in ab)
    bank = AheadBank(base.backbone, files, memory=7 * size + 1)
    try:
        assert len(bank) == 180 and bank.held == 7 * size
        b = base.backbone
        for k in (0, 179, 42, 42, 7, 100):
            bank.expect([f'e{k:03d}', f'e{(k + 1) % 180:03d}'])
            role = bank.use(f'e{k:03d}')
            assert (
                torch.equal(b.flat(role), b.pack(role, Lora(factors(k))))
                and bank.held <= 7 * size
                and len(bank._ahead.coming) <= 2
            )
    finally:
        bank.close()


def test_nan_in_a_teacher_is_found_before_anything_runs(base, files, tmp_path):
    lora = random_lora(base, 2, 5)
    name = next(iter(lora.factors))
    write_lora(tmp_path / 'nan.safetensors', lora, {'collectionlora.base': {'hash': base.hash}})
    from safetensors.torch import load_file, save_file

    tensors = load_file(tmp_path / 'nan.safetensors')
    key = next(k for k in tensors if name in k)
    tensors[key][0, 0] = math.nan
    save_file(tensors, tmp_path / 'nan.safetensors')
    with pytest.raises(UserError, match='nan.safetensors.*(NaN|finite)'):
        TeacherBank(base.backbone, {**files, 'bad': tmp_path / 'nan.safetensors'})
    assert 'teacher' not in base.backbone.roles


# --- targets
def test_guidance_one_is_the_plain_ode(base, world):
    effect, cache, _ = world
    cond, uncond = cache.cond([(p, 'x y') for p in effect.sources]), cache.uncond(effect.sources)
    times = ode_times(3, 3.0)
    plain, guided, other = (
        sample_targets(base.backbone, 'base', cond, uncond, s, times, w=w)
        for s, w in (([1, 2, 3], 1), ([1, 2, 3], 3), ([4, 2, 3], 1))
    )
    assert plain.shape == cond.source.shape and not torch.allclose(plain, guided)
    assert torch.allclose(plain[1:], other[1:], atol=1e-4) and not torch.allclose(plain[0], other[0])
    split = sample_targets(base.backbone, 'base', cond, uncond, [1, 2, 3], times, w=3, batch=2)
    assert torch.allclose(split, guided, atol=1e-4)


def test_targets_are_painted_once_and_survive_interruption(base, bank, world, tmp_path, monkeypatch):
    effect, cache, _ = world
    wide = replace(effect, id='wide')
    how = dict(per_source=2, steps=2, w=2.0, batch=2)
    made = make_targets(base, bank, wide, cache, tmp_path / 't', **how)
    assert made.stems == ('0000-0', '0000-1', '0001-0', '0001-1', '0002-0', '0002-1') and made.prompt == effect.prompt
    latents = target_latents(made)
    assert not torch.equal(latents[0], latents[1])

    calls, original = [], sample_ode

    def sampler(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(painting, 'sample_ode', sampler)
    with pytest.raises(KeyboardInterrupt):
        make_targets(base, bank, wide, cache, tmp_path / 'u', **how)
    assert not (tmp_path / 'u' / 'wide').exists()
    again = make_targets(base, bank, wide, cache, tmp_path / 'u', **how)
    assert (
        len(calls) == 4
        and all(torch.equal(a, b) for a, b in zip(latents, target_latents(again)))
        and again.hash == made.hash
    )
    make_targets(base, bank, wide, cache, tmp_path / 'u', **how)
    assert len(calls) == 4  # nothing to do
    other = make_targets(base, bank, wide, cache, tmp_path / 'u', **how, seed=1)
    assert len(calls) == 7 and other.hash != made.hash
    (tmp_path / 'u' / 'wide' / 'latents' / '0001-0.safetensors').write_bytes(b'x')
    with pytest.raises(UserError, match='0001-0.safetensors: absent or damaged'):
        target_latents(other)


def test_a_further_lora_paints_along_as_its_sum_with_the_teacher_does(base, bank, world, tmp_path):
    effect, how = replace(world[0], id='wide'), dict(steps=2, w=1.0, shift=1.0)
    modules, g = base.backbone.modules(), torch.Generator().manual_seed(0)
    drawn = lambda *shape: torch.randn(*shape, generator=g)
    more = Lora({n: (drawn(2, i) / i, drawn(o, 2)) for n, (i, o) in modules.items()})
    write_lora(tmp_path / 'more.safetensors', more)
    role = load_role(base, tmp_path / 'more.safetensors', 'acceleration', weight=0.5)
    alone = make_targets(base, bank, effect, world[1], tmp_path / 'alone', **how)
    along = make_targets(base, bank, effect, world[1], tmp_path / 'along', **how, added=(role, 'half'))
    assert make_targets(base, bank, effect, world[1], tmp_path / 'along', **how, added=(role, 'half')).hash == along.hash
    base.backbone.remove(role)
    total = merge([lora_files.read_lora(bank.files['wide'], modules), more], 'cat', [1.0, 0.5])
    write_lora(tmp_path / 'sum.safetensors', total)
    summed = TeacherBank(base.backbone, {'wide': tmp_path / 'sum.safetensors'}, role='summed')
    whole = make_targets(base, summed, effect, world[1], tmp_path / 'whole', **how)
    summed.close()
    apart = lambda a, b: max((x - y).abs().max().item() for x, y in zip(target_latents(a), target_latents(b)))
    assert apart(along, whole) < 1e-4 < 1e-2 < apart(along, alone)
    again = make_targets(base, bank, effect, world[1], tmp_path / 'along', **how)  # without it, they are painted anew
    assert again.hash == alone.hash


def test_painted_targets_follow_words_that_changed_without_being_painted_again(base, bank, world, tmp_path, monkeypatch):
    effect = replace(world[0], id='wide', trigger='before', description='one thing')
    make_targets(base, bank, effect, world[1], tmp_path / 't', steps=2, w=1.0)
    monkeypatch.setattr(painting, 'sample_ode', None)
    changed = replace(effect, trigger='after', description='another thing')
    made = make_targets(base, bank, changed, world[1], tmp_path / 't', steps=2, w=1.0)
    assert (made.trigger, made.description) == ('after', 'another thing')
