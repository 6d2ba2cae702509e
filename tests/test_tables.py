"Tables of the paper: effect sets, pieces that are made once, findings, and the ledger that decides claims by records."

import json
from dataclasses import replace

import numpy as np
import pytest

from collectionlora import core, world
from collectionlora.core import UserError
from collectionlora.engine.pools import student_words
from collectionlora.engine.settings import Settings
from collectionlora.files.drawn import write_world_effect
from collectionlora.judge import effectbench, ledger
from collectionlora.judge.findings import contrast_table, diversity, findings, level_table
from collectionlora.judge.gate import made_up_rows
from collectionlora.judge.tables import seeds_of
from collectionlora.judge.statistics import crossed_interval, estimate, t_interval
from collectionlora.run import execute, tables, workshop
from collectionlora.run.sweep import from_file
from collectionlora.run.workshop import Bench, Materials, missing, soft_labels, Subjects
from collectionlora.world.pairs import apart, common_category, pairs_apart, slots_of


def test_sets_are_nested_and_ordered_by_tiers_then_by_families_in_turn():
    g = core.rng('shares')
    good = {id: float(g.integers(0, 11)) / 10 for id in world.EFFECTS}
    order = effectbench.table_order(good)
    tiers = [effectbench.tier_of(good[id]) for id in order]
    assert sorted(order) == sorted(world.EFFECTS) and tiers == sorted(tiers) and order == effectbench.table_order(good)
    first = [world.EFFECTS[id].family for id in order[: len({e.family for e in world.EFFECTS.values()})]]
    assert len(set(first)) == len(first)  # every family once before one comes twice
    assert effectbench.bench_effects(50)[:20] == effectbench.bench_effects(20)


def test_an_effect_without_a_measured_share_comes_last():
    order = effectbench.table_order({'oil_painting': 1.0})
    assert order[0] == 'oil_painting' and [effectbench.tier_of(s) for s in (0.7, 0.69, 0.5, 0.49)] == [1, 2, 2, 3]


def test_what_the_student_reads_can_be_taken_away_by_halves(tmp_path):
    e = replace(
        write_world_effect(tmp_path / 'fairy', 'fairy', 2, 0), trigger='zadobi', description='Add a flower crown.'
    )
    words = {w: student_words(e, w) for w in ('aop', 'trigger', 'description', 'teacher')}
    assert words['aop'] == f'zadobi, {words["description"]}' and words['description'].startswith('add a flower crown')
    assert words['trigger'] == f'zadobi, {e.prompt}' and words['teacher'] == e.prompt
    with pytest.raises(UserError, match='trigger is empty'):
        student_words(replace(e, trigger=''), 'trigger')


def test_pairs_that_are_apart_commute_and_crowds_touch_every_subject():
    assert apart('confetti_party', 'oil_painting') and not apart('confetti_party', 'fairy')
    assert 'subjects' in slots_of('twins') and not apart('twins', 'fairy') and not apart('fairy', 'fairy')
    assert all(common_category(*p.split('+')) for p in pairs_apart(['confetti_party', 'oil_painting', 'stone_statue']))


def test_the_oracle_judges_a_chain_and_its_kept_draws_change_nothing(tmp_path):
    ids, pair = ['stone_statue', 'fairy'], 'stone_statue+fairy'
    spec = world.draw_scene(core.rng('a chain'), 'animal', 'heldout')
    small = dict(draws=6, strangers=3)
    picture = world.apply_effect(spec, pair, core.rng('both'))
    plain, *kept = (world.Oracle(ids, **small, **more) for more in ({}, {'kept': tmp_path}, {'kept': tmp_path}))
    said = plain.score(picture, spec, pair)
    assert said['predicted'] == pair and all(o.score(picture, spec, pair) == said for o in kept)
    assert len(list(tmp_path.rglob('*.npz'))) >= 4
    with pytest.raises(UserError, match='unknown effect'):
        world.Oracle(['fairy+nothing'])


