"""results/README.md from the records: every run by its base, its seed and what varies in it.

`python tools/list_results.py` writes it; a test holds the two equal. Only what git knows is listed."""

import functools
import json
import subprocess
from pathlib import Path

from collectionlora import core

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / 'results'
EARLIER = {  # bases that no longer ship, by their hash
    '73e90ea5': '2.6 M',
    'f68440a8': '2.6 M',
    'e36327a3': '2.6 M',
    'ce07205a': '998 K',
    'fb54f7a7': '598 K',
    'b204999a': '320 K',
    '6a1fd693': 'first',
}
ASIDE = {'log', 'figures', 'tables', 'main_job'}  # folders that are no experiment
NOT_SHOWN = {
    'out',
    'cache',
    'device',
    'threads',
    'run',
    'workers',
    'shard',
    'described',
    'teachers',
}  # where and how a run went, not what it was
HEAD = """# Results

What runs have left. A record (`.json`) says what a run was given, on which base and with which commit, and what it
measured. Rows (`.rows.jsonl.xz`) are judged pictures, one a line; `judge.gate.read_rows` reads them by the name without
`.xz`. Pictures (`.jpg`) are one sheet a run. Not kept are executed notebooks, single pictures and trained files; a run
file makes them again.

`python tools/list_results.py` writes this list, `python tools/keep_results.py results/<experiment>/<run>.json` makes a
run ready for git.

Bases: *ships* is the nano base in `data/nano`, which has seen 2.6 M samples and has a decoder's correction; *2.6 M* is
the same without the correction, or with an earlier training of it. *998 K*, *598 K*, *320 K* and *first* came before.
Eight digits such as `fe261f54` are the hash of something else: in `full_scale` and `options` of a base of random weights,
which learns nothing and is there to be measured. Numbers of different bases do not compare. "What varies" lists the
parameters in which the runs of an experiment differ; where most runs of an experiment share a value, only the others
show theirs. "tuned" is the weight of the acceleration LoRA in the stack that is named.
"""


@functools.cache
def in_git() -> frozenset:
    "What git knows below results/ and is there; a run of one's own is listed once it has been added."
    asked = ['git', 'ls-files', '-z', 'results']
    names = subprocess.run(asked, cwd=ROOT, capture_output=True, check=True).stdout.decode().split('\0')[:-1]
    return frozenset(path for name in names if (path := ROOT / name).is_file())


def kept(folder: Path, pattern: str) -> list[Path]:
    "The files below `folder` that match and are in git."
    return sorted(p for p in folder.glob(pattern) if p in in_git())


def base_of(record: dict, shipped: str) -> str:
    "The base of a record in a word; a dash where there was none."
    digest = record.get('run', {}).get('inputs', {}).get('base', '')
    return 'ships' if digest == shipped else EARLIER.get(digest[:8], digest[:8]) or '–'


def flat(parameters: dict) -> dict:
    "Parameters by name, those of nested settings too, without files."
    found = {}
    for name, value in parameters.items():
        files = [v for v in (value if isinstance(value, list) else [value]) if isinstance(v, str) and '/' in v]
        if isinstance(value, dict):
            found |= {f'{name} {k}' if name == 'tuned' else k: v for k, v in flat(value).items()}
        elif name not in NOT_SHOWN and not files:
            found[name] = value
    return found


def said(value) -> str:
    "A parameter's value as a person writes it."
    if isinstance(value, list):
        return ', '.join(map(said, value)) or 'none'
    if isinstance(value, dict):
        return ' '.join(f'{k} {said(v)}' for k, v in value.items()) or 'unchanged'
    return f'{value:g}' if isinstance(value, float) else str(value) if value != '' else 'none'


def differing(given: dict[str, dict], optional: set[str]) -> dict[str, object]:
    """The parameters whose values differ between runs, each with the value that is not worth saying.

    That is the usual one of four or more runs. A setting (`optional`) that a run was not given has its default there.
    Another parameter that a record lacks came later and says nothing."""
    usual = {}
    for name in dict.fromkeys(name for parameters in given.values() for name in parameters):
        values = [json.dumps(p.get(name)) for p in given.values() if name in p or name in optional]
        if len(set(values)) > 1:
            most = max(values, key=values.count)
            usual[name] = most if len(values) > 3 and values.count(most) > len(values) / 2 else None
    return usual


