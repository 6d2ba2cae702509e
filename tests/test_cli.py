"The command line as a user meets it: help, mistakes, exit codes, and an installed wheel far from the checkout."

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from typer.testing import CliRunner

from collectionlora import core
from collectionlora.run import cli

ROOT = core.repo_root()
PICTURE = ROOT / 'assets' / 'readme_1.jpg'


def call(*args):
    return CliRunner().invoke(cli.app, [str(a) for a in args])


@pytest.mark.parametrize(
    'args, words',
    [
        (['inspect', 'absent.safetensors'], ['absent.safetensors']),
        (['run', 'nano_bse', '--list'], ["did you mean 'nano_base'?"]),
        (['run', 'nano_base', '-p', 'stpes=3'], ["did you mean 'steps'?"]),
        (['run', 'nano_base', '-p', 'steps=three'], ["'steps'", 'must be int']),
        (['run', 'nano_base', '-p', 'steps=3', '-p', 'steps=4'], ['given twice']),
        (['run', 'nano_base', '-p', 'steps'], ['name=value']),
        (['run', 'there/absent.yaml'], ['absent.yaml', 'no such file']),
        (['teach', 'absent-folder', '--out', 'x'], ['absent-folder', 'effect.yaml']),
        (['edit', PICTURE, 'candy_wrld'], ["did you mean 'candy_world'"]),
        (['edit', PICTURE, '--sheet', PICTURE], ['--sheet', 'one of the pictures']),
        (['edit', PICTURE, '--sheet', 'sheet.gif'], ['sheet.gif', '.png, .jpg']),
        (['edit', PICTURE.parent, '--out', PICTURE.parent], ['--out', 'name another folder']),
        (['edit', PICTURE, '--out', PICTURE], ['--out', 'is a file']),
        (['edit', PICTURE, '--size', 'huge'], ['--size', "'huge'"]),
        (['edit', __file__, 'clay', '--collection', 'x', '--base', 'absent-base'], ['test_cli.py']),
        (['demo', '--budget', 'lavish'], ["'lavish'"]),
        (['convert', 'absent.safetensors', 'to.safetensors'], ['absent.safetensors']),
        (['inspect', 'absent.safetensors', '--html', 'page.html'], ['absent.safetensors']),
        (['run', core.notebooks_dir() / 'distill' / 'demo.yaml'], ['says nothing about effects']),
        (['run', 'nano_base', '-p', 'steps={[1]: 2}'], ['is no word']),
        (['edit', PICTURE, 'candy_world', '--device', 'gpu'], ["'gpu' is unknown"]),
    ],
)
def test_a_mistake_is_one_sentence_and_code_2(tmp_path, monkeypatch, args, words):
    monkeypatch.chdir(tmp_path)
    result = call(*args)
    assert result.exit_code == 2, result.output
    assert all(w in result.output for w in words), result.output
    assert 'Traceback' not in result.output and not list(tmp_path.iterdir())


def test_every_command_has_help_with_an_example():
    for command in cli.app.registered_commands:
        name = command.name or command.callback.__name__
        result = call(name, '--help')
        assert result.exit_code == 0 and command.callback.__doc__.split('.')[0][:40] in result.output
        if name not in ('info', 'rebase'):
            assert 'Example' in result.output, name


def test_a_file_is_converted_there_and_back_and_shown_as_a_page(tmp_path):
    import torch

    from collectionlora.files.dialects import Lora, lora_hash
    from collectionlora.files.lora import read_lora, write_lora

    g = torch.Generator().manual_seed(0)
    lora = Lora(
        {'transformer_blocks.0.attn.to_q': (torch.randn(2, 8, generator=g), torch.randn(6, 2, generator=g))}, {}
    )
    entry = {'id': 'clay', 'category': 'animal', 'trigger': 'zorvik', 'prompt': 'zorvik, clay', 'description': 'clay'}
    write_lora(tmp_path / 'a.safetensors', lora, {'collectionlora.effects': [entry]})
    for source, to, dialect in (('a', 'b', 'kohya'), ('b', 'c', 'canonical')):
        assert (
            call(
                'convert', tmp_path / f'{source}.safetensors', tmp_path / f'{to}.safetensors', '--dialect', dialect
            ).exit_code
            == 0
        )
    assert lora_hash(read_lora(tmp_path / 'c.safetensors')) == lora_hash(lora)
    assert call('convert', tmp_path / 'a.safetensors', tmp_path / 'd.safetensors', '--dialect', 'koyha').exit_code == 2
    assert call('inspect', tmp_path / 'a.safetensors', '--html', tmp_path / 'page.html').exit_code == 0
    assert 'zorvik' in (tmp_path / 'page.html').read_text() and '<html' in (tmp_path / 'page.html').read_text()


