"""LoRA equals diffusers with peft, and LyCORIS where those read no such file: every format, several at once, scales."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from safetensors.torch import load_file, save_file

import lora_files as files
from lora_files import Format
from support import BASE, MUST_MOVE, TOLERANCE, relative, run_worker

LAYERS = {"default": 2, "second": 1}
ATTENTION_TEXT = r"self_attn\."
EVERYTHING = ""

FORMATS = [
    Format("peft", files.peft, unet=EVERYTHING),
    Format("peft, alpha in the header", files.peft, header_alpha=6),
    Format("peft dora", files.peft_dora, unet=EVERYTHING),
    Format("processors", files.processors, text=ATTENTION_TEXT),
    Format("linear layers", files.linear_layers, unet=ATTENTION_TEXT + "|" + files.ATTENTION + r"|proj_|ff\.net"),
    Format("kohya, diffusers names", files.kohya),
    Format("kohya, an alpha for each module", files.kohya_own_alphas, unet=EVERYTHING, reader="lycoris"),
    Format("locon, diffusers names", files.kohya, unet=r"resnets|samplers|proj_|ff\.net"),
    Format("kohya, sgm names", files.kohya_sgm(2), unet=EVERYTHING),
    Format("locon with a core", files.lycoris(LoConModule, use_tucker=True), unet=EVERYTHING, reader="lycoris"),
    Format("dora_scale of rows", files.lycoris(LoConModule, weight_decompose=True), unet=EVERYTHING, reader="lycoris"),
    Format("dora_scale of columns", files.lycoris(LoConModule, weight_decompose=True, wd_on_out=False),
           unet=EVERYTHING, reader="lycoris"),
    Format("loha", files.lycoris(LohaModule), unet=EVERYTHING, reader="lycoris"),
    Format("loha with cores", files.lycoris(LohaModule, use_tucker=True), unet=EVERYTHING, reader="lycoris"),
    Format("loha with dora_scale", files.lycoris(LohaModule, weight_decompose=True), reader="lycoris"),
    Format("lokr whole", files.lycoris(LokrModule, factor=4, full_matrix=True), unet=EVERYTHING, reader="lycoris"),
    Format("lokr, second factored", files.lycoris(LokrModule, factor=4), unet=EVERYTHING, reader="lycoris", rank=2),
    Format("lokr, both factored", files.lycoris(LokrModule, factor=4, decompose_both=True), unet=EVERYTHING,
           reader="lycoris", rank=1),
    Format("lokr with a core", files.lycoris(LokrModule, factor=4, use_tucker=True), unet=EVERYTHING,
           reader="lycoris", rank=2),
    Format("lokr with dora_scale", files.lycoris(LokrModule, factor=4, weight_decompose=True), reader="lycoris",
           rank=2),
]  # fmt: skip
BY_NAME = {each.name: each for each in FORMATS}


@dataclass
class Case:
    name: str
    loras: list[tuple[str, float]]  # format, scale
    model: str = "default"


def one(name: str, scale: float = 1.0, model: str = "default") -> Case:
    return Case(f"{name} at {scale}" + f", {model}" * (model != "default"), [(name, scale)], model)


CASES = [
    *(one(each.name) for each in FORMATS),
    one("peft", 0.4),
    one("peft", -0.7, "second"),
    one("peft dora", 0.6),
    one("dora_scale of rows", 0.6),
    one("loha", 0.5, "second"),
    one("lokr, second factored", -0.5, "second"),
    one("kohya, diffusers names", 1.3, "second"),
    Case("three at once", [("peft", 0.5), ("kohya, sgm names", -0.4), ("processors", 0.8)]),
    Case("a dora between two others", [("peft", 0.5), ("peft dora", 0.7), ("linear layers", 0.6)]),
    Case("two doras", [("peft dora", 0.7), ("peft dora", 0.4)]),
    Case("lycoris' kinds together", [("loha", 0.6), ("lokr, second factored", 0.5), ("locon with a core", 0.4)]),
    Case("the same file twice", [("kohya, diffusers names", 0.3), ("kohya, diffusers names", 0.5)]),
]


def component_of(key: str) -> str:
    for component, prefix in files.KOHYA.items():
        if key.startswith((prefix, f"{component}.")):
            return component
    raise AssertionError(key)


def without(path: Path, component: str) -> Path:
    """The same file without what it has for one component."""
    kept = {key: tensor for key, tensor in load_file(path).items() if component_of(key) != component}
    save_file(kept, out := path.with_name(f"{path.stem} without {component}.safetensors"))
    return out


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_diffusers_and_lycoris(case, worker, test_models, reference, tmp_path, is_full):
    model = test_models[case.model]
    pipeline = reference.pipeline(model)
    loras: list[tuple[Path, float, str]] = []
    for index, (name, scale) in enumerate(case.loras):
        kind = copy.copy(BY_NAME[name])
        if kind.name == "kohya, sgm names":
            kind.write = files.kohya_sgm(LAYERS[case.model])
        path = tmp_path / f"lora{index}.safetensors"
        kind.save(pipeline, path, rank=kind.rank + index)
        loras.append((path, scale, kind.reader))
    request = {key: value for key, value in BASE.items()}

    def theirs(chosen: list[tuple[Path, float, str]]) -> torch.Tensor:
        with files.applied(pipeline, chosen):
            return reference.run(model, request, {})

    expected = theirs(loras)
    assert torch.isfinite(expected).all()
    # that each part of each file matters is tested in full, which takes five runs of diffusers more
    for index, (path, scale, reader) in enumerate(loras if is_full else ()):
        others = [theirs([*loras[:index], *loras[index + 1 :]]), theirs([*loras[:index], (path, scale / 2, reader), *loras[index + 1 :]])]
        if len(loras) == 1:
            others += [theirs([(without(path, component), scale, reader)]) for component in files.COMPONENTS]
        for number, other in enumerate(others):
            moved = relative(other, expected)
            assert moved > MUST_MOVE, f"{case.name} cannot fail: change {number} of {path.name} moves by {moved:.1e} only"
    plain = reference.latents(model, request, {})
    assert relative(plain, expected) > MUST_MOVE
    assert relative(reference.run(model, request, {}), plain) < 1e-5, "the reference did not take its LoRA back"

    entries = [{"name": path.stem, "scale": scale} for path, scale, _ in loras]
    ours, _ = run_worker(
        worker, model, test_models["graphs"], request | {"loras": entries}, tmp_path / "run", ("--lora-dir", str(tmp_path))
    )
    error = relative(ours, expected)
    print(f"{case.name}: {error:.1e}")
    assert error <= TOLERANCE, f"{case.name}: latents are off by {error:.1e}"
