"""Random LoRA files in every format, and what diffusers, peft and LyCORIS make of them."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

Tensors = dict[str, Tensor]
COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
KOHYA = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}

ATTENTION = r"\.to_(q|k|v|out\.0)$"
TEXT = r"self_attn\.|mlp\."


def randn(key: str, *shape: int, size: float = 1.0) -> Tensor:
    """The same numbers for the same key, so that files do not depend on the order in which they are written."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(key.encode()))) * size


def modules(pipeline, component: str, pattern: str) -> Iterator[tuple[str, nn.Module]]:
    """Linear layers and convolutions under the Hub's names."""
    for name, module in getattr(pipeline, component).named_modules():
        if component == "text_encoder" and not name.startswith("text_model."):
            name = f"text_model.{name}"
        if isinstance(module, nn.Linear | nn.Conv2d) and re.search(pattern, name):
            yield name, module


def factors(key: str, module: nn.Module, rank: int) -> tuple[Tensor, Tensor]:
    """`down` and `up` of a size that the picture shows: the change is half as large as a He-sized weight."""
    weight = module.weight
    kernel = tuple(weight.shape[2:])
    inputs = weight[0].numel()
    down = randn(f"{key} down", rank, weight.shape[1], *kernel, size=inputs**-0.5)
    up = randn(f"{key} up", weight.shape[0], rank, *(1 for _ in kernel), size=0.5 * rank**-0.5)
    return down, up


def alpha_of(key: str, rank: int) -> float:
    """Differs from module to module, and is never the rank."""
    return rank * (0.5 if zlib.crc32(key.encode()) % 2 else 1.5)


def one_alpha(_key: str, rank: int) -> float:
    """diffusers 0.42 gives every module the alpha that most of them have, whatever the file says."""
    return rank * 0.75


@dataclass
class Format:
    """How one kind of file is written. `unet` and `text` choose its modules."""

    name: str
    write: Callable[[str, str, nn.Module, int], Tensors]  # component, module's name, module, rank
    unet: str = ATTENTION
    text: str = TEXT
    rank: int = 4
    reader: str = "diffusers"  # or "lycoris"
    header_alpha: int | None = None  # written as diffusers writes peft's configuration

    def save(self, pipeline, path: Path, rank: int | None = None) -> None:
        tensors: Tensors = {}
        notes: dict[str, object] = {}
        for component in COMPONENTS:
            chosen = list(modules(pipeline, component, self.unet if component == "unet" else self.text))
            for name, module in chosen:
                tensors |= self.write(component, name, module, rank or self.rank)
            names = [name.removeprefix("text_model.") if component == "text_encoder" else name for name, _ in chosen]
            values = {"r": rank or self.rank, "lora_alpha": self.header_alpha, "target_modules": names}
            notes |= {f"{component}.{key}": value for key, value in values.items()}
        notes = {"lora_adapter_metadata": json.dumps(notes)} if self.header_alpha else None
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata=notes)


# --- What diffusers reads ---------------------------------------------------------------------------------------------


def peft(component: str, name: str, module: nn.Module, rank: int) -> Tensors:
    down, up = factors(component + name, module, rank)
    return {f"{component}.{name}.lora_A.weight": down, f"{component}.{name}.lora_B.weight": up}


def peft_dora(component: str, name: str, module: nn.Module, rank: int) -> Tensors:
    # `.weight` behind the vector is what peft's own state dict has; diffusers expects it so
    length = module.weight.flatten(1).norm(dim=1) * (1 + 0.3 * randn(f"{name} length", module.weight.shape[0]).tanh())
    length = length if module.weight.dim() == 2 else length.reshape(1, -1, 1, 1)
    return peft(component, name, module, rank) | {f"{component}.{name}.lora_magnitude_vector.weight": length.detach()}


def processors(component: str, name: str, module: nn.Module, rank: int) -> Tensors:
    """diffusers before 0.20: keys of attention processors."""
    down, up = factors(component + name, module, rank)
    if component == "unet":
        name = re.sub(r"\.to_(q|k|v|out)(\.0)?$", r".processor.to_\1_lora", name)
    else:
        short = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}
        head, _, last = name.rpartition(".")
        name = f"{head}.{short[last]}_lora"
    return {f"{component}.{name}.down.weight": down, f"{component}.{name}.up.weight": up}


def linear_layers(component: str, name: str, module: nn.Module, rank: int) -> Tensors:
    down, up = factors(component + name, module, rank)
    middle = "lora" if component == "unet" else "lora_linear_layer"
    return {f"{component}.{name}.{middle}.down.weight": down, f"{component}.{name}.{middle}.up.weight": up}


def kohya_name(component: str, name: str) -> str:
    return KOHYA[component] + name.replace(".", "_")


def kohya(component: str, name: str, module: nn.Module, rank: int, alpha=one_alpha) -> Tensors:
    key = kohya_name(component, name)
    down, up = factors(component + name, module, rank)
    return {
        f"{key}.lora_down.weight": down,
        f"{key}.lora_up.weight": up,
        f"{key}.alpha": torch.tensor(alpha(key, rank)),
    }


def kohya_own_alphas(component: str, name: str, module: nn.Module, rank: int) -> Tensors:
    return kohya(component, name, module, rank, alpha_of)


