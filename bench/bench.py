"""Ours beside diffusers on this machine: everything that can be measured on a CPU.

    make bench                                     all of it, about 12 minutes on an idle machine
    .venv/bin/python bench/bench.py --quick        shows that it works
    .venv/bin/python bench/bench.py --rows image,start

Every figure comes from this one run. The two programs alternate, in processes of their own, so that whatever else the
machine does falls on both.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median

import lora_swap
from measure import (
    ROOT, WORKER, Command, Gpu, Peaks, Row, Run, ask, export, heading, machine, noise_band, run, serving, table,
    threads,
)

REFERENCE = Path(__file__).with_name("reference.py")
SCRATCH = ROOT / "target" / "bench"
TINY, GRAPHS = SCRATCH / "tiny", SCRATCH / "tiny-graphs"
CONTROL_STEPS = 5
# With what is computed once for all steps, such as the condition of a control map, which diffusers computes at each.
STEP_PHASES = ("prepare", "denoise")
# To pixels: no file is encoded on the other side, so ours does not count either.
PHASES = ("encode_prompt", "prepare", "denoise", "decode")

REQUEST = {
    "prompt": "a lighthouse on a rocky coast at sunset, oil painting",
    "negative_prompt": "blurry, low quality",
    "width": 128,
    "height": 128,
    "num_inference_steps": 25,
    "guidance_scale": 5.0,
    "seed": 42,
}


@dataclass
class Side:
    """One of the two programs: how to start it, and what was measured of it."""

    loop: Command  # prints a line of timings (ms) per picture; its last option takes their number
    first: Command  # prints a path as soon as its picture is written
    pictures: list[Path]  # made by `first`, to be removed before the next start
    blocks: list[list[dict[str, float]]] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)  # the processor's seconds for a picture; one of each block
    starts: list[float] = field(default_factory=list)
    peaks: Peaks = field(default_factory=Peaks)
    start_peaks: Peaks = field(default_factory=Peaks)

    def measure_block(self, warm_up: int, measured: int, gpu: Gpu | None = None) -> None:
        result = run([*self.loop, str(warm_up + measured)], gpu)
        self.blocks.append([json.loads(line) for line in result.lines[warm_up:]])
        self.cpu.append((result.cpu[-1] - result.cpu[warm_up - 1]) / measured)
        self.peaks.include(result.peaks)

    def measure_start(self, gpu: Gpu | None = None) -> Run:
        for picture in self.pictures:
            picture.unlink(missing_ok=True)
        result = run(self.first, gpu)
        if not all(picture.stat().st_size > 0 for picture in self.pictures):
            raise SystemExit(f"no picture from {' '.join(map(str, self.first))}")
        self.starts.append(result.at[0])
        self.start_peaks.include(result.peaks)
        return result

    def values(self, *phases: str) -> list[list[float]]:
        """Seconds in these phases: a list of pictures for each block."""
        return [[sum(timing.get(name, 0) for name in phases) / 1000 for timing in block] for block in self.blocks]

    def middle(self, *phases: str) -> float:
        return median(value for block in self.values(*phases) for value in block)


def sides(
    worker: Path, model: Path, graphs: Path, request: dict[str, object], scratch: Path, options: list[str]
) -> tuple[Side, Side]:
    """Ours and diffusers, told to do the same; both know `options`: device, dtype, threads."""
    scratch.mkdir(parents=True, exist_ok=True)
    file = scratch / "request.json"
    file.write_text(json.dumps(request))
    out = scratch / "pictures"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    common = ["--model", model, "--input", file, *options]
    ours, theirs = out / f"{request['seed']}.png", out / "diffusers.png"
    return (
        Side(
            loop=[worker, "bench", "--graphs", graphs, *common, "--repeat"],
            first=[worker, "generate", "--quiet", "--graphs", graphs, *common, "--output", out],
            pictures=[ours],
        ),
        Side(
            loop=[sys.executable, REFERENCE, "loop", *common, "--repeat"],
            first=[sys.executable, REFERENCE, "first", *common, "--output", theirs],
            pictures=[theirs],
        ),
    )


def make_tiny() -> None:
    """The small model of random weights that is measured, and its graphs."""
    run([sys.executable, ROOT / "torchscript" / "tiny_models.py", "--out", TINY])
    export(GRAPHS, "--model", TINY)


def measure_blocks(
    turns: Sequence[Side], blocks: int, warm_up: int, measured: int, gpu: Gpu | None = None, what: str = "block"
) -> None:
    """Alternates: ours, diffusers, ours, diffusers, ..."""
    for block in range(blocks):
        for side in turns:
            side.measure_block(warm_up, measured, gpu)
        print(f"{what} {block + 1} of {blocks}", file=sys.stderr, flush=True)


def measure_starts(turns: Sequence[Side], starts: int, gpu: Gpu | None = None) -> None:
    for start in range(starts):
        for side in turns:
            side.measure_start(gpu)
        print(f"start {start + 1} of {starts}", file=sys.stderr, flush=True)


def image_row(name: str, ours: Side, theirs: Side) -> Row:
    return Row(name, "s", ours.middle(*PHASES), theirs.middle(*PHASES), 0.65, 0.50, noise_band(ours.values(*PHASES)))


def start_row(name: str, ours: Side, theirs: Side, bar: float | None = None, aim: float | None = None) -> Row:
    noise = noise_band([[seconds] for seconds in ours.starts])
    return Row(name, "s", median(ours.starts), median(theirs.starts), bar, aim, noise)


def cpu_row(name: str, ours: Side, theirs: Side, steps: int) -> Row:
    own, other = (median(side.cpu) * 1000 / steps for side in (ours, theirs))
    return Row(name, "ms", own, other, 0.40, 0.02, noise_band([[seconds] for seconds in ours.cpu]))


def memory_rows(ours: Peaks, theirs: Peaks, bar: float | None = None, aim: float | None = None) -> list[Row]:
    gb = 1e9
    return [
        Row("peak host memory (RssAnon + RssShmem)", "GB", ours.private / gb, theirs.private / gb, bar, aim),
        Row("the same, files mapped included (VmHWM)", "GB", ours.resident / gb, theirs.resident / gb),
    ]


@dataclass(frozen=True)
class Plan:
    """How often things are repeated, and what both programs are told."""

    options: list[str]
    blocks: int = 4
    warm_up: int = 3
    measured: int = 5
    starts: int = 5
    control_blocks: int = 2
    control_measured: int = 3
    requests: int = 8
    changes: int = 5

    def sides(self, graphs: Path, request: dict[str, object], scratch: Path, *more: str) -> tuple[Side, Side]:
        return sides(WORKER, TINY, graphs, request, scratch, [*self.options, *more])


def loop_rows(plan: Plan, wanted: set[str]) -> list[Row]:
    """What is measured in processes that make one picture after the other."""
    ours, theirs = turns = plan.sides(GRAPHS, REQUEST, SCRATCH / "loop")
    if "packages" in wanted:
        size = f"{REQUEST['height']}x{REQUEST['width']}"
        graphs = export(SCRATCH / "packages", "--model", TINY, "--aot", size, "--aot-device", "cpu")
        packaged = plan.sides(graphs, REQUEST, SCRATCH / "loop-packages")[0]
        turns = (ours, packaged, theirs)
    measure_blocks(turns, plan.blocks, plan.warm_up, plan.measured)
    rows = []
    if "image" in wanted:
        rows.append(image_row("seconds per image", ours, theirs))
    if "packages" in wanted:
        rows.append(image_row("seconds per image, with packages", packaged, theirs))
    if "cpu" in wanted:
        name = "processor time (user + system, arithmetic included) per step"
        rows.append(cpu_row(name, ours, theirs, REQUEST["num_inference_steps"]))
    if "memory" in wanted:
        rows += memory_rows(ours.peaks, theirs.peaks, 0.35, 0.15)
    return rows


def start_rows(plan: Plan) -> list[Row]:
    ours, theirs = both = plan.sides(GRAPHS, REQUEST, SCRATCH / "start")
    for side in both:
        side.measure_start()  # files into the page cache, Python's bytecode onto the disk
        side.starts.clear()
    measure_starts(both, plan.starts)
    return [start_row("process start to first image", ours, theirs, 0.15, 0.06)]


def overhead_rows(plan: Plan) -> list[Row]:
    """What a request takes beside the work itself, over HTTP on loopback and with the picture as a PNG in the reply."""
    request = REQUEST | {"width": 1024, "height": 1024, "num_inference_steps": 1, "guidance_scale": 1}
    overheads = []
    with serving(WORKER, ["--model", TINY, "--graphs", GRAPHS, "--vae-tiling", "off", *plan.options]) as address:
        for _ in range(2 + plan.requests):
            reply, seconds = ask(address, request)
            overheads.append(seconds * 1000 - sum(reply["timings"].get(phase, 0) for phase in PHASES))
            size = len(reply["images"][0]) * 3 / 4 / 1e6
    overheads = overheads[2:]
    name = f"a request beside its phases, HTTP, PNG of 1024x1024 ({size:.1f} MB)"
    return [Row(name, "ms", median(overheads), None, 60, 20, noise_band([[each] for each in overheads]))]


def batching_rows(plan: Plan) -> list[Row]:
    """What it is worth that jobs share the UNet's calls: four at once with `--max-batch 4`, over the same without."""
    jobs = [REQUEST | {"seed": seed} for seed in range(4)]
    seconds: dict[int, list[float]] = {1: [], 4: []}
    with ExitStack() as stack, ThreadPoolExecutor(len(jobs)) as clients:
        common = ["--model", TINY, "--graphs", GRAPHS, "--concurrency", str(len(jobs)), *plan.options]
        at = {most: stack.enter_context(serving(WORKER, [*common, "--max-batch", str(most)])) for most in seconds}
        for _ in range(1 + plan.requests):
            for most, address in at.items():
                started = time.monotonic()
                list(clients.map(partial(ask, address), jobs))
                seconds[most].append(time.monotonic() - started)
    shared, alone = (each[1:] for each in (seconds[4], seconds[1]))
    ratio = median(shared) / median(alone)
    noise = noise_band([[each] for each in shared])
    return [Row("four jobs at once: in shared UNet calls / one by one", "x", ratio, None, noise=noise)]


