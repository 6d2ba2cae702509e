"""Makes the pictures in notebooks small: `python tools/small_outputs.py [nbs/a.ipynb ...]`, all notebooks without names.

A PNG output becomes a PNG of 256 colours or a JPEG, whichever is smallest. What is shown stays, to the eye, the same."""

import base64
import io
import json
import sys
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent


def smallest(png: bytes) -> tuple[str, bytes]:
    "(MIME type, bytes) of the smallest form of a picture."
    picture, forms = Image.open(io.BytesIO(png)), {'image/png': png}
    if picture.mode == 'P':  # has been here before
        return 'image/png', png
    white = Image.new('RGB', picture.size, 'white')
    white.paste(picture, mask=picture.getchannel('A') if picture.mode == 'RGBA' else None)
    few, jpeg = io.BytesIO(), io.BytesIO()
    white.quantize(256).save(few, 'PNG', optimize=True)
    white.save(jpeg, 'JPEG', quality=88, optimize=True)
    if len(few.getvalue()) < len(png):
        forms['image/png'] = few.getvalue()
    forms['image/jpeg'] = jpeg.getvalue()
    return min(forms.items(), key=lambda form: len(form[1]))


def shrink(path: Path) -> int:
    "Rewrites a notebook's PNG outputs; returns by how many bytes the file has shrunk."
    text = path.read_text(encoding='utf-8')
    notebook = json.loads(text)
    for cell in notebook['cells']:
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
