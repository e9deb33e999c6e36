"""What a policy compares with: patterns of identities and names, address blocks, ports.

This module owns the grammar of the values that policies are written in. It promises that a pattern
can match something: one that no identity could ever match is refused, and so is one that would
mean something else than it looks like (`a*b`, `**`, an address with host bits). It may not compare
anything, or know which sets exist.

Patterns are Istio's: exact, `prefix*`, `*suffix`, and `*` for "is present". Identities are written
without their scheme, as in Istio. Ours is the reference to an identity set, `set:NAME` or
`set:NAMESPACE/NAME`, which can stand wherever a principal can: no SPIFFE ID holds a colon.

Sources: istio.io/api security/v1beta1 (authorization_policy.proto); SPIFFE-ID 2; RFC 4632 3.1.
"""

from __future__ import annotations

import ipaddress
import re
from typing import Any, Final

from nodeagent.api import values
from nodeagent.api._errors import quote
from ztunnel.spiffe import MAX_ID_BYTES, SpiffeId, SpiffeIdError

__all__ = [
    "SET_PREFIX",
    "account",
    "block",
    "callers",
    "identity",
    "looks_past",
    "namespace",
    "not_empty",
    "port",
    "principal",
    "qualified",
    "set_of",
    "word",
]

SET_PREFIX: Final = "set:"

SCHEME: Final = "spiffe://"

MAX_WORD: Final = 2048
"""Characters of a value that is not compared here, such as a path."""

_NAME: Final = re.compile(r"[A-Za-z0-9._-]{1,253}")
"""A namespace or service account as a segment of a SPIFFE ID; Kubernetes' names are narrower."""

_LENGTH: Final = re.compile(r"0|[1-9][0-9]{0,2}")
_PORT: Final = re.compile(r"[1-9][0-9]{0,4}")

_MAPPED_BITS: Final = 96
"""RFC 4291 2.5.5.2: the bits in front of an IPv4 address in IPv6 clothes."""


