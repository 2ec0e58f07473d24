"""One kind of graph per class below: a wrapper module with positional tensors in and a flat tuple of tensors out, whose
parameters carry the names of the Hub's files, plus what the export must know about it. A new kind is a new subclass of
`Graph` and its line in `KINDS` (and in `configs.COMPONENTS`)."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention_processor import Attention
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.controlnets.controlnet import ControlNetModel
from diffusers.models.controlnets.controlnet_union import ControlNetUnionModel
from diffusers.models.embeddings import Timesteps
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
from transformers.utils import logging as transformers_logging

from configs import Config, ExportError

for library_logging in (diffusers_logging, transformers_logging):
    library_logging.set_verbosity_error()  # their hints on loading are not for whoever exports

TOKENS = 77
Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class Port:
    """An input or output. Named dimensions differ from call to call: B batch, h and w latent size, T tokens, n control
    images; `8h` is eight times h, and `h/2` half of h, rounded up."""

    name: str
    dtype: str
    shape: list[str | int]


@dataclass(frozen=True)
class Size:
    """The named dimensions of one call."""

    batch: int
    height: int
    width: int
    tokens: int = TOKENS
    conditions: int = 2

    def of(self, dimension: str | int) -> int:
        if isinstance(dimension, int):
            return dimension
        sizes = {"B": self.batch, "h": self.height, "w": self.width, "T": self.tokens, "n": self.conditions}
        times, name, parts = re.fullmatch(r"(\d*)(\w)(?:/(\d+))?", dimension).groups()
        return math.ceil(int(times or 1) * sizes[name] / int(parts or 1))


class BufferedTimesteps(nn.Module):
    """diffusers' sinusoidal `Timesteps` with its frequencies in a buffer. The original makes them with `arange` at each
    call, and a trace then holds the device of that `arange` for ever."""

    def __init__(self, original: Timesteps) -> None:
        super().__init__()
        if original.num_channels % 2:
            raise ExportError(f"a time embedding of odd width ({original.num_channels}) is not supported")
        half = original.num_channels // 2
        exponent = -math.log(10000) * torch.arange(start=0, end=half, dtype=torch.float32, device="cpu")
        self.register_buffer("frequencies", torch.exp(exponent / (half - original.downscale_freq_shift)))
        self.flip_sin_to_cos = original.flip_sin_to_cos
        self.scale = original.scale

    def forward(self, timesteps: Tensor) -> Tensor:
        angles = self.scale * (timesteps[:, None].float() * self.frequencies[None, :])
        parts = [torch.sin(angles), torch.cos(angles)]
        return torch.cat(parts[::-1] if self.flip_sin_to_cos else parts, dim=-1)

    @classmethod
    def replace_in(cls, module: nn.Module) -> None:
        for name, child in list(module.named_children()):
            if isinstance(child, Timesteps):
                setattr(module, name, cls(child))


class TwoProducts(nn.Module):
    """diffusers' `GEGLU` as two products with the two halves of its projection's rows. The original makes one product and
    reads its halves, which do not lie in one piece."""

    def __init__(self, original: GEGLU) -> None:
        super().__init__()
        self.proj = original.proj
        self.gelu = original.gelu

    def forward(self, hidden_states: Tensor) -> Tensor:
        weight, gate_weight = self.proj.weight.chunk(2)
        bias, gate_bias = (None, None) if self.proj.bias is None else self.proj.bias.chunk(2)
        gate = nn.functional.linear(hidden_states, gate_weight, gate_bias)
        return nn.functional.linear(hidden_states, weight, bias) * self.gelu(gate)

    @classmethod
    def replace_in(cls, module: nn.Module) -> None:
        for parent in list(module.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, GEGLU):
                    setattr(parent, name, cls(child))


class Graph(nn.Module):
    """Base of the kinds. An instance wraps one eager module and is what gets traced."""

    component: str
    class_name: str
    defaults_of: type  # whose constructor has the defaults of the configuration's keys
    exact = True  # equal to the eager module to the bit; else up to rounding

    def __init__(self, module: nn.Module) -> None:
        """Wraps a module that `eager` made (and may change it)."""
        super().__init__()

    def adopt(self, module: nn.Module, *names: str) -> None:
        """Registers the module's children (and its own parameters, when no names are given) under their own names, so
        that parameter names have no prefix of ours; the module itself stays out of sight of torch."""
        self.__dict__["wrapped"] = module
        for name in names or (*dict(module.named_children()), *dict(module.named_parameters(recurse=False))):
            child = getattr(module, name)
            if child is not None:
                setattr(self, name, child)

    @classmethod
    def eager(cls, config: Config) -> nn.Module:
        """The library's own module, random weights."""
        raise NotImplementedError

    @classmethod
    def reference(cls, module: nn.Module, *inputs: Tensor) -> Tensors:
        """What the library's own module answers: the truth the graph is compared with."""
        raise NotImplementedError

    @classmethod
    def hub_name(cls, name: str) -> str:
        """The Hub's name of a parameter of the eager module."""
        return name

    @classmethod
    def sources(cls, name: str) -> list[str]:
        """The Hub's parameters that a parameter of the graph is made of: equal shares of its rows, in this order."""
        return [name]

    @classmethod
    def inputs(cls, config: Config, dtype: str) -> list[Port]:
        raise NotImplementedError

    @classmethod
    def outputs(cls, config: Config, dtype: str) -> list[Port]:
        raise NotImplementedError

    @classmethod
    def shrink(cls, config: Config) -> Config:
        """A small configuration of the same classes and switches, to compare graph and eager module on."""
        raise NotImplementedError


