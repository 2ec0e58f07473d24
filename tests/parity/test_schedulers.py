"""Every scheduler, in whole pipelines, equals diffusers. Schedules and steps alone: `tests/schedulers.rs`."""

from __future__ import annotations

import pytest

from pictures import encode, mask, photo
from schedulers import SCHEDULERS
from support import Case, check

OTHER_PROMPT = {"prompt": "a blue ship under a starry sky"}
SEED = {"seed": 12}
INIT = {"width": 128, "height": 128, "image": encode(photo(10)), "strength": 0.7, "num_inference_steps": 6}
OTHER_INIT = {"image": encode(photo(11))}
INPAINT = INIT | {"mask_image": encode(mask(1))}
V_ZERO_SNR = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
OWN = {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++"}


def other(name: str) -> dict:
    """A scheduler that is not that one, for the change that must show."""
    return {"scheduler": "ddim" if "sde" in name else "dpmpp_2m_sde"}


TEXT = [Case(name, {"scheduler": name}, [OTHER_PROMPT, SEED, other(name)]) for name in SCHEDULERS]
CURVES = [
    Case(
        f"{name} {curve}",
        {"scheduler": name, "sigma_schedule": curve} | more,
        [OTHER_PROMPT, {"sigma_schedule": None}],
    )
    for name, curve, more in (
        ("dpmpp_2m", "karras", {}),
        ("dpmpp_2m", "lu", {}),
        ("dpmpp_2m", "sgm_uniform", {}),
        ("dpmpp_2m_sde", "exponential", {}),
        ("dpmpp_2s", "karras", {}),
        ("dpmpp_sde", "karras", {}),
        ("dpm2", "karras", {}),
        ("dpm2_ancestral", "exponential", {}),
        ("deis", "exponential", {}),
        ("euler", "beta", {}),
        ("heun", "beta", {}),
        ("lms", "exponential", {}),
        ("unipc", "beta", {}),
        ("dpmpp_2m", "ays", {"num_inference_steps": 10}),
        ("euler", "ays", {"num_inference_steps": 10}),
        ("heun", "ays", {"num_inference_steps": 10}),
    )
]
TIMESTEPS, SIGMAS = [999, 750, 400, 90], [14.6, 6.3, 2.1, 0.5, 0.0]
LISTS = [
    *(
        Case(f"{name} timesteps", {"scheduler": name, "timesteps": TIMESTEPS}, [{"timesteps": [999, 500, 400, 90]}])
        for name in ("euler", "heun", "ddpm", "dpmpp_2m", "dpmpp_2s", "lcm", "tcd")
    ),
    Case("euler sigmas", {"scheduler": "euler", "sigmas": SIGMAS}, [{"sigmas": [14.6, 4.0, 2.1, 0.5, 0.0]}]),
    Case(
        "a strength of a list",
        INIT | {"scheduler": "dpmpp_2m", "timesteps": TIMESTEPS},
        [OTHER_INIT, {"timesteps": [999, 750, 400, 20]}],
    ),
]
NOISE = [
    Case(f"{name}, two images", {"scheduler": name, "num_images": 2}, [OTHER_PROMPT, SEED])
    for name in ("euler_ancestral", "ddpm", "dpm2_ancestral", "dpmpp_3m_sde", "dpmpp_sde", "lcm")
]
NOISE.append(Case("tcd eta", {"scheduler": "tcd", "eta": 0.3, "num_images": 2}, [{"eta": None}]))
IMAGE = [
    Case(f"{name}, image to image", INIT | {"scheduler": name}, [OTHER_INIT, {"strength": 0.35}, other(name)])
    for name in ("heun", "dpm2", "dpm2_ancestral", "dpmpp_2m", "dpmpp_2s", "dpmpp_sde", "lms", "pndm", "unipc", "lcm")
]
MASKED = [
    Case(f"{name}, inpainting", INPAINT | {"scheduler": name}, [OTHER_INIT, other(name)])
    for name in ("heun", "dpm2", "dpmpp_2m_sde", "unipc", "ddpm")
]
MODELS = [
    *(
        Case(f"zero terminal SNR, {name}", {"scheduler": name}, [OTHER_PROMPT], scheduler_config=V_ZERO_SNR)
        for name in ("dpmpp_2m", "euler_ancestral", "unipc", "ddpm")
    ),
    Case("the model's own scheduler", {"num_inference_steps": 6}, [SEED], scheduler_config=OWN),
    Case("the model's own curve", {"scheduler": "heun"}, [SEED], scheduler_config={"use_karras_sigmas": True}),
]


CASES = TEXT + CURVES + LISTS + NOISE + IMAGE + MASKED + MODELS
# A few seconds each: the default run has one of each kind of step, the others are in the full one.
QUICK = {
    *("euler_ancestral", "heun", "dpm2", "dpmpp_2m", "dpmpp_3m_sde", "dpmpp_2s", "dpmpp_sde"),
    *("deis", "unipc", "lcm", "edm_euler"),
    *("dpmpp_2m karras", "euler ays", "dpmpp_2m ays", "euler sigmas", "heun timesteps", "a strength of a list"),
    *("dpm2_ancestral, two images", "tcd eta", "heun, inpainting", "the model's own scheduler"),
    *("heun, image to image", "dpm2, image to image", "dpmpp_2m, image to image", "pndm, image to image"),
}


@pytest.mark.parametrize("case", [case for case in CASES if case.name in QUICK], ids=lambda case: case.name)
def test_equals_diffusers(case, worker, test_models, reference, tmp_path):
    check(case, worker, test_models, reference, tmp_path)


@pytest.mark.full
@pytest.mark.parametrize("case", [case for case in CASES if case.name not in QUICK], ids=lambda case: case.name)
def test_every_scheduler_equals_diffusers(case, worker, test_models, reference, tmp_path):
    check(case, worker, test_models, reference, tmp_path)


def test_the_default_run_names_cases_that_there_are():
    assert QUICK <= {case.name for case in CASES}
