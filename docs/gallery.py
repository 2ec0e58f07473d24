"""Makes the pictures of the README and docs/ with the release binary and the demo model.

    .venv/bin/python docs/gallery.py      after `make build graphs setup-test`; 5 minutes on two cores
"""

from __future__ import annotations

import base64
import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "docs" / "images"
SCRATCH = ROOT / "target" / "gallery"
WORKER = ROOT / "target" / "release" / "sdxl-worker"

sys.path.insert(0, str(ROOT / "torchscript" / "demo"))
import world  # noqa: E402

SIDE = world.SIZE
GAP, LINE = 6, 15  # pixels
FONT = ImageFont.load_default(11)
PROMPTS = [
    "a large yellow star on a blue background, left",
    "a small green circle on a white background, right",
    "a large red heart on a purple background, center",
    "a large white cross on a black background, top",
    "a large orange triangle on a gray background with a floor, center",
    "a large blue person waving on a yellow background, center",
    "a small purple square on an orange background, bottom",
    "a small red circle on the left and a large black square on the right, green background",
]
STYLED = [PROMPTS[0], PROMPTS[2], PROMPTS[4], PROMPTS[5]]
SCHEDULERS = ["euler", "ddim", "dpm++_2m", "unipc", "heun", "euler_a"]
STEPS = [4, 8, 25]
STRENGTHS = [0.2, 0.4, 0.6, 0.8, 1.0]
PREPROCESSORS = ["canny", "scribble", "softedge", "lineart", "tile", "invert"]


def run(*arguments: object) -> str:
    return subprocess.run(list(map(str, arguments)), check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT).stdout


def paint(prompt: str, seed: int = 7, **fields: Any) -> Image.Image:
    request = SCRATCH / "request.json"
    request.write_text(json.dumps({"prompt": prompt, "seed": seed, "num_inference_steps": 25, "guidance_scale": 3.0} | fields))
    made = run(WORKER, "generate", "--quiet", "--device", "cpu", "--input", request, "--output", SCRATCH)
    return Image.open(made.strip()).convert("RGB")


def encoded(picture: np.ndarray) -> str:
    out = io.BytesIO()
    Image.fromarray(picture).save(out, "PNG")
    return base64.b64encode(out.getvalue()).decode()


def wrapped(text: str) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if FONT.getlength(longer) > SIDE:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def sheet(name: str, rows: list[list[tuple[str, Image.Image]]]) -> None:
    """Pictures in rows, each with words below it."""
    heights = [max(len(wrapped(words)) if words else 0 for words, _ in row) * LINE + SIDE + GAP for row in rows]
    out = Image.new("RGB", (max(map(len, rows)) * (SIDE + GAP) - GAP, sum(heights) - GAP), "white")
    draw = ImageDraw.Draw(out)
    for row, top in zip(rows, np.cumsum([0, *heights])):
        for column, (words, picture) in enumerate(row):
            left = column * (SIDE + GAP)
            out.paste(picture, (left, int(top)))
            for line, text in enumerate(wrapped(words) if words else ()):
                draw.text((left, int(top) + SIDE + 1 + line * LINE), text, fill=(60, 60, 60), font=FONT)
    out.save(OUT / name, optimize=True)
    print(OUT / name, flush=True)


def prompts() -> None:
    half = len(PROMPTS) // 2
    sheet("prompts.png", [[(prompt, paint(prompt)) for prompt in part] for part in (PROMPTS[:half], PROMPTS[half:])])


def controls() -> None:
    """Each mode's map, what is painted with it for two prompts, and what the first of them is without it."""
    rng = np.random.default_rng(11)
    for mode in world.CONTROLS:
        shape = "person" if mode == "openpose" else "star" if mode in ("canny", "softedge") else "heart"
        thing = world.random_thing(rng, "blue", "left" if mode in ("canny", "depth") else "right", "large", shape)
        drawing = world.draw(world.Scene((replace(thing, color="yellow"),), "blue"))
        told = {"controlnets": [{"image": encoded(drawing.maps[mode]), "model": "union", "mode": mode}]}
        first, second = f"a yellow {shape} on a blue background", f"a red {shape} on a white background"
        row = [(mode, Image.fromarray(drawing.maps[mode])), (first, paint(first, **told)), (second, paint(second, **told))]
        sheet(f"control-{mode}.png", [[*row, (f"{first}, no control", paint(first))]])


def loras() -> None:
    outlines = {"loras": [{"name": "outlines"}]}
    sheet("lora.png", [
        [(prompt, paint(prompt)) for prompt in STYLED],
        [("with the LoRA", paint(prompt, **outlines)) for prompt in STYLED],
    ])  # fmt: skip


def strengths() -> None:
    start = world.draw(world.Scene((world.Thing("star", "red", "large", "left", 36.0, 64.0, 28.0),), "white")).picture
    prompt = "a large green circle on a yellow background, right"
    made = [(f"strength {strength}", paint(prompt, image=encoded(start), strength=strength)) for strength in STRENGTHS]
    sheet("strengths.png", [[("the picture", Image.fromarray(start)), *made]])


def inpainting() -> None:
    start = world.draw(world.Scene((world.Thing("star", "red", "large", "left", 36.0, 64.0, 28.0),), "white")).picture
    mask = np.zeros_like(start)
    mask[:, 72:] = 255
    prompt = "a large red star on the left and a {} on the right, white background"
    asked = ["small blue circle", "small green heart", "small purple cross"]
    made = [(thing, paint(prompt.format(thing), image=encoded(start), mask_image=encoded(mask))) for thing in asked]
    sheet("inpainting.png", [[("the picture", Image.fromarray(start)), ("the mask", Image.fromarray(mask)), *made]])


def schedulers() -> None:
    prompt = PROMPTS[0]
    sheet("schedulers.png", [
        [(f"{name}, {steps} steps", paint(prompt, scheduler=name, num_inference_steps=steps)) for name in SCHEDULERS]
        for steps in STEPS
    ])  # fmt: skip


def photo() -> Image.Image:
    """A ball over a field."""
    y, x = np.mgrid[0:SIDE, 0:SIDE] / SIDE
    pixels = np.stack([90 + 90 * y, 130 + 60 * y, 200 - 120 * y], axis=-1)
    radius = np.hypot(x - 0.5, y - 0.48)
    ball = radius < 0.28
    light = np.clip(1.1 - 2.2 * np.hypot(x - 0.42, y - 0.38), 0.15, 1)[..., None]
    pixels[ball] = (np.array([235, 90, 60]) * light)[ball]
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def preprocessors() -> None:
    source, made = SCRATCH / "photo.png", SCRATCH / "map.png"
    photo().save(source)
    row = [("the photo", photo())]
    for name in PREPROCESSORS:
        options = ("--set", "down_sampling_rate=8") if name == "tile" else ()
        run(WORKER, "preprocess", name, source, made, *options)
        row.append((name, Image.open(made).convert("RGB")))
    sheet("preprocessors.png", [row])


def main() -> None:
    SCRATCH.mkdir(parents=True, exist_ok=True)
    run(WORKER, "generate", "--quiet", "--device", "cpu", "--input", "test_input.json", "--output", SCRATCH / "first")
    (made,) = (SCRATCH / "first").glob("42*.png")
    made.rename(OUT / "first.png")
    print(OUT / "first.png")
    for part in (prompts, controls, loras, strengths, inpainting, schedulers, preprocessors):
        part()


if __name__ == "__main__":
    main()