def few(value: int | list[int], most: int) -> int | list[int]:
    return [few(item, most) for item in value] if isinstance(value, list) else min(value, most)


def small_channels(config: Config) -> tuple[list[int], int]:
    """Channels of the same order and equalities, at most 8 groups, a few times the groups wide."""
    groups = min(config["norm_num_groups"], 8)
    ranks = sorted(set(config["block_out_channels"]))
    return [groups * (ranks.index(channels) + 1) * 2 for channels in config["block_out_channels"]], groups


class TextGraph(Graph):
    """input_ids [B,77] -> every hidden state (L+1 of [B,77,D]), then the pooled output.

    The layers are called with `is_causal`: the mask tensor transformers would make knows its device. Positions are a
    slice of the table and the pooled row is gathered, for the same reason."""

    defaults_of = CLIPTextConfig
    model_class: type[nn.Module]
    pooled: str

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.text_model = getattr(module, "text_model", module)
        del self.text_model.embeddings.position_ids
        self.eos_token_id = self.text_model.eos_token_id

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensors:
        embeddings = self.text_model.embeddings
        positions = embeddings.position_embedding.weight[: input_ids.shape[1]]
        states = [embeddings.token_embedding(input_ids) + positions]
        for layer in self.text_model.encoder.layers:
            states.append(layer(states[-1], attention_mask, is_causal=True))
        last = self.text_model.final_layer_norm(states[-1])
        # 2 is what old configurations say; transformers then pools at the highest id, which is the end token.
        marks = input_ids if self.eos_token_id == 2 else input_ids == self.eos_token_id
        index = marks.to(torch.int).argmax(dim=-1)[:, None, None].expand(-1, 1, last.shape[-1])
        return (*states, self.project(last.gather(1, index)[:, 0]))

    def project(self, pooled: Tensor) -> Tensor:
        return pooled

    @classmethod
    def eager(cls, config: Config) -> nn.Module:
        return cls.model_class(CLIPTextConfig(**config, bos_token_id=0, pad_token_id=1))  # unused; in any vocabulary

    @classmethod
    def reference(cls, module: nn.Module, *inputs: Tensor) -> Tensors:
        output = module(*inputs, output_hidden_states=True)  # a mask of four dimensions is taken as it is
        return (*output.hidden_states, output[cls.pooled])

    @classmethod
    def inputs(cls, config: Config, dtype: str) -> list[Port]:
        return [Port("input_ids", "int64", ["B", TOKENS])]

    @classmethod
    def outputs(cls, config: Config, dtype: str) -> list[Port]:
        width = config["hidden_size"]
        states = range(config["num_hidden_layers"] + 1)
        ports = [Port(f"hidden_states_{index}", dtype, ["B", TOKENS, width]) for index in states]
        return [*ports, Port(cls.pooled, dtype, ["B", config.get("projection_dim", width)])]

    @classmethod
    def shrink(cls, config: Config) -> Config:
        heads = few(config["num_attention_heads"], 4)
        small = {"hidden_size": 8 * heads, "intermediate_size": 24 * heads, "num_attention_heads": heads}
        small["num_hidden_layers"] = few(config["num_hidden_layers"], 3)
        if "projection_dim" in config:
            small["projection_dim"] = few(config["projection_dim"], 24)
        return config | small


