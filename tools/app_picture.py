"""Takes the pictures of the app: `python tools/app_picture.py` writes assets/app.jpg, app_way.jpg and app_phone.jpg.

Needs the extra `app`, playwright (its wheel alone) and a Chromium on the path. `--to FOLDER` writes elsewhere."""

import argparse
import io
import shutil
import tempfile
import threading
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from playwright.sync_api import Page, sync_playwright

from collectionlora import core
from collectionlora.use.app import run_app
from collectionlora.use.edit import Collection

ROOT = Path(__file__).parents[1]
MOST = 140_000  # bytes
CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
DESK, PHONE = (1400, 1060), (400, 900)  # pixels of the window
SUBJECT, SHOWN = 2, 3  # the drawing that is edited, and the effect that is looked at, by their places on the page
MADE, LAST = 'made, and one result looked at', 'recipe, prompts and history'
DRAWN = "[...document.querySelectorAll('#subjects img')].filter(i => i.complete && i.naturalWidth).length >= 6"


class Way:
    "The way of a user through the page, with a screenshot of every step."

    def __init__(self, page: Page, whole: bool):
        self.page, self.whole, self.shots = page, whole, {}

    def shoot(self, name: str) -> None:
        "Keeps what the page shows now: all of it, or the window."
        self.page.mouse.move(5, 5)
        self.page.wait_for_timeout(2500)
        raw = self.page.screenshot(full_page=self.whole or name == MADE)
        self.shots[name] = Image.open(io.BytesIO(raw)).convert('RGB')

    def make(self, n: int) -> None:
        "Presses Make, and waits until the history has n pictures more."
        before = self.page.locator('#history img').count()
        self.page.locator('#make').click()
        self.page.wait_for_function(f"document.querySelectorAll('#history img').length >= {before + n}")

    def refused(self, folder: Path) -> None:
        "A file that is no picture."
        (folder / 'picture.png').write_text('no picture')
        self.page.locator('#picture input[type=file]').set_input_files(folder / 'picture.png')
        self.page.locator('.toast-body').first.wait_for()
        self.shoot('a file that is no picture')
        self.page.locator('.toast-close').first.click()

    def edited(self) -> None:
        "A drawing and all effects, one picture for each."
        self.page.locator('#subjects button').nth(SUBJECT).click()
        self.page.wait_for_selector('#picture img')
        boxes = self.page.locator('#effects input').all()
        for box in boxes:
            box.check()
        self.shoot('a picture and four effects chosen')
        self.make(len(boxes))
        self.page.locator('#results button').nth(SHOWN).click()
        wanted = self.page.locator('#effects input').nth(SHOWN).get_attribute('name')
        self.page.wait_for_function(f"document.querySelector('#said').innerText.includes('{wanted}')")
        self.shoot(MADE)

    def composed(self) -> None:
        "Two effects in one picture, its recipe and prompt."
        for box in self.page.locator('#effects input').all()[1::2]:
            box.uncheck()
        self.page.get_by_role('radio', name='all in one picture').check()
        self.make(1)
        self.shoot('two effects in one picture')
        for part in ('#recipe', '#prompts'):
            self.page.locator(f'{part} button').first.click()
        self.page.evaluate("document.querySelector('#results').scrollIntoView()")
        self.shoot(LAST)


def steps(url: str, size: tuple[int, int]) -> dict[str, Image.Image]:
    "Screenshots of the way of a user by name, in a window of (width, height) pixels; of whole pages on a phone."
    with sync_playwright() as p, tempfile.TemporaryDirectory() as folder:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox'])
        page = browser.new_page(viewport={'width': size[0], 'height': size[1]})
        page.set_default_timeout(300_000)
        page.goto(url)
        page.wait_for_selector('#effects input')
        page.wait_for_function(DRAWN)
        way = Way(page, size == PHONE)
        way.shoot('opened')
        way.refused(Path(folder))
        way.edited()
        way.composed()
        browser.close()
    return way.shots


def jpeg(picture: Image.Image, path: Path) -> None:
    "Writes a picture in at most MOST bytes."
    for quality in range(80, 40, -5):
        buffer = io.BytesIO()
        picture.save(buffer, 'JPEG', quality=quality, optimize=True, progressive=True)
        if buffer.tell() <= MOST:
            path.write_bytes(buffer.getvalue())
            print(f'{path.name}: {picture.width} x {picture.height}, {buffer.tell() / 1e3:.0f} kB')
            return
    raise SystemExit(f'{path}: over {MOST} bytes at every quality')


def strip_of(shots: dict[str, Image.Image], width: int, columns: int) -> Image.Image:
    "Screenshots in rows of so many, each so wide, with a number and its name above; rows are as high as their highest."
    font, head, gap = ImageFont.load_default(20 if columns < 4 else 13), 30, 12
    small = [s.resize((width, round(s.height * width / s.width)), Image.LANCZOS) for s in shots.values()]
    heights = [max(s.height for s in small[k : k + columns]) for k in range(0, len(small), columns)]
    strip = Image.new('RGB', (columns * (width + gap) - gap, sum(heights) + len(heights) * (head + gap)), 'white')
    draw = ImageDraw.Draw(strip)
    for k, (name, s) in enumerate(zip(shots, small)):
        x, y = k % columns * (width + gap), sum(heights[: k // columns]) + k // columns * (head + gap)
        draw.text((x + 2, y + 3), f'{k + 1}  {name}', fill='#1b2130', font=font)
        strip.paste(s, (x, y + head))
    return strip


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    args.add_argument('--to', type=Path, default=ROOT / 'assets')
    to = args.parse_args().to
    told, ready, end, folder = [], threading.Event(), threading.Event(), tempfile.mkdtemp()
    open_collection = lambda: Collection.load('nano', core.collection_dir() / 'collection.safetensors')
    listed = lambda url: (told.append(url), ready.set())
    words = dict(port=0, ready=listed, until=end)
    app = threading.Thread(target=run_app, args=(open_collection, folder), kwargs=words, daemon=True)
    app.start()
    ready.wait()
    desk, phone = steps(told[0], DESK), steps(told[0], PHONE)
    end.set()
    app.join()
    shutil.rmtree(folder)
    page = desk[MADE]
    jpeg(page.resize((1200, round(page.height * 1200 / page.width)), Image.LANCZOS), to / 'app.jpg')
    desk[MADE] = page.crop((0, 0, *DESK))
    jpeg(strip_of(desk, 640, 3), to / 'app_way.jpg')
    del phone[LAST]  # very long
    jpeg(strip_of(phone, 240, len(phone)), to / 'app_phone.jpg')


if __name__ == '__main__':
    main()
