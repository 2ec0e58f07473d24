"""A host whose driver is older than the libtorch: the start says so. The driver is a libcuda with a version alone."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from program import DEMO, GRAPHS, ROOT, SMALL, error_of, pictures, run

SOURCE = ROOT / "tests/ship/old_driver.c"


@pytest.fixture(scope="module")
def build() -> int:
    """CUDA's major release that libtorch is built for."""
    version = (ROOT / ".libtorch/version.py").read_text()
    found = re.search(r"^cuda\b.*'(\d+)\.\d+'", version, re.MULTILINE)
    return int(found[1]) if found else pytest.skip("a libtorch without CUDA")


@pytest.fixture(scope="module")
def old_driver(build, worker, tmp_path_factory) -> dict:
    compiler = shutil.which("cc")
    if not compiler or Path("/proc/driver/nvidia").exists():
        pytest.skip("needs a C compiler, and a machine without a driver of its own")
    folder = tmp_path_factory.mktemp("driver")
    name = "libcuda.so.1"
    options = ["-shared", "-fPIC", f"-DVERSION={build - 1}080", f"-Wl,-soname,{name}", "-o", folder / name]
    subprocess.run([compiler, *options, SOURCE], check=True)
    return {"LD_LIBRARY_PATH": folder, "MODEL_ID": DEMO, "GRAPHS": GRAPHS}


def words(build: int) -> str:
    return rf"driver runs CUDA {build - 1}\.8 and older, and this libtorch was built for CUDA {build}\.\d"


def test_doctor_names_both_releases_and_what_to_do(old_driver, build, tmp_path):
    result = run("doctor", cwd=tmp_path, variables=old_driver | {"DEVICE": ""})
    assert re.search(rf"gpu +FAILED +the NVIDIA {words(build)}", result.stdout)
    assert f"a libtorch for CUDA {build - 1}" in result.stdout


def test_a_gpu_that_is_asked_for_is_an_error_that_says_why(old_driver, build, tmp_path):
    result = run("generate", "--prompt", "x", "--quiet", cwd=tmp_path, variables=old_driver | {"DEVICE": "cuda"})
    # torch's own warning is not ours to keep back
    result.stderr = "\n".join(line for line in result.stderr.splitlines() if not line.startswith("[W"))
    assert re.search(words(build), error_of(result, 3, "device_not_available")["message"])


def test_without_a_wish_the_cpu_works_and_a_warning_says_why(old_driver, build, tmp_path):
    result = run("generate", "--prompt", "x", *SMALL, cwd=tmp_path, variables=old_driver | {"DEVICE": ""})
    assert pictures(result, tmp_path) and re.search(rf"WARN.*{words(build)}", result.stderr)
