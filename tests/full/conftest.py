import os
import shutil
from collections.abc import Iterator

import pytest

from full_size import DTYPE, FOLDER, ROOT, FullSize, script


@pytest.fixture(scope="session")
def full_size() -> Iterator[FullSize]:
    made = FullSize(FOLDER / "model", FOLDER / "graphs")
    if not made.model.is_dir():
        checkpoint = ROOT / "bench" / "random_checkpoint.py"
        script(checkpoint, "--arch", "sdxl", "--dtype", DTYPE, "--out", made.model)
    script(ROOT / "torchscript" / "export.py", "--arch", "sdxl", "--dtype", DTYPE, "--out", made.graphs)
    yield made
    if not os.environ.get("KEEP"):
        shutil.rmtree(FOLDER)
