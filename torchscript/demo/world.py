"""The world that the demo model paints: simple scenes, each with captions, its picture and six exact control maps.

    python torchscript/demo/world.py --out target/world.png      a sheet of scenes and their maps
"""

from __future__ import annotations

import argparse
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage

SIZE = 128
SCALE = 2  # scenes are drawn larger and averaged down, so that edges are smooth
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (215, 35, 35),
    "orange": (245, 135, 25),
    "yellow": (250, 220, 50),
    "green": (40, 160, 65),
    "blue": (45, 85, 215),
    "purple": (135, 55, 175),
    "white": (245, 245, 245),
    "black": (25, 25, 25),
}
BACKGROUNDS = COLORS | {"gray": (128, 128, 128)}
SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "person")
POSES = ("standing", "waving", "cheering")
SIZES = {"small": (14, 17), "large": (26, 30)}  # radius in pixels
PERSON_SIZES = {"small": (23, 26), "large": (38, 42)}  # half the height
POSITIONS: dict[str, tuple[float, float]] = {
    "left": (0.27, 0.5),
    "right": (0.73, 0.5),
    "top": (0.5, 0.27),
    "bottom": (0.5, 0.73),
    "center": (0.5, 0.5),
}
PLACES = {
    "left": "on the left",
    "right": "on the right",
    "top": "at the top",
    "bottom": "at the bottom",
    "center": "in the center",
}
# Where several things are, each has room.
GROUPS = {2: [("left", "right"), ("top", "bottom")], 3: [("left", "right", "top"), ("left", "right", "bottom")]}
CONTROLS = ("openpose", "depth", "softedge", "canny", "normal", "segmentation")  # the union net's order
JITTER = 4
FLOOR, FLOOR_GLOW = 0.55, 18.0  # a floor's colour: a share of the background's, and this added
FLOOR_LIGHTS = (0.8, 1.1)  # at the horizon and at the lower rim
OUTLINE = 3.0  # its width, in pixels
LIGHT = np.array([-0.45, -0.55, 0.7]) / np.linalg.norm([-0.45, -0.55, 0.7])

# Bones of a person between the joints of `joints`, and the colour of each in an openpose map.
BONES = (
    ("neck", "elbow_l"), ("elbow_l", "wrist_l"), ("neck", "elbow_r"), ("elbow_r", "wrist_r"), ("neck", "hip"),
    ("hip", "knee_l"), ("knee_l", "ankle_l"), ("hip", "knee_r"), ("knee_r", "ankle_r"), ("neck", "head"),
)  # fmt: skip
BONE_COLORS = (
    (255, 85, 0), (255, 170, 0), (170, 255, 0), (85, 255, 0), (0, 255, 85),
    (0, 255, 255), (0, 170, 255), (0, 0, 255), (85, 0, 255), (255, 0, 170),
)  # fmt: skip
SEGMENTS = {
    "background": (120, 120, 180), "floor": (80, 50, 50), "circle": (255, 5, 153), "square": (204, 255, 4),
    "triangle": (6, 230, 230), "star": (255, 184, 6), "heart": (255, 41, 10), "cross": (11, 102, 255),
    "person": (150, 5, 61),
}  # fmt: skip


@dataclass(frozen=True)
class Thing:
    shape: str
    color: str
    size: str
    position: str
    x: float  # of the centre, in pixels
    y: float
    radius: float
    pose: str = ""
    angles: tuple[float, ...] = ()  # of upper arm and forearm left, right, then the legs; radians from straight down


@dataclass(frozen=True)
class Scene:
    things: tuple[Thing, ...]
    background: str
    horizon: float | None = None  # row of the floor's edge, in pixels; none without a floor


@dataclass(frozen=True)
class Drawing:
    """A scene in pixels: `picture` and `maps` are uint8 of (SIZE, SIZE, 3), `masks` one bool (SIZE, SIZE) a thing."""

    picture: np.ndarray
    maps: dict[str, np.ndarray]
    masks: list[np.ndarray]


# --- Scenes and captions ----------------------------------------------------------------------------------------------


