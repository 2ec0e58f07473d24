"""Options and the built things that all Python tests share. Run from the project's root, after `make build`."""

import os
import shutil
import sys
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:
    # before torch is there: tests run side by side, so that more threads would only wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from filelock import FileLock

from program import PROGRAM, ROOT, TEST_MODELS, python

sys.path.insert(0, str(ROOT / "torchscript"))


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="all combinations and full-size models: long")


def pytest_configure(config):
    config.addinivalue_line("markers", "full: runs only with --full")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--full"):
        for item in items:
            if "full" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs --full"))


@pytest.fixture(scope="session")
def is_full(pytestconfig) -> bool:
    return pytestconfig.getoption("--full")


@pytest.fixture(scope="session")
def worker() -> Path:
    assert PROGRAM.exists(), "build first: cargo build --release"
    return PROGRAM


NETS = ("plain", "small", "union", "union8")


@pytest.fixture(scope="session")
def test_models() -> dict[str, Path]:
    """Two random tiny models that differ in every way a configuration can, one for inpainting, a refiner, one that takes
    its guidance, the ControlNets of each beside it (`default-plain`, ...), and `graphs` for all of them in float32."""
    TEST_MODELS.mkdir(parents=True, exist_ok=True)
    with FileLock(TEST_MODELS / "lock"):  # of several test processes one makes them
        return make_test_models()


def make_test_models() -> dict[str, Path]:
    variants = ("default", "second", "inpaint", "refiner", "lcm")
    models = {name: TEST_MODELS / name for name in variants}
    script = ROOT / "torchscript" / "tiny_models.py"
    wanted = {folder: ("--variant", name) for name, folder in models.items()}
    nets = {"default": NETS, "second": NETS, "inpaint": ("plain",)}
    for variant, names in nets.items():
        wanted |= {TEST_MODELS / f"{variant}-{net}": ("--variant", variant, "--controlnet", net) for net in names}
    for folder, options in wanted.items():
        made = next(folder.glob("*.json"), folder / "none")
        if not made.exists() or made.stat().st_mtime < script.stat().st_mtime:
            python(script, "--out", folder, *options)
    graphs = TEST_MODELS / "graphs"
    chosen = [argument for folder in wanted for argument in ("--model", folder)]
    python(ROOT / "torchscript" / "export.py", *chosen, "--dtype", "float32", "--out", graphs)
    return models | {"graphs": graphs}


@pytest.fixture(scope="session")
def fused_graphs(test_models) -> Path:
    """The same graphs, and the fused flavour of the two models' UNets."""
    folder = TEST_MODELS / "fused"
    with FileLock(TEST_MODELS / "fused.lock"):
        own, others = (graphs / "manifest.json" for graphs in (folder, test_models["graphs"]))
        if not own.exists() or own.stat().st_mtime < others.stat().st_mtime:
            shutil.copytree(others.parent, folder, dirs_exist_ok=True)
        chosen = [argument for name in ("default", "second") for argument in ("--model", test_models[name] / "unet")]
        python(ROOT / "torchscript" / "export.py", *chosen, "--fused", "--out", folder)
    return folder
