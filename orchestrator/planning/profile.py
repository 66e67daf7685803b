"""What one micro batch of a task costs, from tracing its own model and loss without computing anything.

1. The model is built and run on torch's device "meta": shapes, types and the autograd graph are real, numbers are not
   there, so that a model of any size is traced on any machine.
2. Every operation that reaches the dispatcher is a kernel: its FLOPs (torch's own table for matrix products,
   convolutions and their gradients), the bytes it reads and writes, and for matrix products the length of the inner
   dimension. Views are free. Forward and backward, both are run.
3. What autograd keeps for the backward pass is what ``saved_tensors_hooks`` sees, each storage once, parameters left
   out. The peak is that of all storages alive at once between the model's door and the end of the backward pass, each
   parameter's gradient being taken away as soon as it is whole: gradients belong to the model's states.
4. Twice, at two micro batches: everything is linear in the micro batch (batch norm needs two samples, so it is
   traced at 2 and 4). Kernels are compared one by one; where a model runs others on more samples, only their sums.
5. Attention is one kernel (``scaled_dot_product_attention``): it keeps queries, keys, values, output and a logarithm
   per row, and computes the scores again in the backward pass (Dao 2023, arXiv:2307.08691, section 3.1): 2 + 5
   products against 2 + 4. On "meta" torch would take the one that keeps all scores. A causal mask halves the work,
   not the published count. On accelerators ``rms_norm`` is one kernel too.

Where the trace fails (the loss asks for a number, a layer of the user's own has no shape rule), the same is done with
real numbers on the CPU, unless the model is known to be large. ``Profile.untraced`` says why.
"""

from __future__ import annotations

import contextlib
import statistics
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from orchestrator.errors import ConfigError
from orchestrator.planning.costs import Kernel, Linear, Pass, Profile

__all__ = ["profile_model"]

Columns = Mapping[str, Any]
MICRO_BATCHES = ((1, 2), (2, 4))
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LARGEST_ON_CPU = 100_000_000
"""Parameters of a model that is run with real numbers where it cannot be traced."""
SMALL_PARAMETER = 100_000
"""DeepSpeed's stage3_param_persistence_threshold: parameters up to this size stay whole on every device."""


def profile_model(
    build: Callable[[], nn.Module],
    loss: Callable[[nn.Module, Mapping[str, Tensor]], Tensor],
    sample: Columns,
    *,
    fit_out: Callable[[nn.Module], object],
    recompute: Callable[[nn.Module], object],
    precision: str = "fp32",
    on_accelerator: bool = False,
) -> Profile:
    """Trace ``loss`` of ``build()`` at two micro batches.

    Args:
        build: makes the model.
        loss: the task's: ``loss(model, batch)`` is a scalar.
        sample: columns of at least one sample; the first is repeated.
        fit_out: readies the model in place for 16-bit compute, as the engine does.
        recompute: wraps the model's repeated blocks in place, as the engine does; ConfigError where there are none.
        precision: type of parameters and computation.
        on_accelerator: whether kernels are those of an accelerator rather than a CPU.

    Raises:
        ConfigError: neither the trace nor a step on the CPU succeeds; the message holds both errors.
    """
    tracer = _Tracer(build, loss, sample, fit_out, recompute, precision, on_accelerator)
    try:
        return tracer.profile("meta")
    except Exception as error:  # noqa: BLE001 - the user's model and loss run here, and may raise anything
        why = _brief(error)
    if (size := tracer.known_size()) is not None and size > LARGEST_ON_CPU:
        raise ConfigError(
            f"the model cannot be traced ({why}), and is too large for a step on the CPU: {size:,} parameters"
        )
    try:
        return tracer.profile("cpu", untraced=why)
    except Exception as error:
        raise ConfigError(
            f"the model cannot be traced without numbers ({why}), nor does its loss run on one sample on the CPU "
            f"({_brief(error)}): mend Task.model and Task.loss"
        ) from error


