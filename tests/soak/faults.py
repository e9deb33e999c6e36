"""What is done to the daemons during a soak, and what that excuses.

This module owns the kills, the upgrades, the edits of policy, and the judgement of each outcome by
their times. It promises that a failure is excused only by what can have caused it: the
kill of a tunnel excuses the connections that were open at that moment, STRICT those in plaintext,
and the upgrade of a tunnel, the restart or the kill of an agent nothing; and that plaintext which
passes while STRICT is certainly in force is wrong. It may not make connections.
"""

from __future__ import annotations

import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

from nodeagent.lab import LabError, LabNode
from nodeagent.lab.processes import ProcessRecord, record_of
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

DRAIN_SECONDS: Final = 120.0
"""For the longest connection of the load, which a replaced tunnel carries to its end."""

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

    @property
    def kinds(self) -> dict[str, Callable[[LabNode], None]]:
        """What can be done to a node, by name."""
        return {
            "kill nodeagent": self._kill_nodeagent,
            "upgrade ztunnel": self._upgrade,
            "kill ztunnel": self._kill_ztunnel,
            "restart nodeagent": self._restart,
        }

    def do(self, kind: str, node: LabNode) -> None:
        """Do it and wait until all is well again. Raises TimeoutError."""
        self.kinds[kind](node)
        self.done[kind] += 1

    def serving(self, node: str) -> ProcessRecord:
        """Return the tunnel that serves a node; it is not the lab's own once it was upgraded."""
        wait_until(
            lambda: bool(self._tunnel(node)["connected"]), "a ztunnel serves", RESTART_SECONDS
        )
        record = record_of(self._tunnel(node)["pid"])
        if record is None:
            raise LabError(f"the ztunnel of {node} has just ended")
        return record

    def drained(self, node: str) -> bool:
        """Whether no replaced tunnel of a node is left."""
        return not self._tunnel(node)["draining"]

    def _tunnel(self, node: str) -> dict[str, Any]:
        found: dict[str, Any] = self.mesh.status(node)["ztunnel"]
        return found

    def _kill_nodeagent(self, node: LabNode) -> None:
        process = node.process("nodeagent")
        process.send(signal.SIGKILL)
        wait_until(lambda: not process.alive(), "nodeagent has ended")
        self._restart(node)

    def _kill_ztunnel(self, node: LabNode) -> None:
        self._settle(node)
        process = self.serving(node.name)
        began = time.monotonic()
        process.send(signal.SIGKILL)
        wait_until(lambda: not process.alive(), "ztunnel has ended")
        self.kills.append((began, time.monotonic() + NOTICE_SECONDS))
        node.restart("ztunnel")
        self._back(node, "ztunnel")

    def _upgrade(self, node: LabNode) -> None:
        self._settle(node)
        before = self.serving(node.name)
        before.send(signal.SIGHUP)

        def replaced() -> bool:
            found = self._tunnel(node.name)
            return bool(found["connected"] and found["pid"] != before.pid)

        wait_until(replaced, f"a successor serves {node.name}", RESTART_SECONDS)
        self._back(node, "ztunnel")

    def _restart(self, node: LabNode) -> None:
        node.restart("nodeagent")
        self._back(node, "nodeagent")

    def _settle(self, node: LabNode) -> None:
        """Let a replaced tunnel end first: its connections must fail by no fault but their own."""
        wait_until(partial(self.drained, node.name), f"nobody drains on {node.name}", DRAIN_SECONDS)

    def _back(self, node: LabNode, daemon: str) -> None:
        wait_until(
            lambda: self.mesh.ready(node.name, daemon), f"{daemon} is ready", RESTART_SECONDS
        )

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
