"Distribution matching, routing and coarse-to-fine as pure functions: properties that must hold for every input."

import math
from collections import Counter

import pytest
import torch
from hypothesis import example, given, settings as hyp, strategies as st

from collectionlora import c2fdo, dmd, flow, pdsr, toy
from collectionlora.core import UserError

quick = hyp(max_examples=25, deadline=None)


def tensors(seed, n, *shape):
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@quick
@given(st.integers(0, 10**6), st.floats(1e-3, 1.0))
def test_velocity_space_is_x0_space(seed, t):
    x, noise, v_fake, v_real = tensors(seed, 4, 3, 5, 4)
    x_t, level = flow.add_noise(x, noise, t), torch.full((3,), t, dtype=torch.float64)
    direct = dmd.velocity_gradient(flow.velocity(x, noise), v_fake, v_real, eps=0)
    around = dmd.gradient(x, flow.to_x0(x_t, v_fake, level), flow.to_x0(x_t, v_real, level), eps=0)
    assert torch.allclose(direct, around, atol=1e-6, rtol=1e-6)


@quick
@given(st.integers(0, 10**6))
def test_gradient_zero_when_scores_agree_and_antisymmetric_otherwise(seed):
    x, fake, real = tensors(seed, 3, 2, 4, 3)
    assert dmd.gradient(x, real, real).abs().max() == 0
    assert dmd.loss(x.clone().requires_grad_(), real, real).item() == 0
    assert torch.allclose(dmd.gradient(x, fake, real, eps=0) * (x - real).abs().mean((1, 2), keepdim=True), fake - real)


def test_the_normaliser_is_per_sample_and_finite():
    x, fake, real = tensors(0, 3, 2, 4, 3)
    both = dmd.gradient(x, fake, real)
    for i in range(2):
        assert torch.allclose(both[i : i + 1], dmd.gradient(x[i : i + 1], fake[i : i + 1], real[i : i + 1]))
    assert torch.isfinite(dmd.gradient(real, fake, real)).all()
    assert dmd.gradient(real, fake, real, eps=0).abs().max() == torch.finfo(real.dtype).max  # theirs: nan_to_num


def test_pull_has_the_gradient_and_nothing_reaches_the_scores():
    x, fake, real = (t.requires_grad_() for t in tensors(3, 3, 2, 4, 3).unbind())
    loss = dmd.loss(x, fake, real)
    (grad,) = torch.autograd.grad(loss, x, retain_graph=True)
    assert torch.allclose(grad, dmd.gradient(x, fake, real).detach() / x.numel(), atol=1e-15)
    assert torch.autograd.grad(loss, (fake, real), allow_unused=True) == (None, None)
    x0, eps = tensors(4, 2, 2, 4, 3).requires_grad_()
    v = tensors(5, 1, 2, 4, 3)[0].requires_grad_()
    assert torch.autograd.grad(dmd.fake_loss(v, x0, eps), (v, x0), allow_unused=True)[1] is None


@pytest.mark.parametrize('dim', [1, 3])
def test_one_step_of_eq_1_lowers_the_divergence(dim):
    "A Gaussian student with exact scores: moving along -gradient lowers the KL at every noise level."
    m, s, mu, n = torch.zeros(1, dim, dtype=torch.float64), 0.7, 1.5, 20_000
    g = torch.Generator().manual_seed(0)
    z = torch.randn(n, dim, generator=g, dtype=torch.float64)
    for t in (0.1, 0.5, 0.9):
        shift = torch.full((dim,), mu, dtype=torch.float64, requires_grad=True)
        x = shift + 0.7 * z
        x_t = flow.add_noise(x.detach(), torch.randn(n, dim, generator=g, dtype=torch.float64), t)
        fake, real = toy.mixture_x0(x_t, t, shift.detach()[None], 0.7), toy.mixture_x0(x_t, t, m, s)
        dmd.loss(x, fake, real).backward()
        assert (shift.grad > 0).all()  # descent moves the mean from 1.5 towards 0


@quick
@given(st.integers(1, 40), st.floats(0.25, 4.0), st.floats(0.0, 0.5), st.floats(0.05, 0.4), st.integers(0, 10**6))
def test_times_are_stratified_within_bounds(n, shift, lo, width, seed):
    t = dmd.draw_times(n, torch.Generator().manual_seed(seed), shift, lo, lo + width)
    assert t.shape == (n,) and t.min() >= lo - 1e-6 and t.max() <= lo + width + 1e-6
    u, a, b = (flow.shift_time(v, 1 / shift) for v in (t.double(), lo, lo + width))
    place, k = ((u - a) / (b - a) * n).sort().values, torch.arange(n)
    assert ((place > k - 0.01) & (place < k + 1.01)).all()  # one in each n-th, up to rounding


