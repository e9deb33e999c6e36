"""What the soak calls flat, and what it does not."""

from __future__ import annotations

import dataclasses
import os

import pytest

from soak.resources import MEMORY_KB, Bounds, Sample, growth, sample

FIRST = Sample(pid=7, memory=10_000, descriptors=20, pipes=1, threads=6)
BOUNDS = Bounds(threads=7, pipes=128)


@pytest.mark.parametrize(
    "grown",
    [{}, {"threads": 7}, {"pipes": 127}, {"memory": 10_000 + MEMORY_KB}, {"descriptors": 19}],
)
def test_what_is_kept_for_reuse_has_a_bound(grown: dict[str, int]) -> None:
    assert growth(FIRST, dataclasses.replace(FIRST, **grown), BOUNDS) == []


@pytest.mark.parametrize(
    "grown",
    [{"threads": 8}, {"pipes": 129}, {"memory": 10_001 + MEMORY_KB}, {"descriptors": 21}],
)
def test_everything_else_is_left_behind(grown: dict[str, int]) -> None:
    (found,) = growth(FIRST, dataclasses.replace(FIRST, **grown), BOUNDS)
    assert next(iter(grown)) in found


def test_without_bounds_nothing_may_grow() -> None:
    more = dataclasses.replace(FIRST, threads=7, pipes=2)
    assert len(growth(FIRST, more, Bounds())) == 2


def test_pipes_are_no_other_descriptors() -> None:
    before = sample({"us": os.getpid()})["us"]
    ends = os.pipe()
    try:
        after = sample({"us": os.getpid()})["us"]
    finally:
        for end in ends:
            os.close(end)
    assert (after.pipes - before.pipes, after.descriptors - before.descriptors) == (2, 0)
