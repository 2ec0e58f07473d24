"""Graphs hold what their manifest says, and an export that would not is refused."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

import checks
import configs
import export
import manifest
import tiny_models
import tracing
from configs import ExportError, shaping
from graphs import (
    KINDS,
    ControlNet,
    ControlNetEmbed,
    ControlNetUnion,
    Size,
    TextEncoder,
    TextEncoderMasked,
    UNet,
    UNetControl,
    VaeDecoder,
    scaled,
)

VAE = shaping("AutoencoderKL", tiny_models.VAE)
UNET = shaping("UNet2DConditionModel", tiny_models.UNET)
TEXT = shaping("CLIPTextModel", tiny_models.TEXT)
NET = shaping("ControlNetModel", tiny_models.controlnet_config("small", tiny_models.UNET))
UNION = shaping("ControlNetUnionModel", tiny_models.controlnet_config("union", tiny_models.UNET))

# Components of a whole pipeline, in both dtypes: a 16-bit set carries the VAE in float32 too.
TEXT_GRAPHS = {"text_encoder", "text_encoder_2", "text_encoder_masked", "text_encoder_2_masked"}
SET_32 = TEXT_GRAPHS | {"unet", "unet_control", "vae_decoder", "vae_encoder"}

# Where the weights of a component are that is not named as its folder.
FOLDERS = {
    "text_encoder_masked": "text_encoder",
    "text_encoder_2_masked": "text_encoder_2",
    "unet_control": "unet",
    "vae_decoder": "vae",
    "vae_encoder": "vae",
}

# Models and nets whose graphs are run with their weights.
RUN = {
    "default": SET_32,
    "inpaint": {"unet", "unet_control"},
    "default-plain": {"controlnet_embed", "controlnet"},
    "second-small": {"controlnet_embed", "controlnet"},
    "second-union8": {"controlnet_union_embed", "controlnet_union"},
}


def entries(folder: Path) -> list[manifest.Entry]:
    return json.loads((folder / "manifest.json").read_text())["graphs"]


def weights(component: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a component's files, whole or sharded."""
    tensors = {}
    for path in component.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}
    return tensors


@pytest.fixture(scope="module")
def made(test_models) -> dict[str, dict[str, manifest.Entry]]:
    """What the manifest says of each model and net, by component."""
    by_file = {entry["file"]: entry for entry in entries(test_models["graphs"])}
    return {
        name: {job.component: by_file[job.file] for job in configs.jobs(configs.read_model(folder), ["float32"])}
        for name, folder in {name: test_models["default"].parent / name for name in RUN}.items()
    }


def test_one_manifest_describes_the_graphs_of_all_models(made, test_models):
    assert all(RUN[name] <= components.keys() for name, components in made.items())
    graphs = entries(test_models["graphs"])
    assert {entry["file"] for entry in graphs} == {path.name for path in test_models["graphs"].glob("*.pt")}
    for entry in graphs:
        assert entry["config"].keys() == entry["defaults"].keys()
        assert "sample_size" not in entry["config"] and "scaling_factor" not in entry["config"]


@pytest.mark.parametrize(("model", "component"), [(model, part) for model in RUN for part in sorted(RUN[model])])
def test_a_graph_answers_as_its_entry_says_and_carries_the_hubs_names(model, component, made, test_models):
    entry = made[model][component]
    graph = torch.jit.load(test_models["graphs"] / entry["file"])
    parameters = dict(graph.named_parameters())
    assert {name: list(value.shape) for name, value in parameters.items()} == entry["parameters"]

    folder = test_models["default"].parent / model
    values = weights(folder if component.startswith("controlnet") else folder / FOLDERS.get(component, component))
    assert parameters.keys() <= values.keys()
    tracing.fill(KINDS[component], graph, values)
    size = Size(3, 5, 6, conditions=4)
    inputs = []
    for port in entry["inputs"]:
        shape = [size.of(dimension) for dimension in port["shape"]]
        inputs.append(torch.ones(shape, dtype=getattr(torch, port["dtype"])))
    with torch.no_grad():
        outputs = graph(*inputs)
    assert len(outputs) == len(entry["outputs"])
    for output, port in zip(outputs, entry["outputs"]):
        assert list(output.shape) == [size.of(dimension) for dimension in port["shape"]], port
        assert output.dtype == getattr(torch, port["dtype"])
        assert output.isfinite().all()


