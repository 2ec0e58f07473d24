"""Ours beside diffusers on an NVIDIA GPU: equal latents, then speed and memory. `bench/gpu.sh` starts it.

    correctness   the worker sees CUDA; latents against diffusers on the same GPU, small model and full size, with the
                  plain and with the fused UNet
    speed         full-size SDXL of random weights: seconds, milliseconds per step, start, memory, a LoRA's change; and
                  what each optimisation is worth
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.numpy import load_file

import bench
import lora_swap
from measure import (
    ROOT, Gpu, ProgramFailed, Row, heading, machine, noise_band, random_checkpoint, read_once, run, table, threads,
)

HERE = Path(__file__).parent
PROMPT = {name: bench.REQUEST[name] for name in ("prompt", "negative_prompt", "guidance_scale", "seed")}

FLOAT32_LIMIT = 1e-3  # relative error of the latents, TF32 off
PIXEL_LIMIT = 2  # of 255, float32
SIXTEEN_BIT_LIMIT = 1.1  # distance to the float32 result, over diffusers' own distance
OTHER_WAYS = ("--fused off", "--cuda-graphs 0", "--attention fastest", "--cudnn-benchmark")

DIFFERENT = 0.05  # latents of two seeds differ by at least this; else the comparison would prove nothing


@dataclass(frozen=True)
class Setup:
    """Where things are, and how much is done."""

    carry: Path
    scratch: Path
    device: str
    dry: bool

    def options(self, dtype: str) -> list[str]:
        """What both programs are told. A dry run shares its machine: there, threads that wait for each other cost more
        than they save."""
        return ["--device", self.device, "--dtype", dtype, "--threads", "1" if self.dry else str(threads())]

    @property
    def worker(self) -> Path:
        return self.carry / "bin" / "sdxl-worker"

    @property
    def graphs(self) -> Path:
        return self.carry / "graphs"

    @property
    def tiny(self) -> Path:
        return self.carry / "models" / "tiny"

    def full_size(self) -> Path:
        """The full-size checkpoint of random weights, made when it is not there; in a dry run one of the tiny shape."""
        out = self.scratch / ("random-tiny" if self.dry else "random-sdxl")
        return random_checkpoint(out, self.tiny if self.dry else "sdxl", device=self.device)


class Verdicts:
    """PASS and FAIL lines, and whether there was a FAIL."""

    def __init__(self) -> None:
        self.failed = 0

    def check(self, passed: bool, text: str) -> None:
        self.failed += not passed
        print(f"{'PASS' if passed else 'FAIL'}  {text}", flush=True)


@contextmanager
def stage(name: str) -> Iterator[None]:
    print(f"\n== {name}", flush=True)
    started = time.monotonic()
    yield
    print(f"   ({name}: {time.monotonic() - started:.0f} s)", flush=True)


# --- Correctness ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One request in one dtype, and the folder where both sides leave their latents and pictures."""

    name: str
    model: Path
    dtype: str
    request: dict[str, object]
    folder: Path

    def flavours(self) -> tuple[str, ...]:
        """Of the UNet, as far as `bench/pack.sh` brings their graphs: `--fused`."""
        return ("off",) if self.dtype == "float32" and self.name.startswith("full") else ("off", "on")

    def job(self) -> dict[str, object]:
        return {"model": str(self.model), "dtype": self.dtype, "request": self.request, "save": str(self.folder)}


def check_device(setup: Setup, verdicts: Verdicts) -> None:
    doctor = run([setup.worker, "doctor", "--model", setup.tiny, "--graphs", setup.graphs], check=False)
    print("\n".join(doctor.lines))
    verdicts.check(doctor.status == 0, f"doctor: status {doctor.status} {doctor.errors.strip()[-300:]}")
    device = next((line for line in doctor.lines if line.split()[:1] == ["device"]), "")
    verdicts.check(setup.device in device, f"the worker sees {setup.device}")


