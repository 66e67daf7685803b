"""Quantisation by torchao: weights in 8 or 4 bits after training, and training that knows of it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn

from orchestrator.compression.exporting import need, refusing
from orchestrator.compression.quiet import quiet
from orchestrator.errors import ExportError

__all__ = ["METHODS", "fake_quantized", "quantized", "without_fake_quantization"]

GROUP = 32
"""Weights that share a scale in 4 bits."""


def quantized(model: nn.Module, method: str) -> nn.Module:
    """Return a copy of ``model`` in int8 or int4 by torchao; ``model`` stays.

    ``int8-weight-only`` keeps linear and embedding weights in 8 bits, a scale for each row, and computes in fp32;
    ``int4-weight-only`` keeps linear weights in 4 bits, a scale for each 32, and embeddings in 8;
    ``int8-dynamic`` also rounds the activations, with scales found at each call. Convolutions stay as they are: for
    those the int8 of ONNX and ExecuTorch is the one to take. So do layers of width 1, for which torchao finds no scale.

    Raises:
        ExportError: an unknown method, or nothing to quantise.
    """
    need("int8")
    if method not in METHODS:
        raise ExportError(f"method {method!r}: should be {', '.join(METHODS)}")
    if not any(_is_linear(module) for module in model.modules()):
        raise ExportError(f"{type(model).__name__} has no linear layer, and torchao quantises no other")
    result = copy.deepcopy(model)
    with refusing(f"{type(model).__name__} cannot be quantised by torchao"):
        METHODS[method](result)
    return result


def _int8_weight_only(model: nn.Module) -> None:
    from torchao.quantization import IntxWeightOnlyConfig, quantize_

    quantize_(
        model,
        IntxWeightOnlyConfig(weight_dtype=torch.int8),
        filter_fn=lambda module, _: _is_table(module) or _is_linear(module),
    )


def _int4_weight_only(model: nn.Module) -> None:
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    four_bits = cast("torch.dtype", getattr(torch, "int4"))  # noqa: B009 - torch's stubs leave it out
    config = IntxWeightOnlyConfig(weight_dtype=four_bits, granularity=PerGroup(GROUP))
    quantize_(model, config, filter_fn=lambda module, _: _is_linear(module) and module.in_features % GROUP == 0)
    quantize_(
        model,
        IntxWeightOnlyConfig(weight_dtype=torch.int8),
        filter_fn=lambda module, _: _is_table(module) or (_is_linear(module) and module.in_features % GROUP > 0),
    )


def _int8_dynamic(model: nn.Module) -> None:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, IntxWeightOnlyConfig, quantize_

    quantize_(model, Int8DynamicActivationInt8WeightConfig(), filter_fn=lambda module, _: _is_linear(module))
    quantize_(
        model,
        IntxWeightOnlyConfig(weight_dtype=torch.int8),
        filter_fn=lambda module, _: _is_table(module),
    )


METHODS: dict[str, Callable[[nn.Module], None]] = {
    "int8-weight-only": _int8_weight_only,
    "int8-dynamic": _int8_dynamic,
    "int4-weight-only": _int4_weight_only,
}


def fake_quantized(model: nn.Module) -> nn.Module:
    """Let the linear and embedding layers of ``model`` round as int8 does while they train, in place.

    Weights by a scale for each row, activations of linear layers by one for each token. Names of parameters stay.

    Raises:
        ExportError: nothing to quantise.
    """
    need("int8")
    with quiet():
        from torchao.quantization import quantize_
        from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    if not any(_is_linear(module) for module in model.modules()):
        raise ExportError(f"{type(model).__name__} has no linear layer to train quantisation-aware")
    weights = IntxFakeQuantizeConfig(torch.int8, "per_channel", is_symmetric=True)
    activations = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)
    with quiet():
        quantize_(
            model,
            QATConfig(activation_config=activations, weight_config=weights, step="prepare"),
            filter_fn=lambda module, _: _is_linear(module),
        )
        quantize_(
            model,
            QATConfig(weight_config=weights, step="prepare"),
            filter_fn=lambda module, _: _is_table(module),
        )
    return model


def without_fake_quantization(model: nn.Module) -> nn.Module:
    """Turn what ``fake_quantized`` made into ordinary layers with the weights as trained, in place."""
    need("int8")
    with quiet():
        from torchao.quantization import quantize_
        from torchao.quantization.qat import FakeQuantizedEmbedding, FakeQuantizedLinear, QATConfig

        fake = (FakeQuantizedLinear, FakeQuantizedEmbedding)
        quantize_(model, QATConfig(step="convert"), filter_fn=lambda module, _: isinstance(module, fake))
    return model


def _is_linear(module: Any) -> bool:
    return isinstance(module, nn.Linear) and module.in_features > 1


def _is_table(module: Any) -> bool:
    return isinstance(module, nn.Embedding) and module.embedding_dim > 1
