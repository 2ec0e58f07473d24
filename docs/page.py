"""Makes docs/images/page.png and page-phone.png: the page of `sdxl-worker serve` with the release binary and the demo model.

    .venv/bin/python docs/page.py      after `make build graphs setup-test`, with Chromium; half a minute
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "docs" / "images"

sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "page")]
from person import DESKTOP, PHONE, Person, browsing  # noqa: E402
from program import serving  # noqa: E402

PICTURES = [
    ("a large red heart on a purple background, center", 2),
    ("a large orange triangle on a gray background with a floor, center", 4),
    ("a large yellow star on a blue background, left", 7),
]


def make(person: Person, pictures: list[tuple[str, int]]) -> None:
    person.is_ready()
    for prompt, seed in pictures:
        person.field("Prompt").fill(prompt)
        person.field("Seed").fill(str(seed))
        person.generates()
        person.picture()
    person.page.mouse.move(0, 0)
    person.page.evaluate("document.activeElement.blur(), window.scrollTo({ top: 0, behavior: 'instant' })")


def save(person: Person, name: str) -> None:
    Image.open(io.BytesIO(person.page.screenshot())).convert("RGB").save(OUT / name, optimize=True)
    print(OUT / name)
    person.leaves()


def main() -> None:
    with serving() as (address, _), browsing() as browser:
        desktop = Person(browser, address, **DESKTOP)
        make(desktop, PICTURES)
        save(desktop, "page.png")
        phone = Person(browser, address, **PHONE)
        make(phone, PICTURES[-1:])
        save(phone, "page-phone.png")


if __name__ == "__main__":
    main()
