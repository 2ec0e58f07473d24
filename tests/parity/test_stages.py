"""Parts of a run, a second pass, the refiner, and guidance as an input of the UNet: all as diffusers' pipelines do them
one after the other, with the same generators."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionXLImg2ImgPipeline
from PIL import Image

from pictures import decode, encode, photo
from schedulers import scheduler_for
from support import BASE, PIPELINES, SIDE, Case, Reference, check, control_arguments

UNGUIDED = 1 + 1e-12  # of the two predictions the prompt's alone, and still "above 1" for diffusers
INIT, OTHER_INIT = encode(photo(10)), encode(photo(11))
MAP, OTHER_MAP = encode(photo(3)), encode(photo(4))
TEXT = ("prompt", "prompt_2", "negative_prompt", "negative_prompt_2", "guidance_scale", "eta")
SIZES = ("original_size", "crops_coords_top_left", "target_size")
SCORES = ("aesthetic_score", "negative_aesthetic_score")
# What the model cards say.
PRESETS: dict[str, dict[str, Any]] = {
    "turbo": {"scheduler": "euler_ancestral"},
    "lightning": {"scheduler": "euler"},
    "hyper": {"scheduler": "lcm", "timesteps": [800]},
}
MODES = {"latent": "bilinear", "latent_bicubic": "bicubic", "latent_nearest": "nearest"}


class Stages(Reference):
    def image_pipeline(self, model: Path) -> StableDiffusionXLImg2ImgPipeline:
        key = model / "img2img"
        if key not in self.pipelines:
            if json.loads((model / "model_index.json").read_text()).get("requires_aesthetics_score"):
                pipeline = StableDiffusionXLImg2ImgPipeline.from_pretrained(model)
            else:
                pipeline = StableDiffusionXLImg2ImgPipeline.from_pipe(self.pipeline(model))
            pipeline.set_progress_bar_config(disable=True)
            self.pipelines[key] = pipeline
        return self.pipelines[key]

    def run(self, model: Path, request: dict[str, Any], scheduler_config: dict[str, Any]) -> torch.Tensor:
        if preset := request.get("preset"):
            request, scheduler_config = PRESETS[preset] | request, {"timestep_spacing": "trailing"}
        count, seed, steps = request.get("num_images", 1), request["seed"], request["num_inference_steps"]
        generators = [torch.Generator().manual_seed(seed + i) for i in range(count)]
        size = (request.get("height", SIDE), request.get("width", SIDE))
        common = {key: request[key] for key in TEXT if key in request}
        sizes = {name: tuple(request[name]) for key in SIZES for name in (key, f"negative_{key}") if name in request}
        scores = {key: request[key] for key in SCORES if key in request}
        common |= sizes | {"num_images_per_prompt": count, "generator": generators, "output_type": "latent"}
        hires, refiner = request.get("hires"), request.get("refiner")
        start, end = request.get("denoising_start"), request.get("denoising_end")

        def call(pipeline, folder: Path, **arguments):
            config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text()) | scheduler_config
            pipeline.scheduler = scheduler_for({"scheduler": request.get("scheduler")}, config)
            with torch.no_grad():
                return pipeline(**(common | arguments)).images

        first_end = end if hires is None else None
        if "image" in request:
            picture = decode(request["image"]).resize(size[::-1], Image.Resampling.LANCZOS)
            latents = call(
                self.image_pipeline(model),
                model,
                image=picture,
                num_inference_steps=steps,
                strength=request.get("strength", 0.3),
                denoising_end=first_end,
                **({} if refiner is not None or start is None else {"denoising_start": start}),
                **scores,
            )
        else:
            pipeline, extra = self.pipeline(model), {}
            if controls := request.get("controlnets"):
                pipeline, extra = self.controlled(model, controls, "text")
            if timesteps := request.get("timesteps"):
                extra["timesteps"] = timesteps
            window = guidance_window(request) if {"guidance_start", "guidance_end"} & set(request) else {}
            latents = call(
                pipeline, model, height=size[0], width=size[1], num_inference_steps=steps, denoising_end=first_end,
                **extra, **window,
            )  # fmt: skip
        if hires is not None:
            size = tuple(int(side * hires.get("scale", 2.0) / 8) * 8 for side in size)
            mode = hires.get("upscaler", "latent")
            if mode == "lanczos":
                pictures = [Image.fromarray(picture) for picture in self.pixels(model, latents)]
                image: Any = [picture.resize(size[::-1], Image.Resampling.LANCZOS) for picture in pictures]
            else:
                image = torch.nn.functional.interpolate(latents, [side // 8 for side in size], mode=MODES[mode])
            strength, second = hires.get("strength", 0.7), hires.get("steps", steps)
            if mode == "lanczos" and count > 1:
                latents = self.one_by_one(call, model, image, generators, second, strength, end)
            else:
                pipeline, extra = self.image_pipeline(model), {"denoising_end": end}
                if controls := request.get("controlnets"):
                    pipeline, extra = self.controlled(model, controls, "image")
                    extra |= {"height": size[0], "width": size[1]}
                latents = call(pipeline, model, image=image, num_inference_steps=second, strength=strength, **extra)
        if refiner is not None:
            folder = model.parent / "refiner"
            begin = start or end
            latents = call(
                self.image_pipeline(folder),
                folder,
                image=latents,
                num_inference_steps=refiner.get("num_inference_steps", steps),
                **({"denoising_start": begin} if begin else {"strength": request.get("strength", 0.3)}),
                **scores,
            )
        return latents

    def one_by_one(self, call, model, images, generators, steps, strength, end) -> torch.Tensor:
        """Different pictures in one call are a batch of prompts to diffusers; the arithmetic is that of one at a time."""
        latents = [
            call(self.image_pipeline(model), model, image=image, num_inference_steps=steps, strength=strength,
                 denoising_end=end, num_images_per_prompt=1, generator=[generator])  # fmt: skip
            for image, generator in zip(images, generators)
        ]
        return torch.cat(latents)

    def controlled(self, model: Path, controls: list[dict[str, Any]], task: str):
        net = self.net(model, controls[0]["model"])
        pipeline = PIPELINES[task, ControlNetModel].from_pipe(self.pipeline(model), controlnet=net)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline, control_arguments(controls, task, ControlNetModel)


def guidance_window(request: dict[str, Any]) -> dict[str, Any]:
    """diffusers' guiders act from step int(start * steps) to before int(end * steps)."""
    steps, scale = request["num_inference_steps"], request["guidance_scale"]
    first, last = (int(request.get(key, default) * steps) for key, default in (("guidance_start", 0), ("guidance_end", 1)))

    def at(step: int) -> float:
        return scale if first <= step < last else UNGUIDED

    def after(pipeline, step, _timestep, values):
        pipeline._guidance_scale = at(step + 1)
        return values

    return {"guidance_scale": at(0), "callback_on_step_end": after}


