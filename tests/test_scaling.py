"Scaling: sizes and capacity by formula, tables from records that are there or not, and pictures with two effects."

import numpy as np
import pytest
from safetensors import safe_open

from collectionlora import core, scaling, world
from collectionlora.analysis import scales as kept
from collectionlora.core import UserError
from collectionlora.judge.gate import Row
from collectionlora.bases.slots import layer_sizes


def made_up(n, base='made up', status='finished', **metrics):
    "A record that no run wrote: one method, no picture."
    found = dict(
        own='made up, 8 steps',
        effects=[f'made up {k}' for k in range(n)],
        methods={'made up, 8 steps': dict(n=0, bcr=dict(value=0.5, low=0.0, high=1.0, n=0))},
    )
    return dict(status=status, run={'inputs': {'base': base}}, metrics=found | metrics)


def a_row(effect, image, method='ours', applied=True):
    return Row(method, effect, 'animal', image, 0, effect, applied, 1.0, 1.0, 1.0, 0.1, 8)


def test_the_formula_counts_the_numbers_of_a_shipped_file():
    sizes = layer_sizes(core.nano_dir())
    with safe_open(core.collection_dir() / 'collection.safetensors', 'pt') as f:
        numbers = sum(int(np.prod(f.get_slice(k).get_shape())) for k in f.keys() if 'alpha' not in k)
    assert numbers == scaling.lora_numbers(sizes, 32) == 2 * scaling.lora_numbers(sizes, 16)
    assert scaling.share_of_bank(16, 4, 16) == 0.25 and scaling.directions(16, 56, 4) == 224


def test_energy_is_shared_where_directions_are():
    a, b, c = np.eye(6)[:3]
    apart = scaling.energy_kept({'m': [np.outer(a, c), np.outer(b, c)]})
    alike = scaling.energy_kept({'m': [np.outer(a, c), 2 * np.outer(a, b)], 'n': [np.outer(a, a), np.zeros((6, 6))]})
    assert apart[:3] == pytest.approx([0.5, 1, 1]) and alike[0] == pytest.approx(1)
    drawn = np.random.default_rng(0).normal(size=(3, 8, 5))
    curve = scaling.energy_kept({'m': list(drawn)})
    assert (np.diff(curve) > -1e-12).all() and curve[-1] == pytest.approx(1)


def a_table(*sizes, status='finished'):
    "A record of table_4 that no run wrote, with nested sets of these sizes and one of another compute."
    methods = {
        f'{m}, {n} effects': dict(bcr=dict(value=0.5, low=0.0, high=1.0, n=0))
        for n in sizes
        for m in ('ours', 'teacher')
    }
    named = {f'ours, {n} effects': {'effects': n} for n in sizes} | {
        'ours, 10 effects, steps 5': {'effects': 10, 'steps': 5}
    }
    return made_up(max(sizes), status=status, methods=methods, sizes=named)


def test_a_planned_column_is_missing_until_the_table_holds_it(tmp_path):
    assert set(kept.scales(tmp_path)) == set(kept.PLANNED) and not any(kept.scales(tmp_path).values())
    everything = len(kept.METHODS) * len(kept.PLANNED)
    assert kept.table_4(kept.scales(tmp_path)).count(kept.MISSING) == everything
    core.write_json(tmp_path / 'table_4' / 'smoke.json', a_table(20))
    core.write_json(tmp_path / 'table_4' / 'full.json', a_table(10, status='running'))
    assert not any(kept.scales(tmp_path).values())
    core.write_json(tmp_path / 'table_4' / 'full.json', a_table(12, 50))
    columns = kept.scales(tmp_path)
    assert [n for n, c in columns.items() if c] == [12, 50] and list(columns) == sorted(columns)
    assert [len(c['effects']) for c in columns.values() if c] == [12, 50]
    shown = kept.table_4(columns)
    assert shown.count(kept.MISSING) == everything - len(kept.METHODS)
    assert shown.count('0.50 [0.00, 1.00], n = 0') == 4 and shown.count('`made up`') == 2
    assert len({line.count('|') for line in shown.splitlines()}) == 1


