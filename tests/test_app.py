"The app: what it does without a page, its programming interface, and the whole way of a user in a real browser."

import threading
import time
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import requests
from PIL import Image

from collectionlora import core
from collectionlora.core import UserError
from collectionlora.use import app
from collectionlora.use.serve import Limits, read_recipe

COLLECTION = core.collection_dir() / 'collection.safetensors'


@pytest.fixture(scope='module')
def collection():
    from collectionlora.use.edit import Collection

    with Collection.load('nano', COLLECTION) as opened:
        yield opened


@pytest.fixture(scope='module')
def picture(tmp_path_factory):
    return app.drawn_subjects(tmp_path_factory.mktemp('drawn'), 1, seed=3)[0]


# ---------------------------------------------------------------- without a page


def test_a_visitor_is_no_path(tmp_path):
    album = app.Album(tmp_path)
    assert album.of(app.new_visitor()).parent == tmp_path
    for name in ('', '..', '../x', 'a' * 31, 'A' * 32, 'a' * 32 + '\n', None, 7):
        assert 'Load it again' in core.refusal(album.of, name), name


def test_a_source_is_found_by_its_hash_alone(tmp_path):
    album, visitor = app.Album(tmp_path), app.new_visitor()
    album.keep_source(visitor, Image.new('RGB', (4, 4), 'red'), 'a' * 64)
    assert album.source(visitor, {'source': 'a' * 64}).size == (4, 4)
    for digest in ('b' * 64, '../' * 20, None, 3):
        assert album.source(visitor, {'source': digest}) is None


def test_two_windows_bring_one_picture_at_the_same_moment(tmp_path):
    album, visitor, noise = app.Album(tmp_path), app.new_visitor(), Image.effect_noise((600, 600), 60)
    with ThreadPoolExecutor(8) as pool:
        done = [pool.submit(album.keep_source, visitor, noise, 'c' * 64) for _ in range(8)]
    assert not [d.exception() for d in done if d.exception()]
    assert [p.name for p in (tmp_path / visitor / 'sources').iterdir()] == ['c' * 64 + '.png']


def test_an_effect_with_any_name_makes_a_file_and_a_rule(tmp_path):
    album, visitor = app.Album(tmp_path), app.new_visitor()
    path = album.keep(visitor, {'effect': '../a b/"c"', 'seed': 5}, b'png')
    assert path.parent == tmp_path / visitor and app.caption_of(path).endswith(', 5')
    shot = 'data:image/png;base64,AAAA'
    entries = {'a"]{}b': {'thumbnail': shot}, 'x': {'thumbnail': shot + '");} body{'}, 'y': {}}
    hostile = SimpleNamespace(catalogue=entries, miniature=True)
    rules = app.style_of(hostile).replace(app.STYLE.replace('IMAGE', 'pixelated'), '')
    assert rules.count('background-image') == 1 and 'a\\22 \\5d \\7b \\7d b' in rules


def test_results_arrive_in_order_and_failures_last():
    futures = [Future() for _ in range(4)]
    futures[1].set_result('b')
    seen = app.arriving(futures, pause=0.01)
    assert next(seen) == (['b'], 3)
    futures[0].set_result('a')
    assert next(seen) == (['a', 'b'], 2)
    futures[2].set_exception(CancelledError())
    futures[3].set_exception(UserError('no'))
    assert next(seen) == (['a', 'b'], 0)
    with pytest.raises(UserError):
        next(seen)


def test_the_form_says_what_is_missing():
    page = app.Events.__new__(app.Events)
    page.limits = Limits()
    assert 'No picture' in core.refusal(page.asked, None, ['x'], app.EACH, 1, 8, 0, 1)
    for seed in (None, -1, 'x'):
        assert 'seed' in core.refusal(page.asked, 'p', ['x'], app.EACH, 1, 8, seed, 1)


def test_the_secret_is_the_owners(tmp_path):
    secret = app.secret_of(tmp_path / 'new')
    assert app.secret_of(tmp_path / 'new') == secret and (tmp_path / 'new' / '.secret').stat().st_mode & 0o77 == 0


