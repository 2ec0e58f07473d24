"""Model configurations: which keys shape a graph, their class defaults, and how to read them from a folder.

No torch here: an export that has nothing to do must not pay for the import.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Config = dict[str, Any]

ARCHS = Path(__file__).parent / "archs"


class ExportError(Exception):
    """Something the person who runs the export can act on."""


# What the UNet and the nets that control it have in common.
DENOISER_KEYS: Config = {
    "in_channels": 4,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "only_cross_attention": False,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "act_fn": "silu",
    "norm_num_groups": 32,
    "norm_eps": 1e-05,
    "cross_attention_dim": 1280,
    "transformer_layers_per_block": 1,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "attention_head_dim": 8,
    "use_linear_projection": False,
    "class_embed_type": None,
    "addition_embed_type": None,
    "addition_time_embed_dim": None,
    "num_class_embeds": None,
    "upcast_attention": False,
    "resnet_time_scale_shift": "default",
    "projection_class_embeddings_input_dim": None,
}

# Every key that changes the graph, with the default of its class (checked against the class at export). What is left
# out is data or training (`sample_size`, `scaling_factor`, `force_upcast`, `dropout`, token ids).
SHAPE_KEYS: dict[str, Config] = {
    "CLIPTextModel": {
        "vocab_size": 49408,
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "max_position_embeddings": 77,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-05,
        "eos_token_id": 49407,  # 2 means: pool at the highest id
    },
    "UNet2DConditionModel": DENOISER_KEYS
    | {
        "out_channels": 4,
        "center_input_sample": False,
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
        "reverse_transformer_layers_per_block": None,
        "dual_cross_attention": False,
        "resnet_skip_time_act": False,
        "resnet_out_scale_factor": 1.0,
        "time_embedding_type": "positional",
        "time_embedding_dim": None,
        "time_embedding_act_fn": None,
        "timestep_post_act": None,
        "time_cond_proj_dim": None,
        "conv_in_kernel": 3,
        "conv_out_kernel": 3,
        "attention_type": "default",
        "class_embeddings_concat": False,
        "mid_block_only_cross_attention": None,
        "cross_attention_norm": None,
    },
    "ControlNetModel": DENOISER_KEYS
    | {
        "conditioning_channels": 3,
        "num_attention_heads": None,
        "controlnet_conditioning_channel_order": "rgb",
        "conditioning_embedding_out_channels": [16, 32, 96, 256],
        "global_pool_conditions": False,
        "mid_block_type": "UNetMidBlock2DCrossAttn",
    },
    "AutoencoderKL": {
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ["DownEncoderBlock2D"],
        "up_block_types": ["UpDecoderBlock2D"],
        "block_out_channels": [64],
        "layers_per_block": 1,
        "act_fn": "silu",
        "latent_channels": 4,
        "norm_num_groups": 32,
        "use_quant_conv": True,
        "use_post_quant_conv": True,
        "mid_block_add_attention": True,
    },
}
SHAPE_KEYS["CLIPTextModelWithProjection"] = SHAPE_KEYS["CLIPTextModel"] | {"projection_dim": 512}
SHAPE_KEYS["ControlNetUnionModel"] = SHAPE_KEYS["ControlNetModel"] | {
    "conditioning_embedding_out_channels": [48, 96, 192, 384],
    "num_control_type": 6,
    "num_trans_channel": 320,
    "num_trans_head": 8,
    "num_trans_layer": 1,
    "num_proj_channel": 320,
}
del SHAPE_KEYS["ControlNetUnionModel"]["mid_block_type"]  # a union net knows but one

# The graphs made of each class.
COMPONENTS: dict[str, tuple[str, ...]] = {
    "CLIPTextModel": ("text_encoder", "text_encoder_masked"),
    "CLIPTextModelWithProjection": ("text_encoder_2", "text_encoder_2_masked"),
    "UNet2DConditionModel": ("unet", "unet_control"),
    "ControlNetModel": ("controlnet_embed", "controlnet"),
    "ControlNetUnionModel": ("controlnet_union_embed", "controlnet_union"),
    "AutoencoderKL": ("vae_decoder", "vae_encoder"),
}

# The same with fewer and larger operations, for CUDA, which computes in 16 bits: a set of these dtypes has them, a float32
# one where that is asked for.
FUSED: dict[str, tuple[str, ...]] = {"UNet2DConditionModel": ("unet_fused", "unet_control_fused")}

# Graphs that a 16-bit set needs in float32 too: `force_upcast`, and the second try after a NaN.
ALSO_FLOAT32 = ("vae_decoder", "vae_encoder")


@dataclass(frozen=True)
class Job:
    """One graph to make."""

    component: str
    class_name: str
    config: Config
    dtype: str

    @property
    def file(self) -> str:
        digest = hashlib.sha256(canonical(self.config).encode()).hexdigest()[:8]
        return f"{self.component}-{digest}-{self.dtype}.pt"


# Graphs that are also compiled ahead of time, where that is asked for.
COMPILED = ("unet", "vae_decoder")


@dataclass(frozen=True)
class PackageJob:
    """One graph to compile, for pictures of `height` x `width` pixels on a kind of device such as `cuda sm_90`."""

    graph: Job
    height: int
    width: int
    batch: int
    device: str

    @property
    def file(self) -> str:
        stem = self.graph.file.removesuffix(".pt")
        device = self.device.split()[-1]
        return f"{stem}-{self.height}x{self.width}x{self.batch}-{device}.pt2"


def canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def shaping(class_name: str, raw: Config) -> Config:
    """The keys of `raw` that shape the graph, defaults filled in, spelled one way: null is false for a switch, and a
    whole number is an integer."""
    out: Config = {}
    for key, default in SHAPE_KEYS[class_name].items():
        value = raw.get(key, default)
        if value is None and isinstance(default, bool):
            value = False
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        out[key] = value
    return out


def read_json(path: Path) -> Config:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ExportError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ExportError(f"{path}: expected an object")
    return value


def read_model(folder: Path) -> list[tuple[str, Config]]:
    """Class and configuration of every component we export from a diffusers folder: a whole pipeline (with
    `model_index.json`, and the nets in its own `controlnets`) or one component (with `config.json`)."""
    if (folder / "model_index.json").is_file():
        index = read_json(folder / "model_index.json")
        names = [name for name, value in index.items() if isinstance(value, list) and len(value) == 2 and value[1]]
        folders = [*(folder / name for name in sorted(names)), *sorted(folder.glob("controlnets/*"))]
        found = [read_component(folder) for folder in folders if (folder / "config.json").is_file()]
        models = [model for model in found if model[0] in COMPONENTS]
    elif (folder / "config.json").is_file():
        models = [read_component(folder)]
        if models[0][0] not in COMPONENTS:
            known = ", ".join(sorted(COMPONENTS))
            raise ExportError(f"{folder}: no graph for class {models[0][0]!r}; known classes: {known}")
    else:
        raise ExportError(f"{folder}: neither model_index.json nor config.json there: not a diffusers folder")
    if not models:
        raise ExportError(f"{folder}: no component here that a graph can be made of")
    return models


def read_component(folder: Path) -> tuple[str, Config]:
    config = read_json(folder / "config.json")
    architectures = config.get("architectures") or [""]  # transformers' name for what diffusers calls _class_name
    name = config.get("_class_name") or architectures[0]
    return "ControlNetUnionModel" if name == "ControlNetModel" and is_union(folder, config) else name, config


def is_union(folder: Path, config: Config) -> bool:
    """Whether what calls itself a ControlNetModel is a union net, as those do that are older than diffusers' class for
    them. The number of types tells it or, where the configuration leaves that out, a name in a weight file's header."""
    if "num_control_type" in config:
        return True
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            if b'"task_embedding"' in file.read(2**20):
                return True
    return False


