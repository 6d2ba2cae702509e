import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import given, settings, strategies as st

from collectionlora import flow
from collectionlora.core import UserError

times01 = st.floats(0, 1, allow_nan=False)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@settings(max_examples=60, deadline=None)
@given(st.floats(1e-3, 1), st.integers(0, 2**31))
def test_x0_and_eps_come_back_from_the_velocity(t, seed):
    x0, eps = normal(2, 5, 4, seed=seed, dtype=torch.float64), normal(2, 5, 4, seed=seed + 1, dtype=torch.float64)
    x_t = flow.add_noise(x0, eps, torch.tensor([t, t / 2], dtype=torch.float64))
    t = torch.tensor([t, t / 2], dtype=torch.float64)
    v = flow.velocity(x0, eps)
    torch.testing.assert_close(flow.to_x0(x_t, v, t), x0, atol=1e-6, rtol=0)
    torch.testing.assert_close(flow.to_eps(x_t, v, t), eps, atol=1e-6, rtol=0)
    recovered = (x_t - flow.to_x0(x_t, v, t)) / t[:, None, None]  # the velocity through x0 and back
    torch.testing.assert_close(recovered, v, atol=1e-6, rtol=0)


@given(times01, times01, st.floats(0.2, 8))
def test_shift_keeps_order_ends_and_inverts(a, b, s):
    assert flow.shift_time(0.0, s) == 0 and math.isclose(flow.shift_time(1.0, s), 1)
    assert not a < b or flow.shift_time(a, s) <= flow.shift_time(b, s)
    assert math.isclose(flow.shift_time(flow.shift_time(a, s), 1 / s), a, abs_tol=1e-12)
    assert s <= 1 or flow.shift_time(a, s) >= a - 1e-12


def test_the_papers_schedule():
    published = [1000, 954.5454, 900, 833.3333, 750, 642.8571, 500, 300]
    assert [1000 * t for t in flow.few_step_times(8, 3)] == pytest.approx(published, abs=1e-4)
    assert flow.ode_times(4, 1) == [1, 0.75, 0.5, 0.25, 0]
    assert len(flow.ode_times(40, 3)) == 41


def test_a_straight_field_is_solved_exactly_in_one_step_by_both_samplers():
    x0, x1 = normal(3, 4, 2, dtype=torch.float64), normal(3, 4, 2, seed=1, dtype=torch.float64)
    straight = lambda x, t: (x - x0) / t.double()[:, None, None]
    for n in (1, 3, 8):
        torch.testing.assert_close(flow.sample_ode(straight, x1, flow.ode_times(n, 3)), x0, atol=1e-6, rtol=0)
        fresh = lambda i: normal(3, 4, 2, seed=10 + i, dtype=torch.float64)
        torch.testing.assert_close(
            flow.sample_few(straight, x1, flow.few_step_times(n, 3), fresh), x0, atol=1e-6, rtol=0
        )


def curved(x, t):
    return torch.tanh(x * 1.3) + t[:, None, None] * x.flip(-1)


def test_few_step_sampler_equals_the_stock_stochastic_scheduler():
    times, x = flow.few_step_times(8, 3), normal(1, 6, 4)
    stock = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True, shift=1.0)
    stock.set_timesteps(sigmas=times)
    stock.set_begin_index(0)
    g = torch.Generator().manual_seed(7)
    y = x
    for t in stock.timesteps:
        y = stock.step(curved(y, t.expand(1) / 1000), t, y, generator=g, return_dict=False)[0]
    g, draws = torch.Generator().manual_seed(7), []

    def noise(i):
        assert i == len(draws) + 1  # asked for once per time point, in order
        draws.append(torch.randn(x.shape, generator=g))
        return draws[-1]

    torch.testing.assert_close(flow.sample_few(curved, x, times, noise), y, atol=1e-5, rtol=0)
    assert len(draws) == 7


def test_ode_sampler_equals_the_stock_scheduler():
    x = y = normal(2, 6, 4)
    stock = FlowMatchEulerDiscreteScheduler(shift=3.0)
    stock.set_timesteps(sigmas=flow.few_step_times(10, 1))
    for t in stock.timesteps:
        y = stock.step(curved(y, t.expand(2) / 1000), t, y, return_dict=False)[0]
    torch.testing.assert_close(flow.sample_ode(curved, x, flow.ode_times(10, 3)), y, atol=1e-5, rtol=0)


@pytest.mark.parametrize('k', range(8))
def test_rollout_is_the_beginning_of_the_sampler(k):
    times, x1, seen = flow.few_step_times(8, 3), normal(2, 6, 4), []
    noise = lambda i: normal(2, 6, 4, seed=100 + i)

    def spy(x, t):
        seen.append(x)
        return curved(x, t)

    final = flow.sample_few(spy, x1, times, noise)
    states, seen = seen, []
    x_t = flow.rollout(spy, x1, times, k, noise)
    assert torch.equal(x_t, states[k]) and len(seen) == k and not x_t.requires_grad
    rest = [lambda i, k=k: noise(i + k)]
    assert torch.equal(flow.sample_few(curved, x_t, times[k:], rest[0]), final)


def test_rollout_has_no_gradient_and_names_a_bad_exit():
    w = torch.ones((), requires_grad=True)
    x = flow.rollout(lambda x, t: w * x, normal(1, 2, 2), flow.few_step_times(4), 2, lambda i: normal(1, 2, 2, seed=i))
    assert not x.requires_grad
    with pytest.raises(UserError, match='exit_step is 8'):
        flow.rollout(curved, x, flow.few_step_times(8), 8, None)
    with pytest.raises(UserError, match='n is 0'):
        flow.few_step_times(0)


def test_guidance():
    c, u = normal(2, 5, 4), normal(2, 5, 4, seed=1)
    torch.testing.assert_close(flow.guide(c, u, 1.0), c)
    torch.testing.assert_close(flow.guide(c, u, 0.0), u)
    g = flow.guide(c, u, 4.0, rescale=True)
    torch.testing.assert_close(g.norm(dim=-1), c.norm(dim=-1))
    torch.testing.assert_close(torch.cosine_similarity(g, flow.guide(c, u, 4.0), dim=-1), torch.ones(2, 5))
    zero = torch.zeros(1, 1, 4)
    assert torch.isfinite(flow.guide(zero, zero, 4.0, rescale=True)).all()


def test_noise_of_a_sample_depends_on_its_seed_and_step_alone():
    before = torch.get_rng_state()
    a, b = flow.noise_like((3, 4, 2), [5, 6, 7]), flow.noise_like((2, 4, 2), [7, 5])
    assert torch.equal(a[0], b[1]) and torch.equal(a[2], b[0]) and not torch.equal(a[0], a[1])
    assert not torch.equal(a, flow.noise_like((3, 4, 2), [5, 6, 7], step=1))
    assert torch.equal(before, torch.get_rng_state())
    big = flow.noise_like((4, 1000, 16), [1, 2, 3, 4])
    assert abs(big.mean()) < 0.02 and abs(big.std() - 1) < 0.02
    with pytest.raises(UserError, match='2 seeds for a batch of 3'):
        flow.noise_like((3, 1, 1), [1, 2])
