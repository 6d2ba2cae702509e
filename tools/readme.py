"README.md from nbs/index.ipynb: runs the notebook, keeps what a reader sees, puts its pictures into assets/. Needs no Quarto."

import os
import posixpath
import re
import subprocess
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parent.parent
HIDDEN = re.compile(r'^#\|\s*(hide|default_exp)\b', re.M)
NO_INPUT = re.compile(r'^#\|\s*hide_input\b', re.M)
DIRECTIVE = re.compile(r'^#\|.*\n?', re.M)
LINK = re.compile(
    r'\]\(((?:[\w.-]+/)*[\w.-]+\.ipynb|\.\./[^)\s#]*)(#[^)\s]*)?\)'
)  # to a notebook in any room, or out of nbs/


def from_root(link: re.Match) -> str:
    "A link of the notebook, which starts in nbs/, as one that starts at the root."
    return f']({posixpath.normpath("nbs/" + link[1])}{link[2] or ""})'


def shown(nb):
    "The cells that a reader of the front page sees: no hidden ones, no directives, no warnings on stderr."
    nb.cells = [c for c in nb.cells if not HIDDEN.search(c.source)]
    for c in nb.cells:
        c.source = '' if NO_INPUT.search(c.source) else DIRECTIVE.sub('', c.source)
        if c.cell_type == 'code':
            c.outputs = [o for o in c.outputs if o.get('name') != 'stderr']
    return nb


SEEN = (  # what each picture shows, for those who cannot see it
    'Four subjects, each with another effect: the source, a true target, and ours in eight steps',
    'One picture edited with one effect and with two at once',
)


def render(nb) -> tuple[str, dict]:
    "Markdown and its pictures, named assets/readme_N.png in order of appearance."
    nb.metadata['language_info'] = {'name': 'python'}
    text, resources = MarkdownExporter().from_notebook_node(nb)
    pictures = {}
    for i, (name, data) in enumerate(resources.get('outputs', {}).items()):
        new = f'assets/readme_{i}{Path(name).suffix}'
        text, pictures[new] = text.replace(f']({name})', f']({new})'), data
    text = re.sub(r'```python\s+```\n', '', LINK.sub(from_root, text))
    words = iter(SEEN)
    shown = lambda found: f'\n\n![{next(words)}]({found[1]})\n\n'
    text = re.sub(r'\n\s+!\[(?:png|jpeg)\]\((\S+)\)\s*\n', shown, text)
    note = '<!-- rendered from nbs/index.ipynb by `make readme`; edit the notebook -->\n\n'
    return note + re.sub(r'\n{3,}', '\n\n', text).strip() + '\n', pictures


def keep(nb):
    "Writes the run notebook back with its outputs, cleaned as every notebook here is."
    path = ROOT / 'nbs' / 'index.ipynb'
    for c in nb.cells:
        if c.cell_type == 'code':
            c.outputs = [o for o in c.outputs if o.get('name') != 'stderr']
    nbformat.write(nb, path)
    subprocess.run([str(Path(sys.executable).parent / 'nbdev_clean'), '--fname', str(path)], cwd=ROOT, check=True)


def main():
    os.environ['MPLBACKEND'] = (
        'module://matplotlib_inline.backend_inline'  # pictures into the notebook, whatever the caller has set
    )
    nb = nbformat.read(ROOT / 'nbs' / 'index.ipynb', 4)
    if '--run' in sys.argv:
        NotebookClient(nb, timeout=600, resources={'metadata': {'path': str(ROOT / 'nbs')}}).execute()
        keep(nb)
    text, pictures = render(shown(nb))
    (ROOT / 'assets').mkdir(exist_ok=True)
    for old in (ROOT / 'assets').glob('readme_*'):
        old.unlink()
    for name, data in pictures.items():
        (ROOT / name).write_bytes(data)
    (ROOT / 'README.md').write_text(text, encoding='utf-8')
    print(f'README.md: {len(text.split())} words, {len(pictures)} pictures')


if __name__ == '__main__':
    main()
