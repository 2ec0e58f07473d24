"""The demo model: what its parts are made of, and how they are written as the Hub has them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, ControlNetModel, ControlNetUnionModel, UNet2DConditionModel
from diffusers import StableDiffusionXLPipeline as Pipeline
from safetensors.numpy import save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

import world

sys.path.insert(0, str(Path(__file__).parents[1]))
import tiny_models  # noqa: E402

WIDTH = 64  # of each text encoder
TIME = 16  # of each of the six sizes' embeddings
MERGES = tiny_models.learn_merges(world.words() + tiny_models.CORPUS, 640)
VOCABULARY = len(tiny_models.vocabulary(MERGES))

TEXT = tiny_models.TEXT | {
    "hidden_size": WIDTH,
    "intermediate_size": 4 * WIDTH,
    "num_hidden_layers": 3,
    "projection_dim": WIDTH,
}
VARIANT = tiny_models.Variant(
    unet=tiny_models.UNET
    | {
        "addition_time_embed_dim": TIME,
        "attention_head_dim": [2, 4, 4],
        "block_out_channels": [48, 96, 128],
        "cross_attention_dim": 2 * WIDTH,
        "layers_per_block": 1,
        "norm_num_groups": 16,
        "projection_class_embeddings_input_dim": 6 * TIME + WIDTH,
        "sample_size": world.SIZE // 8,
        "transformer_layers_per_block": 1,
    },
    vae=tiny_models.VAE
    | {"block_out_channels": [16, 32, 64, 64], "force_upcast": False, "sample_size": world.SIZE},
    text_encoder=TEXT,
    text_encoder_2=TEXT | {"architectures": ["CLIPTextModelWithProjection"], "hidden_act": "gelu"},
    scheduler=tiny_models.EULER | {"prediction_type": "v_prediction"},
)
CONTROLNETS = {"union": ControlNetUnionModel, "canny": ControlNetModel}
SCALING = VARIANT.vae["scaling_factor"]


def vae() -> AutoencoderKL:
    return AutoencoderKL.from_config(VARIANT.vae)


def denoiser() -> nn.ModuleDict:
    """What learns together: the UNet and both text encoders."""

    def config(of: dict[str, Any]) -> CLIPTextConfig:
        return CLIPTextConfig(**{k: v for k, v in of.items() if k != "architectures"}, vocab_size=VOCABULARY)

    assert VARIANT.text_encoder
    return nn.ModuleDict(
        {
            "unet": UNet2DConditionModel.from_config(VARIANT.unet),
            "text_encoder": CLIPTextModel(config(VARIANT.text_encoder)),
            "text_encoder_2": CLIPTextModelWithProjection(config(VARIANT.text_encoder_2)),
        }
    )


def controlnet(name: str, unet: UNet2DConditionModel) -> nn.Module:
    """A control net that starts as a copy of the UNet's way down; `canny` has transformers at the bottom only."""
    config = tiny_models.controlnet_config("union" if name == "union" else "small", VARIANT.unet)
    net = CONTROLNETS[name].from_config(config)
    own = net.state_dict()
    same = {key: value for key, value in unet.state_dict().items() if key in own and own[key].shape == value.shape}
    net.load_state_dict(same, strict=False)
    return net


def embed(parts: nn.ModuleDict, ids: torch.Tensor, ids_2: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (N, 77) to the hidden states (N, 77, 128) and the pooled text (N, 64), as the SDXL pipeline does."""
    first = parts["text_encoder"](ids, output_hidden_states=True).hidden_states[-2]
    second = parts["text_encoder_2"](ids_2, output_hidden_states=True)
    return torch.cat([first, second.hidden_states[-2]], -1), second.text_embeds


def conditions(pooled: torch.Tensor) -> dict[str, torch.Tensor]:
    sizes = torch.tensor([world.SIZE, world.SIZE, 0, 0, world.SIZE, world.SIZE], dtype=pooled.dtype, device=pooled.device)
    return {"text_embeds": pooled, "time_ids": sizes.expand(len(pooled), 6)}


# --- Files ------------------------------------------------------------------------------------------------------------


def half(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().to(torch.float16).contiguous().numpy()


def save_pipeline(out: Path, modules: dict[str, nn.Module]) -> None:
    """Writes `unet`, `vae` and the text encoders as a pipeline's folder, weights in float16."""
    states = {name: module.state_dict() for name, module in modules.items()}

    def weights(name: str, shape: tuple[int, ...]) -> np.ndarray:
        component, _, key = name.partition(".")
        assert tuple(states[component][key].shape) == shape, name
        return half(states[component][key])

    tiny_models.write_model(out, VARIANT, MERGES, weights)


def save_vae(out: Path, vae: nn.Module) -> None:
    """Writes the VAE alone: the part of the pipeline that is trained first."""
    with tiny_models.replacing(out / "vae") as folder:
        tiny_models.write_json(folder / "config.json", VARIANT.vae)
        tensors = {name: half(tensor) for name, tensor in vae.state_dict().items()}
        tiny_models.write_weights(folder / "diffusion_pytorch_model.safetensors", tensors)


def load_vae(out: Path) -> nn.Module:
    return AutoencoderKL.from_pretrained(out / "vae", torch_dtype=torch.float32).eval().requires_grad_(False)


def load_denoiser(out: Path) -> nn.ModuleDict:
    classes = {
        "unet": UNet2DConditionModel,
        "text_encoder": CLIPTextModel,
        "text_encoder_2": CLIPTextModelWithProjection,
    }
    parts = {name: cls.from_pretrained(out / name, torch_dtype=torch.float32) for name, cls in classes.items()}
    return nn.ModuleDict(parts).eval().requires_grad_(False)


def save_controlnet(out: Path, net: nn.Module) -> None:
    with tiny_models.replacing(out) as folder:
        config = {key: value for key, value in net.config.items() if not key.startswith("_")}
        tiny_models.write_json(folder / "config.json", {"_class_name": type(net).__name__} | config)
        tensors = {name: half(tensor) for name, tensor in net.state_dict().items()}
        tiny_models.write_weights(folder / "diffusion_pytorch_model.safetensors", tensors)


def save_lora(path: Path, adapter: dict[str, torch.Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: half(tensor) for name, tensor in adapter.items()}, path, metadata={"format": "pt"})
    path.chmod(0o644)


def pipeline(folder: Path, **extra: Any) -> Pipeline:
    pipe = Pipeline.from_pretrained(folder, torch_dtype=torch.float32, **extra)
    pipe.set_progress_bar_config(disable=True)
    return pipe
