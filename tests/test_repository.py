"The repository as a whole: notebooks that teach, nothing that names a machine, nothing unfinished."

import ast
import importlib.util
import json
import re
import runpy
import subprocess

import nbformat
import pytest

from collectionlora import core
from collectionlora.run.signature import declared, OURS
from collectionlora.run.sweep import from_file

ROOT = core.repo_root()
NOTEBOOKS = sorted(
    p for p in (ROOT / 'nbs').rglob('*.ipynb') if not any(s.startswith(('.', '_')) for s in p.relative_to(ROOT).parts)
)
MACHINE = re.compile(r'(^|[^\w.:/])/(home|root|tmp|opt|work|Users|mnt|scratch)/[\w.-]+')
UNFINISHED = re.compile(r'\b(TODO|FIXME|NotImplementedError|skip_exec)\b')


def name(path):
    return path.relative_to(ROOT).as_posix()


def tracked() -> list[str]:
    return (
        subprocess.run(['git', 'ls-files', '-z'], cwd=ROOT, capture_output=True, check=True)
        .stdout.decode()
        .split('\0')[:-1]
    )


@pytest.mark.parametrize('path', NOTEBOOKS, ids=name)
def test_a_notebook_starts_with_title_and_one_line_and_stays_small(path):
    nb = nbformat.read(path, 4)
    first = '\n'.join(c.source for c in nb.cells[:3] if c.cell_type == 'markdown')
    assert re.match(r'# \S.*\n+> \S', first), first[:200]
    assert nb.metadata.kernelspec.name == 'python3'
    assert path.stat().st_size < 1_000_000
    assert not any(o.output_type == 'error' for c in nb.cells for o in c.get('outputs', []))


OWN_SIZES = ('nbs/index.ipynb', 'nbs/run/chain.ipynb')  # large letters for the front page, and boxes with arrows


def test_every_notebook_that_draws_uses_the_one_style():
    unstyled = []
    for path in NOTEBOOKS:
        code = '\n'.join(c.source for c in nbformat.read(path, 4).cells if c.cell_type == 'code')
        if 'matplotlib.pyplot' in code and not re.search(r'figure_style\(|run_folder\(', code):
            unstyled += [name(path)] * (name(path) not in OWN_SIZES)
    assert not unstyled


@pytest.mark.parametrize('path', NOTEBOOKS, ids=name)
def test_no_output_names_a_machine(path):
    cells = nbformat.read(path, 4).cells
    texts = [
        json.dumps(o.get('data', {}).get('text/plain', '') or o.get('text', ''))
        for c in cells
        for o in c.get('outputs', [])
    ]
    assert not [t[:200] for t in texts if MACHINE.search(t)]


def test_text_files_name_no_machine_and_leave_nothing_unfinished():
    found = []
    for file in tracked():
        if not file.endswith(
            ('.py', '.md', '.yaml', '.yml', '.ini', '.txt', '.sh', '.cff', '.json', 'Makefile')
        ) or file.startswith('tests/'):
            continue
        text = (ROOT / file).read_text(encoding='utf-8') if (ROOT / file).is_file() else ''
        found += [f'{file}: {m.group(0)}' for pattern in (MACHINE, UNFINISHED) for m in pattern.finditer(text)]
    assert not found


@pytest.mark.parametrize('path', sorted((ROOT / 'nbs' / 'experiments').glob('*.ipynb')), ids=name)
def test_an_experiment_can_be_asked_for_its_parameters_and_each_is_explained(path):
    signature = declared(path)
    assert set(OURS) <= set(signature)
    assert not [p.name for p in signature.values() if not p.help]


def test_every_budget_file_fits_its_notebook():
    files = sorted((ROOT / 'nbs' / 'experiments').glob('*/*.yaml'))
    assert files and all(from_file(f) for f in files)


def test_a_run_file_asks_for_nothing_that_only_one_checkout_has():
    "What git does not have is given beside the file (`needs`); a cache may be empty and is made where it is absent."
    for file in sorted((ROOT / 'nbs' / 'experiments').glob('*/*.yaml')):
        given = {k: v for k, v in core.read_yaml(file).items() if k != 'cache'}
        assert 'results/' not in json.dumps(given), file


