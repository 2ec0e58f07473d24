"""Writes a checkpoint of random weights at its full size, in the Hub's layout and names.

    python bench/random_checkpoint.py --arch sdxl --dtype bfloat16 --out target/sdxl-random [--device cuda]
    python bench/random_checkpoint.py --arch controlnet --dtype bfloat16 --out target/controlnet-random

What is measured on it holds for trained weights: the same arithmetic on the same shapes. Values keep signals at order
1, so nothing overflows in float16. Tensors are written piece by piece, so memory stays far below the file's size.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "torchscript"))

import torch  # noqa: E402
from configs import ARCHS, read_json  # noqa: E402
from tiny_models import (  # noqa: E402
    CORPUS, END, MERGES, START, Variant, byte_symbols, hub_name, learn_merges, parameter_shapes, write_json,
    write_tokenizers,
)

Shapes = dict[str, tuple[int, ...]]

COMPONENTS = ("unet", "vae", "text_encoder", "text_encoder_2")
DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
POOL = 16_777_259  # a prime, so that the repeats of the pool do not line up with the rows of any matrix
PIECE = 2**19  # values made and written at a time: they stay in the processor's cache


class RandomNumbers:
    """Normal numbers from one pool, entered at a place that depends on the tensor's name: as fast as the disk, and
    unlike zeros or one repeated row as costly to multiply as trained weights."""

    def __init__(self, dtype: torch.dtype, device: str) -> None:
        generator = torch.Generator(device).manual_seed(0)
        self.pool = torch.randn(POOL, generator=generator, device=device).to(dtype)

    def pieces(self, name: str, count: int) -> Iterator[torch.Tensor]:
        place = zlib.crc32(name.encode()) % POOL
        while count > 0:
            piece = self.pool[place : place + min(count, PIECE)]
            yield piece
            count -= len(piece)
            place = (place + len(piece)) % POOL


def scale_and_offset(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Weights keep the variance of what passes through them; norms are near one, biases near zero."""
    if len(shape) == 1:
        return (0.02, 1.0) if name.endswith("weight") else (0.02, 0.0)
    if "embedding.weight" in name:
        return 0.3, 0.0
    return 1 / math.sqrt(math.prod(shape[1:])), 0.0


def write_safetensors(path: Path, shapes: Shapes, dtype: str, numbers: RandomNumbers) -> None:
    """The format: length of the header, header as JSON padded to eight bytes, then the tensors end to end."""
    itemsize = numbers.pool.itemsize
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * itemsize
        header[name] = {"dtype": DTYPES[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            scale, offset = scale_and_offset(name, shape)
            for piece in numbers.pieces(name, math.prod(shape)):
                values = (piece * scale + offset).view(torch.uint8).cpu()
                file.write(values.numpy().data)


def write_component(folder: Path, stem: str, shapes: Shapes, dtype: str, shards: int, numbers: RandomNumbers) -> None:
    if shards == 1:
        write_safetensors(folder / f"{stem}.safetensors", shapes, dtype, numbers)
        return
    names = list(shapes)
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        file = f"{stem}-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = names[len(names) * shard // shards : len(names) * (shard + 1) // shards]
        write_safetensors(folder / file, {name: shapes[name] for name in part}, dtype, numbers)
        weight_map |= dict.fromkeys(part, file)
    total = sum(math.prod(shape) for shape in shapes.values()) * getattr(torch, dtype).itemsize
    write_json(folder / f"{stem}.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def write_vocabulary(out: Path, size: int, names: list[str]) -> None:
    """Real CLIP tokenizers with few merges; entries that no text reaches fill the vocabulary up to the model's size."""
    merges = learn_merges(CORPUS, min(MERGES, size - 2 - 2 * len(byte_symbols())))
    have = write_tokenizers(out, merges, names)
    for file in (out / name / "vocab.json" for name in names):
        tokens = [token for token in read_json(file) if token not in (START, END)]
        tokens += [f"<|unused-{index}|>" for index in range(size - have)] + [START, END]
        file.write_text(json.dumps({token: index for index, token in enumerate(tokens)}), encoding="utf-8")


def write_checkpoint(source: Path, out: Path, dtype: str, device: str = "cpu", unet_shards: int = 1) -> None:
    """`source` is a folder of configurations in the diffusers layout. Built beside `out` and renamed when whole."""
    there = [component for component in COMPONENTS if (source / component).is_dir()]
    configs = {component: read_json(source / component / "config.json") for component in there}
    vocab_size = configs["text_encoder_2"]["vocab_size"]
    parts = {key: {k: v for k, v in value.items() if k != "vocab_size"} for key, value in configs.items()}
    shapes = parameter_shapes(Variant(**({"text_encoder": None} | parts)), vocab_size)
    temporary = out.with_name(out.name + ".partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    numbers = RandomNumbers(getattr(torch, dtype), device)
    for component, config in configs.items():
        folder = temporary / component
        write_json(folder / "config.json", config)
        stem = "model" if component.startswith("text_encoder") else "diffusion_pytorch_model"
        named = {hub_name(component, name, prefix=True): shape for name, shape in shapes[component].items()}
        write_component(folder, stem, named, dtype, unet_shards if component == "unet" else 1, numbers)
    tokenizers = [name.replace("text_encoder", "tokenizer") for name in there if name.startswith("text_encoder")]
    write_vocabulary(temporary, vocab_size, tokenizers)
    for file in ("model_index.json", "scheduler/scheduler_config.json"):
        write_json(temporary / file, read_json(source / file))
    shutil.rmtree(out, ignore_errors=True)
    temporary.rename(out)


def write_part(source: Path, out: Path, dtype: str, device: str = "cpu") -> None:
    """`source` is the folder of one component, such as a ControlNet."""
    import diffusers

    config = read_json(source / "config.json")
    with torch.device("meta"):
        module = getattr(diffusers, config["_class_name"]).from_config(config)
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    write_json(out / "config.json", config)
    numbers = RandomNumbers(getattr(torch, dtype), device)
    write_component(out, "diffusion_pytorch_model", shapes, dtype, 1, numbers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="sdxl", help="an architecture of ours, or a folder of configurations")
    parser.add_argument("--dtype", choices=DTYPES, default="float16")
    parser.add_argument("--out", type=Path, required=True, help="folder of the model; replaced if it exists")
    parser.add_argument("--device", default="cpu", help="where the numbers are made")
    parser.add_argument("--unet-shards", type=int, default=1, help="files for the UNet, with an index when several")
    options = parser.parse_args()
    source = ARCHS / options.arch
    if not source.is_dir():
        source = Path(options.arch)
    started = time.monotonic()
    torch.set_num_threads(1)  # pieces are too small to share out
    if (source / "config.json").is_file():
        write_part(source, options.out, options.dtype, options.device)
    else:
        write_checkpoint(source, options.out, options.dtype, options.device, options.unet_shards)
    size = sum(file.stat().st_size for file in options.out.rglob("*.safetensors"))
    print(f"{options.out}: {size / 1e9:.2f} GB of random {options.dtype} in {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
