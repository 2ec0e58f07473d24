"""Ours beside diffusers on this machine: the small default model on the CPU.

    make bench                            all of it, about 10 minutes on an idle machine
    .venv/bin/python bench/bench.py --quick

Every figure comes from this one run. The two programs alternate, in processes of their own, so that whatever else the
machine does falls on both.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from statistics import median

from measure import ROOT, Command, Gpu, Peaks, Row, machine, noise_band, run, table, threads, versions

WORKER = ROOT / "target" / "release" / "sdxl-worker"
REFERENCE = Path(__file__).with_name("reference.py")
SCRATCH = ROOT / "target" / "bench"
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
    starts: list[float] = field(default_factory=list)
    peaks: Peaks = field(default_factory=Peaks)
    start_peaks: Peaks = field(default_factory=Peaks)

    def measure_block(self, warm_up: int, measured: int, gpu: Gpu | None = None) -> None:
        result = run([*self.loop, str(warm_up + measured)], gpu)
        self.blocks.append([json.loads(line) for line in result.lines[warm_up:]])
        self.peaks.include(result.peaks)

    def measure_start(self, gpu: Gpu | None = None) -> None:
        for picture in self.pictures:
            picture.unlink(missing_ok=True)
        result = run(self.first, gpu)
        if not all(picture.stat().st_size > 0 for picture in self.pictures):
            raise SystemExit(f"no picture from {' '.join(map(str, self.first))}")
        self.starts.append(result.at[0])
        self.start_peaks.include(result.peaks)

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


def measure(
    sides: tuple[Side, ...], blocks: int, warm_up: int, measured: int, starts: int, gpu: Gpu | None = None
) -> None:
    """Alternates: ours, diffusers, ours, diffusers, ..."""
    for block in range(blocks):
        for side in sides:
            side.measure_block(warm_up, measured, gpu)
        print(f"block {block + 1} of {blocks}", file=sys.stderr, flush=True)
    for start in range(starts):
        for side in sides:
            side.measure_start(gpu)
        print(f"start {start + 1} of {starts}", file=sys.stderr, flush=True)


def control_requests(scratch: Path) -> dict[str, tuple[dict[str, object], list[str]]]:
    """The request, larger so that computing and not calling is measured, without and with controls; and the options."""
    import base64
    import io

    from PIL import Image

    scripts = ROOT / "torchscript"
    folders = {net: scratch / net for net in ("plain", "union")}
    for net, folder in folders.items():
        run([sys.executable, scripts / "tiny_models.py", "--out", folder, "--controlnet", net])
    models = [part for folder in (ROOT / "models" / "tiny", *folders.values()) for part in ("--model", folder)]
    run([sys.executable, scripts / "export.py", *models, "--out", scratch / "graphs"])
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


def measure_control(scratch: Path, same: list[str], blocks: int, warm_up: int, measured: int) -> list[Row]:
    """What a ControlNet costs: a step with one over a step without, on either side."""
    cases = {
        name: sides(WORKER, ROOT / "models" / "tiny", scratch / "graphs", request, scratch / name, [*same, *options])
        for name, (request, options) in control_requests(scratch).items()
    }
    for block in range(blocks):
        for both in cases.values():
            for side in both:
                side.measure_block(warm_up, measured)
        print(f"control block {block + 1} of {blocks}", file=sys.stderr, flush=True)
    steps = {name: [side.middle(*STEP_PHASES) for side in both] for name, both in cases.items()}

    def row(quantity: str, with_it: str, without: str) -> Row:
        ours, theirs = (a / b for a, b in zip(steps[with_it], steps[without]))
        bands = [noise_band(cases[name][0].values(*STEP_PHASES)) for name in (with_it, without)]
        noise = None if None in bands else (bands[0][0] / bands[1][1], bands[0][1] / bands[1][0])
        return Row(quantity, "x", ours, theirs, 1.0, noise)

    return [
        Row("a step without a ControlNet, 512x512", "s", *(seconds / CONTROL_STEPS for seconds in steps["none"])),
        row("a step with one ControlNet / without", "one", "none"),
        row("a union net: a step with one control / without", "union one", "none"),
        row("a union net: two controls / one", "union two", "union one"),
    ]


def noisy(rows: list[Row]) -> bool:
    return any(row.noise and (row.noise[0] < 0.9 or row.noise[1] > 1.1) for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer repeats: shows that it works, not how fast")
    options = parser.parse_args()
    blocks, warm_up, measured, starts = (2, 1, 3, 2) if options.quick else (4, 3, 5, 5)

    model, graphs = ROOT / "models" / "tiny", ROOT / "graphs"
    same = ["--device", "cpu", "--dtype", "float32", "--threads", str(threads())]
    both = sides(WORKER, model, graphs, REQUEST, SCRATCH, same)
    conditions = machine()
    ours, theirs = both
    for side in both if not options.quick else ():
        side.measure_start()  # files into the page cache, Python's bytecode onto the disk
        side.starts.clear()
    measure(both, blocks, warm_up, measured, starts)

    control_rows = measure_control(SCRATCH / "control", same, 2, warm_up, measured)

    gb = 1e9
    rows = [
        Row("seconds per image", "s", ours.middle(*PHASES), theirs.middle(*PHASES), 0.65,
            noise_band(ours.values(*PHASES))),
        Row("process start to first image", "s", median(ours.starts), median(theirs.starts), 0.15,
            noise_band([[seconds] for seconds in ours.starts])),
        Row("peak memory (RssAnon + RssShmem)", "GB", ours.peaks.private / gb, theirs.peaks.private / gb, 0.5),
        Row("the same, files mapped included (VmHWM)", "GB", ours.peaks.resident / gb, theirs.peaks.resident / gb),
        *control_rows,
    ]  # fmt: skip
    print(f"{date.today()}: {conditions}")
    print(versions(WORKER))
    print(
        f"models/tiny, 128x128, 25 steps, Euler, CFG 5, float32 on the CPU; {blocks} blocks of {measured} images after "
        f"{warm_up} warm-ups, {starts} starts each; medians; python bench/bench.py{' --quick' * options.quick}\n"
        f"Rows of ControlNets: 512x512, {CONTROL_STEPS} steps; each side is a ratio of its own two step times.\n"
    )
    print(table(rows))
    if noisy(rows):
        print("\nThe machine was busy: ours differs from itself by more than 10 %. Repeat when it is idle.")


if __name__ == "__main__":
    main()
