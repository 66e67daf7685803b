"""16-bit compute: batch norm in fp32 does what torch's own does, and casts leave whole numbers alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from orchestrator.training.precision import compute_in

SHAPES = {nn.BatchNorm1d: (16, 3), nn.BatchNorm2d: (8, 3, 4, 4), nn.BatchNorm3d: (4, 3, 2, 2, 2)}


def pair(kind: type[nn.Module], **settings: object) -> tuple[nn.Module, nn.Module]:
    """Torch's own in fp32, and ours with the parameters as DeepSpeed casts them."""
    torch.manual_seed(0)
    plain, ours = kind(3, **settings), nn.Sequential(kind(3, **settings))
    compute_in(ours, torch.bfloat16)
    for parameter in ours.parameters():
        parameter.data = parameter.data.bfloat16()
    return plain, ours


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize(
    "settings",
    [{}, {"affine": False}, {"momentum": None}, {"track_running_stats": False}, {"momentum": 0.3, "eps": 0.1}],
)
def test_batch_norm_follows_torchs_own(kind: type[nn.Module], settings: dict[str, object]) -> None:
    plain, ours = pair(kind, **settings)
    for _ in range(3):
        x = torch.randn(SHAPES[kind]).bfloat16()
        assert torch.allclose(ours(x), plain(x.float()), atol=0.03)
    for (name, buffer), (_, own) in zip(plain.named_buffers(), ours.named_buffers(), strict=True):
        assert own.dtype == buffer.dtype, "statistics stay fp32"
        assert torch.allclose(own, buffer, rtol=1e-4), name
    x = torch.randn(SHAPES[kind]).bfloat16()
    assert torch.allclose(ours.eval()(x), plain.eval()(x.float()), atol=0.03)


def test_small_changes_are_not_lost_in_the_statistics() -> None:
    """In bf16 a running mean of 1 would never move towards 1.01."""
    _, ours = pair(nn.BatchNorm1d)
    norm = ours[0]
    norm.running_mean.fill_(1.0)
    for _ in range(20):
        ours(torch.full((4, 3), 1.0078125))
    assert torch.allclose(norm.running_mean, torch.tensor(1.0 + 0.0078125 * (1 - 0.9**20)), rtol=1e-6)


def test_gradients_reach_the_parameters() -> None:
    plain, ours = pair(nn.BatchNorm1d)
    x = torch.randn(16, 3).bfloat16()
    plain(x.float()).square().sum().backward()
    ours(x).square().sum().backward()
    for theirs, own in zip(plain.parameters(), ours.parameters(), strict=True):
        assert own.grad is not None
        assert own.grad.dtype == torch.bfloat16
        assert torch.allclose(own.grad.float(), theirs.grad, rtol=0.02, atol=0.1)


def test_the_wrong_number_of_axes_is_refused_as_ever() -> None:
    _, ours = pair(nn.BatchNorm2d)
    with pytest.raises(ValueError, match="expected 4D input"):
        ours(torch.zeros(2, 3))


class Nested(nn.Module):
    def forward(self, x: torch.Tensor, *, extra: dict[str, object]) -> dict[str, object]:
        self.seen = (x.dtype, extra["scale"].dtype, extra["index"].dtype, extra["name"])
        return {"parts": [x, (extra["index"], x)], "name": extra["name"]}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_floats_are_cast_on_the_way_in_and_out(dtype: torch.dtype) -> None:
    model = Nested()
    compute_in(model, dtype)
    out = model(torch.ones(2), extra={"scale": torch.ones(1).double(), "index": torch.arange(2), "name": "a"})
    assert model.seen == (dtype, dtype, torch.int64, "a")
    x, (index, again) = out["parts"]
    assert (x.dtype, index.dtype, again.dtype, out["name"]) == (torch.float32, torch.int64, torch.float32, "a")
