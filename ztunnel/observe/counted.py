"""What is counted beside the core: verdicts, connections by the rule that decided, and plaintext.

This module owns these counts, and when counts of what is gone are forgotten. It promises that each
is bounded, whatever callers and policies are like, and that forgetting begins EXPIRY_SECONDS after
the last connection. It may not judge.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, NamedTuple

from ztunnel.authorize import Client, Verdict
from ztunnel.observe import labels as label_sets
from ztunnel.observe.tallies import Tally
from ztunnel.protocol import Arrival, FlowKey

if TYPE_CHECKING:
    from ztunnel.observe.labels import Labels
    from ztunnel.observe.series import SeriesTable
    from ztunnel.state import State

__all__ = ["OTHER", "ByPolicy", "Counted", "Judged", "Plaintext"]

MAX_RULES: Final = 2000
"""Rules whose verdicts are counted one by one: more than people write for the pods of one node."""

MAX_PLAINTEXT: Final = 4000
"""Pairs of workloads that talk in plaintext, counted one by one. A node has some hundred pods, and
those who still call them so are few."""

LOOK_SECONDS: Final = 30.0
"""Between looks for what is gone: a look at ten thousand idle label sets takes some 10 ms."""

OTHER: Final = "other"
"""What is beyond a limit."""


class Judged(NamedTuple):
    """What is counted of a verdict. `would` is that of the dry run, the verdict's own without."""

    client: Client
    allow: bool
    audited: bool
    would: bool


class ByPolicy(NamedTuple):
    """What decided: the rule (`OTHER` for many), or the `reason` of a refusal without a rule."""

    rule: str
    reason: str
    allow: bool


class Plaintext(NamedTuple):
    """Who called whom: uids of workloads, "" for a source that is none of the mesh's."""

    source: str
    destination: str
    allow: bool


class Counted:
    """The counts. `clock` is monotonic, seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._looked = clock()
        self.judged: Counter[Judged] = Counter()
        """Verdicts on who wanted in; of one verdict many connections may live."""
        self.by_policy: Tally[ByPolicy] = Tally(clock, MAX_RULES, _other_policy)
        """Connections that came in, or were refused, by what decided."""
        self.plaintext: Tally[Plaintext] = Tally(clock, MAX_PLAINTEXT, _other_pair)
        """Connections that came in plaintext, from outside of this node's own hand-overs."""

    def verdict(self, verdict: Verdict) -> None:
        if verdict.client is None:
            return
        would = verdict.allow if verdict.dry_run is None else verdict.dry_run.allow
        self.judged[Judged(verdict.client, verdict.allow, bool(verdict.audits), would)] += 1

    def came_in(self, key: FlowKey, number: int) -> None:
        """Count connections to a pod of this node."""
        if key.arrival is Arrival.PLAINTEXT:
            self.plaintext.add(Plaintext(key.workload, key.destination, key.allowed), number)
        if not key.port:
            # Of flows that found no room nobody knows any more what decided.
            rule, reason = OTHER, ""
        elif key.policy or key.allowed:
            rule, reason = key.policy, ""
        else:
            rule, reason = "", key.reason
        self.by_policy.add(ByPolicy(rule, reason, key.allowed), number)

    def expire(self, state: State, series: SeriesTable, early: Tally[tuple[Labels, str]]) -> None:
        """Forget, now and then, what is no longer in the mesh; call as often as you like."""
        now = self._clock()
        if now - self._looked < LOOK_SECONDS:
            return
        self._looked = now
        known = state.workloads

        def is_gone(labels: Labels) -> bool:
            return any(uid not in known for uid in label_sets.workloads(labels))

        series.expire(is_gone)
        early.expire(lambda key: is_gone(key[0]))
        self.plaintext.expire(
            lambda key: any(uid and uid not in known for uid in (key.source, key.destination))
        )


def _other_policy(key: ByPolicy) -> ByPolicy:
    return ByPolicy(OTHER, "", key.allow)


def _other_pair(key: Plaintext) -> Plaintext:
    return Plaintext(OTHER, OTHER, key.allow)
