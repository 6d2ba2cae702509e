"""Names, values and files as they come: the command line answers with a result or a sentence, never with a traceback, and never in another folder."""

import logging, os, shutil, struct, subprocess, sys, unicodedata
from pathlib import Path

import nbformat
import pytest
from hypothesis import given, HealthCheck, settings, strategies as st
from PIL import Image
from typer.testing import CliRunner

import collectionlora.run.cli as cli
from collectionlora.core import collection_dir, folder_lock, notebooks_dir, read_json, replacing, repo_root, write_json
from collectionlora.files.effects import load_effect, load_general, write_effect, write_general
from collectionlora.files.lora import convert, read_lora
from collectionlora.run.execute import execute
from collectionlora.use.edit import Edit, names_of, save_edits

TEACHER, COLLECTION = (
    collection_dir() / 'teachers' / 'candy_world.safetensors',
    collection_dir() / 'collection.safetensors',
)
PIECES = [
    '{b}',
    '{',
    '}',
    '{0}',
    '{{',
    '{run}',
    '[v2]',
    '[',
    '](x',
    '%',
    '%s',
    '%20',
    '"',
    "'",
    '`',
    ' ',
    '  ',
    '$HOME',
    '~',
    '*',
    '?',
]
PIECES += [
    'é',
    'e\u0301',
    '夜',
    '\U0001f600',
    '\n',
    '\t',
    '\x1b[31m',
    '-',
    '--',
    '#',
    '&',
    '|',
    ';',
    '<b>',
    '\\',
    '.',
    '..',
    'a',
    'B',
]
PIECES += [
    '\u2028',
    '\x85',
    '\u200b',
    '\udcff',
    ':',
    '=',
    '+',
    ',',
    '10',
    '012',
    '1e5',
    'x' * 200,
    '.lock',
    '.part',
    '[/red]',
    '[bold]',
]
ENDINGS = [
    '.safetensors',
    '.SAFETENSORS',
    '.png',
    '.PNG',
    '.jpg',
    '.json',
    '.yaml',
    '.jsonl',
    '.html',
    '.pt',
    '',
    '.zip',
    '.txt',
]
VALUES = [
    '0',
    '1',
    '-1',
    '010',
    '1e5',
    'nan',
    'inf',
    '1e999',
    '9' * 30,
    '9' * 5000,
    '',
    'true',
    '[]',
    '{',
    '{a: 1}',
    'a=b',
    '"',
    '1:20',
]
VALUES += [
    '2026-01-01',
    '0x10',
    '1_0',
    '.5',
    '٣',
    '!!python/x',
    '*a',
    '&a 1',
    '\n',
    'nano',
    'animal',
    'kohya',
    'candy_world',
    'cuda:99',
    'meta',
]
CONTENTS = [
    b'',
    b'\xff' * 40,
    '{"a": 1}'.encode('utf-16'),
    b'\xef\xbb\xbfid: a\ncategory: animal\nprompt: p\n',
    b'[1, 2',
    b'a: 010\n',
]
CONTENTS += [
    struct.pack('<Q', 10**9) + b'{',
    b'{"status": "finished", "run": 3}',
    'id: é\n'.encode('latin-1'),
    b'steps: [1, 2]\nlr: .nan\n',
]

names = (
    st.lists(st.sampled_from(PIECES), min_size=1, max_size=3)
    .map(''.join)
    .map(lambda s: 'dot' if s in ('.', '..') else s)
)
KINDS = ['absent', 'lora', 'lora', 'collection', 'picture', 'effect', 'bytes', 'folder', 'pipe', 'nowhere', 'itself']
kinds = st.sampled_from(KINDS)
files = st.tuples(names, st.sampled_from(ENDINGS), kinds, st.sampled_from(CONTENTS))
words = st.sampled_from(VALUES) | names
FILE, WORD = object(), object()


def asked(*fixed, options=()):
    "Command lines: `fixed` words, with generated files and words in their places, and some of the `options`."
    parts = [files if w is FILE else words if w is WORD else st.just(w) for w in fixed]
    more = [st.one_of(st.just([]), st.tuples(st.just(o), files | words).map(list)) for o in options]
    return st.tuples(st.tuples(*parts).map(list), *more).map(lambda p: [w for part in p for w in part])


