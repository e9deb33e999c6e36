"""What the values of a lab file may be.

This module owns the rules for single values: names, ports, addresses. It promises that a value that
passes is safe as a file's name, an interface's, a line of /etc/hosts. It is pure.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sized
from typing import Final, TypeVar

from nodeagent.api import Check
from nodeagent.api._walk import IGNORED

__all__ = [
    "ADDRESS",
    "ALGORITHM",
    "IGNORED",
    "LABEL",
    "LAB_NAME",
    "MTU",
    "NOT_EMPTY",
    "PORT",
    "TRUST_DOMAIN",
]

MAX_LAB_NAME: Final = 32
"""A node's control socket lies below the lab's directory, and its path may have 107 bytes."""
MAX_LABEL: Final = 30
"""Shorter than DNS allows, for the same reason."""
MIN_MTU: Final = 1280
"""IPv6's least (RFC 8200, 5)."""
MAX_MTU: Final = 65535
"""What a veth pair takes."""
MAX_PORT: Final = 65535

_LABEL: Final = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?")
_TRUST_DOMAIN: Final = re.compile(r"[a-z0-9._-]{1,255}")
_ALGORITHM: Final = re.compile(r"[a-z0-9_]{1,15}")

S = TypeVar("S", bound=Sized)


def _name(text: str, most: int) -> str:
    if not _LABEL.fullmatch(text) or len(text) > most:
        raise ValueError(
            f"{text!r} is no name: use a to z, 0 to 9 and inner hyphens, at most {most} characters"
        )
    return text


def lab_name(text: str) -> str:
    return _name(text, MAX_LAB_NAME)


def _label(text: str) -> str:
    return _name(text, MAX_LABEL)


def _port(number: int) -> int:
    if not 1 <= number <= MAX_PORT:
        raise ValueError(f"{number} is no port: 1 to {MAX_PORT}")
    return number


def _mtu(number: int) -> int:
    if not MIN_MTU <= number <= MAX_MTU:
        raise ValueError(f"{number} is no MTU: {MIN_MTU} to {MAX_MTU}")
    return number


def _address(text: str) -> str:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        raise ValueError(f"{text!r} is no IP address") from None
    if isinstance(address, ipaddress.IPv6Address) and (address.scope_id or address.ipv4_mapped):
        raise ValueError(f"{text!r} is scoped or IPv4-mapped: give a plain address")
    return str(address)


def _trust_domain(text: str) -> str:
    if not _TRUST_DOMAIN.fullmatch(text):
        raise ValueError(f"{text!r} is no trust domain: use a to z, 0 to 9, '.', '_' and '-'")
    return text


def _algorithm(text: str) -> str:
    if not _ALGORITHM.fullmatch(text):
        raise ValueError(f"{text!r} is no congestion control: write one such as cubic or bbr")
    return text


def _not_empty(values: S) -> S:
    if not len(values):
        raise ValueError("is empty: at least one is needed")
    return values


LAB_NAME: Final = Check(lab_name)
LABEL: Final = Check(_label)
PORT: Final = Check(_port)
MTU: Final = Check(_mtu)
ADDRESS: Final = Check(_address)
TRUST_DOMAIN: Final = Check(_trust_domain)
ALGORITHM: Final = Check(_algorithm)
NOT_EMPTY: Final = Check(_not_empty)
