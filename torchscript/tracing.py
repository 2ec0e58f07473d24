"""From an eager module to the bytes of a weightless TorchScript file."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from configs import Config, ExportError
from graphs import Graph, Size, Tensors

# Odd, so that every upsampling takes its size from the skip it meets and then fits odd and even sizes alike; a batch of
# two, so that no dimension of one is taken for a broadcast. Small, as the result of this run is thrown away.
TRACED = Size(2, 9, 11)

# c10::ScalarType, as graphs spell a dtype.
SCALAR_TYPES = {"float16": 5, "bfloat16": 15}


def blank(kind: type[Graph], config: Config, dtype: str) -> Graph:
    """The graph's module with one shared zero seen through stride 0 as every parameter: full shapes, no memory."""
    with torch.device("meta"):
        module = kind.eager(config).eval()
    graph = kind(module).eval()
    zero = torch.zeros((), dtype=getattr(torch, dtype))
    for owner in graph.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            setattr(owner, name, nn.Parameter(zero.expand(parameter.shape), requires_grad=False))
    without_data = [name for name, buffer in graph.named_buffers() if buffer.is_meta]
    if without_data:
        raise ExportError(f"{kind.component}: buffers without data: {without_data}")
    return graph


class LeaveOutNoOps(TorchFunctionMode):
    """What changes nothing is not recorded: dropout outside training, and casts to the dtype that a tensor has. A graph
    no longer says what dtype the result of a submodule has, so this is seen while tracing or not at all."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is nn.functional.dropout:
            training = kwargs["training"] if "training" in kwargs else args[2]
            if not training:
                return args[0]
        if function is Tensor.float and args[0].dtype == torch.float32:
            return args[0]
        if function in (Tensor.to, Tensor.type):
            told = [*args[1:], *kwargs.values()]
            if told == [args[0].dtype]:  # nothing else, such as a device or `copy`
                return args[0]
        return function(*args, **kwargs)


def trace(kind: type[Graph], config: Config, dtype: str) -> torch.jit.ScriptModule:
    """The weightless graph of a configuration."""
    # A CPU multiplies float16 a hundred times slower than bfloat16 (minutes for SDXL), and the trace only differs in
    # the dtypes it names.
    run_in = "bfloat16" if dtype == "float16" else dtype
    with warnings.catch_warnings(), torch.no_grad(), LeaveOutNoOps():
        # Branches on sizes are warned about; that they are taken alike at every size is what checks.py proves.
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        traced = torch.jit.trace(blank(kind, config, run_in), example(kind, config, run_in), check_trace=False)
    for module in traced.modules():
        if module._c._has_method("forward"):
            inline_numbers(module.graph)
            drop_no_ops(module.graph)
            if run_in != dtype:
                rename_dtype(module.graph, run_in, dtype)
    if run_in != dtype:
        zero = torch.zeros((), dtype=getattr(torch, dtype))
        for parameter in traced.parameters():
            parameter.data = zero.expand(parameter.shape)
    return traced


def fill(kind: type[Graph], traced: torch.jit.ScriptModule, values: Mapping[str, Tensor]) -> None:
    """Gives every parameter its tensor, by the Hub's names."""
    for name, parameter in traced.named_parameters():
        sources = kind.sources(name)
        missing = [source for source in sources if source not in values]
        if missing:
            raise ExportError(f"parameter {missing[0]} has no counterpart under the Hub's names")
        tensors = [values[source].data for source in sources]
        parameter.data = tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def rename_dtype(graph: torch._C.Graph, old: str, new: str) -> None:
    """Replaces a dtype wherever an operator is told one."""
    for node in list(all_nodes(graph)):
        if node.schema() == "(no schema)":
            continue
        for index, argument in enumerate(torch._C.parse_schema(node.schema()).arguments):
            given = list(node.inputs())[index].node()
            if argument.name == "dtype" and given.kind() == "prim::Constant" and given.hasAttribute("value"):
                if given.i("value") == SCALAR_TYPES[old]:
                    number = graph.create("prim::Constant").i_("value", SCALAR_TYPES[new])
                    number.output().setType(torch._C.IntType.get())
                    number.insertBefore(node)
                    node.replaceInput(index, number.output())


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
        elif port.name == "task_ids":
            tensor = torch.randint(0, config["num_control_type"], shape, generator=generator)
        elif port.name == "control_type":
            tensor = torch.randint(0, 2, shape, generator=generator)
        elif port.name == "scales":  # a single condition is not scaled inside
            tensor = torch.rand(shape, generator=generator) * 2 if size.conditions > 1 else torch.ones(shape)
        else:
            tensor = torch.randn(shape, generator=generator)
        tensors.append(tensor.to(getattr(torch, port.dtype)))
    return tuple(tensors)


def inline_numbers(graph: torch._C.Graph) -> None:
    """Turns the one-number tensors that a trace makes of Python numbers (`1.702 * x`) back into numbers. As tensors
    they sit on the traced device in float64, which MPS does not even have."""
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


def drop_no_ops(graph: torch._C.Graph) -> None:
    """Removes products and quotients of a floating tensor and the constant 1 (`rescale_output_factor` and its like): as
    operators they copy the tensor."""
    for node in list(all_nodes(graph)):
        if node.kind() in ("aten::mul", "aten::div") and node.inputsSize() == 2:
            tensor, factor = node.inputs()
            number = factor.toIValue()  # None when it is no constant
            if isinstance(number, (int, float)) and number == 1 and is_floating(tensor) and is_floating(node.output()):
                node.output().replaceAllUsesWith(tensor)
                node.destroy()


def is_floating(value: torch._C.Value) -> bool:
    """Whether it is a tensor of floating dtype, as far as the graph says: the result of a submodule has no dtype."""
    if not value.type().isSubtypeOf(torch._C.TensorType.get()):
        return False
    dtype = value.type().dtype()
    return dtype is None or dtype.is_floating_point


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
