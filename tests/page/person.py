"""What a person does on the page of `sdxl-worker serve`, in the system's own Chromium."""

from __future__ import annotations

import base64
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
DESKTOP = {"viewport": {"width": 1280, "height": 860}}
PHONE = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}
# For what takes a picture's time, on a machine that has other work too.
LONG = 90_000

expect.set_options(timeout=20_000)


def chromium() -> str | None:
    """CHROMIUM, or the first that the machine has."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


@contextmanager
def browsing() -> Iterator[Browser]:
    # as root, such as in a container, Chromium starts only without its sandbox
    options = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=options)
        yield browser
        browser.close()


class Person:
    """Somebody before the page, who also sees what the browser asks for and complains about."""

    def __init__(self, browser: Browser, address: str, **device: object):
        self.address = address
        self.context = browser.new_context(**(device or DESKTOP))
        self.page: Page = self.context.new_page()
        self.page.set_default_timeout(20_000)
        self.asked: list[str] = []
        self.complaints: list[str] = []
        self.context.on("request", lambda request: self.asked.append(request.url))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", self.listen)
        self.page.goto(f"{address}/")

    def listen(self, message) -> None:
        # an answer that is no 2xx is told as an error, and is none of the page's
        if message.type == "error" and not message.text.startswith("Failed to load resource"):
            self.complaints.append(message.text)

    def is_ready(self) -> None:
        expect(self.page.locator("#health")).to_have_text("Ready", timeout=LONG)

    def field(self, label: str) -> Locator:
        return self.page.get_by_label(label, exact=True)

    def opens(self, section: str) -> None:
        self.page.locator("summary", has_text=section).click()

    def presses(self, name: str) -> None:
        self.page.get_by_role("button", name=name, exact=True).click()

    def generates(self) -> None:
        self.page.locator("#generate").click()

    def picture(self) -> Locator:
        """The finished one, on the stage."""
        picture = self.page.locator("#picture[data-final=true]")
        expect(picture).to_be_visible(timeout=LONG)
        return picture

    def downloads(self) -> bytes:
        with self.page.expect_download() as download:
            self.page.get_by_role("link", name="Download").click()
        return Path(download.value.path()).read_bytes()

    def drops(self, png: bytes, zone: Locator, name: str = "photo.png") -> None:
        """Drags a picture's file over the zone and lets go."""
        script = """([text, name]) => {
            const transfer = new DataTransfer();
            const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
            transfer.items.add(new File([bytes], name, { type: "image/png" }));
            return transfer;
        }"""
        transfer = self.page.evaluate_handle(script, [base64.b64encode(png).decode(), name])
        for event in ("dragenter", "dragover", "drop"):
            zone.dispatch_event(event, {"dataTransfer": transfer})

    def paints(self, canvas: Locator) -> None:
        """A stroke across the middle."""
        canvas.scroll_into_view_if_needed()
        box = canvas.bounding_box()
        at = lambda x, y: (box["x"] + box["width"] * x, box["y"] + box["height"] * y)
        self.page.mouse.move(*at(0.3, 0.4))
        self.page.mouse.down()
        self.page.mouse.move(*at(0.7, 0.6), steps=4)
        self.page.mouse.up()

    def sees_all_of_it(self) -> None:
        """Nothing is wider than the window."""
        wide, window = self.page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
        assert wide <= window

    def leaves(self) -> None:
        self.context.close()
        foreign = [url for url in self.asked if not url.startswith((f"{self.address}/", "data:", "blob:"))]
        assert foreign == [], "the page asks others"
        assert self.complaints == []
