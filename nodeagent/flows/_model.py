"""What is read back of recorded flows: values, as `/flows` publishes them.

This module owns the types. It promises that within one `SCHEMA` fields are only added, never
renamed, retyped or removed. Pure: no files, no clocks.
"""

from __future__ import annotations

from datetime import datetime
from typing import Final

import msgspec

__all__ = ["SCHEMA", "Gap", "Recorded", "Recording"]

SCHEMA: Final = 1
"""Raised when a field changes its meaning; readers refuse what they do not know."""


class Recorded(msgspec.Struct, frozen=True, kw_only=True):
    """One caller of one port of one workload, as far as it was judged alike.

    `identity` is the SPIFFE ID that the caller proved, empty without. `source` is its address,
    `workload` the uid of the workload there, empty if it is none that is known. `arrival` is
    "hbone", "plaintext" or "direct". `reason` is why it was refused or, if it was `allowed`, why
    its connections came to nothing; empty for those that were carried. `connections` began in the
    time that was asked for; `most_open` were open at once, older ones included, and `carried` were
    open when that time began. Without source, address and port it stands for callers that found no
    room one by one.

    `outbound`: the caller is of this node, and tells of it; else the one that was called is and
    does. `service` is the host name through which it was called, `policy` the policy that decided;
    each is empty where it is not known.
    """

    identity: str
    source: str
    workload: str
    arrival: str
    destination: str
    address: str
    port: int
    allowed: bool
    reason: str
    first: datetime
    last: datetime
    connections: int
    most_open: int
    received: int
    sent: int
    carried: int = 0
    outbound: bool = False
    service: str = ""
    policy: str = ""

    @property
    def is_folded(self) -> bool:
        """True where it stands for several callers that are not known one by one."""
        return not self.port


class Gap(msgspec.Struct, frozen=True, kw_only=True):
    """A time of which not everything is known, and the cause. Times are RFC 3339 in UTC."""

    begin: datetime
    until: datetime
    cause: str


class Recording(msgspec.Struct, frozen=True, kw_only=True):
    """The flows since a moment, the last seen first. Times are RFC 3339 in UTC.

    `oldest` is the hour from which on anything is kept, None if nothing is. `truncated`: there are
    more than fit an answer. `problem` says why recording does not work now.

    Who was let in is recorded without a gap from `complete` up to `time`; None: there is one now.
    `gaps` are those since `since`, and `down` is when no ztunnel ran, so that nobody was let in.
    `watched` are the workloads that are captured, with since when that is known.
    """

    schema: int
    node: str
    time: datetime
    since: datetime
    oldest: datetime | None
    flows: tuple[Recorded, ...]
    truncated: bool = False
    problem: str = ""
    complete: datetime | None = None
    gaps: tuple[Gap, ...] = ()
    down: tuple[Gap, ...] = ()
    watched: dict[str, datetime] = {}

    @property
    def is_complete(self) -> bool:
        """True where nobody can have called unrecorded since `since`, of who could be called."""
        return not (self.gaps or self.truncated or self.complete is None)