def lora_rows(plan: Plan) -> list[Row]:
    return [lora_swap.row_of_its_own([*plan.options[-2:], "--repeat", str(plan.changes)])]


def control_requests(scratch: Path) -> dict[str, tuple[dict[str, object], list[str]]]:
    """The request, larger so that computing and not calling is measured, without and with controls; and the options."""
    import base64
    import io

    from PIL import Image

    scripts = ROOT / "torchscript"
    folders = {net: scratch / net for net in ("plain", "union")}
    for net, folder in folders.items():
        run([sys.executable, scripts / "tiny_models.py", "--out", folder, "--controlnet", net])
    export(scratch / "graphs", *(part for folder in (TINY, *folders.values()) for part in ("--model", folder)))
    out = io.BytesIO()
    Image.linear_gradient("L").resize((512, 512)).save(out, "PNG")
    control = {"image": base64.b64encode(out.getvalue()).decode()}
    plain = REQUEST | {"width": 512, "height": 512, "num_inference_steps": CONTROL_STEPS}

    def case(net: str, *modes: int | None) -> tuple[dict[str, object], list[str]]:
        entries = [control | {"model": net} | ({} if mode is None else {"mode": mode}) for mode in modes]
        return plain | {"controlnets": entries}, ["--controlnet", f"{net}={folders[net]}"]

    return {
        "none": (plain, []),
        "one": case("plain", None),
        "union one": case("union", 3),
        "union two": case("union", 1, 3),
    }


