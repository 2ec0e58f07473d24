"""Text to image equals diffusers: a pairwise cover of what combines, then each option alone."""

from __future__ import annotations

import pytest

from support import Case, check, covers_twice, pairwise, product

AXES = {
    "scheduler": ("euler", "ddim"),
    "guidance": ("on", "off"),
    "negative": ("absent", "empty", "given"),
    "images": (1, 2),
    "size": ("square", "tall"),
    "model": ("default", "second"),
}
SIZES = {"square": {}, "tall": {"width": 72, "height": 136}}  # tall is a multiple of 8, not of 32
NEGATIVES = {"absent": {}, "empty": {"negative_prompt": ""}, "given": {"negative_prompt": "blurry, low quality"}}
OTHER_PROMPT = {"prompt": "a blue ship under a starry sky"}


def combined(values: dict) -> Case:
    request = {"scheduler": values["scheduler"], "num_images": values["images"]}
    request |= SIZES[values["size"]] | NEGATIVES[values["negative"]]
    request["guidance_scale"] = 5.0 if values["guidance"] == "on" else 1.0
    changes = [OTHER_PROMPT, {"seed": 12}]
    if values["guidance"] == "on":
        changes.append({"guidance_scale": 3.0})
        if values["negative"] == "given":
            changes.append({"negative_prompt": "a wall of bricks"})
        elif values["model"] == "default":
            # zeros and the encoding of an empty text differ, where the model makes that difference
            changes.append({"negative_prompt": None if values["negative"] == "empty" else ""})
    return Case("-".join(map(str, values.values())), request, changes, model=values["model"])


COVER = [combined(values) for values in pairwise(AXES)]
PRODUCT = [combined(values) for values in product(AXES)]

V_ZERO_SNR = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
# What happens at the last step shows only where the smallest noise level is not small.
FEW_LARGE_BETAS = {"num_train_timesteps": 50, "beta_start": 0.05, "beta_end": 0.08}
SINGLE = [
    Case("clip_skip", {"clip_skip": 1}, [{"clip_skip": None}]),
    Case("guidance_rescale", {"guidance_rescale": 0.7}, [{"guidance_rescale": None}]),
    Case(
        "prompt_2",
        {"prompt_2": "a green dragon", "negative_prompt": "blurry", "negative_prompt_2": "letters, a frame"},
        [{"prompt_2": None}, {"negative_prompt_2": None}],
    ),
    Case(
        "size conditioning",
        {"original_size": [64, 200], "crops_coords_top_left": [20, 40], "target_size": [300, 100]},
        [{"original_size": None}, {"crops_coords_top_left": None}, {"target_size": None}],
    ),
    Case(
        "negative size conditioning",
        {
            "negative_original_size": [64, 200],
            "negative_crops_coords_top_left": [20, 40],
            "negative_target_size": [300, 100],
        },
        [
            {"negative_original_size": [128, 128]},
            {"negative_crops_coords_top_left": None},
            {"negative_target_size": [128, 128]},
        ],
    ),
    Case("eta", {"scheduler": "ddim", "eta": 0.5, "num_images": 2}, [{"eta": None}]),
    Case("karras", {"scheduler": "euler", "sigma_schedule": "karras"}, [{"sigma_schedule": None}]),
    *(
        Case(f"zero terminal SNR, {name}", {"scheduler": name}, [OTHER_PROMPT], scheduler_config=V_ZERO_SNR)
        for name in ("euler", "ddim")
    ),
    *(
        Case(f"{spacing}, {name}", {"scheduler": name}, [OTHER_PROMPT], scheduler_config={"timestep_spacing": spacing})
        for spacing in ("linspace", "trailing")
        for name in ("euler", "ddim")
    ),
    Case(
        "final sigma",
        {"scheduler": "euler"},
        [OTHER_PROMPT],
        scheduler_config=FEW_LARGE_BETAS | {"final_sigmas_type": "sigma_min"},
    ),
    Case(
        "first alpha",
        {"scheduler": "ddim"},
        [OTHER_PROMPT],
        scheduler_config=FEW_LARGE_BETAS | {"set_alpha_to_one": True, "beta_schedule": "linear"},
    ),
    Case("the model's own scheduler", {}, [{"scheduler": "euler"}], model="second"),
    Case("tiled decode", {"width": 232, "height": 136}, [OTHER_PROMPT], options=("--vae-tiling", "on")),
]


@pytest.mark.parametrize("case", COVER + SINGLE, ids=lambda case: case.name)
def test_equals_diffusers(case, worker, test_models, reference, tmp_path):
    check(case, worker, test_models, reference, tmp_path)


@pytest.mark.full
@pytest.mark.parametrize("case", PRODUCT, ids=lambda case: case.name)
def test_every_combination_equals_diffusers(case, worker, test_models, reference, tmp_path):
    check(case, worker, test_models, reference, tmp_path)


def test_the_cover_meets_every_pair_and_every_value_at_least_twice():
    assert covers_twice(AXES, pairwise(AXES))