@dataclass(frozen=True)
class _Tracer:
    build: Callable[[], nn.Module]
    loss: Callable[[nn.Module, Mapping[str, Tensor]], Tensor]
    sample: Columns
    fit_out: Callable[[nn.Module], object]
    recompute: Callable[[nn.Module], object]
    precision: str
    on_accelerator: bool

    def profile(self, device: str, untraced: str = "") -> Profile:
        with torch.random.fork_rng(devices=[]), _default_device(device):
            model = self.build()
            if device == "meta":
                _require_meta(model)
            self._cast(model)
            model.train()
            sizes, plain = self._pass(model, device)
            try:
                self.recompute(model)
            except ConfigError as error:
                why, checkpointed = str(error), None
            else:
                why, (_, checkpointed) = "", self._pass(model, device, (sizes,))
        return Profile(
            **_parameters(model),
            plain=plain,
            checkpointed=checkpointed,
            not_checkpointed=why,
            sample_bytes=sum(t.nbytes for t in self._batch(1, "cpu").values()),
            precision=self.precision,
            untraced=untraced,
        )

    def known_size(self) -> int | None:
        """Parameters of the model, without allocating any; None where it cannot be built so."""
        try:
            with _default_device("meta"):
                model = self.build()
                _require_meta(model)
        except Exception:  # noqa: BLE001 - the user's model is built here
            return None
        return sum(p.numel() for p in model.parameters())

    def _pass(
        self, model: nn.Module, device: str, choices: tuple[tuple[int, int], ...] = MICRO_BATCHES
    ) -> tuple[tuple[int, int], Pass]:
        for last, sizes in enumerate(choices, start=1):
            try:
                return sizes, _linear(sizes, [self._trace(model, size, device) for size in sizes])
            except ValueError:  # batch norm wants more than one value per channel
                if last == len(choices):
                    raise
        raise AssertionError("there is at least one choice")

    def _trace(self, model: nn.Module, size: int, device: str) -> _Recorder:
        recorder = _Recorder(model)
        batch = self._batch(size, device)
        kernels = _fused(recorder, fused_norm=self.on_accelerator) if device == "meta" else contextlib.nullcontext()
        with recorder.gradients_dropped(), kernels:
            with saved_tensors_hooks(recorder.keep, lambda tensor: tensor), recorder:
                loss = self.loss(model, batch)
                if loss.ndim != 0:
                    raise ConfigError(f"Task.loss returned shape {tuple(loss.shape)}; return the mean over the samples")
            recorder.end_forward()
            with recorder:
                loss.backward()
        return recorder

    def _cast(self, model: nn.Module) -> None:
        if self.precision != "fp32":
            for parameter in model.parameters():
                parameter.data = parameter.data.to(DTYPES[self.precision])
            self.fit_out(model)

    def _batch(self, size: int, device: str) -> dict[str, Tensor]:
        first = {name: torch.as_tensor(column, device="cpu")[:1] for name, column in self.sample.items()}
        return {name: tensor.expand(size, *tensor.shape[1:]).contiguous().to(device) for name, tensor in first.items()}


CallKind = Literal["matmul", "attention", "memory", "uncounted"]


class Call(NamedTuple):
    """One kernel's: "uncounted" ones are FLOPs that publications count and nobody computes, or the other way round."""

    kind: CallKind
    flops: int
    moved_bytes: int
    inner: int


