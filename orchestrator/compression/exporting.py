"""Files that run without this project: torch.export, ONNX and ExecuTorch, each with its own int8.

Every function writes one file and returns a module that runs it through that file's own runtime, so that what is
measured afterwards is what was written.
"""

from __future__ import annotations

import contextlib
import copy
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from orchestrator.compression.measuring import Inputs
from orchestrator.compression.quiet import quiet
from orchestrator.errors import ExportError, OrchestratorError

__all__ = ["need", "refusing", "to_executorch", "to_executorch_int8", "to_onnx", "to_onnx_int8", "to_torch"]

PACKAGES = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "executorch": ("executorch", "torchao"),
    "int8": ("torchao",),
}


def need(what: str) -> None:
    """Refuse where the packages for ``what`` are not installed.

    Raises:
        ExportError: names them and how to get them.
    """
    from importlib.util import find_spec

    if missing := [name for name in PACKAGES.get(what, ()) if find_spec(name) is None]:
        raise ExportError(f"{what} needs {', '.join(missing)}: pip install 'orchestrator[edge]'")


# -- torch -------------------------------------------------------------------------------------


def to_torch(model: nn.Module, inputs: Sequence[Inputs], path: Path) -> nn.Module:
    """Write ``model`` as an exported program: ``torch.export.load(path).module()`` runs it.

    Raises:
        ExportError: the model cannot be captured; the message names where.
    """
    program = _captured(model, inputs[0])
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # source lines: of a small model they are a fifth of the file
    with refusing(f"{type(model).__name__} cannot be written by torch.export"):
        torch.export.save(program, path)
        return torch.export.load(path).module()


def _captured(model: nn.Module, inputs: Inputs) -> torch.export.ExportedProgram:
    """The model as a graph, for any number of samples."""
    samples = torch.export.Dim("samples", min=1)
    shapes = tuple({0: samples} for _ in inputs)
    with refusing(f"{type(model).__name__} cannot be exported"), torch.no_grad():
        return torch.export.export(model, _several(inputs), dynamic_shapes=(shapes,) if _variadic(model) else shapes)


def _several(inputs: Inputs) -> Inputs:
    """At least two samples: an example of one would fix the number at one."""
    return inputs if len(inputs[0]) > 1 else tuple(torch.cat((value, value)) for value in inputs)


def _variadic(model: nn.Module) -> bool:
    return bool(model.forward.__code__.co_flags & 0x04) if hasattr(model.forward, "__code__") else False


# -- ONNX --------------------------------------------------------------------------------------


def to_onnx(model: nn.Module, inputs: Sequence[Inputs], path: Path) -> nn.Module:
    """Write ``model`` as ONNX, by torch's exporter on top of ``torch.export``; onnxruntime runs it.

    Raises:
        ExportError: the model cannot be captured, or ONNX has no operator for a part of it, which is named.
    """
    need("onnx")
    program = _captured(model, inputs[0])
    with refusing(f"{type(model).__name__} cannot be written as ONNX"):
        written = torch.onnx.export(program, dynamo=True, optimize=True, external_data=False, verbose=False)
        assert written is not None
        written.save(path)
        _strip(path)
        return OnnxModule(path)


def _strip(path: Path) -> None:
    """Drop the source lines that the exporter notes at every node: of a small model they are a third of the file."""
    import onnx

    model = onnx.load(path)
    for part in (*model.graph.node, *model.graph.value_info, *model.graph.initializer, model.graph):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    onnx.save(model, path)


def to_onnx_int8(source: Path, inputs: Sequence[Inputs], path: Path) -> nn.Module:
    """Write an int8 version of the ONNX file ``source``: weights per channel, activations calibrated on ``inputs``.

    Tables that rows are looked up in, such as embeddings, are int8 with a scale for each row.

    Raises:
        ExportError: there is nothing to calibrate on, or onnxruntime cannot quantise the file.
    """
    need("onnx")
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static, shape_inference

    _require_samples(inputs)
    prepared = path.with_suffix(".prepared.onnx")
    try:
        with refusing(f"{source.name} cannot be quantised by onnxruntime"):
            shape_inference.quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
            quantize_static(
                str(prepared),
                str(path),
                _Calibration(prepared, inputs),
                quant_format=QuantFormat.QDQ,
                # Products with weights alone: rounding what norms, softmax and residual sums pass on costs a GPT two
                # fifths of its accuracy, and saves nothing.
                op_types_to_quantize=["Conv", "Gemm", "MatMul"],
                extra_options={"MatMulConstBOnly": True},
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                calibrate_method=CalibrationMethod.MinMax,
            )
            _shrink(path)
            return OnnxModule(path)
    finally:
        prepared.unlink(missing_ok=True)


