"""Changing rules, routes, qdiscs and filters of one namespace: many changes, one system call.

This module owns the translation from the plan's actions to netlink. It promises to do exactly what
the actions say, all that can be done of them, and to report each that failed in the kernel's own
words; an action whose result is there already has succeeded. It may not decide anything. `write`
blocks and runs inside the namespace.

pyroute2 encodes the messages (IPBatch); they are sent together, because a round trip for each
through its event loop takes longer than all the work in the kernel.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Final

from pyroute2 import IPBatch

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
from nodeagent.capture.netlink_read import PARENTS

__all__ = ["Encoder", "write"]

MOST_MESSAGES: Final = 64
"""Messages of one send: their acknowledgements fit the smallest default receive buffer."""

MOST_RULES: Final = 64
"""Encoded rules that are kept: three times those of a pod, to add and to delete."""

ACK_TIMEOUT: Final = 10.0
"""Seconds. The kernel answers within the send; this only bounds what should never happen."""

ETH_P_ALL: Final = 3
RTN_LOCAL: Final = 2
RTPROT_STATIC: Final = 4
RT_SCOPE_HOST: Final = 254

NLMSG_ERROR: Final = 2
NLM_F_ACK_TLVS: Final = 0x200
NLMSGERR_ATTR_MSG: Final = 1
SOL_NETLINK: Final = 270
NETLINK_CAP_ACK: Final = 10
NETLINK_EXT_ACK: Final = 11

_HEADER: Final = struct.Struct("=IHHII")
_ERROR: Final = struct.Struct("=i16s")
_SEQUENCE_OFFSET: Final = 8

_GONE: Final = frozenset(
    {errno.ENOENT, errno.ESRCH, errno.ENODEV, errno.EINVAL, errno.EADDRNOTAVAIL}
)
"""What the kernel says when the thing to delete, or its parent, is not there."""


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
        # As iproute2 sets it; IPv6 ignores it.
        request["scope"] = RT_SCOPE_HOST
    return request


def _request(action: NetlinkAction, program: int) -> tuple[str, tuple[Any, ...], dict[str, Any]]:
    """Return the name of pyroute2's method and its arguments."""
    match action:
        case AddRule(rule):
            return "rule", ("add",), _rule_request(rule)
        case DeleteRule(rule):
            return "rule", ("del",), _rule_request(rule)
        case AddRoute(item):
            return "route", ("add",), _route_request(item) | {"proto": RTPROT_STATIC}
        case DeleteRoute(item):
            return "route", ("del",), _route_request(item)
        case AddClsact(device):
            return "tc", ("add", "clsact", device.index), {}
        case DeleteClsact(index):
            return "tc", ("del", "clsact", index), {}
        case AddFilter(device, direction):
            ours = Filter(device.index, direction, FILTER_PRIORITY, FILTER_HANDLE, "", 0)
            options = {"fd": program, "name": FILTER_NAME, "direct_action": True}
            # Replaces what is in our place, without a moment of none.
            return "tc", ("replace-filter", "bpf"), _filter_request(ours) | options
        case DeleteFilter(item):
            return "tc", ("del-filter", "bpf"), _filter_request(item)


def _filter_request(item: Filter) -> dict[str, Any]:
    return {
        "index": item.device,
        "handle": item.handle,
        "parent": PARENTS[item.direction],
        "prio": item.priority,
        "protocol": ETH_P_ALL,
    }


class Encoder:
    """Turns actions into messages. It holds a socket in the namespace it was made in: close it."""

    _rules: ClassVar[dict[NetlinkAction, bytes]] = {}
    """Rules are the same in every pod: encoded once. Others' rules do not come here in numbers."""

    def __init__(self) -> None:
        self._batch: IPBatch | None = None

    def encode(self, action: NetlinkAction, program: int) -> bytes:
        """Return the message for `action`; `program` is the descriptor that a filter runs."""
        known = self._rules.get(action)
        if known is not None:
            return known
        if self._batch is None:
            self._batch = IPBatch()
        name, args, kwargs = _request(action, program)
        self._batch.reset()
        getattr(self._batch, name)(*args, **kwargs)
        message = bytes(self._batch.batch)
        if isinstance(action, AddRule | DeleteRule) and len(self._rules) < MOST_RULES:
            self._rules[action] = message
        return message

    def close(self) -> None:
        if self._batch is not None:
            self._batch.close()
            self._batch = None


def write(steps: Sequence[tuple[NetlinkAction, int]]) -> list[OSError | None]:
    """Do all actions, each given with the program that it needs (a descriptor) or 0.

    Returns for each in turn its error, None if it succeeded.
    """
    encoder = Encoder()
    try:
        encoded = [(action, encoder.encode(action, program)) for action, program in steps]
    finally:
        encoder.close()
    results: list[OSError | None] = []
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as sock:
        sock.settimeout(ACK_TIMEOUT)
        sock.setsockopt(SOL_NETLINK, NETLINK_CAP_ACK, 1)
        sock.setsockopt(SOL_NETLINK, NETLINK_EXT_ACK, 1)
        sock.bind((0, 0))
        for start in range(0, len(encoded), MOST_MESSAGES):
            results += _send(sock, encoded[start : start + MOST_MESSAGES])
    return results


def _send(
    sock: socket.socket, steps: Sequence[tuple[NetlinkAction, bytes]]
) -> list[OSError | None]:
    data = bytearray()
    for sequence, (_, message) in enumerate(steps):
        start = len(data)
        data += message
        # Sequence number and our own port id instead of pyroute2's.
        struct.pack_into("=II", data, start + _SEQUENCE_OFFSET, sequence, 0)
    sock.send(data)
    results: list[OSError | None] = [None] * len(steps)
    for sequence, code, text in _acknowledgements(sock, len(steps)):
        action = steps[sequence][0]
        if code and not _is_done(action, code):
            results[sequence] = OSError(code, f"{text or os.strerror(code)} ({action})")
    return results


def _is_done(action: NetlinkAction, code: int) -> bool:
    if isinstance(action, DeleteRule | DeleteRoute | DeleteClsact | DeleteFilter):
        return code in _GONE
    return code == errno.EEXIST and not isinstance(action, AddFilter)


def _acknowledgements(sock: socket.socket, count: int) -> Iterator[tuple[int, int, str]]:
    """Yield sequence number, errno (0 is success) and the kernel's words, `count` times."""
    while count:
        data = sock.recv(65536)
        offset = 0
        while offset < len(data):
            length, kind, flags, sequence, _ = _HEADER.unpack_from(data, offset)
            if kind == NLMSG_ERROR:
                body = data[offset + _HEADER.size : offset + length]
                code = -_ERROR.unpack_from(body)[0]
                yield sequence, code, _words(body) if flags & NLM_F_ACK_TLVS else ""
                count -= 1
            offset += (length + 3) & ~3


def _words(body: bytes) -> str:
    """Return the kernel's explanation. With NETLINK_CAP_ACK it follows the header at once."""
    offset = _ERROR.size
    while offset + 4 <= len(body):
        length, kind = struct.unpack_from("=HH", body, offset)
        if length < 4:  # noqa: PLR2004 - an attribute's own header
            break
        if kind & 0x3FFF == NLMSGERR_ATTR_MSG:
            return body[offset + 4 : offset + length].rstrip(b"\0").decode("utf-8", "replace")
        offset += (length + 3) & ~3
    return ""
