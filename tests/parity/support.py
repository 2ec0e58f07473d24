"""One request, run by the worker and by diffusers itself, and how far the two are apart."""

from __future__ import annotations

import itertools
import json
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    ControlNetModel,
    ControlNetUnionModel,
    StableDiffusionXLControlNetImg2ImgPipeline,
    StableDiffusionXLControlNetInpaintPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLControlNetUnionImg2ImgPipeline,
    StableDiffusionXLControlNetUnionInpaintPipeline,
    StableDiffusionXLControlNetUnionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.utils import logging
from PIL import Image, ImageFilter
from safetensors.torch import load_file

from pictures import decode
from schedulers import OwnNoise, scheduler_for

TOLERANCE = 1e-4  # relative error of the final latents
PIXELS = 1  # of 255
SIDE = 128  # pixels; what the test models make when nobody asks for another size
MUST_MOVE = 100 * TOLERANCE  # what a change of an input that the case is about must do to diffusers' own latents

# The models are tiny: threads would wait for each other most of the time.
torch.set_num_threads(1)
logging.set_verbosity_error()  # its hints on dtypes come with every call

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
    for name in sorted({control["model"] for control in request.get("controlnets", [])}):
        command += ["--controlnet", f"{name}={net_folder(model, name)}"]
    command += ["--input", scratch / "request.json", "--output", scratch / "out"]
    command += ["--save-latents", scratch / "latents.safetensors", *options]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pictures = [np.array(Image.open(line)) for line in done.stdout.splitlines()]
    return load_file(scratch / "latents.safetensors")["latents"], pictures


NETS = {"plain": ControlNetModel, "small": ControlNetModel, "union": ControlNetUnionModel, "union8": ControlNetUnionModel}

# By what the job starts from, and the kind of its nets.
PIPELINES = {
    ("text", None): StableDiffusionXLPipeline,
    ("image", None): StableDiffusionXLImg2ImgPipeline,
    ("inpaint", None): StableDiffusionXLInpaintPipeline,
    ("text", ControlNetModel): StableDiffusionXLControlNetPipeline,
    ("image", ControlNetModel): StableDiffusionXLControlNetImg2ImgPipeline,
    ("inpaint", ControlNetModel): StableDiffusionXLControlNetInpaintPipeline,
    ("text", ControlNetUnionModel): StableDiffusionXLControlNetUnionPipeline,
    ("image", ControlNetUnionModel): StableDiffusionXLControlNetUnionImg2ImgPipeline,
    ("inpaint", ControlNetUnionModel): StableDiffusionXLControlNetUnionInpaintPipeline,
}


class Reference:
    """diffusers' pipelines, loaded once for each model; results are kept, since cases share their baselines."""

    def __init__(self) -> None:
        self.pipelines: dict[Path, StableDiffusionXLPipeline] = {}
        self.nets: dict[Path, ControlNetModel | ControlNetUnionModel] = {}
        self.results: dict[str, torch.Tensor] = {}

    def pipeline(self, model: Path) -> StableDiffusionXLPipeline:
        if model not in self.pipelines:
            variant = "fp16" if list(model.glob("*/*.fp16.safetensors")) else None
            pipeline = StableDiffusionXLPipeline.from_pretrained(model, variant=variant, torch_dtype=torch.float32)
            pipeline.set_progress_bar_config(disable=True)
            self.pipelines[model] = pipeline
        return self.pipelines[model]

    def net(self, model: Path, name: str) -> ControlNetModel | ControlNetUnionModel:
        folder = net_folder(model, name)
        if folder not in self.nets:
            self.nets[folder] = NETS[name].from_pretrained(folder).eval()
        return self.nets[folder]

    def latents(self, model: Path, request: dict[str, Any], scheduler_config: dict[str, Any]) -> torch.Tensor:
        key = json.dumps([str(model), request, scheduler_config], sort_keys=True)
        if key not in self.results:
            self.results[key] = self.run(model, request, scheduler_config)
        return self.results[key]

    def run(self, model: Path, request: dict[str, Any], scheduler_config: dict[str, Any]) -> torch.Tensor:
        return self.call(model, request, scheduler_config, output_type="latent")

    def call(
        self,
        model: Path,
        request: dict[str, Any],
        scheduler_config: dict[str, Any],
        output_type: str,
        every_control_a_net: bool = False,
    ):
        pipeline = self.pipeline(model)
        request = dict(request)
        own = json.loads((model / "scheduler" / "scheduler_config.json").read_text()) | scheduler_config
        chosen = scheduler_for(request, own)
        seed, count = request.pop("seed"), request.pop("num_images", 1)
        for key in ("original_size", "target_size", "crops_coords_top_left"):
            for name in (key, f"negative_{key}"):
                if name in request:
                    request[name] = tuple(request[name])
        task = "inpaint" if "mask_image" in request else "image" if "image" in request else "text"
        controls = request.pop("controlnets", [])
        kind = NETS[controls[0]["model"]] if controls else None
        pictures(request, task, kind)
        if controls:
            names = list(dict.fromkeys(control["model"] for control in controls))
            if kind is ControlNetModel or every_control_a_net:  # each control is a run of its own
                names = [control["model"] for control in controls]
            nets = [self.net(model, name) for name in names]
            pipeline = PIPELINES[task, kind].from_pipe(pipeline, controlnet=nets[0] if len(nets) == 1 else nets)
            pipeline.set_progress_bar_config(disable=True)
            request |= control_arguments(controls, task, kind)
        elif task != "text":
            pipeline = PIPELINES[task, kind].from_pipe(pipeline)
            pipeline.set_progress_bar_config(disable=True)
        pipeline.scheduler = chosen
        generators = [torch.Generator("cpu").manual_seed(seed + i) for i in range(count)]
        last: dict[str, torch.Tensor] = {}

        def keep(_pipeline, _step, _timestep, values):
            last.update(values)
            return values

        cropped = "padding_mask_crop" in request  # diffusers then gives pictures only
        with torch.no_grad(), OwnNoise(generators):
            images = pipeline(
                **request,
                num_images_per_prompt=count,
                generator=generators,
                output_type="pil" if cropped else output_type,
                callback_on_step_end=keep,
            ).images
        return last["latents"] if cropped and output_type == "latent" else images

    def pixels(self, model: Path, latents: torch.Tensor) -> list[np.ndarray]:
        pipeline = self.pipeline(model)
        vae = pipeline.vae
        with torch.no_grad():
            images = [vae.decode(one[None] / vae.config.scaling_factor).sample for one in latents]
        return [np.array(pipeline.image_processor.postprocess(image)[0]) for image in images]


