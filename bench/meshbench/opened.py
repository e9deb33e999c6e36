"""What a scrape takes beside thousands of open connections, and what it does to new ones.

This module owns that one measurement. It promises that as many connections as it says were open
from the first scrape to the last. They are of several pairs of pods: a tunnel gives a pod no more
descriptors than are still free (so that of N greedy pods each gets one part of N + 1), and its
connections take one each.
"""

from __future__ import annotations

import contextlib
import resource
from pathlib import Path
from typing import Final

from meshbench import held, host
from meshbench.bed import FailedError
from meshbench.observe import Values, asking, sound, watched
from meshbench.scenarios import Timing

__all__ = ["OPEN", "PAIRS", "measure"]

OPEN: Final = 15_000
PAIRS: Final = 10
"""Ten elevenths of a tunnel's descriptors are more than the three quarters that are wanted."""
DESCRIPTORS: Final = 20_000
"""That a process must be allowed for this."""
SCRAPES: Final = 10


def measure(tools: Path, timing: Timing) -> Values:
    """Return what scrapes take of the callers' node. Raises FailedError, LabError."""
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if allowed < DESCRIPTORS:
        raise FailedError(f"{OPEN} connections need {DESCRIPTORS} descriptors, not {allowed}")
    each = OPEN // PAIRS
    with contextlib.ExitStack() as stack:
        bed = stack.enter_context(watched("open", tools, pairs=PAIRS))
        holders: list[held.Steps] = []
        for index in range(PAIRS):
            where = (bed.lab.addresses(f"called-{index}")[0], str(bed.http_port), str(each))
            started = held.stepping(bed, "load", "idle", *where, pod=f"caller-{index}")
            holders.append(stack.enter_context(started))
        for holder in holders:
            holder.wait("ready")
        node = bed.lab.node("node-1")
        pid = bed.tunnels[node.name]
        with host.Meter([pid]) as resting:
            alone = sound(bed.load("connect", str(timing.requests), "1"))
        with host.Meter([pid]) as meter:
            texts = [node.metrics("ztunnel") for _ in range(SCRAPES)]
        with asking(bed, 0.0):
            beside = sound(bed.load("connect", str(timing.requests), "1"))
        counted = min(_gauge(text, "ztunnel_connections") for text in texts)
        if any(holder.end(end_of_input=True) != {"held": float(each)} for holder in holders):
            raise FailedError("a connection was lost beside scrapes")
    if counted < OPEN:
        raise FailedError(f"a scrape told of {counted:.0f} open connections, not of {OPEN}")
    return {
        "open_connections": counted,
        "open_cpu_ms": meter.used([pid]) / SCRAPES * 1000,
        "open_alone_p50_ns": alone["p50_ns"],
        "open_alone_p99_ns": alone["p99_ns"],
        "open_scraped_p50_ns": beside["p50_ns"],
        "open_scraped_p99_ns": beside["p99_ns"],
        "scraped_p99": beside["p99_ns"] / alone["p99_ns"],
        "open_alone_cpu_s": resting.used([pid]),
    }


def _gauge(text: str, name: str) -> float:
    return next(
        (float(line.split()[1]) for line in text.splitlines() if line.startswith(f"{name} ")), 0.0
    )
