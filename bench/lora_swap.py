"""How long it takes to change the LoRA of a full-size model: ours, and diffusers with peft, in one run.

    .venv/bin/python bench/random_checkpoint.py --arch sdxl --dtype bfloat16 --out target/full-size/model
    .venv/bin/python torchscript/export.py --arch sdxl --dtype bfloat16 --out target/full-size/graphs
    .venv/bin/python bench/lora_swap.py --model target/full-size/model --graphs target/full-size/graphs [--device cuda]

Two files of rank 32 for every attention projection of the UNet take turns. Ours is what the reply says of it (load,
restore, fuse); diffusers' is `unfuse_lora`, `unload_lora_weights`, `load_lora_weights` and `fuse_lora`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parent.parent
REQUEST = {"prompt": "a fox", "width": 64, "height": 64, "num_inference_steps": 1, "guidance_scale": 1, "seed": 1}


def write_lora(model: Path, path: Path, rank: int, seed: int, dtype: torch.dtype) -> int:
    """A LoRA in diffusers' names; gives the number of projections."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(json.loads((model / "unet" / "config.json").read_text()))
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, module in unet.named_modules():
        if name.endswith(("to_q", "to_k", "to_v", "to_out.0")):
            out, wide = module.weight.shape
            for part, shape in (("lora_A", (rank, wide)), ("lora_B", (out, rank))):
                tensors[f"unet.{name}.{part}.weight"] = (torch.randn(shape, generator=generator) * 0.01).to(dtype)
    save_file(tensors, path)
    return len(tensors) // 2


def ours(options: argparse.Namespace, folder: Path, names: list[str]) -> list[dict[str, float]]:
    command = [ROOT / "target/release/sdxl-worker", "serve", "--port", "0", "--model", options.model]
    command += ["--graphs", options.graphs, "--dtype", options.dtype, "--device", options.device, "--lora-dir", folder]
    process = subprocess.Popen([*map(str, command)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    address = next(line for line in process.stderr if line.startswith("listening on")).split()[-1]
    timings = []
    for name in names:
        body = json.dumps({"input": REQUEST | {"loras": [{"name": name}]}}).encode()
        request = urllib.request.Request(f"{address}/runsync?wait=300000", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as response:
            answer = json.load(response)
        assert answer["status"] == "COMPLETED", answer
        timings.append({key: ms / 1000 for key, ms in answer["output"]["timings"].items() if key.startswith("lora_")})
    process.terminate()
    process.wait()
    return timings


def theirs(options: argparse.Namespace, folder: Path, names: list[str]) -> list[dict[str, float]]:
    from diffusers import StableDiffusionXLPipeline

    dtype = getattr(torch, options.dtype)
    pipeline = StableDiffusionXLPipeline.from_pretrained(options.model, torch_dtype=dtype).to(options.device)
    timings = []
    for index, name in enumerate(names):
        phases = {}

        def timed(phase: str, work) -> None:
            started = time.perf_counter()
            work()
            if options.device != "cpu":
                torch.cuda.synchronize()
            phases[phase] = time.perf_counter() - started

        if index:
            timed("unfuse", pipeline.unfuse_lora)
            timed("unload", pipeline.unload_lora_weights)
        timed("load", lambda: pipeline.load_lora_weights(folder, weight_name=f"{name}.safetensors"))
        timed("fuse", pipeline.fuse_lora)
        timings.append(phases)
    return timings


def report(side: str, timings: list[dict[str, float]]) -> float:
    """Without the first, which takes nothing out."""
    phases = {key: statistics.median(each.get(key, 0.0) for each in timings[1:]) for key in timings[-1]}
    total = statistics.median(sum(each.values()) for each in timings[1:])
    print(f"{side}: {total:.2f} s per change;", ", ".join(f"{key} {seconds:.2f}" for key, seconds in phases.items()), flush=True)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--graphs", type=Path, required=True)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for seed, name in enumerate("ab"):
            path = Path(folder) / f"{name}.safetensors"
            count = write_lora(options.model, path, options.rank, seed, getattr(torch, options.dtype))
        print(f"{count} projections, rank {options.rank}, {path.stat().st_size / 1e6:.0f} MB a file", flush=True)
        names = ["ab"[index % 2] for index in range(options.repeat + 1)]
        mine = report("ours", ours(options, Path(folder), names))
        other = report("diffusers", theirs(options, Path(folder), names))
    print(f"ratio {mine / other:.2f}")


if __name__ == "__main__":
    main()