def test_stop_is_for_the_window_that_asked(tmp_path):
    asked, futures = app.Asked(Image.new('RGB', (4, 4)), ('a',)), [Future(), Future()]
    left = list(futures)
    service = SimpleNamespace(collection=SimpleNamespace(strength=lambda e: 1.0))
    service.ask = lambda orders: [({'source': 'a' * 64, 'effect': 'a', 'seed': 0}, left.pop(0))]
    studio, visitor = app.Studio(service, tmp_path), app.new_visitor()
    studio.make(visitor, asked, 'first tab')
    studio.make(visitor, asked, 'second tab')
    assert studio.stop('first tab') == 1 and [f.cancelled() for f in futures] == [True, False]
    assert studio.stop('first tab') == 0 and studio.stop('another') == 0


def test_an_extra_that_is_absent_is_named(monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'gradio', None)
    assert 'pip install "collectionlora[app]"' in core.refusal(app.run_app, None, 'x')


def test_a_program_cannot_name_a_file_of_the_machine(tmp_path, picture):
    pytest.importorskip('gradio')
    from gradio.utils import get_upload_folder

    for path in (picture, tmp_path, '/etc/passwd', f'{get_upload_folder()}/../x.png', ''):
        assert 'not here any more' in core.refusal(app.sent_file, path), path


# ---------------------------------------------------------------- the page


@contextmanager
def running(collection, folder):
    "The app on a free port: its url, and the folder of its results."
    pytest.importorskip('gradio')
    ready, end = threading.Event(), threading.Event()
    told = SimpleNamespace(folder=folder, url='')

    def started(url):
        told.url = url
        ready.set()

    run = lambda: app.run_app(lambda: collection, folder, port=0, ready=started, until=end)
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert ready.wait(300)
    yield told
    end.set()
    thread.join(60)


def test_only_results_leave_the_folder_in_which_they_lie(collection, tmp_path):
    Image.new('RGB', (8, 8)).save(tmp_path / 'diary.png')
    visitor = app.new_visitor()
    (tmp_path / visitor).mkdir()
    assert app.not_ours(tmp_path) == [str(tmp_path / 'diary.png')]
    Image.new('RGB', (8, 8)).save(tmp_path / visitor / 'mine.png')
    with running(collection, tmp_path) as told:
        asked = lambda path: requests.get(f'{told.url.rstrip("/")}/gradio_api/file={path}').status_code
        assert asked(tmp_path / 'diary.png') == 403 and asked(tmp_path / visitor / 'mine.png') == 200


@pytest.fixture(scope='module')
def site(collection, tmp_path_factory):
    with running(collection, tmp_path_factory.mktemp('app')) as told:
        yield told


def test_the_interface_for_programs_makes_pictures_and_refuses(site, picture):
    from gradio_client import Client, handle_file

    client = Client(site.url, verbose=False)
    form = dict(api_name='/make')
    with pytest.raises(Exception, match='No picture is chosen|too old'):
        client.predict(*made_of(client, None, []), **form)
    (site.folder / 'text.png').write_text('no picture')
    with pytest.raises(Exception, match='cannot be read as PNG, JPEG or WebP'):
        client.predict(*made_of(client, handle_file(site.folder / 'text.png'), ['lava_creature']), **form)
    names = list(client.view_api(return_format='dict')['named_endpoints'])
    assert names == ['/make']
    for path in (site.folder / '.secret', site.folder, '/etc/passwd'):
        assert requests.get(f'{site.url}gradio_api/file={path}', timeout=60).status_code == 403, path


def made_of(client, image, effects):
    "The arguments of /make in their order, others at their defaults."
    parts = client.view_api(return_format='dict')['named_endpoints']['/make']['parameters']
    given = {'Picture': image, 'Effects': effects}
    return [given.get(p['label'], p.get('parameter_default')) for p in parts]


PATIENCE = 240_000  # milliseconds: the machine of a test may be busy


def opened_page(context, site):
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    page.goto(site.url)
    page.wait_for_selector('#effects input')
    return page


def said(page, text):
    "Waits for a message with a text, and closes it."
    page.locator('.toast-body', has_text=text).first.wait_for()
    page.locator('.toast-close').first.click()
    page.locator('.toast-body').first.wait_for(state='detached')


def made(page, n):
    "Presses Make, and waits for n more pictures in the history."
    before = page.locator('#history img').count()
    page.locator('#make').click()
    page.wait_for_function(f"document.querySelectorAll('#history img').length >= {before + n}")


