"""Graphs hold what their manifest says, and an export that would not is refused."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

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
from graphs import KINDS, Size, TextEncoder, UNet, VaeDecoder

VAE = shaping("AutoencoderKL", tiny_models.VAE)
UNET = shaping("UNet2DConditionModel", tiny_models.UNET)
TEXT = shaping("CLIPTextModel", tiny_models.TEXT)

# Components of a whole pipeline, in both dtypes: a 16-bit set carries the VAE in float32 too.
SET_32 = {"text_encoder", "text_encoder_2", "unet", "vae_decoder", "vae_encoder"}


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
def default_entries(test_models) -> dict[str, manifest.Entry]:
    """The default model's graphs by component."""
    models = configs.read_model(test_models["default"])
    files = {job.file for job in configs.jobs(models, ["float32"])}
    return {entry["component"]: entry for entry in entries(test_models["graphs"]) if entry["file"] in files}


def test_one_manifest_describes_the_graphs_of_both_models(test_models):
    graphs = entries(test_models["graphs"])
    assert sorted(entry["component"] for entry in graphs) == sorted([*SET_32, *SET_32])
    assert {entry["file"] for entry in graphs} == {path.name for path in test_models["graphs"].glob("*.pt")}
    for entry in graphs:
        assert entry["config"].keys() == entry["defaults"].keys()
        assert "sample_size" not in entry["config"] and "scaling_factor" not in entry["config"]


@pytest.mark.parametrize("component", sorted(SET_32))
def test_a_graph_answers_as_its_entry_says_and_carries_the_hubs_names(component, default_entries, test_models):
    entry = default_entries[component]
    graph = torch.jit.load(test_models["graphs"] / entry["file"])
    parameters = dict(graph.named_parameters())
    assert {name: list(value.shape) for name, value in parameters.items()} == entry["parameters"]

    values = weights(test_models["default"] / ("vae" if component.startswith("vae") else component))
    assert parameters.keys() <= values.keys()
    tracing.fill(graph, values)
    size = Size(3, 5, 6)
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


def test_the_graphs_of_a_model_cover_every_tensor_of_its_files(default_entries, test_models):
    for component in ("text_encoder", "text_encoder_2", "unet"):
        assert default_entries[component]["parameters"].keys() == weights(test_models["default"] / component).keys()
    halves = [default_entries[half]["parameters"].keys() for half in ("vae_decoder", "vae_encoder")]
    assert halves[0] | halves[1] == weights(test_models["default"] / "vae").keys()


def test_a_sixteen_bit_set_takes_timesteps_in_float32_and_brings_the_vae_in_float32(test_models, tmp_path):
    arguments = ["--model", str(test_models["default"] / "vae"), "--model", str(test_models["default"] / "unet")]
    assert export.main([*arguments, "--dtype", "float16", "--out", str(tmp_path)]) == 0
    made = {(entry["component"], entry["dtype"]): entry for entry in entries(tmp_path)}
    halves = {(half, dtype) for half in ("vae_decoder", "vae_encoder") for dtype in ("float16", "float32")}
    assert made.keys() == {("unet", "float16")} | halves
    dtypes = {port["name"]: port["dtype"] for port in made["unet", "float16"]["inputs"]}
    assert dtypes.pop("timestep") == "float32" and set(dtypes.values()) == {"float16"}


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
    # What an older diffusers left out of the file, or wrote as null, means the default.
    assert UNET["upcast_attention"] is False and UNET["conv_in_kernel"] == 3


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


@pytest.mark.parametrize(
    ("kind", "config", "fault"),
    [
        (AlmostRight, VAE, "differs from eager"),
        (OneBatchOnly, VAE, "cannot run at this size"),
        (StuckTimestep, UNET, "differs from eager"),
        (NoPool, TEXT, "outputs, eager has"),
        (LastToken, TEXT, "differs from eager"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_graph_that_differs_from_the_eager_module_is_refused(kind, config, fault):
    with pytest.raises(ExportError, match=fault):
        checks.equals_eager(kind, config, "float32")


def test_a_graph_that_carries_weights_is_refused():
    traced = tracing.trace(VaeDecoder, VAE, "float32")
    checks.weightless(tracing.packed(traced))
    tracing.fill(traced, dict(VaeDecoder.eager(VAE).named_parameters()))
    with pytest.raises(ExportError, match="stores .* elements"):
        checks.weightless(tracing.packed(traced))


def test_a_default_that_is_not_the_librarys_is_refused(monkeypatch):
    checks.defaults(UNet)
    monkeypatch.setitem(configs.SHAPE_KEYS["UNet2DConditionModel"], "conv_in_kernel", 5)
    with pytest.raises(ExportError, match="conv_in_kernel"):
        checks.defaults(UNet)


def test_a_unet_of_another_kind_is_refused(tmp_path, capsys):
    tiny_models.write_json(tmp_path / "unet" / "config.json", tiny_models.UNET | {"addition_embed_type": "text"})
    assert export.main(["--model", str(tmp_path / "unet"), "--out", str(tmp_path / "graphs")]) == 1
    assert "addition_embed_type" in capsys.readouterr().err
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


# --- The default model ---


def test_the_tiny_model_is_the_same_bytes_every_time(test_models, tmp_path):
    tiny_models.write_model(tmp_path / "again", tiny_models.VARIANTS["default"])
    files = sorted(path.relative_to(tmp_path / "again") for path in (tmp_path / "again").rglob("*") if path.is_file())
    for file in files:
        assert (tmp_path / "again" / file).read_bytes() == (test_models["default"] / file).read_bytes(), file
    assert sum((tmp_path / "again" / file).stat().st_size for file in files) < 8_000_000


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
    subprocess.run(command, check=True)
    made = [entry for entry in entries(tmp_path) if entry["dtype"] == dtype]
    assert {entry["component"] for entry in made} == SET_32
    counts = {entry["component"]: len(entry["parameters"]) for entry in made}
    assert (counts["unet"], counts["text_encoder"], counts["text_encoder_2"]) == (1680, 196, 517)
    assert counts["vae_decoder"] + counts["vae_encoder"] == 248
    assert sum((tmp_path / entry["file"]).stat().st_size for entry in made) < 15_000_000
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    assert peak < 3_000_000_000
