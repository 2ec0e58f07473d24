"""Compiled graphs stand in for TorchScript where they fit: the same pictures, with any weights; else nothing changes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image
from safetensors.torch import load_file

from program import ROOT, TEST_MODELS, python, write_safetensors
from support import BASE, MUST_MOVE, SIDE, TOLERANCE, relative
from test_lora_jobs import lora


@pytest.fixture(scope="session")
def packages(test_models) -> Path:
    """Graphs of the default model, and packages for one picture of its size with guidance."""
    folder = TEST_MODELS / "packages"
    folder.mkdir(exist_ok=True)
    with FileLock(TEST_MODELS / "packages.lock"):
        size = ("--aot", f"{SIDE}x{SIDE}", "--aot-device", "cpu")
        python(ROOT / "torchscript" / "export.py", "--model", test_models["default"], "--out", folder, *size)
    return folder


@pytest.fixture
def copied(packages, tmp_path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(packages, tmp_path / "graphs"))


def generate(worker: Path, model: Path, graphs: Path, scratch: Path, *options, threads=1, **request):
    """Latents, picture and log."""
    scratch.mkdir(parents=True, exist_ok=True)
    (scratch / "request.json").write_text(json.dumps(BASE | request))
    command = [worker, "generate", "--model", model, "--graphs", graphs, "--device", "cpu", "--dtype", "float32"]
    command += ["--threads", threads, "--log-level", "info", "--input", scratch / "request.json", *options]
    command += ["--output", scratch / "out", "--save-latents", scratch / "latents.safetensors"]
    temporary = scratch / "temporary"
    temporary.mkdir(exist_ok=True)
    environment = os.environ | {"TMPDIR": str(temporary)}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert not any(temporary.iterdir()), "what was unpacked is still there"
    picture = np.array(Image.open(done.stdout.split()[0])).astype(int)
    return load_file(scratch / "latents.safetensors")["latents"], picture, done.stderr


def both(worker, model, graphs, scratch, *options, **request):
    """The same with packages and without."""
    with_packages = generate(worker, model, graphs, scratch / "auto", *options, **request)
    return with_packages, generate(worker, model, graphs, scratch / "off", "--aot", "off", *options, **request)


def agree(with_packages, without) -> None:
    """They are equal up to rounding, and not to the bit: then no package ran."""
    (ours, picture, _), (theirs, expected, log) = with_packages, without
    assert "compiled graph" not in log
    assert 0 < relative(ours, theirs) <= TOLERANCE
    assert np.abs(picture - expected).max() <= 1


def test_a_package_gives_the_graphs_picture(worker, test_models, packages, tmp_path):
    with_packages, without = both(worker, test_models["default"], packages, tmp_path)
    agree(with_packages, without)
    assert with_packages[2].count("compiled graph loaded") == 2  # UNet and VAE decoder


def test_threads_are_those_of_the_run(worker, test_models, packages, tmp_path):
    two = generate(worker, test_models["default"], packages, tmp_path / "two", threads=2)
    one = generate(worker, test_models["default"], packages, tmp_path / "one")
    assert relative(two[0], one[0]) <= TOLERANCE


@pytest.mark.parametrize(
    "request_", [{"width": 64, "height": 128}, {"guidance_scale": 1.0}, {"num_images": 2}], ids=lambda value: str(value)
)
def test_other_shapes_run_the_graph(request_, worker, test_models, packages, tmp_path):
    (ours, _, log), (theirs, _, _) = both(worker, test_models["default"], packages, tmp_path, **request_)
    assert "compiled graph loaded" in log
    assert torch.equal(ours, theirs)


def test_a_lora_acts_on_a_package(worker, test_models, packages, tmp_path):
    lora(tmp_path, "ink", seed=1)
    options = ("--lora-dir", tmp_path)
    plain = generate(worker, test_models["default"], packages, tmp_path / "plain")
    with_lora = {"loras": [{"name": "ink", "scale": 1.0}]}
    changed = both(worker, test_models["default"], packages, tmp_path, *options, **with_lora)
    agree(*changed)
    assert relative(changed[0][0], plain[0]) > MUST_MOVE


def test_a_package_computes_with_the_rows_of_fused_weights(worker, test_models, fused_graphs, copied, tmp_path):
    """They are those of the graph, as a LoRA shows."""
    manifest, fused = (json.loads((graphs / "manifest.json").read_text()) for graphs in (copied, fused_graphs))
    own = {entry["file"] for entry in manifest["graphs"]}
    manifest["graphs"] += [entry for entry in fused["graphs"] if entry["file"] not in own]
    shutil.copytree(fused_graphs, copied, dirs_exist_ok=True)
    (copied / "manifest.json").write_text(json.dumps(manifest))
    lora(tmp_path, "ink", seed=1)
    options = ("--lora-dir", tmp_path, "--fused", "on")
    plain = both(worker, test_models["default"], copied, tmp_path / "plain", *options)
    agree(*plain)
    assert plain[0][2].count("compiled graph loaded") == 2
    changed = both(worker, test_models["default"], copied, tmp_path / "ink", *options, loras=[{"name": "ink"}])
    agree(*changed)
    assert relative(changed[0][0], plain[0][0]) > MUST_MOVE


def other_checkpoint(model: Path, folder: Path) -> Path:
    """The same architecture with other weights, all of them, in a file whose tensors lie at odd multiples of 4 bytes."""
    copy = Path(shutil.copytree(model, folder / "other"))
    (path,) = (copy / "unet").glob("*.safetensors")
    header, data = {}, b""
    rng = np.random.default_rng(3)
    for name, tensor in load_file(path).items():
        values = tensor.numpy() + rng.standard_normal(tensor.shape).astype("<f4") * 0.05
        offsets = [len(data), len(data) + values.nbytes]
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": offsets}
        data += values.tobytes()
    write_safetensors(path, header, data, padding=(4 - len(json.dumps(header))) % 8)
    return copy


def test_another_checkpoint_gives_its_own_picture(worker, test_models, packages, tmp_path):
    other = other_checkpoint(test_models["default"], tmp_path)
    first = generate(worker, test_models["default"], packages, tmp_path / "first")
    second = both(worker, other, packages, tmp_path)
    agree(*second)
    assert relative(second[0][0], first[0]) > MUST_MOVE


def test_weights_that_leave_the_device_have_no_packages(worker, test_models, packages, tmp_path):
    offload = ("--offload", "all")
    (ours, picture, log), (theirs, expected, _) = both(worker, test_models["default"], packages, tmp_path, *offload)
    assert "compiled graph" not in log
    assert torch.equal(ours, theirs) and np.array_equal(picture, expected)


def entry_of(graphs: Path, component: str):
    """The manifest, and its entry of the component's package."""
    manifest = json.loads((graphs / "manifest.json").read_text())
    (entry,) = [entry for entry in manifest["packages"] if entry["component"] == component]
    return manifest, entry


