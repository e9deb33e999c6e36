"""The published shape of `/asdex`: values only.

This module owns the types that `/asdex` encodes, and the page and the command line decode. It
promises that within one `SCHEMA` fields are only added, never renamed, retyped or removed; and that
a score is 1 only if it is exactly that, however a reader rounds. Times are RFC 3339 in UTC. Names
are as the mesh and the callers have them, and whoever shows them escapes them. Pure: no sockets, no
clocks.
"""

from __future__ import annotations

import enum
from datetime import datetime
from typing import Final

import msgspec

__all__ = [
    "SCHEMA",
    "WEIGHTS",
    "AsdexNamespace",
    "AsdexReport",
    "AsdexWorkload",
    "Check",
    "Loss",
]

SCHEMA: Final = 1
"""Raised when a field changes its meaning; readers refuse what they do not know."""


class Check(enum.StrEnum):
    """What a connection that was let in can lose points by."""

    IDENTITY = "identity"
    """The caller proved none: it has no points at all."""
    POLICY = "policy"
    """No policy that names who may call let it in."""
    ENCRYPTED = "encrypted"
    """Its bytes were not encrypted: within one node, under `same_node: direct`."""
    STRICT = "strict"
    """A caller without identity could have come the same way."""
    EXACT = "exact"
    """The rule that let it in has a pattern for callers, or there is none."""
    SHORT_LIVED = "short_lived"
    """The certificate of the one that was called is valid for longer than a day."""


WEIGHTS: Final = {
    Check.IDENTITY: 50,
    Check.POLICY: 30,
    Check.ENCRYPTED: 5,
    Check.STRICT: 5,
    Check.EXACT: 5,
    Check.SHORT_LIVED: 5,
}
"""Points that a connection has by each, 100 with all. Who lacks an identity has none."""


class Loss(msgspec.Struct, frozen=True, kw_only=True):
    """What some connections cost a workload. `cost` is a part of 1; the costs and the score add up.

    `caller` is a SPIFFE ID, a workload's uid or an address, empty where all callers lose alike.
    `policy` is what the loss is due to, with its file and line, empty if nothing is.
    """

    check: Check
    cost: float
    connections: int
    reason: str
    caller: str = ""
    policy: str = ""


class AsdexWorkload(msgspec.Struct, frozen=True, kw_only=True):
    """A workload of this node. `score` is rounded down to hundredths, None without connections.

    Exactly it is `points` by 100 `connections`: those that were let in. `losses` are the greatest
    first; those that found no room cost `left_out` together.
    """

    workload: str
    namespace: str
    score: float | None
    points: int
    connections: int
    losses: tuple[Loss, ...] = ()
    left_out: float = 0.0


class AsdexNamespace(msgspec.Struct, frozen=True, kw_only=True):
    """The workloads of a namespace, as far as they are of this node, by their connections."""

    namespace: str
    score: float | None
    points: int
    connections: int


class AsdexReport(msgspec.Struct, frozen=True, kw_only=True):
    """How well the connections to one node's workloads were protected from `since` to `time`.

    `complete`: everything of that time is in it. `problem` says why recording does not work now.
    """

    schema: int
    node: str
    time: datetime
    since: datetime
    complete: bool
    score: float | None
    points: int
    connections: int
    namespaces: tuple[AsdexNamespace, ...]
    workloads: tuple[AsdexWorkload, ...]
    problem: str = ""
