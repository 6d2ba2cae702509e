"""Makes the pictures in notebooks small: `python tools/small_outputs.py [nbs/a.ipynb ...]`, all notebooks without names.

A PNG output becomes a PNG of few colours if it is a drawing and a JPEG if it has pictures. To the eye it stays the
same. Lines that a progress bar has left are taken out."""

import base64
import io
import json
import re
import sys
from pathlib import Path

from PIL import Image, ImageChops, ImageStat

ROOT = Path(__file__).resolve().parent.parent
QUALITY = 75  # of JPEG


def of_few_colours(white: Image.Image) -> Image.Image | None:
    """The picture in the fewest colours of 16 to 128 in which no pixel is off by 40 of 255 levels, or else in 256; None
    if it is off by more than a level on average, as pictures are and drawings are not."""
    for colours in (16, 32, 64, 128, 256):
        few = white.quantize(colours)
        off = ImageStat.Stat(ImageChops.difference(white, few.convert('RGB')))
        if max(off.mean) < 1 and (colours == 256 or max(most for _, most in off.extrema) < 40):
            return few
    return None


def smallest(png: bytes) -> tuple[str, bytes]:
    "(MIME type, bytes) of a picture: few colours for drawings, else JPEG."
    picture, new = Image.open(io.BytesIO(png)), io.BytesIO()
    if picture.mode == 'P' and len(picture.getcolors()) <= 128:  # has been here before
        return 'image/png', png
    opaque = picture.convert('RGBA')
    white = Image.new('RGB', picture.size, 'white')
    white.paste(opaque, mask=opaque.getchannel('A'))
    few = of_few_colours(white)
    if few:
        few.save(new, 'PNG', optimize=True)
    elif picture.mode != 'P':
        white.save(new, 'JPEG', quality=QUALITY, optimize=True, progressive=True)
    kind = 'image/png' if new.getvalue().startswith(b'\x89PNG') else 'image/jpeg'
    return (kind, new.getvalue()) if 0 < len(new.getvalue()) < len(png) else ('image/png', png)


def without_bars(outputs: list[dict]) -> list[dict]:
    "A cell's outputs without the states of progress bars, and without streams that held nothing else."
    kept = []
    for output in outputs:
        if output['output_type'] == 'stream':
            lines = re.split(r'[\r\n]', ''.join(output['text']))
            words = [line.rstrip() for line in lines if line.strip() and not re.search(r'\d%\|', line)]
            output = {**output, 'text': [f'{line}\n' for line in words]}
        if output.get('text') != []:
            kept.append(output)
    return kept


def shrink(path: Path) -> int:
    "Rewrites a notebook's outputs; returns by how many bytes the file has shrunk."
    text = path.read_text(encoding='utf-8')
    notebook = json.loads(text)
    for cell in notebook['cells']:
        if cell['cell_type'] == 'code' and cell['outputs']:
            cell['outputs'] = without_bars(cell['outputs'])
        for output in cell.get('outputs', []):
            data = output.get('data', {})
            if 'image/png' in data:
                kind, picture = smallest(base64.b64decode(''.join(data.pop('image/png'))))
                output['data'] = {kind: base64.b64encode(picture).decode(), **data}
    new = json.dumps(notebook, indent=1, ensure_ascii=False) + '\n'
    if len(new) < len(text):
        path.write_text(new, encoding='utf-8')
    return max(0, len(text) - len(new))


if __name__ == '__main__':
    notebooks = [Path(name) for name in sys.argv[1:]] or sorted((ROOT / 'nbs').rglob('*.ipynb'))
    saved = {path: shrink(path) for path in notebooks}
    print(f'{sum(saved.values()) / 1e6:.2f} MB less in {sum(map(bool, saved.values()))} of {len(saved)} notebooks')
