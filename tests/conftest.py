"Tests run offline, on one thread per process and without a display; set before torch or matplotlib is imported."

import os
from unittest.mock import patch

for name in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS'):
    os.environ.setdefault(name, '1')
os.environ.update(HF_HUB_OFFLINE='1', TRANSFORMERS_OFFLINE='1', MPLBACKEND='agg', TOKENIZERS_PARALLELISM='false')

import pytest

NO_TORCHVISION = """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name.split('.')[0] == 'torchvision' else find(name, package)
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] == 'torchvision': raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
"""  # the first lines of a program for a process in which torchvision cannot be found


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp('world')


@pytest.fixture(scope='module')
def world(folder):
    "Base, teachers, effects, general stream and cache of a small world on disk; see test_distill.make_world."
    from test_distill import make_world, open_world

    args = open_world(folder, make_world(folder))
    yield args
    args[1].close()


@pytest.fixture
def roles(world):
    "The backbone of `world` with a random student and fake score of rank 2."
    import torch

    b = world[0].backbone
    for k, role in enumerate(('student', 'fake')):
        b.add_role(role, 2, seed=k)
        with torch.no_grad():
            b.flat(role).normal_(0, 0.1, generator=torch.Generator().manual_seed(10 + k))
    yield b
    b.checkpointing(False)
    b.offload(False)
    for role in ('student', 'fake'):
        b.remove(role)


@pytest.fixture(scope='module')
def browser():
    "Chromium, opened by playwright; both are extras of a machine."
    import shutil

    api = pytest.importorskip('playwright.sync_api')
    found = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
    if not found:
        pytest.skip('no Chromium on this machine')
    with api.sync_playwright() as p:
        opened = p.chromium.launch(executable_path=found, args=['--no-sandbox'])
        yield opened
        opened.close()


@pytest.fixture(autouse=True)
def environment_stays():
    "What a command that runs in this process sets for itself (`serve` hides progress bars) ends with its test."
    with patch.dict(os.environ):
        yield