def test_a_file_cannot_harm_or_deceive_who_looks_at_it(tmp_path):
    import torch

    from collectionlora.files.dialects import Lora
    from collectionlora.files.lora import write_lora

    lora, file = (
        Lora({'transformer_blocks.0.attn.to_q': (torch.ones(2, 8), torch.ones(6, 2))}, {}),
        tmp_path / 'a.safetensors',
    )
    write_lora(
        file, lora, {'collectionlora.effects': [{'id': 'clay', 'category': 'animal', 'trigger': '[red] dog [/x]'}]}
    )
    shown, before = call('inspect', file), file.read_bytes()
    assert shown.exit_code == 0 and '[red] dog [/x]' in shown.output
    assert (
        call('inspect', file, '--html', file).exit_code == 2 and file.read_bytes() == before
    )  # its own page is not written over it
    file.write_bytes(before.replace(b'dog', b'cat'))
    assert (
        call('inspect', file, '--html', tmp_path / 'page.html').exit_code == 2 and not (tmp_path / 'page.html').exists()
    )
    file.write_bytes(before)
    (tmp_path / 'plain').write_text('')
    refused = call('convert', file, tmp_path / 'plain' / 'b.safetensors')
    assert refused.exit_code == 1 and 'plain' in refused.output and isinstance(refused.exception, SystemExit)


def test_a_smaller_collection_is_written_with_its_card(tmp_path):
    import torch

    from collectionlora.files.dialects import Lora
    from collectionlora.files.header import catalogue, read_header
    from collectionlora.files.lora import read_lora, write_lora

    g = torch.Generator().manual_seed(0)
    lora = Lora(
        {
            f'transformer_blocks.0.attn.{n}': (torch.randn(4, 8, generator=g), torch.randn(6, 4, generator=g))
            for n in ('to_q', 'to_k')
        },
        {},
    )
    whole = write_lora(
        tmp_path / 'a.safetensors',
        lora,
        {
            'collectionlora.effects': [{'id': 'clay', 'category': 'animal', 'trigger': 'zorvik'}],
            'collectionlora.sampling': {'times': [1.0, 0.5], 'steps': 2, 'stochastic': True, 'cfg': 1.0},
        },
    )
    done = call('resize', tmp_path / 'a.safetensors', tmp_path / 'b.safetensors', '--rank', 2)
    assert (
        done.exit_code == 0
        and read_lora(tmp_path / 'b.safetensors').rank == 2
        and catalogue(tmp_path / 'b.safetensors')[0]['id'] == 'clay'
    )
    assert (
        read_header(tmp_path / 'b.safetensors')['collectionlora.parents'][0]['sha256'] == whole
        and 'zorvik' in (tmp_path / 'b.README.md').read_text()
    )
    assert (tmp_path / 'b.comfyui.json').is_file() and call(
        'resize', tmp_path / 'a.safetensors', tmp_path / 'c.safetensors'
    ).exit_code == 2
    assert call('resize', tmp_path / 'a.safetensors', tmp_path / 'c.safetensors', '--energy', 0.9).exit_code == 0


def test_alpha_may_be_told_where_the_file_is_silent(tmp_path):
    import safetensors.torch
    import torch

    from collectionlora.files.lora import read_lora

    name = 'transformer_blocks.0.attn.to_q'
    safetensors.torch.save_file(
        {
            f'base_model.model.{name}.lora_A.weight': torch.ones(2, 8),
            f'base_model.model.{name}.lora_B.weight': torch.ones(6, 2),
        },
        tmp_path / 'p.safetensors',
    )
    assert call('convert', tmp_path / 'p.safetensors', tmp_path / 'q.safetensors').exit_code == 2
    assert call('convert', tmp_path / 'p.safetensors', tmp_path / 'q.safetensors', '--alpha', 8).exit_code == 0
    assert torch.equal(read_lora(tmp_path / 'q.safetensors').factors[name][1], torch.full((6, 2), 4.0))


