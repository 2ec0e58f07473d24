"""SDXL at its full size: 7 GB of random weights in the Hub's layout, one step on the CPU.

Needs 7 GB of disk, in `target/full-size` (removed at the end; with KEEP=1 it stays and is used again).
"""

import json
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from full_size import FullSize

pytestmark = pytest.mark.full

# Where the parameters of each component are, and how many diffusers has.
FILES = {
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
    "text_encoder_2": "text_encoder_2/model.safetensors",
}
GRAPHS = {
    "unet": ["unet", "unet_control"],
    "vae": ["vae_encoder", "vae_decoder"],
    "text_encoder": ["text_encoder"],
    "text_encoder_2": ["text_encoder_2"],
}
UNET_PARAMETERS = 1680


def read_header(file: Path) -> dict[str, object]:
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        return json.loads(stream.read(length))


def eager_shapes() -> dict[str, dict[str, list[int]]]:
    """Names and shapes of diffusers' own state dicts, `text_model.` in front where the Hub's files have it."""
    import torch
    from configs import ARCHS, read_json
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from tiny_models import hub_name
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    configs = {name: read_json(ARCHS / "sdxl" / name / "config.json") for name in FILES}
    with torch.device("meta"):
        modules = {
            "unet": UNet2DConditionModel.from_config(configs["unet"]),
            "vae": AutoencoderKL.from_config(configs["vae"]),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**configs["text_encoder"])),
            "text_encoder_2": CLIPTextModelWithProjection(CLIPTextConfig(**configs["text_encoder_2"])),
        }
    return {
        component: {
            hub_name(component, name, prefix=True): list(tensor.shape) for name, tensor in module.state_dict().items()
        }
        for component, module in modules.items()
    }


def test_files_and_graphs_have_the_names_and_shapes_of_diffusers(full_size: FullSize) -> None:
    entries = json.loads((full_size.graphs / "manifest.json").read_text())["graphs"]
    # not the refiner's, which other tests put beside them
    entries = [entry for entry in entries if entry["config"].get("cross_attention_dim", 2048) == 2048]
    for component, expected in eager_shapes().items():
        header = read_header(full_size.model / FILES[component])
        header.pop("__metadata__")
        assert {name: entry["shape"] for name, entry in header.items()} == expected

        for dtype in {entry["dtype"] for entry in entries if entry["component"] in GRAPHS[component]}:
            bound: dict[str, list[int]] = {}
            for entry in entries:
                if entry["component"] in GRAPHS[component] and entry["dtype"] == dtype:
                    bound |= entry["parameters"]
            prefix = "text_model." if component == "text_encoder" else ""
            names = {name.removeprefix(prefix): shape for name, shape in expected.items()}
            assert {name.removeprefix(prefix): shape for name, shape in bound.items()} == names
        print(f"{component}: {len(expected)} parameters")
        if component == "unet":
            assert len(expected) == UNET_PARAMETERS


@pytest.mark.parametrize("guidance_scale", [1, 5])
def test_one_step_makes_a_picture_and_copies_no_weights(
    full_size: FullSize, worker: Path, tmp_path: Path, guidance_scale: int
) -> None:
    result = full_size.generate(worker, tmp_path, "--guidance-scale", guidance_scale)
    assert result.status == 0, result.errors
    assert (tmp_path / "7.png").read_bytes().startswith(b"\x89PNG")
    weights = sum((full_size.model / file).stat().st_size for file in FILES.values())
    print(
        f"guidance {guidance_scale}: {result.at[-1]:.0f} s, {result.peaks.private / 1e9:.2f} GB of private memory at "
        f"the peak, {result.peaks.resident / 1e9:.2f} GB resident, for {weights / 1e9:.2f} GB of weights"
    )
    # The smallest copy there could be, of the UNet's weights alone, is 5 GB; what remains are activations.
    assert result.peaks.private < 2e9


def test_a_renamed_tensor_is_named_in_the_error(full_size: FullSize, worker: Path, tmp_path: Path) -> None:
    name = "mid_block.attentions.0.norm.weight"
    renamed = name.replace("norm", "mron")
    with renamed_in_place(full_size.model / FILES["unet"], name, renamed):
        result = full_size.generate(worker, tmp_path)
    assert result.status == 3
    error = json.loads(result.errors.splitlines()[-1])
    assert error["code"] == "weights_mismatch"
    assert f"1 missing: {name}" in error["message"]
    assert f"1 unexpected: {renamed}" in error["message"]
    assert not list(tmp_path.iterdir())


@contextmanager
def renamed_in_place(file: Path, name: str, renamed: str) -> Iterator[None]:
    """Another name of the same length in the header; the data need not be written again."""
    assert len(name) == len(renamed)
    with file.open("r+b") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header = stream.read(length)
        changed = header.replace(f'"{name}"'.encode(), f'"{renamed}"'.encode())
        assert changed != header
        stream.seek(8)
        stream.write(changed)
        stream.flush()
        try:
            yield
        finally:
            stream.seek(8)
            stream.write(header)