class TextEncoder(TextGraph):
    """The pooled output is that of the final norm at the end token."""

    component = "text_encoder"
    class_name = "CLIPTextModel"
    model_class = CLIPTextModel
    pooled = "pooler_output"

    @classmethod
    def hub_name(cls, name: str) -> str:
        # transformers 5 dropped the prefix that the Hub's files carry.
        return name if name.startswith("text_model.") else f"text_model.{name}"


class TextEncoder2(TextGraph):
    """The pooled output goes through the projection."""

    component = "text_encoder_2"
    class_name = "CLIPTextModelWithProjection"
    model_class = CLIPTextModelWithProjection
    pooled = "text_embeds"

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.text_projection = module.text_projection

    def project(self, pooled: Tensor) -> Tensor:
        return self.text_projection(pooled)


class Masked(TextGraph):
    """The same encoder with its attention mask, added to the scores, as a further input: tokens can be hidden. The mask
    brings the causal triangle with it."""

    @classmethod
    def inputs(cls, config: Config, dtype: str) -> list[Port]:
        return [*super().inputs(config, dtype), Port("attention_mask", dtype, ["B", 1, TOKENS, TOKENS])]


class TextEncoderMasked(Masked, TextEncoder):
    component = "text_encoder_masked"


class TextEncoder2Masked(Masked, TextEncoder2):
    component = "text_encoder_2_masked"


def require(config: Config, needed: Config) -> None:
    for key, value in needed.items():
        if config[key] != value:
            raise ExportError(f"{key} is {config[key]!r}; only {value!r} can be exported")


def num_time_ids(config: Config) -> int:
    """Sizes and crops are 6 numbers. A refiner has 5, the last an aesthetic score; it is known by its one text encoder,
    whose hidden states are as wide as its pooled text."""
    pooled = config["projection_class_embeddings_input_dim"] - 5 * config["addition_time_embed_dim"]
    return 5 if pooled == config["cross_attention_dim"] else 6


class Denoiser(Graph):
    """Base of the UNet and of the nets that control it: they share their first inputs and the shapes of the skips."""

    @classmethod
    def inputs(cls, config: Config, dtype: str) -> list[Port]:
        ids = num_time_ids(config)
        pooled = config["projection_class_embeddings_input_dim"] - ids * config["addition_time_embed_dim"]
        return [
            Port("sample", dtype, ["B", config["in_channels"], "h", "w"]),
            Port("timestep", "float32", ["B"]),
            Port("encoder_hidden_states", dtype, ["B", "T", config["cross_attention_dim"]]),
            Port("text_embeds", dtype, ["B", pooled]),
            Port("time_ids", dtype, ["B", ids]),
        ]

    @classmethod
    def residuals(cls, config: Config, dtype: str) -> list[Port]:
        """What a control net adds to the UNet: one tensor for each skip, `down_0` to the deepest, then `mid`."""
        channels = config["block_out_channels"]
        layers = config["layers_per_block"]
        layers = layers if isinstance(layers, list) else [layers] * len(channels)
        skips = [(channels[0], 0)]
        for level, width in enumerate(channels):
            skips += [(width, level)] * layers[level]
            if level + 1 < len(channels):
                skips.append((width, level + 1))
        names = [f"down_{index}" for index in range(len(skips))]
        places = zip([*names, "mid"], [*skips, (channels[-1], len(channels) - 1)])
        return [Port(name, dtype, ["B", width, *cls.size_at(config, level)]) for name, (width, level) in places]

    @classmethod
    def size_at(cls, config: Config, level: int) -> list[str | int]:
        """Height and width of a level, each half of the one above, rounded up."""
        return [f"h/{2**level}", f"w/{2**level}"] if level else ["h", "w"]

    @classmethod
    def shrink(cls, config: Config) -> Config:
        channels, groups = small_channels(config)
        ids = num_time_ids(config)
        return config | {
            "block_out_channels": channels,
            "norm_num_groups": groups,
            "attention_head_dim": 2,
            "layers_per_block": few(config["layers_per_block"], 2),
            "transformer_layers_per_block": few(config["transformer_layers_per_block"], 2),
            "cross_attention_dim": 24,
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": ids * 8 + (24 if ids == 5 else 20),
        }


