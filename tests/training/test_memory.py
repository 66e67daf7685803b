"""The largest micro batch that memory allows, from the peaks of those that ran."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.training.memory import MemoryGauge, largest_micro_batch

GIB = 2**30


def test_one_micro_batch_is_taken_to_be_all_that_grows() -> None:
    assert largest_micro_batch({8: 2 * GIB}, 10 * GIB) == 40


def test_two_tell_the_fixed_part_from_what_grows() -> None:
    peaks = {8: 5 * GIB, 16: 6 * GIB}  # 4 GiB and 1/8 GiB per sample
    assert largest_micro_batch(peaks, 10 * GIB) == 48


@given(st.dictionaries(st.integers(1, 512), st.integers(1, 80 * GIB), min_size=1, max_size=5), st.integers(1, 80 * GIB))
def test_what_has_run_is_never_called_too_large(peaks, capacity) -> None:
    assert largest_micro_batch(peaks, capacity) >= max(peaks)


def test_a_process_reports_its_peak() -> None:
    gauge = MemoryGauge(torch.device("cpu"), capacity=2**40)
    assert gauge.largest_micro_batch() is None
    gauge.note(4)
    assert gauge.peaks[4] > 10 * 2**20
    held = torch.ones(64 * 2**20)
    gauge.note(8)
    assert gauge.peaks[8] >= gauge.peaks[4]
    assert held.sum() > 0
    assert (gauge.largest_micro_batch() or 0) > 8


def test_what_ran_out_of_memory_bounds_what_may_run() -> None:
    gauge = MemoryGauge(torch.device("cpu"), capacity=100 * GIB, limit=15)
    assert gauge.largest_micro_batch() == 15
    gauge.peaks.update({4: GIB, 8: 2 * GIB})
    assert gauge.largest_micro_batch() == 15
    gauge.limit = None
    assert (gauge.largest_micro_batch() or 0) > 15
