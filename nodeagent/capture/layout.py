"""What nodeagent and its BPF programs agree on: numbers, sizes and byte layouts.

This module owns the Python side of bpf/include/nodeagent.h and the ports, marks, rules and names
that the capture uses in a pod. It promises to pack values exactly as the programs read them; a unit
test compares it with the header. It may not touch the kernel.
"""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Iterable
from typing import Final

__all__ = [
    "COUNTERS",
    "HBONE_PORT",
    "INBOUND_PORT",
    "MARK_DELIVERY",
    "MARK_OLDER",
    "MARK_TUNNEL",
    "MAX_ADDRESSES",
    "MAX_EXCEPTIONS",
    "OUTBOUND_PORT",
    "PORTS",
    "RECORD_SIZE",
    "SETTINGS_SIZE",
    "SLOTS",
    "TABLE",
    "V4",
    "V6",
    "mapped",
    "pack_config",
    "pack_settings",
]

OUTBOUND_PORT: Final = 15001
INBOUND_PORT: Final = 15006
HBONE_PORT: Final = 15008
PORTS: Final = (OUTBOUND_PORT, INBOUND_PORT, HBONE_PORT)
"""Listening ports in the pod, in the order of the socket map's slots."""

SLOTS: Final = len(PORTS)

MARK_TUNNEL: Final = 0x539
MARK_DELIVERY: Final = 0x111
MARK_OLDER: Final = 0x53A

V4: Final = 2
V6: Final = 10
"""AF_INET and AF_INET6 of Linux: plain numbers, because the plan is made without sockets."""

TABLE: Final = 100
"""Routing table in the pod that turns everything to `lo`."""

MAX_ADDRESSES: Final = 16
MAX_EXCEPTIONS: Final = 16

RECORD_SIZE: Final = 3072
"""Bytes of a pod's record: twice what the longest names and sixteen addresses take. The array that
holds it then fits a page."""

SETTINGS_SIZE: Final = 8 + 2 * MAX_EXCEPTIONS

COUNTERS: Final = (
    "captured_outbound",
    "captured_inbound",
    "captured_hbone",
    "closed_outbound",
    "closed_inbound",
    "closed_hbone",
    "egress_bypass",
    "egress_delivery",
    "egress_older",
    "egress_fragment",
    "egress_unreadable",
    "ingress_spoofed",
    "ingress_delivery",
    "ingress_older",
    "ingress_unreadable",
)
"""Names by number. `captured_*` and `closed_*` count lookups (of connections, and of packets that
belong to none), the others dropped packets."""


def mapped(address: str) -> bytes:
    """Return 16 bytes in network order, IPv4 as IPv4-mapped (RFC 4291, 2.5.5.2)."""
    parsed = ipaddress.ip_address(address)
    if isinstance(parsed, ipaddress.IPv4Address):
        return b"\0" * 10 + b"\xff\xff" + parsed.packed
    return parsed.packed


def pack_config(addresses: Iterable[str]) -> bytes:
    """Return struct pod_config. Raises ValueError above MAX_ADDRESSES."""
    packed = [mapped(address) for address in addresses]
    if len(packed) > MAX_ADDRESSES:
        raise ValueError(f"{len(packed)} addresses exceed {MAX_ADDRESSES}")
    return struct.pack("I", len(packed)) + b"".join(packed).ljust(16 * MAX_ADDRESSES, b"\0")


def pack_settings(*, strict_default: bool, exceptions: Iterable[int]) -> bytes:
    """Return struct guard_settings; with more than MAX_EXCEPTIONS ports every port is strict."""
    ports = sorted(set(exceptions))
    if len(ports) > MAX_EXCEPTIONS:
        strict_default, ports = True, []
    values = ports + [0] * (MAX_EXCEPTIONS - len(ports))
    return struct.pack(f"II{MAX_EXCEPTIONS}H", strict_default, len(ports), *values)
