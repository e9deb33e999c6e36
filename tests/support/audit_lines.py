"""What tests of the audit log share: entries, and readers of what sinks get.

Owns builders whose defaults are the caller that everybody knows, and the reader of the journal's
native protocol, written from systemd's description of it.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from support.mesh_state import identity, workload
from ztunnel.audit.entry import Entry, Event, of_verdict
from ztunnel.authorize import Client, Verdict
from ztunnel.observe import labels
from ztunnel.observe.access_log import Line
from ztunnel.protocol import Mode
from ztunnel.reasons import Reason

__all__ = ["ALLOWED", "REFUSED", "TIME", "entry", "heard", "journal_fields", "line", "listening"]

TIME: Final = 1_623_666_479.758123
"""2021-06-14T10:27:59.758123Z."""

RULE: Final = "bookstore/strict rules[0] (mesh.yaml:12)"

ALLOWED: Final = Verdict(
    allow=True, reason=Reason.CLOSED, origin=RULE, mode=Mode.STRICT, client=Client.ALLOWED
)
REFUSED: Final = Verdict(
    allow=False,
    reason=Reason.POLICY_DENIED,
    origin="bookstore/default rules[1] (mesh.yaml:30)",
    mode=Mode.PERMISSIVE,
    client=Client.NOT_ALLOWED,
)

SLEEP: Final = workload("sleep", "10.1.0.1")
BOOKS: Final = workload("books", "10.2.0.1", namespace="bookstore")


def line(principal: str = identity("sleep"), **fields: Any) -> Line:  # noqa: ANN401 - its fields
    found = labels.make(
        labels.DESTINATION,
        labels.MUTUAL_TLS if principal else labels.PLAINTEXT,
        SLEEP,
        BOOKS,
        None,
        source_principal=principal,
        destination_principal=identity("books", "bookstore") if principal else "",
    )
    values: dict[str, Any] = {
        "start": TIME - 1,
        "duration_us": 1_000_000,
        "direction": "inbound",
        "source": "10.1.0.1:4000",
        "destination": "10.2.0.1:15008" if principal else "10.2.0.1:8080",
        "hbone_destination": "10.2.0.1:8080" if principal else "",
        "labels": found,
        "received": 100,
        "sent": 1100,
        "reason": Reason.CLOSED,
        "error": "",
        "policy": "",
    }
    return Line(**(values | fields))


def entry(
    verdict: Verdict = ALLOWED,
    principal: str = identity("sleep"),
    *,
    event: Event = Event.CONNECTION,
    **fields: Any,  # noqa: ANN401 - the line's fields
) -> Entry:
    fields = {"reason": verdict.reason, **fields}
    return of_verdict(TIME, event, verdict, line(principal, **fields))


@contextlib.contextmanager
def listening(path: Path) -> Iterator[socket.socket]:
    """Be who listens on a unix datagram socket: the journal, or a syslog daemon."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as made:
        made.bind(str(path))
        made.settimeout(15)
        yield made


def heard(sock: socket.socket) -> list[bytes]:
    """Take the datagrams that are there."""
    found: list[bytes] = []
    sock.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            found.append(sock.recv(1 << 18))
    sock.settimeout(15)
    return found


def journal_fields(datagram: bytes) -> list[tuple[str, bytes]]:
    """Return the fields of an entry. Raises ValueError where the protocol is broken."""
    found: list[tuple[str, bytes]] = []
    while datagram:
        head, feed, rest = datagram.partition(b"\n")
        if not feed:
            raise ValueError(f"a field without an end: {datagram!r}")
        name, equals, value = head.partition(b"=")
        if equals:
            datagram = rest
        else:
            (length,) = struct.unpack_from("<Q", rest)
            value, datagram = rest[8 : 8 + length], rest[8 + length :]
            if len(value) != length or datagram[:1] != b"\n":
                raise ValueError(f"a value of another length than it says: {rest!r}")
            datagram = datagram[1:]
        if not name or not name.decode("ascii").replace("_", "A").isalnum() or name != name.upper():
            raise ValueError(f"no name of a field: {name!r}")
        found.append((name.decode("ascii"), value))
    return found
