"""CPU-seconds that the commands take which read a file or say something: `python tools/start_times.py [repeats]`.

Each is started in a process of its own, the smallest of some repeats counts. The bar is 0.7 seconds: such commands read
headers and configuration files and need neither torch nor diffusers."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COLLECTION = ROOT / 'data' / 'collection' / 'collection.safetensors'
BAR = 0.7
COMMANDS = {
    '--help': ['--help'],
    '--version': ['--version'],
    'info': ['info'],
    'inspect': ['inspect', str(COLLECTION)],
    'inspect --base nano': ['inspect', str(COLLECTION), '--base', 'nano'],
    'edit --list': ['edit', '--list'],
    'run distill --list': ['run', 'distill', '--list'],
    'plan': ['plan'],
    'plan --base nano': ['plan', '--base', 'nano', '--card', '24', '-p', 'rank=8'],
    'weights check': ['weights', 'check', str(ROOT / 'data' / 'effectbench')],
}
REFUSES = {'weights check'}  # answers with exit code 2 where no network lies


def cpu_seconds(words: list[str], refuses=False) -> float:
    "User and system seconds of one run of the command line. Raises `CalledProcessError` for another exit code."
    code = 'import sys\nfrom collectionlora.run.cli import main\nsys.argv[0] = "collectionlora"\nmain()'
    before = os.times()
    done = subprocess.run([sys.executable, '-c', code, *words], capture_output=True, cwd=ROOT)
    after = os.times()
    if done.returncode != 2 * refuses:
        done.check_returncode()
        raise subprocess.CalledProcessError(0, words)
    return after.children_user + after.children_system - before.children_user - before.children_system


def times(repeats: int = 3) -> dict[str, float]:
    "Name of a command -> CPU-seconds, the smallest of the repeats."
    return {name: min(cpu_seconds(words, name in REFUSES) for _ in range(repeats)) for name, words in COMMANDS.items()}


if __name__ == '__main__':
    found = times(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
    for name, seconds in found.items():
        print(f'{name:22s} {seconds:.2f} s{"" if seconds <= BAR else "  over the bar"}')
    sys.exit(any(seconds > BAR for seconds in found.values()))