experiments = sorted(p.stem for p in notebooks_dir().glob('*.ipynb'))
lines = st.one_of(
    asked('inspect', FILE, options=('--html', '--base')),
    asked('inspect', FILE, '--json'),
    asked('convert', FILE, FILE, options=('--dialect', '--alpha', '--dtype', '--base', '--allow-missing')),
    asked('resize', FILE, FILE, options=('--rank', '--energy')),
    asked('edit', FILE, WORD, '--list', options=('-c', '--seed', '--strength', '--sheet')),
    asked('edit', FILE, WORD, options=('-c', '--seeds', '--strength', '--size', '--device')),
    asked('run', FILE, '--list', options=('-p', '--seed', '--name')),
    st.sampled_from(experiments).flatmap(lambda e: asked('run', e, '--list', options=('-p',))),
    asked('adopt', FILE, FILE, options=('--prompt', '--category', '--id')),
    asked('runs', 'list', FILE),
    asked('runs', 'show', FILE),
    asked('runs', 'compare', FILE, FILE),
    asked('sweep', 'distill', FILE, '--out', FILE, options=('--slurm',)),
    asked('teach', FILE, '--out', FILE, '--device', 'quantum', options=('-p', '--base', '--budget')),
    asked(
        'distill',
        FILE,
        '-t',
        FILE,
        '--out',
        FILE,
        '--dry-run',
        options=('--general', '--init', '--extend', '--old', '-p'),
    ),
    asked('evaluate', FILE, FILE, '--out', FILE, '--device', 'quantum', options=('--teachers', '--pictures', '-p')),
)


def put(folder: Path, name, ending, kind, content) -> str:
    "Lays a generated file there, as far as the file system allows it; returns its name."
    path = folder / (name + ending)
    try:
        if path.is_fifo():  # of the same name, and writing into it would wait for a reader
            path.unlink()
        if kind in ('lora', 'collection'):
            shutil.copyfile(TEACHER if kind == 'lora' else COLLECTION, path)
        elif kind == 'picture':
            Image.new('RGB', (64, 64), (9, 99, 9)).save(path, 'PNG')
        elif kind == 'bytes':
            path.write_bytes(content)
        elif kind == 'pipe':
            os.mkfifo(path)
        elif kind in ('nowhere', 'itself'):
            path.symlink_to(path.name if kind == 'itself' else 'nowhere')
        elif kind in ('effect', 'folder'):
            for side in ('source', 'target'):
                (path / side).mkdir(parents=True, exist_ok=True)
                Image.new('RGB', (64, 64), (9, 99, 9)).save(path / side / 'a.png')
            (path / 'effect.yaml').write_bytes(
                content if kind == 'folder' else b'id: abc\ncategory: animal\nprompt: make it so\n'
            )
    except (OSError, ValueError):
        pass
    return path.name


def answers(line, folder: Path) -> None:
    "Asserts that a command line ends with a result or a sentence."
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    os.chdir(folder)
    words = [put(folder, *w) if isinstance(w, tuple) else w for w in line]
    done = CliRunner().invoke(cli.app, words)
    assert done.exception is None or isinstance(done.exception, SystemExit), (words, done.exception)
    assert done.exit_code in (0, 1, 2) and 'Traceback' not in done.output, (words, done.output)
    if done.exit_code:
        assert done.output.strip(), words


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    logging.disable(logging.WARNING)
    yield tmp_path / 'here'
    logging.disable(logging.NOTSET)


calm = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]


@settings(max_examples=25, deadline=None, suppress_health_check=calm)
@given(lines)
def test_a_command_line_never_ends_with_a_traceback(here, line):
    answers(line, here)


@pytest.mark.slow
@settings(max_examples=1500, deadline=None, suppress_health_check=calm)
@given(lines)
def test_no_command_line_of_fifteen_hundred_ends_with_a_traceback(here, line):
    answers(line, here)


NASTY = [
    '{run}',
    'a {b} [v2]',
    '100% "q"',
    "it's",
    'é',
    'e\u0301',
    '$HOME;&',
    'a:b',
    'x' * 250,
    '夜' * 80,
    '-p',
    'a\nb',
    'UPPER.SAFETENSORS',
]


@pytest.mark.parametrize('name', NASTY)
def test_files_of_any_name_are_written_where_they_were_asked_for(name, tmp_path):
    with replacing(tmp_path / name) as part:
        part.write_text('x')
    assert [p.name for p in tmp_path.iterdir()] == [name]
    (tmp_path / name).unlink()
    write_json(tmp_path / name, {name: name})
    assert read_json(tmp_path / name) == {name: name} and [p.name for p in tmp_path.iterdir()] == [name]
    with folder_lock(tmp_path / 'out' / name):
        assert [p.name for p in (tmp_path / 'out').iterdir()] == [name]


