"""The documentation, as MkDocs' hook: it is built from copies of the notebooks, without what readers need not see.

Navigation: the front page, then the rooms of nbs/ in the order in which they are read, the log, and a reference that is
made from the docstrings. Nothing is loaded from elsewhere: formulas are set by the MathJax of jupyter-server-mathjax."""

import json
import os
import re
import shutil
from pathlib import Path
from urllib.parse import unquote

ROOT = Path(__file__).parents[1]
REPORT = ROOT / 'assets' / 'report.html'
GALLERY = 'gallery.html'  # a page of the site that no notebook makes; a notebook that names it is linked to it
ROOMS = ('method', 'engine', 'bases', 'world', 'files', 'judge', 'use', 'run', 'experiments', 'analysis')
HIDDEN = re.compile(r'#\s*\|\s*(hide|default_exp)\b')
NO_INPUT = re.compile(r'#\s*\|\s*hide_input\b')
DIRECTIVE = re.compile(r'\A(#\s*\|[^\n]*\n)+')
LINK = re.compile(r'\]\(((?:[\w./-]+/)?[\w-]+)\.(ipynb|md)((?:#[^)]*)?)\)')
MATHJAX = """<script type="text/x-mathjax-config">
MathJax.Hub.Config({"HTML-CSS": {availableFonts: [], webFont: "STIX-Web", imageFont: null}, showMathMenu: false});
</script><script src="UPmathjax/MathJax.js?config=TeX-AMS-MML_HTMLorMML-full,Safe"></script>"""
OUTSIDE = re.compile(r'(!?)\[([^\]]*)\]\(((?:\.\./)+[\w./-]*)\)')
PICTURES = 'pictures'  # the folder of the site for pictures that lie outside of nbs
LEADS = re.compile(r'<(a|img|script|link)\b[^>]*?\b(?:href|src)="([^"#?]*)(?:\?[^"#]*)?(?:#([^"]*))?"')
HEADING = re.compile(r'^#{1,6} .*$', re.M)


def title(notebook: Path) -> str:
    "The first heading of a notebook."
    first = json.loads(notebook.read_text())['cells'][0]['source']
    return ''.join(first).splitlines()[0].removeprefix('# ')


def navigation(nbs: Path) -> list:
    "MkDocs' `nav` for every notebook under `nbs`; a room that ROOMS does not name comes after those that it names."
    rooms = {p.parent.name for p in nbs.glob('*/*.ipynb') if not p.parent.name.startswith(('.', '_'))}
    page = lambda p: {title(p): p.relative_to(nbs).as_posix()}
    order = [r for r in ROOMS if r in rooms] + sorted(rooms - {*ROOMS})
    return [
        {'Home': 'index.ipynb'},
        *({room: [page(p) for p in sorted((nbs / room).glob('*.ipynb'))]} for room in order),
        page(nbs / 'log.ipynb'),
    ]


def linked(text: str, page: Path, nbs: Path) -> str:
    """Markdown of a page whose links to notebooks lead to their pages. A link out of `nbs` becomes the plain name, but for
    the sample report, which lies in the site, and for pictures, of which `copies` puts a copy there."""

    def inside(link):
        target = (page.parent / f'{link[1]}.{link[2]}').resolve()
        return f']({link[1]}.html{link[3]})' if target.is_file() and target.is_relative_to(nbs) else link[0]

    def outside(link):
        target = (page.parent / link[3]).resolve()
        if target == REPORT:
            return f'[{link[2]}]({os.path.relpath(nbs / REPORT.name, page.parent)})'
        if link[1] and target.is_file() and target.is_relative_to(nbs.parent):
            return f'![{link[2]}]({os.path.relpath(nbs / PICTURES / target.relative_to(nbs.parent), page.parent)})'
        return link[0] if target.is_relative_to(nbs) else f'{link[1]}{link[2]} (`{os.path.relpath(target, ROOT)}`)'

    text = OUTSIDE.sub(outside, LINK.sub(inside, text))
    return text.replace(f'`{GALLERY}`', f'[{GALLERY}]({os.path.relpath(nbs / GALLERY, page.parent)})')


def written(output: dict, page: Path, nbs: Path) -> dict:
    "An output with the links of its Markdown, if it has any, as in `linked`."
    data = output.get('data', {})
    if 'text/markdown' not in data:
        return output
    return {**output, 'data': {**data, 'text/markdown': linked(''.join(data['text/markdown']), page, nbs)}}


def plain(heading: re.Match) -> str:
    "A heading without code marks: mkdocs-jupyter leaves marked words out of the list beside a page."
    return heading[0].replace('`', '')


def unique(output: str) -> str:
    "A page whose headings have an id each: the second of one name gets `_1`, as the list beside the page counts them."
    met = {}

    def renamed(heading):
        tag, name, text = heading.groups()
        met[name] = met.get(name, -1) + 1
        new = f'{name}_{met[name]}' if met[name] else name
        return f'<{tag} id="{new}">' + text.replace(f'href="#{name}"', f'href="#{new}"')

    return re.sub(r'<(h[1-6]) id="([^"]+)">(.*?</h[1-6]>)', renamed, output, flags=re.S)


def shown(notebook: dict, page: Path, nbs: Path) -> dict:
    "A notebook as its page shows it: without hidden cells and directives of nbdev, with links that lead to pages."
    cells = []
    for cell in notebook['cells']:
        text = ''.join(cell['source'])
        if HIDDEN.match(text):
            continue
        if cell['cell_type'] == 'markdown':
            cells.append({**cell, 'source': HEADING.sub(plain, linked(text, page, nbs))})
        else:
            outputs = [written(o, page, nbs) for o in cell['outputs'] if o.get('name') != 'stderr']
            tags = {'tags': ['hide_input']} if NO_INPUT.match(text) else {}
            cells.append({**cell, 'source': DIRECTIVE.sub('', text), 'outputs': outputs, 'metadata': tags})
    return {**notebook, 'cells': cells}


