"""Pruning: the smallest weights go, so many and no others, and stay gone through training."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from orchestrator.compression.pruning import INTERVAL, choose, mask_weights, plain
from orchestrator.errors import ExportError
from trained_runs import sparsity_of

shares = st.floats(0.0, 0.99)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10))


# -- which weights go --------------------------------------------------------------------------


@given(shares, st.integers(1, 40), st.integers(1, 40))
def test_so_many_of_the_smallest_go(share: float, rows: int, columns: int) -> None:
    weight = random(rows, columns)
    kept = choose(weight, "global", share)
    assert int((~kept).sum()) == min(int(share * weight.numel() + 1e-6), weight.numel() - 1)
    if kept.any() and not kept.all():
        assert weight[kept].abs().min() >= weight[~kept].abs().max()


@given(st.integers(1, 12), st.integers(1, 6))
def test_two_of_every_four_go(rows: int, groups: int) -> None:
    weight = random(rows, 4 * groups)
    kept = choose(weight, "2:4", 0.5).reshape(-1, 4)
    assert (kept.sum(dim=1) == 2).all()
    lost = weight.abs().reshape(-1, 4).masked_fill(kept, 0.0).amax(dim=1)
    assert (weight.abs().reshape(-1, 4).masked_fill(~kept, torch.inf).amin(dim=1) >= lost).all()


@pytest.mark.parametrize("kernel", [(3,), (3, 3), (2, 3)])
def test_two_of_every_four_inputs_go_at_each_position_of_a_kernel(kernel: tuple[int, ...]) -> None:
    weight = random(6, 8, *kernel)
    kept = choose(weight, "2:4", 0.5)
    assert kept.shape == weight.shape
    for start in (0, 4):
        assert (kept[:, start : start + 4].sum(dim=1) == 2).all()
    one = weight[2, 4:8].flatten(1)[:, 1].abs()  # four inputs of one output at one position
    assert kept[2, 4:8].flatten(1)[:, 1].tolist() == (one >= one.sort().values[2]).tolist()


def test_two_of_four_leaves_layers_without_four_inputs_whole_and_goes_at_once() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))  # 27 inputs each, but three channels
    mask_weights(model, pattern="2:4", sparsity=0.5, passes=4 * INTERVAL).train()
    for count in range(1, 2 * INTERVAL):
        model(random(2, 3, 8, 8))
        shares = [float((layer.weight == 0).float().mean()) for layer in model]
        assert shares == [0.0, 0.0 if count < INTERVAL else 0.5]


@given(shares)
def test_channels_go_whole(share: float) -> None:
    weight = random(16, 3, 3, 3)
    kept = choose(weight, "channels", share).flatten(1)
    assert (kept.all(dim=1) | ~kept.any(dim=1)).all()
    gone = ~kept[:, 0]
    assert int(gone.sum()) == min(int(share * 16 + 1e-6), 15)
    norms = weight.flatten(1).norm(dim=1)
    if gone.any():
        assert norms[gone].max() <= norms[~gone].min()


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.8, 0.85])
def test_globally_all_layers_share_one_threshold(sparsity: float) -> None:
    before = [layer.weight.detach().clone() for layer in network() if isinstance(layer, nn.Linear | nn.Conv2d)]
    model = plain(mask_weights(network(), pattern="global", sparsity=sparsity))
    after = [layer.weight for layer in model if isinstance(layer, nn.Linear | nn.Conv2d)]
    assert sparsity_of(model) == pytest.approx(sparsity, abs=0.002)
    gone = torch.cat([b[a == 0].abs().flatten() for a, b in zip(after, before, strict=True)])
    stayed = torch.cat([b[a != 0].abs().flatten() for a, b in zip(after, before, strict=True)])
    assert gone.max() <= stayed.min()
    assert all(torch.equal(a[a != 0], b[a != 0]) for a, b in zip(after, before, strict=True))


# -- while training ----------------------------------------------------------------------------


def test_the_share_rises_by_the_cubic_and_then_stays() -> None:
    model = mask_weights(network(), pattern="global", sparsity=0.8, passes=10 * INTERVAL).train()
    x, seen = random(2, 4, 8, 8), []
    for _ in range(12 * INTERVAL):
        model(x)
        seen.append(sparsity_of(model))
    assert seen[: INTERVAL - 1] == [0.0] * (INTERVAL - 1)
    wanted = [0.8 * (1 - (1 - min(n / 10, 1.0)) ** 3) for n in range(1, 13)]
    assert seen[INTERVAL - 1 :: INTERVAL] == pytest.approx(wanted, abs=0.005)


def test_evaluation_counts_no_pass() -> None:
    model = mask_weights(network(), pattern="global", sparsity=0.8, passes=INTERVAL)
    with torch.no_grad():
        for _ in range(2 * INTERVAL):
            model(random(2, 4, 8, 8))
    model.eval()
    for _ in range(2 * INTERVAL):
        model(random(2, 4, 8, 8))
    assert sparsity_of(model) == 0.0


def test_what_has_gone_stays_zero_while_the_rest_learns() -> None:
    model = mask_weights(network(), pattern="global", sparsity=0.7).train()
    zero = [m.weight == 0 for m in model if hasattr(m, "parametrizations")]
    before = [m.weight.detach().clone() for m in model if hasattr(m, "parametrizations")]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(5):
        model(random(2, 4, 8, 8)).square().mean().backward()
        optimizer.step()
    after = [m.weight for m in model if hasattr(m, "parametrizations")]
    assert all((a[z] == 0).all() for a, z in zip(after, zero, strict=True))
    assert all((a[~z] != b[~z]).float().mean() > 0.9 for a, b, z in zip(after, before, zero, strict=True))


def test_taking_the_masks_off_changes_no_output_and_leaves_ordinary_layers() -> None:
    model = mask_weights(network(), pattern="channels", sparsity=0.5).eval()
    x = random(3, 4, 8, 8)
    expected = model(x)
    assert torch.equal(plain(model)(x), expected)
    assert set(model.state_dict()) == set(network().state_dict())
    assert 0.0 < sparsity_of(model) < 0.5  # the last layer keeps all its outputs


@pytest.mark.parametrize(
    ("pattern", "sparsity", "said"),
    [
        ("random", 0.5, r"pattern='random': should be global, 2:4, channels"),
        ("global", 0.0, r"sparsity=0: should lie between 0 and 1"),
        ("global", 1.0, r"sparsity=1: should lie between 0 and 1"),
        ("2:4", 0.8, r"sparsity=0.8: 2:4 takes half of the weights; give 0.5, or another pattern"),
    ],
)
def test_impossible_requests(pattern: str, sparsity: float, said: str) -> None:
    with pytest.raises(ExportError, match=said):
        mask_weights(network(), pattern=pattern, sparsity=sparsity)  # type: ignore[arg-type]
    with pytest.raises(ExportError, match="has no linear or convolutional weights"):
        mask_weights(nn.Sequential(nn.BatchNorm1d(3)), pattern="global", sparsity=0.5)
