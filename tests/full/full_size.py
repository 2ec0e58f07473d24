"""Checkpoints at full size, of random weights, in `target/full-size` (removed at the end; with KEEP=1 they stay)."""

import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
FOLDER = ROOT / "target" / "full-size"
DTYPE = "bfloat16"

sys.path[:0] = [str(ROOT / "bench"), str(ROOT / "torchscript")]
from measure import Run, run  # noqa: E402


@dataclass
class FullSize:
    model: Path
    graphs: Path

    def generate(self, worker: Path, out: Path, *options: object, steps: int = 1) -> Run:
        """One step (or more) of a 256x256 picture, in the file's dtype: the weights stay mapped."""
        request = ["--prompt", "a red fox in the snow", "--width", 256, "--height", 256, "--steps", steps, "--seed", 7]
        files = ["--model", self.model, "--graphs", self.graphs, "--output", out]
        command = [worker, "generate", "--device", "cpu", "--dtype", DTYPE, *files, *request, *options]
        return run([str(part) for part in command], check=False)

    def doctor(self, worker: Path, *options: object) -> Run:
        """Loads the model and nothing else."""
        command = [worker, "doctor", "--device", "cpu", "--dtype", DTYPE, "--model", self.model, "--graphs", self.graphs]
        return run([str(part) for part in [*command, *options]])

    def part(self, arch: str) -> Path:
        """The weights of one of our architectures that is a single component, and its graphs in `graphs`."""
        folder = FOLDER / arch
        if not folder.is_dir():
            script(ROOT / "bench" / "random_checkpoint.py", "--arch", arch, "--dtype", DTYPE, "--out", folder)
        script(ROOT / "torchscript" / "export.py", "--arch", arch, "--dtype", DTYPE, "--out", self.graphs)
        return folder


def script(path: Path, *options: object) -> None:
    started = time.monotonic()
    subprocess.run([sys.executable, str(path), *map(str, options)], check=True, stdout=subprocess.DEVNULL)
    print(f"{path.name}: {time.monotonic() - started:.0f} s")
