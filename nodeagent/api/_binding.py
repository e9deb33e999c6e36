"""The annotations and labels that say how a workload takes part: ours, and Istio's.

This module owns the prefix `nodeagent.io/` and the reading of a WorkloadEntry's binding, further
addresses, callers and data plane. It promises one reading for the loader, which refuses mistakes,
and for the mesh, which uses the result. It may not look whether a namespace or node exists.
"""

from __future__ import annotations

import re
from typing import Final

import msgspec

from nodeagent.api import patterns, values
from nodeagent.api._errors import quote
from nodeagent.api._types import WorkloadEntry

__all__ = [
    "ANNOTATION_ADDRESSES",
    "ANNOTATION_CALLERS",
    "ANNOTATION_NETNS",
    "ANNOTATION_PREFIX",
    "LABEL_TUNNEL",
    "NetnsBinding",
    "addresses",
    "callers",
    "check_annotation",
    "check_label",
    "netns_binding",
    "opted_out",
    "speaks_hbone",
]

ANNOTATION_PREFIX: Final = "nodeagent.io/"
ANNOTATION_NETNS: Final = "nodeagent.io/netns"
ANNOTATION_ADDRESSES: Final = "nodeagent.io/addresses"
ANNOTATION_CALLERS: Final = "nodeagent.io/callers"

_KNOWN: Final = (ANNOTATION_ADDRESSES, ANNOTATION_CALLERS, ANNOTATION_NETNS)

_REDIRECTION: Final = "ambient.istio.io/redirection"
LABEL_TUNNEL: Final = "networking.istio.io/tunnel"
_DATAPLANE_MODE: Final = "istio.io/dataplane-mode"

# A misspelt value would take a workload out of the mesh without a word, so others are refused.
_ANNOTATION_VALUES: Final = {_REDIRECTION: ("enabled", "disabled")}
_LABEL_VALUES: Final = {LABEL_TUNNEL: ("http",), _DATAPLANE_MODE: ("ambient", "none")}

NAMED_NETNS: Final = ("/run/netns/", "/var/run/netns/")
"""Where `ip netns` keeps named namespaces; /var/run is /run."""

MAX_PATH: Final = 4096
"""PATH_MAX of Linux."""

MAX_ADDRESSES: Final = 16
"""Further addresses of one workload: dual stack needs one, multi-homed pods a few."""

_NAME: Final = re.compile(r"[A-Za-z0-9_][-A-Za-z0-9_.]*")
_PATH: Final = re.compile(r"(?:/[-A-Za-z0-9_.@+:]+)+")


class NetnsBinding(msgspec.Struct, frozen=True, order=True):
    """A network namespace. `node` is empty for this node; `netns` is a name or an absolute path."""

    node: str
    netns: str


def parse_netns(value: str) -> NetnsBinding:
    """Return the binding that `[NODE:]NAME-or-/PATH` means. Raises ValueError.

    A path of a named namespace becomes the name, so that one namespace has one spelling.
    """
    node, netns = "", value
    if not value.startswith("/") and ":" in value:
        node, _, netns = value.partition(":")
        values.dns_subdomain(node)
    for prefix in NAMED_NETNS:
        netns = netns.removeprefix(prefix) if _NAME.fullmatch(netns[len(prefix) :]) else netns
    good = _PATH.fullmatch(netns) if netns.startswith("/") else _NAME.fullmatch(netns)
    if not good or len(netns) > MAX_PATH or any(part in {".", ".."} for part in netns.split("/")):
        raise ValueError(
            f"{quote(value)} is no binding: write [NODE:]NAME for a named network namespace, or "
            "[NODE:]/ABSOLUTE/PATH, without '.' or '..' parts"
        )
    return NetnsBinding(node, netns)


def parse_addresses(value: str) -> tuple[str, ...]:
    """Return the addresses of a list with commas. Raises ValueError."""
    found = tuple(values.address(part.strip(" ")) for part in value.split(","))
    if len(found) > MAX_ADDRESSES:
        raise ValueError(f"{len(found)} addresses exceed the limit of {MAX_ADDRESSES}")
    if len(set(found)) != len(found):
        raise ValueError(f"{quote(value)} names an address twice: remove one")
    return found


def check_annotation(key: str, value: str) -> None:
    """Raise ValueError if an annotation that has a meaning here has none with this value."""
    if key == ANNOTATION_NETNS:
        parse_netns(value)
    elif key == ANNOTATION_ADDRESSES:
        parse_addresses(value)
    elif key == ANNOTATION_CALLERS:
        patterns.callers(value)
    elif key.startswith(ANNOTATION_PREFIX):
        raise ValueError(f"unknown annotation; known: {', '.join(_KNOWN)}")
    else:
        _check_value(value, _ANNOTATION_VALUES.get(key))


def check_label(key: str, value: str) -> None:
    """Raise ValueError if a label that has a meaning here has none with this value."""
    if key.startswith(ANNOTATION_PREFIX):
        raise ValueError("is an annotation, not a label: move it to metadata.annotations")
    _check_value(value, _LABEL_VALUES.get(key))


def _check_value(value: str, known: tuple[str, ...] | None) -> None:
    if known is not None and value not in known:
        raise ValueError(f"{quote(value)} has no meaning; write {' or '.join(known)}")


def netns_binding(entry: WorkloadEntry) -> NetnsBinding | None:
    """Return where `entry` runs, or None if nothing says so."""
    value = entry.metadata.annotations.get(ANNOTATION_NETNS)
    return None if value is None else parse_netns(value)


def addresses(entry: WorkloadEntry) -> tuple[str, ...]:
    """Return all addresses of `entry`, that of its spec first, each once."""
    value = entry.metadata.annotations.get(ANNOTATION_ADDRESSES)
    further = () if value is None else parse_addresses(value)
    return tuple(dict.fromkeys((entry.spec.address, *further)))


def callers(entry: WorkloadEntry) -> tuple[str, ...] | None:
    """Return who may call `entry` by its own annotation, None if that is not its business."""
    value = entry.metadata.annotations.get(ANNOTATION_CALLERS)
    return None if value is None else patterns.callers(value)


def opted_out(entry: WorkloadEntry) -> bool:
    """Return whether `entry` says that it takes no part in the mesh."""
    return entry.labels.get(_DATAPLANE_MODE) == "none"


def speaks_hbone(entry: WorkloadEntry) -> bool:
    """Return whether `entry` is reached through HBONE."""
    annotations = entry.metadata.annotations
    return not opted_out(entry) and (
        ANNOTATION_NETNS in annotations
        or annotations.get(_REDIRECTION) == "enabled"
        or entry.labels.get(LABEL_TUNNEL) == "http"
    )
