"""What ztunnel tells nodeagent of the connections that are there: a part of the seam.

This module owns the types of the question `connections` and of its answer, which are JSON inside
`ztunnel.protocol`'s `Query` and `Answer`. It promises what the others of the seam do: immutable
values, and a question that is refused when it is not understood. It may not look anything up.

A snapshot of many connections does not fit into one frame. So the answer is the first page and says
how many there are; the others are asked for by the snapshot's number, one after the other.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from datetime import datetime
from typing import Annotated

import msgspec

__all__ = ["Connection", "ConnectionFilter", "ConnectionPage", "Direction", "Security"]

MAX_NAME = 2048
"""As long as a SPIFFE ID may be; uids are shorter."""

MAX_LIMIT = 1_000_000
"""More than a core lists."""

_Name = Annotated[str, msgspec.Meta(max_length=MAX_NAME)]


class Direction(enum.StrEnum):
    """As the pod of this node sees it."""

    OUTBOUND = "outbound"
    INBOUND = "inbound"


class Security(enum.StrEnum):
    """How the bytes travel, between the two ends of what this connection is."""

    MUTUAL_TLS = "mutual_tls"
    DIRECT = "direct"
    """Between two pods of this node: identities known, nothing encrypted (`same_node`)."""
    PLAINTEXT = "plaintext"
    """To or from a workload of the mesh, or from whoever calls without identity."""
    PASSTHROUGH = "passthrough"
    """To an address that is no workload: carried as the application sends it."""
    UNDECIDED = "undecided"


class Connection(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """One application connection of a pod of this node, which is there now.

    `id` is the process and a number of its own: never used again. `pod` is the uid of the workload
    of this node, "namespace/name". `state` is "open", or what it still waits for: "deciding" (which
    way, and whether it may), "waiting" (for an HBONE connection), "connecting". Workloads, services
    and identities are "" where they are not known; an identity is one that was proved on this very
    connection, or by which it was decided.

    `policy` is who decided: "namespace/name" of a policy, "default:allow" where none is for the
    workload, "settings:node_plaintext"; "" for what is not judged here, that is what goes out.
    `rule` is its rule with file and line, where there is one. TLS is that of the HBONE connection
    that carries it, in OpenSSL's names.

    `received` came from the client, `sent` went to it. `moved` is when bytes last went either way.
    """

    id: str
    pod: str
    direction: Direction
    state: str
    security: Security
    source: str
    source_workload: str
    source_identity: str
    destination: str
    destination_workload: str
    destination_identity: str
    service: str
    hbone: str
    tls_version: str
    cipher: str
    key_exchange: str
    policy: str
    rule: str
    started: datetime
    moved: datetime | None
    received: int
    sent: int


class ConnectionFilter(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which connections; what is None does not matter.

    `pod` is a workload of this node. `identity` is either side's, whole or from a slash on
    ("ns/default/sa/sleep"). `limit` is how many, the newest first; 0 is all of them.
    """

    pod: _Name | None = None
    direction: Direction | None = None
    security: Security | None = None
    identity: _Name | None = None
    limit: Annotated[int, msgspec.Meta(ge=0, le=MAX_LIMIT)] = 0

    @classmethod
    def read(cls, values: Mapping[str, str]) -> ConnectionFilter:
        """Return the filter that text by name means. Raises ValueError: says what is wrong."""
        return msgspec.convert(dict(values), cls, strict=False)

    def written(self) -> dict[str, str]:
        """Return the text by name that `read` reads."""
        given = msgspec.structs.asdict(self)
        return {name: str(value) for name, value in given.items() if value is not None}

    def admits(self, connection: Connection) -> bool:
        return (
            self.pod in (None, connection.pod)
            and self.direction in (None, connection.direction)
            and self.security in (None, connection.security)
            and (
                self.identity is None
                or _names(self.identity, connection.source_identity)
                or _names(self.identity, connection.destination_identity)
            )
        )


def _names(wanted: str, identity: str) -> bool:
    return identity == wanted or identity.endswith(f"/{wanted}")


class ConnectionPage(msgspec.Struct, frozen=True, kw_only=True):
    """A part of a snapshot, which page 0 of `pages` describes whole.

    `total` are those that the filter admits, before its limit; `missed` found no room in the
    snapshot. `connections` are `Connection`s, not looked at by who only passes them on.
    """

    snapshot: int
    pages: int
    time: datetime
    total: int
    missed: int
    connections: list[msgspec.Raw]
