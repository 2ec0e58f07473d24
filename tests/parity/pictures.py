"""Pictures for requests: always the same, of sizes that are not those asked for."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image, ImageDraw


def photo(seed: int, width: int = 150, height: int = 130) -> Image.Image:
    """Smooth colours with a few hard edges."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
    picture = coarse.resize((width, height), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(picture)
    for _ in range(4):
        x, y = rng.integers(0, width - 40), rng.integers(0, height - 40)
        draw.rectangle((x, y, x + 30, y + 35), fill=tuple(rng.integers(0, 256, 3)))
    return picture


def mask(seed: int, width: int = 150, height: int = 130) -> Image.Image:
    """White where it is to be repainted; a few pixels are grey."""
    rng = np.random.default_rng(seed)
    picture = Image.new("L", (width, height))
    x, y = rng.integers(10, width // 3), rng.integers(10, height // 3)
    draw = ImageDraw.Draw(picture)
    draw.ellipse((x, y, x + width // 2, y + height // 2), fill=255)
    draw.rectangle((x + 5, y + height // 2, x + 30, y + height // 2 + 9), fill=140)
    return picture.convert("RGB")


def encode(picture: Image.Image) -> str:
    """base64 of a PNG."""
    out = io.BytesIO()
    picture.save(out, "PNG")
    return base64.b64encode(out.getvalue()).decode()


def decode(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB")