@pytest.mark.parametrize('field', ['effects', 'methods', 'own'])
def test_a_record_without_a_field_is_refused_by_its_name(field):
    with pytest.raises(UserError, match=rf'10_effects.json: field metrics.{field} is absent'):
        kept.scale_of(made_up(10, **{field: None}), '10_effects.json')


def test_a_record_of_other_methods_is_refused():
    unknown = made_up(10, own='nobody', methods={'teacher alone, 8 steps': dict(bcr={})})
    with pytest.raises(UserError, match='10_effects.json: metrics.methods holds none of teacher'):
        kept.scale_of(unknown, '10_effects.json')


def test_the_kept_main_jobs_have_the_layout_of_a_column():
    jobs = kept.finished('main_job', '*/evaluation.json')
    assert jobs
    for name, record in jobs.items():
        column = kept.scale_of(record, name)
        assert set(column['methods']) == set(kept.METHODS) and len(column['base']) == 12
        own = record['metrics']['methods'][record['metrics']['own']]['bcr']
        assert column['methods']['All in 1 (Ours)'] == own and column['effects'] == sorted(record['metrics']['effects'])


def test_common_pictures_are_those_of_every_n():
    few = [a_row('a', 'x'), a_row('b', 'x', applied=False)]
    many = [a_row('c', 'x'), a_row('b', 'x'), a_row('a', 'y'), a_row('a', 'x')]
    shared = kept.common_pictures({2: few, 3: many})
    assert [r.pair for r in shared[2]] == [r.pair for r in shared[3]] == sorted(r.pair for r in few)
    assert [r.applied for r in shared[2]] == [True, False] and all(r.applied for r in shared[3])
    with pytest.raises(UserError, match='the runs with 2, 3 effects have no picture in common'):
        kept.common_pictures({2: few, 3: many[:1]})


def test_a_bank_grows_along_one_order():
    good = dict(a=1.0, b=0.5, c=0.0, d=0.0)
    found = kept.bank_of(good, (2, 4, 9))
    assert set(found) == {2, 4} and found[2][0] == 0.25 and found[4][0] == 0.625
    assert all(low < mean < high for mean, low, high in found.values())


def test_extensions_are_read_from_every_judged_record():
    rows = kept.extension_rows(kept.finished('extend'))
    assert rows
    for r in rows:
        difference, low, high, pairs = r['difference']
        assert low <= difference <= high and pairs > 0 and r['before'] > 0 < r['added']
        assert difference == pytest.approx(r['old_after'] - r['old_before'])
    unjudged = made_up(3, judged={}, effects={'old': ['a'], 'new': ['b'], 'rehearsed': []})
    assert kept.extension_rows({'x.json': unjudged}) == []


@pytest.fixture(scope='module')
def scene():
    return world.draw_scene(core.rng('test of scaling', 0), 'animal', 'heldout')


def test_chained_targets_are_drawn_by_seed_and_apply_both(scene):
    pair = ('candy_world', 'lava_creature')
    once, again = (scaling.chained_targets(scene, pair, 2) for _ in range(2))
    other = scaling.chained_targets(scene, pair, 2, seed=1)
    assert all(np.array_equal(x, y) for x, y in zip(once, again)) and not np.array_equal(once[0], other[0])
    assert not np.array_equal(once[0], once[1])
    (source,) = scaling.chained_targets(scene, (), 5)
    assert np.array_equal(source, world.render(scene))


def test_a_true_picture_is_explained_by_its_own_law(scene):
    pair = ('balloon_body', 'little_devil')
    sets = {'both': [pair, pair[::-1]], pair[0]: [pair[:1]], pair[1]: [pair[1:]], 'source': [()]}
    laws = {name: [scaling.chained_targets(scene, e, 8) for e in own] for name, own in sets.items()}
    for name, own in sets.items():
        (picture, *_) = scaling.chained_targets(scene, own[-1], 1, seed=1)
        assert scaling.explained(picture, laws) == name
    noise = core.rng('noise').integers(0, 256, world.render(scene).shape, dtype=np.uint8)
    assert scaling.explained(noise, laws) == 'none' and scaling.explained(noise, laws, np.inf) in laws
