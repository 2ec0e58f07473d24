"""ControlNets and the UNet for inpainting at their full size: names, one step on the CPU, and what it costs in memory."""

import base64
import io
import json
from pathlib import Path

import pytest
from PIL import Image

from full_size import FullSize

pytestmark = pytest.mark.full

NETS = ("controlnet", "controlnet_mid", "controlnet_small", "controlnet_union", "controlnet_union_promax")


def picture(side: int = 256) -> str:
    out = io.BytesIO()
    Image.linear_gradient("L").resize((side, side)).convert("RGB").save(out, "PNG")
    return base64.b64encode(out.getvalue()).decode()


def bound(graphs: Path, folder: Path) -> dict[str, list[int]]:
    """Names and shapes of all graphs that were made for this configuration."""
    from configs import COMPONENTS, read_component, shaping

    class_name, config = read_component(folder)
    entries = json.loads((graphs / "manifest.json").read_text())["graphs"]
    fitting = [e for e in entries if e["component"] in COMPONENTS[class_name] and e["config"] == shaping(class_name, config)]
    assert {entry["component"] for entry in fitting} == set(COMPONENTS[class_name])
    return {name: shape for entry in fitting for name, shape in entry["parameters"].items()}


@pytest.mark.parametrize("arch", [*NETS, "unet_inpaint"])
def test_graphs_have_the_names_and_shapes_of_diffusers(full_size: FullSize, arch: str) -> None:
    import diffusers
    import torch
    from configs import read_component

    folder = full_size.part(arch)
    class_name, config = read_component(folder)
    with torch.device("meta"):
        module = getattr(diffusers, class_name).from_config(config)
    expected = {name: list(parameter.shape) for name, parameter in module.named_parameters()}
    assert bound(full_size.graphs, folder) == expected
    millions = sum(parameter.numel() for parameter in module.parameters()) / 1e6
    print(f"{arch}: {len(expected)} parameters, {millions:.0f} million numbers")


@pytest.mark.parametrize("arch, modes", [("controlnet", [None]), ("controlnet_small", [None]), ("controlnet_union", [1, 3])])
def test_one_step_with_a_controlnet_copies_no_weights(
    full_size: FullSize, worker: Path, tmp_path: Path, arch: str, modes: list
) -> None:
    net = full_size.part(arch)
    controls = [{"image": picture()} | ({} if mode is None else {"mode": mode}) for mode in modes]
    options = ["--controlnet", f"net={net}", "--guidance-scale", 1, "--set", f"controlnets={json.dumps(controls)}"]
    result = full_size.generate(worker, tmp_path, *options)
    assert result.status == 0, result.errors
    assert (tmp_path / "7.png").read_bytes().startswith(b"\x89PNG")
    print(f"{arch}: {result.at[-1]:.0f} s, {result.peaks.private / 1e9:.2f} GB of private memory at the peak")
    # a copy of the full net's weights would be 2.5 GB
    assert result.peaks.private < 2e9


def test_the_graph_that_takes_residuals_adds_little_memory(full_size: FullSize, worker: Path) -> None:
    net = full_size.part("controlnet_small")
    without = min(full_size.doctor(worker).peaks.private for _ in range(3))
    beside = min(full_size.doctor(worker, "--controlnet", f"net={net}").peaks.private for _ in range(3))
    print(f"unet_control adds {(beside - without) / 1e6:.0f} MB to {without / 1e6:.0f} MB")
    assert beside - without < 50e6


def test_inpainting_with_a_unet_of_9_channels(full_size: FullSize, worker: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for part in full_size.model.iterdir():
        if part.name != "unet":
            (model / part.name).symlink_to(part)
    (model / "unet").symlink_to(full_size.part("unet_inpaint"))
    (tmp_path / "picture.png").write_bytes(base64.b64decode(picture()))
    masked = ["--image", tmp_path / "picture.png", "--mask-image", tmp_path / "picture.png", "--strength", 1]
    result = FullSize(model, full_size.graphs).generate(worker, tmp_path / "out", *masked)
    assert result.status == 0, result.errors
    assert (tmp_path / "out" / "7.png").is_file()
    assert result.peaks.private < 3e9