SGM_PARTS = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
SGM_WHOLE = {
    "conv_in": "input_blocks.0.0", "conv_out": "out.2", "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2", "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}  # fmt: skip


def sgm_name(name: str, layers: int) -> str:
    """Stability's name of a module of diffusers' UNet with this many layers in each block."""
    if name in SGM_WHOLE:
        return SGM_WHOLE[name]
    side, *rest = name.split(".")
    if side == "mid_block":
        kind, layer, *rest = rest
        number = 2 * int(layer) + (kind == "attentions")
        return f"middle_block.{number}." + (SGM_PARTS[rest[0]] if kind == "resnets" else ".".join(rest))
    block, kind, layer, *rest = rest
    if side == "down_blocks":
        number = 1 + int(block) * (layers + 1) + (layers if kind == "downsamplers" else int(layer))
        head = f"input_blocks.{number}"
    else:
        number = int(block) * (layers + 1) + (layers if kind == "upsamplers" else int(layer))
        head = f"output_blocks.{number}"
    if kind == "downsamplers":
        return f"{head}.0.op"
    if kind == "upsamplers":
        return f"{head}.2.conv"
    return f"{head}.0.{SGM_PARTS[rest[0]]}" if kind == "resnets" else f"{head}.1." + ".".join(rest)


def kohya_sgm(layers: int) -> Callable[[str, str, nn.Module, int], Tensors]:
    def write(component: str, name: str, module: nn.Module, rank: int) -> Tensors:
        tensors = kohya(component, name, module, rank)
        if component != "unet":
            return tensors
        old, new = kohya_name(component, name), kohya_name(component, sgm_name(name, layers))
        return {key.replace(old, new): tensor for key, tensor in tensors.items()}

    return write


# --- What LyCORIS reads -----------------------------------------------------------------------------------------------


def lycoris(kind: type, **options) -> Callable[[str, str, nn.Module, int], Tensors]:
    """A module of LyCORIS with random numbers, saved as it saves itself."""

    def write(component: str, name: str, module: nn.Module, rank: int) -> Tensors:
        key = kohya_name(component, name)
        layer = kind(key, module, 1.0, rank, alpha_of(key, rank), **options)
        with torch.no_grad():
            for part, parameter in layer.named_parameters():
                if part == "dora_scale":
                    parameter.mul_(1 + 0.3 * randn(f"{key} {part}", *parameter.shape).tanh())
                else:
                    parameter.copy_(randn(f"{key} {part}", *parameter.shape, size=0.5 * PART_SIZE.get(part, 0.5)))
        state = layer.custom_state_dict()
        return {f"{key}.{part}": tensor.detach().clone() for part, tensor in state.items()}

    return write


# So that the change is about as large as for LoRA; whatever a factor's shape is.
PART_SIZE = {"lora_mid.weight": 0.5, "lora_up.weight": 0.4, "lora_down.weight": 0.4, "hada_w1_a": 0.6, "hada_w2_a": 0.6, "lokr_w1": 0.8, "lokr_w2": 0.25}

KINDS = {"lora_up.weight": LoConModule, "hada_w1_a": LohaModule, "lokr_w1": LokrModule, "lokr_w1_a": LokrModule}


def lycoris_layer(key: str, module: nn.Module, state: Tensors, scale: float) -> nn.Module:
    """LyCORIS' own module for the tensors of one layer of a file, ready to take the layer's place."""
    kind = next(kind for part, kind in KINDS.items() if part in state)
    options: dict[str, object] = {"weight_decompose": "dora_scale" in state}
    if "dora_scale" in state:
        options["wd_on_out"] = state["dora_scale"].shape[0] == module.weight.shape[0]
    if kind is LoConModule:
        rank, options["use_tucker"] = state["lora_down.weight"].shape[0], "lora_mid.weight" in state
    elif kind is LohaModule:
        rank, options["use_tucker"] = state["hada_w1_b"].shape[0], "hada_t1" in state
    else:
        # the class works out which parts it has from these, so they are those that the writer was given
        b = state.get("lokr_w1_b", state.get("lokr_w2_b"))
        rank = b.shape[0] if b is not None else 4
        options |= {
            "use_tucker": "lokr_t2" in state, "decompose_both": "lokr_w1_a" in state,
            "full_matrix": "lokr_w1" in state and "lokr_w2" in state, "factor": 4,
        }  # fmt: skip
    layer = kind(key, module, scale, rank, float(state["alpha"]), **options)
    layer.load_state_dict(state, strict=False)
    for part, parameter in layer.named_parameters():
        assert torch.equal(parameter, state[part]), part
    return layer


@contextmanager
def applied(pipeline, files: list[tuple[Path, float, str]]):
    """The pipeline with these files (path, scale, reader) in its weights."""
    layers: list[nn.Module] = []
    adapters: dict[str, float] = {}
    try:
        for index, (path, scale, reader) in enumerate(files):
            if reader == "diffusers":
                pipeline.load_lora_weights(path.parent, weight_name=path.name, adapter_name=f"a{index}")
                adapters[f"a{index}"] = scale
                continue
            state = load_file(path)
            for component in COMPONENTS:
                for name, module in list(modules(pipeline, component, "")):
                    key = kohya_name(component, name)
                    own = {part.removeprefix(f"{key}."): t for part, t in state.items() if part.startswith(f"{key}.")}
                    if own:
                        layer = lycoris_layer(key, module, own, scale)
                        layer.apply_to()
                        layers.append(layer)
        if adapters:
            pipeline.set_adapters(list(adapters), list(adapters.values()))
            pipeline.fuse_lora(components=list(COMPONENTS), adapter_names=list(adapters))
        yield
    finally:
        if adapters:
            pipeline.unfuse_lora(components=list(COMPONENTS))
            pipeline.unload_lora_weights()
        for layer in reversed(layers):
            layer.restore()