def test_levels_are_less_sure_where_subjects_differ():
    g = np.random.default_rng(0)
    values = g.normal(0, 0.2, (20, 1)) + g.normal(0, 1, (1, 8)) + g.normal(0, 0.5, (20, 8))
    half, freedom = crossed_interval({'one': (values, np.ones((20, 8)))})
    _, low, high = t_interval(values.mean(1))
    assert half > 2 * (high - low) / 2 and 6 < freedom < 9
    rows = made_up_rows('ours', 0.2, effects=12)
    assert estimate(rows, 'bcr').how.startswith('t over effects and subjects')


def test_an_effect_of_two_categories_is_one_effect():
    one = made_up_rows('ours', 0.3, effects=12, images=6, spread=2.0)
    both = [*one, *(replace(r, category='portrait', image=f'portrait {r.image}') for r in one)]
    width = lambda rows: estimate(rows, 'distance').high - estimate(rows, 'distance').low
    assert width(both) == pytest.approx(width(one), rel=0.25)  # twice the pictures of the same effects


def test_an_interval_of_one_image_counts_effects_alone():
    values = np.random.default_rng(1).normal(size=(15, 1))
    half, freedom = crossed_interval({'one': (values, np.ones((15, 1)))})
    _, low, high = t_interval(values[:, 0])
    assert half == pytest.approx((high - low) / 2) and freedom == pytest.approx(14)


def test_pieces_are_made_once_needs_first_and_the_clock_stops_between_two(tmp_path):
    done, shop = [], Bench(tmp_path)

    def make(piece):
        done.append(piece.name)
        piece.file.write_text('')

    one = shop.piece('teacher', 'one', [1], '.txt', 1, make)
    two = shop.piece('student', 'two', [2], '.txt', 1, make, [one])
    assert [p.name for p in missing([two, one])] == ['one', 'two']
    shop.until = 0
    with pytest.raises(SystemExit, match='start it again'):
        shop.make([two])
    assert not done
    shop.until = float('inf')
    shop.make([two])
    shop.make([two])
    assert done == ['one', 'two'] and shop.rates.per_unit('student') is not None
    other = shop.piece('teacher', 'one', [9], '.txt', 1, make)
    assert other.key != one.key and shop.piece('student', 'two', [2], '.txt', 1, make, [other]).key != two.key


def run_values(table):
    "The parameters of a table's full run."
    return from_file(core.notebooks_dir() / table / 'full.yaml')[2]


def test_all_tables_ask_for_one_recipe_and_the_same_amount_for_each_effect():
    found = {t: run_values(t) for t in tables.TABLES}
    effects = {t: v['sizes'][0]['effects'] if 'sizes' in v else v['effects'] for t, v in found.items()}
    recipe = lambda t: {k: v for k, v in found[t]['student'].items() if k != 'steps'}
    for t, values in found.items():
        assert values['materials'] == found['table_1']['materials'] and values['hours'] <= 3
        assert {**recipe('table_1'), **recipe(t)} == recipe('table_1')
        assert values['student']['steps'] == 20 * effects[t] and values['fm']['steps'] == 300 * effects[t]
    whole = Settings.from_dict(found['table_3']['student'])
    assert whole.weight_ts > 0 and whole.weight_fm > 0  # Table 3's full method has all parts