def test_the_graphs_of_a_model_cover_every_tensor_of_its_files(made, test_models):
    for component in sorted(TEXT_GRAPHS | {"unet", "unet_control"}):
        folder = test_models["default"] / FOLDERS.get(component, component)
        assert made["default"][component]["parameters"].keys() == weights(folder).keys()
    vae = test_models["default"] / "vae"
    nets = {name: test_models["default"].parent / name for name in RUN if "-" in name}
    for folder, graphs in [(vae, made["default"])] + [(nets[name], made[name]) for name in nets]:
        halves = [graphs[half]["parameters"].keys() for half in graphs if half.startswith(("vae", "controlnet"))]
        assert len(halves) == 2 and not halves[0] & halves[1]
        assert halves[0] | halves[1] == weights(folder).keys()


def test_residuals_of_a_net_are_the_further_inputs_of_its_unet(made):
    control = made["default"]["unet_control"]["inputs"]
    assert control[:5] == made["default"]["unet"]["inputs"]
    assert control[5:] == made["default-plain"]["controlnet"]["outputs"]
    shapes = {port["name"]: port["shape"] for port in control}
    assert shapes["down_0"] == ["B", 16, "h", "w"]
    assert shapes["down_3"] == ["B", 16, "h/2", "w/2"]
    assert shapes["mid"] == ["B", 48, "h/4", "w/4"]
    assert [Size(1, 9, 8).of(dimension) for dimension in ("8h", "h/2", "h/4", "w/4")] == [72, 5, 3, 2]
    assert made["inpaint"]["unet"]["inputs"][0]["shape"] == ["B", 9, "h", "w"]


def test_a_sixteen_bit_set_takes_timesteps_in_float32_and_brings_the_vae_in_float32(test_models, tmp_path):
    folders = [test_models["default"] / "vae", test_models["default"].parent / "second-union8"]
    arguments = [argument for folder in folders for argument in ("--model", str(folder))]
    assert export.main([*arguments, "--dtype", "float16", "--out", str(tmp_path)]) == 0
    made = {(entry["component"], entry["dtype"]): entry for entry in entries(tmp_path)}
    halves = {(half, dtype) for half in ("vae_decoder", "vae_encoder") for dtype in ("float16", "float32")}
    assert made.keys() == {("controlnet_union", "float16"), ("controlnet_union_embed", "float16")} | halves
    dtypes = {port["name"]: port["dtype"] for port in made["controlnet_union", "float16"]["inputs"]}
    assert dtypes.pop("timestep") == dtypes.pop("scales") == "float32" and dtypes.pop("task_ids") == "int64"
    assert set(dtypes.values()) == {"float16"}


def test_a_second_export_keeps_what_is_there_without_loading_torch(test_models):
    graphs = test_models["graphs"]
    before = {path: path.stat().st_mtime_ns for path in graphs.iterdir()}
    arguments = ["--model", str(test_models["default"]), "--out", str(graphs)]
    code = f"import sys, export; assert export.main({arguments}) == 0; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=Path(export.__file__).parent, check=True)
    assert {path: path.stat().st_mtime_ns for path in graphs.iterdir()} == before


def test_what_is_missing_or_of_another_export_is_made_again(test_models, tmp_path, monkeypatch):
    arguments = ["--model", str(test_models["default"] / "vae"), "--out", str(tmp_path)]
    assert export.main(arguments) == 0
    job = configs.jobs(configs.read_model(test_models["default"] / "vae"), ["float32"])[0]
    assert manifest.is_current(tmp_path, entries(tmp_path), job)

    (tmp_path / job.file).unlink()
    assert not manifest.is_current(tmp_path, entries(tmp_path), job)
    assert export.main(arguments) == 0
    assert (tmp_path / job.file).is_file() and len(entries(tmp_path)) == 2

    monkeypatch.setattr(manifest, "source_hash", lambda: "other")
    assert not manifest.is_current(tmp_path, entries(tmp_path), job)


