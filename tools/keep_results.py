"""Makes runs in results/ ready for git: `python tools/keep_results.py results/<experiment>/<run>.json ...`

The record loses what only its own machine needs, the executed notebook goes, and the run's picture becomes one JPEG.
Rows (.rows.jsonl) are packed and stay: whoever keeps a run decides whether something reads them. So does a long history
of training steps."""

import re
import sys
from pathlib import Path

from PIL import Image

from collectionlora.core import pack
from collectionlora.run.kept import keep_record

QUALITY = 78


def to_jpeg(folder: Path, run: str) -> None:
    "One picture of a run, `<run>.pictures.png` or else `<run>.png`, becomes `<run>.jpg`; its other PNG files go."
    pictures = [p for name in (f'{run}.pictures.png', f'{run}.png') if (p := folder / name).is_file()]
    if pictures:
        Image.open(pictures[0]).convert('RGB').save(folder / f'{run}.jpg', quality=QUALITY, optimize=True)
    for picture in folder.glob(f'{run}.*png'):
        picture.unlink()
    card = folder / f'{run}.md'
    if card.is_file():
        text = card.read_text(encoding='utf-8')
        card.write_text(re.sub(rf'\({re.escape(run)}(\.pictures)?\.png\)', f'({run}.jpg)', text), encoding='utf-8')


def keep(record: Path) -> None:
    "Tidies one run, given by its record."
    folder, run = record.parent, record.stem
    (folder / f'{run}.ipynb').unlink(missing_ok=True)
    to_jpeg(folder, run)
    for rows in folder.glob(f'{run}.*rows.jsonl'):
        pack(rows)
    keep_record(record, record)


if __name__ == '__main__':
    for name in sys.argv[1:]:
        keep(Path(name))
