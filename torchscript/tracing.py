"""From an eager module to the bytes of a weightless TorchScript file."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from configs import Config, ExportError
from graphs import Graph, Size, Tensors

# Odd, so that every upsampling takes its size from the skip it meets and then fits odd and even sizes alike; a batch of
# two, so that no dimension of one is taken for a broadcast.
TRACED = Size(2, 17, 19)


class Unrecorded(TorchDispatchMode):
    """Runs each operator, once it has been recorded, on a thread that records nothing: meta kernels written in Python
    ask for shapes, which are traced tensors on the thread that traces, and they refuse those."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        super().__init__()
        self.pool = pool

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def run() -> Any:
            with torch._C._AutoDispatchBelowAutograd():  # autograd has had its turn, on the thread that traces
                return func(*args, **(kwargs or {}))

        return self.pool.submit(run).result()


def trace(kind: type[Graph], config: Config, dtype: str) -> torch.jit.ScriptModule:
    """The graph of a configuration. Traced on the meta device, where nothing is computed or allocated: its parameters
    are still to be filled."""
    with torch.device("meta"):
        module = kind.eager(config).eval().to(getattr(torch, dtype))
    graph = kind(module).eval().requires_grad_(False)
    buffers = dict(graph.named_buffers())
    without_data = [name for name, buffer in buffers.items() if buffer.is_meta]
    if without_data:
        raise ExportError(f"{kind.component}: buffers without data: {without_data}")
    graph.to("meta")
    inputs = tuple(tensor.to("meta") for tensor in example(kind, config, dtype))
    with warnings.catch_warnings(), torch.no_grad(), ThreadPoolExecutor(1) as pool, Unrecorded(pool):
        # Branches on sizes are warned about; that they are taken alike at every size is what checks.py proves.
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        traced = torch.jit.trace(graph, inputs, check_trace=False)
    fill(traced, buffers)
    for module in traced.modules():
        if module._c._has_method("forward"):
            inline_numbers(module.graph)
    return traced


def fill(traced: torch.jit.ScriptModule, values: Mapping[str, Tensor]) -> None:
    """Puts tensors, named from the top, in the place of the traced ones. `set_data` does not cross from meta to CPU."""
    for path, module in traced.named_modules():
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for name, _ in own:
            value = values.get(f"{path}.{name}" if path else name)
            if value is not None:
                module._c.setattr(name, value)


def fill_blank(traced: torch.jit.ScriptModule, dtype: str) -> None:
    """One shared zero seen through stride 0 as every parameter: full shapes, no weights."""
    zero = torch.zeros((), dtype=getattr(torch, dtype))
    names = traced.named_parameters()
    fill(traced, {name: nn.Parameter(zero.expand(meta.shape), requires_grad=False) for name, meta in names})


def example(kind: type[Graph], config: Config, dtype: str, size: Size = TRACED) -> Tensors:
    """Random inputs of a size, in the ranges the model sees."""
    generator = torch.Generator().manual_seed(size.height)
    tensors: list[Tensor] = []
    for port in kind.inputs(config, dtype):
        shape = [size.of(dimension) for dimension in port.shape]
        if port.name == "input_ids":
            tensor = torch.randint(3, config["vocab_size"] - 1, shape, generator=generator)
            for row in tensor:  # the end token somewhere in each row: it decides what is pooled
                end = config["vocab_size"] - 1 if config["eos_token_id"] == 2 else config["eos_token_id"]
                row[int(torch.randint(5, shape[1], (), generator=generator)) :] = end
        elif port.name == "timestep":
            tensor = torch.rand(shape, generator=generator) * 999
        elif port.name == "time_ids":
            tensor = torch.randint(0, 1024, shape, generator=generator)
        else:
            tensor = torch.randn(shape, generator=generator)
        tensors.append(tensor.to(getattr(torch, port.dtype)))
    return tuple(tensors)


def inline_numbers(graph: torch._C.Graph) -> None:
    """Turns the one-number tensors that a trace makes of Python numbers (`1.702 * x`) back into numbers. As tensors they
    sit on the traced device in float64, which MPS does not even have."""
    for node in list(all_nodes(graph)):
        if is_tensor_constant(node) and node.t("value").dim() == 0:
            number = graph.create("prim::Constant")
            value = node.t("value").item()
            if isinstance(value, float):
                number.f_("value", value).output().setType(torch._C.FloatType.get())
            else:
                number.i_("value", int(value)).output().setType(torch._C.IntType.get())
            number.insertBefore(node)
            node.output().replaceAllUsesWith(number.output())
            node.destroy()


def is_tensor_constant(node: torch._C.Node) -> bool:
    return node.kind() == "prim::Constant" and node.output().type().isSubtypeOf(torch._C.TensorType.get())


def all_nodes(block: torch._C.Graph | torch._C.Block) -> Iterator[torch._C.Node]:
    for node in block.nodes():
        yield node
        for inner in node.blocks():
            yield from all_nodes(inner)


def packed(traced: torch.jit.ScriptModule) -> bytes:
    """The file's bytes, without the debug records (source positions in this machine's folders, a third of the size)."""
    full = io.BytesIO()
    torch.jit.save(traced, full)
    reader = torch._C.PyTorchFileReader(io.BytesIO(full.getvalue()))
    out = io.BytesIO()
    writer = torch._C.PyTorchFileWriter(out)
    for name in reader.get_all_records():
        # The writer adds these itself.
        if not name.endswith(".debug_pkl") and name not in ("version", "byteorder", ".data/serialization_id"):
            record = reader.get_record(name)
            writer.write_record(name, record, len(record))
    writer.write_end_of_file()
    return out.getvalue()
