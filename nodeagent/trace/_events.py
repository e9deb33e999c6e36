"""What happened, by the bytes of observe.c: attributed to pods and identities. Pure.

This module owns the events' published shape and who is behind an address. It promises that bytes
of another size are refused, and that an identity is only ever named as what the mesh says of an
address: nothing here has been proved. It may not read a clock.
"""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta
from typing import Any, Final

import msgspec

from nodeagent.capture.layout import MARK_DELIVERY, MARK_OLDER, MARK_TUNNEL

__all__ = ["EVENT_BYTES", "SCHEMA", "Directory", "Event", "Kind", "TracedPod", "decode"]

SCHEMA: Final = 1

_EVENT: Final = struct.Struct("=QQQQIIIBBxx16s16sHH16s4x")
EVENT_BYTES: Final = _EVENT.size

_KINDS: Final = {1: "connection", 2: "retransmit", 3: "bypass"}
Kind = str

_NANOSECONDS: Final = 1_000_000_000


class TracedPod(msgspec.Struct, frozen=True):
    """A pod of this node; `netns` is its network namespace's inode."""

    workload: str
    identity: str
    netns: int
    addresses: tuple[str, ...]


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """One line. `role` is whose end of a connection it is:

    "client" and "server": the application's, "application" where it is not known which; "tunnel":
    ztunnel's own, on either side; "older": an application's that is older than the capture.
    `peer` is who has the remote address in the mesh, "" if nobody; `peer_identity` is what the mesh
    says of it. `program` is the connecting process' name, text of its own choosing.
    """

    schema: int = SCHEMA
    event: Kind
    time: datetime
    pod: str
    identity: str
    role: str
    local: str
    remote: str
    peer: str = ""
    peer_identity: str = ""
    program: str = ""
    seconds: float | None = None
    """Of a connection: from its handshake to its end."""
    sent: int | None = None
    received: int | None = None
    """Bytes, as TCP counts them at this end."""
    retransmits: int | None = None
    new: bool | None = None
    """Of a bypass: the packet opens a connection."""


class Directory:
    """Who is behind a network namespace, and behind an address."""

    def __init__(
        self, pods: Iterable[TracedPod], resources: Mapping[str, list[dict[str, Any]]]
    ) -> None:
        self._pods = {pod.netns: pod for pod in pods}
        self._names: dict[str, tuple[str, str]] = {}
        for service in resources.get("service", ()):
            for address in service.get("addresses", ()):
                self._names[_canonical(address)] = (f"service {service.get('uid', '')}", "")
        for workload in resources.get("workload", ()):
            for address in workload.get("addresses", ()):
                self._names[_canonical(address)] = (
                    str(workload.get("uid", "")),
                    str(workload.get("identity", "")),
                )

    def pod(self, netns: int) -> TracedPod | None:
        return self._pods.get(netns)

    def at(self, address: str) -> tuple[str, str]:
        """Return workload or service at an address, and its identity; empty when unknown."""
        return self._names.get(address, ("", ""))


def decode(data: bytes, directory: Directory, wall: datetime, monotonic: float) -> Event | None:
    """Return the event, None of a pod that is not known. `wall` and `monotonic` are one moment.

    Raises ValueError if `data` is no event.
    """
    if len(data) < EVENT_BYTES:
        raise ValueError(f"an event of {len(data)} bytes, not {EVENT_BYTES}")
    time, started, sent, received, netns, mark, again, kind, here, *rest = _EVENT.unpack_from(data)
    local, remote, local_port, remote_port, program = rest
    pod = directory.pod(netns)
    name = _KINDS.get(kind)
    if pod is None or name is None:
        return None
    own, other = _text(local), _text(remote)
    peer, peer_identity = directory.at(other)
    is_connection = name == "connection"
    return Event(
        event=name,
        time=wall - timedelta(seconds=max(0.0, monotonic - time / _NANOSECONDS)),
        pod=pod.workload,
        identity=pod.identity,
        role=_role(mark, own, opened_here=bool(here), pod=pod, known=name != "retransmit"),
        local=_with_port(own, local_port),
        remote=_with_port(other, remote_port),
        peer=peer,
        peer_identity=peer_identity,
        program=program.partition(b"\0")[0].decode("utf-8", "replace"),
        seconds=(time - started) / _NANOSECONDS if is_connection else None,
        # An acknowledged SYN is a byte to TCP.
        sent=max(0, sent - here) if is_connection else None,
        received=received if is_connection else None,
        retransmits=None if name == "bypass" else again,
        new=bool(here) if name == "bypass" else None,
    )


def _role(mark: int, own: str, *, opened_here: bool, pod: TracedPod, known: bool) -> str:
    """`known`: whether it is known who opened the connection."""
    if mark == MARK_OLDER:
        return "older"
    # The tunnel's end of a pod's own connection speaks from the destination's address.
    if mark == MARK_TUNNEL or own not in pod.addresses:
        return "tunnel"
    if mark == MARK_DELIVERY:
        return "tunnel" if opened_here else "server"
    if not known:
        return "application"
    return "client" if opened_here else "server"


def _canonical(address: object) -> str:
    return str(ipaddress.ip_address(str(address)))


def _text(packed: bytes) -> str:
    address = ipaddress.IPv6Address(packed)
    return str(address.ipv4_mapped or address)


def _with_port(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