class UNet(Denoiser):
    """One denoising step: latents, their noise level and the conditions -> predicted noise (or v, or sample). A model
    distilled to few steps may also take its guidance scale, embedded."""

    component = "unet"
    class_name = "UNet2DConditionModel"
    defaults_of = UNet2DConditionModel

    def __init__(self, module: UNet2DConditionModel) -> None:
        super().__init__(module)
        BufferedTimesteps.replace_in(module)
        self.adopt(module)

    def forward(self, *inputs: Tensor) -> Tensors:
        return self.reference(self.wrapped, *inputs)

    @classmethod
    def eager(cls, config: Config) -> nn.Module:
        require(config, {"addition_embed_type": "text_time"})
        return UNet2DConditionModel.from_config(config)

    @classmethod
    def inputs(cls, config: Config, dtype: str) -> list[Port]:
        width = config["time_cond_proj_dim"]
        guidance = [Port("timestep_cond", dtype, ["B", width])] if width else []
        return [*super().inputs(config, dtype), *guidance]

    @classmethod
    def reference(cls, module: nn.Module, *inputs: Tensor) -> Tensors:
        sample, timestep, encoder_hidden_states, text_embeds, time_ids, *residuals = inputs
        timestep_cond = residuals.pop(0) if module.config.time_cond_proj_dim else None
        return module(
            sample,
            timestep,
            encoder_hidden_states,
            timestep_cond=timestep_cond,
            added_cond_kwargs={"text_embeds": text_embeds, "time_ids": time_ids},
            down_block_additional_residuals=residuals[:-1] or None,
            mid_block_additional_residual=residuals[-1] if residuals else None,
            return_dict=False,
        )

    @classmethod
    def outputs(cls, config: Config, dtype: str) -> list[Port]:
        return [Port("noise_pred", dtype, ["B", config["out_channels"], "h", "w"])]


class UNetControl(UNet):
    """The same step with the residuals of control nets, added up by the caller, as further inputs."""

    component = "unet_control"

    @classmethod
    def inputs(cls, config: Config, dtype: str) -> list[Port]:
        return [*super().inputs(config, dtype), *cls.residuals(config, dtype)]


class UNetFused(UNet):
    """The same step with fewer and larger operations: one product for the projections of an attention's input, and a gate
    that lies in one piece."""

    component = "unet_fused"
    exact = False  # a product of another size may round otherwise

    def __init__(self, module: UNet2DConditionModel) -> None:
        module.fuse_qkv_projections()
        for attention in module.modules():
            if isinstance(attention, Attention):
                del attention.to_k, attention.to_v
                if not attention.is_cross_attention:
                    del attention.to_q
        TwoProducts.replace_in(module)
        super().__init__(module)

    @classmethod
    def sources(cls, name: str) -> list[str]:
        for fused, parts in {"to_qkv": ("to_q", "to_k", "to_v"), "to_kv": ("to_k", "to_v")}.items():
            if f".{fused}." in name:
                return [name.replace(f".{fused}.", f".{part}.") for part in parts]
        return [name]


