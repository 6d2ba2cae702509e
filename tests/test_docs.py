"The documentation's hook: what a page shows, where its links lead, and that nothing of elsewhere is asked."

import json
import runpy

import pytest

from collectionlora.core import notebooks_dir

ROOT = notebooks_dir().parents[1]
TOOL = ROOT / 'tools' / 'rooms.py'


@pytest.fixture(scope='module')
def rooms():
    return runpy.run_path(str(TOOL))


def cell(kind, text, **more):
    return dict(cell_type=kind, source=text, metadata={}, **({} if kind == 'markdown' else dict(outputs=[]) | more))


@pytest.fixture
def nbs(tmp_path):
    for name in ('nbs/method/a.ipynb', 'nbs/use/b.ipynb', 'results/README.md'):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text('{}')
    return tmp_path / 'nbs'


@pytest.mark.parametrize(
    'text, there',
    [
        ('see [b](../use/b.ipynb#part)', 'see [b](../use/b.html#part)'),
        ('see [no page](../use/c.ipynb)', 'see [no page](../use/c.ipynb)'),
        ('[the web](https://arxiv.org/abs/1.ipynb)', '[the web](https://arxiv.org/abs/1.ipynb)'),
    ],
)
def test_links_between_notebooks_lead_to_pages(rooms, nbs, text, there):
    assert rooms['linked'](text, nbs / 'method' / 'a.ipynb', nbs) == there


def test_a_link_out_of_the_notebooks_is_a_plain_name(rooms, nbs):
    said = rooms['linked']('[the list](../../results/README.md)', nbs / 'method' / 'a.ipynb', nbs)
    assert said.startswith('the list (`') and said.endswith('results/README.md`)')


def test_a_picture_out_of_the_notebooks_is_shown(rooms, nbs, tmp_path):
    picture, page = nbs.parent / 'assets' / 'a.png', nbs / 'method' / 'a.ipynb'
    picture.parent.mkdir()
    picture.write_bytes(b'picture')
    text = '![a picture](../../assets/a.png)'
    page.write_text(json.dumps({'cells': [cell('markdown', text)]}))
    (nbs / 'use' / 'b.ipynb').write_text(json.dumps({'cells': []}))
    rooms['copies'](nbs, tmp_path / 'site')
    said = json.loads((tmp_path / 'site' / 'method' / 'a.ipynb').read_text())['cells'][0]['source']
    assert said == '![a picture](../pictures/assets/a.png)'
    assert (tmp_path / 'site' / 'pictures' / 'assets' / 'a.png').read_bytes() == b'picture'


def test_the_sample_report_lies_in_the_site(rooms):
    nbs = ROOT / 'nbs'
    link = '[the report](../../assets/report.html)'
    assert rooms['linked'](link, nbs / 'method' / 'a.ipynb', nbs) == '[the report](../report.html)'


def test_the_gallery_lies_in_the_site_and_is_linked(rooms, nbs, tmp_path):
    said = rooms['linked']('it is `gallery.html` here', nbs / 'use' / 'b.ipynb', nbs)
    assert said == 'it is [gallery.html](../gallery.html) here'
    rooms['write_gallery'](tmp_path / 'gallery.html')
    page = (tmp_path / 'gallery.html').read_text(encoding='utf-8')
    assert 'lava_creature' in page and 'data:image/' in page and '<button' in page


def test_hidden_cells_directives_and_warnings_are_not_shown(rooms, nbs):
    said = {'output_type': 'display_data', 'data': {'text/markdown': ['[b](../use/b.ipynb)']}}
    cells = [
        cell('code', '#| default_exp use.x'),
        cell('code', '#| hide\nx = 1'),
        cell('code', '#| export\ndef f(): ...'),
        cell('code', '#| hide_input\nf()', outputs=[said, {'output_type': 'stream', 'name': 'stderr', 'text': 'oh'}]),
    ]
    shown = rooms['shown'](dict(cells=cells), nbs / 'method' / 'a.ipynb', nbs)['cells']
    assert [c['source'] for c in shown] == ['def f(): ...', 'f()']
    assert shown[1]['metadata'] == {'tags': ['hide_input']} and shown[0]['metadata'] == {}
    assert [o['data']['text/markdown'] for o in shown[1]['outputs']] == ['[b](../use/b.html)']