def is_held_out(scene: Scene) -> bool:
    """One in ten of the combinations of a single thing is never trained on."""
    if len(scene.things) > 1:
        return False
    thing = scene.things[0]
    words = f"{thing.shape} {thing.color} {thing.size} {thing.position} {scene.background}"
    return zlib.crc32(words.encode()) % 10 == 0


def random_thing(rng: np.random.Generator, background: str, position: str, size: str, shape: str = "") -> Thing:
    shape = shape or str(rng.choice(SHAPES))
    color = str(rng.choice([color for color in COLORS if color != background]))
    radius = rng.uniform(*(PERSON_SIZES if shape == "person" else SIZES)[size])
    x, y = (p * SIZE + rng.uniform(-JITTER, JITTER) for p in POSITIONS[position])
    y = float(np.clip(y, radius + 2, SIZE - radius - 2))
    if shape != "person":
        return Thing(shape, color, size, position, x, y, radius)
    pose = str(rng.choice(POSES))
    swing = rng.uniform(-0.2, 0.2, 6)
    down, up = (0.5, 0.25), (2.3, 2.75)
    left, right = {"standing": (down, down), "waving": (down, up), "cheering": (up, up)}[pose]
    angles = np.array([*left, *right, 0.3, 0.3]) + swing
    return Thing(shape, color, size, position, x, y, radius, pose, tuple(angles))


def random_scene(rng: np.random.Generator, count: int | None = None, shape: str = "") -> Scene:
    """A scene of one to three things, or of `count`; the first of them of a `shape`, if one is given."""
    count = count or int(rng.choice([1, 2, 3], p=[0.6, 0.3, 0.1]))
    background = str(rng.choice(list(BACKGROUNDS)))
    if count == 1:
        positions: tuple[str, ...] = (str(rng.choice(list(POSITIONS))),)
    else:
        positions = GROUPS[count][rng.integers(len(GROUPS[count]))]
    things = []
    for index, position in enumerate(positions):
        size = "small" if count == 3 else str(rng.choice(list(SIZES)))
        things.append(random_thing(rng, background, position, size, shape if index == 0 else ""))
    horizon = rng.uniform(0.58, 0.72) * SIZE if rng.random() < 0.25 else None
    return Scene(tuple(things), background, horizon)


def caption(scene: Scene, rng: np.random.Generator | None = None, place: bool = True) -> str:
    """The scene in words: everything about it, or with a `rng` in one of several ways, at times leaving something out.
    Without `place` no position is named."""

    def keep(share: float) -> bool:
        return rng is None or rng.random() < share

    phrases, places = [], []
    for thing in scene.things:
        words = ["a", thing.size if keep(0.85) else "", thing.color if keep(0.95) else "", thing.shape]
        words.append(thing.pose if thing.pose and keep(0.85) else "")
        phrases.append(" ".join(word for word in words if word))
        places.append(thing.position if place and keep(0.8) else "")
    floor = " with a floor" if scene.horizon is not None else ""
    ground = f"{scene.background} background{floor}" if keep(0.95) else ""
    style = 0 if rng is None else int(rng.integers(3))
    things = " and ".join(p + (f" {PLACES[at]}" if at else "") for p, at in zip(phrases, places))
    if len(phrases) == 1 and style == 0:  # a large red star on a blue background, left
        text = phrases[0] + (f" on a {ground}" if ground else "") + (f", {places[0]}" if places[0] else "")
    elif not ground:
        text = things
    else:
        text = f"{ground}, {things}" if style == 1 else f"{things}, {ground}"
    return text.replace("a orange", "an orange")


def words() -> str:
    """All that captions are made of, so that each word becomes a token."""
    scenes = [random_scene(np.random.default_rng(seed)) for seed in range(500)]
    return " ".join(caption(scene, np.random.default_rng(seed)) for seed, scene in enumerate(scenes))


# --- Shapes: functions of coordinates in radii, positive inside -------------------------------------------------------

Field = Callable[[np.ndarray, np.ndarray], np.ndarray]


