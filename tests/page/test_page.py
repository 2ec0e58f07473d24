"""The page of `sdxl-worker serve` in a real browser: a person types, watches, gets the picture, and makes it again."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, expect

from person import LONG, PHONE, Person, browsing, chromium
from program import ask, serving

pytestmark = pytest.mark.skipif(chromium() is None, reason="no Chromium here (apt-get install chromium; CHROMIUM=...)")

PROMPT = "a large yellow star on a blue background"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with browsing() as browser:
        yield browser


@pytest.fixture(scope="module")
def demo() -> Iterator[str]:
    with serving() as (address, _):
        yield address


@pytest.fixture(scope="module")
def controlled(test_models, tmp_path_factory) -> Iterator[str]:
    """A worker with a ControlNet of one type, a union net and a folder of LoRAs."""
    folder = tmp_path_factory.mktemp("loras")
    (folder / "ink.safetensors").write_bytes(b"")
    nets = [f"{name}={test_models['default'].parent / f'default-{name}'}" for name in ("plain", "union")]
    options = ("--model", test_models["default"], "--graphs", test_models["graphs"], "--lora-dir", folder)
    with serving(*options, "--controlnet", ",".join(nets)) as (address, _):
        yield address


@pytest.fixture
def opens(browser) -> Iterator[Callable[..., Person]]:
    persons: list[Person] = []

    def open_page(address: str, **device: object) -> Person:
        persons.append(Person(browser, address, **device))
        return persons[-1]

    yield open_page
    for person in persons:
        person.leaves()


def photo(width: int = 128, height: int = 128) -> bytes:
    pixels = np.full((height, width, 3), 40, np.uint8)
    pixels[height // 4 : height // 2, width // 4 : width // 2] = (230, 200, 30)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def sent(page: Page, act: Callable[[], None]) -> dict:
    """The request that goes to the server when somebody does so."""
    with page.expect_request("**/run") as request:
        act()
    return json.loads(request.value.post_data)["input"]


def size_of(uri: str) -> tuple[int, int]:
    return Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))).size


def test_a_person_makes_a_picture_and_makes_it_again(opens, demo):
    person = opens(demo)
    person.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page = person.page
    person.is_ready()
    expect(page.locator("#model")).to_have_text("demo")
    person.field("Prompt").fill(PROMPT)
    person.field("Prompt").press("Control+Enter")
    # each step, with a preview
    expect(page.locator("#said")).to_have_text(re.compile(r"Step \d+ of 30"), timeout=LONG)
    expect(page.locator("#picture")).to_have_attribute("src", re.compile("^data:image/"))
    assert 0 < float(page.locator("#bar").get_attribute("value")) <= 1
    first = person.picture()
    expect(first).to_have_attribute("alt", PROMPT)
    assert first.evaluate("image => [image.naturalWidth, image.naturalHeight]") == [128, 128]
    file = person.downloads()
    assert Image.open(io.BytesIO(file)).info["parameters"].startswith(PROMPT)

    again = sent(page, lambda: person.presses("Reproduce"))
    assert again["seed"] < 2**32 and again["prompt"] == PROMPT
    expect(page.locator("#said")).to_contain_text("The same picture again, byte for byte", timeout=LONG)
    assert person.downloads() == file
    expect(page.locator("#tiles .tile")).to_have_count(2)
    expect(page.locator("#gallery-note")).to_contain_text("2 pictures")

    # what is copied is the request of the same picture, for any client
    person.presses("Copy JSON")
    copied = json.loads(page.evaluate("navigator.clipboard.readText()"))
    reply = ask(demo, copied["input"])
    assert base64.b64decode(reply["output"]["images"][0].split(",")[1]) == file

    page.reload()
    person.is_ready()
    expect(page.locator("#gallery")).to_be_hidden()


def test_what_is_wrong_is_told_beside_its_field(opens, demo):
    person = opens(demo)
    page = person.page
    person.is_ready()
    person.generates()
    prompt = page.locator("[data-field=prompt]")
    expect(prompt.locator(".problem")).to_contain_text("`prompt` must not be empty. Describe the image", timeout=LONG)
    expect(person.field("Prompt")).to_be_focused()
    person.field("Prompt").fill(PROMPT)
    expect(page.locator("#form .problem")).to_have_count(0)

    person.field("Width").fill("100")
    person.generates()
    expect(page.locator("#form .problem")).to_contain_text("`width` must be a multiple of 8, got 100. The nearest ones are 96 and 104")
    expect(person.field("Width")).to_have_attribute("aria-invalid", "true")
    expect(page.locator("#failure")).to_contain_text("field width · not_a_multiple")
    person.field("Width").fill("128")
    expect(person.field("Width")).not_to_have_attribute("aria-invalid", "true")

    person.opens("More")
    other = person.field("Other fields of the request, as JSON")
    other.fill("{clip_skip")
    person.generates()
    expect(page.locator("[data-field=other] .problem")).to_contain_text("This is no JSON object")
    other.fill('{"clip_skp": 1}')
    person.generates()
    expect(page.locator("#failure")).to_contain_text("The nearest known field is `clip_skip`")
    page.get_by_role("button", name=f"{PROMPT}: Failed").first.wait_for()


def test_several_pictures_a_cancelled_run_and_old_settings(opens, demo):
    person = opens(demo)
    page = person.page
    person.is_ready()
    person.field("Prompt").fill(PROMPT)
    person.field("Negative prompt").fill("a circle")
    person.field("Seed").fill("7")
    person.field("Pictures").fill("2")
    page.locator("#steps").fill("4")
    person.field("Scheduler").select_option(label="DDIM")
    page.get_by_role("button", name="4:3").click()
    request = sent(page, person.generates)
    assert request == {
        "prompt": PROMPT, "negative_prompt": "a circle", "width": 144, "height": 112, "num_inference_steps": 4,
        "guidance_scale": 5, "seed": 7, "num_images": 2, "scheduler": "ddim", "stream": True, "preview_every": 1,
    }  # fmt: skip
    person.picture()
    expect(page.locator("#tiles .tile")).to_have_count(2)
    page.get_by_role("button", name=f"{PROMPT}, seed 8").click()
    expect(page.locator("#parameters")).to_contain_text("Seed8")

    person.field("Prompt").fill("something else")
    page.locator("#steps").fill("200")
    person.generates()
    expect(page.locator("#said")).to_have_text(re.compile(r"Step \d+ of 200"), timeout=LONG)
    person.presses("Cancel")
    expect(page.locator("#said")).to_have_text("Cancelled", timeout=LONG)

    page.get_by_role("button", name=f"{PROMPT}, seed 8").click()
    person.presses("Use these settings")
    expect(person.field("Prompt")).to_have_value(PROMPT)
    restored = sent(page, person.generates)
    del request["num_images"]
    assert restored == request | {"seed": 8}
    person.picture()


def test_a_part_of_a_picture_is_painted_anew(opens, demo):
    person = opens(demo)
    page = person.page
    person.is_ready()
    person.field("Prompt").fill(PROMPT)
    page.locator("#steps").fill("3")
    person.opens("Start picture")
    with page.expect_file_chooser() as chooser:
        page.locator("#start-drop").click()
    chooser.value.set_files({"name": "photo.png", "mimeType": "image/png", "buffer": photo(160, 120)})
    expect(page.locator("#start-drop img")).to_be_visible()
    assert (person.field("Width").input_value(), person.field("Height").input_value()) == ("160", "120")
    expect(page.locator("#strength")).to_have_value("0.3")
    page.get_by_text("Painted part").click()
    expect(page.locator("#strength")).to_have_value("0.9999")
    person.generates()
    expect(page.locator("#mask-editor .problem")).to_contain_text("Nothing is painted")
    person.paints(page.locator("#mask"))
    request = sent(page, person.generates)
    assert size_of(request["image"]) == size_of(request["mask_image"]) == (160, 120)
    mask = np.asarray(Image.open(io.BytesIO(base64.b64decode(request["mask_image"].split(",")[1]))).convert("L"))
    assert set(np.unique(mask)) == {0, 255} and mask[60, 80] == 255 and mask[5, 5] == 0
    person.picture()
    # the parameters come back, the mask among them
    person.presses("Use these settings")
    assert sent(page, person.generates)["mask_image"] == request["mask_image"]
    person.picture()


def test_a_dropped_photo_controls_the_picture_and_a_union_net_asks_for_the_mode(opens, controlled):
    person = opens(controlled)
    page = person.page
    person.is_ready()
    person.field("Prompt").fill("a house")
    page.locator("#steps").fill("2")
    person.opens("Controls")
    person.presses("Add a control")
    card = page.get_by_role("group", name="Control 1")
    assert card.get_by_label("ControlNet").evaluate("select => [...select.options].map((one) => one.value)") == ["plain", "union"]
    expect(card.get_by_label("Mode", exact=True)).to_be_hidden()
    card.get_by_label("ControlNet").select_option("union")
    person.drops(photo(), card.locator(".drop"))
    expect(card.get_by_alt_text("The picture that was chosen")).to_be_visible()
    person.generates()
    problem = card.locator(".problem")
    expect(problem).to_contain_text("The union net union needs a `mode`", timeout=LONG)
    card.get_by_label("The picture is").select_option("canny")
    expect(card.get_by_label("Mode", exact=True)).to_have_value("canny")
    card.get_by_label("high threshold").fill("150")
    request = sent(page, person.generates)
    (control,) = request["controlnets"]
    assert size_of(control.pop("image")) == (128, 128)
    params = {"low_threshold": 100, "high_threshold": 150}
    assert control == {"model": "union", "mode": "canny", "preprocess": {"name": "canny", "params": params}}
    person.picture()
    expect(page.locator("#parameters")).to_contain_text("union canny canny")
    person.presses("Reproduce")
    expect(page.locator("#said")).to_contain_text("The same picture again, byte for byte", timeout=LONG)

    person.opens("LoRA")
    expect(page.locator("#lora-help")).to_contain_text("ink")
    person.presses("Add a LoRA")
    page.get_by_role("group", name="LoRA 1").get_by_label("Name, path of the Hub, or address").fill("inc")
    request = sent(page, person.generates)
    assert request["loras"] == [{"name": "inc", "scale": 1}]
    expect(page.get_by_role("group", name="LoRA 1").locator(".problem")).to_contain_text("ink", timeout=LONG)


def test_the_page_fits_on_a_phone(opens, demo):
    person = opens(demo, **PHONE)
    page = person.page
    person.is_ready()
    person.sees_all_of_it()
    for section in ("Start picture", "Controls", "LoRA", "More", "Request as JSON"):
        page.locator("summary", has_text=section).tap()
    person.presses("Add a LoRA")
    person.sees_all_of_it()
    page.get_by_role("group", name="LoRA 1").get_by_role("button", name="Remove").tap()
    person.field("Prompt").fill(PROMPT)
    page.locator("#steps").fill("3")
    page.locator("#generate").tap()
    person.picture()
    expect(page.locator("#picture")).to_be_in_viewport()
    person.sees_all_of_it()
    # everything that can be used has a name for a screen reader
    nameless = """() => [...document.querySelectorAll("input, select, textarea, button")]
        .filter((one) => one.checkVisibility() && !one.labels?.length && !one.ariaLabel && !one.textContent.trim())
        .map((one) => one.outerHTML)"""
    assert page.evaluate(nameless) == []


def test_a_server_with_a_key_asks_for_it(opens):
    with serving("--api-key", "k-123") as (address, _):
        person = opens(address)
        page = person.page
        for key in ("wrong", "k-123"):
            expect(page.locator("#ask-key")).to_be_visible()
            person.field("API key").fill(key)
            person.presses("Continue")
            if key == "wrong":
                expect(page.locator("#ask-key .problem")).to_contain_text("does not accept this key")
        person.is_ready()
        expect(page.locator("#ask-key")).to_be_hidden()
        person.field("Prompt").fill(PROMPT)
        page.locator("#steps").fill("2")
        person.generates()
        person.picture()
        page.reload()
        person.is_ready()
