"Serving: the line, the folder that survives a crash, the web server, and what it refuses."

import asyncio
import base64
import importlib
import io
import pickle
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import pytest
from PIL import Image

from collectionlora import core
from collectionlora.use import serve
from collectionlora.use.serve import Batcher, Closed, Full, Kept, Limits, Order, Shelf

COLLECTION = core.collection_dir() / 'collection.safetensors'
RED = Image.new('RGB', (8, 8), 'red')


@pytest.fixture(scope='module')
def collection():
    from collectionlora.use.edit import Collection

    with Collection.load('nano', COLLECTION) as opened:
        yield opened


def animal(seed=1):
    from collectionlora import world

    return Image.fromarray(world.render(world.draw_scene(core.rng('lesson', seed), 'animal', 'heldout')))


def file_of(picture, kind='PNG', **kw):
    buffer = io.BytesIO()
    picture.save(buffer, kind, **kw)
    return buffer.getvalue()


def line(edit, **limits):
    return Batcher(edit, lambda o: o.steps, replace(Limits(gather=0.05), **limits))


# ---------------------------------------------------------------- the line


def test_orders_of_one_key_share_a_batch_and_every_order_gets_its_own_answer():
    batches = []
    gate = threading.Event()

    def edit(orders):
        gate.wait()
        batches.append([o.seed for o in orders])
        return [o.seed * 10 for o in orders]

    b = line(edit, batch=3)
    first = b.submit([Order(RED, 'a', 0)])
    time.sleep(0.2)  # the thread has taken it and waits
    rest = b.submit([Order(RED, 'a', k, steps=k % 2) for k in range(1, 8)])
    gate.set()
    b.close()
    assert [f.result() for f in first + rest] == [10 * k for k in range(8)]
    assert batches == [[0], [1, 3, 5], [2, 4, 6], [7]]  # the oldest leads, and nobody starves


def test_a_full_line_refuses_all_or_nothing_and_says_when_to_come_again():
    gate = threading.Event()
    b = line(lambda orders: gate.wait() and [0] * len(orders), batch=1, waiting=3)
    b.submit([Order(RED, 'a')])
    time.sleep(0.2)
    kept = b.submit([Order(RED, 'a')] * 2)
    with pytest.raises(Full) as full:
        b.submit([Order(RED, 'a')] * 2)
    assert len(b) == 2 and full.value.after >= 1
    assert '4 pictures at once are over the limit of 3' in core.refusal(b.submit, [Order(RED, 'a')] * 4)
    gate.set()
    b.close()
    assert [f.result() for f in kept] == [0, 0]
    with pytest.raises(Closed):
        b.submit([Order(RED, 'a')])


def test_the_pixels_in_line_are_limited_but_one_picture_always_fits():
    gate = threading.Event()
    b = line(lambda orders: gate.wait() and [0] * len(orders), batch=1, held=100)
    b.submit([Order(RED, 'a')])
    time.sleep(0.2)
    b.submit([Order(RED.resize((50, 50)), 'a')])
    with pytest.raises(Full):
        b.submit([Order(RED, 'a')])
    gate.set()
    b.close()


def test_an_order_that_fails_does_not_take_its_batch_along():
    def edit(orders):
        if any(o.seed == 5 for o in orders):
            raise MemoryError('no room')
        return [o.seed for o in orders]

    b = line(edit, batch=8)
    futures = b.submit([Order(RED, 'a', k) for k in range(8)])
    b.close()
    assert [f.result() for k, f in enumerate(futures) if k != 5] == [0, 1, 2, 3, 4, 6, 7]
    assert isinstance(futures[5].exception(), MemoryError)


def test_a_cancelled_order_is_not_made_and_closing_without_finishing_cancels():
    gate, made = threading.Event(), []

    def edit(orders):
        gate.wait()
        made.extend(o.seed for o in orders)
        return [0] * len(orders)

    b = line(edit, batch=1)
    b.submit([Order(RED, 'a', 0)])
    time.sleep(0.2)
    futures = b.submit([Order(RED, 'a', k) for k in (1, 2, 3)])
    assert futures[0].cancel()
    threading.Timer(0.2, gate.set).start()
    b.close(finish=False)
    assert made == [0] and all(f.cancelled() for f in futures)


