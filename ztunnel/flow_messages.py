"""What ztunnel tells nodeagent of who talked to whom: a part of the seam (`ztunnel.protocol`).

This module owns these messages' types. It promises what the others of the seam do: strict and
immutable values. It may not count anything, nor know who keeps what is told.
"""

from __future__ import annotations

import enum
from typing import Annotated

import msgspec

__all__ = ["Arrival", "Flow", "FlowKey", "Flows"]


_Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
"""What every reader of JSON and every column of a table holds exactly."""

_Port = Annotated[int, msgspec.Meta(ge=0, le=65535)]

_Name = Annotated[str, msgspec.Meta(max_length=2048)]
"""As long as a SPIFFE ID may be; uids, addresses and tokens are shorter."""


class Arrival(enum.StrEnum):
    """How connections came to the called pod."""

    HBONE = "hbone"
    PLAINTEXT = "plaintext"
    DIRECT = "direct"
    """From a pod of the same node, with identity and without encryption (`same_node`)."""


class FlowKey(msgspec.Struct, frozen=True, gc=False, forbid_unknown_fields=True):
    """Who called whom, and what was said to it.

    `identity` is the SPIFFE ID that the caller proved, empty without. `source` is its address in
    canonical text, `workload` the uid of the workload there, empty if there is none or it is not
    the one that proved itself. `destination` is the uid of the called workload of this node,
    `address` and `port` where it was called. `reason` is why the caller was refused, of the access
    log's tokens, empty if `allowed`.

    Without identity, source, address and port it stands for callers that found no room.
    """

    identity: _Name
    source: _Name
    workload: _Name
    arrival: Arrival
    destination: _Name
    address: _Name
    port: _Port
    allowed: bool
    reason: _Name = ""

    def folded(self) -> FlowKey:
        """Return the key that stands for all that differ in caller, address and port only."""
        return FlowKey("", "", "", self.arrival, self.destination, "", 0, self.allowed, self.reason)


class Flow(msgspec.Struct, frozen=True, gc=False, forbid_unknown_fields=True):
    """What was counted of a key since it was last told; none of it twice.

    `first` and `last` are seconds since the epoch: when something of it was first and last seen, a
    connection that is open included. `connections` are those that began, `open` those of them, or
    of earlier ones, that were open at the last look. `received` came from the caller.
    """

    key: FlowKey
    first: _Count
    last: _Count
    connections: _Count
    open: _Count
    received: _Count
    sent: _Count


class Flows(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="t", tag="flows"):
    """A portion of what was counted. Nothing is answered."""

    flows: tuple[Flow, ...]
