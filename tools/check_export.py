"Do the notebooks, exported and cleaned, give exactly the files that are here? Tried on a copy, so nothing here is touched."

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WATCHED = ('nbs/**/*.ipynb', 'collectionlora/**/*.py')
GENERATED = {'collectionlora/_modidx.py'}  # nbdev's index, rebuilt by every export and not tracked


def hashes(root: Path) -> dict:
    files = [p for pattern in WATCHED for p in root.glob(pattern) if '.ipynb_checkpoints' not in p.parts]
    return {
        name: hashlib.sha256(p.read_bytes()).hexdigest()
        for p in files
        if (name := p.relative_to(root).as_posix()) not in GENERATED
    }


def exported(root: Path, copy: Path) -> dict:
    for name in ('nbs', 'collectionlora'):
        shutil.copytree(root / name, copy / name, ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints'))
    shutil.copy(root / 'settings.ini', copy)
    tool = lambda name: str(Path(sys.executable).parent / name)
    env = {**os.environ, 'PYTHONPATH': str(copy)}
    for name in ('nbdev_export', 'nbdev_clean'):
        subprocess.run([tool(name)], cwd=copy, check=True, env=env)
    return hashes(copy)


def main() -> int:
    before = hashes(ROOT)
    with tempfile.TemporaryDirectory() as tmp:
        after = exported(ROOT, Path(tmp))
    stale = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    for name in stale:
        print(f'stale: {name} (run nbdev_export and nbdev_clean, then commit)', file=sys.stderr)
    print(f'export and clean: {len(before)} files, {len(stale)} stale')
    return bool(stale)


if __name__ == '__main__':
    sys.exit(main())
