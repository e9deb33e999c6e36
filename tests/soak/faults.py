"""What is done to the daemons during a soak, and what that excuses.

This module owns the kills, the edits of policy, and the judgement of each connection's outcome by
the times of both. It promises that a failure is excused only by what can have caused it: a kill of
a tunnel excuses the connections that were open at that moment, STRICT those in plaintext, and the
kill of an agent nothing; and that plaintext which passes while STRICT is certainly in force is
wrong. It may not make connections.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Final

from nodeagent.lab import LabNode
from soak.traffic import Ledger, Outcome
from support.e2e import Mesh, strict
from support.netns import wait_until

__all__ = ["PLAIN", "Faults", "judge"]

PLAIN: Final = "plaintext in"
"""The kind of connection that STRICT refuses."""

NOTICE_SECONDS: Final = 0.5
"""From a tunnel's death until the other node's tunnel has read the resets of what they shared: it
may open a stream on such a connection until then."""

RESTART_SECONDS: Final = 60.0

Span = tuple[float, float]


@dataclass
class Faults:
    """Does them, one at a time, and keeps their times (monotonic, seconds)."""

    mesh: Mesh
    kills: list[Span] = field(default_factory=list)
    """From the signal until everybody has noticed."""
    maybe_strict: list[Span] = field(default_factory=list)
    surely_strict: list[Span] = field(default_factory=list)
    done: Counter[str] = field(default_factory=Counter)

    def kill(self, node: LabNode, daemon: str) -> None:
        """Kill a daemon with SIGKILL and start it again. Raises TimeoutError."""
        process = node.process(daemon)
        began = time.monotonic()
        node.kill(daemon)
        wait_until(lambda: not process.alive(), f"{daemon} has ended")
        if daemon == "ztunnel":
            self.kills.append((began, time.monotonic() + NOTICE_SECONDS))
        node.restart(daemon)
        wait_until(
            lambda: self.mesh.ready(node.name, daemon), f"{daemon} is ready", RESTART_SECONDS
        )
        self.done[f"kill {daemon}"] += 1

    def strict(self, seconds: float) -> None:
        """Put STRICT in force for the server, for so long, and take it back."""
        began = time.monotonic()
        self.mesh.policy("far", strict("far"), mode="STRICT", name="soak")
        sure = time.monotonic()
        time.sleep(seconds)  # the soak's own rhythm: nothing is waited for
        unsure = time.monotonic()
        self.mesh.withdraw("soak")
        self.mesh.settled("node-2", lambda state: _mode(state, "shop/far") == "PERMISSIVE")
        self.maybe_strict.append((began, time.monotonic()))
        self.surely_strict.append((sure, unsure))
        self.done["STRICT and back"] += 1


def _mode(state: dict[str, list[dict[str, str]]], workload: str) -> str:
    return next(row["mode"] for row in state["pods"] if row["workload"] == workload)


def _meets(began: float, ended: float, spans: list[Span]) -> bool:
    return any(began <= end and ended >= start for start, end in spans)


def _within(began: float, ended: float, spans: list[Span]) -> bool:
    return any(start <= began and ended <= end for start, end in spans)


def judge(ledger: Ledger, faults: Faults) -> tuple[Counter[str], list[str]]:
    """Return the excused failures by their excuse, and everything that is wrong."""
    excused: Counter[str] = Counter()
    wrong = list(ledger.wrong)
    for outcome in ledger.failed:
        if _meets(outcome.began, outcome.ended, faults.kills):
            excused["open when a tunnel was killed"] += 1
        elif outcome.kind == PLAIN and _meets(outcome.began, outcome.ended, faults.maybe_strict):
            excused["plaintext under STRICT"] += 1
        else:
            wrong.append(_told(outcome))
    for began, ended in ledger.passed.get(PLAIN, []):
        if _within(began, ended, faults.surely_strict):
            wrong.append(f"plaintext passed under STRICT, from {began:.3f} to {ended:.3f}")
    return excused, wrong


def _told(outcome: Outcome) -> str:
    lasted = outcome.ended - outcome.began
    return f"{outcome.kind}, from {outcome.began:.3f} for {lasted:.3f} s: {outcome.problem}"
