"The trainer of the nano base: what counts in its loss, and what its errors measure."

import numpy as np
import pytest
import torch

from collectionlora.bases import training
from collectionlora.core import UserError


def pairs(n=12, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 64, 64, generator=g)
    y = x.clone()
    y[:, :4] += torch.randn(n, 4, 64, generator=g)  # an edit of four tokens
    return x, y


def test_changed_tokens_weigh_as_much_as_kept_ones():
    x, y = pairs()
    c, w = training.changed_tokens(x, y), training.token_weights(x, y)
    assert (
        c.sum(1).eq(4).all()
        and torch.allclose((w * c).sum(1), (w * ~c).sum(1))
        and torch.allclose(w.mean(), torch.ones(()))
    )
    few = training.token_weights(x, y, most=3.0)
    assert torch.allclose(few[:, 0] / few[:, -1], torch.full((12,), 3.0))
    assert training.token_weights(x, x).eq(1).all()  # an edit that changes nothing
    assert torch.allclose(training.token_weights(x, -x), torch.ones(12, 64))  # and one that changes all


class Knows(torch.nn.Module):
    "A network that answers every noisy target as if it were `guess` of the source in its input."

    def __init__(self, guess):
        super().__init__()
        self.guess = guess

    def forward(self, hidden_states, timestep, **_):
        x_t, x = hidden_states.chunk(2, 1)
        return (torch.cat([(x_t - self.guess(x)) / timestep[:, None, None], x], 1),)


def test_errors_are_one_for_the_source_and_zero_for_the_target():
    x, y = pairs()
    X, E, n = torch.stack([x, y], 1).half(), torch.zeros(12, 5, 8), torch.full((12,), 5)
    f = ['wear'] * 6 + ['add'] * 6
    target = {tuple(a[4].tolist()): b for a, b in X.float()}
    exact = Knows(lambda s: torch.stack([target[tuple(a[4].tolist())] for a in s]))
    for net, e in ((Knows(lambda s: s), 1.0), (exact, 0.0)):
        got = training.edit_errors(net, X, E, n, f, batch=5)
        assert set(got) == {'wear', 'add'} and np.allclose([*got.values()], e, atol=1e-5)
    assert training.edit_errors(exact, X[:, :1].expand(-1, 2, -1, -1), E, n, f) == {}


def test_focus_ends_where_it_is_told_to(monkeypatch):
    x, y = pairs(32)
    X, E, n = torch.stack([x, y], 1).half(), torch.zeros(32, 5, 8), torch.full((32,), 5)
    seen = []

    def net(hidden_states, **_):
        return (torch.zeros_like(hidden_states),)

    monkeypatch.setattr(training, 'token_weights', lambda *a: seen.append(a[2]) or torch.ones(8, 64))
    loss = training.drawing_loss(net, X, E, n, batch=8, focus=(7.0, 2))
    got = [loss(np.random.default_rng(0), torch.Generator().manual_seed(0), step).item() for step in range(4)]
    assert seen == [7.0, 7.0] and got[0] == got[3] > 0


def trainer(key='a', steps=4):
    w = torch.nn.Parameter(torch.ones(3))
    return training.BaseTrainer(
        [w], lambda r, g, step: ((w - torch.randn(3, generator=g)) ** 2).sum(), steps, lr=0.1, warmup=2, key=key
    )


def test_a_checkpoint_goes_on_to_the_same_bits_and_belongs_to_one_run(tmp_path):
    whole, first, second = trainer(), trainer(), trainer()
    for t, until in ((whole, None), (first, 2)):
        list(t.run(until))
    first.save(tmp_path / 't.pt')
    second.load(tmp_path / 't.pt')
    list(second.run())
    assert (
        second.losses == whole.losses
        and torch.equal(second.params[0], whole.params[0])
        and torch.equal(second.ema[0], whole.ema[0])
    )
    with pytest.raises(UserError, match='t.pt: belongs to a run with other parameters'):
        trainer('b').load(tmp_path / 't.pt')
    (tmp_path / 't.pt').write_bytes((tmp_path / 't.pt').read_bytes()[:300])
    with pytest.raises(UserError, match='t.pt: damaged checkpoint'):
        trainer().load(tmp_path / 't.pt')


def test_a_run_without_steps_ends_at_once():
    t = trainer(steps=0)
    assert list(t.run()) == [] and torch.equal(t.params[0], torch.ones(3))


def test_pairs_are_drawn_once_and_anew_where_the_world_differs(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(training, '_render_shard', lambda job: (drawn.append(job[1]), real(job))[1])
    monkeypatch.setattr(training.mp, 'get_context', lambda how: Here)
    pair, C, families = training.render_pairs(tmp_path, 6, seed=3, shard=4)
    assert drawn == [0, 1] and (pair(5)[0] == training.edit_example(5, 3)[0]).all() and len(C) == len(families) == 6
    training.render_pairs(tmp_path, 5, seed=3, shard=4)
    assert drawn == [0, 1]
    old = training.world.render
    monkeypatch.setattr(training.world, 'render', lambda s: 255 - old(s))
    assert (training.render_pairs(tmp_path, 6, seed=3, shard=4)[0](5)[0] == 255 - pair(5)[0]).all() and drawn == [
        0,
        1,
        0,
        1,
    ]


real = training._render_shard


class Here:
    "A pool of one, in this process."

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def imap_unordered(self, f, jobs):
        return map(f, jobs)

    Pool = classmethod(lambda cls, workers: cls())
