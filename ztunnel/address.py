"""Addresses as the core has them: 16 bytes, IPv4 as IPv4-mapped; and their one text form.

This module owns the conversion between that form and text, and the questions that decide whether
an address may be dialled. It promises that an IPv4 address and its IPv4-mapped spelling are the
same value and get the same answers (Python's `ipaddress` does not promise that: RFC 4291, 2.5.5.2
addresses are neither loopback nor equal to their IPv4 there). It may not resolve names.
"""

from __future__ import annotations

import ipaddress
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


_OCTETS: Final = {str(number): number for number in range(256)}
"""The only spellings of an octet: no leading zeros, signs, spaces or other scripts' digits."""

_IPV4_OCTETS: Final = 4


def pack(spelling: str) -> bytes:
    """Return the 16 bytes of an address in text. Raises ValueError: no scope ids, no names."""
    if ":" not in spelling:
        # Not by `ipaddress`, which takes ten times as long: a mesh has 100,000 of them.
        parts = spelling.split(".")
        try:
            packed = bytes([_OCTETS[part] for part in parts])
        except KeyError:
            raise ValueError("not an IP address") from None
        if len(packed) != _IPV4_OCTETS:
            raise ValueError("not an IP address")
        return _MAPPED + packed
    address = ipaddress.IPv6Address(spelling)
    if address.scope_id is not None:
        # A scope id is free text (CVE-2026-26310) and means nothing on another node.
        raise ValueError("an address with a scope id is not valid here")
    return address.packed


def is_ipv4(packed: bytes) -> bool:
    return packed.startswith(_MAPPED)


def text(packed: bytes) -> str:
    """Return the canonical text (RFC 5952 for IPv6); empty for the empty address."""
    if not packed:
        return ""
    if is_ipv4(packed):
        return ".".join(map(str, packed[12:]))
    return str(ipaddress.IPv6Address(packed))


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