class UNetControlFused(UNetFused, UNetControl):
    component = "unet_control_fused"


class ControlNet(Denoiser):
    """The UNet's inputs and an embedded control image -> residuals for `unet_control`, not scaled.

    The embedding of the image is `ControlNetEmbed`: it runs once for an image, and this graph once for a step."""

    component = "controlnet"
    class_name = "ControlNetModel"
    defaults_of = ControlNetModel
    parts: tuple[str, ...] = ()  # of the module; none means all
    needed: Config = {
        "addition_embed_type": "text_time",
        "class_embed_type": None,
        "num_class_embeds": None,
        "encoder_hid_dim": None,
        "encoder_hid_dim_type": None,
    }

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        BufferedTimesteps.replace_in(module)
        self.adopt(module, *self.parts)

    def forward(self, *inputs: Tensor) -> Tensors:
        return self.reference(self.wrapped, *inputs)

    @classmethod
    def eager(cls, config: Config) -> nn.Module:
        """The library's module, but for the embedding: the condition comes embedded."""
        require(config, cls.needed)
        # What "bgr" turns around is the image.
        module = cls.defaults_of.from_config(config | {"controlnet_conditioning_channel_order": "rgb"})
        module.controlnet_cond_embedding = nn.Identity()
        return module

    @classmethod
    def reference(cls, module: nn.Module, *inputs: Tensor) -> Tensors:
        sample, timestep, encoder_hidden_states, text_embeds, time_ids, condition = inputs
        conditions = {"text_embeds": text_embeds, "time_ids": time_ids}
        down, mid = module(
            sample, timestep, encoder_hidden_states, condition, added_cond_kwargs=conditions, return_dict=False
        )
        return (*down, mid)

    @classmethod
    def condition(cls, config: Config, dtype: str) -> Port:
        return Port("condition", dtype, ["B", config["block_out_channels"][0], "h", "w"])

    @classmethod
    def inputs(cls, config: Config, dtype: str) -> list[Port]:
        return [*super().inputs(config, dtype), cls.condition(config, dtype)]

    @classmethod
    def outputs(cls, config: Config, dtype: str) -> list[Port]:
        return cls.residuals(config, dtype)

    @classmethod
    def size_at(cls, config: Config, level: int) -> list[str | int]:
        return [1, 1] if config["global_pool_conditions"] else super().size_at(config, level)

    @classmethod
    def shrink(cls, config: Config) -> Config:
        embedding = [8 * (index + 1) for index in range(len(config["conditioning_embedding_out_channels"]))]
        return super().shrink(config) | {"num_attention_heads": None, "conditioning_embedding_out_channels": embedding}


class ControlNetEmbed(ControlNet):
    """Control image in [0, 1] -> embedded condition of the latents' size."""

    component = "controlnet_embed"
    parts = ("controlnet_cond_embedding",)

    @classmethod
    def eager(cls, config: Config) -> nn.Module:
        require(config, cls.needed)
        return cls.defaults_of.from_config(config)

    @classmethod
    def reference(cls, module: nn.Module, *inputs: Tensor) -> Tensors:
        (image,) = inputs
        if module.config.controlnet_conditioning_channel_order == "bgr":
            image = image.flip(1)
        return (module.controlnet_cond_embedding(image),)

    @classmethod
    def inputs(cls, config: Config, dtype: str) -> list[Port]:
        factor = 2 ** (len(config["conditioning_embedding_out_channels"]) - 1)
        return [Port("image", dtype, ["B", config["conditioning_channels"], f"{factor}h", f"{factor}w"])]

    @classmethod
    def outputs(cls, config: Config, dtype: str) -> list[Port]:
        return [cls.condition(config, dtype)]


def scaled(tensor: Tensor, scale: Tensor) -> Tensor:
    """The product with a number that is a float32 tensor, rounded once, as torch multiplies by a Python number."""
    return (tensor.float() * scale).to(tensor.dtype)


