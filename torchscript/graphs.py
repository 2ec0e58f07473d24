"""One kind of graph per class below: a wrapper module with positional tensors in and a flat tuple of tensors out, whose
parameters carry the names of the Hub's files, plus what the export must know about it. A new kind is a new subclass of
`Graph` and its line in `KINDS` (and in `configs.COMPONENTS`)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
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
    """An input or output. Named dimensions differ from call to call: B batch, h and w latent size, T tokens; `8h` is
    eight times h."""

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

    def of(self, dimension: str | int) -> int:
        if isinstance(dimension, int):
            return dimension
        sizes = {"B": self.batch, "h": self.height, "w": self.width, "T": self.tokens}
        return int(dimension[:-1] or 1) * sizes[dimension[-1]]


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


class Graph(nn.Module):
    """Base of the kinds. An instance wraps one eager module and is what gets traced."""

    component: str
    class_name: str
    defaults_of: type  # whose constructor has the defaults of the configuration's keys

    def __init__(self, module: nn.Module) -> None:
        """Wraps a module that `eager` made (and may change it)."""
        super().__init__()

    def adopt(self, module: nn.Module, *names: str) -> None:
        """Registers the module's children under their own names, so that parameter names have no prefix of ours; the
        module itself stays out of sight of torch."""
        self.__dict__["wrapped"] = module
        for name in names or dict(module.named_children()):
            child = getattr(module, name)
            if child is not None:
                self.add_module(name, child)

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

    def forward(self, input_ids: Tensor) -> Tensors:
        embeddings = self.text_model.embeddings
        positions = embeddings.position_embedding.weight[: input_ids.shape[1]]
        states = [embeddings.token_embedding(input_ids) + positions]
        for layer in self.text_model.encoder.layers:
            states.append(layer(states[-1], None, is_causal=True))
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
        output = module(*inputs, output_hidden_states=True)
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


class UNet(Graph):
    """One denoising step: latents, their noise level and the conditions -> predicted noise (or v, or sample)."""

    component = "unet"
    class_name = "UNet2DConditionModel"
    defaults_of = UNet2DConditionModel

    def __init__(self, module: UNet2DConditionModel) -> None:
        super().__init__(module)
        module.time_proj = BufferedTimesteps(module.time_proj)
        module.add_time_proj = BufferedTimesteps(module.add_time_proj)
        self.adopt(module)

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, text_embeds: Tensor, time_ids: Tensor
    ) -> Tensors:
        return self.reference(self.wrapped, sample, timestep, encoder_hidden_states, text_embeds, time_ids)

    @classmethod
    def eager(cls, config: Config) -> nn.Module:
        for key, needed in (("addition_embed_type", "text_time"), ("time_cond_proj_dim", None)):
            if config[key] != needed:
                raise ExportError(f"unet: {key} is {config[key]!r}; only {needed!r} can be exported")
        return UNet2DConditionModel.from_config(config)

    @classmethod
    def reference(cls, module: nn.Module, *inputs: Tensor) -> Tensors:
        sample, timestep, encoder_hidden_states, text_embeds, time_ids = inputs
        conditions = {"text_embeds": text_embeds, "time_ids": time_ids}
        return module(sample, timestep, encoder_hidden_states, added_cond_kwargs=conditions, return_dict=False)

    @classmethod
    def inputs(cls, config: Config, dtype: str) -> list[Port]:
        pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        return [
            Port("sample", dtype, ["B", config["in_channels"], "h", "w"]),
            Port("timestep", "float32", ["B"]),
            Port("encoder_hidden_states", dtype, ["B", "T", config["cross_attention_dim"]]),
            Port("text_embeds", dtype, ["B", pooled]),
            Port("time_ids", dtype, ["B", 6]),
        ]

    @classmethod
    def outputs(cls, config: Config, dtype: str) -> list[Port]:
        return [Port("noise_pred", dtype, ["B", config["out_channels"], "h", "w"])]

    @classmethod
    def shrink(cls, config: Config) -> Config:
        channels, groups = small_channels(config)
        return config | {
            "block_out_channels": channels,
            "norm_num_groups": groups,
            "attention_head_dim": 2,
            "layers_per_block": few(config["layers_per_block"], 2),
            "transformer_layers_per_block": few(config["transformer_layers_per_block"], 2),
            "cross_attention_dim": 24,
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + 20,
        }


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
    kind.component: kind for kind in (TextEncoder, TextEncoder2, UNet, VaeDecoder, VaeEncoder)
}