def test_models_that_differ_only_in_data_share_their_graphs():
    plain = shaping("AutoencoderKL", tiny_models.VAE)
    assert plain == shaping("AutoencoderKL", tiny_models.VAE | {"scaling_factor": 1.0, "force_upcast": False})
    assert plain != shaping("AutoencoderKL", tiny_models.VAE | {"layers_per_block": 2})
    union = shaping("ControlNetUnionModel", tiny_models.controlnet_config("union8", tiny_models.UNET))
    assert union == UNION | {"num_control_type": 8}
    # What an older diffusers left out of the file, or wrote as null, means the default.
    assert UNET["upcast_attention"] is False and UNET["conv_in_kernel"] == 3


@pytest.mark.parametrize(
    ("config", "tensor", "component"),
    [
        ({}, "conv_in.weight", "controlnet"),
        ({"num_control_type": 8}, None, "controlnet_union"),
        ({}, "task_embedding", "controlnet_union"),
        ({"_class_name": "ControlNetUnionModel"}, None, "controlnet_union"),
    ],
)
def test_a_union_net_is_known_even_where_its_class_is_not(config, tensor, component, tmp_path):
    tiny_models.write_json(tmp_path / "config.json", {"_class_name": "ControlNetModel"} | config)
    if tensor:
        tiny_models.write_weights(tmp_path / "net.safetensors", {tensor: np.zeros(1, dtype=np.float32)})
    assert component in configs.COMPONENTS[configs.read_model(tmp_path)[0][0]]


class Scales(VaeDecoder):
    def forward(self, latents):
        return (super().forward(latents)[0] / 1.0 * 1 * 2.0,)


def test_products_with_one_are_left_out_and_others_are_not():
    graph = tracing.trace(Scales, VAE, "float32").inlined_graph
    products = [node for node in tracing.all_nodes(graph) if node.kind() in ("aten::mul", "aten::div")]
    numbers = [list(node.inputs())[1].toIValue() for node in products]  # None is a tensor
    assert [number for number in numbers if number is not None] == [2.0]

    class Counts(torch.nn.Module):
        def forward(self, counts):
            return counts / 1

    graph = torch.jit.trace(Counts(), torch.ones(2, dtype=torch.int64)).graph
    tracing.drop_no_ops(graph)
    assert "aten::div" in str(graph)  # what it makes of integers is a floating tensor


def test_what_does_nothing_is_in_no_graph(test_models):
    for path in sorted(test_models["graphs"].glob("*.pt")):
        with zipfile.ZipFile(path) as archive:
            assert not [name for name in archive.namelist() if name.endswith(".debug_pkl")], path.name
        graph = torch.jit.load(path).inlined_graph
        for node in tracing.all_nodes(graph):
            assert node.kind() not in ("aten::dropout", "aten::feature_dropout"), path.name
            if node.kind() in ("aten::mul", "aten::div"):
                number = list(node.inputs())[1].toIValue()
                assert not (isinstance(number, float) and number == 1.0), f"{path.name}: {node}"
        # float32 is all there is in these, but for what makes an index of tokens; a scripted loop is not traced
        if not path.name.startswith("text_encoder"):
            assert "aten::to" not in [node.kind() for node in graph.nodes()], path.name



class Casts(torch.nn.Module):
    def forward(self, value):
        value = value.to(torch.bfloat16).to(dtype=torch.bfloat16).type(torch.bfloat16).float().float()
        value = torch.nn.functional.dropout(value, 0.5, False)
        return torch.nn.functional.dropout(value, 0.5, True).to(value.device, copy=True)


