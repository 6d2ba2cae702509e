"""Takes the picture of the app that the front page shows: `python tools/app_picture.py` writes assets/app.jpg.

Needs the extra `app`, playwright (its wheel alone) and a Chromium on the path. `--strip FILE` also writes the steps of a
user side by side; `--width` is that of the window in pixels."""

import argparse
import io
import shutil
import tempfile
import threading
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

from collectionlora import core
from collectionlora.use.app import run_app
from collectionlora.use.edit import Collection

ROOT = Path(__file__).parents[1]
MOST = 150_000  # bytes
CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')


def steps(url: str, width: int) -> list[Image.Image]:
    "Screenshots of the way of a user: opened, chosen, made, composed."
    shots = []
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox'])
        page = browser.new_page(viewport={'width': width, 'height': 900})
        page.set_default_timeout(300_000)

        def shoot():
            page.wait_for_timeout(2500)
            shots.append(Image.open(io.BytesIO(page.screenshot(full_page=True))).convert('RGB'))

        page.goto(url)
        page.wait_for_selector('#effects input')
        shoot()
        page.locator('#subjects button').nth(2).click()
        page.wait_for_selector('#picture img')
        for box in page.locator('#effects input').all():
            box.check()
        shoot()
        page.locator('#make').click()
        page.wait_for_function("document.querySelectorAll('#history img').length >= 4")
        page.locator('#results button').nth(2).click()
        page.wait_for_function("document.querySelector('#said').innerText.includes('lava_creature')")
        page.mouse.move(5, 5)
        shoot()
        for box in page.locator('#effects input').all()[1::2]:
            box.uncheck()
        page.get_by_role('radio', name='all in one picture').check()
        page.locator('#make').click()
        page.wait_for_function("document.querySelectorAll('#history img').length >= 5")
        shoot()
        browser.close()
    return shots


def jpeg(picture: Image.Image, path: Path) -> None:
    "Writes a picture in at most MOST bytes."
    for quality in range(90, 40, -5):
        buffer = io.BytesIO()
        picture.save(buffer, 'JPEG', quality=quality, optimize=True)
        if buffer.tell() <= MOST:
            path.write_bytes(buffer.getvalue())
            return
    raise SystemExit(f'{path}: over {MOST} bytes at every quality')


def strip_of(shots: list[Image.Image], width: int = 480) -> Image.Image:
    "Screenshots side by side, each so wide."
    small = [s.resize((width, round(s.height * width / s.width)), Image.LANCZOS) for s in shots]
    strip = Image.new('RGB', (len(small) * (width + 8) - 8, max(s.height for s in small)), 'white')
    for k, s in enumerate(small):
        strip.paste(s, (k * (width + 8), 0))
    return strip


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    args.add_argument('--width', type=int, default=1400)
    args.add_argument('--to', type=Path, help='default: assets/app.jpg')
    args.add_argument('--strip', type=Path)
    args = args.parse_args()
    told, ready, end, folder = [], threading.Event(), threading.Event(), tempfile.mkdtemp()
    open_collection = lambda: Collection.load('nano', core.collection_dir() / 'collection.safetensors')
    listed = lambda url: (told.append(url), ready.set())
    words = dict(port=0, ready=listed, until=end)
    app = threading.Thread(target=run_app, args=(open_collection, folder), kwargs=words, daemon=True)
    app.start()
    ready.wait()
    shots = steps(told[0], args.width)
    end.set()
    app.join()
    shutil.rmtree(folder)
    wide = min(args.width, 1200)
    shown = shots[2].resize((wide, round(shots[2].height * wide / args.width)), Image.LANCZOS)
    jpeg(shown, args.to or ROOT / 'assets' / 'app.jpg')
    if args.strip:
        jpeg(strip_of(shots, 480 if args.width > 700 else 240), args.strip)


if __name__ == '__main__':
    main()
