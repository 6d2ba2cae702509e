"The loop: equality with three copies, the zero of the gradient, exact resume, presets, faults."

import copy
import errno
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import asdict, fields, replace

import pytest
import torch
from PIL import Image

from collectionlora import aop, c2fdo, dmd
from collectionlora.bases.pipeline import load_base
from collectionlora.bases.tiny import tiny_base
from collectionlora.core import load_state, seed_of, UserError
from collectionlora.dmd import fake_loss
from collectionlora.engine import rollouts, terms
from collectionlora.engine.looks import few_step_sample, show_history
from collectionlora.engine.loop import add_roles, distill, learning_roles, Training
from collectionlora.engine.costs import check_terms, passes, plan
from collectionlora.engine.plan import measured_plan
from collectionlora.engine.pools import load_pools, mixed_rows, Pool, rows_in, samples_of
from collectionlora.engine.settings import PRESETS, resolved, schedule_of, Settings
from collectionlora.engine.state import compare_fingerprints, Guard, start_from, State
from collectionlora.engine.terms import Engine, fake_update, held_apart, rate_at
from collectionlora.files.conditions import ConditionCache
from collectionlora.files.effects import load_effects, load_general, write_effect, write_general
from collectionlora.files.header import catalogue, read_header
from collectionlora.files.lora import read_lora, write_lora
from collectionlora.flow import few_step_times, noise_like
from collectionlora.teachers import TeacherBank
from collectionlora.use.edit import load_role
from collectionlora.use.sampling import Recipe, sample

SMALL = Settings.preset(
    steps=5, batch=3, fake_per_generator=2, fake_warmup=3, rank_student=3, rank_fake=3, ema=0.8, p_switch=0.6, seed=1
)


def picture(seed, size=(64, 64)):
    g = torch.Generator().manual_seed(seed)
    return Image.fromarray((255 * torch.rand(4, 4, 3, generator=g)).byte().numpy()).resize(size, Image.BICUBIC)


def make_world(folder, sizes=((64, 64),)):
    "Two effects of three pairs, a general stream, and random teachers, as files; every other picture has the second of `sizes`."
    base = load_base(tiny_base(folder / 'base'))
    size = lambda i: sizes[i % len(sizes)]
    triggers = aop.make_triggers(['one', 'two'], 0)
    for k, id in enumerate(triggers):
        write_effect(
            folder / 'effects' / id,
            id=id,
            category='animal',
            prompt=f'apply {id}',
            trigger=triggers[id],
            description=f'Turn it into {id}.',
            pairs=[(picture(10 * k + i, size(i)), picture(100 + 10 * k + i, size(i))) for i in range(3)],
        )
        base.backbone.add_role('drawn', 2, seed=k)
        with torch.no_grad():
            base.backbone.flat('drawn').normal_(0, 0.15, generator=torch.Generator().manual_seed(k))
        (folder / 'teachers').mkdir(exist_ok=True)
        write_lora(
            folder / 'teachers' / f'{id}.safetensors',
            base.backbone.lora('drawn'),
            {'collectionlora.base': {'hash': base.hash}},
        )
        base.backbone.remove('drawn')
    write_general(folder / 'general', [(picture(200 + i, size(i)), f'change {i % 3}') for i in range(4)])
    return base


def open_world(folder, base=None):
    base = base or load_base(folder / 'base')
    effects = load_effects(folder / 'effects')
    bank = TeacherBank(base.backbone, {e.id: folder / 'teachers' / f'{e.id}.safetensors' for e in effects})
    return base, bank, effects, load_general(folder / 'general'), ConditionCache(base, folder / 'cache')


def engine_of(world, s, backbone=None):
    base, bank, effects, general, cache = world
    s = resolved(s, 1.0)
    return Engine(backbone or base.backbone, bank, load_pools(cache, samples_of(effects, general)), s, schedule_of(s))


def batch_of(engine, id, step=0):
    "The batch of a step, where it is of one shape and in one part."
    (share,) = terms.shares_of(engine, id, step)
    return terms.batch_of(engine, id, share)


def fake_samples(engine, id, update):
    "The student's samples of a fake update and their conditions, where there is one part."
    (share,), n = terms.fake_shares(engine, id, update)
    return terms.fake_samples(engine, share, n, update)


def gradients(engine, id, role='student'):
    g = torch.Generator().manual_seed(3)
    found = terms.terms(engine, batch_of(engine, id), g)
    return {name: terms.flat_gradient(engine.backbone, loss, role) for name, loss, _ in found}


def run(world, s, out, **kw):
    return list(distill(*world, s, out, **kw))


def fails(*args, **kw):
    with pytest.raises(UserError) as e:
        run(*args, **kw)
    return str(e.value)


# --- mathematics
class ThreeCopies:
    "What the authors do: a whole network per role, loaded anew, with one adapter each. Stands in for a Backbone."

    def __init__(self, folder, backbone):
        self.copies = {role: load_base(folder / 'base').backbone for role in ('student', 'fake', 'teacher', 'base')}
        for role in ('student', 'fake', 'teacher'):
            self.copies[role].add_role(role, backbone.roles[role]['rank'])
            with torch.no_grad():
                self.copies[role].flat(role).copy_(backbone.flat(role))

    device, dtype, micro_batch = torch.device('cpu'), torch.float32, 0

    def parts(self, n):
        return [slice(0, n)]

    def merged(self, role):
        return self.copies[role].merged(role)

    def velocity(self, role, *args):
        return self.copies[role].velocity(role, *args)

    def guided(self, role, *args):
        return self.copies[role].guided(role, *args)

    def parameters(self, role):
        return self.copies[role].parameters(role)

    def flat(self, role):
        return self.copies[role].flat(role)