def test_files_given_to_a_run_are_known_by_content(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'a.txt').write_text('a')
    from collectionlora.run.sweep import files_among

    assert files_among(
        {
            'collection': 'a.txt',
            'steps': 3,
            'fm': '',
            'effects': [],
            'teachers': ['a.txt', '.'],
            'preset': 'default',
            'ranks': [1, 2],
            'other': ['a.txt', 'b.txt'],
        }
    ) == {'collection': 'a.txt', 'teachers': ['a.txt', '.']}


def test_given_name_seed_and_single_settings_win_over_a_run_file(tmp_path, monkeypatch):
    from collectionlora.run import execute as runner

    asked, folder = {}, tmp_path / 'rates'
    folder.mkdir()
    (folder / 'mine.yaml').write_text('seed: 2\nsteps: 3\nsettings: {fake_warmup: 1, fake_per_generator: 2}\n')
    monkeypatch.setattr(
        runner,
        'execute',
        lambda experiment, out, name, values, inputs, seed, processes: (
            asked.update(name=name, seed=seed, values=values) or {'metrics': {}}
        ),
    )
    assert call('run', folder / 'mine.yaml', '-o', tmp_path).exit_code == 0 and (asked['name'], asked['seed']) == (
        'mine',
        2,
    )
    assert (
        call(
            'run',
            folder / 'mine.yaml',
            '-o',
            tmp_path,
            '--seed',
            0,
            '--name',
            'yours',
            '-p',
            'settings={fake_warmup: 4}',
        ).exit_code
        == 0
    )
    assert asked == {
        'name': 'yours',
        'seed': 0,
        'values': {'steps': 3, 'settings': {'fake_warmup': 4, 'fake_per_generator': 2}},
    }


def test_a_sweep_knows_its_files_by_content(tmp_path, monkeypatch):
    from collectionlora.run import sweep

    asked = []
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'a.txt').write_text('a')
    monkeypatch.setattr(sweep, 'execute', lambda experiment, out, name, point, inputs, *more: asked.append(inputs))
    sweep.sweep('evaluate', {'collection': ['a.txt'], 'images': [1, 2]}, tmp_path / 'out')
    assert asked == [{'collection': 'a.txt'}] * 2


def test_a_sweep_shows_what_others_found_when_a_run_fails(tmp_path, monkeypatch):
    from collectionlora.run import sweep

    def execute(experiment, out, name, point, *more, **kw):
        failed = point['steps'] == 3
        run = {'name': name, 'seed': 0, 'parameters': {'steps': point['steps']}}
        record = {'status': 'failed' if failed else 'finished', 'run': run}
        metrics = {} if failed else {'metrics': {'a_long_name_of.a_number.first': 0.5, 'a_long_name_of.a_number.last': 2}}
        out.mkdir(parents=True, exist_ok=True)
        (out / f'{name}.json').write_text(json.dumps({**record, **metrics, 'cost': {}}))
        if failed:
            raise core.UserError('three is bad')

    monkeypatch.setenv('COLUMNS', '60')
    monkeypatch.setattr(sweep, 'execute', execute)
    (tmp_path / 'grid.yaml').write_text('steps: [2, 3, 4]')
    done = call('sweep', 'teacher', tmp_path / 'grid.yaml', '-o', tmp_path / 's')
    said = done.output
    assert done.exit_code == 1 and '1 of 3 runs failed' in said and 'three is bad' in said
    assert 'steps=2' in said and 'failed' in said and 'first' in said and 'last' in said
    assert (tmp_path / 's' / 'table.csv').is_file() and (tmp_path / 's' / 'table.png').is_file()


def test_help_and_mistakes_do_not_load_torch():
    code = "import sys\nfrom collectionlora.run.cli import app\ntry: app(sys.argv[1:])\nexcept SystemExit as e: print('torch' in sys.modules, e.code)"
    for args, last in ((['--help'], 'False 0'), (['run', 'nano_bse'], 'False 2')):
        done = subprocess.run([sys.executable, '-c', code, *args], capture_output=True, text=True)
        assert done.stdout.splitlines()[-1] == last, done.stdout + done.stderr


