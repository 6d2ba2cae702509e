"The statistics keep their promises: identity of the gate, coverage, error rates, refusal to compare what cannot be compared."

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy import stats

from collectionlora import core
from collectionlora.bases import likeness
from collectionlora.core import UserError
from collectionlora.judge import gate, statistics
from collectionlora.judge.tables import REFERENCES, table


def row(effect='a', image='i0', applied=True, subject=0.5, method='m', **kw):
    d = dict(
        method=method,
        effect=effect,
        category='animal',
        image=image,
        seed=0,
        predicted=effect if applied else gate.NONE,
        applied=applied,
        subject=subject,
        distance=0.1,
        laplacian=1.0,
        seconds=0.1,
        nfe=8,
    )
    return gate.Row(**{**d, **kw})


def grid(applied, method='m', **kw):
    "Rows of a [E, I] table of booleans."
    return [row(f'e{e}', f'i{i}', bool(v), method=method, **kw) for (e, i), v in np.ndenumerate(np.asarray(applied))]


def test_statistics_import_no_torch():
    code = 'import sys; from collectionlora.judge import gate, statistics, tables; sys.exit("torch" in sys.modules)'
    assert subprocess.run([sys.executable, '-c', code]).returncode == 0


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.floats(0, 1), st.booleans()), min_size=1, max_size=40))
def test_one_gate_gives_the_identity(cases):
    rows = [row(image=f'i{k}', applied=a and v, subject=s, valid=v) for k, (a, s, v) in enumerate(cases)]
    if not any(v for _, _, v in cases):
        with pytest.raises(UserError, match='no valid row'):
            gate.gate(rows)
        return
    g = gate.gate(rows)
    assert g['score'] == pytest.approx((1 - g['bcr']) * g['kept'], abs=1e-12)
    assert g['score'] <= 1 - g['bcr'] + 1e-12
    lo, hi = gate.bounds(rows)
    share = sum(v for _, _, v in cases) / len(cases)
    assert lo <= hi and lo == pytest.approx(g['bcr'] * share)


@pytest.mark.parametrize('k, n', [(0, 10), (1, 10), (7, 20), (20, 20), (3, 400)])
def test_wilson_solves_its_equation(k, n):
    lo, hi = statistics.wilson(k, n)
    z, p = stats.norm.ppf(0.975), k / n
    for b in (lo, hi):
        if 0 < b < 1:
            assert abs(p - b) == pytest.approx(z * np.sqrt(b * (1 - b) / n), rel=1e-9)
    assert 0 <= lo <= p <= hi <= 1


def test_t_interval_and_p_agree_with_scipy():
    g = np.random.default_rng(0)
    a, b = (grid(g.random((12, 7)) < q, m) for q, m in ((0.9, 'a'), (0.7, 'b')))
    c = statistics.paired(a, b)
    d = [
        np.mean([x.applied for x in b if x.effect == e]) - np.mean([x.applied for x in a if x.effect == e])
        for e in sorted({r.effect for r in a})
    ]
    ref = stats.ttest_1samp(d, 0)
    assert c.difference == pytest.approx(np.mean(d)) and c.p == pytest.approx(ref.pvalue)
    assert (c.low, c.high) == pytest.approx(tuple(ref.confidence_interval()))
    assert c.effects == 12 and c.pairs == 84 and c.two_way is None


def test_bootstrap_is_seeded_and_keeps_unbalanced_means():
    g = np.random.default_rng(1)
    rows = grid(g.random((5, 8)) < 0.6)
    rows = rows[:-3]  # an unbalanced table
    cells = statistics.crossed(gate.defined(rows, 'bcr'))
    total, count = cells['animal']
    assert total.sum() / count.sum() == pytest.approx(gate.gate(rows)['bcr']) and count.sum() == len(rows)
    draws = statistics.two_way_bootstrap(cells, 3)
    assert np.array_equal(draws, statistics.two_way_bootstrap(cells, 3))
    assert not np.array_equal(draws, statistics.two_way_bootstrap(cells, 4))
    assert abs(draws.mean() - gate.gate(rows)['bcr']) < 0.03


def test_bootstrap_sees_effects_as_the_sample():
    half = np.zeros((6, 20), bool)
    half[:3] = True  # three effects always work, three never
    clustered = statistics.two_way_bootstrap(statistics.crossed(gate.defined(grid(half), 'bcr')), 0).std()
    assert clustered == pytest.approx(0.5 / np.sqrt(6), rel=0.1)  # far above .5 / sqrt(120)


def test_no_failure_is_not_certainty():
    e = statistics.estimate(grid(np.ones((4, 10), bool)), 'bcr')
    assert e.value == 0 and e.high == pytest.approx(statistics.wilson(0, 40)[1]) and e.n == 40 and e.effects == 4


def test_type_one_error_of_effect_level_t():
    g, hits, sims = np.random.default_rng(0), 0, 300
    for _ in range(sims):
        logit = -1.5 + g.normal(0, 1, (12, 1))
        a, b = (g.random((12, 15)) < 1 / (1 + np.exp(-(logit + g.normal(0, 0.8, (12, 1))))) for _ in range(2))
        hits += statistics.paired(grid(a, 'a'), grid(b, 'b')).p < 0.05
    assert 0.01 < hits / sims < 0.09


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm(p):
    adjusted, m = statistics.holm(p), len(p)
    order = sorted(range(m), key=lambda i: p[i])
    want = [max(min(1.0, (m - r) * p[order[r]]) for r in range(k + 1)) for k in range(m)]
    assert [adjusted[i] for i in order] == pytest.approx(want)


