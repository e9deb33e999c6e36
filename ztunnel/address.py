"""Addresses as the core has them: 16 bytes, IPv4 as IPv4-mapped; and their one text form.

This module owns the conversion between that form and text, and the questions that decide whether
an address may be dialled. It promises that an IPv4 address and its IPv4-mapped spelling are the
same value and get the same answers (Python's `ipaddress` does not promise that: RFC 4291, 2.5.5.2
addresses are neither loopback nor equal to their IPv4 there). It may not resolve names, nor open
sockets.
"""

from __future__ import annotations

import socket
from typing import Final

__all__ = [
    "ANY",
    "authority",
    "is_ipv4",
    "is_local_only",
    "pack",
    "text",
]

_MAPPED: Final = bytes(10) + b"\xff\xff"
_SIZE: Final = 16
ANY: Final = b""
"""The core's way to say "no address"."""


def pack(spelling: str) -> bytes:
    """Return the 16 bytes of an address in text. Raises ValueError: no scope ids, no names.

    inet_pton(3) is as strict as `ipaddress` (four decimal parts without leading zeros; RFC 4291),
    knows no scope ids, whose text is free (CVE-2026-26310), and takes a tenth of the time.
    """
    try:
        if ":" in spelling:
            return socket.inet_pton(socket.AF_INET6, spelling)
        return _MAPPED + socket.inet_pton(socket.AF_INET, spelling)
    except OSError:
        raise ValueError("not an IP address, or one with a scope") from None


def is_ipv4(packed: bytes) -> bool:
    return packed.startswith(_MAPPED)


def text(packed: bytes) -> str:
    """Return the canonical text (RFC 5952 for IPv6); empty for the empty address."""
    if not packed:
        return ""
    if is_ipv4(packed):
        return socket.inet_ntop(socket.AF_INET, packed[12:])
    return socket.inet_ntop(socket.AF_INET6, packed)


def authority(packed: bytes, port: int) -> str:
    """Return `ip:port`, IPv6 in brackets: an HTTP/2 `:authority`, and what people read."""
    spelling = text(packed)
    if spelling and not is_ipv4(packed):
        spelling = f"[{spelling}]"
    return f"{spelling}:{port}"


def is_local_only(packed: bytes) -> bool:
    """True for addresses that mean "this host" to whoever dials them, or that are no address.

    Loopback (127/8, ::1), unspecified (Linux connects 0.0.0.0 and :: to loopback), the rest of
    0/8, and ::/96, which also holds the obsolete IPv4-compatible spelling ::127.0.0.1.
    """
    if len(packed) != _SIZE or packed.startswith(bytes(12)):
        return True
    return is_ipv4(packed) and packed[12] in (0, 127)