def test_assignments_read_values_as_yaml():
    assert cli.assignments(['a=1e-4', 'b=x', 'c=[1, 2]', "d=''", 'e=true']) == {
        'a': 1e-4,
        'b': 'x',
        'c': [1, 2],
        'd': '',
        'e': True,
    }


FILE = core.collection_dir() / 'collection.safetensors'
HEAVY = """import sys
from collectionlora.run.cli import app
try: app(sys.argv[1:])
except SystemExit as e: print({'torch', 'papermill', 'nbformat', 'diffusers'} & set(sys.modules) or 'light', e.code)"""


@pytest.mark.parametrize(
    'args, code',
    [
        (['--version'], 0),
        (['--help'], 0),
        (['info'], 0),
        (['run', 'distill', '--list'], 0),
        (['run', 'distill', '-p', 'stpes=3'], 2),
        (['runs', 'list'], 0),
        (['edit', '--list'], 0),
        (['inspect', core.collection_dir() / 'collection.safetensors'], 0),
        (['inspect', core.collection_dir() / 'collection.safetensors', '--json'], 0),
        (['inspect', core.collection_dir() / 'collection.safetensors', '--base', 'nano'], 0),
        (['inspect', 'absent.safetensors'], 2),
        (['runs', 'show', 'no_such/run'], 2),
    ],
)
def test_what_needs_no_weights_loads_neither_torch_nor_papermill(args, code):
    done = subprocess.run([sys.executable, '-c', HEAVY, *map(str, args)], capture_output=True, text=True)
    assert (done.stdout.splitlines() or [''])[-1] == f'light {code}', done.stdout[-300:] + done.stderr


@pytest.mark.parametrize(
    'args', [['--help'], ['info'], ['inspect', FILE], ['inspect', FILE, '--base', 'nano'], ['runs', 'list']]
)
def test_commands_that_read_a_file_start_at_once(args):
    "At most .7 CPU-seconds on a machine of its own; twice that where others share its caches. Best of three."

    def seconds():
        before = os.times()
        subprocess.run(
            [Path(sys.executable).with_name('collectionlora'), *map(str, args)], capture_output=True, check=True
        )
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    assert min(seconds() for _ in range(3)) < 1.4


def test_the_layers_of_a_base_follow_from_its_config(tmp_path):
    from collectionlora.bases.slots import layer_sizes
    from collectionlora.files.checked import config_layers

    said = core.read_json(core.nano_dir() / 'transformer' / 'config.json')
    for k, more in enumerate(({}, dict(num_layers=60, num_attention_heads=24, attention_head_dim=128))):
        core.write_json(tmp_path / str(k) / 'transformer' / 'config.json', said | more)
        assert list(config_layers(tmp_path / str(k)).items()) == list(layer_sizes(tmp_path / str(k)).items())
    for text, answer in (('[]', 'holds list'), ('{', 'not valid JSON')):
        (tmp_path / '0' / 'transformer' / 'config.json').write_text(text)
        assert answer in core.refusal(config_layers, tmp_path / '0')
    core.write_json(tmp_path / '0' / 'transformer' / 'config.json', said | {'_class_name': 'Other'})
    assert config_layers(tmp_path / '0') is None


def test_the_version_is_told():
    from collectionlora import __version__

    assert call('--version').output.strip() == f'collectionlora {__version__}'


def helps():
    "(words that call a command, its help and that of each of its parameters)."
    import typer

    for app, before in ((cli.app, []), (cli.runs, ['runs'])):
        for name, command in typer.main.get_command(app).commands.items():
            if not hasattr(command, 'commands'):
                yield [*before, name], [command.help, *(p.help for p in command.params if p.help)]