def test_times_refuse_nonsense():
    for lo, hi in ((0.5, 0.5), (0.8, 0.2), (-0.1, 1.0), (0.0, 1.1)):
        with pytest.raises(UserError, match='lo'):
            dmd.draw_times(3, torch.Generator(), 1.0, lo, hi)


@quick
@given(st.integers(1, 20), st.integers(1, 9), st.integers(0, 10**6))
@example(11, 7, 26)  # exits 3 and 0 times: seven exits share eleven strata
def test_rollout_each_is_rollout_of_each(n, steps, seed):
    g = torch.Generator().manual_seed(seed)
    times, exits, noise, x1 = (
        flow.few_step_times(steps, 3.0),
        dmd.draw_exits(n, steps, g),
        torch.randn(steps + 1, n, 3, 2, generator=g),
        torch.randn(n, 3, 2, generator=g),
    )
    spent = []
    v = lambda x, t, rows=None: (spent.append(len(x)), (x * 1.3).sin() * t[:, None, None])[1]
    x_t, t = dmd.rollout_each(v, x1, times, exits, lambda k: noise[k])
    assert sum(spent) == sum(exits) and not x_t.requires_grad
    ode, same_t = dmd.rollout_each(v, x1, times, exits, None)
    assert torch.equal(t, same_t) and not ode.requires_grad
    for i, e in enumerate(exits):
        one = x1[i : i + 1]
        alone = flow.rollout(v, one, times, e, lambda k: noise[k][i : i + 1])
        assert torch.allclose(x_t[i : i + 1], alone, atol=1e-6)
        euler = flow.sample_ode(v, one, times[: e + 1])
        assert torch.allclose(ode[i : i + 1], euler, atol=1e-6) and torch.equal(flow.rollout(v, one, times, e, None), euler)
    counts = Counter(exits)
    assert all(
        abs(counts[k] - n / steps) < 2 for k in range(steps)
    )  # n strata of width 1/n: an exit holds all between its two edges, and of those at the edges none or one each


def test_rollout_each_wants_sorted_exits():
    with pytest.raises(UserError, match='sorted'):
        dmd.rollout_each(lambda x, t, r: x, torch.zeros(2, 1, 1), [1.0, 0.5], [0, 1], torch.zeros_like)


@quick
@given(st.integers(1, 9), st.integers(0, 60), st.integers(0, 10**6), st.floats(0, 1), st.integers(1, 25))
def test_timetable(n, steps, seed, p, every):
    ids = [f'e{i}' for i in range(n)]
    table = pdsr.timetable(ids, steps, seed, p, every)
    assert table[: steps // 2] == pdsr.timetable(ids, steps // 2, seed, p, every)
    counts = Counter(t for t in table if t)
    assert max(counts.values(), default=0) - min((counts[i] for i in ids), default=0) <= 1
    for k in range(0, steps, every):
        assert len({t is None for t in table[k : k + every]}) <= 1


def test_every_deck_of_effects_is_shuffled_anew():
    ids = [f'e{i}' for i in range(9)]
    drawn = pdsr.schedule(ids, 27, 0)
    decks = [tuple(drawn[k : k + 9]) for k in (0, 9, 18)]
    assert len(set(decks)) == 3 and all(sorted(deck) == ids for deck in decks)


@pytest.mark.parametrize(
    'call, word',
    [
        (lambda: pdsr.route(1.2, 0, 0), 'probability'),
        (lambda: pdsr.route(0.5, 0, 0, 0), 'every'),
        (lambda: pdsr.schedule(['a', 'a'], 3, 0), 'twice'),
        (lambda: pdsr.schedule([], 3, 0), 'no effects'),
        (lambda: c2fdo.generator_times([1.0, 0.5], 0.3), 'tau_max'),
        (lambda: c2fdo.total({'bz': torch.tensor(1.0)}, {'bs': 1.0}), "did you mean 'bs'"),
    ],
)
def test_refusals(call, word):
    with pytest.raises(UserError, match=word):
        call()


def test_target_simulation_denoises_with_gradient():
    y, eps = tensors(1, 2, 3, 4, 2)
    w = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    t = torch.tensor([0.3, 0.5, 0.64], dtype=torch.float64)
    out = c2fdo.simulate_target(lambda x, t: w * x, y, t, eps)
    assert torch.allclose(out, flow.add_noise(y, eps, t) * (1 - 0.5 * t[:, None, None]))
    assert math.isfinite(torch.autograd.grad(out.sum(), w)[0].item())


@pytest.mark.parametrize('n', [1, 8, 16, 100, 128])
def test_no_exit_lies_beyond_the_last_step_when_rounding_is_against_us(n, monkeypatch):
    monkeypatch.setattr(torch, 'rand', lambda n, generator: torch.full((n,), 1 - 2.0**-24))
    assert max(dmd.draw_exits(n, 8, torch.Generator().manual_seed(0))) == 7
    assert dmd.draw_times(n, torch.Generator().manual_seed(0), hi=0.5).max() <= 0.5
