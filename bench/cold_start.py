"""The first picture of a fresh process at full size, ours beside diffusers, on the CPU: time, memory, and how fast the
weights come from the disk.

    .venv/bin/python bench/cold_start.py          7 GB of random weights, made in target/full-size; 10 minutes
    .venv/bin/python bench/cold_start.py --dtype float32     14 GB; for a processor without bfloat16 (no AVX-512)
    .venv/bin/python bench/cold_start.py --tiny   the small model: shows that it works

Warm: the model's files are in the page cache. Cold: they were dropped from it, and `fincore` saw them gone; programs and
libraries stay in it either way. One process at a time, the two sides in turn.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import bench
from measure import (
    ROOT, WORKER, Row, export, heading, machine, random_checkpoint, read_once, run, table, threads,
)

FULL = ROOT / "target" / "full-size"
SCRATCH = bench.SCRATCH / "cold-start"
REQUEST = bench.REQUEST | {"width": 256, "height": 256, "num_inference_steps": 1, "guidance_scale": 1}
GONE = 0.01  # of the files; what may be left in the page cache
DISK_BAR, DISK_AIM = 0.80, 0.95


@dataclass
class Measured:
    """The two sides from a warm or a cold page cache, and what our own log said of the last start."""

    sides: tuple[bench.Side, bench.Side]
    rates: tuple[list[float], list[float]] = field(default_factory=lambda: ([], []))
    phases: str = ""

    def start(self, index: int) -> None:
        result = self.sides[index].measure_start()
        self.rates[index].append(result.read_rate())
        if index == 0:
            self.phases = ", ".join(re.findall(r"\w+ \d+ ms", result.errors.splitlines()[-1]))

    def rows(self, cache: str) -> list[Row]:
        ours, theirs = self.sides
        start = bench.start_row(f"{cache} page cache: process start to picture", ours, theirs)
        return [start, *bench.memory_rows(ours.start_peaks, theirs.start_peaks)]


def drop(files: Iterable[Path]) -> None:
    """Out of the page cache. Only clean pages go, hence the sync."""
    files = list(files)
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    left = sum(map(int, run(["fincore", "--bytes", "--noheadings", "--output", "RES", *files]).lines))
    total = sum(file.stat().st_size for file in files)
    if left > GONE * total:
        raise SystemExit(f"{left / 1e9:.2f} of {total / 1e9:.2f} GB are still in the page cache: does a process map them?")


def disk_rate(files: list[Path]) -> float:
    """Bytes per second of a program that does nothing but read, 16 MiB at a time."""
    drop(files)
    started = time.perf_counter()
    for file in files:
        read_once(file)
    return sum(file.stat().st_size for file in files) / (time.perf_counter() - started)


def prepare(tiny: bool, dtype: str, model: Path | None = None, graphs: Path | None = None) -> tuple[Path, Path]:
    where, arch = (SCRATCH, ("--model", bench.TINY)) if tiny else (FULL, ("--arch", "sdxl"))
    # the default's folder is also the one that lora_swap.py is told of
    folder = where / ("model" if dtype == "bfloat16" else f"model-{dtype}")
    return model or random_checkpoint(folder, arch[1], dtype), graphs or export(where / "graphs", *arch, "--dtype", dtype)


def disk_report(own: float, other: float, disk: float, size: float) -> str:
    """What the reading of a cold start was like."""
    ratio = own / disk
    limits = {"bar": DISK_BAR, "aim": DISK_AIM}
    verdicts = [f"{name} at least {least:g}, {'met' if ratio >= least else 'missed'}" for name, least in limits.items()]
    plain, ours, theirs = (f"{rate / 1e9:.2f} GB/s" for rate in (disk, own, other))
    return (
        f"Reading {size / 1e9:.2f} GB of weights, cold, from the first hundredth of what a process read to the last: a "
        f"plain reader {plain}, ours {ours}, diffusers {theirs}.\n"
        f"Ours against the plain reader: {ratio:.2f} ({'; '.join(verdicts)})."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", type=int, default=3, help="of each side from each page cache (%(default)s)")
    parser.add_argument("--tiny", action="store_true", help="the small model: shows that it works")
    parser.add_argument("--model", type=Path, help="instead of one of random weights in target/full-size")
    parser.add_argument("--graphs", type=Path, help="its graphs, of --dtype")
    parser.add_argument(
        "--dtype", default="bfloat16", choices=("bfloat16", "float32"),
        help="float32 on a processor without instructions for bfloat16, where a step is far too slow (%(default)s)",
    )  # fmt: skip
    parser.add_argument("--threads", type=int, default=threads(), help="1 where others use the machine (%(default)s)")
    arguments = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    bench.make_tiny()
    model, graphs = prepare(arguments.tiny, arguments.dtype, arguments.model, arguments.graphs)
    files = [file for folder in (model, graphs) for file in sorted(folder.rglob("*")) if file.is_file()]
    weights = [file for file in files if file.suffix == ".safetensors"]

    options = ["--device", "cpu", "--dtype", arguments.dtype, "--threads", str(arguments.threads)]
    small = prepare(True, arguments.dtype)
    for side in bench.sides(WORKER, *small, REQUEST, SCRATCH / "first", options):
        side.measure_start()  # programs and libraries into the page cache, Python's bytecode onto the disk
    warm, cold = (
        Measured(bench.sides(WORKER, model, graphs, REQUEST, SCRATCH / cache, options)) for cache in ("warm", "cold")
    )
    conditions = machine()
    disk = []
    for start in range(arguments.starts):
        disk.append(disk_rate(weights))
        for file in files:
            read_once(file)
        for index in (0, 1):
            warm.start(index)
        for index in (0, 1):
            drop(files)
            cold.start(index)
        print(f"start {start + 1} of {arguments.starts}", file=sys.stderr, flush=True)

    print(heading(WORKER, conditions))
    print(
        f"{'The small model' if arguments.tiny else 'Full-size SDXL'}, random weights, {arguments.dtype} with the VAE, "
        f"256x256, one step, no guidance, {arguments.threads} threads; {arguments.starts} starts each, medians; peaks of "
        f"all starts. `{shlex.join(['bench/cold_start.py', *sys.argv[1:]])}`\n"
    )
    print(table([*cold.rows("cold"), *warm.rows("warm")]))
    size = sum(file.stat().st_size for file in weights)
    print(f"\n{disk_report(*map(median, cold.rates), median(disk), size)}")
    print(f"\nOurs, one start, cold: {cold.phases}\n\nOurs, one start, warm: {warm.phases}")


if __name__ == "__main__":
    main()
