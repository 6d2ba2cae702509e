"Navigation of the documentation: the front page, then the rooms of nbs/ in the order in which they are read, then the log."

from pathlib import Path

import nbformat

ROOMS = ('method', 'engine', 'bases', 'world', 'files', 'judge', 'use', 'run', 'experiments', 'analysis')


def title(notebook: Path) -> str:
    "The first heading of a notebook."
    return nbformat.read(notebook, 4).cells[0].source.splitlines()[0].removeprefix('# ')


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


def on_config(config):
    "MkDocs calls this before it reads the pages."
    config['nav'] = navigation(Path(config['docs_dir']))
    return config
