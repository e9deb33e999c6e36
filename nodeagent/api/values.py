"""Names, labels, ports and addresses: the grammars of single values.

This module owns what a value may look like. Each function takes a value, returns its one canonical
spelling, and raises ValueError with a reason that says what to write instead. It promises that two
values which mean the same compare equal, and that every expression is linear in a bounded text. It
may not resolve names, read the machine or know which field a value came from.

Sources: RFC 1123 and Kubernetes "Object Names", "Labels and Selectors"; RFC 5952 (text of IPv6);
RFC 4291 2.5.5.2 (IPv4-mapped); RFC 3339 (time).
"""

from __future__ import annotations

import datetime as dt
import ipaddress
import re
from typing import Final

from nodeagent.api._errors import quote
from ztunnel.spiffe import SpiffeId, SpiffeIdError

__all__ = [
    "address",
    "annotation_key",
    "annotation_value",
    "dns_label",
    "dns_subdomain",
    "host",
    "label_key",
    "label_value",
    "locality",
    "metadata_annotations",
    "port",
    "service_account",
    "text",
    "timestamp",
    "trust_domain",
    "vip",
    "weight",
]

MAX_LABEL: Final = 63
"""RFC 1035 2.3.4; Kubernetes takes it over for label names and values."""

MAX_SUBDOMAIN: Final = 253
"""RFC 1035 2.3.4, without the final dot."""

MAX_PORT: Final = 65535

MAX_WEIGHT: Final = 2**32 - 1
"""Istio's field is a uint32."""

MAX_ANNOTATIONS: Final = 256 * 1024
"""Bytes of all annotations of an object; the limit of Kubernetes (TotalAnnotationSizeLimitB)."""

MAX_ADDRESS: Final = 45
"""Characters of the longest IPv6 address; what is longer is refused without being parsed."""

_DNS_LABEL: Final = re.compile(r"[a-z0-9](?:[-a-z0-9]*[a-z0-9])?")
_QUALIFIED: Final = re.compile(r"[A-Za-z0-9](?:[-A-Za-z0-9_.]*[A-Za-z0-9])?")
_LOCALITY: Final = re.compile(r"[A-Za-z0-9][-A-Za-z0-9_.]*(?:/[A-Za-z0-9][-A-Za-z0-9_.]*){0,2}")
_CONTROL: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]")
_LEADING_ZERO: Final = re.compile(r"(?:^|\.)0[0-9]+(?:\.|$)")
_TIMESTAMP: Final = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(?:\.[0-9]{1,9})?"
    r"(?:Z|[+-][0-9]{2}:[0-9]{2})"
)

_IPV4_BROADCAST: Final = ipaddress.IPv4Address("255.255.255.255")
_THIS_NETWORK: Final = ipaddress.IPv4Network("0.0.0.0/8")


def text(value: str) -> str:
    """Return `value` unless it holds a control character, which would forge lines in logs."""
    if _CONTROL.search(value) or "\n" in value or "\t" in value:
        raise ValueError(f"{quote(value)} holds a control character: remove it")
    return value


def dns_label(value: str) -> str:
    """Return a DNS-1123 label: a namespace, or the name of a port."""
    if len(value) > MAX_LABEL or not _DNS_LABEL.fullmatch(value):
        raise ValueError(
            f"{quote(value)} is no DNS label: write 1 to {MAX_LABEL} of a-z, 0-9 and '-', "
            "beginning and ending with a letter or digit"
        )
    return value


def dns_subdomain(value: str) -> str:
    """Return a DNS-1123 subdomain: the name of an object."""
    labels = value.split(".") if len(value) <= MAX_SUBDOMAIN else [""]
    if not all(len(label) <= MAX_LABEL and _DNS_LABEL.fullmatch(label) for label in labels):
        raise ValueError(
            f"{quote(value)} is no DNS name: write up to {MAX_SUBDOMAIN} of a-z, 0-9, '-' and '.', "
            "each part beginning and ending with a letter or digit"
        )
    return value


def service_account(value: str) -> str:
    """Return the name of a service account: one segment of a SPIFFE ID."""
    dns_subdomain(value)
    # The grammar above is the narrower one; the SPIFFE grammar stays the judge.
    SpiffeId.workload("x", "x", value)
    return value


def trust_domain(value: str) -> str:
    """Return a SPIFFE trust domain."""
    try:
        SpiffeId(value, "")
    except SpiffeIdError as error:
        raise ValueError(f"{quote(value)} is no trust domain: {error.what}") from None
    return value


def host(value: str) -> str:
    """Return a service's host name, in lower case; the first label may be `*`."""
    name = value.lower() if value.isascii() else value
    parts = name.split(".")
    try:
        ipaddress.ip_address(name)
    except ValueError:
        pass
    else:
        raise ValueError(f"{quote(value)} is an address, not a host name: move it to addresses")
    if parts[0] == "*" and len(parts) > 1:
        dns_subdomain(".".join(parts[1:]))
    else:
        dns_subdomain(name)
    return name


def label_key(value: str) -> str:
    """Return a label's key: `[PREFIX/]NAME`."""
    prefix, slash, name = value.rpartition("/")
    if slash:
        dns_subdomain(prefix)
    if len(name) > MAX_LABEL or not _QUALIFIED.fullmatch(name):
        raise ValueError(
            f"{quote(value)} is no label key: write [prefix/]name, the name up to {MAX_LABEL} of "
            "letters, digits, '-', '_' and '.'; patterns are not supported"
        )
    return value


