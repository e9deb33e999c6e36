"""What a daemon holds while nothing is carried: memory, descriptors, threads; and what is flat.

Two things are kept for reuse and grow as they are first needed: the threads of pools, and the pipes
of relays. They have bounds, by which they are measured; nothing else may grow at all.

This module owns the samples and their comparison. It promises that two samples are compared only
when they are of the same process. It may not start or stop anything.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

__all__ = ["Bounds", "Sample", "growth", "sample"]

LOOKS: Final = 8
LOOK_SECONDS: Final = 0.25
"""A sample is the least of several looks: a renewal, a scrape or a look at the directory that is
under way holds a descriptor and some memory for a moment."""

MOST_LOOKS: Final = 48
"""Twelve seconds, for who has grown: memory is given back within ten of the end of a burst."""

MEMORY_SHARE: Final = 0.10
MEMORY_KB: Final = 3 * 1024
"""Growth that counts as flat: the larger of a tenth and 3 MB. The allocators keep that much back
or not, by chance; a leak of one object for each connection is many times that over a run."""

KB: Final = 1024


@dataclass(frozen=True)
class Bounds:
    """As many of each may be kept for reuse; 0: none is."""

    threads: int = 0
    pipes: int = 0
    """Descriptors, two for each pipe."""


@dataclass(frozen=True)
class Sample:
    """One daemon at rest. `memory` is VmRSS in KiB; `descriptors` are all but those of pipes."""

    pid: int
    memory: int
    descriptors: int
    pipes: int
    threads: int


def _look(pid: int) -> Sample:
    """Memory is 0 under a sanitizer, which keeps all that was freed for a while.

    ThreadSanitizer has a thread of its own, which does not count.
    """
    process = Path(f"/proc/{pid}")
    sanitizer = re.search(r"/lib([at])san\.", (process / "maps").read_text())
    rows = dict(
        line.split(":", 1) for line in (process / "status").read_text().splitlines() if ":" in line
    )
    opened: list[str] = []
    for entry in (process / "fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            opened.append(str(entry.readlink()))
    pipes = sum(1 for each in opened if each.startswith("pipe:"))
    memory = 0 if sanitizer else int(rows["VmRSS"].split()[0])
    threads = int(rows["Threads"]) - (sanitizer is not None and sanitizer[1] == "t")
    return Sample(pid, memory, len(opened) - pipes, pipes, threads)


def sample(
    pids: dict[str, int], flat: Callable[[dict[str, Sample]], bool] = lambda _: True
) -> dict[str, Sample]:
    """Return a sample of each process, all taken over the same seconds: two, more until `flat`.

    Raises OSError.
    """
    least = {name: _look(pid) for name, pid in pids.items()}
    for looks in range(2, MOST_LOOKS + 1):
        time.sleep(LOOK_SECONDS)
        for name, pid in pids.items():
            look = _look(pid)
            least[name] = Sample(
                pid,
                min(least[name].memory, look.memory),
                min(least[name].descriptors, look.descriptors),
                min(least[name].pipes, look.pipes),
                min(least[name].threads, look.threads),
            )
        if looks >= LOOKS and flat(least):
            break
    return least


def growth(first: Sample, last: Sample, bounds: Bounds) -> list[str]:
    """Return in what the second sample of a process is above the first; empty when it is flat."""
    if first.pid != last.pid:
        raise ValueError(f"processes {first.pid} and {last.pid} cannot be compared")
    found: list[str] = []
    allowed = max(MEMORY_KB, int(first.memory * MEMORY_SHARE))
    if last.memory > first.memory + allowed:
        found.append(f"memory {first.memory / KB:.1f} to {last.memory / KB:.1f} MiB")
    if last.descriptors > first.descriptors:
        found.append(f"descriptors {first.descriptors} to {last.descriptors}")
    if last.pipes > max(first.pipes, bounds.pipes):
        found.append(f"pipes {first.pipes} to {last.pipes}, at most {bounds.pipes} are kept")
    if last.threads > max(first.threads, bounds.threads):
        found.append(f"threads {first.threads} to {last.threads}")
    return found