@pytest.mark.parametrize('checkpointing', [False, True])
@pytest.mark.parametrize('id', [None, 'one'])
def test_one_base_equals_three_copies(folder, world, roles, id, checkpointing):
    one = engine_of(world, SMALL)
    batch_of(one, id)  # puts the teacher into the slot before the copies are made
    three = engine_of(world, SMALL, ThreeCopies(folder, roles))
    roles.checkpointing(checkpointing)
    try:
        shared = gradients(one, id)
    finally:
        roles.checkpointing(False)
    apart = gradients(three, id)
    assert set(shared) == ({'bs'} if id is None else {'bs', 'ts', 'fm'}) == set(apart)
    for name in shared:
        assert torch.equal(shared[name], apart[name]) and shared[name].abs().max() > 0


def test_folded_forwards_change_nothing_but_rounding(world, roles):
    folded, plain = (gradients(engine_of(world, replace(SMALL, fold_adapters=f)), 'one') for f in (True, False))
    for name in folded:
        assert torch.allclose(folded[name], plain[name], rtol=1e-3, atol=1e-3 * plain[name].abs().max().item())


def test_nothing_moves_when_student_fake_and_teacher_agree(world, roles):
    "All three are the teacher, asked with the same words and no guidance: matching has no gradient at all."
    base, bank, effects, general, cache = world
    engine = engine_of(world, replace(SMALL, guidance=1.0, weight_fm=0.0))
    batch = batch_of(engine, 'one')
    teacher = base.backbone.lora(bank.role)
    for role in ('student', 'fake'):
        base.backbone.load(role, teacher)
    same = replace(batch, student=batch.teacher)
    found = terms.terms(engine, same, torch.Generator().manual_seed(0))
    grads = {n: terms.flat_gradient(engine.backbone, l, 'student') for n, l, _ in found}
    assert set(grads) == {'bs', 'ts'} and all(g.abs().max() == 0 for g in grads.values())


def test_a_term_of_weight_zero_is_not_computed(world, roles):
    engine = engine_of(world, replace(SMALL, weight_ts=0.0, weight_fm=0.0))
    assert set(gradients(engine, 'one')) == {'bs'}
    bs_only = engine.passes['gradient']
    assert bs_only == SMALL.batch


def test_passes_are_what_is_computed(world, roles):
    "Expected work of a cycle against the mean of many, for the rollout's random exits."
    for s in (
        SMALL,
        replace(SMALL, shared_rollout=True, fake_per_generator=3),
        replace(SMALL, fake_batch='same', guidance=1.0),
    ):
        s = replace(s, batch=8, p_switch=1.0)
        engine = engine_of(world, s)
        for update in range(s.fake_warmup, s.fake_warmup + s.fake_per_generator):
            x0, cond = fake_samples(engine, 'one', update)
            assert x0.shape == (8, 64, 16) and not x0.requires_grad
        gradients(engine, 'one')
        expected = passes(s)
        assert engine.passes['gradient'] + s.batch * s.fake_per_generator == expected['gradient']
        assert abs(engine.passes['forward'] / expected['forward'] - 1) < 0.25


IMITATING = dict(weight_bs=0.0, weight_ts=0.0, weight_fm=0.0, fake_per_generator=0, further={'imitate': 1.0})


def test_imitation_learns_without_a_fake_score(world, tmp_path):
    "No fake update is made, the plan counts none, and the student that is its teacher has no gradient."
    s = replace(SMALL, **IMITATING, steps=3)
    history = run(world, s, tmp_path)
    assert [set(k for k in h if k.startswith('loss_')) for h in history] == [{'loss_imitate'}] * 3
    assert not any('probe_lead' in h for h in history) and all(h['norm'] > 0 for h in history if h['effect'])
    assert plan(s, {'forward': 1.0, 'gradient': 1.0}, 2, 4)['fake-score updates'] == 0
    general = [h['loss_imitate'] for h in history if not h['effect']]
    assert all(loss > 0 for loss in general[1:])  # a fresh LoRA is the base, and guidance is not 1


def test_a_student_that_is_its_teacher_has_nothing_to_imitate(world):
    "A fresh LoRA is the base, which is the teacher of the general stream."
    s, found = replace(SMALL, **IMITATING), []
    with learning_roles(world[0].backbone):
        add_roles(world[0], s)
        for guidance in (1.0, 2.0):
            engine = engine_of(world, replace(s, guidance=guidance))
            ((_, loss, _),) = terms.terms(engine, batch_of(engine, None), torch.Generator().manual_seed(0))
            found.append(terms.flat_gradient(engine.backbone, loss, 'student').abs().max().item())
    assert found[0] < 1e-6 < found[1]


def test_a_fake_score_that_is_asked_must_learn():
    with pytest.raises(UserError, match='fake_per_generator is 0, but matching asks the fake score'):
        replace(SMALL, fake_per_generator=0)
    with pytest.raises(UserError, match="the term 'apart' asks the fake score; set fake_per_generator to 1 or more"):
        check_terms(replace(SMALL, **IMITATING | dict(further={'apart': 1.0})))
    with pytest.raises(UserError, match='real_shared asks the LoRA that the student starts from; name it in init'):
        replace(SMALL, real_shared=0.5)