def test_many_threads_at_once_lose_nothing():
    b = line(lambda orders: [o.seed for o in orders], batch=4, waiting=1000)
    with ThreadPoolExecutor(16) as pool:
        futures = list(pool.map(lambda k: b.submit([Order(RED, 'a', k)])[0], range(300)))
    b.close()
    assert [f.result() for f in futures] == list(range(300))


# ---------------------------------------------------------------- recipe and folder


def test_a_result_holds_its_recipe_and_other_files_hold_none(tmp_path, collection):
    recipe = serve.recipe_of(collection, Order(animal(), 'lava_creature', 3, 0.5))
    (tmp_path / 'a.png').write_bytes(serve.png_bytes(animal(), recipe))
    assert serve.read_recipe(tmp_path / 'a.png') == recipe and recipe['strength'] == 0.5
    assert 'nopesut' in Image.open(tmp_path / 'a.png').text['parameters']
    (tmp_path / 'b.png').write_bytes(file_of(RED))
    (tmp_path / 'c.png').write_bytes(pickle.dumps(recipe))
    for name, word in (('b.png', 'no recipe'), ('c.png', 'no recipe'), ('d.png', 'no such file')):
        assert word in core.refusal(serve.read_recipe, tmp_path / name)


def test_the_name_of_an_order_depends_on_everything_that_its_result_does(collection):
    order = Order(animal(), 'lava_creature', 3, 0.5)
    others = [
        replace(order, **kw)
        for kw in (
            dict(image=animal(2)),
            dict(effect='candy_world'),
            dict(effect='lava_creature+candy_world'),
            dict(seed=4),
            dict(strength=0.6),
            dict(steps=4),
            dict(size='original'),
        )
    ]
    assert len({serve.recipe_of(collection, o)['id'] for o in [order, *others]}) == 8


def test_the_folder_takes_no_path_for_an_id_and_no_second_writer(tmp_path):
    kept = Kept(tmp_path / 'k')
    for id in ('', '../x', 'a' * 63, 'A' * 64, 'a' * 64 + '/..', 'a' * 64 + '\n'):
        assert 'no id' in core.refusal(kept.png, id), id
    assert 'another run is writing here' in core.refusal(Kept, tmp_path / 'k')
    kept.close()


def test_old_results_go_and_damaged_orders_are_left(tmp_path):
    kept = Kept(tmp_path, most=2)
    ids = [f'{k}' * 64 for k in range(4)]
    for id in ids:
        kept.order(id, Order(RED, 'a'))
        kept.result(id, b'png')
        time.sleep(0.02)
    assert [kept.png(i) is not None for i in ids] == [False, False, True, True]
    kept.order(ids[0], Order(RED, 'a', 7))
    (tmp_path / f'{ids[1]}.json').write_text('{"effect": ')
    (tmp_path / 'x.json').write_text('{}')
    assert [(i, o.seed) for i, o in Shelf(tmp_path).unfinished()] == [(ids[0], 7)]
    kept.close()


# ---------------------------------------------------------------- uploads and addresses


def png_that_says(side, data, *parts):
    "A PNG file whose head says that it has side × side pixels; data and parts may say otherwise."
    head = struct.pack('>IIBBBBB', side, side, 8, 2, 0, 0, 0)
    every = ((b'IHDR', head), *parts, (b'IDAT', zlib.compress(data, 9)), (b'IEND', b''))
    chunks = [struct.pack('>I', len(d)) + k + d + struct.pack('>I', zlib.crc32(k + d)) for k, d in every]
    return b'\x89PNG\r\n\x1a\n' + b''.join(chunks)


