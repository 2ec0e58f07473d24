"""Which scheduler of diffusers a request means."""

from __future__ import annotations

from typing import Any
from unittest import mock

import diffusers
import torch
from diffusers.schedulers import AysSchedules, SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor

MULTISTEP = "DPMSolverMultistepScheduler"
SDE = {"algorithm_type": "sde-dpmsolver++"}
# By our names: the class, and what makes it the solver that the name says.
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpm2": ("KDPM2DiscreteScheduler", {}),
    "dpm2_ancestral": ("KDPM2AncestralDiscreteScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "pndm": ("PNDMScheduler", {}),
    "dpmpp_2m": (MULTISTEP, {}),
    "dpmpp_2m_sde": (MULTISTEP, SDE),
    "dpmpp_2m_sde_heun": (MULTISTEP, SDE | {"solver_type": "heun"}),
    "dpmpp_3m_sde": (MULTISTEP, SDE | {"solver_order": 3}),
    "dpmpp_2s": ("DPMSolverSinglestepScheduler", {}),
    "dpmpp_sde": ("DPMSolverSDEScheduler", {}),
    "deis": ("DEISMultistepScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    "tcd": ("TCDScheduler", {}),
    "edm_euler": ("EDMEulerScheduler", {}),
    "edm_dpmpp_2m": ("EDMDPMSolverMultistepScheduler", {}),
}
CURVES = {
    "karras": "use_karras_sigmas",
    "exponential": "use_exponential_sigmas",
    "beta": "use_beta_sigmas",
    "lu": "use_lu_lambdas",
}


def scheduler_for(request: dict[str, Any], config: dict[str, Any]) -> SchedulerMixin:
    """The scheduler, set up; takes its fields out of the request, and puts the lists of Align Your Steps in."""
    name, curve = request.pop("scheduler", None), request.pop("sigma_schedule", None)
    class_name, overrides = SCHEDULERS[name] if name else (config["_class_name"], {})
    config = dict(config)
    if curve:
        config |= {flag: name == curve for name, flag in CURVES.items()}
    if curve == "sgm_uniform":
        config["timestep_spacing"] = "trailing"
    if curve == "ays":
        field = "sigmas" if class_name == "EulerDiscreteScheduler" else "timesteps"
        request[field] = AysSchedules[f"StableDiffusionXL{field.title()}"]
    return getattr(diffusers, class_name).from_config(config, **overrides)


class OwnNoise:
    """Noise from the generators in the place of DPM++ SDE's Brownian path."""

    def __init__(self, generators: list[torch.Generator]) -> None:
        def sampler(sample: torch.Tensor, *_: Any):
            return lambda *_: randn_tensor(sample.shape, generator=generators, dtype=sample.dtype)

        module = diffusers.schedulers.scheduling_dpmsolver_sde
        self.patch = mock.patch.object(module, "BrownianTreeNoiseSampler", sampler)

    def __enter__(self) -> None:
        self.patch.start()

    def __exit__(self, *_: Any) -> None:
        self.patch.stop()