def cut_short(graphs: Path) -> None:
    path = graphs / entry_of(graphs, "unet")[1]["file"]
    path.write_bytes(path.read_bytes()[:-1000])


def one_bit(graphs: Path) -> None:
    path = graphs / entry_of(graphs, "unet")[1]["file"]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def gone(graphs: Path) -> None:
    (graphs / entry_of(graphs, "unet")[1]["file"]).unlink()


def no_package(graphs: Path) -> None:
    """A file that is what the manifest says, and no package."""
    manifest, entry = entry_of(graphs, "unet")
    (graphs / entry["file"]).write_bytes(b"PK" + bytes(5000))
    entry["sha256"] = hashlib.sha256((graphs / entry["file"]).read_bytes()).hexdigest()
    (graphs / "manifest.json").write_text(json.dumps(manifest))


def of_another_graph(graphs: Path) -> None:
    """A whole package that computes with tensors the UNet has not."""
    manifest, entry = entry_of(graphs, "unet")
    decoder = entry_of(graphs, "vae_decoder")[1]
    entry |= {"file": decoder["file"], "sha256": decoder["sha256"]}
    (graphs / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("spoil", [cut_short, one_bit, gone, no_package, of_another_graph])
def test_a_package_that_cannot_be_loaded_is_one_warning(spoil, worker, test_models, copied, tmp_path):
    spoil(copied)
    (ours, _, log), (theirs, _, _) = both(worker, test_models["default"], copied, tmp_path)
    assert torch.equal(ours, theirs)
    assert log.count("compiled graph left out") == 1
    assert log.count("compiled graph loaded") == 1  # the VAE decoder's


@pytest.mark.parametrize(
    "change", [{"device": "cuda sm_90"}, {"cpu_flags": ["avx9000"]}, {"torch": "2.10.0"}, {"dtype": "bfloat16"}], ids=str
)
def test_a_package_for_another_machine_is_passed_over(change, worker, test_models, copied, tmp_path):
    manifest, entry = entry_of(copied, "unet")
    entry |= change
    (copied / "manifest.json").write_text(json.dumps(manifest))
    (ours, _, log), (theirs, _, _) = both(worker, test_models["default"], copied, tmp_path)
    assert torch.equal(ours, theirs)
    assert "left out" not in log and log.count("compiled graph loaded") == 1
