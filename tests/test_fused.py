"""The fused flavour of the UNet: the plain one's pictures on the same weights, which LoRAs find under their own names."""

from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import checks
import configs
import tiny_models
import tracing
from graphs import KINDS, Size, UNetFused
from program import copy_of, error_of, run, whole_text
from support import BASE, MUST_MOVE, SIDE, TOLERANCE, relative, run_worker
from test_inputs import MAP, ask, control, image_of, serving
from test_lora_jobs import QUERY, lora

FLAVOURS = {"unet_fused": "unet", "unet_control_fused": "unet_control"}
REQUEST = BASE | {"width": SIDE, "height": SIDE}  # else that of the control image
CONFIG = configs.shaping("UNet2DConditionModel", tiny_models.UNET)
ATTENTION = "down_blocks.1.attentions.0.transformer_blocks.0.attn"


def entries(graphs: Path, model: Path) -> dict[str, dict]:
    """Of the model's UNet, by component."""
    by_file = {entry["file"]: entry for entry in json.loads((graphs / "manifest.json").read_text())["graphs"]}
    jobs = configs.jobs(configs.read_model(model / "unet"), ["float32"], fused=True)
    return {job.component: by_file[job.file] for job in jobs}


# --- Graphs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["default", "second"])
def test_the_manifest_says_what_is_fused_of_what(model, test_models, fused_graphs):
    found = entries(fused_graphs, test_models[model])
    plain, fused = found["unet"]["parameters"], found["unet_fused"]["parameters"]
    sources = found["unet_fused"]["fused"]
    assert sources == found["unet_control_fused"]["fused"] and "fused" not in found["unet"]
    assert {name.split(".")[-2] for name in sources} == {"to_qkv", "to_kv"}
    rows = [f"{ATTENTION}1.to_{part}.weight" for part in "qkv"]
    assert sources[f"{ATTENTION}1.to_qkv.weight"] == rows
    assert sources[f"{ATTENTION}2.to_kv.weight"] == [name.replace("attn1", "attn2") for name in rows[1:]]
    names = [source for name in fused for source in sources.get(name, [name])]
    assert sorted(names) == sorted(plain)
    for name, shape in fused.items():
        share = [shape[0] // len(sources.get(name, [name])), *shape[1:]]
        assert all(plain[source] == share for source in sources.get(name, [name]))


@pytest.mark.parametrize("component", FLAVOURS)
@pytest.mark.parametrize("model", ["default", "second"])
def test_a_fused_graph_answers_what_the_plain_one_does(model, component, test_models, fused_graphs):
    found = entries(fused_graphs, test_models[model])
    weights: dict[str, torch.Tensor] = {}
    for path in (test_models[model] / "unet").glob("*.safetensors"):
        weights |= {name: tensor.float() for name, tensor in load_file(path).items()}
    inputs = tracing.example(KINDS[component], found[component]["config"], "float32", Size(3, 6, 7))
    outputs = []
    for name in (component, FLAVOURS[component]):
        file = fused_graphs / found[name]["file"]
        checks.weightless(file.read_bytes())
        graph = torch.jit.load(file)
        checks.no_device(graph)
        tracing.fill(KINDS[name], graph, weights)
        with torch.no_grad(), torch.jit.optimized_execution(False):
            outputs.append(graph(*inputs)[0])
    assert relative(*outputs) <= 1e-5


def test_a_fused_graph_is_the_same_every_time():
    def operations() -> list[str]:
        data = tracing.packed(tracing.trace(UNetFused, UNetFused.shrink(CONFIG), "float32"))
        graph = torch.jit.load(io.BytesIO(data)).inlined_graph
        # names of values and classes count up in a process
        return [re.sub(r"%\S+| # .*|__torch__\S*", "", str(node)) for node in graph.nodes()]

    first = operations()
    assert sum("aten::linear" in line for line in first) > 50 and first == operations()


class OtherOrder(UNetFused):
    @classmethod
    def sources(cls, name):
        return super().sources(name)[::-1]


def test_a_fused_graph_that_differs_from_the_eager_module_is_refused():
    with pytest.raises(configs.ExportError, match="differs from eager"):
        checks.equals_eager(OtherOrder, CONFIG, "float32")


def test_sets_for_cuda_have_the_fused_graphs():
    def made(*dtypes: str, fused: bool = False) -> set[tuple[str, str]]:
        jobs = configs.jobs([("UNet2DConditionModel", tiny_models.UNET)], list(dtypes), fused)
        return {(job.component, job.dtype) for job in jobs if job.component in FLAVOURS}

    assert made("float32") == set()
    assert made("float32", "float16") == {(name, "float16") for name in FLAVOURS}
    assert made("float32", fused=True) == {(name, "float32") for name in FLAVOURS}


# --- Pictures ---------------------------------------------------------------------------------------------------------


def dora(folder: Path, name: str) -> Path:
    """A LoRA that also gives the rows of its weight new lengths."""
    path = lora(folder, name, 7, modules=(QUERY, QUERY.replace("to_q", "to_v")))
    tensors = load_file(path)
    lengths = torch.rand(32, 1, generator=torch.Generator().manual_seed(1)) + 0.5
    return save_file(tensors | {f"{QUERY}.dora_scale": lengths}, path) or path


LORAS = [{"name": "ink", "scale": 0.7}, {"name": "lengths", "scale": 1.0}]
NET = [{"image": MAP, "model": "plain", "scale": 0.8}]
CASES = {
    "text": ("default", {}, ()),
    "the second model": ("second", {}, ()),
    "a net": ("default", {"controlnets": NET}, ()),
    "a net of the second model": ("second", {"controlnets": NET}, ()),
    "LoRAs": ("default", {"loras": LORAS}, ()),
    "offload": ("default", {}, ("--offload", "all")),
    "LoRAs, a net and offload": ("default", {"loras": LORAS, "controlnets": NET}, ("--offload", "all")),
}


@pytest.mark.parametrize(("model", "fields", "options"), CASES.values(), ids=CASES)
def test_fused_latents_are_the_plain_ones(model, fields, options, worker, test_models, fused_graphs, tmp_path):
    lora(tmp_path, "ink", seed=1)
    dora(tmp_path, "lengths")

    def latents(fused: str, fields: dict) -> torch.Tensor:
        folder = tmp_path / f"{fused}-{len(fields)}"
        own = ("--fused", fused, "--lora-dir", tmp_path, *options)
        return run_worker(worker, test_models[model], fused_graphs, REQUEST | fields, folder, own)[0]

    ours, theirs = latents("on", fields), latents("off", fields)
    assert 0 < relative(ours, theirs) <= TOLERANCE  # equal to the bit would be the plain graph
    if fields:
        assert relative(latents("on", {}), ours) > MUST_MOVE


@pytest.mark.parametrize("offload", ["none", "all"])
@pytest.mark.parametrize("backup", ["file", "copy"])
def test_loras_leave_fused_weights_as_they_were(backup, offload, test_models, fused_graphs, tmp_path):
    lora(tmp_path, "ink", seed=1)
    dora(tmp_path, "lengths")
    jobs = [{}, {"loras": LORAS}, control(), {"loras": LORAS[:1]}, {"loras": LORAS} | control(), {}, control()]
    options = ("--fused", "on", "--lora-dir", tmp_path, "--lora-backup", backup, "--offload", offload)
    with serving(test_models | {"graphs": fused_graphs}, *options) as (address, _):
        images = [image_of(ask(address, fields)) for fields in jobs]
    assert np.array_equal(images[0], images[5]) and np.array_equal(images[2], images[6])
    assert len({image.tobytes() for image in images}) == 5


# --- Which flavour ----------------------------------------------------------------------------------------------------


def doctor(model: Path, graphs: Path, tmp_path: Path, *options: object) -> str:
    result = run("doctor", "--model", model, "--graphs", graphs, "--dtype", "float32", *options, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_doctor_says_which_flavour_runs(test_models, fused_graphs, tmp_path):
    model = test_models["default"]
    assert "plain UNet" in doctor(model, fused_graphs, tmp_path)
    assert "fused UNet" in doctor(model, fused_graphs, tmp_path, "--fused", "on")


def refusal(model: Path, graphs: Path, tmp_path: Path, code: str, *options: object) -> dict:
    command = ["generate", "--model", model, "--graphs", graphs, "--dtype", "float32", "--fused", "on", "--prompt", "a fox"]
    return error_of(run(*command, *options, cwd=tmp_path), 3, code)


@pytest.fixture
def copied(fused_graphs, tmp_path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(fused_graphs, tmp_path / "graphs"))


def edit_entries(graphs: Path, edit) -> None:
    """Keeps what `edit` makes of each graph's entry."""
    manifest = json.loads((graphs / "manifest.json").read_text())
    manifest["graphs"] = [edited for entry in manifest["graphs"] if (edited := edit(entry))]
    (graphs / "manifest.json").write_text(json.dumps(manifest))


def test_a_set_without_fused_graphs_is_refused_where_they_are_asked_for(test_models, copied, tmp_path):
    model = test_models["default"]
    error = refusal(model, test_models["graphs"], tmp_path, "no_matching_graph")
    assert "unet_fused" in error["message"] and "--fused" in error["remedy"]
    edit_entries(copied, lambda entry: entry if entry["component"] != "unet_control_fused" else None)
    assert "fused UNet" in doctor(model, copied, tmp_path, "--fused", "on")
    net = f"--controlnet=plain={model}-plain"
    assert "unet_control_fused" in refusal(model, copied, tmp_path, "no_matching_graph", net)["message"]


def one_source_twice(sources: dict) -> None:
    sources[f"{ATTENTION}1.to_qkv.weight"] = [f"{ATTENTION}1.to_q.weight"] * 3


def no_such_parameter(sources: dict) -> None:
    sources["elsewhere.weight"] = ["a", "b"]


def shares_that_are_not_equal(sources: dict) -> None:
    del sources[f"{ATTENTION}1.to_qkv.weight"][0]
    sources[f"{ATTENTION}1.to_qkv.weight"] += list("abcde")


@pytest.mark.parametrize("spoil", [one_source_twice, no_such_parameter, shares_that_are_not_equal])
def test_a_manifest_that_fuses_what_is_not_there_is_refused(spoil, test_models, copied, tmp_path):
    def edit(entry: dict) -> dict:
        if "fused" in entry and f"{ATTENTION}1.to_qkv.weight" in entry["fused"]:
            spoil(entry["fused"])
        return entry

    edit_entries(copied, edit)
    assert "fused of" in refusal(test_models["default"], copied, tmp_path, "graphs_invalid")["message"]


def test_weights_that_do_not_fit_are_named_as_in_their_file(test_models, fused_graphs, tmp_path):
    model = copy_of(test_models["default"], tmp_path / "model")
    (path,) = (model / "unet").glob("*.safetensors")
    tensors = load_file(path)
    del tensors[f"{ATTENTION}1.to_k.weight"]
    tensors[f"{ATTENTION}2.to_v.weight"] = torch.ones(16, 32)
    tensors[f"{ATTENTION}2.to_kv.weight"] = torch.ones(64, 32)
    save_file(tensors, path)
    message = whole_text(refusal(model, fused_graphs, tmp_path, "weights_mismatch"))
    assert f"1 missing: {ATTENTION}1.to_k.weight" in message
    assert f"1 unexpected: {ATTENTION}2.to_kv.weight" in message
    assert f"1 mis-shaped: {ATTENTION}2.to_v.weight is [16, 32], the graph wants [32, " in message
