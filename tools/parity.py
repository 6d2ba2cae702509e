"""How far our loaders are from the packages they replace: `python tools/parity.py` writes results/tables/parity.md.

It runs the tests that compare them at random weights (extra `eval`) and keeps the largest differences that they print."""

import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / 'results' / 'tables' / 'parity.md'
PACKAGES = ('open_clip_torch', 'dreamsim', 'lpips', 'timm', 'transformers', 'torch')


def measured() -> dict[str, float]:
    "What was compared -> largest difference. Raises where a test fails or is skipped."
    asked = [sys.executable, '-m', 'pytest', '-q', '-s', '-p', 'no:randomly', 'tests/test_judge_networks.py']
    done = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True)
    if done.returncode or 'skipped' in done.stdout:
        raise SystemExit(
            f'{done.stdout[-2000:]}\nnothing is written: a test failed, or the extra `eval` is not installed'
        )
    found = re.findall(r'parity: (.+): ([\d.e+-]+)$', done.stdout, re.MULTILINE)
    return {what: max(float(far) for name, far in found if name == what) for what, _ in found}


def render(found: dict[str, float]) -> str:
    "The table."
    lines = ['| compared, random weights, preparation included | largest difference |', '|---|---|']
    lines += [f'| {what} | {far:.0e} |' for what, far in found.items()]
    named = ', '.join(f'{name} {version(name)}' for name in PACKAGES)
    return '\n'.join([*lines, '', f'The tests refuse a difference of 1e-5 or more. Versions: {named}.']) + '\n'


if __name__ == '__main__':
    text = render(measured())
    TABLE.write_text(text, encoding='utf-8')
    print(text)
