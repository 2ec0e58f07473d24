"""Writes a small SDXL of random weights in the Hub's file layout, the same bytes from the same script every time.

    python torchscript/tiny_models.py --out DIR [--variant default|second|inpaint|refiner|lcm]
    python torchscript/tiny_models.py --out DIR --controlnet plain|small|union|union8 [--variant default|second]

`default` has SDXL's shape in small. `second` is a different architecture in different
files (sharded, `variant` names, other key prefix), so that tests do not rest on one configuration. `inpaint` is
`default` with a UNet that also takes a mask and a masked image, `refiner` has one text encoder and an aesthetic score,
`lcm` a UNet that takes the guidance scale. With `--controlnet` it is a control net for the model.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

SEED = 20231
MERGES = 320
START, END = "<|startoftext|>", "<|endoftext|>"

# What the small vocabulary is learned from: words that prompts are made of.
CORPUS = """
a photo of a cat a photo of a dog a photograph of an astronaut riding a horse on the moon in the style of van gogh
a painting of a fox in the snow an oil painting of the sea at sunset a watercolor of a mountain lake in the morning mist
portrait of a woman with red hair portrait of an old man with a white beard highly detailed sharp focus studio lighting
a small house in the forest with a bright window at night a castle on a hill under the stars a bridge over a river
a red apple on a wooden table a blue bird on a branch a green field with yellow flowers a black and white photograph
cinematic still of a city street in the rain neon lights reflections wide angle shallow depth of field bokeh film grain
a robot in a garden a dragon over the ocean a knight in golden armor a ship in a storm a train in the desert
digital art concept art illustration anime style line art low poly isometric three dimensional render high resolution
blurry low quality worst quality bad anatomy extra fingers deformed ugly watermark text signature jpeg artifacts cropped
masterpiece best quality beautiful ultra realistic intricate details soft light warm colors cold colors background
spring summer autumn winter forest mountain river ocean desert city village street garden kitchen window table chair
the quick brown fox jumps over the lazy dog and then it runs to the water because the sun is going down behind the trees
"""

UNET: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "act_fn": "silu",
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "attention_head_dim": [2, 2, 4],
    "block_out_channels": [16, 32, 48],
    "center_input_sample": False,
    "cross_attention_dim": 72,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "norm_eps": 1e-05,
    "norm_num_groups": 8,
    "out_channels": 4,
    "projection_class_embeddings_input_dim": 88,
    "sample_size": 16,
    "transformer_layers_per_block": [1, 1, 2],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "upcast_attention": None,
    "use_linear_projection": True,
}

VAE: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": [16, 16, 32, 32],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "force_upcast": True,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "out_channels": 3,
    "sample_size": 128,
    "scaling_factor": 0.13025,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}

TEXT: dict[str, Any] = {
    "architectures": ["CLIPTextModel"],
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "hidden_act": "quick_gelu",
    "hidden_size": 32,
    "intermediate_size": 64,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "pad_token_id": 1,
    "projection_dim": 32,
}

TEXT_2: dict[str, Any] = TEXT | {
    "architectures": ["CLIPTextModelWithProjection"],
    "hidden_act": "gelu",
    "hidden_size": 40,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "projection_dim": 40,
}

EULER: dict[str, Any] = {
    "_class_name": "EulerDiscreteScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "interpolation_type": "linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "trained_betas": None,
    "use_karras_sigmas": False,
}


@dataclass(frozen=True)
class Variant:
    """One model: configurations by component, and how its weight files are laid out."""

    unet: dict[str, Any] = field(default_factory=lambda: UNET)
    vae: dict[str, Any] = field(default_factory=lambda: VAE)
    text_encoder: dict[str, Any] | None = field(default_factory=lambda: TEXT)
    text_encoder_2: dict[str, Any] = field(default_factory=lambda: TEXT_2)
    scheduler: dict[str, Any] = field(default_factory=lambda: EULER)
    force_zeros_for_empty_prompt: bool = True
    text_prefix: bool = True  # `text_model.` in front of every key of text_encoder, as on the Hub
    text_file: str = "model.safetensors"
    unet_shards: int = 1
    requires_aesthetics_score: bool = False
    real_eos_id: bool = False  # text_encoder_2 pools at its true end token instead of the highest id


VARIANTS: dict[str, Variant] = {
    "default": Variant(),
    "second": Variant(
        unet=UNET
        | {
            "addition_time_embed_dim": 6,
            "attention_head_dim": [2, 6],
            "block_out_channels": [24, 48],
            "cross_attention_dim": 48 + 56,
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
            "layers_per_block": 1,
            "norm_num_groups": 12,
            "projection_class_embeddings_input_dim": 6 * 6 + 24,
            "transformer_layers_per_block": [1, 3],
            "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        },
        vae=VAE
        | {
            "block_out_channels": [12, 24, 24, 36],
            "force_upcast": False,
            "layers_per_block": 2,
            "norm_num_groups": 12,
            "scaling_factor": 0.2,
        },
        text_encoder=TEXT
        | {"hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 3, "num_hidden_layers": 5},
        text_encoder_2=TEXT_2
        | {"hidden_size": 56, "intermediate_size": 72, "num_attention_heads": 7, "projection_dim": 24},
        scheduler={
            "_class_name": "DDIMScheduler",
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "beta_start": 0.00085,
            "clip_sample": False,
            "num_train_timesteps": 1000,
            "prediction_type": "v_prediction",
            "set_alpha_to_one": False,
            "steps_offset": 1,
            "timestep_spacing": "leading",
            "trained_betas": None,
        },
        force_zeros_for_empty_prompt=False,
        text_prefix=False,
        text_file="model.fp16.safetensors",
        unet_shards=3,
        real_eos_id=True,
    ),
    "inpaint": Variant(unet=UNET | {"in_channels": 9}),
    "refiner": Variant(
        unet=UNET
        | {
            "attention_head_dim": [2, 2, 4, 4],
            "block_out_channels": [16, 24, 32, 32],
            "cross_attention_dim": 40,
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
            "layers_per_block": 1,
            "projection_class_embeddings_input_dim": 5 * 8 + 40,
            "transformer_layers_per_block": 1,
            "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        },
        text_encoder=None,
        force_zeros_for_empty_prompt=False,
        requires_aesthetics_score=True,
    ),
    "lcm": Variant(
        unet=UNET | {"time_cond_proj_dim": 12},
        scheduler=EULER | {"_class_name": "LCMScheduler", "original_inference_steps": 50, "timestep_spacing": "leading"},
    ),
}

# What a control net copies from the configuration of the UNet that it is for.
SHARED_KEYS = (
    "act_fn",
    "addition_embed_type",
    "addition_time_embed_dim",
    "attention_head_dim",
    "block_out_channels",
    "cross_attention_dim",
    "down_block_types",
    "downsample_padding",
    "flip_sin_to_cos",
    "freq_shift",
    "layers_per_block",
    "mid_block_scale_factor",
    "norm_eps",
    "norm_num_groups",
    "projection_class_embeddings_input_dim",
    "transformer_layers_per_block",
    "upcast_attention",
    "use_linear_projection",
)

CONTROLNETS = ("plain", "small", "union", "union8")


def controlnet_config(kind: str, unet: dict[str, Any]) -> dict[str, Any]:
    """`plain` is as deep as the UNet, `small` has no transformers but at the bottom, a union net has 6 or 8 types."""
    config = {key: unet[key] for key in SHARED_KEYS} | {
        "_class_name": "ControlNetModel",
        "conditioning_channels": 3,
        "conditioning_embedding_out_channels": [16, 24, 32, 40],  # a factor of 8, as the VAE
        "controlnet_conditioning_channel_order": "rgb",
        "global_pool_conditions": False,
        "in_channels": 4,
    }
    width, levels = unet["block_out_channels"][0], len(unet["block_out_channels"])
    if kind == "small":
        config["transformer_layers_per_block"] = [0] * (levels - 1) + [1]
    if kind.startswith("union"):
        config |= {
            "_class_name": "ControlNetUnionModel",
            "num_control_type": 8 if kind == "union8" else 6,
            "num_proj_channel": width,
            "num_trans_channel": width,
            "num_trans_head": 4,
            "num_trans_layer": 1,
        }
    return config


def byte_symbols() -> list[str]:
    """CLIP's printable stand-ins for the 256 bytes, in its vocabulary's order (the fixed table of byte-level BPE)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]


