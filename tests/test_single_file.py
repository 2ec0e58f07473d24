"""Checkpoints in one file, in the layout of SDXL's original code: read to the same tensors as the folder they were made
from, by names that were written down independently of the worker's (`original_names`), and as diffusers converts them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from program import error_of, pictures, run

REQUEST = ("--prompt", "a fox", "--negative-prompt", "blurry", "--seed", "3", "--steps", "2", "--width", "64", "--height", "64")
PREFIX = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "conditioner.embedders.0.transformer.",
    "text_encoder_2": "conditioner.embedders.1.model.",
    "refiner": "conditioner.embedders.0.model.",
}


def first(pairs: list[tuple[str, str]], name: str) -> str:
    """The name with the first pair's pattern, of those that fit, replaced."""
    for pattern, replacement in pairs:
        if re.match(pattern, name):
            return re.sub(pattern, replacement, name, count=1)
    raise AssertionError(f"no original name for {name}")


RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip


def original_unet_name(name: str, layers: int, attends: set[int]) -> str:
    """`layers`: residual blocks of a level on the way down; `attends`: levels of the way up that have attentions."""
    parts = name.split(".")
    fixed = {
        "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
        "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
    }  # fmt: skip
    for ours, theirs in fixed.items():
        if name.startswith(f"{ours}."):
            return theirs + name[len(ours) :]
    if parts[0] == "mid_block":
        kind, index, rest = parts[1], int(parts[2]), parts[3:]
        if kind == "attentions":
            return ".".join(["middle_block.1", *rest])
        return ".".join([f"middle_block.{2 * index}", RESNET[rest[0]], *rest[1:]])
    level, kind, index, rest = int(parts[1]), parts[2], int(parts[3]), parts[4:]
    if parts[0] == "down_blocks":
        block = 1 + level * (layers + 1) + (layers if kind == "downsamplers" else index)
        if kind == "downsamplers":
            return ".".join([f"input_blocks.{block}.0.op", *rest[1:]])
        if kind == "attentions":
            return ".".join([f"input_blocks.{block}.1", *rest])
        return ".".join([f"input_blocks.{block}.0", RESNET[rest[0]], *rest[1:]])
    block = level * (layers + 1) + (layers if kind == "upsamplers" else index)
    if kind == "upsamplers":
        return ".".join([f"output_blocks.{block}.{2 if level in attends else 1}", *rest])
    if kind == "attentions":
        return ".".join([f"output_blocks.{block}.1", *rest])
    return ".".join([f"output_blocks.{block}.0", RESNET[rest[0]], *rest[1:]])


def original_vae_name(name: str, levels: int) -> str:
    pairs = [
        (r"(\w+)\.mid_block\.resnets\.0\.(.*)", r"\1.mid.block_1.\2"),
        (r"(\w+)\.mid_block\.resnets\.1\.(.*)", r"\1.mid.block_2.\2"),
        (r"(\w+)\.mid_block\.attentions\.0\.group_norm\.", r"\1.mid.attn_1.norm."),
        (r"(\w+)\.mid_block\.attentions\.0\.to_([qkv])\.", r"\1.mid.attn_1.\2."),
        (r"(\w+)\.mid_block\.attentions\.0\.to_out\.0\.", r"\1.mid.attn_1.proj_out."),
        (r"encoder\.down_blocks\.(\d+)\.resnets\.", r"encoder.down.\1.block."),
        (r"encoder\.down_blocks\.(\d+)\.downsamplers\.0\.", r"encoder.down.\1.downsample."),
        (r"decoder\.up_blocks\.(\d+)\.resnets\.", r"decoder.up.\1.block."),
        (r"decoder\.up_blocks\.(\d+)\.upsamplers\.0\.", r"decoder.up.\1.upsample."),
        (r"(encoder|decoder)\.conv_norm_out\.", r"\1.norm_out."),
        (r"(encoder|decoder|quant_conv|post_quant_conv)\b", r"\1"),
    ]
    name = first(pairs, name).replace("conv_shortcut", "nin_shortcut")
    found = re.match(r"decoder\.up\.(\d+)\.(.*)", name)
    return f"decoder.up.{levels - 1 - int(found[1])}.{found[2]}" if found else name