@pytest.mark.parametrize(
    'data, word',
    [
        (b'', 'cannot be read'),
        (b'/etc/passwd', 'cannot be read'),
        (pickle.dumps({}), 'cannot be read'),
        (file_of(Image.effect_noise((64, 64), 90))[:2000], 'cannot be read'),
        (file_of(RED, 'GIF'), 'cannot be read'),
        (file_of(RED, 'TIFF'), 'cannot be read'),
        (file_of(Image.new('RGBA', (4, 4), (1, 2, 3, 4))), 'transparent'),
        (file_of(Image.new('CMYK', (4, 4)), 'JPEG'), 'CMYK'),
        (file_of(Image.new('L', (300, 300))), 'limit of 40,000'),
        (bytes(60_000), 'limit of 50,000'),
        (b'\0\0\0\x18ftypheic\0\0\0\0mif1heic' + bytes(99), 'cannot be read'),
        (b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>', 'cannot be read'),
        (png_that_says(60_000, bytes(100)), 'over the limit'),
        (png_that_says(20_000, bytes(20_000_000)), 'over the limit'),
        (png_that_says(4, bytes(52), (b'zTXt', b'a\0\0' + zlib.compress(bytes(20_000_000)))), 'cannot be read'),
        (png_that_says(4, bytes(52), (b'iCCP', b'a\0\0' + zlib.compress(bytes(20_000_000)))), 'cannot be read'),
    ],
)
def test_bad_uploads_are_refused(data, word):
    assert word in core.refusal(serve.read_upload, data, Limits(pixels=40_000, bytes=50_000))


def test_good_uploads_are_upright():
    tall = Image.new('RGB', (8, 4), 'blue')
    exif = Image.Exif()
    exif[0x0112] = 6
    assert serve.read_upload(file_of(tall, 'JPEG', exif=exif)).size == (4, 8)
    assert serve.read_upload(file_of(RED, 'WEBP', lossless=True)).tobytes() == RED.tobytes()


def test_addresses_and_tokens():
    with serve.listening('127.0.0.1', 0) as sock:
        sock.listen()
        port = sock.getsockname()[1]
        assert str(port) in core.refusal(serve.listening, '127.0.0.1', port)
    assert core.refusal(serve.listening, '203.0.113.7', 80) and core.refusal(serve.listening, 'no such host', 80)
    for host in ('0.0.0.0', '::', '192.168.0.7', 'example.org'):
        assert '--token' in core.refusal(serve.check_token, host, None)
    assert serve.check_token('127.0.0.1', None) is None and serve.check_token('::1', '') is None
    assert serve.check_token('0.0.0.0', 'x' * 16) and 'at least 16' in core.refusal(serve.check_token, '::1', 'x')


# ---------------------------------------------------------------- the web server


@pytest.fixture(scope='module')
def web():
    pytest.importorskip('fastapi')
    pytest.importorskip('prometheus_client')
    return importlib.import_module('collectionlora.use.web')


def client_of(app, **kw):
    from fastapi.testclient import TestClient

    return TestClient(app, base_url='http://127.0.0.1', **kw)


def post(client, data=None, name='cat.png', headers=None, **fields):
    files = {'image': (name, file_of(animal()) if data is None else data)}
    return client.post('/v1/images/edits', files=files, data=fields, headers=headers)


def picture_of(answer, k=0):
    return Image.open(io.BytesIO(base64.b64decode(answer.json()['data'][k]['b64_json'])))


def test_an_edit_is_that_of_the_library_in_every_form(web, collection):
    direct = collection.edit(animal(), 'lava_creature', seed=5)
    with client_of(web.make_app(collection)) as client:
        by_id = post(client, prompt='lava_creature', seed=5, n=2, model='any', user='me')
        by_words = post(client, prompt=collection.prompt('lava_creature'), seed=5, output_format='webp')
        other = post(client, effect='lava_creature', seed=5, strength=0.5, steps=2, size='original')
        told = client.get('/v1/effects').json()['data']
    assert [d['seed'] for d in by_id.json()['data']] == [5, 6] and len(by_words.json()['data']) == 1
    assert max(abs(a - b) for a, b in zip(direct.tobytes(), picture_of(by_id).convert('RGB').tobytes())) <= 1
    assert picture_of(by_words).format == 'WEBP' and other.json()['data'][0]['strength'] == 0.5
    assert other.json()['data'][0]['steps'] == 2 and picture_of(other).size == (64, 64)
    assert [e['id'] for e in told] == list(collection.catalogue) and told[0]['prompt'] == collection.prompt(told[0]['id'])


def test_what_is_refused_says_why_and_shows_no_path(web, collection):
    wrong = [
        (dict(), 400, 'effect: is missing'),
        (dict(effect='lava_creatur'), 400, "did you mean 'lava_creature'"),
        (dict(effect='../../etc/passwd'), 400, 'no effect'),
        (dict(effect='lava_creature+' * 5 + 'candy_world'), 400, 'more than four'),
        (dict(effect='candy_world', seed=-1), 400, 'seed'),
        (dict(effect='candy_world', seed='one'), 400, 'seed'),
        (dict(effect='candy_world', n=99), 400, 'limit of 4'),
        (dict(effect='candy_world', n=0), 400, 'n:'),
        (dict(effect='candy_world', steps=51), 400, 'limit of 50'),
        (dict(effect='candy_world', strength='nan'), 400, 'strength'),
        (dict(effect='candy_world', size='1024x1024'), 400, 'size'),
        (dict(effect='candy_world', output_format='gif'), 400, 'output_format'),
        (dict(effect='candy_world', response_format='url'), 400, 'response_format'),
        (dict(effect='candy_world', colour='red'), 400, 'colour'),
        (dict(effect='candy_world', wait='false'), 400, '--keep'),
        (dict(effect='candy_world', data=pickle.dumps(1)), 400, 'cannot be read'),
        (dict(effect='candy_world', data=file_of(RED.resize((400, 2)))), 400, 'too long and narrow'),
        (dict(effect='candy_world', data=bytes(300_000)), 413, 'limit of'),
    ]
    with client_of(web.make_app(collection, Limits(bytes=200_000))) as client:
        for fields, status, word in wrong:
            answer = post(client, **fields)
            said = answer.json()['error']['message']
            assert (answer.status_code, word in said) == (status, True), (fields, said)
            assert str(core.repo_root()) not in said
        assert client.post('/v1/images/edits', json={'image': '/etc/passwd'}).status_code == 400
        assert client.post('/v1/images/edits', data={'image': '/etc/passwd', 'effect': 'x'}).status_code == 400
        assert client.get('/v1/images/edits/' + 'a' * 64).status_code == 404
        assert client.get('/nothing').status_code == 404 and client.put('/v1/images/edits').status_code == 405
        assert post(client, effect='candy_world').status_code == 200  # and it still works
        numbers = client.get('/metrics').text
    assert 'collectionlora_answers_total{status="400"}' in numbers and 'status="200"} 1.0' in numbers


def test_a_body_without_a_length_is_cut_off(web, collection):
    def endless():
        yield b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
        for _ in range(100):
            yield bytes(100_000)

    with client_of(web.make_app(collection, Limits(bytes=200_000))) as client:
        headers = {'content-type': 'multipart/form-data; boundary=x'}
        answer = client.post('/v1/images/edits', content=endless(), headers=headers)
    assert answer.status_code == 413


def test_a_body_that_comes_byte_by_byte_is_cut_off(web):
    async def one_byte():
        await asyncio.sleep(0.03)
        return dict(type='http.request', body=b'x', more_body=True)

    async def all_of_it(guard):
        receive = guard.counted(one_byte)
        while True:
            await receive()

    quick = SimpleNamespace(limits=Limits(upload=0.05), line=[])
    with pytest.raises(web.HTTPException) as error:
        asyncio.run(asyncio.wait_for(all_of_it(web.Guard(None, quick, None, None)), 60))
    assert error.value.status_code == 408


def test_parameters_behind_a_question_mark_are_refused(web, collection):
    with client_of(web.make_app(collection)) as client:
        for path in ('/v1/images/edits?seed=3', '/v1/effects?x=../../etc', '/v1/models?' + 'a' * 5000):
            answer = client.post(path) if 'edits' in path else client.get(path)
            assert answer.status_code == 400 and 'question mark' in answer.json()['error']['message']
        assert client.get('/health?fresh=1').status_code == 200


def test_tokens_hosts_and_pages_of_others(web, collection):
    good = {'Authorization': 'Bearer ' + 'x' * 16}
    with client_of(web.make_app(collection, token='x' * 16)) as client:
        assert client.get('/health').status_code == 200
        for headers in ({}, {'Authorization': 'Bearer y'}, {'Authorization': 'x' * 15}):
            answers = [client.get(p, headers=headers) for p in ('/metrics', '/v1/effects', '/openapi.json')]
            assert {a.status_code for a in [*answers, post(client, headers=headers)]} == {401}
        assert client.get('/v1/effects', headers=good).status_code == 200
    with client_of(web.make_app(collection)) as client:
        assert client.get('/health', headers={'Host': 'evil.example'}).status_code == 400
        assert post(client, headers={'Origin': 'http://evil.example'}, effect='candy_world').status_code == 403
        assert client.get('/health', headers={'Origin': 'http://127.0.0.1'}).status_code == 200


def test_a_flood_is_turned_away_and_what_was_accepted_is_made(web, collection, monkeypatch):
    gate, real = threading.Event(), collection.edit
    monkeypatch.setattr(collection, 'edit', lambda *a, **kw: gate.wait() and real(*a, **kw))
    with client_of(web.make_app(collection, Limits(waiting=4, batch=4))) as client:
        with ThreadPoolExecutor(24) as pool:
            answers = [pool.submit(post, client, effect='candy_world', seed=k, steps=1) for k in range(24)]
            end = time.time() + 60
            while time.time() < end and sum(a.done() for a in answers) < 12:
                time.sleep(0.05)
            gate.set()
        found = [a.result() for a in answers]
    codes = [a.status_code for a in found]
    assert set(codes) == {200, 429} and codes.count(200) >= 4
    assert all(int(a.headers['retry-after']) >= 1 for a in found if a.status_code == 429)
    assert all(picture_of(a).size == (64, 64) for a in found if a.status_code == 200)


def test_results_are_kept_found_again_and_made_once(web, collection, tmp_path):
    with client_of(web.make_app(collection, kept=Kept(tmp_path))) as client:
        asked = post(client, effect='candy_world', steps=1, wait='false')
        url = f'/v1/images/edits/{asked.json()["data"][0]["id"]}'
        first = post(client, effect='candy_world', steps=1)
        again = post(client, effect='candy_world', steps=1)
        found = client.get(url)
        numbers = client.get('/metrics').text
        assert client.get('/v1/images/edits/nothing').status_code == 400
    assert asked.status_code == 202 and found.status_code == 200
    assert first.json()['data'] == again.json()['data'] and picture_of(found).text['collectionlora']
    assert 'collectionlora_batch_orders_count 1.0' in numbers


def test_an_extra_that_is_absent_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, 'prometheus_client', None)
    monkeypatch.delitem(sys.modules, 'collectionlora.use.web', raising=False)
    said = core.refusal(importlib.import_module, 'collectionlora.use.web')
    assert said == 'serve: prometheus_client is not installed; run `pip install "collectionlora[serve]"`'