@pytest.mark.slow
def test_the_whole_way_of_a_user(site, browser, tmp_path):
    outside, context = [], browser.new_context(viewport={'width': 1400, 'height': 1000})
    context.grant_permissions(['clipboard-read', 'clipboard-write'])
    context.on('request', lambda r: outside.append(r.url))
    page = opened_page(context, site)
    make, effect = page.locator('#make'), lambda name: page.get_by_role('checkbox', name=name)

    make.click()  # nothing is chosen
    said(page, 'No picture is chosen')
    assert not page.locator('#said .error').is_visible()  # the message stands alone, not also across the text
    (tmp_path / 'cat.png').write_bytes(b'no picture at all')
    page.locator('#picture input[type=file]').set_input_files(tmp_path / 'cat.png')
    said(page, 'cannot be read as PNG, JPEG or WebP')  # at once, and the field is empty again
    page.wait_for_selector('#picture input[type=file]', state='attached')
    assert not page.locator('#picture img').count() and not page.locator('#history img').count()

    page.locator('#subjects button').nth(2).click()
    page.wait_for_selector('#picture img')
    make.click()
    said(page, 'No effect is chosen')
    effect('lava creature').check()
    page.get_by_role('radio', name='all in one picture').check()
    make.click()
    said(page, 'Click a second one')
    page.get_by_role('radio', name='one picture for each').check()
    effect('candy world').check()
    made(page, 2)
    assert page.locator('#results img').count() == 2 and page.locator('#compare img').count() >= 2
    assert 'lava_creature, seed 0' in page.locator('#said').inner_text()

    page.get_by_role('radio', name='all in one picture').check()  # a chain, with other settings
    page.locator('#settings button').first.click()
    page.locator('#seed input').fill('7')
    page.locator('#steps input[type=number]').fill('4')
    made(page, 1)
    assert 'lava_creature+candy_world, seed 7, strength 1, 4 steps' in page.locator('#said').inner_text()

    page.locator('#results button').first.click()
    with page.expect_download() as coming:  # the download knows how it was made
        page.locator('#one').click()
    coming.value.save_as(tmp_path / 'got.png')
    recipe = read_recipe(tmp_path / 'got.png')
    assert (recipe['effect'], recipe['seed'], recipe['steps']) == ('lava_creature+candy_world', 7, 4)
    with page.expect_download() as coming:
        page.locator('#sheet').click()
    coming.value.save_as(tmp_path / 'sheet.png')
    assert Image.open(tmp_path / 'sheet.png').width > 500

    page.locator('#history button').last.click()  # the first picture again, and its settings
    page.wait_for_function("document.querySelector('#said').innerText.includes('lava_creature, seed 0')")
    page.locator('#recipe button').first.click()
    page.locator('#again').click()
    page.wait_for_function("document.querySelector('#seed input').value == '0'")
    assert effect('lava creature').is_checked() and not effect('candy world').is_checked()

    page.locator('#prompts button').first.click()
    page.wait_for_function("document.querySelector('#prompts textarea').value.startsWith('nopesut')")
    page.locator('#prompts button[aria-label*="opy"], #prompts button[title*="opy"]').first.click()
    assert 'nopesut' in page.evaluate('navigator.clipboard.readText()')
    strangers = [u for u in outside if not u.startswith((site.url, 'data:', 'blob:', site.url.replace('http', 'ws')))]
    assert not strangers, strangers
    context.close()


def photographs(folder, n=14):
    "A collection of n effects with random weights on a random base of the real classes that takes photographs."
    import torch

    from collectionlora.bases.pipeline import load_base
    from collectionlora.bases.tiny import tiny_base
    from collectionlora.files.dialects import Lora
    from collectionlora.files.lora import write_lora
    from collectionlora.use.edit import Collection

    base = load_base(tiny_base(folder / 'base', pixels=256))
    size = base.backbone.modules().items()
    lora = Lora({k: (torch.randn(2, i), 1e-3 * torch.randn(o, 2)) for k, (i, o) in size})
    effects = [
        dict(id=f'effect_{k}', category='portrait', trigger=f'zon{k}', description=f'look {k}') for k in range(n)
    ]
    head = {'collectionlora.base': {'hash': base.hash}, 'collectionlora.effects': effects}
    head['collectionlora.sampling'] = {'times': [1.0, 0.5, 0.0], 'stochastic': False}
    write_lora(folder / 'photographs.safetensors', lora, head)
    return Collection(base, folder / 'photographs.safetensors')