def _shrink(path: Path) -> None:
    """Round the tables of a file, keep equal constants once, and call what is neither input nor output by short names.

    Of a small model in int8 tables in fp32, names and repeated zero points are a quarter of the file.
    """
    import onnx

    model = onnx.load(path)
    graph = model.graph
    _round_tables(graph)
    if not any(attribute.HasField("g") for node in graph.node for attribute in node.attribute):  # they see our names
        names = _share_constants(graph) | {value.name: value.name for value in (*graph.input, *graph.output)} | {"": ""}
        for node in graph.node:
            node.ClearField("name")
            node.input[:] = [names[name] for name in node.input]
            node.output[:] = [names.setdefault(name, str(len(names))) for name in node.output]
        graph.ClearField("value_info")
    onnx.save(model, path)


def _share_constants(graph: Any) -> dict[str, str]:
    """Leave one of equal constants, under a short name; returns the new name of each."""
    first: dict[bytes, str] = {}
    names: dict[str, str] = {}
    kept = []
    for constant in graph.initializer:
        name, constant.name = constant.name, ""
        content = constant.SerializeToString(deterministic=True)
        if content not in first:
            first[content] = constant.name = f"{len(first)}c"  # no Python name, so no input's
            kept.append(constant)
        names[name] = first[content]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    return names


def _round_tables(graph: Any) -> None:
    """Keep each fp32 table that is only looked up in as int8 and a scale for each row; what is found is widened again.

    The quantiser would give a table one scale, and round what is found in it once more.
    """
    from onnx import TensorProto, helper, numpy_helper

    uses = Counter(name for node in graph.node for name in node.input)
    tables = {t.name: t for t in graph.initializer if t.data_type == TensorProto.FLOAT and len(t.dims) == 2}
    nodes = []
    for node in graph.node:
        table = tables.get(node.input[0]) if node.op_type == "Gather" and _axis(node) == 0 else None
        if table is None or uses[table.name] > 1:
            nodes.append(node)
            continue
        rounded, scale = _rounded(numpy_helper.to_array(table))
        name, wanted = table.name, node.input[1]
        graph.initializer.remove(table)
        graph.initializer.append(numpy_helper.from_array(rounded, f"{name}.int8"))
        graph.initializer.append(numpy_helper.from_array(scale, f"{name}.scale"))
        nodes += [
            helper.make_node("Gather", [f"{name}.int8", wanted], [f"{name}.row"]),
            helper.make_node("Cast", [f"{name}.row"], [f"{name}.wide"], to=TensorProto.FLOAT),
            helper.make_node("Gather", [f"{name}.scale", wanted], [f"{name}.own"]),
            helper.make_node("Mul", [f"{name}.wide", f"{name}.own"], list(node.output)),
        ]
    del graph.node[:]
    graph.node.extend(nodes)


def _axis(node: Any) -> int:
    return next((int(attribute.i) for attribute in node.attribute if attribute.name == "axis"), 0)


def _rounded(table: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """``table`` [rows, width] in 127 steps to each side, and the size of a step for each row [rows, 1]."""
    scale = np.abs(table).max(axis=1, keepdims=True) / np.float32(127)
    scale[scale == 0] = 1.0
    return np.rint(table / scale).astype(np.int8), scale


class OnnxModule(nn.Module):
    """Runs an ONNX file with onnxruntime on the CPU, with as many threads as torch."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._names = [entry.name for entry in self._session.get_inputs()]

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return the file's first output."""
        feed = {name: value.numpy() for name, value in zip(self._names, inputs, strict=True)}
        return torch.from_numpy(self._session.run(None, feed)[0])


class _Calibration:
    """onnxruntime's reader of calibration data: one dict of arrays after another, then None."""

    def __init__(self, path: Path, inputs: Sequence[Inputs]) -> None:
        import onnxruntime

        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        names = [entry.name for entry in session.get_inputs()]
        self._feeds = iter([{n: np.asarray(v) for n, v in zip(names, args, strict=True)} for args in inputs])

    def get_next(self) -> dict[str, Any] | None:
        return next(self._feeds, None)


# -- ExecuTorch --------------------------------------------------------------------------------


def to_executorch(model: nn.Module, inputs: Sequence[Inputs], path: Path) -> nn.Module:
    """Write ``model`` for ExecuTorch with XNNPACK, for one sample at a time, as devices at the edge see them.

    Raises:
        ExportError: the model cannot be captured or lowered, or the runtime has no operator for a part of it.
    """
    need("executorch")
    return _lowered(model, _fixed(_with_lookups(model), _alone(inputs[0], 0)), path)


def to_executorch_int8(model: nn.Module, inputs: Sequence[Inputs], path: Path) -> nn.Module:
    """The same in int8, calibrated on ``inputs``: XNNPACK's own quantizer, weights per channel, activations static.

    Raises:
        ExportError: as ``to_executorch``, or the model cannot be quantised, or there is nothing to calibrate on.
    """
    need("executorch")
    _require_samples(inputs)
    with quiet():
        from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
            XNNPACKQuantizer,
            get_symmetric_quantization_config,
        )
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    first = _alone(inputs[0], 0)
    captured = _fixed(_with_lookups(model), first).module()
    with refusing(f"{type(model).__name__} cannot be quantised for ExecuTorch"), torch.no_grad():
        quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
        prepared = prepare_pt2e(captured, quantizer)
        for args in inputs:
            for index in range(len(args[0])):
                prepared(*_alone(args, index))
        quantized = convert_pt2e(prepared)
    return _lowered(model, _fixed(quantized, first), path)


