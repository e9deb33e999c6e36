"""Reading rules, routes, qdiscs and filters of one namespace through pyroute2.

This module owns the translation from netlink to the plan's values. It promises to report a rule or
route with any selector that ours never have as different from ours. It may not change anything.
All functions block and use a socket that was made inside the namespace.

What is the same in every pod (rules, the qdisc of `lo`) is decoded once and known by its bytes.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterator
from typing import Any, ClassVar, Final

from pyroute2.netlink.rtnl import RTM_GETQDISC, RTM_GETROUTE, RTM_GETRULE, RTM_GETTFILTER
from pyroute2.netlink.rtnl.fibmsg import fibmsg
from pyroute2.netlink.rtnl.rtmsg import rtmsg
from pyroute2.netlink.rtnl.tcmsg import tcmsg

from nodeagent.capture.actions import (
    DIRECTIONS,
    JUMP,
    LOOKUP,
    PREFERENCES,
    Filter,
    Route,
    Rule,
)
from nodeagent.capture.layout import TABLE, V4, V6
from nodeagent.pods.netlink import DUMP, Rtnetlink, Selection, decode, encode, get

__all__ = ["PARENTS", "read_clsact", "read_filters", "read_routes", "read_rules"]

PARENTS: Final = {"egress": 0xFFFFFFF3, "ingress": 0xFFFFFFF2}
"""TC_H_CLSACT with TC_H_MIN_EGRESS and TC_H_MIN_INGRESS (linux/pkt_sched.h)."""

TCA_BPF_ID: Final = 11
TCA_HEADER: Final = 4

MOST_KEPT: Final = 128
"""Rules, and as many qdiscs, that are remembered by their bytes: ten times those of a pod."""

_RULES: Final = encode(fibmsg, RTM_GETRULE, DUMP, {})


class _AnyFamily(rtmsg):  # type: ignore[misc]  # pyroute2 is untyped
    """pyroute2 puts IPv4 in the place of "any"."""

    defaults: ClassVar[dict[str, int]] = {}


_ROUTES: Final = encode(_AnyFamily, RTM_GETROUTE, DUMP, {}, [("RTA_TABLE", TABLE)])
_QDISCS: Final = encode(tcmsg, RTM_GETQDISC, DUMP, {})

_ROUTE: Final = Selection(rtmsg, ("RTA_TABLE", "RTA_DST", "RTA_OIF", "RTA_PREFSRC"))
_KIND: Final = Selection(tcmsg, ("TCA_KIND",))
_FILTER: Final = Selection(tcmsg, ("TCA_KIND", "TCA_OPTIONS"))

_RULE_ATTRIBUTES: Final = {
    "FRA_TABLE",
    "FRA_GOTO",
    "FRA_PRIORITY",
    "FRA_FWMARK",
    "FRA_FWMASK",
    "FRA_IIFNAME",
    "FRA_IP_PROTO",
    "FRA_PROTOCOL",
}
"""Attributes that Rule has fields for, and FRA_PROTOCOL, which only says who added the rule."""


# --- rules -------------------------------------------------------------------------------------


@functools.lru_cache(MOST_KEPT)
def _rule(data: bytes) -> Rule:
    message = decode(fibmsg, data)
    action = message["action"]
    other = [
        f"{name}={value}"
        for name, value in message["attrs"]
        if name not in _RULE_ATTRIBUTES and (name, value) != ("FRA_SUPPRESS_PREFIXLEN", 0xFFFFFFFF)
    ]
    other += [f"{name}={message[name]}" for name in ("src_len", "dst_len", "tos") if message[name]]
    # FIB_RULE_INVERT, FIB_RULE_UNRESOLVED (a jump to nowhere), FIB_RULE_PERMANENT and the like.
    other += [f"flags={message['flags']}"] if message["flags"] else []
    return Rule(
        message["family"],
        get(message, "FRA_PRIORITY"),
        action,
        (get(message, "FRA_TABLE") or message["table"]) if action == LOOKUP else 0,
        get(message, "FRA_GOTO") if action == JUMP else 0,
        get(message, "FRA_FWMARK"),
        get(message, "FRA_FWMASK"),
        message.get_attr("FRA_IIFNAME") or "",
        get(message, "FRA_IP_PROTO"),
        " ".join(other),
    )


def read_rules(route: Rtnetlink) -> frozenset[Rule]:
    """Return rules up to our last priority, and any that lead to our table."""
    rules = (_rule(data) for data in route.dump(_RULES))
    return frozenset(
        rule
        for rule in rules
        if rule.family in (V4, V6)
        and (0 < rule.preference < PREFERENCES.stop or rule.table == TABLE)
    )


# --- routes ------------------------------------------------------------------------------------


def _route(data: bytes) -> Route | None:
    message = decode(rtmsg, data)
    if message["family"] not in (V4, V6) or get(message, "RTA_TABLE") != TABLE:
        return None
    return Route(
        message["family"],
        message.get_attr("RTA_PREFSRC") or "",
        get(message, "RTA_OIF"),
        f"{message.get_attr('RTA_DST')}/{message['dst_len']}" if message["dst_len"] else "default",
        message["type"],
    )


def read_routes(route: Rtnetlink) -> frozenset[Route]:
    """Return what is in our table."""
    found = (_route(_ROUTE.of(data)) for data in route.dump(_ROUTES))
    return frozenset(item for item in found if item is not None)


# --- qdiscs and filters ------------------------------------------------------------------------


@functools.lru_cache(MOST_KEPT)
def _qdisc(data: bytes) -> tuple[int, str]:
    """Return device and kind."""
    message = decode(tcmsg, data)
    return message["index"], message.get_attr("TCA_KIND") or ""


def read_clsact(route: Rtnetlink) -> frozenset[int]:
    """Return the indices of devices that have a clsact qdisc."""
    found = (_qdisc(_KIND.of(data)) for data in route.dump(_QDISCS))
    return frozenset(device for device, kind in found if kind == "clsact")


def _program(options: Any) -> int:  # noqa: ANN401 - pyroute2 is untyped
    """Return TCA_BPF_ID, which pyroute2 leaves undecoded."""
    for name, value in options["attrs"]:
        if name == "UNKNOWN" and value["header"]["type"] == TCA_BPF_ID:
            start = value.offset + TCA_HEADER
            number: int = struct.unpack("I", bytes(value.data[start : start + 4]))[0]
            return number
    return 0


@functools.lru_cache(MOST_KEPT)
def _filters_of(device: int, direction: str) -> bytes:
    fields = {"index": device, "parent": PARENTS[direction]}
    return encode(tcmsg, RTM_GETTFILTER, DUMP, fields)


def _filters(route: Rtnetlink, device: int, direction: str) -> Iterator[Filter]:
    for data in route.dump(_filters_of(device, direction)):
        message = decode(tcmsg, _FILTER.of(data))
        if not message["handle"]:
            continue  # the head of a priority's list
        options = message.get_attr("TCA_OPTIONS")
        is_bpf = message.get_attr("TCA_KIND") == "bpf" and options is not None
        yield Filter(
            device,
            direction,
            message["info"] >> 16,
            message["handle"],
            (options.get_attr("TCA_BPF_NAME") or "") if is_bpf else "",
            _program(options) if is_bpf else 0,
            get(options, "TCA_BPF_CLASSID") if is_bpf else 0,
        )


def read_filters(route: Rtnetlink, devices: frozenset[int]) -> frozenset[Filter]:
    """Return the filters of devices that have a clsact qdisc."""
    return frozenset(
        item
        for device in devices
        for direction in DIRECTIONS
        for item in _filters(route, device, direction)
    )
