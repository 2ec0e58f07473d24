"""Makes the pictures of docs/control.md with the release binary: for each control mode its map, and what came of it.

    .venv/bin/python docs/control_pictures.py
"""

from __future__ import annotations

import base64
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "docs" / "images"
SCRATCH = ROOT / "target" / "control-pictures"
WORKER = ROOT / "target" / "release" / "sdxl-worker"
SIDE = 128
PROMPT = "a red fox in the snow, oil painting"


def photo() -> Image.Image:
    """A ball over a field: what the preprocessors start from."""
    y, x = np.mgrid[0:SIDE, 0:SIDE] / SIDE
    pixels = np.stack([90 + 90 * y, 130 + 60 * y, 200 - 120 * y], axis=-1)
    radius = np.hypot(x - 0.5, y - 0.48)
    ball = radius < 0.28
    light = np.clip(1.1 - 2.2 * np.hypot(x - 0.42, y - 0.38), 0.15, 1)[..., None]
    pixels[ball] = (np.array([235, 90, 60]) * light)[ball]
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def openpose() -> Image.Image:
    picture = Image.new("RGB", (SIDE, SIDE))
    draw = ImageDraw.Draw(picture)
    joints = {
        "nose": (64, 24), "neck": (64, 42), "hand": (34, 72), "elbow": (44, 56), "hand2": (94, 60), "elbow2": (84, 52),
        "hip": (64, 78), "knee": (52, 98), "foot": (46, 120), "knee2": (76, 98), "foot2": (84, 120),
    }  # fmt: skip
    bones = [
        ("nose", "neck", (0, 0, 255)), ("neck", "elbow", (255, 85, 0)), ("elbow", "hand", (255, 170, 0)),
        ("neck", "elbow2", (255, 255, 0)), ("elbow2", "hand2", (85, 255, 0)), ("neck", "hip", (0, 255, 85)),
        ("hip", "knee", (0, 255, 170)), ("knee", "foot", (0, 255, 255)), ("hip", "knee2", (0, 170, 255)),
        ("knee2", "foot2", (0, 85, 255)),
    ]  # fmt: skip
    for start, end, colour in bones:
        draw.line((*joints[start], *joints[end]), fill=colour, width=4)
    for x, y in joints.values():
        draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=(255, 0, 85))
    return picture


def ball() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Offsets from its centre in radii, and the height of its surface."""
    y, x = np.mgrid[0:SIDE, 0:SIDE] / SIDE
    dx, dy = (x - 0.5) / 0.28, (y - 0.48) / 0.28
    return dx, dy, np.sqrt(np.clip(1 - dx**2 - dy**2, 0, None))


def depth() -> Image.Image:
    _, _, height = ball()
    ground = np.linspace(20, 110, SIDE)[:, None]
    return Image.fromarray(np.where(height > 0, 130 + 120 * height, ground).astype(np.uint8)).convert("RGB")


def normal() -> Image.Image:
    dx, dy, height = ball()
    vectors = np.where(height[..., None] > 0, np.stack([dx, -dy, height], axis=-1), [0.0, 0.0, 1.0])
    return Image.fromarray(((vectors * 0.5 + 0.5) * 255).astype(np.uint8))


def segments() -> Image.Image:
    _, _, height = ball()
    picture = np.zeros((SIDE, SIDE, 3), np.uint8)
    picture[:70], picture[70:] = (6, 230, 230), (4, 250, 7)  # sky and grass of ADE20K
    picture[height > 0] = (150, 5, 61)
    return Image.fromarray(picture)


def repaint() -> Image.Image:
    """The photo, black where something new is wanted."""
    picture = photo()
    ImageDraw.Draw(picture).rectangle((70, 20, 120, 100), fill=(0, 0, 0))
    return picture


def encoded(picture: Image.Image) -> str:
    out = io.BytesIO()
    picture.save(out, "PNG")
    return base64.b64encode(out.getvalue()).decode()


def run(*arguments: object) -> str:
    return subprocess.run(list(map(str, arguments)), check=True, capture_output=True, text=True, cwd=ROOT).stdout


def generate(controls: list[dict[str, object]]) -> Image.Image:
    request = {"prompt": PROMPT, "seed": 7, "num_inference_steps": 25, "controlnets": controls}
    (SCRATCH / "request.json").write_text(json.dumps(request | {"width": SIDE, "height": SIDE}))
    net = f"union={SCRATCH / 'union'}"
    made = run(WORKER, "generate", "--quiet", "--model", "models/tiny", "--graphs", SCRATCH / "graphs",
               "--controlnet", net, "--input", SCRATCH / "request.json", "--output", SCRATCH)  # fmt: skip
    return Image.open(made.strip())


def preprocessed(name: str) -> Image.Image:
    photo().save(SCRATCH / "photo.png")
    options = ("--set", "down_sampling_rate=8") if name == "tile" else ()
    run(WORKER, "preprocess", name, SCRATCH / "photo.png", SCRATCH / "map.png", *options)
    return Image.open(SCRATCH / "map.png")


def strip(pictures: list[Image.Image]) -> Image.Image:
    out = Image.new("RGB", (len(pictures) * (SIDE + 8) - 8, SIDE), "white")
    for index, picture in enumerate(pictures):
        out.paste(picture, (index * (SIDE + 8), 0))
    return out


def main() -> None:
    SCRATCH.mkdir(parents=True, exist_ok=True)
    scripts = ROOT / "torchscript"
    run(sys.executable, scripts / "tiny_models.py", "--out", SCRATCH / "union", "--controlnet", "union8")
    run(sys.executable, scripts / "export.py", "--model", "models/tiny", "--model", SCRATCH / "union",
        "--dtype", "float32", "--out", SCRATCH / "graphs")  # fmt: skip
    maps = {
        "openpose": openpose(),
        "depth": depth(),
        "softedge": preprocessed("softedge"),
        "canny": preprocessed("canny"),
        "normal": normal(),
        "segment": segments(),
        "tile": photo(),
        "repaint": repaint(),
    }
    for mode, picture in maps.items():
        made = generate([{"image": encoded(picture), "model": "union", "mode": mode}])
        strip([picture, made]).save(OUT / f"control-{mode}.png", optimize=True)
        print(OUT / f"control-{mode}.png", flush=True)
    names = ("canny", "scribble", "softedge", "lineart", "tile", "invert")
    strip([photo(), *map(preprocessed, names)]).save(OUT / "preprocessors.png", optimize=True)
    print(OUT / "preprocessors.png")


if __name__ == "__main__":
    main()
