"""Says what is in a picture of the demo's world, from its pixels alone: no model, only colours and outlines.

    python torchscript/demo/look.py picture.png ...
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage

import world

FAR = 55.0  # how far a colour is from the background's, at least, to be a thing's
FLOOR_FAR = 40.0  # the same for the floor's colour
LIGHTS = (0.62, 1.12)  # between what shares of its colour a thing is shaded
TEMPLATE = 40  # pixels a side
SIZE_LIMIT, PERSON_LIMIT = 21.5, 32.0  # half extents in pixels, between small and large


@dataclass(frozen=True)
class Seen:
    """One thing before a background. `mask` is bool (SIZE, SIZE)."""

    shape: str
    color: str
    size: str
    position: str
    background: str
    mask: np.ndarray


def color_distances(
    pixels: np.ndarray, colors: dict[str, tuple[int, int, int]], lights: tuple[float, float]
) -> np.ndarray:
    """How far pixels (N, 3) are from each colour in the light that suits it best: (N, colours)."""
    palette = np.array(list(colors.values()), np.float64)
    light = np.clip(pixels @ palette.T / (palette**2).sum(1), *lights)
    return np.linalg.norm(pixels[:, None] - light[..., None] * palette, axis=-1)


def background_of(picture: np.ndarray) -> str:
    """The colour of most of the upper rim."""
    rim = np.concatenate([part.reshape(-1, 3) for part in (picture[:6], picture[:64, :4], picture[:64, -4:])])
    nearest = color_distances(rim.astype(np.float64), world.BACKGROUNDS, (1.0, 1.0)).argmin(1)
    return list(world.BACKGROUNDS)[np.bincount(nearest).argmax()]


def things_mask(picture: np.ndarray, background: str) -> np.ndarray:
    """What is neither background nor, where there is one, floor."""
    pixels = picture.astype(np.float64)
    base = np.array(world.BACKGROUNDS[background], np.float64)
    mask = np.linalg.norm(pixels - base, axis=-1) > FAR
    floor = {"floor": tuple(base * world.FLOOR + world.FLOOR_GLOW)}
    distances = color_distances(pixels.reshape(-1, 3), floor, world.FLOOR_LIGHTS).reshape(mask.shape)
    corners = np.concatenate([distances[-8:, :16], distances[-8:, -16:]])
    if (corners < FLOOR_FAR).mean() > 0.5:
        mask &= distances > FLOOR_FAR
    return mask


def look(picture: np.ndarray) -> Seen | None:
    """The largest thing in a picture, uint8 (SIZE, SIZE, 3); none if there is only background."""
    background = background_of(picture)
    labels, count = ndimage.label(things_mask(picture, background), np.ones((3, 3)))
    if count == 0:
        return None
    areas = np.bincount(labels.ravel())[1:]
    mask = labels == areas.argmax() + 1
    if areas.max() < 40:
        return None
    inner = ndimage.binary_erosion(mask)
    colors = {name: color for name, color in world.COLORS.items() if name != background}
    pixels = picture[inner if inner.sum() > 20 else mask].astype(np.float64)
    color = list(colors)[np.bincount(color_distances(pixels, colors, LIGHTS).argmin(1)).argmax()]
    shape = shape_of(mask)
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    half = (max(np.ptp(rows), np.ptp(columns)) + 1) / 2
    size = "large" if half > (PERSON_LIMIT if shape == "person" else SIZE_LIMIT) else "small"
    center = np.array([(columns[0] + columns[-1] + 1) / 2, (rows[0] + rows[-1] + 1) / 2])
    return Seen(shape, color, size, position_of(center, half), background, mask)


def position_of(center: np.ndarray, half: float) -> str:
    """The position whose centre, moved so that all of the thing is in the picture, is nearest."""

    def away(name: str) -> float:
        x, y = (part * world.SIZE for part in world.POSITIONS[name])
        return float(np.hypot(center[0] - x, center[1] - np.clip(y, half + 2, world.SIZE - half - 2)))

    return min(world.POSITIONS, key=away)


def normalized(mask: np.ndarray) -> np.ndarray:
    """A mask's shape alone: its bounding box, centred in a square of TEMPLATE pixels that its longer side fills."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    side = max(box.shape)
    square = np.zeros((side, side), np.uint8)
    top, left = (side - box.shape[0]) // 2, (side - box.shape[1]) // 2
    square[top : top + box.shape[0], left : left + box.shape[1]] = box * 255
    return np.asarray(Image.fromarray(square).resize((TEMPLATE, TEMPLATE), Image.Resampling.BOX)) / 255.0


@cache
def templates() -> list[tuple[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    found = []
    for shape in world.SHAPES:
        for size in world.SIZES:
            for _ in range(24 if shape == "person" else 1):
                thing = replace(world.random_thing(rng, "gray", "center", size, shape), x=64.0, y=64.0)
                found.append((shape, normalized(world.draw(world.Scene((thing,), "gray")).masks[0])))
    return found


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union."""
    return float(np.minimum(a, b).sum() / np.maximum(a, b).sum())


def shape_of(mask: np.ndarray) -> str:
    own = normalized(mask)
    return max(templates(), key=lambda template: overlap(own, template[1]))[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", type=Path, nargs="+")
    for path in parser.parse_args().pictures:
        seen = look(np.asarray(Image.open(path).convert("RGB")))
        if seen is None:
            print(f"{path}: nothing")
        else:
            thing = f"a {seen.size} {seen.color} {seen.shape}"
            print(f"{path}: {thing} on a {seen.background} background, {seen.position}")


if __name__ == "__main__":
    main()
