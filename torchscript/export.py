"""Exports weightless TorchScript graphs for SDXL models, from their configuration files alone.

    python torchscript/export.py --arch sdxl --dtype float32 --out graphs
    python torchscript/export.py --model models/demo --dtype float16 --dtype bfloat16 --out graphs
    python torchscript/export.py --arch sdxl --dtype float16 --aot 1024x1024 --out graphs  # compiled for this GPU too

Adds to the manifest that is in the folder. A graph that is already there, made by the same code and versions, is kept.
"""

from __future__ import annotations

import argparse
import ctypes
import re
import sys
import time
from pathlib import Path

import manifest
from configs import ARCHS, SHAPE_KEYS, ExportError, Job, PackageJob, jobs, package_jobs, read_model

DTYPES = ("float32", "float16", "bfloat16")


def export(job: Job, out: Path) -> int:
    """Makes one graph, checks it, writes it and its manifest entry. Returns the file's size."""
    # Here and not above: torch and its friends take seconds, and a run that finds everything in place needs none of it.
    import checks
    import tracing
    from graphs import KINDS

    kind = KINDS[job.component]
    checks.defaults(kind)
    checks.equals_eager(kind, job.config, job.dtype)

    traced = tracing.trace(kind, job.config, job.dtype)
    checks.no_device(traced)
    data = tracing.packed(traced)
    checks.weightless(data)

    manifest.write_atomically(out / job.file, data)
    parameters = {name: list(parameter.shape) for name, parameter in traced.named_parameters()}
    fused = {name: kind.sources(name) for name in parameters if kind.sources(name) != [name]}
    entry = {
        "file": job.file,
        "component": job.component,
        "class": job.class_name,
        "dtype": job.dtype,
        "config": job.config,
        "defaults": SHAPE_KEYS[job.class_name],
        "inputs": [vars(port) for port in kind.inputs(job.config, job.dtype)],
        "outputs": [vars(port) for port in kind.outputs(job.config, job.dtype)],
        "parameters": parameters,
        **({"fused": fused} if fused else {}),
        **manifest.versions(),
        "source": manifest.source_hash(),
    }
    manifest.add(out, job, entry)
    return len(data)


def export_package(job: PackageJob, out: Path, tune: bool) -> int:
    """Compiles one graph, writes it and its manifest entry. Returns the file's size."""
    import packages

    package = packages.write(job, out / job.file, tune)
    entry = {
        "file": job.file,
        "component": job.graph.component,
        "class": job.graph.class_name,
        "dtype": job.graph.dtype,
        "config": job.graph.config,
        "defaults": SHAPE_KEYS[job.graph.class_name],
        "device": job.device,
        **vars(package),
        **manifest.versions(),
        "source": manifest.source_hash(),
    }
    manifest.add_package(out, entry)
    return (out / job.file).stat().st_size


def size(text: str) -> tuple[int, int, int]:
    """Height and width in pixels, and the UNet's batch."""
    found = re.fullmatch(r"(\d+)x(\d+)(?:x(\d+))?", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is not HEIGHTxWIDTH or HEIGHTxWIDTHxBATCH")
    height, width, batch = (int(number) for number in (found[1], found[2], found[3] or 2))
    if height % 8 or width % 8 or 0 in (height, width, batch):
        raise argparse.ArgumentTypeError(f"{text!r}: height and width are multiples of 8, and nothing is 0")
    return height, width, batch


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=Path, action="append", default=[], metavar="DIR", help="a diffusers folder; may be repeated"
    )
    names = sorted(path.name for path in ARCHS.iterdir())
    parser.add_argument("--arch", choices=names, action="append", default=[], help="an architecture that ships with us")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="may be repeated; float32 when not given")
    parser.add_argument("--out", type=Path, required=True, metavar="G", help="folder of graphs and manifest.json")
    parser.add_argument(
        "--fused", action="store_true", help="the fused UNet graphs in float32 too; 16-bit sets have them anyway"
    )
    parser.add_argument(
        "--aot",
        type=size,
        action="append",
        default=[],
        metavar="HEIGHTxWIDTH[xBATCH]",
        help="also compile UNet and VAE decoder for pictures of this size in pixels; the UNet's batch is 2 when not"
        " given: one picture with guidance; may be repeated",
    )
    parser.add_argument("--aot-device", choices=("cpu", "cuda"), help="what for; a GPU where there is one")
    parser.add_argument("--aot-tune", action="store_true", help="let the compiler try many kernels: much longer")
    parser.add_argument("--force", action="store_true", help="export again what is already there")
    options = parser.parse_args(arguments)
    if not options.model and not options.arch:
        parser.error("name at least one --model or --arch")
    return options


def run(options: argparse.Namespace) -> None:
    folders = [ARCHS / name for name in options.arch] + options.model
    models = [model for folder in folders for model in read_model(folder)]
    wanted = jobs(models, options.dtype or ["float32"], options.fused)
    options.out.mkdir(parents=True, exist_ok=True)
    entries = manifest.load(options.out)
    missing = [job for job in wanted if options.force or not manifest.is_current(options.out, entries, job)]
    if len(missing) < len(wanted):
        print(f"{options.out}: {len(wanted) - len(missing)} of {len(wanted)} graphs are there already", flush=True)
    if missing:
        print(f"making {len(missing)} graphs", flush=True)
        import graphs  # noqa: F401  # the slow imports, so that the first graph's time is its own
        import torch

        torch.set_num_threads(1)  # small tensors all: threads would wait for each other most of the time
    for job in missing:
        start = time.monotonic()
        try:
            size = export(job, options.out)
        except ExportError as error:
            raise ExportError(f"{job.component} ({job.dtype}): {error}") from error
        print(f"{job.file:<44} {size / 1e6:6.2f} MB {time.monotonic() - start:6.1f} s", flush=True)
        trim_memory()
    if options.aot:
        run_packages(options, wanted)


def run_packages(options: argparse.Namespace, graphs: list[Job]) -> None:
    import packages
    import torch

    device = packages.device_name(options.aot_device or ("cuda" if torch.cuda.is_available() else "cpu"))
    entries = manifest.load(options.out, "packages")
    for job in package_jobs(graphs, options.aot, device):
        if not options.force and manifest.is_current_package(options.out, entries, job):
            print(f"{job.file} is there already", flush=True)
            continue
        start = time.monotonic()
        length = export_package(job, options.out, options.aot_tune)
        print(f"{job.file:<60} {length / 1e6:6.2f} MB {time.monotonic() - start:6.1f} s", flush=True)
        trim_memory()


def trim_memory() -> None:
    """Gives freed memory back to the system. glibc keeps it in pieces, and a full-size set would need half as much
    again."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)


def main(arguments: list[str] | None = None) -> int:
    try:
        run(parse(arguments))
    except ExportError as error:
        print(f"export failed: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
