"""diffusers doing what is measured on our side, in processes of its own.

    reference.py first --model DIR --input request.json --output picture.png   one picture; prints its path
    reference.py loop --model DIR --input request.json --repeat N              a line of timings for each run
    reference.py latents jobs.json                                             what parity is compared with

This is diffusers as people use it: eager, its own attention, no progress bar. Imports stand in the functions, so that a
start pays only for what it needs.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

Request = dict[str, Any]


def load(model: str, dtype: str, device: str, threads: int | None = None, controlnet: str | None = None) -> Any:
    """`controlnet` is NAME=DIR."""
    import diffusers
    import torch

    if threads:
        torch.set_num_threads(threads)
    kind, parts = diffusers.StableDiffusionXLPipeline, {}
    if controlnet:
        folder = controlnet.partition("=")[2]
        union = "Union" if read(Path(folder) / "config.json")["_class_name"] == "ControlNetUnionModel" else ""
        kind = getattr(diffusers, f"StableDiffusionXLControlNet{union}Pipeline")
        net = getattr(diffusers, f"ControlNet{union}Model")
        parts["controlnet"] = net.from_pretrained(folder, dtype=getattr(torch, dtype))
    pipeline = kind.from_pretrained(
        model, **parts, dtype=getattr(torch, dtype), use_safetensors=True, add_watermarker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def arguments(request: Request) -> dict[str, Any]:
    """The pipeline's arguments for a request of ours: one generator for each picture, seed, seed + 1, ..."""
    import torch

    count = request.get("num_images", 1)
    names = ("prompt", "negative_prompt", "width", "height", "num_inference_steps", "guidance_scale")
    return {name: request[name] for name in names if name in request} | controls(request) | {
        "num_images_per_prompt": count,
        "generator": [torch.Generator("cpu").manual_seed(request["seed"] + index) for index in range(count)],
    }


def controls(request: Request) -> dict[str, Any]:
    """Those of one net, each with scale 1."""
    import base64
    import io

    from PIL import Image

    entries = request.get("controlnets", [])
    maps = [Image.open(io.BytesIO(base64.b64decode(entry["image"]))).convert("RGB") for entry in entries]
    if not entries:
        return {}
    if "mode" not in entries[0]:
        return {"image": maps[0]}
    scales = {"controlnet_conditioning_scale": [1.0] * len(maps)}
    return scales | {"control_image": maps, "control_mode": [entry["mode"] for entry in entries]}


def first(options: argparse.Namespace) -> None:
    pipeline = load(options.model, options.dtype, options.device, options.threads)
    pipeline(**arguments(read(options.input))).images[0].save(options.output)
    print(options.output, flush=True)


def loop(options: argparse.Namespace) -> None:
    """Times each run and its phases, by marks set around the text encoders and the VAE."""
    import torch

    pipeline = load(options.model, options.dtype, options.device, options.threads, options.controlnet)
    marks: list[float] = []

    def mark() -> None:
        if options.device.startswith("cuda"):
            torch.cuda.synchronize()
        marks.append(time.perf_counter())

    def marked(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            mark()
            result = function(*args, **kwargs)
            mark()
            return result

        return call

    pipeline.encode_prompt = marked(pipeline.encode_prompt)
    pipeline.vae.decode = marked(pipeline.vae.decode)
    request = read(options.input)
    for _ in range(options.repeat):
        marks.clear()
        mark()
        pipeline(**arguments(request))
        mark()
        start, _, encoded, denoised, _, end = marks
        phases = {
            "encode_prompt": encoded - start,
            "denoise": denoised - encoded,
            "decode": end - denoised,
        }
        print(json.dumps({name: seconds * 1000 for name, seconds in phases.items()}), flush=True)


def latents(options: argparse.Namespace) -> None:
    """For each job: the pipeline's latents in its dtype and, for 16 bits, in float32 from the same weights and the same
    noise (a draw differs from dtype to dtype)."""
    import torch

    for job in read(options.jobs):
        request, dtype, folder = job["request"], job["dtype"], Path(job["save"])
        folder.mkdir(parents=True, exist_ok=True)
        pipeline = load(job["model"], dtype, options.device, options.threads)
        shape = (1, pipeline.unet.config.in_channels, request["height"] // 8, request["width"] // 8)
        draws = [torch.randn(shape, generator=g, dtype=getattr(torch, dtype)) for g in arguments(request)["generator"]]
        noise = torch.cat(draws)
        save(pipeline, request, noise, options.device, folder / "eager")
        if dtype != "float32":
            save(pipeline.to(torch.float32), request, noise.float(), options.device, folder / "float32")
        del pipeline


def save(pipeline: Any, request: Request, noise: Any, device: str, stem: Path) -> None:
    from safetensors.torch import save_file

    last: dict[str, Any] = {}

    def keep(_pipeline: Any, _step: int, _timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        last.update(values)
        return values

    images = pipeline(**arguments(request), latents=noise.to(device), callback_on_step_end=keep).images
    save_file({"latents": last["latents"].float().cpu().contiguous()}, f"{stem}.safetensors")
    for index, image in enumerate(images):
        image.save(f"{stem}-{request['seed'] + index}.png")


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def main() -> None:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--device", default="cpu")
    common.add_argument("--dtype", default="float32")
    common.add_argument("--threads", type=int)
    one_model = argparse.ArgumentParser(add_help=False)
    one_model.add_argument("--model", required=True)
    one_model.add_argument("--input", type=Path, required=True)

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("first", parents=[common, one_model])
    command.add_argument("--output", required=True)
    command.set_defaults(run=first)
    command = commands.add_parser("loop", parents=[common, one_model])
    command.add_argument("--repeat", type=int, default=1)
    command.add_argument("--controlnet", metavar="NAME=DIR")
    command.set_defaults(run=loop)
    command = commands.add_parser("latents", parents=[common])
    command.add_argument("jobs", type=Path)
    command.set_defaults(run=latents)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
