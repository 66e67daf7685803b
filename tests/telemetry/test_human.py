"""Numbers as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.telemetry import human


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"), (1, "1"), (0.4321987, "0.4322"), (0.05, "0.05"), (12.5, "12.5"), (1437, "1,437"), (0.0012, "1.2e-3"),
        (-0.00012, "-1.2e-4"), (2_500_000.0, "2.5e6"), (98_765.4, "98,765"), (None, "n/a"), (float("nan"), "n/a"),
        (float("inf"), "n/a"),
    ],
)  # fmt: skip
def test_number(value: float | None, text: str) -> None:
    assert human.number(value) == text


def test_number_keeps_its_width_when_asked() -> None:
    assert [human.number(v, trim=False) for v in (0.5, 0.4321, 0.001)] == ["0.5000", "0.4321", "1.000e-3"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"), (0.0004, "0 ms"), (0.412, "412 ms"), (0.9996, "1.0 s"), (12.34, "12.3 s"), (59.94, "59.9 s"),
        (59.96, "1 min 00 s"), (245, "4 min 05 s"), (3599.6, "1 h 00 min"), (11_520, "3 h 12 min"),
        (48 * 3600, "2 d 00 h"), (-3, "0.0 s"), (None, "n/a"), (float("inf"), "n/a"),
    ],
)  # fmt: skip
def test_duration(seconds: float | None, text: str) -> None:
    assert human.duration(seconds) == text


def test_rates_sizes_and_counts() -> None:
    assert [human.rate(v, "samples") for v in (2345.4, 12.345, None)] == [
        "2,345 samples/s", "12.3 samples/s", "n/a samples/s",
    ]  # fmt: skip
    assert [human.size(v) for v in (0, 1536, 312_475_648)] == ["0 B", "1.5 KiB", "298 MiB"]
    assert human.count(1437.4) == "1,437"


def test_control_characters_cannot_steer_a_terminal() -> None:
    assert human.printable("a\x1b[2Jb\nc") == "a?[2Jb?c"


@given(st.floats(-1e300, 1e300))
def test_a_number_reads_back_within_its_digits(value: float) -> None:
    assert float(human.number(value).replace(",", "")) == pytest.approx(value, rel=1e-3, abs=1e-300)
