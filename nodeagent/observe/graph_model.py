"""The published shape of `/graph`: values only.

This module owns the types that `/graph` encodes, and the page and the command line decode. It
promises that within one `SCHEMA` fields are only added, never renamed, retyped or removed. Times
are RFC 3339 in UTC. Nothing in here is a secret; names are as the mesh and the callers have them,
and whoever shows them escapes them. Pure: no sockets, no clocks.
"""

from __future__ import annotations

import enum
from datetime import datetime
from typing import Final

import msgspec

__all__ = [
    "NODE",
    "OUTSIDE",
    "SCHEMA",
    "UNKNOWN",
    "Connections",
    "Edge",
    "Graph",
    "Kind",
    "Padlock",
    "Reporter",
    "Vertex",
]

SCHEMA: Final = 1
"""Raised when a field changes its meaning; readers refuse what they do not know."""

NODE: Final = "node"
"""The vertex of the node's own processes, the kubelet's probes among them."""

OUTSIDE: Final = "outside"
"""The vertex of every address that is neither a workload's nor the node's."""

UNKNOWN: Final = "unknown"
"""The vertex of those that found no room one by one, and were counted together."""


class Kind(enum.StrEnum):
    """What a vertex stands for."""

    WORKLOAD = "workload"
    NODE = "node"
    OUTSIDE = "outside"
    """Not of the mesh: all addresses that nothing is known of, or the host of one ServiceEntry."""
    UNKNOWN = "unknown"
    """An identity that no workload of the mesh has, or several that are not known one by one."""


class Padlock(enum.StrEnum):
    """How much of what was carried was mutual TLS: by traffic, never by configuration."""

    ALL = "all"
    SOME = "some"
    """Also if one connection of a million was not."""
    NONE = "none"
    NO_DATA = "no data"
    """Nothing was carried: refused and failed connections lock nothing."""


class Reporter(enum.StrEnum):
    """Whose account the numbers are."""

    DESTINATION = "destination"
    SOURCE = "source"


class Connections(msgspec.Struct, frozen=True, kw_only=True):
    """Connections that carried, or could have, by how they were secured; each is in one number.

    `direct` went between two pods of this node: both identities are proved, nothing is encrypted.
    `plaintext` is what the mesh did not secure: what the applications do themselves is not known.
    """

    mutual_tls: int = 0
    direct: int = 0
    plaintext: int = 0

    @property
    def total(self) -> int:
        return self.mutual_tls + self.direct + self.plaintext


class Vertex(msgspec.Struct, frozen=True, kw_only=True):
    """`id` is "namespace/name" of a workload, else a name of its own: NODE, OUTSIDE, UNKNOWN, the
    host of a ServiceEntry, or the SPIFFE ID of somebody who is no workload of this mesh.

    `identities` are those that it proved or was called under. `local`: bound to this node. `mode`
    is the PeerAuthentication mode in force, empty where this node does not judge it, `state` a
    PodState, empty where it is not local. `asdex` is 0 to 1, None without data.
    """

    id: str
    kind: Kind
    name: str
    namespace: str = ""
    identities: tuple[str, ...] = ()
    local: bool = False
    mode: str = ""
    state: str = ""
    asdex: float | None = None


class Edge(msgspec.Struct, frozen=True, kw_only=True):
    """Who called whom at which port of the workload; there is one edge for each such three.

    Who comes in plaintext is known by his address alone: `source_identity` is empty then.

    `connections` were open in the window, begun in it or before. `refused` were turned away by a
    judgement, `failed` came to nothing otherwise; `reasons` says why, of both. `protected_share` is
    mutual TLS's part of what was carried, None of nothing. Bytes are those that the source sent and
    received. `policies` let in or kept out. `service` is through which it was called, as far as
    that is known. `addresses` are some of those that an OUTSIDE stands for. `first` and `last` are
    when anything of it was seen, to a few seconds; what was open before the window counts from its
    beginning.
    """

    source: str
    destination: str
    port: int
    service: str = ""
    connections: Connections
    refused: int
    failed: int
    reasons: dict[str, int]
    padlock: Padlock
    protected_share: float | None
    bytes_sent: int
    bytes_received: int
    policies: tuple[str, ...]
    source_identity: str = ""
    destination_identity: str = ""
    first: datetime
    last: datetime
    reporter: Reporter
    addresses: tuple[str, ...] = ()


class Graph(msgspec.Struct, frozen=True, kw_only=True):
    """What this node saw in the `window_seconds` up to `time`.

    `complete`: all of the window was recorded. `truncated`: there were more edges or vertices than
    fit; those left out were seen the longest ago. `problem` says why recording does not work now.
    """

    schema: int
    time: datetime
    node: str
    window_seconds: int
    complete: bool
    vertices: tuple[Vertex, ...]
    edges: tuple[Edge, ...]
    truncated: bool = False
    problem: str = ""
