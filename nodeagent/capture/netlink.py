"""Rules, routes, qdiscs and filters of one namespace through pyroute2.

This module owns the translation between the plan's values and netlink. It promises to add exactly
what it is told and to report a rule or route with any selector that ours never have as different
from ours. It may not decide anything. All functions block and run inside the namespace.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterator
from typing import Any, Final

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from nodeagent.capture.actions import (
    DIRECTIONS,
    FILTER_HANDLE,
    FILTER_NAME,
    FILTER_PRIORITY,
    JUMP,
    LOOKUP,
    PREFERENCES,
    Filter,
    Route,
    Rule,
)
from nodeagent.capture.layout import TABLE

__all__ = [
    "add_clsact",
    "add_route",
    "add_rule",
    "delete_clsact",
    "delete_filter",
    "delete_route",
    "delete_rule",
    "put_filter",
    "read_clsact",
    "read_filters",
    "read_routes",
    "read_rules",
]

PARENTS: Final = {"egress": 0xFFFFFFF3, "ingress": 0xFFFFFFF2}
"""TC_H_CLSACT with TC_H_MIN_EGRESS and TC_H_MIN_INGRESS (linux/pkt_sched.h)."""

ETH_P_ALL: Final = 3
RTN_LOCAL: Final = 2
RTPROT_STATIC: Final = 4
TCA_BPF_ID: Final = 11
TCA_HEADER: Final = 4

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

_GONE: Final = {errno.ENOENT, errno.ESRCH, errno.ENODEV, errno.EINVAL, errno.EADDRNOTAVAIL}
"""What the kernel says when the thing to delete, or its parent, is not there."""


def _forgiving(allowed: set[int], function: Any, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
    try:
        function(*args, **kwargs)
    except NetlinkError as error:
        if error.code not in allowed:
            raise OSError(error.code, str(error.args[-1])) from None


# --- rules -------------------------------------------------------------------------------------


def _rule(message: Any) -> Rule:  # noqa: ANN401 - pyroute2 is untyped
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
        message.get_attr("FRA_PRIORITY") or 0,
        action,
        (message.get_attr("FRA_TABLE") or message["table"]) if action == LOOKUP else 0,
        (message.get_attr("FRA_GOTO") or 0) if action == JUMP else 0,
        message.get_attr("FRA_FWMARK") or 0,
        message.get_attr("FRA_FWMASK") or 0,
        message.get_attr("FRA_IIFNAME") or "",
        message.get_attr("FRA_IP_PROTO") or 0,
        " ".join(other),
    )


def read_rules(route: IPRoute) -> frozenset[Rule]:
    """Return rules up to our last priority, and any that lead to our table."""
    rules = (
        _rule(message)
        for family in (socket.AF_INET, socket.AF_INET6)
        for message in route.get_rules(family=family)
    )
    return frozenset(
        rule for rule in rules if 0 < rule.preference < PREFERENCES.stop or rule.table == TABLE
    )


def _rule_request(rule: Rule) -> dict[str, Any]:
    request: dict[str, Any] = {
        "family": rule.family,
        "priority": rule.preference,
        "action": rule.action,
    }
    if rule.table:
        request["table"] = rule.table
    if rule.target:
        request["goto"] = rule.target
    if rule.mask:
        request |= {"fwmark": rule.mark, "fwmask": rule.mask}
    if rule.interface:
        request["iifname"] = rule.interface
    if rule.protocol:
        request["ip_proto"] = rule.protocol
    return request


def add_rule(route: IPRoute, rule: Rule) -> None:
    _forgiving({errno.EEXIST}, route.rule, "add", **_rule_request(rule))


def delete_rule(route: IPRoute, rule: Rule) -> None:
    _forgiving(_GONE, route.rule, "del", **_rule_request(rule))


# --- routes ------------------------------------------------------------------------------------


def read_routes(route: IPRoute) -> frozenset[Route]:
    """Return what is in our table."""
    return frozenset(
        Route(
            family,
            message.get_attr("RTA_PREFSRC") or "",
            message.get_attr("RTA_OIF") or 0,
            f"{message.get_attr('RTA_DST')}/{message['dst_len']}"
            if message["dst_len"]
            else "default",
            message["type"],
        )
        for family in (socket.AF_INET, socket.AF_INET6)
        for message in route.get_routes(family=family, table=TABLE)
    )


def _route_request(item: Route) -> dict[str, Any]:
    request: dict[str, Any] = {
        "family": item.family,
        "dst": item.destination,
        "type": item.kind,
        "oif": item.device,
        "table": TABLE,
    }
    if item.source:
        request["prefsrc"] = item.source
    if item.kind == RTN_LOCAL:
        # RT_SCOPE_HOST, as iproute2 sets it; IPv6 ignores it.
        request["scope"] = 254
    return request


def add_route(route: IPRoute, item: Route) -> None:
    _forgiving({errno.EEXIST}, route.route, "add", proto=RTPROT_STATIC, **_route_request(item))


def delete_route(route: IPRoute, item: Route) -> None:
    _forgiving(_GONE, route.route, "del", **_route_request(item))


# --- qdiscs and filters ------------------------------------------------------------------------


def read_clsact(route: IPRoute) -> frozenset[int]:
    """Return the indices of devices that have a clsact qdisc."""
    return frozenset(
        message["index"]
        for message in route.get_qdiscs()
        if message.get_attr("TCA_KIND") == "clsact"
    )


def add_clsact(route: IPRoute, device: int) -> None:
    _forgiving({errno.EEXIST}, route.tc, "add", "clsact", device)


def delete_clsact(route: IPRoute, device: int) -> None:
    _forgiving(_GONE, route.tc, "del", "clsact", device)


def _program(options: Any) -> int:  # noqa: ANN401
    """Return TCA_BPF_ID, which pyroute2 leaves undecoded."""
    for name, value in options["attrs"]:
        if name == "UNKNOWN" and value["header"]["type"] == TCA_BPF_ID:
            start = value.offset + TCA_HEADER
            number: int = struct.unpack("I", bytes(value.data[start : start + 4]))[0]
            return number
    return 0


def _filters(route: IPRoute, device: int, direction: str) -> Iterator[Filter]:
    for message in route.get_filters(index=device, parent=PARENTS[direction]):
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
        )


def read_filters(route: IPRoute, devices: frozenset[int]) -> frozenset[Filter]:
    """Return the filters of devices that have a clsact qdisc."""
    return frozenset(
        item
        for device in devices
        for direction in DIRECTIONS
        for item in _filters(route, device, direction)
    )


def put_filter(route: IPRoute, device: int, direction: str, program: int) -> None:
    """Put the program (a descriptor) in our place, instead of what may be there."""
    _forgiving(
        set(),
        route.tc,
        "replace-filter",
        "bpf",
        index=device,
        handle=FILTER_HANDLE,
        fd=program,
        name=FILTER_NAME,
        parent=PARENTS[direction],
        prio=FILTER_PRIORITY,
        protocol=ETH_P_ALL,
        direct_action=True,
    )


def delete_filter(route: IPRoute, item: Filter) -> None:
    _forgiving(
        _GONE,
        route.tc,
        "del-filter",
        "bpf",
        index=item.device,
        handle=item.handle,
        parent=PARENTS[item.direction],
        prio=item.priority,
        protocol=ETH_P_ALL,
    )