def label_value(value: str) -> str:
    """Return a label's value; it may be empty."""
    if len(value) > MAX_LABEL or (value and not _QUALIFIED.fullmatch(value)):
        raise ValueError(
            f"{quote(value)} is no label value: write up to {MAX_LABEL} letters, digits, '-', '_' "
            "and '.', beginning and ending with a letter or digit; patterns are not supported"
        )
    return value


def annotation_key(value: str) -> str:
    """Return an annotation's key: the grammar of a label's."""
    return label_key(value)


def annotation_value(value: str) -> str:
    """Return an annotation's value: any text, several lines too."""
    if _CONTROL.search(value):
        raise ValueError("holds a control character: remove it")
    return value


def metadata_annotations(value: dict[str, str]) -> dict[str, str]:
    """Return annotations that are together as small as Kubernetes wants them."""
    size = sum(len(key.encode()) + len(item.encode()) for key, item in value.items())
    if size > MAX_ANNOTATIONS:
        raise ValueError(f"{size} bytes of annotations exceed the limit of {MAX_ANNOTATIONS}")
    return value


def port(value: int) -> int:
    """Return a TCP port. Port 0 means "any" to the kernel and nothing to a peer."""
    if not 1 <= value <= MAX_PORT:
        raise ValueError(f"{value} is no port: write a number from 1 to {MAX_PORT}")
    return value


def weight(value: int) -> int:
    """Return an endpoint's weight. Istio reads 0 as 1, which is not what its author means."""
    if not 1 <= value <= MAX_WEIGHT:
        raise ValueError(
            f"{value} is no weight: write a number from 1 to {MAX_WEIGHT}; "
            "to send an endpoint nothing, remove it"
        )
    return value


def locality(value: str) -> str:
    """Return "region/zone/subzone"; the last parts may be left out."""
    if len(value) > MAX_SUBDOMAIN or not _LOCALITY.fullmatch(value):
        raise ValueError(
            f"{quote(value)} is no locality: write region, region/zone or region/zone/subzone"
        )
    return value


def timestamp(value: str) -> dt.datetime:
    """Return the moment that an RFC 3339 text with a time zone names."""
    if _TIMESTAMP.fullmatch(value):
        try:
            return dt.datetime.fromisoformat(value).astimezone(dt.UTC)
        except (ValueError, OverflowError):
            pass
    raise ValueError(f"{quote(value)} is no time: write it like 2026-01-31T12:00:00Z")


def address(value: str) -> str:
    """Return the canonical text of the address of one workload.

    IPv4-mapped IPv6 becomes the IPv4 address that it is. Addresses that mean another machine on
    each machine (loopback, unspecified, link-local, scoped) or no machine are refused.
    """
    plain = value if len(value) <= MAX_ADDRESS else ""
    if not plain or not plain.isascii():
        raise ValueError(_no_address(value))
    if "%" in plain:
        raise ValueError(f"{quote(value)} has a scope id: write a routable address without it")
    if "/" in plain:
        raise ValueError(f"{quote(value)} is a network: write one address without a mask")
    try:
        parsed = ipaddress.ip_address(plain)
    except ValueError:
        # Some programs read 010 as 8, others as 10.
        hint = ", without leading zeros" if _LEADING_ZERO.search(plain) else ""
        raise ValueError(_no_address(value) + hint) from None
    if isinstance(parsed, ipaddress.IPv6Address) and parsed.ipv4_mapped is not None:
        parsed = parsed.ipv4_mapped
    kind = _unusable(parsed)
    if kind:
        raise ValueError(f"{quote(value)} is {kind}: write the workload's routable address")
    return str(parsed)


def vip(value: str) -> str:
    """Return the canonical text of a service's virtual address; a /32 or /128 is one address."""
    bare, slash, mask = value.partition("/")
    if slash and mask != ("128" if ":" in bare else "32"):
        raise ValueError(
            f"{quote(value)} is a network: this version reads single addresses; list each one"
        )
    return address(bare)


def _no_address(value: str) -> str:
    return (
        f"{quote(value)} is no IP address: write dotted decimal IPv4 or IPv6; "
        "names and unix sockets are not resolved"
    )


def _unusable(parsed: ipaddress.IPv4Address | ipaddress.IPv6Address) -> str:
    """Return why `parsed` can be no workload's address, or "" if it can."""
    if parsed.is_unspecified:
        return "the unspecified address, which connects to loopback"
    if parsed.is_loopback:
        return "a loopback address"
    if parsed.is_multicast:
        return "a multicast address"
    if parsed.is_link_local:
        return "a link-local address"
    if parsed == _IPV4_BROADCAST:
        return "the broadcast address"
    if isinstance(parsed, ipaddress.IPv4Address):
        return "in 0.0.0.0/8, which means this host" if parsed in _THIS_NETWORK else ""
    # RFC 4291 2.5.5.1: deprecated, and a second spelling of an IPv4 address.
    if int(parsed) >> 32 == 0:
        return "an IPv4-compatible address; write the IPv4 address"
    if parsed.is_site_local:
        return "a site-local address, deprecated by RFC 3879"
    return ""