def jobs(models: list[tuple[str, Config]], dtypes: list[str], fused: bool = False) -> list[Job]:
    """Every graph the models need in these dtypes, each once; with `fused` that flavour in float32 too."""
    found: dict[str, Job] = {}
    for class_name, raw in models:
        config = shaping(class_name, raw)
        wanted = {name: [*dtypes, "float32"] if name in ALSO_FLOAT32 else dtypes for name in COMPONENTS[class_name]}
        for name in FUSED.get(class_name, ()):
            wanted[name] = [dtype for dtype in dtypes if fused or dtype != "float32"]
        for component, its_dtypes in wanted.items():
            for dtype in its_dtypes:
                job = Job(component, class_name, config, dtype)
                found.setdefault(job.file, job)
    return list(found.values())


def package_jobs(graphs: list[Job], sizes: list[tuple[int, int, int]], device: str) -> list[PackageJob]:
    """Every package of these graphs, each once. The VAE decodes one picture at a time, whatever the UNet's batch."""
    found: dict[str, PackageJob] = {}
    for graph in graphs:
        for height, width, batch in sizes:
            if graph.component in COMPILED:
                job = PackageJob(graph, height, width, batch if graph.component == "unet" else 1, device)
                found.setdefault(job.file, job)
    return list(found.values())