@pytest.mark.parametrize('budget', cli.MINUTES)
def test_help_says_how_long_the_demonstration_takes(budget):
    low, high = cli.MINUTES[budget]
    said = ' '.join(call('demo', '--help').output.replace('│', ' ').split())
    assert f'{budget}: {low} to {high} minutes' in said
    folder = ROOT / 'results' / 'main_job' / ('demo' if budget == 'demo' else f'demo-{budget}')
    taken = sum(core.read_json(p).get('cost', {}).get('wall_seconds', 0) for p in folder.glob('*.json')) / 60
    assert low <= taken <= high
    low, high = cli.MINUTES['demo']
    assert f'collectionlora demo, which takes {low} to {high} minutes' in ' '.join(call('--help').output.split())


def test_help_shows_brackets_as_they_are(monkeypatch):
    from rich.markup import render

    monkeypatch.setenv('COLUMNS', '400')
    monkeypatch.setenv('TERM', 'dumb')
    seen = 0
    for words, texts in helps():
        shown = ' '.join(call(*words, '--help').output.split())
        for text in texts:
            plain = ' '.join(render(text).plain.split())
            assert plain[:70] in shown, (words, plain)
            seen += '[' in plain
    assert seen and '`name: [values]` lines' in ' '.join(call('sweep', '--help').output.split())


def test_every_command_about_runs_has_an_example():
    for command in cli.runs.registered_commands:
        assert 'Example' in call('runs', command.name, '--help').output


def test_a_file_is_not_written_over_itself(tmp_path):
    import torch
    from collectionlora.files.dialects import Lora
    from collectionlora.files.lora import write_lora

    file = tmp_path / 'a.safetensors'
    write_lora(file, Lora({'transformer_blocks.0.attn.to_q': (torch.ones(2, 8), torch.ones(6, 2))}, {}))
    (tmp_path / 'link.safetensors').symlink_to(file)
    before = file.read_bytes()
    for to in (file, tmp_path / 'link.safetensors', tmp_path / '..' / tmp_path.name / 'a.safetensors'):
        for args in (['convert', file, to], ['resize', file, to, '--rank', 1]):
            said = call(*args)
            assert said.exit_code == 2 and 'is the file that is read' in said.output
    assert file.read_bytes() == before


def record_of(path, seed=0, **metrics):
    "A finished run's record on disk; words other than metrics are not made up here."
    info = {'run': {'parameters': {'steps': 10 + seed, 'effects': ['a']}, 'seed': seed, 'inputs': {'base': 'f' * 64}}}
    core.save_run(path, {**info, 'meta': {'commit': 'c' * 40, 'command': 'run x'}}, metrics, {'wall_seconds': 75.0})