@pytest.mark.parametrize(
    'words, said',
    [
        (['--host', '0.0.0.0'], 'others can reach it; give --token'),
        (['--host', '0.0.0.0', '--token', 'short'], 'at least 16'),
        (['--host', '203.0.113.7', '--token', 'x' * 16], 'cannot listen there'),
        ([__file__], 'test_serve.py'),
        (['absent.safetensors'], 'absent.safetensors'),
        (['--base', 'absent-base'], '--collection'),
        ([str(COLLECTION), '--base', 'absent-base'], 'absent-base'),
        (['--device', 'gpu'], 'gpu'),
        (['--port', '99999'], '65535'),
    ],
)
def test_the_command_refuses_before_anything_is_loaded(web, words, said, monkeypatch):
    from typer.testing import CliRunner

    from collectionlora.run.cli import app
    from collectionlora.use import edit

    monkeypatch.setattr(edit, 'load_base', None)
    done = CliRunner().invoke(app, ['serve', *words])
    assert done.exit_code == 2 and said in done.output, done.output


# ---------------------------------------------------------------- asked by the command


ASKS = """import sys
from collectionlora.run.cli import main
sys.argv[0] = 'collectionlora'
try:
    main()
finally:
    assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules)
"""


def asked(*words):
    "What `collectionlora edit` does and says in a process of its own that may not load the network."
    return subprocess.run([sys.executable, '-c', ASKS, 'edit', *map(str, words)], capture_output=True, text=True)