def reference(package: Path, to: Path) -> list:
    "Writes a page for every room of the package, its public names with their docstrings; returns their navigation."
    to.mkdir(parents=True, exist_ok=True)
    rooms = {'method': sorted(p for p in package.glob('[a-z]*.py'))}
    rooms |= {r: sorted((package / r).glob('[a-z]*.py')) for r in ROOMS if (package / r).is_dir()}
    pages = []
    for room, files in rooms.items():
        names = ['.'.join(f.relative_to(package.parent).with_suffix('').parts) for f in files]
        text = '\n\n'.join([f'# {room}', *(f'::: {name}' for name in names)])
        (to / f'{room}.md').write_text(text + '\n')
        pages.append({room: f'reference/{room}.md'})
    return pages


def pictures(page: Path, nbs: Path) -> list[Path]:
    "The files of this repository outside of `nbs` that the text of a notebook shows as pictures."
    cells = json.loads(page.read_text())['cells']
    text = '\n'.join(''.join(c['source']) for c in cells if c['cell_type'] == 'markdown')
    files = [(page.parent / link[3]).resolve() for link in OUTSIDE.finditer(text) if link[1]]
    return [f for f in files if f.is_file() and f.is_relative_to(nbs.parent) and not f.is_relative_to(nbs)]


def copies(nbs: Path, to: Path) -> None:
    "Writes every notebook as it is shown below `to`, a fresh folder, and the pictures of elsewhere that they show."
    shutil.rmtree(to, ignore_errors=True)
    for page in [*nbs.glob('*.ipynb'), *nbs.glob('*/*.ipynb')]:
        if not page.parent.name.startswith(('.', '_')):
            copy = to / page.relative_to(nbs)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(json.dumps(shown(json.loads(page.read_text()), page, nbs), ensure_ascii=False))
            for picture in pictures(page, nbs):
                to_picture = to / PICTURES / picture.relative_to(nbs.parent)
                to_picture.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(picture, to_picture)


def write_gallery(to: Path) -> None:
    "Writes the gallery of the collection that ships, as `collectionlora inspect --html` does."
    from collectionlora.core import collection_dir
    from collectionlora.files.card import gallery_html, inspect

    to.write_text(gallery_html(inspect(collection_dir() / 'collection.safetensors')), encoding='utf-8')


def on_config(config):
    "MkDocs calls this before it reads the pages."
    nbs, docs = ROOT / 'nbs', ROOT / '_proc' / 'docs'
    copies(nbs, docs)
    for name in ('docs.css', 'iframe-worker.js'):
        shutil.copyfile(ROOT / 'tools' / name, docs / name)
    shutil.copyfile(REPORT, docs / REPORT.name)
    write_gallery(docs / GALLERY)
    config['nav'] = [*navigation(nbs), {'reference': reference(ROOT / 'collectionlora', docs / 'reference')}]
    config['docs_dir'] = str(docs)
    return config


def on_page_content(html: str, page, config, files) -> str:
    """The search finds what pages say and the names of the reference; code would fill its list of results. It leaves
    out what is marked, up to the first end of a tag of the same name, so innermost tags are marked."""
    for tag, rest in (('clipboard-copy', ' '), ('div', ' class="clipboard-copy-txt"')):
        html = html.replace(f'<{tag}{rest}', f'<{tag} data-search-exclude{rest}')
    return re.sub(r'(<div class="highlight-ipynb [^>]*><pre)>', r'\1 data-search-exclude>', html)


def on_post_page(output: str, page, config) -> str:
    "Formulas are set by the copy of MathJax in the site, no script of elsewhere is asked, headings have an id each."
    up = '../' * page.url.count('/')
    output = unique(output).replace('<script src=""> </script>', MATHJAX.replace('UP', up))
    return re.sub(r'<script type="module">(?:(?!</script>).)*mermaid.*?</script>', '', output, flags=re.S)


def on_post_build(config) -> None:
    "Puts MathJax into the site, and stops if a link leads nowhere."
    import jupyter_server_mathjax

    site = Path(config['site_dir'])
    shutil.copytree(Path(jupyter_server_mathjax.__file__).parent / 'static', site / 'mathjax', dirs_exist_ok=True)
    if broken := dead_links(site):
        raise SystemExit('links that lead nowhere:\n' + '\n'.join(f'{page}: {link}' for page, link in broken))


def dead_links(site: Path) -> list[tuple[str, str]]:
    "(page, link) of every link, picture and script in a built site that is not there, or lies elsewhere on the web."
    found, texts = [], {p: p.read_text() for p in site.rglob('*.html') if 'mathjax' not in p.relative_to(site).parts}
    names = {p.resolve(): set(re.findall(r'\b(?:id|name)="([^"]+)"', text)) for p, text in texts.items()}
    for page, text in texts.items():
        for tag, link, part in re.findall(LEADS, text):
            if re.match(r'(https?:)?//', link):
                here = tag == 'a' or 'canonical' in link
            elif re.match(r'[a-z]+:', link):
                here = True
            else:
                target = page if not link else site / link.lstrip('/') if link[0] == '/' else page.parent / link
                here = target.exists() and (not part or unquote(part) in names.get(target.resolve(), {unquote(part)}))
            if not here:
                found.append((str(page.relative_to(site)), link + (f'#{part}' if part else '')))
    return found