def not_empty(value: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return a list that has items: one that lost them all must not come to mean "any"."""
    if not value:
        raise ValueError("is empty: name at least one, or delete the field")
    return value


def word(value: str) -> str:
    """Return a value of layer 7, which nobody compares here."""
    if not value or len(value) > MAX_WORD:
        raise ValueError(f"must have 1 to {MAX_WORD} characters")
    return values.text(value)


def principal(value: str) -> str:
    """Return a pattern of SPIFFE IDs without the scheme, or a reference to an identity set."""
    if value.startswith(SET_PREFIX):
        qualified(value, "default")
        return value
    if value.startswith(SCHEME):
        raise ValueError(
            f"{quote(value)} would match nobody: in policies identities are written without "
            f"{SCHEME}; write {quote(value.removeprefix(SCHEME))}"
        )
    start, middle = _split(value, "TRUST-DOMAIN/ns/NAMESPACE/sa/ACCOUNT")
    if not middle:
        return value
    # Some ID must exist that goes on like this.
    example = middle
    if value.endswith("*"):
        example = f"{middle}x"
    elif not start:
        example = f"x/x{middle}"
    try:
        found = SpiffeId.parse(SCHEME + example)
    except SpiffeIdError as error:
        raise ValueError(f"{quote(value)} can match no SPIFFE ID: {error.what}") from None
    if not found.path and "*" not in value:
        raise ValueError(
            f"{quote(value)} is a trust domain and names no workload: "
            f"write {value}/ns/NAMESPACE/sa/ACCOUNT, or {value}/* for all of its workloads"
        )
    return value


def identity(value: str) -> str:
    """Return a member of an identity set: as `principal`, and the scheme may be written."""
    bare = value.removeprefix(SCHEME)
    if bare != value and bare.startswith(SET_PREFIX):
        raise ValueError(f"{quote(value)} is a reference to a set: write it without {SCHEME}")
    return principal(bare)


def namespace(value: str) -> str:
    """Return a pattern of namespaces."""
    _, middle = _split(value, "a namespace")
    if middle and not _NAME.fullmatch(middle):
        raise ValueError(
            f"{quote(value)} can match no namespace: write letters, digits, '-', '_' and '.'"
        )
    return value


def account(value: str) -> str:
    """Return `ACCOUNT` (of the policy's namespace) or `NAMESPACE/ACCOUNT`; no patterns."""
    if not all(_NAME.fullmatch(part) for part in value.split("/", 1)):
        raise ValueError(
            f"{quote(value)} is no service account: write ACCOUNT or NAMESPACE/ACCOUNT; "
            "patterns are not supported here, use principals"
        )
    return value


def block(value: str) -> str:
    """Return the canonical text of an address or of a network in CIDR notation."""
    bare, slash, mask = value.partition("/")
    problem = f"{quote(value)} is no address block: write 10.1.0.0/16, fd00::/8 or one address"
    if len(value) > values.MAX_ADDRESS + len("/128") or "%" in bare:
        raise ValueError(problem)
    try:
        address = ipaddress.ip_address(bare)
    except ValueError:
        raise ValueError(problem) from None
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    if not slash:
        return str(mapped or address)
    if not _LENGTH.fullmatch(mask) or int(mask) > address.max_prefixlen:
        raise ValueError(f"{problem}; the length is a decimal number")
    bits = int(mask)
    if mapped is not None:
        if bits < _MAPPED_BITS:
            raise ValueError(f"{quote(value)} holds IPv4 addresses and others: write two blocks")
        address, bits = mapped, bits - _MAPPED_BITS
    network = ipaddress.ip_network((address, bits), strict=False)
    if network.network_address != address:
        raise ValueError(
            f"{quote(value)} has bits behind its length: write {network} for the network, "
            f"or {address} for the one address"
        )
    return str(network)


def port(value: str) -> str:
    """Return a port as text, as Istio writes it."""
    if not _PORT.fullmatch(value):
        raise ValueError(f"{quote(value)} is no port: write decimal digits, 1 to {values.MAX_PORT}")
    values.port(int(value))
    return value


def callers(value: str) -> tuple[str, ...]:
    """Return the identities and sets of a list with commas. Raises ValueError."""
    found = tuple(principal(part.strip(" ")) for part in value.split(","))
    if len(set(found)) != len(found):
        raise ValueError(f"{quote(value)} names a caller twice: remove one")
    return found


def set_of(value: str) -> str | None:
    """Return what a reference to a set names, None for any other principal."""
    return value.removeprefix(SET_PREFIX) if value.startswith(SET_PREFIX) else None


def qualified(value: str, own: str) -> str:
    """Return the "namespace/name" of a reference written in the namespace `own`."""
    first, slash, last = value.removeprefix(SET_PREFIX).partition("/")
    try:
        if slash:
            values.dns_label(first)
        values.dns_subdomain(last if slash else first)
    except ValueError as error:
        raise ValueError(
            f"{quote(value)} is no reference to an identity set: write {SET_PREFIX}NAME or "
            f"{SET_PREFIX}NAMESPACE/NAME ({error})"
        ) from None
    return f"{first}/{last}" if slash else f"{own}/{first}"


def looks_past(value: str) -> bool:
    """Return whether the star of a pattern adjoins a name that may simply go on: `prod*`."""
    if len(value) < 2 or value.startswith(SET_PREFIX):  # noqa: PLR2004 - a star and something else
        return False
    if value.endswith("*"):
        return value[-2].isalnum()
    return value.startswith("*") and value[1].isalnum()


def _split(value: str, what: str) -> tuple[str, str]:
    """Return a pattern without its star, and what is in front of the star."""
    middle = value[:-1] if value.endswith("*") else value.removeprefix("*")
    if not value or "*" in middle:
        raise ValueError(
            f"{quote(value)} is no pattern: write {what}, with one * at the start or at the end, "
            "or * alone for any"
        )
    if len(value) > MAX_ID_BYTES - len(SCHEME):
        raise ValueError(f"{quote(value)} is longer than any SPIFFE ID")
    return ("" if value.startswith("*") else middle), middle
