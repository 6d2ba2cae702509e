"The golden matrix on the oldest and on the newest diffusers and PEFT that settings.ini allows, in environments made for it and thrown away."

import os
import re
import subprocess
import sys
import sysconfig
import venv

import pytest

from collectionlora.core import repo_root

ROOT = repo_root()
MATRIX = ['tests/test_lora_files.py', 'tests/test_edit.py', '-k', 'golden or real or peft or rank or stock']
PIP = [sys.executable, '-m', 'pip', '--disable-pip-version-check']
ALLOWED = dict(re.findall(r'"(diffusers|peft)(>=[^"]+)"', (ROOT / 'settings.ini').read_text()))
OLDEST = {name: re.match(r'>=([\w.]+)', bounds)[1] for name, bounds in ALLOWED.items()}
WANTED = {
    'oldest': [f'{name}=={version}' for name, version in OLDEST.items()],
    'newest': ['--upgrade', *(name + bounds for name, bounds in ALLOWED.items())],
}


def call(*args):
    return subprocess.run([str(a) for a in args], capture_output=True, text=True, cwd=ROOT)


def index_answers(folder) -> bool:
    "Whether pip can fetch anything at all."
    return call(*PIP, 'download', '-q', '--no-deps', '-d', folder, 'diffusers').returncode == 0


@pytest.fixture(scope='module', params=WANTED)
def python(request, tmp_path_factory):
    "(which, an interpreter that sees the wanted versions first and everything else from here)."
    folder = tmp_path_factory.mktemp(request.param)
    venv.create(folder / 'venv', with_pip=False)
    interpreter = folder / 'venv' / 'bin' / 'python'
    site = call(interpreter, '-c', 'import sysconfig; print(sysconfig.get_path("purelib"))').stdout.strip()
    with open(os.path.join(site, 'outer.pth'), 'w') as f:
        f.write(f'import site; site.addsitedir({sysconfig.get_path("purelib")!r})\n')
    done = call(*PIP, '--python', interpreter, 'install', '-q', '--no-deps', *WANTED[request.param])
    if done.returncode and not index_answers(folder):
        pytest.skip(f'pip reaches no package index, so the {request.param} diffusers and peft cannot be installed')
    assert not done.returncode, done.stderr[-2000:]
    return request.param, interpreter


@pytest.mark.slow
def test_the_golden_matrix_holds_on_the_oldest_and_newest_versions(python):
    which, interpreter = python
    found = call(interpreter, '-c', 'import diffusers, peft; print(diffusers.__version__, peft.__version__)')
    versions = dict(zip(('diffusers', 'peft'), found.stdout.split()))
    assert len(versions) == 2 and (which == 'newest' or all(v.startswith(OLDEST[k]) for k, v in versions.items())), (
        found.stdout + found.stderr[-2000:]
    )
    done = call(interpreter, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', *MATRIX)
    assert done.returncode == 0 and ' passed' in done.stdout, f'{which}: {versions}\n{done.stdout[-4000:]}'
