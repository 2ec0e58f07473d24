"""How long it takes to change the LoRA of a model: ours, and diffusers with peft, in one run.

    .venv/bin/python bench/lora_swap.py                 a reduced model, made in target/bench/lora; below 2 minutes
    .venv/bin/python bench/lora_swap.py --model target/full-size/model --graphs target/full-size/graphs [--device cuda]

Two files for every attention projection of the UNet take turns. Ours is what the reply says of it (load, restore,
fuse); diffusers' is `unfuse_lora`, `unload_lora_weights`, `load_lora_weights` and `fuse_lora`. The reduced model has
SDXL's widths and one transformer block wherever SDXL has 1, 2 or 10, so 88 projections instead of 560.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from measure import ROOT, WORKER, Command, Row, ask, export, noise_band, random_checkpoint, run, serving, table

REQUEST = {"prompt": "a fox", "width": 64, "height": 64, "num_inference_steps": 1, "guidance_scale": 1, "seed": 1}
FEWER = {
    "unet": {"transformer_layers_per_block": [1, 1, 1], "sample_size": 16},  # and a warm-up at 128x128
    "text_encoder": {"num_hidden_layers": 2},
    "text_encoder_2": {"num_hidden_layers": 2},
}

Changes = list[dict[str, float]]  # of each change the seconds of its phases


def reduced(scratch: Path, dtype: str) -> tuple[Path, Path]:
    """The reduced model and its graphs."""
    configs = scratch / "configs"
    shutil.copytree(ROOT / "torchscript" / "archs" / "sdxl", configs, dirs_exist_ok=True)
    for component, changed in FEWER.items():
        file = configs / component / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    return random_checkpoint(scratch / "model", configs, dtype), export(
        scratch / "graphs", "--model", configs, "--dtype", dtype
    )


def write_lora(model: Path, path: Path, rank: int, seed: int, dtype: str) -> int:
    """A LoRA in diffusers' names; gives the number of projections."""
    import torch
    from diffusers import UNet2DConditionModel
    from safetensors.torch import save_file

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(json.loads((model / "unet" / "config.json").read_text()))
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, module in unet.named_modules():
        if name.endswith(("to_q", "to_k", "to_v", "to_out.0")):
            out, wide = module.weight.shape
            for part, shape in (("lora_A", (rank, wide)), ("lora_B", (out, rank))):
                values = torch.randn(shape, generator=generator) * 0.01
                tensors[f"unet.{name}.{part}.weight"] = values.to(getattr(torch, dtype))
    save_file(tensors, path)
    return len(tensors) // 2


def ours(options: argparse.Namespace, folder: Path, names: list[str]) -> Changes:
    command = ["--model", options.model, "--graphs", options.graphs, "--lora-dir", folder]
    command += ["--dtype", options.dtype, "--device", options.device]
    command += ["--threads", str(options.threads)] if options.threads else []
    changes = []
    with serving(options.worker, command) as address:
        for name in names:
            timings = ask(address, REQUEST | {"loras": [{"name": name}]})[0]["timings"]
            changes.append({key: ms / 1000 for key, ms in timings.items() if key.startswith("lora_")})
    return changes


def theirs(options: argparse.Namespace, folder: Path, names: list[str]) -> Changes:
    import torch
    from reference import load

    pipeline = load(str(options.model), options.dtype, options.device, options.threads)
    changes = []
    for index, name in enumerate(names):
        phases = {}

        def timed(phase: str, work: Any, *arguments: Any, **keywords: Any) -> None:
            started = time.perf_counter()
            work(*arguments, **keywords)
            if options.device != "cpu":
                torch.cuda.synchronize()
            phases[phase] = time.perf_counter() - started

        if index:
            timed("unfuse", pipeline.unfuse_lora)
            timed("unload", pipeline.unload_lora_weights)
        timed("load", pipeline.load_lora_weights, folder, weight_name=f"{name}.safetensors")
        timed("fuse", pipeline.fuse_lora)
        changes.append(phases)
    return changes


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Each side's changes, without the first, which takes nothing out."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for seed, stem in enumerate("ab"):
            projections = write_lora(options.model, folder / f"{stem}.safetensors", options.rank, seed, options.dtype)
        names = ["ab"[index % 2] for index in range(options.repeat + 1)]
        return {
            "what": f"LoRA swap, {projections} projections, rank {options.rank}, {options.device} {options.dtype}",
            "ours": ours(options, folder, names)[1:],
            "diffusers": theirs(options, folder, names)[1:],
        }


def row(measured: dict[str, Any]) -> Row:
    totals = {side: [sum(each.values()) for each in measured[side]] for side in ("ours", "diffusers")}
    band = noise_band([[seconds] for seconds in totals["ours"]])
    return Row(measured["what"], "s", median(totals["ours"]), median(totals["diffusers"]), 0.10, 0.03, band)


def row_of_its_own(options: Command) -> Row:
    """The row, measured in a process that may grow."""
    return row(json.loads(run([sys.executable, __file__, "--json", *options]).lines[-1]))


def phases(changes: Changes) -> str:
    return ", ".join(f"{key} {median(each.get(key, 0) for each in changes):.3f} s" for key in changes[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", type=Path, default=WORKER, help="the program")
    parser.add_argument("--model", type=Path, help="the reduced one when not given")
    parser.add_argument("--graphs", type=Path)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--repeat", type=int, default=5, help="changes that are measured")
    parser.add_argument("--json", action="store_true", help="print what was measured as a line of JSON")
    options = parser.parse_args()
    if (options.model is None) != (options.graphs is None):
        parser.error("--model and --graphs go together")
    if options.model is None:
        options.model, options.graphs = reduced(ROOT / "target" / "bench" / "lora", options.dtype)
    measured = measure(options)
    if options.json:
        print(json.dumps(measured))
    else:
        print(f"{table([row(measured)])}\n\nours: {phases(measured['ours'])}")
        print(f"diffusers: {phases(measured['diffusers'])}")


if __name__ == "__main__":
    main()