def varying(records: dict[str, dict]) -> dict[str, str]:
    "Per run, what differs from the other runs of its experiment."
    asked = {run: r.get('run', {}).get('parameters', {}) for run, r in records.items()}
    given = {run: flat(parameters) for run, parameters in asked.items()}
    optional = {k for p in asked.values() for value in p.values() if isinstance(value, dict) for k in value}
    usual = differing(given, optional)
    shown = lambda p: [n for n in usual if n in p and json.dumps(p[n]) != usual[n]]
    return {run: '; '.join(f'{n} {said(p[n])}' for n in shown(p)) for run, p in given.items()}


def files_of(folder: Path, run: str) -> str:
    "Links to what is kept of a run."
    words = {f'{run}.json': 'record', f'{run}.rows.jsonl.xz': 'rows', f'{run}.jpg': 'pictures', f'{run}.md': 'card'}
    links = [f'[{w}]({folder.name}/{name})' for name, w in words.items() if kept(folder, name)]
    sheets = kept(folder, f'{run}-*.jpg')
    return ', '.join(links + [f'[{p.stem.removeprefix(run + "-")}]({folder.name}/{p.name})' for p in sheets])


def title_of(experiment: str) -> str:
    "The experiment's notebook, with its own title."
    notebook = ROOT / 'nbs' / 'experiments' / f'{experiment}.ipynb'
    if not notebook.is_file():
        return experiment
    first = ''.join(json.loads(notebook.read_text(encoding='utf-8'))['cells'][0]['source'])
    return f'{experiment}: [{first.splitlines()[0].lstrip("# ")}](../nbs/experiments/{experiment}.ipynb)'


def section(folder: Path, shipped: str) -> list[str]:
    "One experiment's runs as a table."
    records = {p.stem: core.read_json(p) for p in kept(folder, '*.json')}
    varies = varying(records)
    lines = [
        '',
        f'## {title_of(folder.name)}',
        '',
        '| run | base | seed | what varies | kept |',
        '| --- |' + ' --- |' * 4,
    ]
    for run, record in records.items():
        seed = record.get('run', {}).get('seed', '–')
        cells = (run, base_of(record, shipped), seed, varies[run] or '–', files_of(folder, run))
        lines.append(f'| {" | ".join(map(str, cells))} |')
    return lines


def main_job(shipped: str) -> list[str]:
    "The kept demonstrations, a folder each."
    lines = ['', '## main_job: the demonstration and the long run', '']
    lines += ["Records, rows, pictures and the second judge's view; [counted](../nbs/analysis/main_job.ipynb).", '']
    lines += ['| run | base | seed | effects | student | pictures |', '| --- |' + ' --- |' * 5]
    for folder in (p.parent for p in kept(RESULTS / 'main_job', '*/evaluation.json')):
        record, student = core.read_json(folder / 'evaluation.json'), core.read_json(folder / 'collection.json')
        effects = [k.removeprefix('effect ') for k in record['run']['inputs'] if k.startswith('effect ')]
        asked, path = student['run']['parameters'], f'main_job/{folder.name}'
        made = f'rank {asked["rank"]}, {asked["steps"]} steps'
        cells = [f'[{folder.name}]({path})', base_of(record, shipped), record['run']['seed'], ', '.join(effects), made]
        sheet = f'[sheet]({path}/pictures.jpg)' if kept(folder, 'pictures.jpg') else '–'
        lines.append(f'| {" | ".join(map(str, [*cells, sheet]))} |')
    return lines


def aside(folder: str, what: str) -> list[str]:
    "A folder that is no experiment: its files by name."
    files = [p.name for p in kept(RESULTS / folder, '*')]
    return ['', f'## {folder}: {what}', '', ', '.join(f'[{name}]({folder}/{name})' for name in files)]


def render() -> str:
    "The whole page."
    shipped = core.sha256_folder(core.nano_dir())
    folders = sorted({p.parent for p in kept(RESULTS, '*/*.json') if p.parent.name not in ASIDE})
    lines = [HEAD.strip(), *main_job(shipped)]
    for folder in folders:
        lines += section(folder, shipped)
    lines += aside('tables', 'written by the pages in `nbs/analysis`')
    lines += aside('figures', 'written by the pages in `nbs/analysis`')
    lines += aside('log', 'numbers of [the log](../nbs/log.ipynb) whose runs are no longer kept')
    return '\n'.join(lines) + '\n'


if __name__ == '__main__':
    (RESULTS / 'README.md').write_text(render(), encoding='utf-8')
