"""Conditions of a rule, read once: what a connection shows, and how patterns are held against it.

This module owns the syntax of patterns and what they match. It promises that a pattern is taken
literally but for one `*` at its start or end, that an IPv4 address and its IPv4-mapped spelling
get the same answers, that no IPv6 network holds an IPv4 address, and that what could never match,
or was never meant (signs, leading zeros, other scripts' digits, hostmasks), is refused and not
repaired. It is pure, and may not know of policies, their order or their effect.

A pattern is a way to cut a piece out of a connection (`Probe`) and the piece that must come out.
The same form serves the single condition and an index over very many of them.

Source of the pattern syntax: Istio's reference of AuthorizationPolicy (Source, Operation,
Condition). Prefix and suffix are of the text, and not of its parts: "cluster.local/ns/prod*" also
matches the namespace "prod-test".
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable, Iterable
from typing import Final, NamedTuple

import msgspec

from ztunnel import address
from ztunnel.protocol import Attribute, Condition
from ztunnel.spiffe import MAX_ID_BYTES, SpiffeId

__all__ = ["EVERYTHING", "Facts", "Patterns", "Piece", "Probe", "Test", "facts", "read"]

MAX_PATTERN: Final = MAX_ID_BYTES
"""Characters of a pattern: nothing that it could match is longer."""

MAX_PORT: Final = 65535

_ADDRESS_BITS: Final = 128
_IPV4_BITS: Final = 32
_IPV4_START: Final = _ADDRESS_BITS - _IPV4_BITS
"""Length of the prefix ::ffff:0:0/96, under which IPv4 addresses are kept."""

_IPV4_PREFIX: Final = 0xFFFF
_NO_PIECE: Final = -1
"""What no pattern holds."""


class Facts(NamedTuple):
    """What rules may look at, in the order of `Attribute`; text is empty without identity.

    `service_account` is "namespace/name". Addresses are the 128 bits of the packed form.
    """

    principal: str
    namespace: str
    service_account: str
    source: int
    destination: int
    port: int


_SCHEME: Final = "spiffe://"


def facts(identity: SpiffeId | None, source: bytes, destination: bytes, port: int) -> Facts:
    """Return what a connection shows. `identity` is None for plaintext, addresses are packed."""
    principal = namespace = account = ""
    if identity is not None:
        principal = str(identity).removeprefix(_SCHEME)
        # Neither without the other: both come of one form of the path, or it has neither.
        if identity.namespace is not None:
            namespace = identity.namespace
            account = f"{namespace}/{identity.service_account}"
    return Facts(
        principal,
        namespace,
        account,
        int.from_bytes(source),
        int.from_bytes(destination),
        port,
    )


Piece = str | int


class _Kind(enum.IntEnum):
    ALWAYS = 0
    EXACT = 1
    START = 2
    END = 3
    PRESENT = 4
    NETWORK = 5


class Probe(NamedTuple):
    """A way to cut a piece out of a connection: of which fact, how, and how many units of it.

    `length` is in characters, or in bits for a network; 0 where the whole fact is taken.
    """

    fact: int
    kind: int
    length: int

    def cut(self, seen: Facts) -> Piece:
        """Return the piece; one that no pattern holds if there is none."""
        return _CUT[self.kind](seen[self.fact], self.length)


@functools.lru_cache(maxsize=4096)
def _probe(attribute: Attribute, kind: _Kind, length: int = 0) -> Probe:
    """Return the one object of this probe: very many patterns share a few."""
    return Probe(_ORDER[attribute], kind, length)


def _network(value: Piece, length: int) -> Piece:
    if not isinstance(value, int):
        return _NO_PIECE
    if length < _IPV4_START and value >> _IPV4_BITS == _IPV4_PREFIX:
        return _NO_PIECE
    return value >> (_ADDRESS_BITS - length)


def _start(value: Piece, length: int) -> Piece:
    return str(value)[:length]


def _end(value: Piece, length: int) -> Piece:
    return str(value)[-length:]


# By `_Kind`. Of a text that is too short, start and end are shorter than any piece of that length.
_CUT: Final[tuple[Callable[[Piece, int], Piece], ...]] = (
    lambda _value, _length: 0,
    lambda value, _length: value,
    _start,
    _end,
    lambda value, _length: bool(value),
    _network,
)

_ORDER: Final = {attribute: number for number, attribute in enumerate(Attribute)}
assert len(_ORDER) == len(Facts._fields)  # noqa: S101 - `_ORDER` numbers the fields of Facts

EVERYTHING: Final = Probe(0, _Kind.ALWAYS, 0)
"""The probe that cuts the same piece out of every connection."""

Patterns = tuple[tuple[Probe, frozenset[Piece]], ...]
"""Pieces by the probe that must give one of them, in the order of the probes."""


class Test(msgspec.Struct, frozen=True, cache_hash=True, gc=False):
    """A condition, ready: one of `wanted` (if there are any), and none of `unwanted`."""

    wanted: Patterns
    unwanted: Patterns

    def holds(self, seen: Facts) -> bool:
        return (not self.wanted or _any(self.wanted, seen)) and not _any(self.unwanted, seen)


def _any(patterns: Patterns, seen: Facts) -> bool:
    return any(probe.cut(seen) in pieces for probe, pieces in patterns)


def read(conditions: Iterable[Condition]) -> Test:
    """Return the test of which one condition must hold: all are of one attribute.

    With more than one, none may have `not_values`. Raises ValueError.
    """
    wanted: dict[Probe, set[Piece]] = {}
    unwanted: dict[Probe, set[Piece]] = {}
    for condition in conditions:
        if not condition.values and not condition.not_values:
            raise ValueError(f"a condition on {condition.attribute} asks for nothing")
        for spellings, patterns in (
            (condition.values, wanted),
            (condition.not_values, unwanted),
        ):
            for spelling in spellings:
                probe, piece = _pattern(condition.attribute, spelling)
                patterns.setdefault(probe, set()).add(piece)
    return Test(_frozen(wanted), _frozen(unwanted))


def _frozen(patterns: dict[Probe, set[Piece]]) -> Patterns:
    return tuple((probe, frozenset(patterns[probe])) for probe in sorted(patterns))


def _pattern(attribute: Attribute, spelling: str) -> tuple[Probe, Piece]:
    match attribute:
        case Attribute.SOURCE_IP | Attribute.DESTINATION_IP:
            return _address(attribute, spelling)
        case Attribute.DESTINATION_PORT:
            return _probe(attribute, _Kind.EXACT), _port(attribute, spelling)
        case Attribute.PRINCIPAL | Attribute.NAMESPACE | Attribute.SERVICE_ACCOUNT:
            return _text(attribute, spelling)


def _text(attribute: Attribute, spelling: str) -> tuple[Probe, Piece]:
    if spelling == "*":
        return _probe(attribute, _Kind.PRESENT), True
    if spelling.endswith("*"):
        kind, piece = _Kind.START, spelling[:-1]
    elif spelling.startswith("*"):
        kind, piece = _Kind.END, spelling[1:]
    else:
        kind, piece = _Kind.EXACT, spelling
    if (
        not piece
        or len(piece) > MAX_PATTERN
        or "*" in piece
        or not (piece.isascii() and piece.isprintable())
        or " " in piece
    ):
        raise _bad(
            attribute, spelling, "write a name, or one with a single * at its start or its end"
        )
    if attribute is Attribute.PRINCIPAL and _SCHEME in spelling:
        raise _bad(attribute, spelling, f"write it without {_SCHEME}")
    if attribute is Attribute.SERVICE_ACCOUNT and kind is _Kind.EXACT and piece.count("/") != 1:
        raise _bad(attribute, spelling, "write NAMESPACE/NAME")
    return _probe(attribute, kind, 0 if kind is _Kind.EXACT else len(piece)), piece


def _address(attribute: Attribute, spelling: str) -> tuple[Probe, Piece]:
    text, slash, suffix = spelling.partition("/")
    try:
        packed = address.pack(text)
    except ValueError:
        raise _bad(attribute, spelling, "write an IP address or a network in CIDR") from None
    bits = _IPV4_BITS if ":" not in text else _ADDRESS_BITS
    length = bits
    if slash:
        length = _decimal(suffix, bits)
        if length < 0:
            raise _bad(attribute, spelling, f"the prefix length must be in 0..{bits}")
    length += _ADDRESS_BITS - bits
    if address.is_ipv4(packed) and length < _IPV4_START:
        raise _bad(attribute, spelling, "an IPv4-mapped network has a length of at least 96")
    value = int.from_bytes(packed)
    return _probe(attribute, _Kind.NETWORK, length), value >> (_ADDRESS_BITS - length)


def _port(attribute: Attribute, spelling: str) -> int:
    port = _decimal(spelling, MAX_PORT)
    if port < 1:
        raise _bad(attribute, spelling, f"a port is a number in 1..{MAX_PORT}")
    return port


def _decimal(text: str, most: int) -> int:
    """Return the number, -1 for anything else: no sign, no leading zero, no other digits."""
    if not (text.isascii() and text.isdigit()) or len(text) > len(str(most)):
        return -1
    if text.startswith("0") and text != "0":
        return -1
    number = int(text)
    return number if number <= most else -1


def _bad(attribute: Attribute, spelling: str, remedy: str) -> ValueError:
    shown = ascii(spelling[:80])
    return ValueError(f"{attribute}: {shown} is no pattern: {remedy}")
