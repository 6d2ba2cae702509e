"""How dense are the notebooks? Prints a table of every room and refuses what goes over the bounds below.

`python tools/style.py` checks, `python tools/style.py --table` shows every notebook, `python tools/style.py ROOT` another checkout."""

import ast
import json
import re
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

WIDTH = 120  # characters of an exported line
TOO_WIDE = 0.05  # largest share of exported lines that may be wider
PAPER = 150  # exported lines of a notebook in method/
CELL = 60  # lines of an exported cell
SMALL_CELL, SMALL_CELLS = 25, 0.5  # at least this share of exported cells has at most so many lines
LESSON = 1 / 3  # lesson lines per exported line, in every room
ROOMS = ('method', 'engine', 'bases', 'world', 'files', 'judge', 'use', 'run')
PAGES = ('experiments', 'analysis')  # hardly anything is exported here: checked for faults, not for the share of lessons
DRAWING = {'world/pen', 'world/draw', 'world/things', 'world/styles'}  # semicolons are allowed where pictures are drawn


@dataclass
class Notebook:
    "What a notebook's cells count to."

    name: str
    exported: int = 0
    lesson: int = 0
    wide: int = 0
    cells: list[int] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def lines_of(source: str) -> list[str]:
    "Lines that hold something, directives apart."
    return [line for line in source.splitlines() if line.strip() and not line.startswith('#|')]


def faults_of(source: str, drawing: bool, page: bool = False) -> list[str]:
    """Side-effect comprehensions, walruses inside calls, and statements joined by semicolons.

    page: a cell whose last expression is shown, so that a comprehension there is no side effect."""
    found, tree = [], ast.parse(source)
    shown = tree.body[-1] if page and tree.body else None
    comprehensions = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
    for node in ast.walk(tree):
        if node is not shown and isinstance(node, ast.Expr) and isinstance(node.value, comprehensions):
            found.append(f'line {node.lineno}: a comprehension for its side effects')
        given = [*node.args, *(k.value for k in node.keywords)] if isinstance(node, ast.Call) else []
        if any(isinstance(a, ast.NamedExpr) for a in given):
            found.append(f'line {node.lineno}: a walrus inside a call')
        for block in (getattr(node, name, None) for name in ('body', 'orelse', 'finalbody')):
            rows = [s.lineno for s in block] if isinstance(block, list) else []
            joined = [row for row, n in Counter(rows).items() if n > 1]
            found += [] if drawing else [f'line {row}: statements joined by a semicolon' for row in joined]
    return found


def faults_of_page(path: Path) -> list[str]:
    "Faults of every cell of code in a notebook of experiments/ or analysis/, exported or not."
    found = []
    for i, cell in enumerate(json.loads(path.read_text(encoding='utf-8'))['cells']):
        if cell['cell_type'] == 'code':
            source = ''.join(cell['source'])
            found += [f'cell {i}, {fault}' for fault in faults_of(source, drawing=False, page=True)]
    return found


def count(path: Path, name: str) -> Notebook:
    "The figures of one notebook."
    found, follows = Notebook(name), False
    for i, cell in enumerate(json.loads(path.read_text(encoding='utf-8'))['cells']):
        source = ''.join(cell['source'])
        lines = lines_of(source)
        if cell['cell_type'] != 'code' or not re.match(r'#\|\s*export', source):
            found.lesson += len(lines)
            follows = False
            if cell['cell_type'] == 'code':
                lesson = faults_of(source, name in DRAWING, page=True)
                found.faults += [f'cell {i}, {fault}' for fault in lesson]
            continue
        imports = all(isinstance(s, (ast.Import, ast.ImportFrom, ast.Expr)) for s in ast.parse(source).body)
        found.exported += len(lines)
        found.wide += sum(len(line) > WIDTH for line in lines)
        if follows and not imports:
            found.faults.append(f'cell {i}: exported code right behind exported code, without a word what it is for')
        if not imports:
            found.cells.append(len(lines))
            follows = True
        found.faults += [f'cell {i}, {fault}' for fault in faults_of(source, name in DRAWING)]
    return found


def over(room: str, notebooks: list[Notebook]) -> list[str]:
    "The bounds that a room goes over, in sentences."
    said = [f'{n.name}: {fault}' for n in notebooks for fault in n.faults]
    for n in notebooks:
        if room == 'method' and n.exported > PAPER:
            said.append(f'{n.name}: {n.exported} exported lines, at most {PAPER} in method/')
        said += [f'{n.name}: an exported cell of {size} lines, at most {CELL}' for size in n.cells if size > CELL]
    exported, lesson = sum(n.exported for n in notebooks), sum(n.lesson for n in notebooks)
    wide, cells = sum(n.wide for n in notebooks), [size for n in notebooks for size in n.cells]
    if wide > TOO_WIDE * exported:
        said.append(f'{room}: {wide} of {exported} exported lines are wider than {WIDTH}')
    if lesson < LESSON * exported:
        said.append(f'{room}: {lesson} lesson lines for {exported} exported ones, at least a third')
    if sum(size <= SMALL_CELL for size in cells) < SMALL_CELLS * len(cells):
        said.append(f'{room}: fewer than {SMALL_CELLS:.0%} of the exported cells have at most {SMALL_CELL} lines')
    return said


def show(name: str, notebooks: list[Notebook]) -> None:
    "One line of the table."
    exported, cells = sum(n.exported for n in notebooks), sorted(size for n in notebooks for size in n.cells)
    middle = cells[len(cells) // 2] if cells else 0
    wide = sum(n.wide for n in notebooks)
    lesson = sum(n.lesson for n in notebooks) / max(1, exported)
    print(f'{name:24}{exported:9}{wide:7}{middle:13}{max(cells, default=0):9}{lesson:12.2f}')


def main(arguments: list[str]) -> int:
    "Prints the table; 1 if anything goes over a bound."
    paths = [a for a in arguments if not a.startswith('-')]
    nbs = Path(paths[0] if paths else Path(__file__).resolve().parent.parent) / 'nbs'
    rooms = {room: sorted((nbs / room).glob('*.ipynb')) for room in ROOMS}
    said = []
    print(f'{"":24}{"exported":>9}{"wide":>7}{"median cell":>13}{"largest":>9}{"lesson/exp":>12}')
    for room, files in rooms.items():
        notebooks = [count(file, f'{room}/{file.stem}') for file in files]
        show(room, notebooks)
        if '--table' in arguments or room == 'method':
            for notebook in notebooks:
                show(f'  {notebook.name}', [notebook])
        said += over(room, notebooks)
    for room in PAGES:
        for file in sorted((nbs / room).glob('*.ipynb')):
            said += [f'{room}/{file.stem}: {fault}' for fault in faults_of_page(file)]
    for sentence in said:
        print(sentence, file=sys.stderr)
    return bool(said)


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