class _Recorder(TorchDispatchMode):
    """Writes down each kernel, what is kept, and how much is alive."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kernels: list[Call] = []
        self.kept_bytes = 0
        self.peak_bytes = 0
        self.forward_kernels = 0
        self._model = model
        self._own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}  # noqa: SLF001
        self._kept: set[int] = set()
        self._alive: dict[int, int] = {}
        self._alive_bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        for tensor in outputs:
            self._watch(tensor)
        packet = function._overloadpacket  # noqa: SLF001
        if packet in flop_registry:
            flops = int(flop_registry[packet](*args, **(kwargs or {}), out_val=result))
            self.note("matmul", flops, _moved(args, outputs), _inner(flops, outputs))
        elif not _is_free(function):
            self.note("memory", 0, _moved((args, kwargs), outputs), 0)
        return result

    def note(self, kind: CallKind, flops: int, moved_bytes: int, inner: int) -> None:
        self.kernels.append(Call(kind, flops, moved_bytes, inner))

    def keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        key = storage._cdata  # noqa: SLF001
        if key not in self._own and key not in self._kept:
            self._kept.add(key)
            self.kept_bytes += storage.nbytes()
        return tensor

    def end_forward(self) -> None:
        self.forward_kernels = len(self.kernels)

    @contextlib.contextmanager
    def gradients_dropped(self) -> Iterator[None]:
        """Take each parameter's gradient away once it is whole."""

        def drop(parameter: Tensor) -> None:
            parameter.grad = None

        trained = [p for p in self._model.parameters() if p.requires_grad]
        handles = [parameter.register_post_accumulate_grad_hook(drop) for parameter in trained]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _watch(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata  # noqa: SLF001
        if key in self._alive or key in self._own:
            return
        self._alive[key] = size = storage.nbytes()
        self._alive_bytes += size
        self.peak_bytes = max(self.peak_bytes, self._alive_bytes)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self._alive_bytes -= self._alive.pop(key, 0)


@contextlib.contextmanager
def _fused(recorder: _Recorder, *, fused_norm: bool) -> Iterator[None]:
    """Put one kernel in the place of what "meta" would take apart.

    The functions themselves are exchanged: a mode for functions is set aside while the backward pass recomputes.
    """

    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **_: Any,
    ) -> Any:
        # The CPU's kernel knows no dropout: all scores are kept there.
        scores = query.shape[:-1].numel() * key.shape[-2] if dropout_p and not fused_norm else 0
        return _Attention.apply(recorder, query, key, value, attn_mask, is_causal, scores)  # type: ignore[no-untyped-call]

    def rms_norm(x: Tensor, _: Any, weight: Tensor | None = None, eps: float | None = None) -> Any:  # noqa: ARG001
        return _RmsNorm.apply(recorder, x, weight)  # type: ignore[no-untyped-call]

    with contextlib.ExitStack() as exchanged:
        exchanged.enter_context(mock.patch.object(F, "scaled_dot_product_attention", attention))
        if fused_norm:
            exchanged.enter_context(mock.patch.object(F, "rms_norm", rms_norm))
        yield


class _Attention(torch.autograd.Function):
    """Attention in one kernel: shapes in [..., heads, length, width], and what it keeps."""

    @staticmethod
    def forward(
        ctx: Any,
        recorder: _Recorder,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        causal: bool,
        scores: int,
    ) -> Tensor:
        ctx.recorder = recorder
        # Torch's fused kernels lay the output out like the queries: where those were transposed by the model, what it
        # transposes back is a view of the output, not a copy kept beside it.
        alike = query.shape[-1] == value.shape[-1]
        output = torch.empty_like(query) if alike else query.new_empty((*query.shape[:-1], value.shape[-1]))
        logarithms = query.new_empty(query.shape[:-1], dtype=torch.float32)
        extra = [] if mask is None else [mask]
        if scores:
            extra.append(query.new_empty(scores))
        ctx.save_for_backward(query, key, value, output, logarithms, *extra)
        # Two products, of queries and keys and of scores and values.
        pairs = query.shape[:-1].numel() * key.shape[-2]
        ctx.flops = 2 * pairs * (query.shape[-1] + value.shape[-1])
        ctx.work = 0.5 if causal and query.shape[-2] == key.shape[-2] else 1.0
        ctx.moved = sum(t.nbytes for t in (query, key, value, output, *extra))
        recorder.note("attention", int(ctx.work * ctx.flops), ctx.moved, query.shape[-1])
        recorder.note("uncounted", ctx.flops - int(ctx.work * ctx.flops), 0, 0)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        query, key, value = ctx.saved_tensors[:3]
        # Four products, and the scores once more: the published counts have the four.
        done = int(2.5 * ctx.work * ctx.flops)
        ctx.recorder.note("attention", done, 2 * ctx.moved + gradients[0].nbytes, query.shape[-1])
        ctx.recorder.note("uncounted", 2 * ctx.flops - done, 0, 0)
        return None, torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None, None, None


class _RmsNorm(torch.autograd.Function):
    """The accelerators' fused norm: keeps its input and a number per row."""

    @staticmethod
    def forward(ctx: Any, recorder: _Recorder, x: Tensor, weight: Tensor | None) -> Tensor:
        ctx.recorder = recorder
        rows = x.new_empty(x.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(x, rows, *([] if weight is None else [weight]))
        recorder.note("memory", 0, 2 * x.nbytes, 0)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *_gradients: Tensor) -> Any:
        x, _, *weight = ctx.saved_tensors  # asked for once: a recomputed tensor is handed out once
        ctx.recorder.note("memory", 0, 3 * x.nbytes, 0)
        return None, torch.empty_like(x), torch.empty_like(weight[0]) if weight else None


