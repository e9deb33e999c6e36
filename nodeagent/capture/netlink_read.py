"""Reading rules, routes, qdiscs and filters of one namespace.

This module owns the translation from rtnetlink to the plan's values. It promises to report a rule
or route with any selector that ours never have as different from ours. It may not change anything.
All functions block and use a socket that was made inside the namespace.
"""

from __future__ import annotations

import ipaddress
import struct
import sys
from collections.abc import Iterator
from typing import Final

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
from nodeagent.pods.netlink import Rtnetlink, attributes, number

__all__ = ["PARENTS", "read_clsact", "read_filters", "read_routes", "read_rules"]

PARENTS: Final = {"egress": 0xFFFFFFF3, "ingress": 0xFFFFFFF2}
"""TC_H_CLSACT with TC_H_MIN_EGRESS and TC_H_MIN_INGRESS (linux/pkt_sched.h)."""

RTM_GETROUTE: Final = 26
RTM_GETRULE: Final = 34
RTM_GETQDISC: Final = 38
RTM_GETTFILTER: Final = 46

RULE: Final = struct.Struct("=BBBBBxxBI")
"""struct fib_rule_hdr: family, lengths of destination and source, TOS, table, action, flags."""

ROUTE: Final = struct.Struct("=BBBBBBBBI")
"""struct rtmsg: family, lengths of destination and source, TOS, table, protocol, scope, type,
flags."""

TRAFFIC: Final = struct.Struct("=BxxxiIII")
"""struct tcmsg: family, device, handle, parent, info."""

FRA_IIFNAME: Final = 3
FRA_GOTO: Final = 4
FRA_PRIORITY: Final = 6
FRA_FWMARK: Final = 10
FRA_SUPPRESS_PREFIXLEN: Final = 14
FRA_TABLE: Final = 15
FRA_FWMASK: Final = 16
FRA_PROTOCOL: Final = 21
FRA_IP_PROTO: Final = 22
"""linux/fib_rules.h."""

RTA_DST: Final = 1
RTA_OIF: Final = 4
RTA_PREFSRC: Final = 7
RTA_TABLE: Final = 15

TCA_KIND: Final = 1
TCA_OPTIONS: Final = 2
TCA_BPF_CLASSID: Final = 3
TCA_BPF_NAME: Final = 7
TCA_BPF_ID: Final = 11

_KNOWN: Final = frozenset(
    {
        FRA_TABLE,
        FRA_GOTO,
        FRA_PRIORITY,
        FRA_FWMARK,
        FRA_FWMASK,
        FRA_IIFNAME,
        FRA_IP_PROTO,
        FRA_PROTOCOL,
    }
)
"""Attributes that Rule has fields for, and FRA_PROTOCOL, which only says who added the rule."""

_NONE: Final = b"\xff\xff\xff\xff"
"""FRA_SUPPRESS_PREFIXLEN that suppresses nothing: every rule has it."""

_SELECTORS: Final = {1: "to", 2: "from", 17: "oif", 19: "l3mdev", 20: "uidrange", 23: "sport"}
"""Words of ip-rule(8) for attributes that ours never have."""


def _number(found: dict[int, bytes], kind: int) -> int:
    return int.from_bytes(found.get(kind, b""), sys.byteorder)


def _text(found: dict[int, bytes], kind: int) -> str:
    return found.get(kind, b"").rstrip(b"\0").decode("utf-8", "replace")


# --- rules -------------------------------------------------------------------------------------


