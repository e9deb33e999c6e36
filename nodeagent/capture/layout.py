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
    "CONFIG_SIZE",
    "COUNTERS",
    "HBONE_PORT",
    "INBOUND_PORT",
    "MARK_DELIVERY",
    "MARK_OLDER",
    "MARK_TUNNEL",
    "MAX_ADDRESSES",
    "MAX_EXCEPTIONS",
    "MAX_PODS",
    "OUTBOUND_PORT",
    "PODS_KEY",
    "POD_PLACEHOLDER",
    "POD_SIZE",
    "PORTS",
    "RECORD_SIZE",
    "SETTINGS_SIZE",
    "SLOTS",
    "SOCKETS_KEY",
    "TABLE",
    "V4",
    "V6",
    "mapped",
    "pack_config",
    "pack_pod",
    "pack_settings",
    "pod_key",
    "slot_key",
    "unpack_pod",
    "with_number",
]

OUTBOUND_PORT: Final = 15001
INBOUND_PORT: Final = 15006
HBONE_PORT: Final = 15008
PORTS: Final = (OUTBOUND_PORT, INBOUND_PORT, HBONE_PORT)
"""Listening ports in the pod, in the order of the socket map's slots."""

SLOTS: Final = len(PORTS)

_INSTRUCTION: Final = struct.Struct("=BBhi")
_LOAD_IMMEDIATE: Final = 0x18

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

MAX_PODS: Final = 4096
"""Pods of one node: four times what is promised. Numbers of pods go from 1 to this."""

POD_PLACEHOLDER: Final = 0x706F6400
"""Stands for the pod's number in the capture program as it was compiled."""

POD_SIZE: Final = 312
CONFIG_SIZE: Final = 4 + 16 * MAX_ADDRESSES
COOKIE_SIZE: Final = 8
PODS_KEY: Final = 4
SOCKETS_KEY: Final = 8

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


def pack_pod(cookie: int, body: bytes) -> bytes:
    """Return struct pod; `body` is `pack_settings`' and `pack_config`'s, one after the other."""
    return struct.pack("Q", cookie) + body.ljust(POD_SIZE - COOKIE_SIZE, b"\0")


def unpack_pod(entry: bytes) -> tuple[int, bytes]:
    """Return cookie and body of struct pod."""
    (cookie,) = struct.unpack_from("Q", entry)
    return cookie, entry[COOKIE_SIZE : COOKIE_SIZE + SETTINGS_SIZE + CONFIG_SIZE]


def pod_key(number: int) -> bytes:
    """Return the key of a pod in the maps that all pods share."""
    return struct.pack("I", number)


def slot_key(number: int, slot: int) -> bytes:
    """Return struct pod_slot."""
    return struct.pack("II", number, slot)


def with_number(instructions: bytes, number: int) -> bytes:
    """Return the capture program for one pod. Raises ValueError if there is no placeholder.

    Looks for "load 64 bits immediate" (BPF_LD | BPF_IMM | BPF_DW of RFC 9669, 5.4) and not merely
    for the number, which could be part of anything.
    """
    code = bytearray(instructions)
    found = 0
    for offset in range(0, len(code), _INSTRUCTION.size):
        operation, registers, _, value = _INSTRUCTION.unpack_from(code, offset)
        if operation == _LOAD_IMMEDIATE and not registers >> 4 and value == POD_PLACEHOLDER:
            struct.pack_into("=i", code, offset + 4, number)
            found += 1
    if not found:
        raise ValueError("the capture program has no place for the pod's number")
    return bytes(code)


def pack_settings(*, strict_default: bool, exceptions: Iterable[int]) -> bytes:
    """Return struct guard_settings; with more than MAX_EXCEPTIONS ports every port is strict."""
    ports = sorted(set(exceptions))
    if len(ports) > MAX_EXCEPTIONS:
        strict_default, ports = True, []
    values = ports + [0] * (MAX_EXCEPTIONS - len(ports))
    return struct.pack(f"II{MAX_EXCEPTIONS}H", strict_default, len(ports), *values)
