"""Merging methods against PEFT's own `add_weighted_adapter`, on real PEFT layers."""

import pytest
import torch
from peft import get_peft_model, LoraConfig

from collectionlora.core import UserError
from collectionlora.files.dialects import Lora
from collectionlora.files.merging import core_merge, cosines, dense_merge, merge, METHODS, sum_error

N, RANK, SIZES = 3, 4, {'a': (24, 32), 'b': (32, 16)}


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        for n, (i, o) in SIZES.items():
            setattr(self, n, torch.nn.Linear(i, o))


@pytest.fixture
def loras():
    g = torch.Generator().manual_seed(0)
    return [
        Lora({n: (torch.randn(RANK, i, generator=g), torch.randn(o, RANK, generator=g)) for n, (i, o) in SIZES.items()})
        for _ in range(N)
    ]


def by_peft(loras, weights, **kw):
    model = get_peft_model(Net(), LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(SIZES)), adapter_name='l0')
    for i in range(1, N):
        model.add_adapter(f'l{i}', LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(SIZES)))
    layers = {n: getattr(model.base_model.model, n) for n in SIZES}
    for i, lora in enumerate(loras):
        for n, (a, b) in lora.factors.items():
            layers[n].lora_A[f'l{i}'].weight.data, layers[n].lora_B[f'l{i}'].weight.data = a.clone(), b.clone()
    model.add_weighted_adapter([f'l{i}' for i in range(N)], weights, 'm', **kw)
    return {n: l.get_delta_weight('m').detach() for n, l in layers.items()}


@pytest.mark.parametrize('method', ['cat', 'linear', 'svd', 'ties_svd', 'magnitude_prune_svd'])
@pytest.mark.parametrize('weights', [[1.0, 1.0, 1.0], [1.0, 0.5, 2.0]])
def test_equal_to_peft(method, weights, loras):
    kw = {} if method in ('cat', 'linear') else dict(svd_rank=5, svd_full_matrices=False)
    kw |= dict(density=0.4) if method[:4] in ('ties', 'magn') else {}
    want = by_peft(loras, weights, combination_type=method, **kw)
    got = merge(loras, method, weights, rank=None if not METHODS[method] else 5, density=0.4)
    for n in SIZES:
        assert torch.allclose(got.delta(n), want[n], atol=1e-4 * float(want[n].abs().max()) + 1e-4), (method, n)


@pytest.mark.parametrize('method', METHODS)
def test_single_lora_and_repeatability(method, loras):
    one = merge(loras[:1], method, rank=RANK, density=0.9)
    if 'ties' not in method and 'dare' not in method and 'prune' not in method:
        assert sum_error(one, loras[:1]) < 1e-4
    again = [merge(loras, method, rank=6, density=0.5, seed=s) for s in (1, 1, 2)]
    assert all(torch.equal(x, y) for n in SIZES for x, y in zip(again[0].factors[n], again[1].factors[n]))
    if 'dare' in method:
        assert not torch.equal(again[0].factors['a'][0], again[2].factors['a'][0])
    if method != 'cat':
        assert again[0].rank <= 6 and all(x.isfinite().all() for ab in again[0].factors.values() for x in ab)


def test_dare_leaves_the_global_generator_alone(loras):
    before = torch.random.get_rng_state()
    merge(loras, 'dare_ties_svd', rank=4)
    assert torch.equal(before, torch.random.get_rng_state())


def test_missing_modules_and_mixed_ranks(loras):
    loras[1] = Lora({'a': tuple(f[:2] if i == 0 else f[:, :2] for i, f in enumerate(loras[1].factors['a']))})
    for method in METHODS:
        if method != 'linear':
            assert set(merge(loras, method, rank=20).factors) == set(SIZES)
    assert sum_error(merge(loras, 'svd', rank=20), loras) < 1e-4
    with pytest.raises(UserError, match='one rank'):
        merge(loras, 'linear')


def test_mistakes(loras):
    for kw, match in (
        (dict(method='tise_svd', rank=4), 'ties_svd'),
        (dict(method='svd'), 'rank'),
        (dict(method='svd', rank=4, weights=[1.0]), 'weights'),
        (dict(method='ties_svd', rank=4, density=1.0), 'density'),
    ):
        with pytest.raises(UserError, match=match):
            merge(loras, **kw)
    with pytest.raises(UserError, match='different bases'):
        merge([loras[0], Lora({'a': (torch.ones(1, 3), torch.ones(32, 1))})], 'cat')


def test_cosines(loras):
    c = cosines(loras)
    flat = torch.stack([torch.cat([l.delta(n).flatten() for n in SIZES]) for l in loras])
    assert torch.allclose(c.float(), torch.nn.functional.cosine_similarity(flat[:, None], flat[None], -1), atol=1e-5)


@pytest.mark.parametrize('count', [2, 6, 7])
def test_the_sum_is_cut_alike_whether_factors_are_thin_or_not(count):
    "Ranks that add up to less than, exactly and more than the layers' narrow side."
    g = torch.Generator().manual_seed(0)
    As, Bs, ws = (
        [torch.randn(4, 32, generator=g) for _ in range(count)],
        [torch.randn(24, 4, generator=g) for _ in range(count)],
        torch.linspace(0.5, 2, count).tolist(),
    )
    for rank in (3, 8, 100):
        (a, b), (c, d) = core_merge(As, Bs, ws, rank), dense_merge(As, Bs, ws, rank)
        assert torch.allclose(b @ a, d @ c, atol=1e-3) and len(a) == b.shape[1] <= min(rank, 24, 4 * count)


@pytest.mark.parametrize(
    'kw, match',
    [
        (dict(rank=2.5), 'whole rank'),
        (dict(rank=None), 'whole rank'),
        (dict(rank=0), 'whole rank'),
        (dict(rank=2, weights=[1.0, float('nan'), 1.0]), 'finite'),
        (dict(rank=2, weights=[1.0, float('inf'), 1.0]), 'finite'),
    ],
)
def test_a_merge_of_nonsense_is_refused(kw, match, loras):
    with pytest.raises(UserError, match=match):
        merge(loras, 'svd', **kw)