def test_exits_of_a_shared_rollout_change_their_places(world):
    "Sorted exits would give each sample of a cycle the same point of its rollout in every update."
    base, *_ = world
    s = replace(SMALL, shared_rollout=True, batch=8)
    with learning_roles(base.backbone):
        add_roles(base, resolved(s, 1.0))
        engine = engine_of(world, s)
        drawn = [engine.exits(8, torch.Generator().manual_seed(k), mixed=True) for k in range(4)]
        assert all(sorted(found, reverse=True) == list(range(7, -1, -1)) for found in drawn)
        assert len({tuple(found) for found in drawn}) == 4


def test_steps_without_any_term_are_refused():
    alone = IMITATING | dict(further={'apart': 1.0}, fake_per_generator=1)
    with pytest.raises(UserError, match='no term with a weight runs on the general stream; set weight_bs, or p_switch to 1'):
        check_terms(replace(SMALL, **alone))
    check_terms(replace(SMALL, **alone, p_switch=1.0))
    with pytest.raises(UserError, match='anchor_after_critic needs the critic, which anchor_first goes without'):
        Settings.preset('authors', anchor_first=2, steps=4)


def test_the_shared_part_of_the_real_score_is_the_start(world, tmp_path):
    "Half of the velocity is the starting LoRA's under the student's words; on the general stream nothing of it."
    base, bank, *_ = world
    init = next(iter(bank.files.values()))
    s = replace(SMALL, init=str(init), rank_student=2, rank_fake=2, real_shared=0.5)
    with learning_roles(base.backbone):
        add_roles(base, resolved(s, 1.0))
        engine = engine_of(world, s)
        for id in ('one', None):
            b, g = batch_of(engine, id), torch.Generator().manual_seed(1)
            x, t = torch.randn(len(b.student), 64, 16, generator=g), torch.full((len(b.student),), 0.6)
            with torch.no_grad():
                mixed = terms.real_velocity(engine, b, x, t)
                teacher = engine.guided(b, x, t)
                start = engine.velocity('start', x, t, b.student)
            wanted = teacher if id is None else (teacher + start) / 2
            assert torch.allclose(mixed, wanted, atol=1e-5)
    assert not {'student', 'fake', 'start'} & set(base.backbone.roles)
    history = run(world, replace(s, steps=2), tmp_path)
    assert len(history) == 2 and not {'student', 'fake', 'start'} & set(base.backbone.roles)


def test_mixed_batches_do_not_tie_streams_to_exit_steps(world):
    "Exits are sorted, so rows must come in random order: the first row of a mixed batch is sometimes general, sometimes an effect's."
    pool = engine_of(world, SMALL).pools[0]
    import numpy as np

    firsts, counts = set(), {i: 0 for i in range(len(pool))}
    for k in range(60):
        rows, ts = mixed_rows(pool.rows, 6, 0.5, ['one', 'two'], 0.5, np.random.default_rng(k))
        assert len(rows) == 6 and all(r < 6 for r in rows[6 - ts :])  # targets exist only for effect rows
        firsts.add(rows[0] < 6)
        for r in rows:
            counts[r] += 1
    assert firsts == {True, False} and min(counts.values()) > 0


def test_every_stream_gets_its_due_however_its_rows_are_spread_over_shapes():
    "Effects in one shape, a large general stream over two: drawn by row counts, effects would be 6 of 100."
    import numpy as np

    pools = [
        Pool([0] * 46, None, None, None, {'a': tuple(range(4)), 'b': tuple(range(4, 6)), None: tuple(range(6, 46))}),
        Pool([0] * 54, None, None, None, {'b': (0, 1), None: tuple(range(2, 54))}),
    ]
    everywhere = rows_in(pools)
    owner = {row: id for id, rows in everywhere.items() for row in rows}
    assert len(owner) == 100
    r, drawn = np.random.default_rng(0), {'a': 0, 'b': 0, None: 0}
    for _ in range(3000):
        for row in mixed_rows(everywhere, 4, 0.6, ['a', 'b'], 0.0, r)[0]:
            drawn[owner[row]] += 1
    share = {id: n / sum(drawn.values()) for id, n in drawn.items()}
    assert abs(share[None] - 0.4) < 0.02 and abs(share['a'] - 0.3) < 0.02 and abs(share['b'] - 0.3) < 0.02


def test_the_fake_score_sees_no_targets_where_no_term_asks_it_there(world, roles):
    assert engine_of(world, SMALL).fake_targets == SMALL.fake_targets > 0
    without = replace(SMALL, weight_ts=0.0)
    engine = engine_of(world, without)
    assert engine.fake_targets == 0 and terms.fake_shares(engine, None, 3)[1] == without.batch
    assert passes(without)['forward'] > passes(replace(without, fake_targets=0.0))['forward'] - 1e-9


def test_effects_are_dealt_in_balance_in_both_stages(world):
    s = replace(SMALL, steps=40, anchor_first=23, p_switch=0.5)
    table = Training(None, engine_of(world, s), None, ['one', 'two'], None, None, None, None, 1, None, 0, 0).table()
    coarse, fine = table[:23], [id for id in table[23:] if id]
    assert None not in coarse and None in table[23:] and len(table) == 40
    for part in (coarse, fine):
        assert abs(part.count('one') - part.count('two')) <= 1


# --- starting weights
def test_a_smaller_lora_starts_a_larger_student_without_dead_rank(world):
    b = world[0].backbone
    b.add_role('small', 2, seed=5)
    with torch.no_grad():
        b.flat('small').normal_(0, 0.1, generator=torch.Generator().manual_seed(5))
    lora = b.lora('small')
    b.add_role('student', 5, seed=6)
    try:
        start_from(b, 'student', lora)
        name = next(iter(lora.factors))
        wide = b.lora('student')
        assert torch.allclose(wide.delta(name), lora.delta(name), atol=1e-6)
        A, B = wide.factors[name]
        assert A[2:].abs().max() > 0 and B[:, 2:].abs().max() == 0
        with pytest.raises(UserError, match='rank'):
            start_from(b, 'small', wide)
    finally:
        for role in ('small', 'student'):
            b.remove(role)