def original_open_clip(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    made: dict[str, torch.Tensor] = {"logit_scale": torch.tensor([4.6])}
    fixed = {
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
        "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
        "text_model.final_layer_norm.weight": "ln_final.weight",
        "text_model.final_layer_norm.bias": "ln_final.bias",
    }
    renames = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj", "self_attn.out_proj": "attn.out_proj"}
    for name, tensor in tensors.items():
        if name in fixed:
            made[fixed[name]] = tensor
        elif name == "text_projection.weight":
            made["text_projection"] = tensor.T.contiguous()
        elif ".k_proj." in name or ".v_proj." in name:
            continue
        elif ".q_proj." in name:
            parts = [tensors[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"]
            layer, kind = name.split(".")[3], name.split(".")[-1]
            made[f"transformer.resblocks.{layer}.attn.in_proj_{kind}"] = torch.cat(parts)
        else:
            _, _, _, layer, rest = name.split(".", 4)
            ours, kind = rest.rsplit(".", 1)
            made[f"transformer.resblocks.{layer}.{renames[ours]}.{kind}"] = tensor
    return made


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    if folder.name.startswith("text_encoder"):
        tensors = {name if name.startswith("text_") else f"text_model.{name}": tensor for name, tensor in tensors.items()}
    return tensors


def in_one_file(model: Path, path: Path, **marks: torch.Tensor) -> Path:
    """Writes a folder's weights as one checkpoint in the original layout."""
    unet_config = json.loads((model / "unet" / "config.json").read_text())
    attends = {i for i, kind in enumerate(unet_config["up_block_types"]) if "CrossAttn" in kind}
    levels = len(json.loads((model / "vae" / "config.json").read_text())["block_out_channels"])
    made: dict[str, torch.Tensor] = dict(marks)
    for name, tensor in weights_of(model / "unet").items():
        made[PREFIX["unet"] + original_unet_name(name, unet_config["layers_per_block"], attends)] = tensor
    for name, tensor in weights_of(model / "vae").items():
        is_projection = re.search(r"attentions\.0\.to_.*weight", name)
        made[PREFIX["vae"] + original_vae_name(name, levels)] = tensor[..., None, None] if is_projection else tensor
    is_refiner = not (model / "text_encoder").exists()
    if not is_refiner:
        for name, tensor in weights_of(model / "text_encoder").items():
            made[PREFIX["text_encoder"] + name] = tensor
        made[PREFIX["text_encoder"] + "text_model.embeddings.position_ids"] = torch.arange(77)[None]
    for name, tensor in original_open_clip(weights_of(model / "text_encoder_2")).items():
        made[PREFIX["refiner" if is_refiner else "text_encoder_2"] + name] = tensor
    save_file(made, path)
    return path


def latents(tmp_path: Path, *options: object) -> torch.Tensor:
    file = tmp_path / "latents.safetensors"
    pictures(run("generate", *REQUEST, *options, "--save-latents", file, cwd=tmp_path), tmp_path)
    return load_file(file)["latents"]


def closeness(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


# kernels choose their way by a tensor's alignment, which moves the last bit
SAME = 1e-5


@pytest.mark.parametrize("variant", ["default", "second", "inpaint"])
def test_one_file_gives_the_latents_of_its_folder(test_models, tmp_path, variant):
    model, graphs = test_models[variant], ("--graphs", test_models["graphs"])
    picture = () if variant != "inpaint" else inpainted(tmp_path)
    file = in_one_file(model, tmp_path / "checkpoint.safetensors")
    theirs = latents(tmp_path, "--model", model, *graphs, *picture)
    ours = latents(tmp_path, "--model", file, "--model-config", model, *graphs, *picture)
    assert closeness(ours, theirs) < SAME


def inpainted(tmp_path: Path) -> tuple[object, ...]:
    from PIL import Image

    Image.new("RGB", (64, 64), "red").save(tmp_path / "picture.png")
    Image.new("L", (64, 64), 255).save(tmp_path / "mask.png")
    return ("--image", tmp_path / "picture.png", "--mask-image", tmp_path / "mask.png")


def test_every_tensor_counts(test_models, tmp_path):
    """The comparison above would see a name that leads to another tensor."""
    model = test_models["default"]
    file = in_one_file(model, tmp_path / "checkpoint.safetensors")
    tensors = load_file(file)
    layer = PREFIX["text_encoder_2"] + "transformer.resblocks.1.attn.in_proj_weight"
    third = len(tensors[layer]) // 3
    tensors[layer] = torch.cat([tensors[layer][third:], tensors[layer][:third]])
    save_file(tensors, file)
    options = ("--graphs", test_models["graphs"])
    changed = latents(tmp_path, "--model", file, "--model-config", model, *options)
    assert closeness(changed, latents(tmp_path, "--model", model, *options)) > 1e-3


def test_diffusers_converts_the_file_to_the_same_tensors(test_models, tmp_path):
    """Its own conversion of the UNet, the VAE and OpenCLIP, which shares no line with the names above."""
    from diffusers.loaders import single_file_utils as theirs

    model = test_models["default"]
    checkpoint = load_file(in_one_file(model, tmp_path / "c.safetensors"))
    configs = {part: json.loads((model / part / "config.json").read_text()) for part in ("unet", "vae", "text_encoder_2")}
    found = {
        "unet": theirs.convert_ldm_unet_checkpoint(dict(checkpoint), configs["unet"]),
        "vae": theirs.convert_ldm_vae_checkpoint(dict(checkpoint), configs["vae"]),
    }
    for part, converted in found.items():
        own = weights_of(model / part)
        assert converted.keys() == own.keys(), part
        for name, tensor in own.items():
            assert converted[name].reshape(tensor.shape).equal(tensor), name


def test_a_vae_in_one_file(test_models, tmp_path):
    model = test_models["default"]
    options = ("--model", model, "--graphs", test_models["graphs"])
    whole = load_file(in_one_file(model, tmp_path / "c.safetensors"))
    vae = {name.removeprefix(PREFIX["vae"]): tensor for name, tensor in whole.items() if name.startswith(PREFIX["vae"])}
    save_file(vae, tmp_path / "vae.safetensors")
    made = run("generate", *REQUEST, *options, "--vae", tmp_path / "vae.safetensors", "--output", "a", cwd=tmp_path)
    plain = run("generate", *REQUEST, *options, "--output", "b", cwd=tmp_path)
    from PIL import Image

    first, second = (np.asarray(Image.open(pictures(result, tmp_path)[0])).astype(int) for result in (made, plain))
    assert np.abs(first - second).max() <= 1


def test_a_file_of_another_architecture_says_so(test_models, tmp_path):
    file = in_one_file(test_models["default"], tmp_path / "checkpoint.safetensors")
    error = error_of(run("generate", *REQUEST, "--model", file, "--graphs", test_models["graphs"], cwd=tmp_path), 3, "no_matching_graph")
    assert "export.py" in error["remedy"]