def correctness(setup: Setup, verdicts: Verdicts) -> None:
    cases = []
    folder = setup.scratch / "latents"
    shutil.rmtree(folder, ignore_errors=True)
    tiny = PROMPT | {"width": 136, "height": 128, "num_inference_steps": 4 if setup.dry else 20}
    tiny["num_images"] = 2 if setup.dry else 4
    for dtype in ("float32", "float16", "bfloat16"):
        cases.append(Case(f"tiny {dtype}", setup.tiny, dtype, tiny, folder / f"tiny-{dtype}"))
    side = 128 if setup.dry else 1024
    full = PROMPT | {"width": side, "height": side, "num_inference_steps": 2 if setup.dry else 6, "num_images": 2}
    # One file serves all: bfloat16 in float32 is exact, and its float16 is rounded alike on both sides.
    model = setup.full_size()
    for dtype in ("bfloat16",) if setup.dry else ("float32", "float16", "bfloat16"):
        cases.append(Case(f"full size {dtype}", model, dtype, full, folder / f"full-{dtype}"))

    # TF32 off in NVIDIA's libraries themselves, for both sides: PyTorch leaves it on in cuDNN.
    exact = {"NVIDIA_TF32_OVERRIDE": "0"}
    with stage("diffusers' latents"):
        jobs = setup.scratch / "jobs.json"
        jobs.write_text(json.dumps([case.job() for case in cases]))
        same = setup.options("float32")  # the dtype is each job's own
        run([sys.executable, HERE / "reference.py", "latents", jobs, *same], environment=exact)
    with stage("ours against them"):
        for case in cases:
            try:
                for fused in case.flavours():
                    make_ours(setup, case, fused, exact)
            except ProgramFailed as failure:
                verdicts.check(False, f"{case.name}: {failure}")
                continue
            compare(case, verdicts)


def make_ours(setup: Setup, case: Case, fused: str, environment: dict[str, str]) -> None:
    request, out = case.folder / "request.json", case.folder / f"fused-{fused}"
    request.write_text(json.dumps(case.request))
    files = ["--model", case.model, "--graphs", setup.graphs, "--input", request, "--output", out]
    command = [setup.worker, "generate", "--quiet", *setup.options(case.dtype), "--fused", fused, *files]
    run([*command, "--save-latents", out.with_suffix(".safetensors")], environment=environment)


def compare(case: Case, verdicts: Verdicts) -> None:
    latents = {file.stem: load_file(file)["latents"] for file in case.folder.glob("*.safetensors")}
    eager = latents["eager"]
    reference = latents.get("float32", eager)
    control = distance(reference[:1], reference[1:2])
    verdicts.check(control > DIFFERENT, f"{case.name}: two seeds differ by {control:.2g}, so the comparison can fail")
    for fused in case.flavours():
        compare_flavour(case, fused, latents[f"fused-{fused}"], eager, reference, verdicts)
    if len(case.flavours()) > 1:
        apart = distance(latents["fused-on"], latents["fused-off"])
        print(f"      {case.name}: latents of the fused UNet and of the plain one differ by {apart:.1e}", flush=True)