def control_rows(plan: Plan) -> list[Row]:
    """What a ControlNet costs: a step with one over a step without, on either side."""
    scratch = SCRATCH / "control"
    cases = {
        name: plan.sides(scratch / "graphs", request, scratch / name, *options)
        for name, (request, options) in control_requests(scratch).items()
    }
    turns = [side for both in cases.values() for side in both]
    measure_blocks(turns, plan.control_blocks, 1, plan.control_measured, what="control block")
    steps = {name: [side.middle(*STEP_PHASES) for side in both] for name, both in cases.items()}

    def row(quantity: str, with_it: str, without: str) -> Row:
        ours, theirs = (a / b for a, b in zip(steps[with_it], steps[without]))
        bands = [noise_band(cases[name][0].values(*STEP_PHASES)) for name in (with_it, without)]
        noise = None if None in bands else (bands[0][0] / bands[1][1], bands[0][1] / bands[1][0])
        return Row(quantity, "x", ours, theirs, 1.0, noise=noise)

    return [
        Row("a step without a ControlNet, 512x512", "s", *(seconds / CONTROL_STEPS for seconds in steps["none"])),
        row("a step with one ControlNet / without", "one", "none"),
        row("a union net: a step with one control / without", "union one", "none"),
        row("a union net: two controls / one", "union two", "union one"),
    ]


LOOP = ("image", "packages", "cpu", "memory")
SECTIONS: dict[str, Callable[[Plan], list[Row]]] = {
    "start": start_rows,
    "overhead": overhead_rows,
    "batching": batching_rows,
    "lora": lora_rows,
    "control": control_rows,
}


def noisy(rows: list[Row]) -> bool:
    return any(row.noise and (row.noise[0] < 0.9 or row.noise[1] > 1.1) for row in rows)


def main() -> None:
    names = (*LOOP, *SECTIONS)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer repeats: shows that it works, not how fast")
    parser.add_argument("--rows", default=",".join(names), help="which; all of them are %(default)s")
    parser.add_argument("--threads", type=int, default=threads(), help="1 where others use the machine (%(default)s)")
    arguments = parser.parse_args()
    wanted = set(arguments.rows.split(","))
    if unknown := wanted - set(names):
        parser.error(f"no such rows: {', '.join(sorted(unknown))}; there are {', '.join(names)}")

    options = ["--device", "cpu", "--dtype", "float32", "--threads", str(arguments.threads)]
    plan = Plan(options, 2, 1, 3, 2, 1, 1, 2, 2) if arguments.quick else Plan(options)
    make_tiny()
    conditions = machine()
    rows = loop_rows(plan, wanted) if wanted & set(LOOP) else []
    for name, section in SECTIONS.items():
        rows += section(plan) if name in wanted else []
    print(heading(WORKER, conditions))
    print(
        f"The model of torchscript/tiny_models.py, 128x128, 25 steps, Euler, CFG 5, float32 on the CPU, {arguments.threads} threads; {plan.blocks} blocks of {plan.measured} "
        f"images after {plan.warm_up} warm-ups, {plan.starts} starts; medians. Requests: 1 step without guidance. LoRA: "
        f"an SDXL of fewer blocks.\nControlNets: 512x512, {CONTROL_STEPS} steps; each side is a ratio of its own two "
        f"step times. `{' '.join(['bench/bench.py', *sys.argv[1:]])}`\n"
    )
    print(table(rows))
    if noisy(rows):
        print("\nThe machine was busy: ours differs from itself by more than 10 %. Repeat when it is idle.")


if __name__ == "__main__":
    main()