def test_what_does_something_is_traced():
    with tracing.LeaveOutNoOps():
        graph = torch.jit.trace(Casts(), torch.ones(2), check_trace=False).graph
    kinds = [node.kind() for node in graph.nodes()]
    assert kinds.count("aten::to") == 3  # two casts and a copy
    assert kinds.count("aten::dropout") == 1


def test_a_package_is_made_once_for_each_size():
    graphs = configs.jobs([("UNet2DConditionModel", tiny_models.UNET), ("AutoencoderKL", tiny_models.VAE)], ["float32"])
    sizes = [export.size("64x128"), export.size("64x128x4"), export.size("64x128x2")]
    made = configs.package_jobs(graphs, sizes, "cuda sm_90")
    assert [(job.graph.component, job.height, job.width, job.batch) for job in made] == [
        ("unet", 64, 128, 2),
        ("unet", 64, 128, 4),
        ("vae_decoder", 64, 128, 1),
    ]
    assert all(job.file.endswith(f"-64x128x{job.batch}-sm_90.pt2") for job in made)
    for wrong in ("64", "64x", "60x64", "0x64", "64x64x0", "64x64x2x2"):
        with pytest.raises(argparse.ArgumentTypeError):
            export.size(wrong)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_product_with_a_scale_is_that_with_a_number(dtype):
    tensor = torch.randn(1000).to(getattr(torch, dtype))
    for scale in (0.7, 1.0, 1.3333333):
        assert torch.equal(scaled(tensor, torch.tensor([scale])[0]), tensor * scale)


# --- Exports that must fail ---


class MakesAnIndex(VaeDecoder):
    def forward(self, latents):
        return (super().forward(latents)[0] + torch.arange(1, device=latents.device),)


class MovesToADevice(VaeDecoder):
    def forward(self, latents):
        return (super().forward(latents)[0].to(torch.device("cpu"), torch.float32),)


class HoldsATensor(VaeDecoder):
    def forward(self, latents):
        return (super().forward(latents)[0] * torch.tensor([1.0, 1.0, 1.0])[:, None, None],)


@pytest.mark.parametrize("kind", [MakesAnIndex, MovesToADevice, HoldsATensor])
def test_a_graph_that_knows_a_device_is_refused(kind):
    checks.no_device(tracing.trace(VaeDecoder, VAE, "float32"))
    with pytest.raises(ExportError, match="device|tensor constant"):
        checks.no_device(tracing.trace(kind, VAE, "float32"))


class AlmostRight(VaeDecoder):
    def forward(self, latents):
        return (super().forward(latents)[0] * 1.000001,)


class OneBatchOnly(VaeDecoder):
    def forward(self, latents):
        # A Python number in a trace is the number that it was while tracing.
        rows = [super(OneBatchOnly, self).forward(latents[index : index + 1])[0] for index in range(latents.shape[0])]
        return (torch.cat(rows),)


class StuckTimestep(UNet):
    def forward(self, sample, timestep, encoder_hidden_states, text_embeds, time_ids):
        return super().forward(sample, timestep * 0 + 7.0, encoder_hidden_states, text_embeds, time_ids)


class NoPool(TextEncoder):
    def forward(self, input_ids):
        return super().forward(input_ids)[:-1]


class LastToken(TextEncoder):
    def project(self, pooled):
        return pooled + 0.001


class NoMask(TextEncoderMasked):
    def forward(self, input_ids, attention_mask):
        return super().forward(input_ids, attention_mask * 0)


class NoMid(UNetControl):
    def forward(self, *inputs):
        return super().forward(*inputs[:-1], inputs[-1] * 0)


class NoImage(ControlNet):
    def forward(self, *inputs):
        return super().forward(*inputs[:-1], inputs[-1] * 0)


class SwappedColours(ControlNetEmbed):
    def forward(self, image):
        return super().forward(image.flip(1))


class OneTask(ControlNetUnion):
    def fuse(self, sample, conditions, task_ids, scales):
        return super().fuse(sample, conditions, task_ids * 0, scales)