@pytest.fixture(scope="module")
def stages() -> Stages:
    return Stages()


OTHER_PROMPT = {"prompt": "a blue ship under a starry sky"}
HAND_OVER = {"num_inference_steps": 10, "refiner": {}, "denoising_end": 0.7}
SMALL = {"width": 64, "height": 72}
FROM_IMAGE = {"image": INIT, "width": SIDE, "height": SIDE}
CASES = [
    Case("guidance ends early", {"num_inference_steps": 6, "guidance_end": 0.5}, [{"guidance_end": 1.0}]),
    Case(
        "guidance begins late",
        {"num_inference_steps": 6, "guidance_start": 0.35, "guidance_end": 0.7, "negative_prompt": "blurry"},
        [{"guidance_start": 0.0}, {"guidance_end": 1.0}],
    ),
    Case("stopped early", {"num_inference_steps": 10, "denoising_end": 0.6}, [{"denoising_end": None}]),
    Case("begun in the middle", FROM_IMAGE | {"denoising_start": 0.5}, [{"denoising_start": None}, {"image": OTHER_INIT}]),
    Case(
        "a part of the run",
        FROM_IMAGE | {"denoising_start": 0.3, "denoising_end": 0.8, "num_inference_steps": 10},
        [{"denoising_start": 0.5}, {"denoising_end": None}],
    ),
    Case("hand-over", HAND_OVER, [OTHER_PROMPT, {"refiner": None}, {"denoising_end": 0.4}]),
    Case(
        "hand-over of two images, DDIM",
        HAND_OVER | {"num_images": 2, "scheduler": "ddim", "eta": 0.5, "refiner": {"num_inference_steps": 14}},
        [{"refiner": {}}, {"eta": 0.0}, {"seed": 12}],
    ),
    Case(
        "what a refiner is told",
        HAND_OVER
        | {
            "denoising_end": 0.2,
            "aesthetic_score": 10.0,
            "negative_aesthetic_score": 0.0,
            "prompt_2": "a green dragon",
            "negative_prompt": "blurry",
            "negative_crops_coords_top_left": [20, 40],
            "negative_original_size": [64, 200],
            "negative_target_size": [64, 100],
        },
        [{"aesthetic_score": 0.0}, {"negative_aesthetic_score": 10.0}, {"prompt_2": None}, {"negative_prompt": None}],
    ),
    Case(
        "a refiner over the finished latents",
        {"refiner": {"num_inference_steps": 8}, "strength": 0.5, "num_images": 2},
        [{"strength": 0.25}, {"refiner": None}],
    ),
    Case("a refiner after a picture", FROM_IMAGE | {"refiner": {}, "strength": 0.75, "denoising_end": 0.6}, [{"image": OTHER_INIT}]),
    Case(
        "a refiner alone",
        FROM_IMAGE | {"strength": 0.6, "aesthetic_score": 8.0, "negative_crops_coords_top_left": [20, 40]},
        [{"aesthetic_score": 6.0}, {"negative_crops_coords_top_left": None}, {"image": OTHER_INIT}],
        model="refiner",
    ),
    *(
        Case(
            f"hires, {upscaler}",
            SMALL | {"hires": {"scale": 1.5, "strength": 0.5, "upscaler": upscaler}, "num_images": count},
            [OTHER_PROMPT, {"hires": {"scale": 1.5, "strength": 0.75, "upscaler": upscaler}}, {"hires": None, "width": 96, "height": 104}],
        )
        for upscaler, count in (("latent", 2), ("latent_bicubic", 1), ("latent_nearest", 1), ("lanczos", 2))
    ),
    Case(
        "hires, with a ControlNet in both passes",
        SMALL | {"hires": {"scale": 1.5}, "controlnets": [{"model": "plain", "image": MAP, "scale": 0.7}]},
        [{"controlnets": [{"model": "plain", "image": OTHER_MAP, "scale": 0.7}]}, {"controlnets": None}],
    ),
    Case(
        "hires, its own steps, and then the refiner",
        SMALL | {"hires": {"steps": 8}, "refiner": {"num_inference_steps": 10}, "denoising_end": 0.8},
        [{"refiner": None}, {"hires": {"steps": 6}}],
    ),
    *(
        Case(f"hand-over, {name}", HAND_OVER | {"scheduler": name}, [{"denoising_end": 0.4}, {"refiner": None}])
        for name in ("heun", "dpmpp_2m", "euler_ancestral")
    ),
    *(
        Case(f"hires, {name}", SMALL | {"hires": {"scale": 1.5}, "scheduler": name}, [OTHER_PROMPT, {"scheduler": "ddim"}])
        for name in ("heun", "unipc")
    ),
    Case(
        "guidance as an input",
        {"scheduler": "euler", "guidance_scale": 8.0, "negative_prompt": "blurry"},
        [{"guidance_scale": 7.0}],
        model="lcm",
    ),
    Case("a model that says it is LCM", {"guidance_scale": 8.0}, [{"guidance_scale": 7.0}, {"seed": 12}], model="lcm"),
    *(
        Case(f"preset {name}", {"preset": name, "guidance_scale": 1.0, "num_inference_steps": steps}, [{"preset": None}])
        for name, steps in (("turbo", 3), ("lightning", 4), ("hyper", 1))
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_diffusers(case, worker, test_models, stages, tmp_path):
    if case.request.get("refiner") is not None:
        case.options = ("--refiner", str(test_models["refiner"]))
    check(case, worker, test_models, stages, tmp_path)