def test_extension_keeps_the_parents_effects(world, tmp_path):
    base, bank, effects, general, cache = world
    short = replace(SMALL, steps=1, fake_warmup=0)
    run((base, bank, effects[:1], general, cache), short, tmp_path / 'a')
    parent = tmp_path / 'a' / 'collection.safetensors'
    run((base, bank, effects[1:], general, cache), replace(short, init=str(parent)), tmp_path / 'b')
    child = tmp_path / 'b' / 'collection.safetensors'
    assert [e['id'] for e in catalogue(child)] == ['one', 'two']
    header = read_header(child)
    from collectionlora.core import sha256_file

    assert sha256_file(parent) in [p['sha256'] for p in header['collectionlora.parents']]
    assert header['collectionlora.base']['hash'] == base.hash
    assert header['collectionlora.sampling']['times'] == schedule_of(resolved(SMALL, base.info['shift']))


@pytest.mark.parametrize('sampler', ['ode', 'stochastic'])
def test_the_sampler_of_rollouts_is_the_sampler_of_use(world, tmp_path, sampler, monkeypatch):
    "Full rollout, shared rollout, validation and the file's own recipe end in the same picture."
    s = replace(SMALL, sampler=sampler, few_shift=1.0, steps=1, fake_warmup=0)
    run(world, s, tmp_path)
    base, file = world[0], tmp_path / 'collection.safetensors'
    recipe = Recipe.read(read_header(file), str(file))
    assert recipe.stochastic == (sampler == 'stochastic') and recipe.steps == SMALL.few_steps
    role, engine = load_role(base, file, 'student'), engine_of(world, s)
    cond, seeds = engine.pools[0].student.index([0, 1]), [5, 6]
    used = sample(base, role, cond, seeds, recipe)
    looked = few_step_sample(base.backbone, role, cond, engine.times, seeds, sampler=sampler)
    other = few_step_sample(base.backbone, role, cond, engine.times, seeds, sampler={'ode': 'stochastic'}.get(sampler, 'ode'))
    assert torch.equal(used, looked) and (used - other).abs().max() > 1e-3
    draws = iter([noise_like(used.shape, seeds, k) for k in range(s.few_steps)])
    monkeypatch.setattr(rollouts, 'noise', lambda *_: next(draws))
    assert torch.allclose(rollouts.full_rollout(engine, cond, None)[-1], used, atol=1e-5)
    base.backbone.remove(role)


def test_the_fake_score_is_pulled_to_the_student(world, roles):
    "After an update it stands a share of the way nearer to the student than the same update without pull."
    found = {}
    for pull in (0.0, 0.25, 1.0):
        engine = engine_of(world, replace(SMALL, fake_init='student', fake_pull=pull))
        state = State.fresh(engine.backbone, engine.s)
        fake_update(engine, state, None, Guard(0))
        found[pull] = state.fake.detach().clone()
        student = state.student.detach().clone()
    assert torch.allclose(found[0.25], found[0.0].lerp(student, 0.25)) and torch.allclose(found[1.0], student)
    assert not torch.allclose(found[0.0], student)


def test_a_checkpoint_from_before_the_setting_was_sampled_stochastically():
    now = {'settings': asdict(resolved(SMALL, 1.0))}
    before = {'settings': {k: v for k, v in now['settings'].items() if k != 'sampler'}}
    with pytest.raises(UserError, match="sampler = 'stochastic', this run has 'ode'.*-p 'settings={sampler: stochastic}'"):
        compare_fingerprints(before, now, 'c.pt')
    compare_fingerprints(before, {'settings': now['settings'] | {'sampler': 'stochastic'}}, 'c.pt')


def test_anchor_first_is_the_anchor_alone(world, tmp_path):
    "Coarse steps have no matching and no fake updates, every step an effect; they resume to the same bits."
    s = replace(SMALL, steps=4, anchor_first=2)
    history = run(world, s, tmp_path / 'whole')
    assert all('loss_fm' in h and 'loss_bs' not in h and 'loss_fake' not in h and h['effect'] for h in history[:2])
    assert 'loss_bs' in history[2] and len(history[2]['warmup']) == SMALL.fake_warmup
    it = distill(*world, s, tmp_path / 'halves', save_every=1)
    next(it)
    it.close()
    run(world, s, tmp_path / 'halves')
    assert (tmp_path / 'whole' / 'collection.safetensors').read_bytes() == (
        tmp_path / 'halves' / 'collection.safetensors'
    ).read_bytes()


def test_the_fake_score_takes_over_the_student_once(world, roles):
    s = replace(SMALL, fake_init='student', lr_fake=1e-30)
    engine, guard = engine_of(world, s), Guard(0.0)
    state = State.fresh(world[0].backbone, s)
    state.student.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(7))
    learnt = state.student.detach().clone()
    fake_update(engine, state, 'one', guard)
    assert torch.allclose(state.fake, learnt, atol=1e-20)
    state.student.data.mul_(2)
    fake_update(engine, state, 'one', guard)
    assert torch.allclose(state.fake, learnt, atol=1e-20)


def test_anchor_first_needs_an_anchor():
    with pytest.raises(UserError, match='anchor_first needs effects'):
        replace(SMALL, anchor_first=2, weight_fm=0.0)
    with pytest.raises(UserError, match='matching never begins'):
        replace(SMALL, anchor_first=5)


