"""What ztunnel tells nodeagent of who talked to whom: a part of the seam (`ztunnel.protocol`).

This module owns these messages' types. It promises what the others of the seam do: strict and
immutable values. It may not count anything, nor know who keeps what is told.
"""

from __future__ import annotations

import enum
from typing import Annotated, Final

import msgspec

__all__ = ["MAX_NAME", "Arrival", "Flow", "FlowKey", "Flows"]


_Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
"""What every reader of JSON and every column of a table holds exactly."""

_Port = Annotated[int, msgspec.Meta(ge=0, le=65535)]

MAX_NAME: Final = 2048

_Name = Annotated[str, msgspec.Meta(max_length=MAX_NAME)]
"""As long as a SPIFFE ID may be; uids, addresses and tokens are shorter."""


class Arrival(enum.StrEnum):
    """How connections came to the called pod, or left the calling one."""

    HBONE = "hbone"
    PLAINTEXT = "plaintext"
    DIRECT = "direct"
    """From a pod of the same node, with identity and without encryption (`same_node`)."""


class FlowKey(msgspec.Struct, frozen=True, gc=False, forbid_unknown_fields=True):
    """Who called whom, and what became of it.

    `identity` is the SPIFFE ID that the caller proved, empty without. `source` is its address in
    canonical text, `workload` the uid of the workload there, empty if there is none or it is not
    the one that proved itself. `destination` is the uid of the called workload of this node,
    `address` and `port` where it was called. `reason` is of the access log's tokens: why the caller
    was refused, or, if it was `allowed`, why connections came to nothing; empty for those that were
    carried. `policy` names the policy that decided, empty if none did.

    Of an `outbound` flow it is the caller that is of this node: `workload` is its uid, and `source`
    is left empty, while `destination` is empty if it is no workload of the mesh, and `port` is one
    of its own, not of the `service` (a host name) through which it may have been called.

    Without identity, source, address and port it stands for flows that found no room.
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
    outbound: bool = False
    service: _Name = ""
    policy: _Name = ""

    @property
    def owner(self) -> tuple[bool, str]:
        """Whose flow it is: `outbound`, and the uid of this node's workload."""
        return (True, self.workload) if self.outbound else (False, self.destination)

    def folded(self) -> FlowKey:
        """Return the key that stands for all of its owner that end alike."""
        _, uid = self.owner
        return FlowKey(
            identity="",
            source="",
            workload=uid if self.outbound else "",
            arrival=self.arrival,
            destination="" if self.outbound else uid,
            address="",
            port=0,
            allowed=self.allowed,
            reason=self.reason,
            outbound=self.outbound,
        )


class Flow(msgspec.Struct, frozen=True, gc=False, forbid_unknown_fields=True):
    """What was counted of a key since it was last told; none of it twice.

    `first` and `last` are seconds since the epoch: when something of it was first and last seen, a
    connection that is open included. `connections` are those that began, `open` those of them, or
    of earlier ones, that were open at the last look, and `carried` those that were open when the
    key was told before. `received` came from the caller.
    """

    key: FlowKey
    first: _Count
    last: _Count
    connections: _Count
    open: _Count
    received: _Count
    sent: _Count
    carried: _Count = 0


class Flows(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="t", tag="flows"):
    """A portion of what was counted. Nothing is answered.

    `number` counts what one process has told, from 1: where one is missing, what it told is lost.
    With this message everything has been told that was counted from `since`, when the process began
    to count, to `until`, seconds since the epoch; if there is `more`, not before the last portion.
    `last`: the process ends, and has let nobody in since.
    """

    flows: tuple[Flow, ...]
    number: _Count
    since: _Count
    until: _Count
    more: bool = False
    last: bool = False