def test_style_sees_a_walrus_in_any_argument_and_leaves_a_shown_list_alone():
    faults = runpy.run_path(str(ROOT / 'tools' / 'style.py'))['faults_of']
    assert 'walrus' in faults('f(a=(x := 1))', False)[0] and 'walrus' in faults('f(x := 1)', False)[0]
    assert faults('[f(x) for x in y]', False) and not faults('[f(x) for x in y]', False, page=True)


def test_published_json_is_valid():
    for file in tracked():
        if file.endswith('.json') and (ROOT / file).is_file():
            json.loads((ROOT / file).read_text())


def test_the_front_page_names_effects_that_the_demonstration_makes():
    from collectionlora import world
    from collectionlora.files import drawn
    from collectionlora.run.chain import differences

    asked = differences('effects', 'demo')
    made = set(drawn.pick_effects(asked['effects'], 0, asked['working']))
    page = (ROOT / 'README.md').read_text()
    named = {
        word
        for word in re.findall(
            r'[a-z]+_[a-z]+(?:_[a-z]+)*', ' '.join(re.findall(r'collection\.edit\(.*|collectionlora edit .*', page))
        )
        if word in world.EFFECTS
    }
    assert len(named) >= 3 and named <= made


def unshown(cell) -> list[str]:
    "Sentences that a cell writes whatever the records say (`Markdown(f'...')` at its end), and that its output lacks."
    last = ast.parse(cell.source).body[-1:]
    if not last or not isinstance(last[0], ast.Expr) or not isinstance(last[0].value, ast.Call):
        return []
    asked = ast.unparse(last[0].value.func) == 'Markdown' and last[0].value.args
    texts = [v.value for a in asked or [] for v in getattr(a, 'values', [a]) if isinstance(v, ast.Constant)]
    output = ''.join(o.get('data', {}).get('text/markdown', '') for o in cell.outputs)
    return [t for t in texts if len(t) > 20 and t not in output]


@pytest.mark.parametrize('path', [p for p in NOTEBOOKS if p.parent.name in ('nbs', 'analysis')], ids=name)
def test_a_page_that_was_edited_has_been_run(path):
    cells = [c for c in nbformat.read(path, 4).cells if c.cell_type == 'code' and 'Markdown(' in c.source]
    assert not (stale := [t for c in cells for t in unshown(c)]), f'run {name(path)} again: {stale}'


def test_the_front_page_is_what_its_notebook_shows():
    import runpy

    readme = runpy.run_path(str(ROOT / 'tools' / 'readme.py'))
    text, pictures = readme['render'](readme['shown'](nbformat.read(ROOT / 'nbs' / 'index.ipynb', 4)))
    assert text == (ROOT / 'README.md').read_text(), 'run `make readme`'
    assert pictures and all((ROOT / name).read_bytes() == data for name, data in pictures.items())
    links = [l.split('#')[0] for l in re.findall(r'\]\(([^)\s]+)\)', text) if not l.startswith('http')]
    assert len(links) > 10 and not [l for l in links if l and not (ROOT / l).exists()]


def test_results_are_listed_by_what_varies():
    import runpy

    listing = runpy.run_path(str(ROOT / 'tools' / 'list_results.py'))
    text = (ROOT / 'results' / 'README.md').read_text(encoding='utf-8')
    assert text == listing['render'](), 'run `python tools/list_results.py`'
    links = re.findall(r'\]\(([^)\s]+)\)', text)
    assert len(links) > 100 and not [l for l in links if not (ROOT / 'results' / l).exists()]


def test_results_are_records_tables_headline_rows_and_one_sheet_a_run():
    files = [f for f in tracked() if f.startswith('results/') and (ROOT / f).is_file()]
    assert len(files) < 300 and sum((ROOT / f).stat().st_size for f in files) < 8_000_000
    notebooks = [f for f in files if f.endswith('.ipynb')]
    single = [f for f in files if f.endswith('.png') and not f.startswith('results/figures/')]
    assert not single and all(f.startswith('results/main_job/') for f in notebooks)