def star(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    half, inner = np.pi / 5, 0.42
    angle = np.abs((np.arctan2(u, -v) + half) % (2 * half) - half)  # from the nearest point of the star
    edge = inner * np.sin(half) / (np.sin(angle) + inner * np.sin(half - angle))
    return edge - np.hypot(u, v)


def heart(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    x, y = u * 1.2, 0.15 - v * 1.2
    return -((x * x + y * y - 1) ** 3 - x * x * y**3)


FIELDS: dict[str, Field] = {
    "circle": lambda u, v: 0.95 - np.hypot(u, v),
    "square": lambda u, v: 0.85 - np.maximum(np.abs(u), np.abs(v)),
    "triangle": lambda u, v: np.minimum(0.8 - v, 0.6 * (v + 1) - np.abs(u)),
    "star": star,
    "heart": heart,
    "cross": lambda u, v: np.minimum(
        0.95 - np.maximum(np.abs(u), np.abs(v)), 0.32 - np.minimum(np.abs(u), np.abs(v))
    ),
}


def joints(thing: Thing) -> dict[str, tuple[float, float]]:
    """Where a person's joints are, in pixels."""
    points: dict[str, tuple[float, float]] = {"head": (0, -0.76), "neck": (0, -0.48), "hip": (0, 0.12)}

    def limb(root: str, names: tuple[str, str], side: int, angles: tuple[float, ...], length: float) -> None:
        x, y = points[root]
        for name, angle in zip(names, angles):
            x, y = x + side * length * np.sin(angle), y + length * np.cos(angle)
            points[name] = (x, y)

    a = thing.angles
    limb("neck", ("elbow_l", "wrist_l"), -1, a[0:2], 0.32)
    limb("neck", ("elbow_r", "wrist_r"), 1, a[2:4], 0.32)
    limb("hip", ("knee_l", "ankle_l"), -1, (a[4], a[4] / 2), 0.41)
    limb("hip", ("knee_r", "ankle_r"), 1, (a[5], a[5] / 2), 0.41)
    return {name: (thing.x + x * thing.radius, thing.y + y * thing.radius) for name, (x, y) in points.items()}


def segment_distance(x: np.ndarray, y: np.ndarray, start: tuple[float, float], end: tuple[float, float]) -> np.ndarray:
    dx, dy = end[0] - start[0], end[1] - start[1]
    along = np.clip(((x - start[0]) * dx + (y - start[1]) * dy) / (dx * dx + dy * dy), 0, 1)
    return np.hypot(x - start[0] - along * dx, y - start[1] - along * dy)


def shape_mask(thing: Thing, scale: int) -> np.ndarray:
    """Where a thing is, at `scale` pixels a pixel."""
    y, x = (np.mgrid[0 : SIZE * scale, 0 : SIZE * scale] + 0.5) / scale
    if thing.shape != "person":
        return FIELDS[thing.shape]((x - thing.x) / thing.radius, (y - thing.y) / thing.radius) > 0
    at = joints(thing)
    bones = np.min([segment_distance(x, y, at[a], at[b]) for a, b in BONES], axis=0)
    head = np.hypot(x - at["head"][0], y - at["head"][1])
    return (bones < 0.105 * thing.radius) | (head < 0.22 * thing.radius)


# --- Pixels -----------------------------------------------------------------------------------------------------------


def draw(scene: Scene, outlines: bool = False) -> Drawing:
    """With `outlines` the picture shows only the rims of things: the style of the demo's LoRA."""
    side = SIZE * SCALE
    rows = ((np.arange(side) + 0.5) / SCALE)[:, None]
    base = np.array(BACKGROUNDS[scene.background], np.float64)
    canvas = np.broadcast_to(base, (side, side, 3)).copy()
    depth = np.full((side, side), 30.0)
    normal = np.broadcast_to(np.array([0.0, 0.0, 1.0]), (side, side, 3)).copy()
    segments = np.broadcast_to(np.array(SEGMENTS["background"], np.float64), (side, side, 3)).copy()
    label = np.zeros((side, side), np.int64)
    if scene.horizon is not None:
        below = np.broadcast_to(rows > scene.horizon, (side, side))
        near = np.clip((rows - scene.horizon) / (SIZE - scene.horizon), 0, 1)
        light = FLOOR_LIGHTS[0] + (FLOOR_LIGHTS[1] - FLOOR_LIGHTS[0]) * near
        canvas[below] = ((base * FLOOR + FLOOR_GLOW) * light[..., None] + np.zeros_like(canvas))[below]
        depth[below] = np.broadcast_to(40 + 80 * near, depth.shape)[below]
        normal[below] = (0.0, -0.8, 0.6)
        segments[below] = SEGMENTS["floor"]
        label[below] = 1
    masks = []
    for index, thing in enumerate(scene.things):
        mask = shape_mask(thing, SCALE)
        bulge, normals = dome(mask)
        light = 0.68 + 0.37 * np.clip(normals @ LIGHT / LIGHT[2], 0, 1.15)
        inked = mask & (ndimage.distance_transform_edt(mask) <= OUTLINE * SCALE) if outlines else mask
        canvas[inked] = np.clip(np.array(COLORS[thing.color]) * light[inked][:, None], 0, 255)
        depth[mask] = 150 + 90 * bulge[mask]
        normal[mask] = normals[mask]
        segments[mask] = SEGMENTS[thing.shape]
        label[mask] = 2 + index
        masks.append(shrink(mask.astype(np.float64)) > 0.5)
    edges = edge_map(label[::SCALE, ::SCALE])
    soft = ndimage.gaussian_filter(edges.astype(np.float64), 1.5)
    maps = {
        "openpose": skeletons(scene),
        "depth": gray(shrink(depth)),
        "softedge": gray(255 * np.clip(soft * 3, 0, 1)),
        "canny": gray(255 * edges),
        "normal": to_bytes(shrink(normal) * 127.5 + 127.5),
        "segmentation": to_bytes(segments[::SCALE, ::SCALE]),
    }
    return Drawing(to_bytes(shrink(canvas)), maps, masks)


def dome(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A rounded surface over a mask: height from 0 to 1, and unit normals (x right, y down, z to the viewer)."""
    distance = ndimage.distance_transform_edt(mask)
    rim = max(distance.max() * 0.6, 1.0)
    height = np.sqrt(1 - (1 - np.clip(distance / rim, 0, 1)) ** 2)
    height = ndimage.gaussian_filter(height, SCALE)
    dy, dx = np.gradient(height * rim)
    normals = np.stack([-dx, -dy, np.ones_like(dx)], -1)
    return height, normals / np.linalg.norm(normals, axis=-1, keepdims=True)


def edge_map(label: np.ndarray) -> np.ndarray:
    edges = np.zeros_like(label, bool)
    edges[1:] |= label[1:] != label[:-1]
    edges[:, 1:] |= label[:, 1:] != label[:, :-1]
    return edges


def skeletons(scene: Scene) -> np.ndarray:
    y, x = np.mgrid[0:SIZE, 0:SIZE] + 0.5
    image = np.zeros((SIZE, SIZE, 3), np.uint8)
    for thing in scene.things:
        if thing.shape == "person":
            at = joints(thing)
            for (a, b), color in zip(BONES, BONE_COLORS):
                image[segment_distance(x, y, at[a], at[b]) < 1.3] = color
    return image


def shrink(image: np.ndarray) -> np.ndarray:
    rest = image.shape[2:]
    return image.reshape(SIZE, SCALE, SIZE, SCALE, *rest).mean(axis=(1, 3))


def to_bytes(image: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def gray(image: np.ndarray) -> np.ndarray:
    return np.repeat(to_bytes(image)[..., None], 3, axis=2)


def tile(rows: list[list[np.ndarray]], gap: int = 2) -> Image.Image:
    """Pictures of one size in rows."""
    height, width = rows[0][0].shape[:2]
    sheet = Image.new("RGB", ((width + gap) * max(map(len, rows)) - gap, (height + gap) * len(rows) - gap), "white")
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            sheet.paste(Image.fromarray(image), (x * (width + gap), y * (height + gap)))
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    rows = []
    for seed in range(8):
        scene = random_scene(np.random.default_rng(seed), shape="person" if seed % 3 == 0 else "")
        drawing = draw(scene)
        rows.append([drawing.picture, *drawing.maps.values()])
        print(f"row {seed}: {caption(scene)}")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    tile(rows).save(arguments.out)


if __name__ == "__main__":
    main()