@pytest.mark.slow
def test_holm_equals_statsmodels():
    multitest = pytest.importorskip('statsmodels.stats.multitest')
    p = np.random.default_rng(0).random((20, 9)) ** 3
    for row in p:
        assert statistics.holm(row) == pytest.approx(multitest.multipletests(row, method='holm')[1])


def test_paired_refuses_unequal_sets():
    rows = grid(np.ones((3, 4), bool), 'a')
    with pytest.raises(UserError, match='not evaluated on the same'):
        statistics.paired(rows, grid(np.ones((3, 3), bool), 'b'))
    with pytest.raises(UserError, match='not evaluated on the same'):
        statistics.paired(rows, rows + rows[:1])
    lost = [replace(r, method='b', applied=False, valid=i > 0) for i, r in enumerate(rows)]
    assert statistics.paired(rows, lost).pairs == 11  # an invalid output drops its pair, visibly


def test_confusion_counts_every_valid_row():
    rows = [
        row('a'),
        row('a', 'i1', predicted='b', applied=False),
        row('b', applied=False),
        row('b', 'i1', valid=False, applied=False),
    ]
    m = gate.confusion(rows, ['a', 'b'])
    assert m.tolist() == [[1, 1, 0], [0, 0, 1]]
    assert gate.bleed(m) == pytest.approx(dict(right=1 / 3, bleed=1 / 3, none=1 / 3))
    with pytest.raises(UserError, match="did you mean 'b'"):
        gate.confusion([row('a', predicted='bb', applied=False)], ['a', 'b'])


def test_table_needs_floor_and_ceiling():
    rows = grid(np.ones((2, 3), bool))
    with pytest.raises(UserError, match='floor and ceiling'):
        table(rows)
    full = rows + [replace(r, method=m) for m in REFERENCES for r in rows]
    assert [line['n'] for line in table(full)] == [6] * 4


def test_rows_survive_the_disk(tmp_path):
    rows = [row(distance=float('nan')), row('b', laplacian=2.0)]
    gate.write_rows(tmp_path / 'r.jsonl', rows)
    back = gate.read_rows(tmp_path / 'r.jsonl')
    assert np.isnan(back[0].distance) and back[1] == rows[1] and list(tmp_path.iterdir()) == [tmp_path / 'r.jsonl']
    for text, message in (
        ('{"method": "m"}\n', 'line 1'),
        ('nonsense\n', 'not JSON'),
        ('{"metod": 1}\n', "did you mean 'method'"),
    ):
        (tmp_path / 'bad.jsonl').write_text(text)
        with pytest.raises(UserError, match=message):
            gate.read_rows(tmp_path / 'bad.jsonl')


@pytest.mark.parametrize('bad', [dict(subject=1.2), dict(distance=-1.0), dict(valid=False)])
def test_impossible_rows_are_refused(bad):
    with pytest.raises(UserError, match='field|applied'):
        row(**bad)


def test_judge_keeps_failures():
    class Oracle:
        def score(self, image, spec, effect):
            return dict(predicted=effect, applied=True, subject=1.0000001, distance=0.0)

    item = gate.Item('a', 'animal', 'i0', 0, np.zeros((8, 8, 3), np.uint8), spec={}, energy=1.0)
    rows = gate.judge('m', [item, replace(item, image='i1')], [np.zeros((8, 8, 3), np.uint8), None], Oracle(), 0.5, 8)
    assert [r.valid for r in rows] == [True, False] and rows[0].subject == 1 and rows[0].laplacian == 0
    with pytest.raises(UserError, match='1 outputs for 2 items'):
        gate.judge('m', [item, item], [None], Oracle(), 0.5, 8)
    with pytest.raises(UserError, match='no known truth'):
        gate.judge('m', [replace(item, spec=None)], [None], Oracle(), 0.5, 8)


def test_set_distance_is_blind_to_size():
    g = np.random.default_rng(0)
    targets = np.stack([likeness.descriptor(g.normal(1, 0.5, (64, 4))) for _ in range(6)])
    near, far = (likeness.set_distance(likeness.descriptor(g.normal(m, 0.5, (n, 4))), targets) for m, n in ((1, 256), (0, 64)))
    assert near < 1.3 * likeness.leave_one_out(targets) < far


def test_identical_differences_are_not_certainty():
    c = statistics.paired(grid(np.ones((3, 4), bool), 'a'), grid(np.zeros((3, 4), bool), 'b'))
    assert c.difference == -1 and c.p == 0.25 and -1 <= c.low < c.high < -0.5 and np.isnan(c.mde)
    lo, hi = statistics.newcombe(grid(np.ones((2, 5), bool)), grid(np.ones((2, 5), bool)))
    assert lo == pytest.approx(-statistics.wilson(0, 10)[1]) and hi == pytest.approx(statistics.wilson(0, 10)[1])


def test_packed_rows_are_read_by_their_own_name(tmp_path):
    rows, file = [row(), row('b')], tmp_path / 'r.jsonl'
    gate.write_rows(file, rows)
    packed = core.pack(file)
    assert gate.read_rows(file) == rows and list(tmp_path.iterdir()) == [packed]
    gate.write_rows(file, rows)
    assert core.pack(file).read_bytes() == packed.read_bytes()
    for damage in (packed.read_bytes()[:-9], b'plain'):
        packed.write_bytes(damage)
        with pytest.raises(UserError, match='r.jsonl.xz: no xz file'):
            gate.read_rows(file)
