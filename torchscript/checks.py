"""What a graph must hold before it is kept. Each check raises `ExportError` and names the fault."""

from __future__ import annotations

import inspect
import io
import zipfile

import torch

from configs import SHAPE_KEYS, Config, ExportError
from graphs import Graph, Size, Tensors
from tracing import all_nodes, example, fill, is_tensor_constant, packed, trace

# None is the traced size; 5x11 and 7x10 latents are multiples of 8 pixels and not of 32.
SIZES = (
    Size(1, 8, 8, conditions=1),
    Size(3, 5, 11, conditions=3),
    Size(2, 7, 10, tokens=154, conditions=5),
    Size(1, 6, 5, conditions=2),
)

# How far the outputs of a graph may be from the eager module's, where it need not be exact; relative to their norm.
ROUNDING = {"float32": 1e-5, "float16": 5e-3, "bfloat16": 4e-2}

# Operators that make a tensor from nothing: where they put it was decided by the machine that traced.
FACTORIES = {"arange", "empty", "eye", "full", "linspace", "ones", "rand", "randn", "scalar_tensor", "tensor", "zeros"}


def no_device(traced: torch.jit.ScriptModule) -> None:
    """No device in the graph, no tensor constant (it lives on the device of the trace), no factory call: one graph runs
    on the CPU, on CUDA and on MPS."""
    graph = traced.inlined_graph
    for node in all_nodes(graph):
        kind = node.kind()
        if kind == "prim::Constant" and node.output().type().kind() == "DeviceObjType":
            # `to` and the like carry the device as an optional argument; None does not show up here.
            raise ExportError(f"device constant in the graph: {str(node).strip()}")
        if is_tensor_constant(node):
            raise ExportError(f"tensor constant in the graph, it must be a buffer: {str(node).strip()}")
        if kind.removeprefix("aten::") in FACTORIES:
            raise ExportError(f"a tensor is made inside the graph, on a fixed device: {str(node).strip()}")


def weightless(data: bytes) -> None:
    """No parameter stores more than one element."""
    module = torch.jit.load(io.BytesIO(data), map_location="cpu")
    for name, parameter in module.named_parameters():
        stored = parameter.untyped_storage().nbytes() // parameter.element_size()
        if stored > 1:
            raise ExportError(f"parameter {name} stores {stored} elements; a graph carries no weights")
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        debug = [name for name in archive.namelist() if name.endswith(".debug_pkl")]
    if debug:
        raise ExportError(f"debug records left in the file: {debug[:3]}")


def equals_eager(kind: type[Graph], config: Config, dtype: str) -> None:
    """On a small configuration with random weights, the saved and loaded graph answers what the library's own module
    answers, to the bit (or up to rounding), at sizes and batches that were not traced."""
    torch.manual_seed(0)
    small = kind.shrink(config)
    reference = kind.eager(small).eval().requires_grad_(False)
    for parameter in reference.parameters():
        if not parameter.any():  # a zero convolution would hide all that comes before it
            parameter.normal_(std=0.1)
    reference = reference.to(getattr(torch, dtype))
    traced = trace(kind, small, dtype)
    fill(kind, traced, {kind.hub_name(name): parameter for name, parameter in reference.named_parameters()})
    graph = torch.jit.load(io.BytesIO(packed(traced)), map_location="cpu")
    # Optimizing a graph for a single call takes longer than the call.
    with torch.no_grad(), torch.jit.optimized_execution(False):
        for size in SIZES:
            inputs = example(kind, small, dtype, size)
            try:
                outputs = graph(*inputs)
            except RuntimeError as error:
                raise ExportError(f"{size}: the graph cannot run at this size: {error}") from error
            limit = 0.0 if kind.exact else ROUNDING[dtype]
            same(outputs, kind.reference(reference, *inputs), str(size), limit)


def same(actual: Tensors, expected: Tensors, where: str, limit: float) -> None:
    if len(actual) != len(expected):
        raise ExportError(f"{where}: {len(actual)} outputs, eager has {len(expected)}")
    for index, (ours, theirs) in enumerate(zip(actual, expected)):
        if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
            raise ExportError(
                f"{where}: output {index} is {ours.dtype}{list(ours.shape)}, eager {theirs.dtype}{list(theirs.shape)}"
            )
        difference = (ours.double() - theirs.double()).abs()
        if not torch.equal(ours, theirs) and not difference.norm() <= limit * theirs.double().norm():
            raise ExportError(f"{where}: output {index} differs from eager by up to {difference.max():.3g}")


def defaults(kind: type[Graph]) -> None:
    """The defaults in `configs.py` are those of the installed class."""
    actual = {name: item.default for name, item in inspect.signature(kind.defaults_of.__init__).parameters.items()}
    for key, value in SHAPE_KEYS[kind.class_name].items():
        theirs = list(actual[key]) if isinstance(actual.get(key), tuple) else actual.get(key)
        if key not in actual or theirs != value:
            raise ExportError(f"{kind.class_name}: default of {key} is {theirs!r} here, configs.py says {value!r}")