def test_dead_links_and_scripts_of_elsewhere_are_found(rooms, tmp_path):
    (tmp_path / 'a.html').write_text(
        '<a href="b.html#x">b</a><a href="c.html">c</a><a href="https://w.org">w</a><a href="mailto:x@y">m</a>'
        '<script src="https://cdn.org/x.js"></script><img src="/b.html"><a href="b.html#y">y</a><a href="#z">z</a>'
    )
    (tmp_path / 'b.html').write_text('<h2 id="x">x</h2>')
    lost = ['c.html', 'https://cdn.org/x.js', 'b.html#y', '#z']
    assert rooms['dead_links'](tmp_path) == [('a.html', link) for link in lost]


def test_headings_have_an_id_each_and_no_code_marks(rooms, nbs):
    page = '<h1 id="roles">Roles<a href="#roles">¶</a></h1><h2 id="roles">Roles<a href="#roles">¶</a></h2>'
    assert rooms['unique'](page).endswith('<h2 id="roles_1">Roles<a href="#roles_1">¶</a></h2>')
    told = rooms['shown'](dict(cells=[cell('markdown', '# The trap at `backward`\na `b`')]), nbs / 'use/b.ipynb', nbs)
    assert told['cells'][0]['source'] == '# The trap at backward\na `b`'


def test_every_room_has_a_page_of_reference(rooms, tmp_path):
    pages = rooms['reference'](ROOT / 'collectionlora', tmp_path)
    assert [room for page in pages for room in page][:3] == ['method', 'engine', 'bases']
    text = (tmp_path / 'use.md').read_text()
    assert '::: collectionlora.use.edit' in text and '::: collectionlora.dmd' in (tmp_path / 'method.md').read_text()


def test_no_notebook_of_this_repository_links_to_a_page_that_is_not_there(rooms):
    nbs, lost = ROOT / 'nbs', []
    for page in [*nbs.glob('*.ipynb'), *nbs.glob('*/*.ipynb')]:
        for c in json.loads(page.read_text())['cells']:
            if c['cell_type'] == 'markdown':
                lost += [(page.name, l) for l in rooms['LINK'].findall(''.join(c['source'])) if not found(page, l)]
    assert not lost


def found(page, link):
    return (page.parent / f'{link[0]}.{link[1]}').is_file()


@pytest.mark.slow
def test_the_cards_snippet_runs_as_it_stands(tmp_path):
    import re
    import shutil
    import subprocess
    import sys

    from PIL import Image

    from collectionlora import core, world
    from collectionlora.files.card import write_card

    file = tmp_path / 'collection.safetensors'
    shutil.copyfile(core.collection_dir() / file.name, file)
    card = write_card(file)[0].read_text()
    drawn = world.render(world.draw_scene(core.rng('snippet', 0), 'animal', 'heldout'))
    Image.fromarray(drawn).save(tmp_path / 'input.png')
    (tmp_path / 'snippet.py').write_text(re.search('```python\n(.*?)```', card, re.S)[1])
    done = subprocess.run([sys.executable, 'snippet.py'], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert card.count('# needs: ') == 1 and 'pip install torchvision' in card  # which the package does not bring
    made = Image.open(tmp_path / 'output.png')
    assert made.size == (64, 64) and made.convert('RGB').tobytes() != drawn.tobytes()


def test_code_is_not_searched(rooms):
    code = '<div class="highlight-ipynb hl-python"><pre><span>x</span></pre></div>'
    copied = '<clipboard-copy for="a"><div></div></clipboard-copy><div class="clipboard-copy-txt" id="a">x</div>'
    said = rooms['on_page_content'](f'<p>words</p><div>{copied}{code}</div>', None, None, None)
    assert said.count('data-search-exclude') == 3 and said.startswith('<p>words</p><div><clipboard-copy data-search')
    assert '<pre data-search-exclude><span>' in said and '<div data-search-exclude class="clipboard-copy-txt"' in said