# --- presets: one quirk, one test
AUTHORS = Settings.preset('authors')


def test_quirk_schedule_is_cut_to_thousandths():
    assert schedule_of(AUTHORS) == [1.0, 0.954, 0.9, 0.833, 0.75, 0.642, 0.5, 0.3]


def test_paper_schedule_is_not():
    assert schedule_of(Settings.preset('paper')) == few_step_times(8, 3.0)


def test_quirk_generator_bound_keeps_the_last_five():
    assert c2fdo.generator_times(schedule_of(AUTHORS), AUTHORS.tau_max) == [0.833, 0.75, 0.642, 0.5, 0.3]
    assert c2fdo.generator_times(schedule_of(Settings.preset('paper')), 0.75) == pytest.approx(
        [0.642857, 0.5, 0.3], abs=1e-6
    )


def test_quirk_critic_bound_is_shifted():
    "Uniform in [500, 1000) and then shifted by 3 is the shifted law from 0.75 up."
    from collectionlora.dmd import draw_times
    from collectionlora.flow import shift_time

    g = torch.Generator().manual_seed(0)
    ours = draw_times(4000, g, 3.0, AUTHORS.tau_min)
    theirs = shift_time(0.5 + 0.5 * torch.rand(4000, generator=g), 3.0)
    assert (
        torch.quantile(ours, torch.tensor([0.1, 0.5, 0.9]))
        .sub(torch.quantile(theirs, torch.tensor([0.1, 0.5, 0.9])))
        .abs()
        .max()
        < 0.01
    )


def test_quirk_guidance_is_five():
    assert AUTHORS.guidance == 5.0 and not AUTHORS.rescale


def test_quirk_route_is_kept_for_twenty_passes_of_their_loop_which_are_four_generator_steps():
    from collectionlora.pdsr import timetable

    assert AUTHORS.route_every * AUTHORS.fake_per_generator == 20 and not AUTHORS.balanced
    streams = [
        id is None for id in timetable(['a', 'b'], 200, 0, AUTHORS.p_switch, AUTHORS.route_every, AUTHORS.balanced)
    ]
    assert all(len(set(streams[k : k + 4])) == 1 for k in range(0, 200, 4)) and len(set(streams)) == 2


def test_quirk_adam_decays_and_rates_are_constant():
    assert AUTHORS.weight_decay == 0.01 and {rate_at(AUTHORS, k, k) for k in (0, 7, 4999)} == {1.0}


def test_quirk_fake_score_never_sees_targets_and_is_not_warmed():
    assert AUTHORS.fake_targets == 0 == AUTHORS.fake_warmup and AUTHORS.fake_batch == 'same'


def test_quirk_anchor_is_shifted_twice(world, roles):
    engine = engine_of(world, replace(AUTHORS, batch=3))
    t = terms.anchor_times(engine, 2000, torch.full((2000,), 0.75), torch.Generator().manual_seed(0))
    assert t.min() >= 0.9 and t.median() > 0.95
    other = engine_of(world, replace(Settings.preset('paper'), batch=3))
    plain = terms.anchor_times(other, 2000, None, torch.Generator().manual_seed(0))
    assert plain.min() < 0.1


def test_quirk_weights_and_optimiser_in_bf16(world, tmp_path):
    s = replace(
        AUTHORS, steps=2, batch=2, rank_student=2, rank_fake=2, fake_per_generator=2, normaliser_eps=1e-6, p_switch=0.0
    )
    base, _, _, general, cache = world
    run((base, None, [], general, cache), s, tmp_path)
    for A, B in read_lora(tmp_path / 'collection.safetensors').factors.values():
        assert torch.equal(A, A.bfloat16().float()) and torch.equal(B, B.bfloat16().float())


def test_quirk_normaliser_has_no_eps():
    "A sample that equals its target has neither numerator nor denominator: theirs turns that NaN into 0, and so do we."
    assert AUTHORS.normaliser_eps == 0
    x = torch.randn(2, 3, 4)
    fake = torch.randn(2, 3, 4)
    x_real = torch.stack([x[0], torch.randn(3, 4)])
    x_fake = torch.stack([x[0], fake[1]])
    for g in (dmd.gradient(x, x_fake, x_real, 0.0), dmd.velocity_gradient(x, x_fake, x_real, 0.0)):
        assert g.isfinite().all() and not g[0].any() and g[1].any()


def test_paper_has_nothing_that_no_source_has():
    paper = Settings.preset('paper')
    assert not paper.rescale and {rate_at(paper, k, k) for k in (0, 7, 4999)} == {1.0}


@pytest.fixture
def pull(monkeypatch):
    "A further term, on the general stream only: the size of the student's velocity."

    def size(engine, b, g, earlier):
        return engine.velocity('student', b.student.source, torch.ones(len(b.student)), b.student).square().mean(), {}

    monkeypatch.setitem(terms.TERMS, 'pull', terms.Term(size, general=True, effects=False))
    return replace(SMALL, further={'pull': 0.1})


def test_a_further_term_needs_no_other_file(world, roles, pull):
    "A term in TERMS and its weight in `further`: computed and planned for; a run without it stays as it was."
    s = pull
    with_it, without = (terms.gradients(engine_of(world, x), [None], 0) for x in (s, SMALL))
    assert {*with_it} == {*without, 'pull'} and torch.equal(with_it['bs'][0], without['bs'][0])
    assert 'pull' not in terms.gradients(engine_of(world, s), ['one'], 0)
    assert passes(s)['gradient'] == pytest.approx(passes(SMALL)['gradient'] + SMALL.batch * (1 - SMALL.p_switch))