def test_the_command_asks_a_server_and_writes_what_it_writes_here(web, collection, tmp_path):
    from collectionlora.use.edit import edit_all, working_words

    animal().resize((128, 64)).save(tmp_path / 'cat.png')
    words = [tmp_path / 'cat.png', 'lava_creature', 'candy_world+lava_creature', '--seeds', '2', '--strength', '0.5']
    with web.serving(collection, token='a-token-of-16-letters') as url:
        server = ['--server', url, '--token', 'a-token-of-16-letters']
        done = asked(*words, *server, '--size', 'original', '--out', tmp_path / 'out', '--sheet', tmp_path / 'sheet.png')
        told = asked('--list', *server)
        wrong = asked(*words[:2], '--server', url)
        unknown = asked(words[0], 'lava_creatur', *server)
    here = edit_all(collection, [tmp_path / 'cat.png'], words[1:3], range(2), 0.5, 'original')
    assert done.returncode == 0 and done.stdout.split() == [
        *(str(tmp_path / 'out' / e.name) for e in here), str(tmp_path / 'sheet.png')
    ]
    assert working_words(collection, [animal().resize((128, 64))], 'original') in done.stderr.replace('\n', ' ')
    for e in here:
        with Image.open(tmp_path / 'out' / e.name) as made:
            assert made.size == (128, 64)
            assert max(abs(a - b) for a, b in zip(made.tobytes(), e.image.tobytes())) <= 1
    assert told.returncode == 0 and 'lava_creature' in told.stdout
    assert wrong.returncode == 2 and 'no or wrong token' in wrong.stderr and 'Traceback' not in wrong.stderr
    assert unknown.returncode == 2 and "did you mean 'lava_creature'" in unknown.stderr