def _rule(body: bytes) -> Rule:
    family, to_bits, from_bits, tos, table, action, flags = RULE.unpack_from(body)
    found = attributes(body, RULE.size)
    other = [
        f"{_SELECTORS.get(kind, f'attribute {kind}')}={value.hex()}"
        for kind, value in sorted(found.items())
        if kind not in _KNOWN and (kind, value) != (FRA_SUPPRESS_PREFIXLEN, _NONE)
    ]
    # Flags: FIB_RULE_INVERT, FIB_RULE_UNRESOLVED (a jump to nowhere), FIB_RULE_PERMANENT and so on.
    fields = {"dst_len": to_bits, "src_len": from_bits, "tos": tos, "flags": flags}
    other += [f"{name}={value}" for name, value in fields.items() if value]
    return Rule(
        family,
        _number(found, FRA_PRIORITY),
        action,
        (_number(found, FRA_TABLE) or table) if action == LOOKUP else 0,
        _number(found, FRA_GOTO) if action == JUMP else 0,
        _number(found, FRA_FWMARK),
        _number(found, FRA_FWMASK),
        _text(found, FRA_IIFNAME),
        _number(found, FRA_IP_PROTO),
        " ".join(other),
    )


def read_rules(route: Rtnetlink) -> frozenset[Rule]:
    """Return rules up to our last priority, and any that lead to our table."""
    bodies = route.dump(RTM_GETRULE, RULE.pack(0, 0, 0, 0, 0, 0, 0))
    rules = (_rule(body) for body in bodies if body[0] in (V4, V6))
    return frozenset(
        rule for rule in rules if 0 < rule.preference < PREFERENCES.stop or rule.table == TABLE
    )


# --- routes ------------------------------------------------------------------------------------


def _address(packed: bytes | None) -> str:
    return str(ipaddress.ip_address(packed)) if packed else ""


def _route(body: bytes) -> Route | None:
    family, bits, _, _, table, _, _, kind, _ = ROUTE.unpack_from(body)
    found = attributes(body, ROUTE.size)
    if family not in (V4, V6) or (_number(found, RTA_TABLE) or table) != TABLE:
        return None
    return Route(
        family,
        _address(found.get(RTA_PREFSRC)),
        _number(found, RTA_OIF),
        f"{_address(found.get(RTA_DST))}/{bits}" if bits else "default",
        kind,
    )


def read_routes(route: Rtnetlink) -> frozenset[Route]:
    """Return what is in our table."""
    request = ROUTE.pack(0, 0, 0, 0, 0, 0, 0, 0, 0) + number(RTA_TABLE, TABLE)
    found = (_route(body) for body in route.dump(RTM_GETROUTE, request))
    return frozenset(item for item in found if item is not None)


# --- qdiscs and filters ------------------------------------------------------------------------


def read_clsact(route: Rtnetlink) -> frozenset[int]:
    """Return the indices of devices that have a clsact qdisc."""
    return frozenset(
        TRAFFIC.unpack_from(body)[1]
        for body in route.dump(RTM_GETQDISC, TRAFFIC.pack(0, 0, 0, 0, 0))
        if _text(attributes(body, TRAFFIC.size), TCA_KIND) == "clsact"
    )


def _filters(route: Rtnetlink, device: int, direction: str) -> Iterator[Filter]:
    for body in route.dump(RTM_GETTFILTER, TRAFFIC.pack(0, device, 0, PARENTS[direction], 0)):
        _, _, handle, _, info = TRAFFIC.unpack_from(body)
        if not handle:
            continue  # the head of a priority's list
        found = attributes(body, TRAFFIC.size)
        is_bpf = _text(found, TCA_KIND) == "bpf"
        options = attributes(found.get(TCA_OPTIONS, b"")) if is_bpf else {}
        yield Filter(
            device,
            direction,
            info >> 16,
            handle,
            _text(options, TCA_BPF_NAME),
            _number(options, TCA_BPF_ID),
            _number(options, TCA_BPF_CLASSID),
        )


def read_filters(route: Rtnetlink, devices: frozenset[int]) -> frozenset[Filter]:
    """Return the filters of devices that have a clsact qdisc."""
    return frozenset(
        item
        for device in devices
        for direction in DIRECTIONS
        for item in _filters(route, device, direction)
    )
