"""Changing rules, routes, qdiscs and filters of one namespace: many changes, one system call.

This module owns the translation from the plan's actions to netlink. It promises to do exactly
what the actions say, all that can be done of them, and to report each that failed in the kernel's
own words; an action whose result is there already has succeeded. It may not decide anything.
`write` blocks and runs inside the namespace.
"""

from __future__ import annotations

import errno
import functools
import os
import socket
import struct
from collections.abc import Sequence
from typing import Any, Final

from pyroute2.netlink.rtnl import (
    RTM_DELQDISC,
    RTM_DELROUTE,
    RTM_DELRULE,
    RTM_DELTFILTER,
    RTM_NEWQDISC,
    RTM_NEWROUTE,
    RTM_NEWRULE,
    RTM_NEWTFILTER,
)
from pyroute2.netlink.rtnl.fibmsg import fibmsg
from pyroute2.netlink.rtnl.rtmsg import rtmsg
from pyroute2.netlink.rtnl.tcmsg import tcmsg

from nodeagent.capture.actions import (
    FILTER_HANDLE,
    FILTER_NAME,
    FILTER_PRIORITY,
    AddClsact,
    AddFilter,
    AddRoute,
    AddRule,
    DeleteClsact,
    DeleteFilter,
    DeleteRoute,
    DeleteRule,
    Filter,
    NetlinkAction,
    Route,
    Rule,
)
from nodeagent.capture.layout import TABLE, V4, V6
from nodeagent.capture.netlink_read import PARENTS
from nodeagent.pods.netlink import (
    ACK,
    CREATE,
    EXCLUSIVE,
    Attributes,
    Outcome,
    Rtnetlink,
    Template,
)
from nodeagent.pods.netlink import encode as encode_message

__all__ = ["Guard", "encode", "write"]

ADD: Final = ACK | CREATE | EXCLUSIVE

MOST_RULES: Final = 64
"""Encoded rules that are kept: three times those of a pod, to add and to delete."""

CLSACT: Final = 0xFFFFFFF1
CLSACT_HANDLE: Final = 0xFFFF0000
"""TC_H_CLSACT, and the handle that this qdisc always has (linux/pkt_sched.h)."""

ETH_P_ALL: Final = 3
RTN_LOCAL: Final = 2
RTPROT_STATIC: Final = 4
RT_SCOPE_HOST: Final = 254
RT_SCOPE_NOWHERE: Final = 255
DIRECT_ACTION: Final = 1
"""TCA_BPF_FLAG_ACT_DIRECT (linux/pkt_cls.h)."""

_NUMBER: Final = struct.Struct("=I")
_SOURCES: Final = {V4: "203.0.113.90", V6: "2001:db8:5a5a:5a5a:5a5a:5a5a:5a5a:5a5a"}
"""Where a template has a pod's address: addresses of documentation, which nobody has."""

Guard = tuple[int, int]
"""What a filter runs: the program's descriptor, and the pod that it is told to be of."""

_GONE: Final = frozenset(
    {errno.ENOENT, errno.ESRCH, errno.ENODEV, errno.EINVAL, errno.EADDRNOTAVAIL}
)
"""What the kernel says when the thing to delete, or its parent, is not there."""


@functools.lru_cache(MOST_RULES)
def _rule(kind: int, flags: int, rule: Rule) -> bytes:
    # Rules are the same in every pod.
    fields = {"family": rule.family, "action": rule.action}
    attributes: list[tuple[str, Any]] = [("FRA_PRIORITY", rule.preference)]
    if rule.table:
        attributes.append(("FRA_TABLE", rule.table))
    if rule.target:
        attributes.append(("FRA_GOTO", rule.target))
    if rule.mask:
        attributes += [("FRA_FWMARK", rule.mark), ("FRA_FWMASK", rule.mask)]
    if rule.interface:
        attributes.append(("FRA_IIFNAME", rule.interface))
    if rule.protocol:
        attributes.append(("FRA_IP_PROTO", rule.protocol))
    return encode_message(fibmsg, kind, flags, fields, attributes)


def _route(kind: int, flags: int, item: Route, protocol: int, scope: int) -> bytes:
    where, _, bits = item.destination.partition("/")
    fields = {
        "family": item.family,
        "dst_len": int(bits or 0),
        "table": TABLE,
        "proto": protocol,
        "scope": scope,
        "type": item.kind,
    }
    attributes: list[tuple[str, Any]] = [("RTA_TABLE", TABLE)]
    if bits:
        attributes.append(("RTA_DST", where))
    if item.device:
        attributes.append(("RTA_OIF", item.device))
    if item.source:
        attributes.append(("RTA_PREFSRC", item.source))
    return encode_message(rtmsg, kind, flags, fields, attributes)


