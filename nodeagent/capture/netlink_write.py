"""Changing rules, routes, qdiscs and filters of one namespace: many changes, one system call.

This module owns the translation from the plan's actions to rtnetlink. It promises to do exactly
what the actions say, all that can be done of them, and to report each that failed in the kernel's
own words; an action whose result is there already has succeeded. It may not decide anything.
`write` blocks and runs inside the namespace.
"""

from __future__ import annotations

import errno
import functools
import ipaddress
import os
import socket
from collections.abc import Sequence
from typing import Final

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
from nodeagent.capture.layout import TABLE
from nodeagent.capture.netlink_read import (
    FRA_FWMARK,
    FRA_FWMASK,
    FRA_GOTO,
    FRA_IIFNAME,
    FRA_IP_PROTO,
    FRA_PRIORITY,
    FRA_TABLE,
    PARENTS,
    ROUTE,
    RTA_DST,
    RTA_OIF,
    RTA_PREFSRC,
    RTA_TABLE,
    RULE,
    TCA_BPF_CLASSID,
    TCA_BPF_NAME,
    TCA_KIND,
    TCA_OPTIONS,
    TRAFFIC,
)
from nodeagent.pods.netlink import (
    ACK,
    CREATE,
    EXCLUSIVE,
    Outcome,
    Rtnetlink,
    attribute,
    message,
    number,
    text,
)

__all__ = ["Guard", "encode", "write"]

RTM_NEWROUTE: Final = 24
RTM_DELROUTE: Final = 25
RTM_NEWRULE: Final = 32
RTM_DELRULE: Final = 33
RTM_NEWQDISC: Final = 36
RTM_DELQDISC: Final = 37
RTM_NEWTFILTER: Final = 44
RTM_DELTFILTER: Final = 45

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
TCA_BPF_FD: Final = 6
TCA_BPF_FLAGS: Final = 8
DIRECT_ACTION: Final = 1

Guard = tuple[int, int]
"""What a filter runs: the program's descriptor, and the pod that it is told to be of."""

_GONE: Final = frozenset(
    {errno.ENOENT, errno.ESRCH, errno.ENODEV, errno.EINVAL, errno.EADDRNOTAVAIL}
)
"""What the kernel says when the thing to delete, or its parent, is not there."""


@functools.lru_cache(MOST_RULES)
def _rule(rule: Rule) -> bytes:
    # Rules are the same in every pod.
    body = RULE.pack(rule.family, 0, 0, 0, rule.table if rule.table < 256 else 0, rule.action, 0)  # noqa: PLR2004 - an octet
    body += number(FRA_PRIORITY, rule.preference)
    if rule.table:
        body += number(FRA_TABLE, rule.table)
    if rule.target:
        body += number(FRA_GOTO, rule.target)
    if rule.mask:
        body += number(FRA_FWMARK, rule.mark) + number(FRA_FWMASK, rule.mask)
    if rule.interface:
        body += text(FRA_IIFNAME, rule.interface)
    if rule.protocol:
        body += attribute(FRA_IP_PROTO, bytes((rule.protocol,)))
    return body


def _route(item: Route, protocol: int, scope: int) -> bytes:
    where, _, bits = item.destination.partition("/")
    body = ROUTE.pack(item.family, int(bits or 0), 0, 0, TABLE, protocol, scope, item.kind, 0)
    body += number(RTA_TABLE, TABLE)
    if bits:
        body += attribute(RTA_DST, ipaddress.ip_address(where).packed)
    if item.device:
        body += number(RTA_OIF, item.device)
    if item.source:
        body += attribute(RTA_PREFSRC, ipaddress.ip_address(item.source).packed)
    return body


def _qdisc(device: int) -> bytes:
    return TRAFFIC.pack(0, device, CLSACT_HANDLE, CLSACT, 0) + text(TCA_KIND, "clsact")


def _filter(item: Filter) -> bytes:
    info = item.priority << 16 | socket.htons(ETH_P_ALL)
    parent = PARENTS[item.direction]
    return TRAFFIC.pack(0, item.device, item.handle, parent, info) + text(TCA_KIND, "bpf")


def _guard(device: int, direction: str, guard: Guard) -> bytes:
    ours = Filter(device, direction, FILTER_PRIORITY, FILTER_HANDLE, FILTER_NAME, 0)
    program, pod = guard
    options = number(TCA_BPF_FD, program) + text(TCA_BPF_NAME, FILTER_NAME)
    options += number(TCA_BPF_FLAGS, DIRECT_ACTION) + number(TCA_BPF_CLASSID, pod)
    return _filter(ours) + attribute(TCA_OPTIONS, options)


def encode(action: NetlinkAction, guard: Guard | None) -> bytes:
    """Return the message for `action`; only AddFilter needs `guard`."""
    match action:
        case AddRule(rule):
            return message(RTM_NEWRULE, ADD, _rule(rule))
        case DeleteRule(rule):
            return message(RTM_DELRULE, ACK, _rule(rule))
        case AddRoute(item):
            # The scope as iproute2 sets it for local routes; IPv6 ignores it.
            scope = RT_SCOPE_HOST if item.kind == RTN_LOCAL else 0
            return message(RTM_NEWROUTE, ADD, _route(item, RTPROT_STATIC, scope))
        case DeleteRoute(item):
            return message(RTM_DELROUTE, ACK, _route(item, 0, RT_SCOPE_NOWHERE))
        case AddClsact(device):
            return message(RTM_NEWQDISC, ADD, _qdisc(device.index))
        case DeleteClsact(index):
            return message(RTM_DELQDISC, ACK, _qdisc(index))
        case DeleteFilter(item):
            return message(RTM_DELTFILTER, ACK, _filter(item))
        case AddFilter(device, direction):
            if guard is None:
                raise ValueError("a filter needs a program")
            # Without EXCLUSIVE: replaces what is in our place, without a moment of none.
            return message(RTM_NEWTFILTER, ACK | CREATE, _guard(device.index, direction, guard))


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