def test_tables_of_fifty_effects_share_the_collections(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = [tables.wanted(t) for t in ('table_1', 'bleeding', 'strengths', 'sizes', 'table_5')]
    students = [{p.file.name for p in t.pieces if p.kind == 'student'} for t in asked]
    assert len(students[0]) == 3 and all(s <= students[0] for s in students)
    assert students[1] == students[0] and students[2] == students[3] == students[4]
    twenty = {p.file.name for p in tables.wanted('composition').pieces if p.kind == 'student'}
    growing = tables.wanted('table_4', given={'sizes': [{'effects': n} for n in (10, 20, 50)]})
    made = {p.file.name for p in growing.pieces if p.kind == 'student'}
    assert twenty <= made and len(made & students[0]) == 1 and len(growing.left) == len(growing.pieces)
    assert not [p for p in tmp_path.rglob('*.safetensors')]


def test_diversity_is_a_ratio_of_means_over_seeds_and_effects():
    truth = {'a': 10.0, 'b': 30.0}
    said = diversity([{'a': 4.0, 'b': 30.0}, {'a': 6.0, 'b': 10.0}], truth)
    assert said['value'] == pytest.approx((5 + 20) / 40) and said['low'] < said['value'] < said['high'] and said['n'] == 2
    assert diversity([{'a': 1.0}], {'a': 0.0})['n'] == 0 and diversity([{}], truth)['n'] == 0


def test_a_spread_needs_two_noises_and_finite_pictures():
    one = Subjects((('fairy', 'animal'),), 1)
    with pytest.raises(UserError, match='at least 2'):
        workshop.spread(None, workshop.Asked('ours'), one)
    with pytest.raises(UserError, match='not finite'):
        workshop.apart([None, None], replace(one, noises=2).items())


def test_a_listing_makes_nothing_and_ends_with_its_context(tmp_path):
    bench = Bench(tmp_path)
    piece = bench.piece('teacher', 'one', [1], '.txt', 1, lambda p: p.file.write_text(''))
    with workshop.listing() as found, pytest.raises(SystemExit, match='only listed'):
        bench.make([piece])
    assert found == [(bench, [piece])] and not piece.there
    bench.make([piece])
    assert piece.there and workshop.whole([piece, piece]) == [piece]
    with pytest.raises(UserError, match='no such run file'):
        tables.wanted('bleeding', 'more')


def test_materials_and_subjects_know_their_sizes():
    with pytest.raises(UserError, match="did you mean 'pairs'"):
        Materials.of({'pair': 3})
    assert len(Subjects((('fairy', 'animal or portrait'), ('tiny', 'animal')), 2, noises=3)) == 18
    q = soft_labels(np.array([[0.0, 0.5, 2.0]]))
    assert q.sum() == pytest.approx(1) and q[0].argmax() == 0


def test_findings_average_over_seeds_and_pair_within_them():
    ours = [replace(r, run=f'seed {k}') for k in range(2) for r in made_up_rows('ours', 0.1, seed=k)]
    other = [replace(r, run=f'seed {k}') for k in range(2) for r in made_up_rows('other', 0.4, seed=9)]
    found = findings([*ours, *other], [('ours', 'other')])
    level = found['methods']['ours']['bad']
    assert np.mean(list(level['runs'].values())) == pytest.approx(level['value'])
    assert found['contrasts']['bad'][0]['holm'] < 0.05 and json.dumps(core.plain(found))
    assert len({line.count('|') for line in level_table(found['methods']).splitlines()}) == 1
    assert 'better by' in contrast_table(found['contrasts'])
    with pytest.raises(UserError, match="no rows of 'hours'"):
        findings(ours, [('hours', 'ours')])


def record(path, status='finished', **metrics):
    core.write_json(path, dict(status=status, metrics=metrics, run={'inputs': {'base': 'invented'}}))


def test_the_ledger_counts_neither_smoke_runs_nor_unfinished_ones(tmp_path):
    c = dict(value='bad', a='ours', b='teacher', difference=-0.1, low=-0.2, high=-0.05, pairs=0, effects=0)
    verdict = lambda: {e.claim.id: e.verdict for e in ledger.entries(tmp_path)}['C3']
    record(tmp_path / 'table_1' / 'smoke.json', contrasts={'bad': [c]})
    assert verdict() == ledger.ABSENT
    record(tmp_path / 'table_1' / 'full.json', 'failed', contrasts={'bad': [c]})
    assert verdict() == ledger.ABSENT
    record(tmp_path / 'table_1' / 'full.json', contrasts={'bad': [c]})
    assert verdict() == ledger.SUPPORTED
    record(tmp_path / 'table_1' / 'full.json', contrasts={'bad': [{**c, 'low': None, 'high': None}]})
    assert verdict() == ledger.OPEN


def test_seeds_of_a_study_give_its_claim_an_interval(tmp_path):
    means = lambda v: (
        {k: {'signal': {'1': v, '2': v}} for k in ('target simulation',)}
        | {'backward simulation': {'signal': {'1': 1.0, '2': 1.0}}}
    )
    of = lambda: {e.claim.id: e for e in ledger.entries(tmp_path)}['C2.12']
    record(tmp_path / 'vanishing' / 'full.json', means=means(4.0))
    assert of().verdict == ledger.OPEN
    for k, v in enumerate((4.4, 3.8), 1):
        record(tmp_path / 'vanishing' / f'full_seed{k}.json', means=means(v))
    assert of().verdict == ledger.SUPPORTED and of().reading.counted == '3 training seeds'


def test_no_seeds_is_a_sentence(tmp_path, monkeypatch):
    with pytest.raises(UserError, match='no folder in it has the record of an evaluation$'):
        seeds_of(tmp_path)
    monkeypatch.setattr(core, 'in_checkout', lambda: False)  # as installed from a wheel
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match='work in a checkout of it$'):
        seeds_of(core.results_dir() / 'main_job')