def test_runs_are_listed_shown_and_compared(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('COLUMNS', '200')
    interval = {'value': 0.25, 'low': 0.125, 'high': 0.5}
    record_of(tmp_path / 'rates' / 'low.json', 0, table={'ours': {'bcr': interval}}, loss=[1, 2], lora='ab' * 32)
    record_of(tmp_path / 'rates' / 'high.json', 1, table={'ours': {'bcr': {**interval, 'value': 0.375}}})
    (tmp_path / 'rates' / 'high.png').write_bytes(b'')
    (tmp_path / 'rates' / 'high_er.png').write_bytes(b'')
    core.write_json(tmp_path / 'rates' / 'other.json', {'no': 'record'})
    core.write_json(tmp_path / 'rates' / '.hidden' / 'x.json', {'status': 'finished', 'run': {}})
    listed = call('runs', 'list', tmp_path).stdout.splitlines()
    assert [line.split()[0] for line in listed] == ['run', 'rates/high', 'rates/low']
    assert 'finished' in listed[2] and '75 s' in listed[2] and 'table.ours.bcr 0.25 [0.125, 0.5]' in listed[2]
    shown = call('runs', 'show', 'rates/low').stdout
    assert 'rates/low.json' in shown and '0.25 [0.125, 0.5]' in shown and 'abab' not in shown
    assert '┡' not in shown  # columns without names have no header
    both = call('runs', 'compare', 'rates/low', 'rates/high').stdout
    words = both.split()
    assert 'steps' in words and '10' in words and '11' in words and 'effects' not in words and 'base' not in words
    assert '0.375 [0.125, 0.5]' in both and 'rates/high.png' in both and 'high_er' not in both
    assert call('runs', 'show', tmp_path / 'rates' / 'other.json').exit_code == 2
    assert call('runs', 'list', tmp_path / 'absent').exit_code == 2


@pytest.mark.parametrize(
    'text',
    ['{"status": "finished", "run": 3}', '{"status": 1}', '{"status": "x", "run": {"seed": 0, "parameters": []}}'],
)
def test_json_that_only_begins_like_a_record_is_none(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'a.json').write_text(text)
    record_of(tmp_path / 'b.json')
    for args in (['show', 'a.json'], ['compare', 'b.json', 'a.json']):
        done = call('runs', *args)
        assert done.exit_code == 2 and 'a.json: is no record of a run' in done.output
    assert call('runs', 'list', '.').exit_code == 0 and 'a  ' not in call('runs', 'list', '.').output


def test_five_hundred_runs_are_listed_at_once(tmp_path):
    import time

    from collectionlora.run.records import key_numbers, records_in

    found = {f'row {k}': {'bcr': {'value': 0.5, 'low': 0.25, 'high': 0.75}, 'seconds': 1.5} for k in range(40)}
    for k in range(500):
        record_of(tmp_path / f'experiment{k % 10}' / f'run{k}.json', k, table=found)
    core.write_json(tmp_path / 'large.json', [0.5] * 400_000)  # no record, so its content is not read
    took = []
    for _ in range(3):  # a busy machine slows one of them
        began = time.process_time()
        records = records_in(tmp_path)
        first = [key_numbers(r['metrics'], 1) for r in records.values()]
        took.append(time.process_time() - began)
    assert min(took) < 0.5 and len(records) == 500 and all(first)


def test_a_run_ends_with_its_path_and_the_numbers_that_matter(tmp_path, monkeypatch):
    from collectionlora.run import execute as runner

    monkeypatch.chdir(tmp_path)
    metrics = {'oracle': True, 'judged': {'bcr': {'value': 0.25, 'low': 0.125, 'high': 0.5}}, 'loss': [0.5] * 300}
    monkeypatch.setattr(runner, 'execute', lambda *args, **kw: {'metrics': metrics})
    said = call('run', 'evaluate', '-o', 'there', '-n', 'mine').stdout.splitlines()
    assert said == ['there/mine.json', 'judged.bcr: 0.25 [0.125, 0.5]']


def test_a_run_file_without_its_inputs_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = call('run', core.notebooks_dir() / 'branches' / 'demo.yaml')
    assert said.exit_code == 2 and 'needs demo' in said.output and not list(tmp_path.iterdir())
    assert call('run', core.notebooks_dir() / 'branches' / 'demo.yaml', '--list').exit_code == 0


@pytest.fixture(scope='module')
def wheel_site(tmp_path_factory):
    "A folder that holds what the wheel installs, and nothing of the checkout."
    folder = tmp_path_factory.mktemp('wheel')
    pip = [sys.executable, '-m', 'pip', '--disable-pip-version-check', '-q']
    subprocess.run(
        [
            *pip,
            'wheel',
            '--no-deps',
            '--no-build-isolation',
            '--no-index',
            '-w',
            folder / 'dist',
            copy_of_checkout(folder),
        ],
        check=True,
    )
    (wheel,) = (folder / 'dist').glob('*.whl')
    subprocess.run([*pip, 'install', '--no-deps', '--no-index', '--target', folder / 'site', wheel], check=True)
    return folder / 'site'


def copy_of_checkout(folder: Path) -> Path:
    "What git tracks or would track, so that building leaves nothing in the checkout."
    listed = subprocess.run(
        ['git', 'ls-files', '-co', '--exclude-standard', '-z'], cwd=ROOT, capture_output=True, check=True
    ).stdout.decode()
    for name in filter(None, listed.split('\0')):
        if not (ROOT / name).is_file():
            continue
        (folder / 'src' / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / 'src' / name).write_bytes((ROOT / name).read_bytes())
    return folder / 'src'


def in_wheel(site: Path, cwd: Path, code: str):
    "Runs code with the wheel's files first, without the environment's own start-up files (so not the editable checkout)."
    path = [str(site), sysconfig.get_path('purelib')]
    return subprocess.run(
        [sys.executable, '-S', '-c', f'import sys; sys.path[:0] = {path!r}\n{code}'],
        cwd=cwd,
        capture_output=True,
        text=True,
    )


def test_a_wheel_carries_notebooks_and_data_and_no_development_tools(wheel_site, tmp_path):
    done = in_wheel(
        wheel_site,
        tmp_path,
        """
from collectionlora import core
from collectionlora.run import execute
assert not core.in_checkout() and core.results_dir().parent == __import__('pathlib').Path.cwd()
print(sorted(p.stem for p in core.notebooks_dir().glob('*.ipynb')))
print(sorted(p.relative_to(core.data_dir()).as_posix() for p in core.data_dir().rglob('*') if p.is_file()))
assert execute.declared('nano_base')['steps'].type == 'int'
assert not {'nbdev', 'fastcore'} & {n.split('.')[0] for n in sys.modules}
""",
    )
    assert done.returncode == 0, done.stderr
    notebooks, data = map(eval, done.stdout.splitlines())
    assert notebooks == sorted(p.stem for p in (ROOT / 'nbs' / 'experiments').glob('*.ipynb'))
    listed = subprocess.run(
        ['git', 'ls-files', '-z', 'data'], cwd=ROOT, capture_output=True, check=True
    ).stdout.decode()
    assert set(data) == {name.removeprefix('data/') for name in listed.split('\0')[:-1]}


def test_a_wheels_command_works_far_from_the_checkout(wheel_site, tmp_path):
    done = in_wheel(
        wheel_site, tmp_path, "from collectionlora.run.cli import app\nsys.argv = ['collectionlora', '--help']\napp()"
    )
    assert done.returncode == 0 and 'distill' in done.stdout, done.stderr
    metadata = (next(wheel_site.glob('collectionlora-*.dist-info')) / 'METADATA').read_text()
    required = [line for line in metadata.splitlines() if line.startswith('Requires-Dist') and 'extra' not in line]
    assert any('peft>=0.21.2' in line for line in required) and not any(
        name in line for line in required for name in ('nbdev', 'fastcore')
    )


def test_a_wheel_runs_its_notebooks_in_a_folder_of_the_users(wheel_site, tmp_path):
    "The kernel, too, must find the wheel's package: PYTHONPATH reaches it, and goes before the editable checkout."
    args = ['run', 'effects', '-o', 'mine', '-p', 'effects=1', '-p', 'pairs=2', '-p', 'general=2']
    go = lambda: subprocess.run(
        [sys.executable, '-c', 'from collectionlora.run.cli import main; main()', *args],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, 'PYTHONPATH': str(wheel_site)},
    )
    done = go()
    assert done.returncode == 0, done.stderr
    record = core.read_json(tmp_path / 'mine' / 'run.json')
    assert record['status'] == 'finished' and record['meta']['commit'] is None  # a wheel knows no checkout
    assert len(list((tmp_path / 'mine' / 'effects').glob('*/effect.yaml'))) == 1
    again = go()
    assert 'reused' in again.stderr and again.stdout == done.stdout