class TwoConditions(ControlNetUnion):
    def fuse(self, sample, conditions, task_ids, scales):
        return super().fuse(sample, conditions[:2], task_ids[:2], scales[:2])


class LastConditionFirst(ControlNetUnion):
    def fuse(self, sample, conditions, task_ids, scales):
        return super().fuse(sample, conditions.flip(0), task_ids.flip(0), scales.flip(0))


@pytest.mark.parametrize(
    ("kind", "config", "fault"),
    [
        (AlmostRight, VAE, "differs from eager"),
        (OneBatchOnly, VAE, "cannot run at this size"),
        (StuckTimestep, UNET, "differs from eager"),
        (NoPool, TEXT, "outputs, eager has"),
        (LastToken, TEXT, "differs from eager"),
        (NoMask, TEXT, "differs from eager"),
        (NoMid, UNET, "differs from eager"),
        (NoImage, NET, "differs from eager"),
        (SwappedColours, NET, "differs from eager"),
        (OneTask, UNION, "differs from eager"),
        (TwoConditions, UNION, "conditions=3.*differs from eager"),
        (LastConditionFirst, UNION, "differs from eager"),  # sums of another order round otherwise
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_graph_that_differs_from_the_eager_module_is_refused(kind, config, fault):
    with pytest.raises(ExportError, match=fault):
        checks.equals_eager(kind, config, "float32")


def test_a_graph_that_carries_weights_is_refused():
    traced = tracing.trace(VaeDecoder, VAE, "float32")
    checks.weightless(tracing.packed(traced))
    tracing.fill(VaeDecoder, traced, dict(VaeDecoder.eager(VAE).named_parameters()))
    with pytest.raises(ExportError, match="stores .* elements"):
        checks.weightless(tracing.packed(traced))


def test_a_default_that_is_not_the_librarys_is_refused(monkeypatch):
    checks.defaults(UNet)
    monkeypatch.setitem(configs.SHAPE_KEYS["UNet2DConditionModel"], "conv_in_kernel", 5)
    with pytest.raises(ExportError, match="conv_in_kernel"):
        checks.defaults(UNet)


@pytest.mark.parametrize(
    ("config", "change"),
    [
        (tiny_models.UNET, {"addition_embed_type": "text"}),
        (tiny_models.controlnet_config("plain", tiny_models.UNET), {"num_class_embeds": 4}),
        (tiny_models.controlnet_config("union", tiny_models.UNET), {"controlnet_conditioning_channel_order": "bgr"}),
    ],
    ids=lambda value: value.get("_class_name", ""),
)
def test_a_denoiser_of_another_kind_is_refused(config, change, tmp_path, capsys):
    tiny_models.write_json(tmp_path / "net" / "config.json", config | change)
    assert export.main(["--model", str(tmp_path / "net"), "--out", str(tmp_path / "graphs")]) == 1
    assert next(iter(change)) in capsys.readouterr().err
    assert not list((tmp_path / "graphs").iterdir())


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "not a diffusers folder"), ("{", "cannot be read as JSON"), ('{"_class_name": "Other"}', "'Other'")],
)
def test_a_folder_that_is_no_model_is_an_error_in_words(content, words, tmp_path, capsys):
    if content:
        (tmp_path / "config.json").write_text(content)
    assert export.main(["--model", str(tmp_path), "--out", str(tmp_path / "graphs")]) == 1
    assert words in capsys.readouterr().err


# --- Switches that the tiny nets leave alone ---


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (ControlNet, NET | {"mid_block_type": "UNetMidBlock2D", "global_pool_conditions": True}),
        (ControlNet, NET | {"down_block_types": ["DownBlock2D"] * 3, "transformer_layers_per_block": [0, 0, 0]}),
        (ControlNet, NET | {"controlnet_conditioning_channel_order": "bgr"}),
        (ControlNetEmbed, NET | {"controlnet_conditioning_channel_order": "bgr"}),
    ],
)
def test_a_net_equals_the_librarys(kind, config):
    checks.equals_eager(kind, config, "float32")


