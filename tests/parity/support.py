"""One request, run by the worker and by diffusers itself, and how far the two are apart."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, StableDiffusionXLPipeline
from PIL import Image
from safetensors.torch import load_file

TOLERANCE = 1e-4  # relative error of the final latents
PIXELS = 1  # of 255
MUST_MOVE = 100 * TOLERANCE  # what a change of an input that the case is about must do to diffusers' own latents

# The models are tiny: threads would wait for each other most of the time.
torch.set_num_threads(1)

SCHEDULERS = {"euler": EulerDiscreteScheduler, "ddim": DDIMScheduler}
BASE = {"prompt": "a red fox in the snow, oil painting", "num_inference_steps": 4, "guidance_scale": 5.0, "seed": 11}


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


@dataclass
class Case:
    """A request, and the changes each of which must show. Leaving out a key of `scheduler_config` must show too."""

    name: str
    request: dict[str, Any]
    changes: list[dict[str, Any]]
    model: str = "default"
    scheduler_config: dict[str, Any] = field(default_factory=dict)
    options: tuple[str, ...] = ()


def with_scheduler_config(model: Path, changes: dict[str, Any], scratch: Path) -> Path:
    """The same model, by links, with keys of its scheduler changed."""
    copy = scratch / "model"
    (copy / "scheduler").mkdir(parents=True)
    for item in model.iterdir():
        if item.name != "scheduler":
            (copy / item.name).symlink_to(item)
    config = json.loads((model / "scheduler" / "scheduler_config.json").read_text()) | changes
    (copy / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    return copy


def run_worker(worker: Path, model: Path, graphs: Path, request: dict, scratch: Path, options: tuple[str, ...] = ()):
    """Latents and pixels of the release binary, run as a person would."""
    scratch.mkdir(parents=True, exist_ok=True)
    (scratch / "request.json").write_text(json.dumps(request))
    command = [worker, "generate", "--model", model, "--graphs", graphs, "--device", "cpu", "--dtype", "float32"]
    command += ["--threads", "1"]
    command += ["--input", scratch / "request.json", "--output", scratch / "out"]
    command += ["--save-latents", scratch / "latents.safetensors", *options]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pictures = [np.array(Image.open(line)) for line in done.stdout.splitlines()]
    return load_file(scratch / "latents.safetensors")["latents"], pictures


class Reference:
    """diffusers' pipeline, loaded once for each model; results are kept, since cases share their baselines."""

    def __init__(self) -> None:
        self.pipelines: dict[Path, StableDiffusionXLPipeline] = {}
        self.results: dict[str, torch.Tensor] = {}

    def pipeline(self, model: Path) -> StableDiffusionXLPipeline:
        if model not in self.pipelines:
            variant = "fp16" if list(model.glob("*/*.fp16.safetensors")) else None
            pipeline = StableDiffusionXLPipeline.from_pretrained(model, variant=variant, torch_dtype=torch.float32)
            pipeline.set_progress_bar_config(disable=True)
            self.pipelines[model] = pipeline
        return self.pipelines[model]

    def latents(self, model: Path, request: dict[str, Any], scheduler_config: dict[str, Any]) -> torch.Tensor:
        key = json.dumps([str(model), request, scheduler_config], sort_keys=True)
        if key not in self.results:
            self.results[key] = self.run(model, request, scheduler_config)
        return self.results[key]

    def run(self, model: Path, request: dict[str, Any], scheduler_config: dict[str, Any]) -> torch.Tensor:
        pipeline = self.pipeline(model)
        request = dict(request)
        own = json.loads((model / "scheduler" / "scheduler_config.json").read_text()) | scheduler_config
        scheduler = request.pop("scheduler", None)
        if request.pop("sigma_schedule", None) == "karras":
            own["use_karras_sigmas"] = True
        classes = {cls.__name__: cls for cls in SCHEDULERS.values()}
        cls = SCHEDULERS[scheduler] if scheduler else classes[own["_class_name"]]
        pipeline.scheduler = cls.from_config(own)
        seed, count = request.pop("seed"), request.pop("num_images", 1)
        for key in ("original_size", "target_size", "crops_coords_top_left"):
            for name in (key, f"negative_{key}"):
                if name in request:
                    request[name] = tuple(request[name])
        generators = [torch.Generator("cpu").manual_seed(seed + i) for i in range(count)]
        with torch.no_grad():
            return pipeline(
                **request, num_images_per_prompt=count, generator=generators, output_type="latent"
            ).images

    def pixels(self, model: Path, latents: torch.Tensor, tiled: bool = False) -> list[np.ndarray]:
        pipeline = self.pipeline(model)
        vae = pipeline.vae
        (vae.enable_tiling if tiled else vae.disable_tiling)()
        with torch.no_grad():
            images = [vae.decode(one[None] / vae.config.scaling_factor).sample for one in latents]
        return [np.array(pipeline.image_processor.postprocess(image)[0]) for image in images]


def check(case: Case, worker: Path, models: dict[str, Path], reference: Reference, scratch: Path) -> None:
    model = models[case.model]
    request = BASE | case.request
    theirs = reference.latents(model, request, case.scheduler_config)
    assert torch.isfinite(theirs).all()

    others = [(change, _changed(request, change), case.scheduler_config) for change in case.changes]
    for key in case.scheduler_config:
        without = {name: value for name, value in case.scheduler_config.items() if name != key}
        others.append((f"no {key}", request, without))
    for change, other, config in others:
        moved = relative(reference.latents(model, other, config), theirs)
        # Turned round, since a change that ends in NaN (epsilon with zero terminal SNR) has moved too.
        assert not moved <= MUST_MOVE, f"{case.name} cannot fail: {change} moves diffusers' latents by {moved:.1e} only"

    folder = with_scheduler_config(model, case.scheduler_config, scratch) if case.scheduler_config else model
    ours, pictures = run_worker(worker, folder, models["graphs"], request, scratch / "run", case.options)
    error = relative(ours, theirs)
    assert error <= TOLERANCE, f"{case.name}: latents are off by {error:.1e}"
    expected = reference.pixels(model, theirs, tiled="--vae-tiling" in case.options)
    assert len(pictures) == len(expected)
    for index, (mine, wanted) in enumerate(zip(pictures, expected)):
        off = np.abs(mine.astype(int) - wanted.astype(int)).max()
        assert off <= PIXELS, f"{case.name}: picture {index} is off by {off} of 255"


def _changed(request: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """`None` takes a field out."""
    return {key: value for key, value in (request | change).items() if value is not None}
