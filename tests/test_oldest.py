"The golden matrix on the oldest diffusers and PEFT that settings.ini allows, in an environment made for it and thrown away."
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


def oldest() -> dict[str, str]:
    "The lower bounds in settings.ini."
    return dict(re.findall(r'"(diffusers|peft)>=([\w.]+)', (ROOT/'settings.ini').read_text()))


def call(*args, **kw): return subprocess.run([str(a) for a in args], capture_output=True, text=True, cwd=ROOT, **kw)


def index_answers(folder) -> bool:
    "Whether pip can fetch anything at all."
    return call(*PIP, 'download', '-q', '--no-deps', '-d', folder, 'diffusers').returncode == 0


@pytest.fixture(scope='module')
def python(tmp_path_factory):
    "An interpreter that sees the old versions first and everything else from here."
    folder = tmp_path_factory.mktemp('old')
    venv.create(folder/'venv', with_pip=False)
    interpreter = folder/'venv'/'bin'/'python'
    site = call(interpreter, '-c', 'import sysconfig; print(sysconfig.get_path("purelib"))').stdout.strip()
    with open(os.path.join(site, 'outer.pth'), 'w') as f: f.write(f'import site; site.addsitedir({sysconfig.get_path("purelib")!r})\n')
    done = call(*PIP, '--python', interpreter, 'install', '-q', '--no-deps', *(f'{k}=={v}' for k, v in oldest().items()))
    if done.returncode and not index_answers(folder): pytest.skip('pip reaches no package index, so the oldest diffusers and peft cannot be installed')
    assert not done.returncode, done.stderr[-2000:]
    return interpreter


@pytest.mark.slow
def test_the_golden_matrix_holds_on_the_oldest_versions(python):
    found = call(python, '-c', 'import diffusers, peft; print(diffusers.__version__, peft.__version__)')
    versions = dict(zip(('diffusers', 'peft'), found.stdout.split()))
    assert versions.keys() == oldest().keys() and all(v.startswith(oldest()[k]) for k, v in versions.items()), found.stdout + found.stderr[-2000:]
    done = call(python, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', *MATRIX)
    assert done.returncode == 0 and ' passed' in done.stdout, done.stdout[-4000:]