def _linear(sizes: tuple[int, int], traces: list[_Recorder]) -> Pass:
    """What two traces have in common: each number as a + b m."""
    first, second = traces
    return Pass(
        kernels=_kernels(sizes, first.kernels, second.kernels),
        forward_flops=_line(sizes, *(_flops(t.kernels[: t.forward_kernels]) for t in traces)),
        backward_flops=_line(sizes, *(_flops(t.kernels[t.forward_kernels :]) for t in traces)),
        kept_bytes=_line(sizes, first.kept_bytes, second.kept_bytes),
        peak_bytes=_line(sizes, first.peak_bytes, second.peak_bytes),
    )


def _kernels(sizes: tuple[int, int], first: list[Call], second: list[Call]) -> tuple[Kernel, ...]:
    if [call.kind for call in first] != [call.kind for call in second]:
        # A loop over samples or parts of them: only the sums are lines.
        first, second = _sums(first), _sums(second)
    pairs = Counter(zip(first, second, strict=True))
    return tuple(
        Kernel(
            kind=one.kind,
            count=count,
            flops=_line(sizes, one.flops, two.flops),
            moved_bytes=_line(sizes, one.moved_bytes, two.moved_bytes),
            inner=_line(sizes, one.inner, two.inner),
        )
        for (one, two), count in pairs.items()
        if one.kind != "uncounted"
    )


def _sums(calls: list[Call]) -> list[Call]:
    """All calls of a kind as one, with the mean inner dimension."""
    result = []
    for kind in ("matmul", "attention", "memory"):
        own = [call for call in calls if call.kind == kind]
        inner = round(statistics.fmean(call.inner for call in own)) if own else 0
        result.append(Call(kind, _flops(own), sum(call.moved_bytes for call in own), inner))
    return result


def _flops(calls: list[Call]) -> int:
    return sum(call.flops for call in calls)


def _line(sizes: tuple[int, int], first: float, second: float) -> Linear:
    slope = (second - first) / (sizes[1] - sizes[0])
    return Linear(first - slope * sizes[0], slope)


def _parameters(model: nn.Module) -> dict[str, int]:
    parameters = list(model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    layers = [sum(p.numel() for p in module.parameters(recurse=False)) for module in model.modules()]
    return {
        "parameters": sum(p.numel() for p in trained),
        "frozen_parameters": sum(p.numel() for p in parameters if not p.requires_grad),
        "largest_layer": max(layers, default=0),
        "small_parameters": sum(p.numel() for p in trained if p.numel() <= SMALL_PARAMETER),
        "tensors": len(trained),
        "buffer_bytes": sum(b.nbytes for b in model.buffers()),
        "convolutions": sum(isinstance(module, nn.Conv2d) for module in model.modules()),
    }


def _require_meta(model: nn.Module) -> None:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.device.type != "meta":
            raise RuntimeError(f"{name} is made on {tensor.device} whatever torch's default device is")


def _is_free(function: Any) -> bool:
    """Whether the operation starts no kernel: a view, or a new tensor nobody has written to."""
    returns = function._schema.returns  # noqa: SLF001
    views = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
    return views or function._overloadpacket._qualified_op_name in FREE  # noqa: SLF001


FREE = {
    f"aten::{name}" for name in ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "detach")
}


def _moved(arguments: Any, outputs: list[Tensor]) -> int:
    """Bytes read and written: each tensor as large as it is, or as what it repeats."""
    tensors = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)] + outputs
    return sum(min(t.numel() * t.element_size(), t.untyped_storage().nbytes()) for t in tensors)


def _inner(flops: int, outputs: list[Tensor]) -> int:
    """Length of the inner dimension: products per element of the output."""
    elements = sum(t.numel() for t in outputs)
    return max(1, flops // (2 * elements)) if elements else 1


@contextlib.contextmanager
def _default_device(device: str) -> Iterator[None]:
    with torch.device(device), torch.enable_grad():
        yield


def _brief(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