def _add_route(item: Route) -> bytes:
    # The scope as iproute2 sets it for local routes; IPv6 ignores it.
    scope = RT_SCOPE_HOST if item.kind == RTN_LOCAL else 0
    return _route(RTM_NEWROUTE, ADD, item, RTPROT_STATIC, scope)


@functools.lru_cache(2)
def _own_route_template(family: int) -> Template:
    """Return what adds our route of a family; its hole is the source."""
    source = _SOURCES[family]
    return Template(_add_route(Route(family, source)), socket.inet_pton(family, source))


@functools.lru_cache(MOST_RULES)
def _qdisc(kind: int, flags: int, device: int) -> bytes:
    fields = {"index": device, "handle": CLSACT_HANDLE, "parent": CLSACT}
    return encode_message(tcmsg, kind, flags, fields, [("TCA_KIND", "clsact")])


def _filter(kind: int, flags: int, item: Filter, options: Attributes = ()) -> bytes:
    fields = {
        "index": item.device,
        "handle": item.handle,
        "parent": PARENTS[item.direction],
        "info": item.priority << 16 | socket.htons(ETH_P_ALL),
    }
    attributes: list[tuple[str, Any]] = [("TCA_KIND", "bpf")]
    if options:
        attributes.append(("TCA_OPTIONS", {"attrs": list(options)}))
    return encode_message(tcmsg, kind, flags, fields, attributes)


@functools.lru_cache(2)
def _guard_template(direction: str) -> Template:
    """Return what sets the guard; its holes are device, pod and program."""
    device, pod, program = 0x5A000001, 0x5A000002, 0x5A000003
    ours = Filter(device, direction, FILTER_PRIORITY, FILTER_HANDLE, FILTER_NAME, 0)
    options = (
        ("TCA_BPF_CLASSID", pod),
        ("TCA_BPF_FD", program),
        ("TCA_BPF_NAME", FILTER_NAME),
        ("TCA_BPF_FLAGS", DIRECT_ACTION),
    )
    # Without EXCLUSIVE: replaces what is in our place, without a moment of none.
    request = _filter(RTM_NEWTFILTER, ACK | CREATE, ours, options)
    return Template(request, *(_NUMBER.pack(hole) for hole in (device, pod, program)))


def _guard(device: int, direction: str, guard: Guard) -> bytes:
    program, pod = guard
    values = (_NUMBER.pack(value) for value in (device, pod, program))
    return _guard_template(direction).fill(*values)


def encode(action: NetlinkAction, guard: Guard | None) -> bytes:
    """Return the message for `action`; only AddFilter needs `guard`."""
    match action:
        case AddRule(rule):
            return _rule(RTM_NEWRULE, ADD, rule)
        case DeleteRule(rule):
            return _rule(RTM_DELRULE, ACK, rule)
        case AddRoute(item):
            if item == Route(item.family, item.source) and item.source:
                source = socket.inet_pton(item.family, item.source)
                return _own_route_template(item.family).fill(source)
            return _add_route(item)
        case DeleteRoute(item):
            return _route(RTM_DELROUTE, ACK, item, 0, RT_SCOPE_NOWHERE)
        case AddClsact(device):
            return _qdisc(RTM_NEWQDISC, ADD, device.index)
        case DeleteClsact(index):
            return _qdisc(RTM_DELQDISC, ACK, index)
        case DeleteFilter(item):
            return _filter(RTM_DELTFILTER, ACK, item)
        case AddFilter(device, direction):
            if guard is None:
                raise ValueError("a filter needs a program")
            return _guard(device.index, direction, guard)


def write(steps: Sequence[tuple[NetlinkAction, Guard | None]]) -> list[OSError | None]:
    """Do all actions, each given with what `encode` needs.

    Returns for each in turn its error, None if it succeeded.
    """
    with Rtnetlink() as route:
        outcomes = route.change([encode(action, guard) for action, guard in steps])
    return [_error(action, outcome) for (action, _), outcome in zip(steps, outcomes, strict=True)]


def _error(action: NetlinkAction, outcome: Outcome) -> OSError | None:
    code, words = outcome
    if not code or _is_done(action, code):
        return None
    return OSError(code, f"{words or os.strerror(code)} ({action})")


def _is_done(action: NetlinkAction, code: int) -> bool:
    if isinstance(action, DeleteRule | DeleteRoute | DeleteClsact | DeleteFilter):
        return code in _GONE
    return code == errno.EEXIST and not isinstance(action, AddFilter)