@torch.jit.script
def fused(start: Tensor, conditions: Tensor, tokens: Tensor, scales: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """start [B,C,h,w] + the conditions [n,B,C,h,w], each shifted by what its token, of tokens [B,n+1,C], projects to.
    A loop in the graph: n is free, and the sums round in diffusers' order."""
    for index in range(conditions.size(0)):
        shift = torch.nn.functional.linear(tokens[:, index], weight, bias)[:, :, None, None]
        scale = scales[index]
        start = start + (scaled(conditions[index], scale) + scaled(shift, scale))
    return start


class ControlNetUnion(ControlNet):
    """The UNet's inputs and n embedded control images, each with its type and scale -> residuals for `unet_control`.

    As diffusers does for two images and more, a scale multiplies its condition; the residuals are not scaled. For one
    image diffusers scales the residuals: give 1 here, and scale them outside."""

    component = "controlnet_union"
    class_name = "ControlNetUnionModel"
    defaults_of = ControlNetUnionModel
    needed = ControlNet.needed | {"controlnet_conditioning_channel_order": "rgb"}

    def forward(self, *inputs: Tensor) -> Tensors:
        sample, timestep, encoder_hidden_states, text_embeds, time_ids, *control = inputs
        conditions, task_ids, control_type, scales = control
        batch, dtype = sample.shape[0], sample.dtype

        types = self.control_type_proj(control_type.flatten()).reshape(batch, -1)
        times = self.add_time_proj(time_ids.flatten()).reshape(batch, -1)
        embedding = self.time_embedding(self.time_proj(timestep).to(dtype))
        embedding = embedding + self.control_add_embedding(types.to(dtype))
        embedding = embedding + self.add_embedding(torch.cat([text_embeds, times], dim=-1).to(dtype))

        sample = self.conv_in(sample)
        sample = sample + self.fuse(sample, conditions, task_ids, scales)

        skips = (sample,)
        for block in self.down_blocks:
            text = {"encoder_hidden_states": encoder_hidden_states} if hasattr(block, "attentions") else {}
            sample, more = block(sample, embedding, **text)
            skips += more
        sample = self.mid_block(sample, embedding, encoder_hidden_states=encoder_hidden_states)
        residuals = [convolution(skip) for convolution, skip in zip(self.controlnet_down_blocks, skips)]
        residuals.append(self.controlnet_mid_block(sample))
        if self.wrapped.config.global_pool_conditions:
            residuals = [residual.mean((2, 3), keepdim=True) for residual in residuals]
        return tuple(residuals)

    def fuse(self, sample: Tensor, conditions: Tensor, task_ids: Tensor, scales: Tensor) -> Tensor:
        """One token for each condition and one for the sample attend to each other; what becomes of them shifts the
        channels of the conditions, which are then added up to [B,C,h,w]."""
        tokens = conditions.mean((3, 4)) + self.task_embedding[task_ids][:, None]
        tokens = scaled(tokens, scales[:, None, None]).transpose(0, 1)
        tokens = torch.cat([tokens, sample.mean((2, 3))[:, None]], dim=1)
        for layer in self.transformer_layes:
            tokens = layer(tokens)
        project = self.spatial_ch_projs
        return fused(sample * 0.0, conditions, tokens, scales, project.weight, project.bias)

    @classmethod
    def reference(cls, module: nn.Module, *inputs: Tensor) -> Tensors:
        sample, timestep, encoder_hidden_states, text_embeds, time_ids, *control = inputs
        conditions, task_ids, control_type, scales = control
        down, mid = module(
            sample,
            timestep,
            encoder_hidden_states,
            list(conditions),
            control_type,
            task_ids.tolist(),
            conditioning_scale=scales.tolist(),
            added_cond_kwargs={"text_embeds": text_embeds, "time_ids": time_ids},
            return_dict=False,
        )
        return (*down, mid)

    @classmethod
    def inputs(cls, config: Config, dtype: str) -> list[Port]:
        *shared, condition = super().inputs(config, dtype)
        return [
            *shared,
            Port("conditions", dtype, ["n", *condition.shape]),
            Port("task_ids", "int64", ["n"]),
            Port("control_type", dtype, ["B", config["num_control_type"]]),
            Port("scales", "float32", ["n"]),
        ]

    @classmethod
    def shrink(cls, config: Config) -> Config:
        small = super().shrink(config)
        width = small["block_out_channels"][0]
        layers = few(config["num_trans_layer"], 2)
        trans = {"num_trans_channel": width, "num_trans_head": 2, "num_trans_layer": layers, "num_proj_channel": width}
        return small | trans


class ControlNetUnionEmbed(ControlNetEmbed):
    """Control image in [0, 1] -> embedded condition of the latents' size, whatever the image's type."""

    component = "controlnet_union_embed"
    class_name = "ControlNetUnionModel"
    defaults_of = ControlNetUnionModel
    needed = ControlNetUnion.needed


class Vae(Graph):
    """Base of the two halves of the autoencoder."""

    class_name = "AutoencoderKL"
    defaults_of = AutoencoderKL

    @classmethod
    def eager(cls, config: Config) -> nn.Module:
        return AutoencoderKL.from_config(config)

    @classmethod
    def latents(cls, config: Config, dtype: str, name: str, channels: int) -> Port:
        return Port(name, dtype, ["B", channels, "h", "w"])

    @classmethod
    def image(cls, config: Config, dtype: str, channels: int) -> Port:
        factor = 2 ** (len(config["block_out_channels"]) - 1)
        return Port("image", dtype, ["B", channels, f"{factor}h", f"{factor}w"])

    @classmethod
    def shrink(cls, config: Config) -> Config:
        channels, groups = small_channels(config)
        layers = few(config["layers_per_block"], 2)
        return config | {"block_out_channels": channels, "norm_num_groups": groups, "layers_per_block": layers}


class VaeDecoder(Vae):
    """Latents, already divided by the scaling factor -> image in [-1, 1]."""

    component = "vae_decoder"

    def __init__(self, module: AutoencoderKL) -> None:
        super().__init__(module)
        self.adopt(module, "post_quant_conv", "decoder")

    def forward(self, latents: Tensor) -> Tensors:
        return self.wrapped._decode(latents, return_dict=False)

    @classmethod
    def reference(cls, module: nn.Module, *inputs: Tensor) -> Tensors:
        return module.decode(*inputs, return_dict=False)

    @classmethod
    def inputs(cls, config: Config, dtype: str) -> list[Port]:
        return [cls.latents(config, dtype, "latents", config["latent_channels"])]

    @classmethod
    def outputs(cls, config: Config, dtype: str) -> list[Port]:
        return [cls.image(config, dtype, config["out_channels"])]


class VaeEncoder(Vae):
    """Image in [-1, 1] -> mean and log variance of the latents, stacked by channel."""

    component = "vae_encoder"

    def __init__(self, module: AutoencoderKL) -> None:
        super().__init__(module)
        self.adopt(module, "encoder", "quant_conv")

    def forward(self, image: Tensor) -> Tensors:
        return (self.wrapped._encode(image),)

    @classmethod
    def reference(cls, module: nn.Module, *inputs: Tensor) -> Tensors:
        return (module.encode(*inputs).latent_dist.parameters,)

    @classmethod
    def inputs(cls, config: Config, dtype: str) -> list[Port]:
        return [cls.image(config, dtype, config["in_channels"])]

    @classmethod
    def outputs(cls, config: Config, dtype: str) -> list[Port]:
        return [cls.latents(config, dtype, "moments", 2 * config["latent_channels"])]


KINDS: dict[str, type[Graph]] = {
    kind.component: kind
    for kind in (
        TextEncoder,
        TextEncoder2,
        TextEncoderMasked,
        TextEncoder2Masked,
        UNet,
        UNetControl,
        UNetFused,
        UNetControlFused,
        ControlNetEmbed,
        ControlNet,
        ControlNetUnionEmbed,
        ControlNetUnion,
        VaeDecoder,
        VaeEncoder,
    )
}