# Pairs of tokens in the order in which they are joined.
Merges = list[tuple[str, str]]


def learn_merges(corpus: str, count: int) -> Merges:
    """Byte-pair merges by falling frequency; ties by text order, so that the result does not depend on hashing."""
    words = Counter(corpus.split())
    pieces = {word: [*word[:-1], word[-1] + "</w>"] for word in words}
    merges: Merges = []
    for _ in range(count):
        pairs: Counter[tuple[str, str]] = Counter()
        for word, parts in pieces.items():
            for pair in zip(parts, parts[1:]):
                pairs[pair] += words[word]
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        pieces = {word: apply_merge(parts, best) for word, parts in pieces.items()}
    return merges


def apply_merge(parts: list[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    for part in parts:
        if out and (out[-1], part) == pair:
            out[-1] += part
        else:
            out.append(part)
    return out


def vocabulary(merges: Merges) -> dict[str, int]:
    symbols = byte_symbols()
    tokens = symbols + [symbol + "</w>" for symbol in symbols] + ["".join(pair) for pair in merges] + [START, END]
    return {token: index for index, token in enumerate(tokens)}


PAD_TOKENS = {"tokenizer": END, "tokenizer_2": "!"}


def write_tokenizers(out: Path, merges: Merges, names: list[str]) -> int:
    """Writes the tokenizers as the Hub has them (no tokenizer.json); returns the vocabulary's size."""
    vocab = vocabulary(merges)
    for name in names:
        pad = PAD_TOKENS[name]
        folder = out / name
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "vocab.json", vocab)
        lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
        (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")

        def special(content: str) -> dict[str, Any]:
            return {"content": content, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}

        write_json(
            folder / "special_tokens_map.json",
            {"bos_token": special(START), "eos_token": special(END), "pad_token": pad, "unk_token": special(END)},
        )
        write_json(
            folder / "tokenizer_config.json",
            {
                "add_prefix_space": False,
                "bos_token": special(START) | {"__type": "AddedToken"},
                "clean_up_tokenization_spaces": True,
                "do_lower_case": True,
                "eos_token": special(END) | {"__type": "AddedToken"},
                "errors": "replace",
                "model_max_length": 77,
                "pad_token": pad,
                "tokenizer_class": "CLIPTokenizer",
                "unk_token": special(END) | {"__type": "AddedToken"},
            },
        )
    return len(vocab)


def gain(name: str) -> float:
    """How much larger than variance-keeping a weight is: so that prompt, pooled text and sizes reach the picture."""
    if "token_embedding" in name:
        return 1.0
    if "position_embedding" in name:
        return 0.3
    if "add_embedding" in name or "time_embedding" in name:
        return 1.6
    if "time_emb_proj" in name:
        return 1.5
    if "attn2.to_q" in name or "attn2.to_k" in name:
        return 1.6
    if "attn2.to_v" in name or "attn2.to_out" in name:
        return 1.8
    if "text_projection" in name:
        return 1.5
    if "controlnet_cond_embedding" in name:
        return 2.0  # seven SiLU in a row, and near 0 each of them halves
    return 1.0


def random_tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Uniform noise of a variance that keeps signals at order 1. Uniform because it needs no libm: the same bits on any
    machine. Each tensor has its own stream, so adding a layer does not change the others."""
    rng = np.random.default_rng([SEED, zlib.crc32(name.encode())])
    noise = (rng.random(shape, dtype=np.float32) * np.float32(2) - np.float32(1)) * np.float32(math.sqrt(3))
    if len(shape) == 1:
        return np.float32(1) + np.float32(0.1) * noise if name.endswith("weight") else np.float32(0.05) * noise
    fan_in = 1 if "embedding.weight" in name else math.prod(shape[1:])
    return noise * np.float32(gain(name) / math.sqrt(fan_in))


def parameter_shapes(variant: Variant, vocab_size: int) -> dict[str, dict[str, tuple[int, ...]]]:
    """Names and shapes of every component's parameters, from the real classes built without memory."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    def text_config(config: dict[str, Any]) -> CLIPTextConfig:
        return CLIPTextConfig(**{k: v for k, v in config.items() if k != "architectures"}, vocab_size=vocab_size)

    with torch.device("meta"):
        modules = {
            "unet": UNet2DConditionModel.from_config(variant.unet),
            "vae": AutoencoderKL.from_config(variant.vae),
            "text_encoder_2": CLIPTextModelWithProjection(text_config(variant.text_encoder_2)),
        }
        if variant.text_encoder:
            modules["text_encoder"] = CLIPTextModel(text_config(variant.text_encoder))
    return {
        component: {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
        for component, module in modules.items()
    }


def hub_name(component: str, name: str, prefix: bool) -> str:
    """The key as the Hub's files spell it: transformers 5 dropped `text_model.` inside CLIPTextModel."""
    if component == "text_encoder":
        name = name.removeprefix("text_model.")
        return f"text_model.{name}" if prefix else name
    return name


def write_weights(path: Path, tensors: dict[str, np.ndarray]) -> None:
    from safetensors.numpy import save_file

    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)  # save_file makes it readable for its owner alone


def write_sharded(folder: Path, stem: str, tensors: dict[str, np.ndarray], shards: int) -> None:
    weight_map: dict[str, str] = {}
    names = sorted(tensors)
    for shard in range(shards):
        file = f"{stem}-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = names[len(names) * shard // shards : len(names) * (shard + 1) // shards]
        write_weights(folder / file, {name: tensors[name] for name in part})
        weight_map |= dict.fromkeys(part, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    write_json(folder / f"{stem}.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """A new folder beside `out` that takes its place at the end, so that a broken run leaves nothing half-written."""
    temporary = out.with_name(out.name + ".partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    yield temporary
    shutil.rmtree(out, ignore_errors=True)
    temporary.rename(out)


def write_controlnet(out: Path, kind: str, variant: Variant) -> None:
    """Writes a control net for the variant's UNet, as the Hub has it."""
    import diffusers
    import torch

    config = controlnet_config(kind, variant.unet)
    with torch.device("meta"):
        module = getattr(diffusers, config["_class_name"]).from_config(config)
    tensors = {
        name: random_tensor(f"{kind}.{name}", tuple(parameter.shape))
        for name, parameter in module.named_parameters()
    }
    with replacing(out) as folder:
        write_json(folder / "config.json", config)
        write_weights(folder / "diffusion_pytorch_model.safetensors", tensors)


# What fills a parameter, by its component and name (`unet.conv_in.weight`) and its shape.
Weights = Callable[[str, tuple[int, ...]], np.ndarray]


def write_model(out: Path, variant: Variant, merges: Merges | None = None, weights: Weights = random_tensor) -> None:
    """Writes the whole folder of a pipeline."""
    with replacing(out) as folder:
        write_components(folder, variant, merges or learn_merges(CORPUS, MERGES), weights)


def write_components(out: Path, variant: Variant, merges: Merges, weights: Weights) -> None:
    """Writes every file of a pipeline into a folder that is there."""
    tokenizers = ["tokenizer", "tokenizer_2"] if variant.text_encoder else ["tokenizer_2"]
    vocab_size = write_tokenizers(out, merges, tokenizers)
    text_2 = variant.text_encoder_2 | ({"eos_token_id": vocab_size - 1} if variant.real_eos_id else {})
    configs = {
        "unet": variant.unet,
        "vae": variant.vae,
        "text_encoder": (variant.text_encoder or {}) | {"vocab_size": vocab_size},
        "text_encoder_2": text_2 | {"vocab_size": vocab_size},
    }
    for component, shapes in parameter_shapes(variant, vocab_size).items():
        folder = out / component
        write_json(folder / "config.json", configs[component])
        tensors = {
            hub_name(component, name, variant.text_prefix): weights(f"{component}.{name}", shape)
            for name, shape in shapes.items()
        }
        if component.startswith("text_encoder"):
            write_weights(folder / variant.text_file, tensors)
        elif component == "unet" and variant.unet_shards > 1:
            write_sharded(folder, "diffusion_pytorch_model", tensors, variant.unet_shards)
        else:
            write_weights(folder / "diffusion_pytorch_model.safetensors", tensors)

    write_json(out / "scheduler" / "scheduler_config.json", variant.scheduler)
    first = [None, None] if variant.text_encoder is None else ["transformers", "CLIPTextModel"]
    write_json(
        out / "model_index.json",
        {
            "_class_name": f"StableDiffusionXL{'Img2Img' if variant.requires_aesthetics_score else ''}Pipeline",
            "_diffusers_version": "0.19.0.dev0",
            "force_zeros_for_empty_prompt": variant.force_zeros_for_empty_prompt,
            "add_watermarker": None,
            "scheduler": ["diffusers", variant.scheduler["_class_name"]],
            "text_encoder": first,
            "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
            "tokenizer": first[:1] + ["CLIPTokenizer" if first[1] else None],
            "tokenizer_2": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        }
        | ({"requires_aesthetics_score": True} if variant.requires_aesthetics_score else {}),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the model; replaced if it exists")
    parser.add_argument("--variant", choices=sorted(VARIANTS), default="default")
    parser.add_argument("--controlnet", choices=CONTROLNETS, help="a control net for the variant, in place of a model")
    arguments = parser.parse_args()
    variant = VARIANTS[arguments.variant]
    if arguments.controlnet:
        write_controlnet(arguments.out, arguments.controlnet, variant)
    else:
        write_model(arguments.out, variant)
    size = sum(file.stat().st_size for file in arguments.out.rglob("*.safetensors"))
    what = " for ".join(filter(None, (arguments.controlnet, arguments.variant)))
    print(f"{arguments.out}: {what}, {size / 1e6:.1f} MB of weights")


if __name__ == "__main__":
    main()