def test_a_lora_is_compared_with_a_bases_layers(tmp_path):
    import torch

    from collectionlora.files.dialects import Lora
    from collectionlora.files.lora import read_lora, write_lora
    from collectionlora.bases.slots import layer_sizes

    sizes = layer_sizes(core.nano_dir())
    some = {n: (torch.ones(2, i), torch.ones(o, 2)) for n, (i, o) in sizes.items() if not n.endswith('_mod.1')}
    file, to = tmp_path / 'some.safetensors', tmp_path / 'to.safetensors'
    write_lora(file, Lora(some))
    assert 'not counted' in call('inspect', file).stdout
    assert json.loads(call('inspect', file, '--json', '--base', 'nano').stdout)['report']['missing'] == len(
        sizes
    ) - len(some)
    refused = call('convert', file, to, '--base', 'nano')
    assert refused.exit_code == 2 and '_mod.1' in refused.stderr and not to.exists()
    assert (
        call('convert', file, to, '--base', 'nano', '--allow-missing', '*_mod.1', '--dtype', 'bfloat16').exit_code == 0
    )
    assert len(read_lora(to).factors) == len(some) and read_lora(to).meta['dtype'] == 'BF16'
    assert call('convert', file, to, '--dtype', 'float8').exit_code == 2
    assert call('inspect', file, '--base', tmp_path).exit_code == 2
