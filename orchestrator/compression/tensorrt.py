"""TensorRT engines: built from the ONNX file, for the GPU of the machine that builds them and for no other kind.

Written to the documentation of TensorRT 10 and not run: no GPU was at hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from orchestrator.compression.exporting import to_onnx
from orchestrator.compression.measuring import Inputs
from orchestrator.errors import ExportError

__all__ = ["is_available", "to_tensorrt"]


def is_available() -> bool:
    """Whether this machine has both that it takes: an NVIDIA GPU, and the package."""
    return not _missing()


def to_tensorrt(model: nn.Module, inputs: Sequence[Inputs], path: Path) -> nn.Module:
    """Write ``model`` as a serialised engine for 1 to as many samples as the first of ``inputs`` has.

    Raises:
        ExportError: no GPU or no package here, or TensorRT cannot take the model.
    """
    if missing := _missing():
        raise ExportError(f"tensorrt builds for the GPU of its own machine, and here is {' and '.join(missing)}")
    whole = path.with_suffix(".onnx")
    to_onnx(model, inputs, whole)
    try:
        path.write_bytes(_built(whole.read_bytes(), len(inputs[0][0]), type(model).__name__))
    finally:
        whole.unlink()
    return TensorRtModule(path)


def _missing() -> list[str]:
    from importlib.util import find_spec

    missing = [] if torch.cuda.is_available() else ["no NVIDIA GPU"]
    return missing if find_spec("tensorrt") else [*missing, "no package tensorrt: pip install tensorrt"]


def _built(model: bytes, most: int, name: str) -> bytes:
    import tensorrt

    logger = tensorrt.Logger(tensorrt.Logger.ERROR)
    builder = tensorrt.Builder(logger)
    network = builder.create_network(0)
    parser = tensorrt.OnnxParser(network, logger)
    if not parser.parse(model):
        raise ExportError(f"{name} cannot be read by TensorRT: {parser.get_error(0).desc()}")
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        rest = tuple(tensor.shape)[1:]
        profile.set_shape(tensor.name, (1, *rest), (most, *rest), (most, *rest))
    config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise ExportError(f"{name} cannot be built by TensorRT: it found no kernels for a part of it")
    return bytes(engine)


class TensorRtModule(nn.Module):
    """Runs a TensorRT engine on the first GPU, with inputs and output on the CPU as the other runtimes have them."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        import tensorrt

        self._runtime = tensorrt.Runtime(tensorrt.Logger(tensorrt.Logger.ERROR))
        self._engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        self._context = self._engine.create_execution_context()
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        is_input = {name: self._engine.get_tensor_mode(name) == tensorrt.TensorIOMode.INPUT for name in names}
        self._inputs = [name for name in names if is_input[name]]
        self._output = next(name for name in names if not is_input[name])

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return the engine's first output."""
        held: list[Any] = [value.cuda().contiguous() for value in inputs]  # alive until the engine has read them
        for name, value in zip(self._inputs, held, strict=True):
            self._context.set_input_shape(name, tuple(value.shape))
            self._context.set_tensor_address(name, value.data_ptr())
        output = torch.empty(tuple(self._context.get_tensor_shape(self._output)), device="cuda")
        self._context.set_tensor_address(self._output, output.data_ptr())
        self._context.execute_async_v3(torch.cuda.current_stream().cuda_stream)
        return output.cpu()