def test_the_command_waits_for_a_full_line(web, collection, tmp_path):
    from collectionlora.use.client import Server

    with web.serving(collection, limits=Limits(waiting=2, batch=1)) as url:
        made = Server(url).edit([animal()] * 6, 'lava_creature', list(range(6)))
    assert len({m.tobytes() for m in made}) == 6


@pytest.mark.parametrize(
    'words, said',
    [
        (['--server', 'http://127.0.0.1:1'], 'no server answers there'),
        (['--server', 'no such address'], 'no server answers there'),
        (['--server', 'ftp://127.0.0.1'], 'no server answers there'),
        (['--server', '127.0.0.1:1', '--base', 'nano2'], 'leave --base out'),
        (['--server', '127.0.0.1:1', '--collection', 'c.safetensors'], 'leave --collection out'),
        (['--server', '127.0.0.1:1', '--device', 'cpu'], 'leave --device out'),
    ],
)
def test_the_command_says_why_it_cannot_ask(words, said, tmp_path):
    animal().save(tmp_path / 'cat.png')
    done = asked(tmp_path / 'cat.png', 'lava_creature', *words)
    assert done.returncode == 2 and said in done.stderr and 'Traceback' not in done.stderr, done.stderr


def test_another_program_behind_the_address_is_said(tmp_path):
    from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

    from collectionlora.use.client import Server

    with ThreadingHTTPServer(('127.0.0.1', 0), SimpleHTTPRequestHandler) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        said = core.refusal(Server, f'127.0.0.1:{other.server_port}')
        other.shutdown()
    assert 'not as `collectionlora serve` does' in said


# ---------------------------------------------------------------- killed


def started(folder, *more):
    "A server in a process of its own, and its address."
    code = 'from collectionlora.run.cli import main; main()'
    words = [sys.executable, '-c', code, 'serve', '--port', '0', '--keep', str(folder), '--batch', '1', *more]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    for said in process.stderr:
        if 'serving on' in said:
            return process, said.split()[2]
    raise AssertionError('the server did not start')


@pytest.mark.slow
def test_a_server_that_is_killed_has_lost_nothing(web, tmp_path):
    import requests

    process, url = started(tmp_path)
    send = lambda k: requests.post(
        f'{url}/v1/images/edits',
        files={'image': file_of(animal())},
        data={'effect': 'lava_creature', 'seed': k, 'wait': 'false'},
        timeout=60,
    )
    ids = [send(k).json()['data'][0]['id'] for k in range(6)]
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert Shelf(tmp_path).unfinished()
    process, url = started(tmp_path)
    end = time.time() + 300
    while time.time() < end and Shelf(tmp_path).unfinished():
        time.sleep(0.5)
    answers = [requests.get(f'{url}/v1/images/edits/{id}', timeout=60) for id in ids]
    process.send_signal(signal.SIGTERM)
    process.wait(60)
    assert [a.status_code for a in answers] == [200] * 6


@pytest.mark.slow
def test_a_port_in_use_is_said_before_anything_is_loaded(web, tmp_path):
    with socket.create_server(('127.0.0.1', 0)) as taken:
        port = taken.getsockname()[1]
        code = 'from collectionlora.run.cli import main; main()'
        words = [sys.executable, '-c', code, 'serve', '--port', str(port)]
        done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 2 and f'127.0.0.1:{port}: cannot listen there' in done.stderr