def test_a_plan_that_has_not_read_the_losses_counts_a_term_that_they_add():
    "In a process of its own, where `engine.terms` is imported only because `further` names a term of it."
    program = """
        import sys
        from importlib.machinery import ModuleSpec
        from collectionlora.engine import costs
        from collectionlora.engine.settings import Settings

        class Losses:  # stands for engine.terms with one term more, which takes no time to import
            def find_spec(self, name, path, target=None):
                return ModuleSpec(name, self) if name == 'collectionlora.engine.terms' else None

            def create_module(self, spec):
                return None

            def exec_module(self, module):
                costs.TERMS['near'] = costs.Term('near', forward=lambda s: 0.0)

        sys.meta_path.insert(0, Losses())
        plain, more = Settings.preset(), Settings.preset(further={'near': 0.1})
        before = costs.passes(plain)
        assert 'near' not in costs.TERMS
        assert costs.passes(more)['gradient'] > before['gradient'] and costs.passes(plain) == before
        costs.check_terms(more)
        assert 'torch' not in sys.modules
    """
    subprocess.run([sys.executable, '-c', textwrap.dedent(program)], check=True)


def test_a_further_term_is_shown_and_its_name_is_checked(world, pull, tmp_path):
    history = run(world, pull, tmp_path)
    assert all(('loss_pull' in h) == (h['effect'] is None) for h in history)
    assert any('loss_pull' in h for h in history)
    with pytest.raises(UserError, match="further has the term 'pul'.*did you mean 'pull'"):
        run(world, replace(pull, further={'pul': 1.0}), tmp_path / 'other')


def test_a_fake_score_on_one_stream_is_warmed_up_on_all(world, tmp_path, monkeypatch):
    from collectionlora.engine import loop

    seen, true = [], loop.fake_update
    monkeypatch.setattr(loop, 'fake_update', lambda e, s, id, g: (seen.append(id), true(e, s, id, g)))
    run(world, replace(SMALL, steps=1, fake_warmup=12, fake_batch='same', fake_targets=0.0), tmp_path)
    assert {'one', 'two', None} == set(seen[:12]) and len(set(seen[12:])) == 1 and len(seen) == 14


def test_presets_and_fields_have_help():
    for name in PRESETS:
        assert Settings.from_dict({'preset': name}) == Settings.preset(name)
    assert all(f.metadata.get('help') for f in fields(Settings))
    assert Settings.from_dict({k: v for k, v in asdict(SMALL).items()}) == SMALL


@pytest.mark.parametrize(
    'given, words',
    [
        (dict(step=3), "did you mean 'steps'"),
        (dict(preset='autors'), "did you mean 'authors'"),
        (dict(tau_max=750), 'not 750'),
        (dict(batch=0), 'batch'),
        (dict(batch=2.5), 'batch'),
        (dict(lr_fake=0), 'lr_fake'),
        (dict(lr_fake='fast'), 'lr_fake'),
        (dict(betas=[0.9]), 'betas'),
        (dict(ema=1.0), 'ema'),
        (dict(p_switch=0.5, weight_bs=0), 'weight_bs'),
        (dict(few_shift=3.0, tau_max=0.2), 'tau_max'),
        (dict(critic_min=0.5, critic_max=0.4), 'critic_min'),
        (dict(fake_batch='both'), 'fake_batch'),
        (dict(fake_init='zero'), 'fake_init'),
        (dict(sampler='lcm'), 'sampler'),
        (dict(further={'near': -1}), 'near'),
        (dict(further=[1]), 'further'),
        (dict(fake_pull=0.1, fake_init='base'), 'fake_pull'),
        (dict(fake_pull=1.5, fake_init='student'), 'fake_pull'),
        (dict(fake_init='student', rank_fake=4), 'rank_fake 4 equal'),
        (dict(anchor_after_critic=True, anchor_min=0.2), 'anchor'),
        (dict(lr_student=float('nan')), 'lr_student'),
        (dict(balanced=1), 'balanced'),
        (dict(tau_min=1.0), 'tau_min'),
        (dict(seed=-1), 'seed'),
    ],
)
def test_settings_refuse(given, words):
    with pytest.raises(UserError, match=words):
        Settings.from_dict(given)


# --- resume
@pytest.fixture(scope='module')
def straight(world, tmp_path_factory):
    "The uninterrupted run: history and bytes."
    out = tmp_path_factory.mktemp('straight')
    history = run(world, SMALL, out)
    return history, (out / 'collection.safetensors').read_bytes()


def same_history(a, b):
    drop = lambda h: [{k: v for k, v in i.items() if k not in ('seconds', 'forward', 'gradient')} for i in h]
    return drop(a) == drop(b)


@pytest.mark.parametrize('stop', [1, 4])
def test_run_k_and_resume_is_run(world, straight, tmp_path, stop):
    first = distill(*world, SMALL, tmp_path, save_every=2)
    for info in first:
        if info['step'] == stop:
            break
    first.close()
    assert not (tmp_path / 'collection.safetensors').exists()
    history = run(world, SMALL, tmp_path, save_every=2)
    assert same_history(history, straight[0]) and (tmp_path / 'collection.safetensors').read_bytes() == straight[1]


def test_twice_finished_is_the_same_file(world, straight, tmp_path):
    run(world, SMALL, tmp_path)
    (tmp_path / 'collection.safetensors').unlink()
    assert (
        len(run(world, SMALL, tmp_path)) == SMALL.steps
        and (tmp_path / 'collection.safetensors').read_bytes() == straight[1]
    )


