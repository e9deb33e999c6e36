"""Reading rules, routes, qdiscs and filters of one namespace through pyroute2.

This module owns the translation from netlink to the plan's values. It promises to report a rule or
route with any selector that ours never have as different from ours. It may not change anything.
All functions block and use a socket that was made inside the namespace.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from typing import Any, Final

from pyroute2 import IPRoute

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

__all__ = ["PARENTS", "read_clsact", "read_filters", "read_routes", "read_rules"]

PARENTS: Final = {"egress": 0xFFFFFFF3, "ingress": 0xFFFFFFF2}
"""TC_H_CLSACT with TC_H_MIN_EGRESS and TC_H_MIN_INGRESS (linux/pkt_sched.h)."""

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
        for message in route.get_rules(family=socket.AF_UNSPEC)
        if message["family"] in (V4, V6)
    )
    return frozenset(
        rule for rule in rules if 0 < rule.preference < PREFERENCES.stop or rule.table == TABLE
    )


# --- routes ------------------------------------------------------------------------------------


def read_routes(route: IPRoute) -> frozenset[Route]:
    """Return what is in our table."""
    return frozenset(
        Route(
            message["family"],
            message.get_attr("RTA_PREFSRC") or "",
            message.get_attr("RTA_OIF") or 0,
            f"{message.get_attr('RTA_DST')}/{message['dst_len']}"
            if message["dst_len"]
            else "default",
            message["type"],
        )
        for message in route.get_routes(family=socket.AF_UNSPEC, table=TABLE)
        if message["family"] in (V4, V6)
    )


# --- qdiscs and filters ------------------------------------------------------------------------


def read_clsact(route: IPRoute) -> frozenset[int]:
    """Return the indices of devices that have a clsact qdisc."""
    return frozenset(
        message["index"]
        for message in route.get_qdiscs()
        if message.get_attr("TCA_KIND") == "clsact"
    )


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
