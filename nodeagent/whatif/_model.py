"""What a comparison says: values, as `nodeagent policy diff -o json` writes them.

This module owns the types. It promises that within one `DIFF_SCHEMA` fields are only added, never
renamed, retyped or removed. Pure.
"""

from __future__ import annotations

from datetime import datetime
from typing import Final

import msgspec

__all__ = [
    "DIFF_SCHEMA",
    "CallChange",
    "Comparison",
    "DiffReport",
    "FlowChange",
    "ModeChange",
    "Replay",
    "Side",
]

DIFF_SCHEMA: Final = 1


class Side(msgspec.Struct, frozen=True, kw_only=True):
    """What becomes of a call. `reason` is empty if it is let in, else a token of the access log.

    `origin` names the rule or policy that decides with its file and line, empty if none had a say.
    `judged` is false where no agent judges: the workload is outside the mesh, or not there.
    """

    allowed: bool
    reason: str = ""
    origin: str = ""
    judged: bool = True


class ModeChange(msgspec.Struct, frozen=True, kw_only=True):
    """Workloads whose mutual TLS mode changes on a port ("" for all that are not named)."""

    workloads: tuple[str, ...]
    port: str
    old: str
    new: str
    origin: str


class CallChange(msgspec.Struct, frozen=True, kw_only=True):
    """Calls that become something else: of each of `callers`, to each of `workloads` and `ports`.

    A port is a number, "other" for those that no policy names, or "all"; " at ADDRESS" behind it
    where policies tell a workload's addresses apart. A caller is a SPIFFE ID, or words for callers
    that have none, or that stand for many; " from NETWORK" behind it is the narrowest network that
    policies name and that it calls from.
    """

    callers: tuple[str, ...]
    workloads: tuple[str, ...]
    ports: tuple[str, ...]
    old: Side
    new: Side


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """How two configurations differ in what they decide, whoever calls.

    `refused` calls are let in by the old one and not by the new one, `admitted` the other way
    round. `unlooked` counts pairs of caller and workload that were not looked at, for there are too
    many; `sampled`: of callers that the same patterns match, some stand for all.
    """

    modes: tuple[ModeChange, ...]
    refused: tuple[CallChange, ...]
    admitted: tuple[CallChange, ...]
    workloads_added: tuple[str, ...]
    workloads_removed: tuple[str, ...]
    sampled: bool
    unlooked: int
    left_out: int
    """Changes that found no room in this report."""


class FlowChange(msgspec.Struct, frozen=True, kw_only=True):
    """A caller that has called, and what would become of the same call.

    `identity` is empty without one. `sources` are the first of `source_count` addresses.
    """

    identity: str
    workload: str
    sources: tuple[str, ...]
    source_count: int
    arrival: str
    destination: str
    port: int
    connections: int
    most_open: int
    first: datetime
    last: datetime
    old: Side
    new: Side


class Replay(msgspec.Struct, frozen=True, kw_only=True):
    """What would become of recorded flows. Times are RFC 3339 in UTC.

    `unknown` connections cannot be judged again: their callers were not recorded one by one, and
    some of the workloads that they called are judged otherwise. `otherwise` flows were judged
    differently when they came than the old configuration would. `elsewhere` flows went to workloads
    that neither configuration has, `removed` to such as the new one has not, where nobody will
    judge. `unjudged` were refused for reasons that are no policy's.
    """

    source: str
    since: datetime
    oldest: datetime | None
    flows: int
    connections: int
    breaks: tuple[FlowChange, ...]
    admits: tuple[FlowChange, ...]
    unknown: int
    otherwise: int
    elsewhere: int
    removed: int
    unjudged: int
    left_out: int
    """Changes that found no room in this report."""
    truncated: bool
    """More was recorded than fits an answer: the last seen were looked at."""
    problem: str = ""


class DiffReport(msgspec.Struct, frozen=True, kw_only=True):
    """The whole answer. `breaks` is what the exit code says."""

    schema: int
    old: str
    new: str
    breaks: bool
    comparison: Comparison
    flows: Replay | None