@pytest.mark.parametrize('name', [n for n in NASTY if len(n) < 200])
def test_effects_general_folders_and_loras_lie_in_folders_of_any_name(name, tmp_path):
    import numpy as np

    pixels, folder = np.zeros((64, 64, 3), 'u1'), tmp_path / name
    effect = write_effect(folder / name, id='a', category='animal', prompt=name, pairs=[(pixels, pixels)], stems=[name])
    found = load_effect(folder / name)
    assert found.prompt == name.strip() and found.stems == (unicodedata.normalize('NFC', name),) and effect == found
    assert (
        load_general(folder / 'g') == write_general(folder / 'g', [(pixels, name)]) if (folder / 'g').exists() else True
    )
    convert(TEACHER, folder / f'{name}.SAFETENSORS', 'kohya')
    assert read_lora(folder / f'{name}.SAFETENSORS').factors.keys() == read_lora(TEACHER).factors.keys()


def test_results_of_pictures_with_long_names_can_be_written(tmp_path):
    pictures = [tmp_path / f'{"夜" * 84}{k}.png' for k in range(2)]
    images = [Image.new('RGB', (8, 8)) for _ in pictures]
    edits = [Edit(n, 'e' * 64, 10**6, 0.123, im, im) for n, im in zip(names_of(pictures), images)]
    assert len({p.name for p in save_edits(edits, tmp_path / 'out')}) == 2


def test_braces_in_a_folder_are_no_parameters(tmp_path):
    head = "out: str = ''\nrun: str = 'run'\nseed: int = 0\nname: str = ''"
    body = "from collectionlora import core\ncore.save_run(f'{out}/{run}.json', core.run_info({}, seed, {}), {'name': name}, {})"
    cells = [nbformat.v4.new_code_cell(t, metadata={'tags': k}) for t, k in ((head, ['parameters']), (body, []))]
    path = tmp_path / 'a {seed}.ipynb'
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    out = tmp_path / '{run} {seed}' / '{0} [v2] 100% "q" \'é\''
    record = execute(path, out, 'smoke', {'name': '{seed}\u2028"'})
    assert record['metrics'] == {'name': '{seed}\u2028"'} and (out / 'smoke.ipynb').is_file()
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == ['{run} {seed}']


@pytest.mark.parametrize('coding', ['utf-8', 'ascii'])
def test_names_that_are_no_text_are_shown_and_read(coding, tmp_path):
    names = [b'a\xff.safetensors', 'é\u2028\x1b[31m.safetensors'.encode()]
    for name in names:
        shutil.copyfile(TEACHER, os.path.join(os.fsencode(tmp_path), name))
    bin = Path(sys.executable).with_name('collectionlora')
    for name in (*names, b'absent\xff.safetensors'):
        done = subprocess.run(
            [bin, 'inspect', name], cwd=tmp_path, env={**os.environ, 'PYTHONIOENCODING': coding}, capture_output=True
        )
        assert done.returncode == (2 if name.startswith(b'absent') else 0) and b'Traceback' not in done.stderr, (
            done.stderr
        )
        assert b'\x1b[31m' not in done.stdout


@pytest.mark.slow
def test_commands_that_read_a_file_start_at_once():
    sys.path.insert(0, str(repo_root() / 'tools'))
    import start_times

    found = start_times.times()
    assert {name: round(s, 2) for name, s in found.items() if s > start_times.BAR} == {}


QUICK = [['inspect', str(TEACHER)], ['info'], ['edit', '--list'], ['--help'], ['plan'], ['plan', '--base', 'nano']]


@pytest.mark.parametrize('words', QUICK)
def test_commands_that_read_a_file_need_no_torch(words):
    code = 'import sys\nfrom collectionlora.run.cli import app\napp(standalone_mode=False)\nprint(sorted(sys.modules))'
    done = subprocess.run([sys.executable, '-c', code, *words], capture_output=True, text=True, check=True)
    assert {'torch', 'transformers', 'diffusers', 'peft', 'scipy', 'matplotlib'}.isdisjoint(eval(done.stdout.splitlines()[-1]))