@pytest.mark.parametrize("trans_layers", [1, 2])
def test_a_union_net_equals_the_librarys_in_bfloat16(trans_layers):
    checks.equals_eager(ControlNetUnion, UNION | {"num_trans_layer": trans_layers}, "bfloat16")


# --- The models of random weights ---


def test_the_tiny_model_is_the_same_bytes_every_time(test_models, tmp_path):
    tiny_models.write_model(tmp_path / "again", tiny_models.VARIANTS["default"])
    files = sorted(path.relative_to(tmp_path / "again") for path in (tmp_path / "again").rglob("*") if path.is_file())
    for file in files:
        assert (tmp_path / "again" / file).read_bytes() == (test_models["default"] / file).read_bytes(), file
    assert sum((tmp_path / "again" / file).stat().st_size for file in files) < 8_000_000


@pytest.mark.parametrize("net", tiny_models.CONTROLNETS)
def test_a_tiny_net_is_the_same_bytes_every_time_and_no_part_of_it_is_silent(net, test_models, tmp_path):
    tiny_models.write_controlnet(tmp_path / "again", net, tiny_models.VARIANTS["second"])
    there = test_models["default"].parent / f"second-{net}"
    for file in ("config.json", "diffusion_pytorch_model.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (there / file).read_bytes(), file
    assert all(tensor.any() for tensor in weights(tmp_path / "again").values())


def test_the_small_vocabulary_tokenizes_as_clip_does(test_models):
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(test_models["default"] / "tokenizer")
    second = CLIPTokenizer.from_pretrained(test_models["default"] / "tokenizer_2")
    start, end = len(tokenizer) - 2, len(tokenizer) - 1
    assert tokenizer("").input_ids == [start, end]
    assert tokenizer.decode(tokenizer("A Photo, of Ünïcode 😀!").input_ids[1:-1]).strip() == "a photo , of ünïcode 😀!"
    padded = {"padding": "max_length", "max_length": 77, "truncation": True}
    assert tokenizer("x", **padded).input_ids[-1] == end
    assert second("x", **padded).input_ids[-1] == 0 == second.convert_tokens_to_ids("!")


# --- Full size ---


@pytest.mark.full
@pytest.mark.parametrize("dtype", export.DTYPES)
def test_the_whole_of_sdxl_is_exported(dtype, tmp_path):
    command = [sys.executable, export.__file__, "--arch", "sdxl", "--dtype", dtype, "--out", str(tmp_path)]
    _, status, usage = os.wait4(subprocess.Popen(command).pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    made = [entry for entry in entries(tmp_path) if entry["dtype"] == dtype]
    fused = set() if dtype == "float32" else {"unet_fused", "unet_control_fused"}
    assert {entry["component"] for entry in made} == SET_32 | fused
    counts = {entry["component"]: len(entry["parameters"]) for entry in made}
    assert (counts["unet"], counts["text_encoder"], counts["text_encoder_2"]) == (1680, 196, 517)
    assert counts["vae_decoder"] + counts["vae_encoder"] == 248
    assert sum((tmp_path / entry["file"]).stat().st_size for entry in made) < (20_000_000 if fused else 15_000_000)
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    assert peak < 3_000_000_000


@pytest.mark.full
@pytest.mark.parametrize(
    ("arch", "tensors"),
    [
        ("controlnet", 844),
        ("controlnet_mid", 224),
        ("controlnet_small", 140),
        ("controlnet_union", 863),
        ("controlnet_union_promax", 863),
        ("unet_inpaint", 1680),
        ("unet_lcm", 1681),
        ("sdxl_refiner", 1220 + 517 + 248),
    ],
)
def test_every_architecture_is_exported(arch, tensors, tmp_path):
    command = [sys.executable, export.__file__, "--arch", arch, "--dtype", "float16", "--out", str(tmp_path)]
    subprocess.run(command, check=True)
    plain = [entry["parameters"] for entry in entries(tmp_path) if "fused" not in entry]
    assert len(set().union(*plain)) == tensors
