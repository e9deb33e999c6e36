"""The published shape of `/report/plaintext`: values only.

This module owns the types that `/report/plaintext` encodes, and the page and the command line
decode. It promises that within one `SCHEMA` fields are only added, never renamed, retyped or
removed. Times are RFC 3339 in UTC. Names are as the mesh and the callers have them, and whoever
shows them escapes them. Pure: no sockets, no clocks.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from datetime import datetime
from typing import Final

import msgspec

from nodeagent.flows import Gap

__all__ = [
    "SCHEMA",
    "Effect",
    "Origin",
    "OwnMode",
    "PlaintextCaller",
    "PlaintextNamespace",
    "PlaintextReport",
    "PlaintextWorkload",
    "Verdict",
    "worst",
]

SCHEMA: Final = 1
"""Raised when a field changes its meaning; readers refuse what they do not know."""


class Verdict(enum.StrEnum):
    """Whether nobody who has called would be refused, were it STRICT."""

    SAFE = "safe"
    NOT_SAFE = "not safe"
    NOT_KNOWN = "not known"


class Effect(enum.StrEnum):
    """What becomes of a caller without identity under STRICT."""

    BREAKS = "breaks"
    NOT_KNOWN = "not known"
    STAYS = "stays"
    REFUSED = "refused"
    """It is refused without STRICT, too."""


class Origin(enum.StrEnum):
    """Where a caller without identity is."""

    POD = "pod"
    """At the address of a workload of the mesh."""
    NODE = "node"
    OUTSIDE = "outside"
    UNKNOWN = "unknown"
    """It found no room one by one, and was counted with others."""


class OwnMode(msgspec.Struct, frozen=True, kw_only=True):
    """A port that has a mode of its own, which another mode of its workload leaves as it is."""

    port: int
    mode: str
    origin: str


class PlaintextCaller(msgspec.Struct, frozen=True, kw_only=True):
    """Calls without identity from one place to one port, and what becomes of them.

    `workload` is the uid of the workload at `source`, empty if there is none. `connections` were
    open at some time of the report. `reason` says in words why, `policy` which one decides then,
    with its file and line, empty if none has a say.
    """

    kind: Origin
    workload: str
    source: str
    port: int
    connections: int
    first: datetime
    last: datetime
    effect: Effect
    reason: str
    policy: str = ""


class PlaintextWorkload(msgspec.Struct, frozen=True, kw_only=True):
    """A workload of this node. `reasons` are those of the verdict, the heaviest first.

    `state` is that of its pod, empty if it is gone: what called it may call what came for it.
    Callers have been recorded without a gap from `since` on, None: they are not now. Connections
    let in are those `without_identity` and `with_identity`; `refused` ones had none.
    """

    workload: str
    namespace: str
    state: str
    mode: str
    mode_origin: str
    port_modes: tuple[OwnMode, ...]
    verdict: Verdict
    reasons: tuple[str, ...]
    since: datetime | None
    without_identity: int
    with_identity: int
    refused: int
    last: datetime | None
    """When somebody without identity was last let in."""
    callers: tuple[PlaintextCaller, ...]
    left_out: int = 0
    """Callers that found no room in this report."""


class PlaintextNamespace(msgspec.Struct, frozen=True, kw_only=True):
    """The workloads of a namespace, as far as they are of this node, by their verdict."""

    namespace: str
    verdict: Verdict
    safe: int
    not_safe: int
    not_known: int


class PlaintextReport(msgspec.Struct, frozen=True, kw_only=True):
    """Who has called the workloads of one node without an identity from `since` to `time`.

    Callers have been recorded without a gap from `complete` on, None: they are not now. `gaps` are
    those since `since`, and `down` is when no ztunnel ran, so that nobody was let in. `truncated`:
    more was recorded than was looked at. `problem` says why recording does not work now.
    """

    schema: int
    node: str
    time: datetime
    since: datetime
    complete: datetime | None
    verdict: Verdict
    namespaces: tuple[PlaintextNamespace, ...]
    workloads: tuple[PlaintextWorkload, ...]
    gaps: tuple[Gap, ...] = ()
    down: tuple[Gap, ...] = ()
    truncated: bool = False
    problem: str = ""


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """Return the verdict on all together."""
    found = set(verdicts)
    for each in (Verdict.NOT_SAFE, Verdict.NOT_KNOWN):
        if each in found:
            return each
    return Verdict.SAFE