@pytest.mark.slow
def test_two_windows_of_a_base_for_photographs(browser, tmp_path):
    photo = tmp_path / 'photo.jpg'
    Image.effect_noise((900, 600), 60).convert('RGB').save(photo)
    with running(photographs(tmp_path), tmp_path / 'app') as site:
        context = browser.new_context(viewport={'width': 400, 'height': 850})
        first, second = opened_page(context, site), opened_page(context, site)
        assert not first.locator('#note').count() and not first.locator('#subjects').is_visible()
        assert first.evaluate('document.documentElement.scrollWidth') <= 400
        assert first.locator('#make').bounding_box()['y'] < 1400  # below the effects, however many there are
        first.locator('#search input, #search textarea').fill('look 13')
        first.wait_for_function("document.querySelectorAll('#effects input').length == 1")
        for page, name in ((first, 'effect 13'), (second, 'effect 0')):
            page.locator('#picture input[type=file]').set_input_files(photo)
            page.wait_for_selector('#picture img')
            page.get_by_role('checkbox', name=name, exact=True).check()
        first.locator('#make').click()
        second.locator('#make').click()
        for page, name in ((first, 'effect_13'), (second, 'effect_0')):
            page.wait_for_function(f"document.querySelector('#said').innerText.startsWith('{name}, seed 0')")
        first.reload()
        first.wait_for_function("document.querySelectorAll('#history img').length == 2")
        (folder,) = [f for f in site.folder.iterdir() if app.VISITOR.fullmatch(f.name)]
        made = [Image.open(f).size for f in folder.glob('*.png')]
        assert len(made) == 2 and all(abs(w / h - 1.5) < 0.02 for w, h in made)
        context.close()


@pytest.mark.slow
def test_a_browser_closed_in_the_middle_finds_its_pictures(site, browser, collection):
    context = browser.new_context(viewport={'width': 1400, 'height': 1000})
    page = opened_page(context, site)
    page.locator('#subjects button').first.click()
    page.wait_for_selector('#picture img')
    for box in page.locator('#effects input').all():
        box.check()
    folders = set(site.folder.iterdir())
    page.locator('#make').click()
    end = time.time() + PATIENCE / 1000
    while time.time() < end and set(site.folder.iterdir()) == folders:
        time.sleep(0.1)
    page.close()
    (folder,) = set(site.folder.iterdir()) - folders
    while time.time() < end and len(list(folder.glob('*.png'))) < 4:
        time.sleep(0.2)
    page = opened_page(context, site)
    page.wait_for_function("document.querySelectorAll('#history img').length == 4")
    context.close()


@pytest.mark.slow
@pytest.mark.parametrize('width', [400, 1400])
def test_nothing_sticks_out(site, browser, width):
    context = browser.new_context(viewport={'width': width, 'height': 900})
    page = opened_page(context, site)
    page.wait_for_timeout(1000)
    assert page.evaluate('document.documentElement.scrollWidth') <= width
    boxes = [page.locator(i).bounding_box() for i in ('#picture', '#effects', '#make', '#compare')]
    assert all(b['x'] >= 0 and b['x'] + b['width'] <= width and b['width'] > 200 for b in boxes)
    assert width > 400 or boxes[0]['width'] > 360  # a phone is not wasted on margins
    assert (boxes[3]['y'] > boxes[2]['y']) == (width == 400)  # below on a phone, beside on a desk
    context.close()


@pytest.mark.slow
def test_a_prompt_of_the_gallery_is_copied_by_a_click(browser, tmp_path):
    from collectionlora.files.card import gallery_html, inspect

    page_file = tmp_path / 'gallery.html'
    page_file.write_text(gallery_html(inspect(COLLECTION)), encoding='utf-8')
    context = browser.new_context()
    context.grant_permissions(['clipboard-read', 'clipboard-write'])
    page, errors = context.new_page(), []
    page.on('console', lambda m: errors.append(m.text))
    page.goto(page_file.as_uri())
    page.get_by_role('button', name='copy').nth(2).click()
    page.get_by_role('button', name='copied').wait_for()
    assert page.evaluate('navigator.clipboard.readText()').startswith('nopesut, a black lava creature')
    page.evaluate(
        "document.body.append(Object.assign(document.createElement('script'), {textContent: 'var evil = 1'}))"
    )
    assert page.evaluate('typeof evil') == 'undefined' and 'Content Security Policy' in errors[-1]
    context.close()