def test_the_data_page_names_what_ships_with_its_checksums():
    page = (ROOT / 'data' / 'README.md').read_text(encoding='utf-8')
    ships = [p for p in (ROOT / 'data').iterdir() if p.name[0] != '.' and p.suffix != '.md']
    for p in ships:
        digest = core.sha256_folder(p) if p.is_dir() else core.sha256_file(p)
        row = next(l for l in page.splitlines() if l.startswith((f'| `{p.name}/` |', f'| `{p.name}` |')))
        assert digest[:16] in row, f'data/README.md: the checksum of {p.name} is {digest[:16]}'
    links = re.findall(r'\]\(([^)\s]+)\)', page)
    assert len(links) > 5 and not [l for l in links if not (ROOT / 'data' / l).exists()]


def test_the_collection_that_ships_is_that_of_the_kept_demonstration():
    kept = ROOT / 'results' / 'main_job' / 'demo'
    files = {core.collection_dir() / 'collection.safetensors': kept / 'collection.json'}
    for file in (core.collection_dir() / 'teachers').glob('*.safetensors'):
        files[file] = kept / f'teacher.{file.stem}.json'
    assert len(files) > 4
    for file, record in files.items():
        assert core.sha256_file(file) == core.read_json(record)['metrics']['sha256'], (
            f'{file.name} is not what {record.name} says; run `collectionlora demo --keep`'
        )


def test_the_documentation_leads_to_every_notebook_once():
    import runpy

    nav = runpy.run_path(str(ROOT / 'tools' / 'rooms.py'))['navigation'](ROOT / 'nbs')
    pages = [page for entry in nav for room in entry.values() for page in (room if isinstance(room, list) else [entry])]
    assert sorted(f'nbs/{path}' for page in pages for path in page.values()) == sorted(map(name, NOTEBOOKS))
    assert [*nav[1]] == ['method'] and [*nav[1]['method'][0].values()] == ['method/00_problem.ipynb']


def test_working_effects_are_those_of_the_record():
    spec = importlib.util.spec_from_file_location('working', ROOT / 'tools' / 'working.py')
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    assert core.read_json(core.data_dir() / 'working.json') == tool.working(), 'run `python tools/working.py`'


@pytest.mark.parametrize('path', sorted((ROOT / 'nbs' / 'method').glob('*.ipynb')), ids=lambda p: p.stem)
def test_lessons_keep_their_outputs(path):
    "A reader who does not execute anything sees the values and the figures, and no states of progress bars."
    cells = [c for c in json.loads(path.read_text())['cells'] if c['cell_type'] == 'code']
    shown = [o for c in cells for o in c['outputs']]
    kinds = {k for o in shown for k in o.get('data', {})}
    assert 'text/plain' in kinds and kinds & {'image/png', 'image/jpeg'}, f'execute {path.name} and keep its outputs'
    assert not any(re.search(r'\d%\|', ''.join(o.get('text', ''))) for o in shown), 'python tools/small_outputs.py'


def test_the_lesson_of_the_loop_begins_with_the_loop_on_one_screen():
    cells = nbformat.read(ROOT / 'nbs' / 'method' / '08_distill.ipynb', 4).cells
    exported = [c.source for c in cells if c.source.startswith('#| export') and 'def ' in c.source]
    loop = exported[0][exported[0].index('def collect(') :]
    assert len([line for line in loop.splitlines() if line.strip()]) <= 42


def test_a_notebook_says_of_which_short_run_its_outputs_are():
    tool = runpy.run_path(str(ROOT / 'tools' / 'short_runs.py'))
    for experiment in tool['SHORT']:
        cells = nbformat.read(ROOT / 'nbs' / 'experiments' / f'{experiment}.ipynb', 4).cells
        assert cells[1].source == tool['told'](cells[1].source, experiment), experiment
        declared_here = next(c.source for c in cells if 'parameters' in c.metadata.get('tags', []))
        assert all(f'\n{name}: ' in declared_here for name in tool['parameters'](experiment)), experiment