def pictures(request: dict[str, Any], task: str, kind: type | None) -> None:
    """Puts pictures in the place of base64, in the form that the pipeline of that task wants."""
    if task == "text":
        if kind:
            request.setdefault("width", SIDE)
            request.setdefault("height", SIDE)
        return
    request["image"] = decode(request["image"])
    if task == "image" and kind is None:  # this one takes the size from the picture
        size = (request.pop("width", SIDE), request.pop("height", SIDE))
        request["image"] = request["image"].resize(size, Image.Resampling.LANCZOS)
    else:
        request.setdefault("width", SIDE)
        request.setdefault("height", SIDE)
    if task == "inpaint":
        request["mask_image"] = decode(request["mask_image"])
        if blur := request.pop("mask_blur", 0):
            request["mask_image"] = request["mask_image"].filter(ImageFilter.GaussianBlur(blur))
        request.setdefault("strength", 0.9999)
    else:
        request.setdefault("strength", 0.8 if kind else 0.3)


def control_arguments(controls: list[dict[str, Any]], task: str, kind: type) -> dict[str, Any]:
    maps = [decode(control["image"]) for control in controls]

    def each(key: str, default: Any) -> Any:
        values = [control.get(key, default) for control in controls]
        return values[0] if kind is ControlNetModel and len(values) == 1 else values

    arguments = {
        "guess_mode": controls[0].get("guess_mode", False),
        "controlnet_conditioning_scale": each("scale", 1.0),
        "control_guidance_start": each("start", 0.0),
        "control_guidance_end": each("end", 1.0),
    }
    if kind is ControlNetUnionModel:
        arguments["control_mode"] = each("mode", 0)
    many = kind is ControlNetUnionModel or len(maps) > 1
    field = "image" if task == "text" and kind is ControlNetModel else "control_image"
    return arguments | {field: maps if many else maps[0]}


def net_folder(model: Path, name: str) -> Path:
    return model.parent / f"{model.name}-{name}"


def pairwise(axes: dict[str, tuple], allowed: Callable[[dict], bool] = lambda row: True) -> list[dict]:
    """The fewest rows a greedy choice finds in which every two values of two axes meet that may."""
    rows: list[dict] = []
    all_rows = [row for row in product(axes) if allowed(row)]
    missing = set().union(*(pairs(row) for row in all_rows))
    while missing:
        best = max(all_rows, key=lambda row: len(pairs(row) & missing))
        rows.append(best)
        missing -= pairs(best)
    return rows


def covers_twice(axes: dict[str, tuple], rows: list[dict]) -> bool:
    """Whether each value of each axis is met at least twice."""
    return all(sum(row[axis] == value for row in rows) >= 2 for axis, values in axes.items() for value in values)


def product(axes: dict[str, tuple]) -> list[dict]:
    return [dict(zip(axes, values)) for values in itertools.product(*axes.values())]


def pairs(values: dict) -> set:
    return {frozenset(pair) for pair in itertools.combinations(values.items(), 2)}


def check(case: Case, worker: Path, models: dict[str, Path], reference: Reference, scratch: Path) -> None:
    model = models[case.model]
    request = BASE | case.request
    tiled = "--vae-tiling" in case.options
    reference.pipeline(model).vae.use_tiling = tiled
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
    if "padding_mask_crop" in request:
        return  # what comes out is a larger picture with this one in it
    expected = reference.pixels(model, theirs)
    assert len(pictures) == len(expected)
    for index, (mine, wanted) in enumerate(zip(pictures, expected)):
        off = np.abs(mine.astype(int) - wanted.astype(int)).max()
        assert off <= PIXELS, f"{case.name}: picture {index} is off by {off} of 255"


def _changed(request: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """`None` takes a field out."""
    return {key: value for key, value in (request | change).items() if value is not None}