def test_a_claim_that_nothing_can_read_is_refused(tmp_path):
    entry = dict(id='X', claim='it works', where='Tab. 1', experiment='table_1', read={'contrast': ['a', 'b', 'bad']})
    file = tmp_path / 'claims.yaml'
    core.write_yaml(file, {'claims': [{**entry, 'expect': 'lower'}]})
    assert ledger.read_claims(file)[0].find({}) is None
    for wrong, said in (({'expect': 'lowr'}, 'lower'), ({'expect': 'lower', 'read': {'contrst': []}}, 'contrast')):
        core.write_yaml(file, {'claims': [{**entry, **wrong}]})
        with pytest.raises(UserError, match=said):
            ledger.read_claims(file)
    core.write_yaml(file, {'claims': [{**entry, 'expect': 'lower'}] * 2})
    with pytest.raises(UserError, match='given twice'):
        ledger.read_claims(file)


def test_the_ledger_never_shows_a_number_without_the_word_nano():
    text = ledger.ledger_table(ledger.entries())
    assert text.splitlines()[0].count('nano') == 2 and len(text.splitlines()) == len(ledger.read_claims()) + 2
    assert set(ledger.counts(ledger.entries())) == {ledger.SUPPORTED, ledger.REFUTED, ledger.OPEN, ledger.ABSENT}


@pytest.mark.slow
def test_a_table_that_is_stopped_goes_on_and_ends_in_the_same_rows(tmp_path, monkeypatch):
    cache = {'cache': str(tmp_path / 'cache')}
    with pytest.raises(KeyboardInterrupt):
        execute.execute('table_1', tmp_path / 'a', 'smoke', {**cache, 'hours': 1e-6})
    first = execute.execute('table_1', tmp_path / 'a', 'smoke', {**cache, 'hours': 0.0})
    again = execute.execute('table_1', tmp_path / 'b', 'smoke', {'cache': str(tmp_path / 'other')})
    assert first['metrics']['methods']['ours']['distance'] == again['metrics']['methods']['ours']['distance']
    assert {c['b'] for c in first['metrics']['contrasts']['bad']} == {
        'teacher',
        'teacher + acceleration',
        'all-in-one FM',
        'all-in-one FM + acceleration',
    }


@pytest.mark.slow
@pytest.mark.parametrize('name', ['table_3', 'table_4', 'table_5', 'composition', 'bleeding', 'strengths', 'sizes'])
def test_every_table_runs_in_small(name, tmp_path_factory):
    shared = tmp_path_factory.getbasetemp() / 'workshop'
    done = execute.execute(name, tmp_path_factory.mktemp(name), 'smoke', {'cache': str(shared)})
    assert done['status'] == 'finished' and workshop.code_of('rows') and done['metrics']['effects']
