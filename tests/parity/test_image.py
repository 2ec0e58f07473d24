"""Image to image and inpainting equal diffusers."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from pictures import decode, encode, mask, photo
from support import BASE, PIXELS, Case, check, covers_twice, pairwise, product, run_worker

INIT, OTHER_INIT = encode(photo(10)), encode(photo(11))
MASK, OTHER_MASK = encode(mask(1)), encode(mask(5))
AXES = {
    "task": ("image", "inpaint"),
    "scheduler": ("euler", "ddim"),
    "guidance": ("on", "off"),
    "images": (1, 2),
    "strength": (0.5, 0.75, 1.0),
    "size": ("square", "tall"),
    "model": ("default", "second", "inpaint"),
}
SIZES = {"square": {"width": 128, "height": 128}, "tall": {"width": 72, "height": 136}}


def allowed(row: dict) -> bool:
    return row["task"] == "inpaint" or row["model"] != "inpaint"


def combined(row: dict) -> Case:
    request = SIZES[row["size"]] | {"image": INIT, "num_images": row["images"], "strength": row["strength"]}
    request |= {"scheduler": row["scheduler"], "guidance_scale": 5.0 if row["guidance"] == "on" else 1.0}
    changes = [{"strength": 0.25}, {"seed": 12}]
    if row["task"] == "inpaint":
        request["mask_image"] = MASK
        changes.append({"mask_image": OTHER_MASK})
    if row["task"] == "inpaint" or row["strength"] < 1.0:
        changes.append({"image": OTHER_INIT})
    return Case("-".join(map(str, row.values())), request, changes, model=row["model"])


COVER = [combined(row) for row in pairwise(AXES, allowed)]
PRODUCT = [combined(row) for row in product(AXES) if allowed(row)]

SQUARE = SIZES["square"]
INPAINT = SQUARE | {"image": INIT, "mask_image": MASK}
SINGLE = [
    Case("default strength", SQUARE | {"image": INIT, "num_inference_steps": 10}, [{"strength": 0.6}]),
    Case("default strength of inpainting", INPAINT, [{"strength": 0.5}]),
    Case("eta draws after the picture's noise", SQUARE | {"image": INIT, "scheduler": "ddim", "eta": 0.5, "strength": 0.8}, [{"eta": 0.0}]),
    Case("eta of inpainting", INPAINT | {"scheduler": "ddim", "eta": 0.5, "num_images": 2}, [{"eta": 0.0}]),
    Case("mask blur", INPAINT | {"mask_blur": 9, "strength": 0.75}, [{"mask_blur": 0}, {"mask_blur": 33}]),
    Case(
        "negative sizes act one by one",
        SQUARE | {"image": INIT, "strength": 0.75, "negative_original_size": [64, 300], "crops_coords_top_left": [9, 80]},
        [{"negative_original_size": None}, {"crops_coords_top_left": None}],
    ),
    Case(
        "the size conditioning of a mask",
        INPAINT | {"negative_target_size": [64, 300], "original_size": [300, 60]},
        [{"negative_target_size": None}, {"original_size": None}],
    ),
    Case(
        "only the part around the mask",
        INPAINT | {"padding_mask_crop": 8},
        [{"padding_mask_crop": None}, {"padding_mask_crop": 30}, {"mask_image": OTHER_MASK}],
    ),
    Case("karras", SQUARE | {"image": INIT, "strength": 0.75, "scheduler": "euler", "sigma_schedule": "karras"}, [{"sigma_schedule": None}]),
    Case(
        "encoded in tiles",
        {"width": 232, "height": 136, "image": INIT, "strength": 0.5},
        [{"image": OTHER_INIT}],
        options=("--vae-tiling", "on"),
    ),
]


@pytest.mark.parametrize("case", COVER + SINGLE, ids=lambda case: case.name)
def test_equals_diffusers(case, worker, test_models, reference, tmp_path):
    check(case, worker, test_models, reference, tmp_path)


@pytest.mark.full
@pytest.mark.parametrize("case", PRODUCT, ids=lambda case: case.name)
def test_every_combination_equals_diffusers(case, worker, test_models, reference, tmp_path):
    check(case, worker, test_models, reference, tmp_path)


def test_the_cover_meets_every_value_at_least_twice():
    assert covers_twice(AXES, pairwise(AXES, allowed))


def test_the_picture_around_a_repainted_part_stays(worker, test_models, reference, tmp_path):
    """diffusers pastes what it made back into the picture, where the mask lets it show."""
    request = BASE | INPAINT | {"padding_mask_crop": 8, "mask_blur": 3}
    theirs = reference.call(test_models["default"], request, {}, output_type="pil")[0]
    _, [ours] = run_worker(worker, test_models["default"], test_models["graphs"], request, tmp_path)
    assert ours.shape == (130, 150, 3)
    assert np.abs(ours.astype(int) - np.array(theirs).astype(int)).max() <= PIXELS
    outside = np.array(decode(MASK).convert("L").resize((150, 130), Image.Resampling.NEAREST)) == 0
    assert outside[:5].all()
    assert (ours == np.array(decode(INIT)))[:5].all()


def test_a_request_without_a_size_takes_the_picture_s(worker, test_models, tmp_path):
    _, [picture] = run_worker(worker, test_models["default"], test_models["graphs"], BASE | {"image": INIT}, tmp_path)
    assert picture.shape == (128, 144, 3)