def compare_flavour(
    case: Case, fused: str, ours: np.ndarray, eager: np.ndarray, reference: np.ndarray, verdicts: Verdicts
) -> None:
    name = f"{case.name}, fused {fused}"
    if case.dtype == "float32":
        error = distance(ours, eager)
        verdicts.check(error <= FLOAT32_LIMIT, f"{name}: latents within {error:.1e} (limit {FLOAT32_LIMIT:g})")
        worst = max(pixel_difference(case, fused, index) for index in range(len(ours)))
        verdicts.check(worst <= PIXEL_LIMIT, f"{name}: pixels within {worst} of 255 (limit {PIXEL_LIMIT})")
    else:
        own, theirs = distance(ours, reference), distance(eager, reference)
        verdicts.check(
            own <= SIXTEEN_BIT_LIMIT * theirs,
            f"{name}: {own:.2e} from float32, diffusers {theirs:.2e}: "
            f"{own / theirs:.3f} times (limit {SIXTEEN_BIT_LIMIT}); from each other {distance(ours, eager):.1e}",
        )


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Relative to `b`; not a number when something is not finite, which passes no limit."""
    return float(np.linalg.norm((a - b).ravel()) / np.linalg.norm(b.ravel()))


def pixel_difference(case: Case, fused: str, index: int) -> int:
    seed = case.request["seed"] + index
    ours, eager = (
        np.asarray(Image.open(path).convert("RGB"), dtype=int)
        for path in (case.folder / f"fused-{fused}" / f"{seed}.png", case.folder / f"eager-{seed}.png")
    )
    return int(np.abs(ours - eager).max())


# --- Speed ------------------------------------------------------------------------------------------------------------


def speed(setup: Setup) -> None:
    dtype = "float32" if setup.dry else "bfloat16"  # 16 bits are slow on a CPU
    side, steps = (128, 3) if setup.dry else (1024, 30)
    blocks, warm_up, measured, starts = (1, 1, 2, 1) if setup.dry else (2, 2, 5, 3)
    model = setup.full_size()
    gpu = None if setup.dry else Gpu()
    clocks = [gpu.clock()] if gpu else []
    conditions = machine()
    request = PROMPT | {"width": side, "height": side, "num_inference_steps": steps}
    both = bench.sides(setup.worker, model, setup.graphs, request, setup.scratch, setup.options(dtype))
    ours, theirs = both
    others = {words: with_options(ours, *words.split()) for words in OTHER_WAYS}
    with stage("speed"):
        for file in model.rglob("*.safetensors"):
            read_once(file)
        bench.measure_blocks((ours, theirs), blocks, warm_up, measured, gpu)
        bench.measure_starts((ours, theirs), starts, gpu)
        bench.measure_blocks(list(others.values()), 1, warm_up, measured, gpu, "block of each other way")
    if gpu:
        clocks.append(gpu.clock())
    with stage("LoRA swap"):
        files = ["--worker", setup.worker, "--model", model, "--graphs", setup.graphs]
        swap = lora_swap.row_of_its_own([*files, *setup.options(dtype), "--repeat", "1" if setup.dry else "5"])

    gb = 1e9
    picture = bench.PHASES

    def row(quantity: str, unit: str, phases: tuple[str, ...], scale: float = 1, noise: bool = False) -> Row:
        band = noise_band(ours.values(*phases)) if noise else None
        return Row(quantity, unit, ours.middle(*phases) * scale, theirs.middle(*phases) * scale, noise=band)

    rows = [
        row("seconds per image", "s", picture, noise=True),
        row("one step", "ms", ("denoise",), 1000 / steps, noise=True),
        row("VAE decode to pixels", "ms", ("decode",), 1000),
        bench.cpu_row("host processor time (user + system) per step", *both, steps),
        bench.start_row("process start to first image", *both),
        *bench.memory_rows(ours.peaks, theirs.peaks),
    ]
    if gpu:
        rows.append(Row("peak GPU memory", "GB", ours.peaks.gpu / gb, theirs.peaks.gpu / gb))
    rows.append(swap)
    print(f"\n{heading(setup.worker, f'{describe_gpu()}; {conditions}' if gpu else conditions)}")
    print(
        f"{'tiny' if setup.dry else 'full-size SDXL'}, random weights, {side}x{side}, {steps} steps, Euler, CFG 5, "
        f"{dtype} with the VAE; {blocks} blocks of {measured} images after {warm_up} warm-ups, {starts} starts with "
        f"the files in the page cache; medians"
    )
    if gpu:
        source = "the process's own, from the driver" if gpu.per_process else "what the card's use grew by"
        print(f"GPU memory is {source}; SM clock {clocks[0]} MHz before, {clocks[1]} MHz after")
    print(f"\n{table(rows)}\n\nours by options, one block each but the first:")
    for words, side in {"the usual": ours, **others}.items():
        image, step = side.middle(*picture), side.middle("denoise") * 1000 / steps
        print(f"{words}: {image:.4g} s per image, {step:.4g} ms a step, {image / ours.middle(*picture):.3f} of the usual")


def with_options(side: bench.Side, *options: str) -> bench.Side:
    """The same of the worker with further options."""
    loop, first = ([*command[:2], *options, *command[2:]] for command in (side.loop, side.first))
    return bench.Side(loop, first, side.pictures)


def describe_gpu() -> str:
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    return ", ".join(run(query).lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("correctness", "speed", "all"))
    parser.add_argument("--carry", type=Path, required=True, help="what bench/pack.sh made")
    parser.add_argument("--scratch", type=Path, default=ROOT / "target" / "bench" / "gpu", help="about 8 GB")
    parser.add_argument("--dry", action="store_true", help="everything on the CPU, with the small model")
    options = parser.parse_args()
    options.scratch.mkdir(parents=True, exist_ok=True)
    setup = Setup(options.carry.resolve(), options.scratch.resolve(), "cpu" if options.dry else "cuda", options.dry)

    verdicts = Verdicts()
    with stage("device"):
        check_device(setup, verdicts)
    if verdicts.failed:
        sys.exit(f"\n{verdicts.failed} failed; nothing to measure on")
    if options.stage in ("correctness", "all"):
        correctness(setup, verdicts)
    if options.stage in ("speed", "all"):
        speed(setup)
    print(f"\n{verdicts.failed} failed" if verdicts.failed else "\nno check failed")
    sys.exit(1 if verdicts.failed else 0)


if __name__ == "__main__":
    main()