def test_fewer_steps_first_then_more(world, straight, tmp_path):
    run(world, replace(SMALL, steps=2), tmp_path)
    history = run(world, SMALL, tmp_path)
    assert same_history(history, straight[0])
    from collectionlora.files.dialects import lora_hash

    (tmp_path / 'x.safetensors').write_bytes(straight[1])
    assert lora_hash(read_lora(tmp_path / 'x.safetensors')) == lora_hash(read_lora(tmp_path / 'collection.safetensors'))
    assert 'beyond steps' in fails(world, replace(SMALL, steps=3), tmp_path)


@pytest.mark.parametrize(
    'variant',
    [dict(shared_rollout=True), dict(fake_batch='same', lr_cosine=True), dict(low_precision=True, balanced=False)],
)
def test_resume_within_a_cycle(world, tmp_path, variant, monkeypatch):
    "Ctrl-C during a fake update in the middle of a cycle: it is finished, saved, and continued to the same bits."
    s = replace(SMALL, **variant)
    whole = run(world, s, tmp_path / 'whole')
    calls, true = [], fake_loss

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 6:
            os.kill(os.getpid(), signal.SIGINT)  # warm-up 3, cycle of 2, then the first of the next cycle
        return true(*args)

    monkeypatch.setattr(terms, 'fake_loss', interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(world, s, tmp_path / 'cut')
    monkeypatch.setattr(terms, 'fake_loss', true)
    assert [p.name for p in (tmp_path / 'cut' / 'checkpoints').glob('*.pt')] == ['0000001-00000006.pt']
    assert same_history(run(world, s, tmp_path / 'cut'), whole)
    assert (tmp_path / 'cut' / 'collection.safetensors').read_bytes() == (
        tmp_path / 'whole' / 'collection.safetensors'
    ).read_bytes()


def test_a_second_interrupt_does_not_save_half_an_update(world, tmp_path, monkeypatch):
    def twice(*args):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)
        return None

    monkeypatch.setattr(terms, 'fake_loss', twice)
    before = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell starts background jobs with Ctrl-C ignored
    try:
        with pytest.raises(KeyboardInterrupt):
            run(world, SMALL, tmp_path)
        assert (
            not list((tmp_path / 'checkpoints').glob('*.pt'))
            and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        )
    finally:
        signal.signal(signal.SIGINT, before)


def test_checkpoints_keep_the_last_k(world, tmp_path):
    run(world, SMALL, tmp_path, save_every=1, keep=2)
    assert [p.name[:7] for p in sorted((tmp_path / 'checkpoints').glob('*'))] == ['0000004', '0000005']


def test_the_loop_opens_no_picture(world, straight, folder, tmp_path):
    "All pictures, prompts and the cache vanish after the first step; training does not notice."
    gone = [folder / 'effects', folder / 'general', folder / 'cache']
    training = distill(*world, SMALL, tmp_path)
    history = [next(training)]
    for path in gone:
        path.rename(path.with_suffix('.gone'))
    try:
        history += list(training)
    finally:
        for path in gone:
            path.with_suffix('.gone').rename(path)
    assert same_history(history, straight[0])


def test_pictures_of_two_shapes(tmp_path):
    base = make_world(tmp_path, sizes=((64, 64), (128, 32)))
    args = open_world(tmp_path, base)
    assert len(load_pools(args[4], samples_of(*args[2:4]))) == 2
    history = run(args, replace(SMALL, steps=3, fake_warmup=0), tmp_path / 'out', val_every=2)
    assert len(history) == 3 and (tmp_path / 'out' / 'validation' / '0000002.png').is_file()


# --- refusals and faults
def test_a_changed_run_is_refused_by_name(world, straight, folder, tmp_path):
    base, bank, effects, general, cache = world
    run(world, replace(SMALL, steps=1), tmp_path)
    assert 'tau_min' in fails(world, replace(SMALL, tau_min=0.3), tmp_path)
    assert 'two' in fails(
        (base, bank, [effects[0], replace(effects[1], prompt='other')], general, cache), SMALL, tmp_path
    )
    assert 'general stream' in fails((base, bank, effects, general[:-1], cache), SMALL, tmp_path)
    changed = copy.copy(bank)
    changed.shas = {**bank.shas, 'two': '0' * 64}
    assert 'teachers / two' in fails((base, changed, effects, general, cache), SMALL, tmp_path)


def test_inputs_that_do_not_fit(world, tmp_path):
    base, bank, effects, general, cache = world
    assert 'no effects' in fails((base, bank, [], general, cache), SMALL, tmp_path)
    assert 'general data' in fails((base, bank, effects, [], cache), SMALL, tmp_path)
    assert 'p_switch is 0' in fails(world, replace(SMALL, p_switch=0.0), tmp_path)
    assert "'three' has no teacher" in fails(
        (base, bank, [replace(effects[0], id='three')], general, cache), SMALL, tmp_path
    )
    assert 'no such file' in fails(world, replace(SMALL, init='nowhere.safetensors'), tmp_path)
    assert 'trigger' in fails((base, bank, [replace(effects[0], trigger=None)], general, cache), SMALL, tmp_path)
    assert not (tmp_path / 'checkpoints').exists() and set(base.backbone.roles) == {bank.role}


def test_two_runs_on_one_folder(world, tmp_path):
    training = distill(*world, SMALL, tmp_path)
    next(training)
    assert 'another run' in fails(world, SMALL, tmp_path)
    training.close()