class _Lookups(nn.Module):
    """An embedding bag of [bags, slots] as a lookup and a sum: ExecuTorch's runtime has no operator for bags."""

    def __init__(self, bag: nn.EmbeddingBag) -> None:
        super().__init__()
        self.weight, self.mode, self.padding = bag.weight, bag.mode, bag.padding_idx

    def forward(self, ids: Tensor) -> Tensor:
        """Return the sum or mean of each bag's rows; the padding's row is in none."""
        filled = torch.ones_like(ids) if self.padding is None else (ids != self.padding).to(ids.dtype)
        total = (F.embedding(ids, self.weight) * filled[..., None].to(self.weight.dtype)).sum(dim=1)
        if self.mode == "sum":
            return total
        return total / filled.sum(dim=1, keepdim=True).clamp(min=1).to(self.weight.dtype)


def _with_lookups(model: nn.Module) -> nn.Module:
    """A copy of ``model`` with ``_Lookups`` for bags that are sums or means; the model itself where it has none."""
    if not any(_is_bag(module) for module in model.modules()):
        return model
    changed = copy.deepcopy(model)
    for name, module in list(changed.named_modules()):
        if _is_bag(module):
            changed.set_submodule(name, _Lookups(cast("nn.EmbeddingBag", module)))
    return changed


def _is_bag(module: nn.Module) -> bool:
    return isinstance(module, nn.EmbeddingBag) and module.mode in ("sum", "mean") and module.max_norm is None


def _alone(inputs: Inputs, index: int) -> Inputs:
    return tuple(value[index : index + 1].clone(memory_format=torch.contiguous_format) for value in inputs)


def _fixed(model: nn.Module, inputs: Inputs) -> torch.export.ExportedProgram:
    with refusing(f"{type(model).__name__} cannot be exported"), torch.no_grad():
        return torch.export.export(model, inputs)


def _lowered(model: nn.Module, program: torch.export.ExportedProgram, path: Path) -> nn.Module:
    with quiet():
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower

    refused = f"{type(model).__name__} cannot be lowered to ExecuTorch"
    with refusing(refused):
        lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch()
        if missing := _missing_operators(lowered.executorch_program):
            raise ExportError(f"{refused}: its runtime has no operator {', '.join(missing)}")
        path.write_bytes(lowered.buffer)
        return ExecuTorchModule(path)


def _missing_operators(program: Any) -> list[str]:
    """What the runtime has no kernel for: it would itself say no more than the number of an error."""
    from executorch.runtime import Runtime

    known = set(Runtime.get().operator_registry.operator_names)
    used = {f"{op.name}.{op.overload}".rstrip(".") for plan in program.execution_plan for op in plan.operators}
    return sorted(used - known)


class ExecuTorchModule(nn.Module):
    """Runs an ExecuTorch file, sample by sample."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        with quiet():
            from executorch.runtime import Runtime, Verification

            self._program = Runtime.get().load_program(path, verification=Verification.Minimal)
            self._method = self._program.load_method("forward")

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return the file's first output, for any number of samples."""
        # The runtime uses the memory of an output again.
        found = [self._method.execute(_alone(inputs, index))[0].clone() for index in range(len(inputs[0]))]
        return torch.cat(found)


def _require_samples(inputs: Sequence[Inputs]) -> None:
    if not inputs:
        raise ExportError("int8 needs samples to calibrate on: give at least one, as in --calibrate 256")


# -- what they share ---------------------------------------------------------------------------


@contextlib.contextmanager
def refusing(what: str) -> Iterator[None]:
    """Inside all is quiet, and whatever a back end raises is an ``ExportError``: ``what``, and the reason in a line."""
    try:
        with quiet():
            yield
    except OrchestratorError:
        raise
    except Exception as error:
        raise ExportError(f"{what}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """The line of a long message that says what was wrong: the last cause's, with the operator if it is named."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return f"{type(cause).__name__}: {lines[0] if lines else 'no message'}"
