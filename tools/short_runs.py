"""Executes experiment notebooks with the parameters of a short real run, so that the figures that are kept show curves.

`python tools/short_runs.py [name ...]`, all of SHORT without names. The defaults of an experiment are a smoke run of two
updates, which tests that it works and draws lines between two points. Sources stay as they are, outputs are replaced."""

import subprocess
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
SHORT = {
    'distill': dict(steps=24, val_every=8),
    'extend': dict(steps=12),
}


def sentence(name: str) -> str:
    "What a notebook says about the run whose outputs it shows."
    given = ' '.join(f'-p {k}={v}' for k, v in SHORT[name].items())
    return f'The outputs below are of a short run, `collectionlora run {name} {given}`; the defaults are a smoke run.'


def told(source: str, name: str) -> str:
    "The notebook's second cell with the sentence as its last paragraph, in place of an older one."
    kept = [p for p in source.split('\n\n') if not p.startswith('The outputs below are of a short run')]
    return '\n\n'.join([*kept, sentence(name)])


def execute(name: str) -> None:
    "Runs nbs/experiments/<name>.ipynb as SHORT says and keeps its outputs."
    path = ROOT / 'nbs' / 'experiments' / f'{name}.ipynb'
    book = nbformat.read(path, 4)
    cell = next(c for c in book.cells if 'parameters' in c.metadata.get('tags', []))
    defaults = cell.source
    cell.source += ''.join(f'\n{k} = {v!r}' for k, v in SHORT[name].items())
    NotebookClient(book, timeout=3600, resources={'metadata': {'path': str(path.parent)}}).execute()
    cell.source = defaults
    book.cells[1].source = told(book.cells[1].source, name)
    nbformat.write(book, path)
    subprocess.run([Path(sys.executable).parent / 'nbdev_clean', '--fname', path], check=True)
    subprocess.run([sys.executable, ROOT / 'tools' / 'small_outputs.py', path], check=True)


if __name__ == '__main__':
    for asked in sys.argv[1:] or SHORT:
        execute(asked)
        print(asked)