def test_a_damaged_checkpoint_is_passed_over(world, straight, tmp_path, capsys):
    run(world, replace(SMALL, steps=3), tmp_path, save_every=1)
    last = sorted((tmp_path / 'checkpoints').glob('*.pt'))[-1]
    last.write_bytes(last.read_bytes()[:1000])
    assert same_history(run(world, SMALL, tmp_path), straight[0]) and 'damaged' in capsys.readouterr().err


def test_one_flipped_bit_in_a_checkpoint_is_noticed_and_so_is_the_loss_of_all(world, straight, tmp_path, capsys):
    run(world, replace(SMALL, steps=3), tmp_path, save_every=1)
    for path in (tmp_path / 'checkpoints').glob('*.pt'):
        raw, weights = bytearray(path.read_bytes()), load_state(path)['fake'].numpy().tobytes()
        raw[raw.index(weights) + len(weights) // 2] ^= 1
        path.write_bytes(raw)
        torch.load(path, weights_only=True)  # torch itself does not mind
        with pytest.raises(Exception, match='checksum|CRC'):
            load_state(path)
    assert same_history(run(world, SMALL, tmp_path), straight[0])
    assert 'starts again from step 0' in capsys.readouterr().err


def test_full_disk(world, straight, tmp_path, monkeypatch):
    run(world, replace(SMALL, steps=2), tmp_path, save_every=1)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, 'No space left on device')

    monkeypatch.setattr(torch, 'save', full)
    assert 'make room' in fails(world, SMALL, tmp_path, save_every=1)
    monkeypatch.undo()
    assert same_history(run(world, SMALL, tmp_path), straight[0])


def test_divergence_stops_with_step_and_term(world, tmp_path):
    wild = replace(SMALL, steps=50, lr_student=1e18, lr_fake=1e18, clip=1e18, lr_warmup=0)
    assert fails(world, wild, tmp_path).startswith('step ')
    guard = Guard(10.0)
    for k in range(30):
        guard.check(k, 'loss', 'fm', 1.0 + k % 2)
    with pytest.raises(UserError, match='step 32: the loss of trajectory anchoring .fm. is 50'):
        guard.check(31, 'loss', 'fm', 50.0)
    with pytest.raises(UserError, match='target simulation'):
        guard.check(31, 'norm', 'ts', float('nan'))
    Guard(0.0).check(1, 'loss', 'fm', 1e30)


def test_the_plan_is_measured_and_the_curves_are_drawn(world, straight):
    base, _, effects, general, cache = world
    made = measured_plan(base, effects, general, cache, resolved(SMALL, 1.0))
    assert (
        made['seconds'] > 0 and made['fake-score updates'] == SMALL.fake_warmup + SMALL.steps * SMALL.fake_per_generator
    )
    drawn = [ax for ax in show_history(straight[0], smooth=2).axes if ax.axison]
    assert len(drawn) >= 4 and all(ax.lines and ax.get_title() for ax in drawn)  # no empty axes


def test_roles_are_gone_afterwards(world, tmp_path):
    run(world, replace(SMALL, steps=1), tmp_path)
    assert set(world[0].backbone.roles) == {world[1].role}


# --- the real thing: kill -9
SCRIPT = """
import sys, torch
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_distill import SMALL, open_world
from dataclasses import replace
from collectionlora.engine.loop import distill
for info in distill(*open_world(Path({folder!r})), replace(SMALL, steps=12), {out!r}, save_every=1): print(info['step'], flush=True)
"""


def launch(folder, out):
    code = textwrap.dedent(SCRIPT).format(
        tests=os.path.dirname(os.path.abspath(__file__)), folder=str(folder), out=str(out)
    )
    return subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


@pytest.mark.slow
def test_kill_nine_at_random_moments(folder, world, tmp_path):
    assert launch(folder, tmp_path / 'whole').wait() == 0
    moments, killed, r = 6, 0, random.Random(seed_of('kill'))
    for _ in range(moments):
        p = launch(folder, tmp_path / 'killed')
        for line in p.stdout:  # after some step, somewhere inside the next one
            if r.random() < 0.35:
                time.sleep(r.random() * 0.3)
                break
        if p.poll() is None:
            p.send_signal(signal.SIGKILL)
            killed += 1
        p.wait()
    assert launch(folder, tmp_path / 'killed').wait() == 0 and killed >= 3
    assert (tmp_path / 'killed' / 'collection.safetensors').read_bytes() == (
        tmp_path / 'whole' / 'collection.safetensors'
    ).read_bytes()


def test_a_head_tells_pictures_from_targets_and_the_student_learns_from_it(world, tmp_path):
    s = replace(SMALL, **IMITATING | dict(further={'apart': 0.5, 'imitate': 0.1}, fake_per_generator=1), steps=4)
    history = run(world, s, tmp_path)
    of_effects = [h for h in history if h['effect']]
    assert of_effects and all(h['loss_apart'] > 0 and h['norm_apart'] > 0 for h in of_effects)
    assert not any('loss_apart' in h for h in history if not h['effect'])


def test_the_head_knows_what_it_should_and_pushes_towards_the_target():
    target, own = torch.randn(2, 3, 64, 6, generator=torch.Generator().manual_seed(0)).unbind(0)
    assert held_apart(target, target).abs().max() == 0
    own = (1.5 * own + 0.3).requires_grad_()
    before = held_apart(target, own)
    before.sum().backward()
    after = held_apart(target, own.detach() - 0.5 * own.grad)
    assert (after < before).all() and (before > 0).all()
    alone = torch.cat([held_apart(target[i : i + 1], own[i : i + 1]) for i in range(3)])
    assert torch.allclose(alone, before, rtol=1e-4)  # no picture depends on its batch
