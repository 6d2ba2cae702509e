"""Executes experiment notebooks with the parameters of a short real run, so that the figures that are kept show curves.

`python tools/short_runs.py [name ...]`, all of SHORT without names. The defaults of an experiment are a smoke run of two
updates, which tests that it works and draws lines between two points. Sources stay as they are, outputs are replaced.
A run file is taken where one of a real run exists; it is quick where `collectionlora run` has made its pieces."""

import subprocess
import sys
from pathlib import Path

import nbformat
import yaml
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
EXPERIMENTS = ROOT / 'nbs' / 'experiments'
SHORT = {  # experiment -> parameters, or the name of a run file
    'acceleration': dict(steps=24, batch=4),
    'baseline_fm': dict(steps=120, batch=8),
    'bench': dict(repeats=3, memory=True),
    'bleeding': 'effects_20',
    'composition': 'effects_20',
    'distill': dict(steps=24, val_every=8),
    'extend': dict(steps=32),
    'kills': dict(moments=6, steps=12),
    'knowledge': dict(asked=6, painted=2, steps=[8, 4], few=4),
    'ladder': dict(
        collection='data/collection/collection.safetensors',
        fractions=[0.5, 0.125, 0.0625],
        energies=[0.9],
        images=3,
    ),
    'merge_bench': dict(counts=[2, 4, 8]),
    'oracle': dict(scenes=2, effects=24),
    'rates': dict(rates=[5e-4, 2e-3], fm_rates=[1e-3, 4e-3], steps=12, batch=4, fm_steps=120, fm_batch=8, images=3),
    'rivals': 'shipped',
    'second': dict(examples=240, steps=120, batch=16, planted=12),
    'single': dict(effects=4, pairs=12, steps=150, batch=8, rank=8, lr=0.01, sample_steps=8, images=4, strangers=12),
    'sizes': 'effects_20',
    'strengths': 'effects_20',
    'table_1': 'effects_20',
    'table_3': 'effects_8',
    'teacher': dict(steps=150, batch=8, lr=0.01, sample_steps=8, guidance=1.0),
    'weights': 'effects_20',
}
TOLD = 'The outputs below are of '


def parameters(name: str) -> dict:
    "The parameters of the run whose outputs are kept."
    short = SHORT[name]
    if isinstance(short, dict):
        return short
    given = yaml.safe_load((EXPERIMENTS / name / f'{short}.yaml').read_text(encoding='utf-8'))
    return {**given, 'run': short}


def sentence(name: str) -> str:
    "What a notebook says about the run whose outputs it shows."
    short = SHORT[name]
    if isinstance(short, str):
        return f'{TOLD}`collectionlora run nbs/experiments/{name}/{short}.yaml`; the defaults are a smoke run.'
    given = ' '.join(f'-p {k}={v}' for k, v in short.items())
    return f'{TOLD}a short run, `collectionlora run {name} {given}`; the defaults are a smoke run.'


def told(source: str, name: str) -> str:
    "The notebook's second cell with the sentence as its last paragraph, in place of an older one."
    kept = [p for p in source.split('\n\n') if not p.startswith(TOLD)]
    return '\n\n'.join([*kept, sentence(name)])


def execute(name: str) -> None:
    "Runs nbs/experiments/<name>.ipynb as SHORT says and keeps its outputs."
    path = EXPERIMENTS / f'{name}.ipynb'
    book = nbformat.read(path, 4)
    cell = next(c for c in book.cells if 'parameters' in c.metadata.get('tags', []))
    defaults = cell.source
    cell.source += ''.join(f'\n{k} = {v!r}' for k, v in parameters(name).items())
    NotebookClient(book, timeout=3600, resources={'metadata': {'path': str(ROOT)}}).execute()
    cell.source = defaults
    for run in (c for c in book.cells if c.cell_type == 'code'):
        run.outputs = [o for o in run.outputs if o.get('name') != 'stderr']  # warnings name folders of this machine
    book.cells[1].source = told(book.cells[1].source, name)
    nbformat.write(book, path)
    subprocess.run([Path(sys.executable).parent / 'nbdev_clean', '--fname', path], check=True)
    subprocess.run([sys.executable, ROOT / 'tools' / 'small_outputs.py', path], check=True)


if __name__ == '__main__':
    for asked in sys.argv[1:] or SHORT:
        execute(asked)
        print(asked)
