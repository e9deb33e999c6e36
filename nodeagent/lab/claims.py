"""What is said about a running lab, and whether it holds.

This module owns claims and the ways to check them: waiting for what should be true at once, and
reading what programs and logs have said. It promises that a claim is recorded as it was found, good
or not, and that no wait is without an end. It may not change a lab.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

__all__ = ["CURL_REFUSALS", "LIVE_SECONDS", "Claim", "Claims", "chain", "host", "polled"]

LIVE_SECONDS: Final = 10.0
"""How long is waited for what should take a second at most: log lines, an edit."""
STEP_SECONDS: Final = 0.05

CURL_REFUSALS: Final = frozenset({7, 52, 56})
"""curl's exit codes for a connection that was refused, closed without an answer, or reset."""


class Claim(NamedTuple):
    """Something said about this run, and whether it held."""

    text: str
    holds: bool


class Claims:
    """Shows claims as they are made, and keeps them."""

    def __init__(self, show: Callable[[str], None]) -> None:
        self.show = show
        self.made: list[Claim] = []

    def heading(self, text: str) -> None:
        self.show(f"\n{text}")

    def claim(self, text: str, holds: bool) -> None:  # noqa: FBT001 - the second half of every claim
        self.made.append(Claim(text, holds))
        self.show(f"  {'ok    ' if holds else 'FAILED'} {text}")

    def summary(self) -> None:
        held = sum(claim.holds for claim in self.made)
        self.show(f"\n{held} of {len(self.made)} claims were checked and hold.")


def polled(condition: Callable[[], bool], seconds: float = LIVE_SECONDS) -> bool:
    """Ask until it holds, or the time is over."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(STEP_SECONDS)
    return True


def host(address: object) -> str:
    """Return the address of "a.b.c.d:port" or "[v6]:port"."""
    return str(address).rpartition(":")[0].strip("[]")


def chain(body: str) -> Iterator[str]:
    """Return the names of the services that answered, in the order of their calls."""
    answer = json.loads(body)
    while answer:
        yield answer["name"]
        answer = next(iter(answer.get("upstream_calls", [])), None)
