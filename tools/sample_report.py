"""The sample report that README links to: `python tools/sample_report.py` writes assets/report.html.

It is the page of the kept demonstration (results/main_job/demo), written by the notebook that writes every report. Its
pictures are cut out of the kept sheet, one subject of each effect, because git keeps no single pictures of a run."""

import shutil
import tempfile
from pathlib import Path

from PIL import Image

from collectionlora.core import read_json, write_json
from collectionlora.judge.gate import read_rows
from collectionlora.judge.tables import ENCODED, REFERENCES
from collectionlora.run.chain import full_steps
from collectionlora.run.execute import execute
from collectionlora.run.kept import CELL, GAP, LEFT, TOP

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / 'results' / 'main_job' / 'demo'
PAGE = ROOT / 'assets' / 'report.html'
SHOWN = 144  # pixels of a picture's side in the page


def cut(sheet: Image.Image, row: int, column: int) -> Image.Image:
    "One picture of a sheet that `kept.contact_sheet` drew."
    left, top = LEFT + column * (CELL + GAP), TOP + row * (CELL + GAP)
    return sheet.crop((left, top, left + CELL, top + CELL)).resize((SHOWN, SHOWN), Image.Resampling.BICUBIC)


def cut_out(demo: Path, index: Path) -> None:
    "Writes the first subject of each effect out of a kept sheet, and the index that a report reads."
    rows, effects = read_rows(demo / 'evaluation.rows.jsonl'), read_json(demo / 'evaluation.json')['metrics']['effects']
    judged = [m for m in dict.fromkeys(r.method for r in rows) if m not in (*REFERENCES, ENCODED)]
    columns, pictures = ['source', 'target', *judged], []
    index.parent.mkdir()
    with Image.open(demo / 'pictures.jpg') as kept:  # perhaps smaller than it was drawn
        wide = LEFT + len(columns) * (CELL + GAP)
        sheet = kept.resize((wide, round(kept.height * wide / kept.width)), Image.Resampling.BICUBIC)
        rows_shown = (sheet.height - TOP) / (CELL + GAP)
        subjects = round(rows_shown) // len(effects)
        if abs(rows_shown - subjects * len(effects)) > 0.05:
            raise SystemExit(f'{kept.filename}: {kept.size} pixels are not {len(columns)} columns of {len(effects)} effects')
        for e, effect in enumerate(effects):
            image = next(r.image for r in rows if r.effect == effect)
            for c, column in enumerate(columns):
                cut(sheet, e * subjects, c).save(index.parent / f'{effect}-{c}.png')
                pictures.append(dict(effect=effect, image=image, column=column, file=f'{effect}-{c}.png'))
    write_json(index, dict(columns=columns, pictures=pictures))


def write(page: Path = PAGE, demo: Path = DEMO) -> None:
    "The report of a kept demonstration as one file."
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / demo.name
        shutil.copytree(demo, copy)
        cut_out(demo, copy / 'evaluation-pictures' / 'index.json')
        others = [copy / f'{name}.json' for name in ('prompts', 'targets', 'collection', 'all_in_one')]
        inputs = dict(evaluations=[copy / 'evaluation.json'], records=[*sorted(copy.glob('teacher.*.json')), *others])
        execute('report', copy, 'report', {'full_steps': full_steps(copy / 'collection.json')}, inputs, 0)
        shutil.copyfile(copy / 'report.html', page)


if __name__ == '__main__':
    write()
    print(f'{PAGE}: {PAGE.stat().st_size / 1000:.0f} kB')
