"""The machine: what it is, how busy it is, and what processes have used.

This module owns reading /proc. It promises CPU times of whole processes, threads that ended
included, and resident memory as the kernel counts it. It changes nothing.
"""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final, Self

__all__ = ["Meter", "busy", "facts", "quiet", "resident_kb", "threads"]

TICK_SECONDS: Final = 1.0 / os.sysconf("SC_CLK_TCK")
USER_FIELD: Final = 14 - 3
SYSTEM_FIELD: Final = 15 - 3
"""Places of utime and stime (fields 14 and 15 of proc(5)) after the command's closing ')'."""

IDLE_FIELDS: Final = (3, 4)
STEAL_FIELD: Final = 7
COUNTED_FIELDS: Final = 8
"""The fields of /proc/stat's first line; idle and iowait are not work, guest is in user already."""

BUSY_SECONDS: Final = 0.4
"""How long others are watched before each scenario."""
QUIET_SHARE: Final = 0.15
"""Of all processors: above it, others' work would show in the figures."""


def process_seconds(pid: int) -> float:
    """Return what a process has used of all processors, in seconds. Raises OSError."""
    fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    return (int(fields[USER_FIELD]) + int(fields[SYSTEM_FIELD])) * TICK_SECONDS


def _system() -> tuple[float, float]:
    """Return (seconds used, seconds in all) of all processors since boot."""
    with Path("/proc/stat").open() as table:
        fields = [int(text) for text in next(table).split()[1:][:COUNTED_FIELDS]]
    idle = sum(fields[index] for index in IDLE_FIELDS)
    used = sum(fields) - idle - fields[STEAL_FIELD]
    return used * TICK_SECONDS, sum(fields) * TICK_SECONDS


class Meter:
    """CPU seconds used within a `with` block, by each given process and by the whole system."""

    def __init__(self, pids: Iterable[int]) -> None:
        self._pids = tuple(pids)
        self._before: dict[int, float] = {}
        self._began = 0.0
        self._system_before = 0.0
        self.processes: dict[int, float] = {}
        self.system = 0.0
        self.seconds = 0.0

    def __enter__(self) -> Self:
        self._before = {pid: process_seconds(pid) for pid in self._pids}
        self._system_before = _system()[0]
        self._began = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.monotonic() - self._began
        self.system = _system()[0] - self._system_before
        self.processes = {pid: process_seconds(pid) - self._before[pid] for pid in self._pids}

    def used(self, pids: Iterable[int]) -> float:
        return sum(self.processes[pid] for pid in pids)


def busy(seconds: float = BUSY_SECONDS) -> float:
    """Watch for a while; return the share of all processors that was used (0 to 1)."""
    used_before, all_before = _system()
    time.sleep(seconds)
    used, whole = _system()
    return (used - used_before) / max(whole - all_before, TICK_SECONDS)


def quiet(patience: float) -> float:
    """Wait until others use little, at most `patience` seconds; return the last share seen."""
    deadline = time.monotonic() + patience
    while (share := busy()) > QUIET_SHARE and time.monotonic() < deadline:
        pass
    return share


def _status(pid: int, field: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text(errors="replace").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise ProcessLookupError(f"process {pid} has ended: its status has no {field}")


def resident_kb(pid: int) -> int:
    """Return a process's resident memory in KiB (VmRSS). Raises OSError."""
    return _status(pid, "VmRSS")


def threads(pid: int) -> int:
    """Return how many threads a process has. Raises OSError."""
    return _status(pid, "Threads")


def _first(argv: list[str], directory: Path | None = None) -> str:
    """Return the first line that a command prints, "" when it cannot say."""
    done = subprocess.run(argv, cwd=directory, capture_output=True, text=True, check=False)
    return next(iter(done.stdout.splitlines()), "")


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def facts(root: Path) -> dict[str, Any]:
    """Return what a reader must know of the machine and of what ran on it. `root`: the checkout."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "kernel": platform.release(),
        "processor": _processor(),
        "processors": os.cpu_count(),
        "memory_gib": round(memory / 2**30, 1),
        "python": platform.python_version(),
        "commit": _first(["git", "rev-parse", "HEAD"], root),
        "changed_files": _first(["git", "status", "--porcelain", "-uno"], root) != "",
        "iperf3": _first(["iperf3", "--version"]),
        "load_average": [round(value, 2) for value in os.getloadavg()],
        "default_congestion_control": Path("/proc/sys/net/ipv4/tcp_congestion_control")
        .read_text()
        .strip(),
    }
