"""When the tunnel gives memory back."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ztunnel.memory import FEWER, Returner, give_back


@pytest.mark.parametrize(
    "seen, due",
    [
        # All closed between two looks: one more look, to see that it is over.
        ([9000, 0, 0, 0], [False, False, True, False]),
        # Closing takes a while: only at its end.
        ([9000, 6000, 3000, 3000, 3000], [False, False, False, True, False]),
        # A busy tunnel, and one that lost a few.
        ([32, 31, 32, 30, 32], [False] * 5),
        ([FEWER - 1, 0, 0, 0], [False] * 4),
        # It comes and goes in waves: once a wave.
        ([2000, 0, 0, 2000, 0, 0], [False, False, True, False, False, True]),
        # It falls and rises again at once: the new ones use what the old ones left.
        ([5000, 3000, 4900, 4950], [False] * 4),
    ],
)
def test_due(seen: list[int], due: list[bool]) -> None:
    returner = Returner()
    assert [returner.due(count, 0) for count in seen] == due


def test_hbone_connections_that_close_later_are_due_by_themselves() -> None:
    returner = Returner()
    seen = [(9000, 90), (0, 90), (0, 90), (0, 2), (0, 2), (0, 2)]
    assert [returner.due(*counts) for counts in seen] == [False, False, True, False, True, False]


@given(st.lists(st.integers(0, FEWER - 1)))
def test_what_never_was_many_is_never_due(seen: list[int]) -> None:
    returner = Returner()
    assert not any(returner.due(count, 0) for count in seen)


def test_what_was_freed_goes_back_to_the_kernel() -> None:
    """Small blocks below one that stays: what the C library keeps for itself without the call."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    libc.malloc.argtypes = [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    blocks = [libc.malloc(4000) for _ in range(10_000)]
    for block in blocks:
        ctypes.memset(block, 1, 4000)
    last = libc.malloc(4000)
    for block in blocks:
        libc.free(block)
    before = _resident_kb()
    give_back()
    after = _resident_kb()
    libc.free(last)
    assert before - after > 30_000


def _resident_kb() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0])
