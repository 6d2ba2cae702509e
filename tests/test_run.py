"Bad input, reuse, failures, interrupts and locks of the experiment runner. Notebooks here are tiny, kernels are real."

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

from collectionlora import core
from collectionlora.run import signature
from collectionlora.run.execute import execute, RunFailed
from collectionlora.run.sweep import files_among, from_file, grid_points, sweep

HEAD = "out: str = ''\nrun: str = 'run'\nseed: int = 0\nn: int = 3\nname: str = 'x'\nsource: str = ''"
BODY = """from pathlib import Path
from collectionlora import core
Path(out, f'{run}.txt').write_text(f'{n} {seed}')
core.save_run(Path(out, f'{run}.json'), core.run_info(dict(n=n), seed, {}), dict(twice=2*n), {})"""


def notebook(path: Path, body=BODY, head=HEAD, tags=('parameters',)):
    cells = [nbformat.v4.new_code_cell(head, metadata={'tags': list(tags)}), nbformat.v4.new_code_cell(body)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


def refused(*args, **kw) -> str:
    with pytest.raises(core.UserError) as e:
        execute(*args, **kw)
    return str(e.value)


@pytest.mark.parametrize(
    'given, words',
    [
        ({'m': 1}, ['unknown key', "'m'"]),
        ({'nmae': 'y'}, ["did you mean 'name'?"]),
        ({'n': '3'}, ["'n'", 'must be int', "'3'"]),
        ({'n': True}, ["'n'", 'must be int']),
        ({'n': None}, ["'n'", 'must be int']),
        ({'name': 3}, ["'name'", 'must be str']),
        ({'out': 'there'}, ["'out'", 'set by the runner']),
    ],
)
def test_wrong_parameters_are_refused_before_anything_runs(tmp_path, given, words):
    said = refused(notebook(tmp_path / 'a.ipynb'), tmp_path / 'results', parameters=given)
    assert all(w in said for w in ['a.ipynb', *words]), said
    assert not (tmp_path / 'results').exists()


@pytest.mark.parametrize(
    'head, tags, words',
    [
        (HEAD, (), "tagged 'parameters'"),
        (HEAD.replace('seed: int = 0\n', ''), ('parameters',), "must declare 'seed'"),
        (HEAD + '\nm = n*2', ('parameters',), 'm = n * 2'),
        (HEAD + "\nm: int = 'three'", ('parameters',), 'must be int'),
        (HEAD + '\nimport os', ('parameters',), 'import os'),
    ],
)
def test_a_notebook_must_declare_its_parameters(tmp_path, head, tags, words):
    assert words in refused(notebook(tmp_path / 'a.ipynb', head=head, tags=tags), tmp_path / 'results')


def test_a_kernel_that_is_killed_is_a_sentence_and_a_failed_record(tmp_path):
    path = notebook(tmp_path / 'a.ipynb', 'import os, signal\nos.kill(os.getpid(), signal.SIGKILL)')
    with pytest.raises(
        RunFailed, match='a/r failed: its kernel died without a word: killed, or out of memory; the same command'
    ):
        execute(path, tmp_path / 'results', 'r')
    assert core.read_json(tmp_path / 'results' / 'r.json')['status'] == 'failed'


def test_unknown_experiment_absent_input_and_bad_run_name(tmp_path):
    assert 'no such experiment' in refused('no_such_experiment', tmp_path)
    path = notebook(tmp_path / 'a.ipynb')
    assert 'absent.png' in refused(path, tmp_path / 'results', inputs={'image': tmp_path / 'absent.png'})
    assert 'run name' in refused(path, tmp_path / 'results', run='../escape')
    assert not (tmp_path / 'results').exists()


def test_reuse_is_decided_by_content_only(tmp_path):
    path, data = notebook(tmp_path / 'a.ipynb'), tmp_path / 'data.txt'
    data.write_text('one')
    go = lambda **kw: execute(path, tmp_path / 'results', **{'inputs': {'source': data}, **kw})
    first = go()
    assert (
        not first['reused']
        and first['metrics'] == {'twice': 6}
        and first['run']['inputs'] == {'source': core.sha256_file(data)}
    )
    os.utime(data)  # another time, the same content
    assert go()['reused']
    assert go(parameters={'n': 3})['reused']  # a default spelt out
    data.write_text('two')
    second = go()
    assert not second['reused'] and second['key'] != first['key']
    (tmp_path / 'results' / 'run.txt').unlink()  # an output that is gone
    assert not go()['reused'] and go()['reused']
    notebook(path, BODY + '\nn')  # another notebook
    assert not go()['reused']
    with pytest.raises(core.UserError, match='is a finished run with seed 0, now 1;.*--replace'):
        go(seed=1)
    assert not go(seed=1, replace=True)['reused']


KEEPER = (
    BODY
    + """
work = Path(out, f'.{run}')
if (work/'made_with').exists() and (work/'made_with').read_text() != str(n): raise ValueError('checkpoint of another run')
work.mkdir(exist_ok=True)
(work/'made_with').write_text(str(n))
assert n < 10"""
)


def test_checkpoints_of_a_finished_run_go_and_those_of_an_unfinished_one_stay(tmp_path):
    path = notebook(tmp_path / 'a.ipynb', KEEPER)
    go = lambda n, **kw: execute(path, tmp_path / 'results', parameters={'n': n}, **kw)
    assert not go(1)['reused']
    with pytest.raises(core.UserError, match='is a finished run with n 1, now 2'):
        go(2)
    assert (tmp_path / 'results' / '.run' / 'made_with').read_text() == '1'
    assert not go(2, replace=True)['reused'] and go(2)['reused']
    with pytest.raises(RunFailed, match='AssertionError'):
        go(10, replace=True)
    with pytest.raises(RunFailed, match='checkpoint of another run'):
        go(3)
    assert (tmp_path / 'results' / '.run' / 'made_with').read_text() == '10'


def test_a_run_leaves_alone_what_belongs_to_a_run_whose_name_begins_with_its_own(tmp_path):
    path, out = notebook(tmp_path / 'a.ipynb'), tmp_path / 'results'
    execute(path, out, 'lr_0')
    kept = out / '.lr_0.5' / 'checkpoint.pt'
    kept.parent.mkdir()
    kept.write_text('hours of work')
    core.write_json(out / 'lr_0.5.json', {'status': 'interrupted', 'key': 'x'})
    mine = out / '.lr_0.rows.json'
    mine.write_text('of the run that is replaced')
    execute(path, out, 'lr_0', {'n': 4}, replace=True)
    assert kept.is_file() and not mine.exists()


def test_an_input_whose_name_ends_with_that_of_another_is_another_one(tmp_path):
    path = notebook(tmp_path / 'a.ipynb')
    for name in ('small', 'very_small'):
        (tmp_path / f'{name}.safetensors').write_text(name)
    execute(path, tmp_path / 'results', inputs={'source': tmp_path / 'very_small.safetensors'})
    assert '--replace' in refused(path, tmp_path / 'results', inputs={'source': tmp_path / 'small.safetensors'})


def test_a_cache_is_no_input(tmp_path):
    assert files_among({'cache': str(tmp_path), 'source': str(tmp_path)}) == {'source': str(tmp_path)}


def test_a_sweep_over_files_of_one_name_tells_them_apart(tmp_path):
    found = grid_points({'init': ['one/collection.safetensors', 'two/collection.safetensors']})
    assert len(found) == 2 and all(name.startswith('init=collection-') for name in found)
    with pytest.raises(core.UserError, match='listed twice'):
        grid_points({'init': ['one/collection.safetensors'] * 2})


def test_a_failure_leaves_a_record_that_is_no_result(tmp_path):
    path = notebook(tmp_path / 'a.ipynb', BODY + "\nif n < 5: raise OSError(28, 'No space left on device')")
    with pytest.raises(RunFailed, match='No space left'):
        execute(path, tmp_path / 'results')
    record = core.read_json(tmp_path / 'results' / 'run.json')
    assert record['status'] == 'failed' and 'OSError' in record['error'] and 'metrics' not in record
    assert any(
        'No space left' in str(c.get('outputs')) for c in nbformat.read(tmp_path / 'results' / 'run.ipynb', 4).cells
    )
    with pytest.raises(RunFailed):
        execute(path, tmp_path / 'results')  # tried again, not reused
    assert execute(path, tmp_path / 'results', parameters={'n': 7})['metrics'] == {'twice': 14}


def test_a_user_error_inside_a_notebook_stays_one_sentence(tmp_path):
    path = notebook(
        tmp_path / 'a.ipynb',
        "from collectionlora.core import UserError\nraise UserError('effect.yaml: prompt is empty')",
    )
    assert refused(path, tmp_path / 'results') == 'effect.yaml: prompt is empty'


def test_no_machine_paths_and_tidy_bars_in_what_is_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    execute(notebook(tmp_path / 'a.ipynb', BODY + "\nprint('1%\\r50%\\r100%')"), tmp_path / 'results')
    text = (tmp_path / 'results' / 'run.ipynb').read_text() + (tmp_path / 'results' / 'run.json').read_text()
    assert str(tmp_path) not in text and '50%' not in text.split('print(')[-1].split('outputs')[-1]


def test_bars_within_bars_are_kept_in_their_last_state(tmp_path):
    bars = "\nimport sys\nfrom tqdm import tqdm\nfor i in tqdm(range(3), desc='outer', mininterval=0):\n    for j in tqdm(range(40), desc=f'inner {i}', mininterval=0, leave=False): sys.stderr.flush()\nprint('said'); print('too')"
    execute(notebook(tmp_path / 'a.ipynb', BODY + bars), tmp_path / 'results')
    outputs = [
        o
        for c in nbformat.read(tmp_path / 'results' / 'run.ipynb', 4).cells
        if c.cell_type == 'code'
        for o in c.outputs
        if o.output_type == 'stream'
    ]
    said = ''.join(o.text for o in outputs)
    assert (
        said.count('outer') == 1
        and 'outer: 100%' in said
        and '39/40' not in said
        and '\x1b' not in said
        and 'said\ntoo' in said
        and len(outputs) < 4
    )


def test_a_notebook_may_hold_the_lock_of_its_own_folder_but_a_second_run_may_not(tmp_path):
    path = notebook(
        tmp_path / 'a.ipynb',
        f'from collectionlora.core import folder_lock\nwith folder_lock(out):\n{chr(10).join("    " + s for s in BODY.splitlines())}',
    )
    assert execute(path, tmp_path / 'results')['metrics'] == {'twice': 6}
    with core.folder_lock(tmp_path / 'results'):
        assert 'another run' in refused(path, tmp_path / 'results')


@pytest.mark.parametrize(
    'text, words',
    [
        ('n: 4\nlr: 1e-3\n', ["unknown key 'lr'"]),
        ('n: 4\nn: 5\n', ["'n' is given twice"]),
        ('seed: -1\n', ['seed is -1', 'whole number']),
        ('run: long\n', ["'run'", "'short'"]),
        ('- n\n', ['key: value']),
        ('n: [\n', ['not valid YAML']),
    ],
)
def test_a_runs_file_is_strict(tmp_path, monkeypatch, text, words):
    monkeypatch.setattr(signature, 'notebooks_dir', lambda: tmp_path)
    notebook(tmp_path / 'a.ipynb')
    (tmp_path / 'a').mkdir()
    (tmp_path / 'a' / 'short.yaml').write_text(text)
    with pytest.raises(core.UserError) as e:
        from_file(tmp_path / 'a' / 'short.yaml')
    assert 'short.yaml' in str(e.value) and all(w in str(e.value) for w in words)


def test_sweeps_check_everything_first_and_finish_what_they_can(tmp_path):
    path = notebook(tmp_path / 'a.ipynb', BODY + "\nassert n != 2, 'two is bad'")
    with pytest.raises(core.UserError, match='listed twice'):
        sweep(path, {'n': [1, 1]}, tmp_path / 's')
    with pytest.raises(core.UserError, match='must be a list'):
        sweep(path, {'n': 1}, tmp_path / 's')
    with pytest.raises(core.UserError, match='must be int'):
        sweep(path, {'n': [1, 'b']}, tmp_path / 's')
    assert not (tmp_path / 's').exists()
    with pytest.raises(RunFailed, match='1 of 3 runs failed.*two is bad'):
        sweep(path, {'n': [1, 2, 3]}, tmp_path / 's')
    assert [core.read_json(tmp_path / 's' / f'n={n}' / f'n={n}.json')['status'] for n in (1, 2, 3)] == [
        'finished',
        'failed',
        'finished',
    ]


SLEEPER = """import time
from pathlib import Path
try:
    Path(out, 'started').write_text('')
    time.sleep(60)
except KeyboardInterrupt:
    Path(out, 'checkpoint').write_text('saved')
    raise"""
START = 'import sys; from collectionlora.run.execute import execute; execute(sys.argv[1], sys.argv[2])'


def started(tmp_path):
    "A process that is in the middle of a run."
    path = notebook(tmp_path / 'a.ipynb', SLEEPER)
    process = subprocess.Popen(
        [sys.executable, '-c', START, path, tmp_path / 'results'],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    for _ in range(600):
        if (tmp_path / 'results' / 'started').exists():
            return process, path
        if process.poll() is not None:
            break
        time.sleep(0.1)
    process.kill()
    raise AssertionError(process.stderr.read())


def test_ctrl_c_lets_the_notebook_save_and_says_how_to_go_on(tmp_path):
    process, _ = started(tmp_path)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode and 'goes on from the last checkpoint' in said
    assert (tmp_path / 'results' / 'checkpoint').read_text() == 'saved'
    assert core.read_json(tmp_path / 'results' / 'run.json')['status'] == 'interrupted'


def test_a_killed_run_is_not_taken_for_a_finished_one_and_frees_its_folder(tmp_path):
    process, path = started(tmp_path)
    assert 'another run' in refused(path, tmp_path / 'results')
    process.kill()
    process.wait()
    assert core.read_json(tmp_path / 'results' / 'run.json')['status'] == 'running'
    assert not execute(notebook(path), tmp_path / 'results')['reused']


def test_words_about_code_do_not_make_a_run_stale_and_code_does(tmp_path):
    from collectionlora.run.keys import code_hash

    book = lambda name, source: notebook(tmp_path / f'{name}.ipynb', body=source)
    plain = code_hash(book('a', 'def f(x): return x + 1\ny = f(1)'))
    assert plain == code_hash(
        book('b', '# a remark\ndef f(x):\n    "Adds one."\n    return x + 1\n\ny = f(1)    # two')
    )
    assert (
        len(
            {
                plain,
                code_hash(book('c', 'def f(x): return x + 2\ny = f(1)')),
                code_hash(book('d', 'def f(x): return x + 1\ny = "Adds one."')),
            }
        )
        == 3
    )


def test_another_input_in_the_same_place_is_refused_and_a_changed_one_is_not(tmp_path):
    path = notebook(tmp_path / 'a.ipynb')
    for name in ('one', 'two'):
        (tmp_path / f'{name}.txt').write_text(name)
    go = lambda name: execute(path, tmp_path / 'results', inputs={'source': tmp_path / f'{name}.txt'})
    first = go('one')
    with pytest.raises(core.UserError, match=r"is a finished run with source '.*one.txt', now '.*two.txt'"):
        go('two')
    assert core.read_json(tmp_path / 'results' / 'run.json')['key'] == first['key']
    (tmp_path / 'two.txt').write_text('one')  # another place, the same content
    assert go('two')['reused']
    (tmp_path / 'one.txt').write_text('another')
    assert not go('one')['reused']


MEMBER = """from collectionlora.core import UserError
if n == 2: raise UserError('n: two is not wanted')
if n == 3: raise OSError('three is bad')
core.save_run(Path(out, f'{run}.json'), core.run_info(dict(n=n), seed, {}), dict(twice=2*n, table=dict(ours=dict(bcr=0.5))), {})"""


def test_a_sweep_loses_only_those_that_fail_and_its_table_knows_nested_numbers(tmp_path):
    import csv

    path = notebook(tmp_path / 'a.ipynb', BODY + '\n' + MEMBER)
    with pytest.raises(RunFailed, match='2 of 4 runs failed: n=2: n: two is not wanted | n=3: .*three is bad'):
        sweep(path, {'n': [2, 3, 1, 4]}, tmp_path / 's')
    rows = list(csv.DictReader((tmp_path / 's' / 'table.csv').open()))
    assert [(r['run'], r['status']) for r in rows] == [
        ('n=2', 'failed'),
        ('n=3', 'failed'),
        ('n=1', 'finished'),
        ('n=4', 'finished'),
    ]
    assert rows[2]['table.ours.bcr'] == '0.5' and rows[3]['twice'] == '8' and 'not wanted' in rows[0]['error']
    again = [core.read_json(tmp_path / 's' / f'n={n}' / f'n={n}.json') for n in (1, 4)]
    with pytest.raises(RunFailed, match='1 of 3 runs failed'):  # where finished runs have other parameters
        sweep(path, {'n': [1, 4, 2], 'name': ['x']}, tmp_path / 's')
    assert [core.read_json(tmp_path / 's' / f'n={n}' / f'n={n}.json') for n in (1, 4)] == again


def test_runs_of_a_sweep_do_not_overwrite_each_others_files(tmp_path):
    from collectionlora.run.records import record_file, records_in

    body = BODY + "\nPath(out, 'drawn').mkdir(exist_ok=True)\nPath(out, 'drawn', 'n.txt').write_text(str(n))"
    path = notebook(tmp_path / 'a.ipynb', body)
    sweep(path, {'n': [1, 2]}, tmp_path / 's')
    assert [(tmp_path / 's' / f'n={n}' / 'drawn' / 'n.txt').read_text() for n in (1, 2)] == ['1', '2']
    reused = sweep(path, {'n': [1, 2]}, tmp_path / 's')
    assert [r['metrics']['twice'] for r in reused.values()] == [2, 4]
    assert list(records_in(tmp_path)) == ['s/n=1', 's/n=2']
    assert record_file(tmp_path / 's' / 'n=1') == tmp_path / 's' / 'n=1' / 'n=1.json'


def test_the_table_is_written_when_a_sweep_is_interrupted(tmp_path, monkeypatch):
    from collectionlora.run import sweep as sweeps

    def stopped(experiment, out, name, *more):
        if name == 'n=2':
            raise KeyboardInterrupt('stopped')
        info = {'run': {'parameters': {'n': 1}, 'seed': 0, 'inputs': {}}, 'meta': {}}
        core.save_run(out / f'{name}.json', info, {'loss': 0.5}, {})

    monkeypatch.setattr(sweeps, 'execute', stopped)
    with pytest.raises(KeyboardInterrupt):
        sweep(notebook(tmp_path / 'a.ipynb'), {'n': [1, 2, 3]}, tmp_path / 's')
    assert (tmp_path / 's' / 'table.csv').read_text().splitlines()[1].startswith('n=1,finished,0,0.5')


def test_run_names_fit_a_line_and_say_what_varies():
    from collectionlora.run.sweep import grid_points

    long = [{'lr': 0.1 * k, 'kept': 'the same everywhere'} for k in range(3)]
    names = list(grid_points({'settings': long, 'seed': [0, 1], 'steps': [5]}))
    assert names[0] == 'settings=lr=0.0,seed=0' and not any('kept' in n or 'steps' in n for n in names)
    many = list(grid_points({f'a_parameter_with_a_long_name_{k}': [1, 2] for k in range(5)}))
    assert len(set(many)) == 32 and max(map(len, many)) <= 60
    assert list(grid_points({'file': ['there/one.safetensors', 'there/two.safetensors']})) == ['file=one', 'file=two']


def test_a_run_file_says_what_it_needs(tmp_path, monkeypatch):
    from collectionlora.run.sweep import needs_of

    monkeypatch.setattr(signature, 'notebooks_dir', lambda: tmp_path)
    notebook(tmp_path / 'a.ipynb')
    (tmp_path / 'a').mkdir()
    file = tmp_path / 'a' / 'short.yaml'
    file.write_text('needs: [source]\nn: 4\n')
    assert from_file(file) == ('a', 'short', {'n': 4}, 0) and needs_of(file) == ['source']
    for text, words in (('needs: [sauce]\n', "'sauce', which is no parameter"), ('needs: source\n', 'must be a list')):
        file.write_text(text)
        with pytest.raises(core.UserError, match=words):
            from_file(file)


def bare(*args, cwd):
    "papermill alone, as its own command line starts it."
    program = [sys.executable, '-m', 'papermill', '--no-progress-bar', '--log-output', *map(str, args)]
    return subprocess.run(program, capture_output=True, text=True, cwd=cwd)


def test_papermill_alone_runs_an_experiment_and_the_notebook_refuses_what_it_does_not_know(tmp_path):
    path = core.notebooks_dir() / 'effects.ipynb'
    given = ['-p', 'out', 'mine', '-p', 'effects', 1, '-p', 'pairs', 2, '-p', 'general', 2]
    done = bare(path, 'done.ipynb', *given, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert 'Unable to parse' not in done.stderr and 'unknown parameter' not in done.stderr
    record = core.read_json(tmp_path / 'mine' / 'smoke.json')
    assert record['status'] == 'finished' and record['run']['parameters']['pairs'] == 2
    command = record['meta']['command']
    assert command.startswith('papermill ') and command.endswith('-p effects 1 -p pairs 2 -p general 2')
    read = Path(next(w for w in command.split() if w.endswith('.ipynb')))
    assert 'nbs/experiments/effects.ipynb' in command
    assert not read.is_absolute() and (tmp_path / read).samefile(path)  # so that it can be repeated there
    wrong = bare(path, 'wrong.ipynb', *given[:2], 'other', '-p', 'effcts', 1, cwd=tmp_path)
    assert wrong.returncode and "unknown key 'effcts'; did you mean 'effects'?" in wrong.stderr
    assert not (tmp_path / 'other').exists()


def test_papermill_reads_the_parameters_of_every_experiment_as_we_do(caplog):
    from papermill.inspection import inspect_notebook

    for path in sorted(core.notebooks_dir().glob('*.ipynb')):
        assert set(inspect_notebook(str(path))) == set(signature.declared(path.stem)), path.name
    assert not caplog.records


def test_every_experiment_refuses_what_papermill_would_pass_over():
    for path in sorted(core.notebooks_dir().glob('*.ipynb')):
        after = [s for s, tags in signature.code_cells(path) if 'parameters' not in tags]
        assert sum(f"run_folder(out, '{path.stem}')" in s for s in after) == 1, path.name


MODULES = {
    '__init__.py': 'def __getattr__(name):\n    from .apart import add\n    return add',
    'sums.py': 'def add(a, b):\n    return a + b',
    'apart.py': 'from .sums import add',
    'room/__init__.py': 'from .near import *',
    'room/near.py': 'from . import beside\nfrom ..sums import add',
    'room/beside.py': 'def lazy():\n    from ..other.far import x\n    return x',
    'other/__init__.py': '',
    'other/far.py': 'x = 1',
}


def package(folder: Path, **changed) -> Path:
    "A package of rooms whose modules import each other by relative imports; returns its `__init__.py`."
    for name, source in (MODULES | changed).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(source)
    return folder / '__init__.py'


def test_a_module_that_is_reached_through_relative_imports_decides_the_key(tmp_path, monkeypatch):
    import collectionlora
    from collectionlora.run.keys import code_hash, modules_of

    path = notebook(tmp_path / 'a.ipynb', 'from collectionlora import room')

    def code(name, **changed):
        init = package(tmp_path / name / 'collectionlora', **changed)
        monkeypatch.setattr(collectionlora, '__file__', str(init))
        return code_hash(path)

    plain = code('plain')
    found = {
        p.relative_to(tmp_path / 'plain' / 'collectionlora').as_posix()
        for p in modules_of('import collectionlora.room')
    }
    assert found == {'room/__init__.py', 'room/near.py', 'room/beside.py', 'sums.py', 'other/far.py'}
    assert (
        code('same', **{'other/far.py': '"A number."\nx = 1  # one', 'apart.py': 'from .sums import add as plus'})
        == plain
    )
    for name in ('room/__init__.py', 'room/near.py', 'room/beside.py', 'sums.py', 'other/far.py'):
        assert code(name.replace('/', '-'), **{name: MODULES[name] + '\ny = 2'}) != plain, name


@pytest.mark.parametrize(
    'source, files',
    [
        ('from collectionlora import anything', {'__init__.py', 'apart.py', 'sums.py'}),
        ('import collectionlora\ncollectionlora.anything()', {'__init__.py', 'apart.py', 'sums.py'}),
        ('from collectionlora import apart, __version__', {'apart.py', 'sums.py'}),
        ('import collectionlora\ncollectionlora.__file__', set()),
        ('from collectionlora.other.far import x', {'other/far.py'}),
    ],
)
def test_what_the_package_offers_at_its_top_counts_and_its_modules_do_not_lead_there(
    tmp_path, monkeypatch, source, files
):
    import collectionlora
    from collectionlora.run.keys import modules_of

    init = package(tmp_path / 'collectionlora')
    monkeypatch.setattr(collectionlora, '__file__', str(init))
    assert {p.relative_to(init.parent).as_posix() for p in modules_of(source)} == files


def test_a_module_of_before_counts_as_all_rooms_that_its_functions_have_moved_into():
    from collectionlora.files.earlier import EARLIER
    from collectionlora.run.keys import modules_of

    for name, rooms in EARLIER.items():
        now = {p for room in rooms for p in modules_of(f'import collectionlora.{room}')}
        assert set(modules_of(f'from collectionlora.{name} import anything')) == now and len(now) >= len(rooms)


LOADED = 'import sys, collectionlora.engine.loop; print(*(m.__file__ for n, m in sys.modules.items() if n.startswith("collectionlora.") and getattr(m, "__file__", None)))'


def test_a_key_counts_every_module_that_an_import_loads():
    from collectionlora.run.keys import modules_of

    said = subprocess.run([sys.executable, '-c', LOADED], capture_output=True, text=True, check=True).stdout
    loaded = {
        Path(f)
        for f in said.split()
        if Path(f).name not in ('_compat.py', 'earlier.py') and Path(f).read_text().strip()
    }
    counted = set(modules_of('import collectionlora.engine.loop'))
    assert len(loaded) > 20 and not loaded - counted


def test_a_command_can_be_repeated_where_it_was_typed(tmp_path, monkeypatch):
    notebook = core.notebooks_dir() / 'teacher.ipynb'
    monkeypatch.delenv('COLLECTIONLORA_COMMAND', raising=False)
    monkeypatch.setattr('sys.argv', ['/usr/bin/papermill', str(notebook), str(tmp_path / 'made.ipynb')])
    for place in (tmp_path, core.repo_root()):
        monkeypatch.chdir(place)
        program, read, _ = core.command().split()
        assert program == 'papermill' and not Path(read).is_absolute() and Path(read).samefile(notebook)
