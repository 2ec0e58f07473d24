"""Graphs compiled ahead of time (AOTInductor): native code for one size, dtype and kind of device, without weights.

A package holds code alone. The reader gives it the tensors that the TorchScript graph of the same configuration computes
with, so both see the same weights, and a LoRA that is fused into them."""

from __future__ import annotations

import hashlib
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from configs import Config, ExportError, PackageJob
from graphs import KINDS, Graph, Size
from tracing import example

INDUCTOR: dict[str, Any] = {
    "aot_inductor.package_constants_in_so": False,
    # Otherwise vectors of up to 8 elements (`conv_out.bias`) become numbers in the code: those of the export.
    "always_keep_tensor_constants": True,
    # Otherwise the code has the number of threads of the export.
    "cpp.dynamic_threads": True,
}

# Names of the CPU's abilities that a compiler makes use of, as Linux lists them.
INSTRUCTION_SETS = re.compile(r"(avx|amx|sse|ssse|bmi|fma|f16c|abm|movbe|popcnt|adx|aes|vaes|sha|gfni|v?pclmul|asimd|sve|fp)")


@dataclass(frozen=True)
class Package:
    """A written package, and what its entry in the manifest says beside the job."""

    sha256: str
    inputs: list[dict[str, Any]]
    cpu_flags: list[str]


def device_name(device: str) -> str:
    """The kind of device whose code a compiler here makes: `cpu`, or `cuda sm_90` and the like."""
    if device == "cpu":
        return device
    if not torch.cuda.is_available():
        raise ExportError("a package for cuda is compiled where there is such a GPU, and here is none")
    major, minor = torch.cuda.get_device_capability()
    return f"cuda sm_{major}{minor}"


def cpu_flags() -> list[str]:
    """What code that was compiled for this very CPU may use."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError as error:
        raise ExportError(f"packages are made on Linux only: {error}") from error
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    if not found:
        raise ExportError("/proc/cpuinfo does not list what the CPU can do")
    return sorted(name for name in found[1].split() if INSTRUCTION_SETS.match(name))


def unfilled(kind: type[Graph], config: Config, dtype: str, device: str) -> Graph:
    """The graph's module with parameters that nobody has written to: a full-size one takes no memory on a CPU. They have
    storages of their own, since a compiler takes tensors of one storage for one parameter."""
    with torch.device("meta"):
        module = kind.eager(config).eval()
    graph = kind(module).eval()
    for owner in graph.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            empty = torch.empty(parameter.shape, dtype=getattr(torch, dtype), device=device)
            setattr(owner, name, nn.Parameter(empty, requires_grad=False))
        for name, buffer in list(owner.named_buffers(recurse=False)):
            setattr(owner, name, buffer.to(device))
    return graph


def size_of(job: PackageJob) -> Size:
    return Size(job.batch, job.height // 8, job.width // 8)


def write(job: PackageJob, path: Path, tune: bool) -> Package:
    """Compiles the job's graph into the file, which appears whole."""
    kind = KINDS[job.graph.component]
    device = job.device.split()[0]
    graph = unfilled(kind, job.graph.config, job.graph.dtype, device)
    inputs = tuple(tensor.to(device) for tensor in example(kind, job.graph.config, job.graph.dtype, size_of(job)))
    # The compiler wants this very ending.
    partial = path.with_name(f".partial-{path.name}")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", FutureWarning)
        program = torch.export.export(graph, inputs, strict=False)
        options = INDUCTOR | ({"max_autotune": True} if tune else {})
        torch._inductor.aoti_compile_and_package(program, package_path=str(partial), inductor_configs=options)
    digest = hashlib.sha256(partial.read_bytes()).hexdigest()
    partial.rename(path)
    ports = kind.inputs(job.graph.config, job.graph.dtype)
    shapes = [{"name": port.name, "shape": list(tensor.shape)} for port, tensor in zip(ports, inputs)]
    return Package(digest, shapes, cpu_flags())
