"""Whom a pod of this node called: which flow the connections of one route are.

This module owns that translation. It promises that what never leaves the pod is no flow, and that
what it takes from documents can be told and kept: it is short, and has no character that a terminal
would obey. It may not count. Pure.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from ztunnel import address
from ztunnel.flow_messages import MAX_NAME
from ztunnel.protocol import Arrival, FlowKey
from ztunnel.route import Passthrough, Plain, Refuse, Tunnel

if TYPE_CHECKING:
    from ztunnel.decisions import Key
    from ztunnel.state import State

__all__ = ["outbound", "policy", "printable"]

_PLACE: Final = re.compile(r" \(.*:[0-9]+\)$", re.DOTALL)
"""File and line behind the name of a policy."""


def outbound(
    state: State, workload: str, key: Key, route: Refuse | Passthrough | Plain | Tunnel
) -> FlowKey | None:
    """Return the flow of calls of `workload` that ask `key` and take `route`; None: of itself."""
    match route:
        case Tunnel():
            return FlowKey(
                identity=route.identity,
                source="",
                workload=workload,
                arrival=Arrival.HBONE,
                destination=route.workload,
                address=address.text(route.target),
                port=route.port,
                allowed=True,
                outbound=True,
                service=_host(state, route.service),
            )
        case Plain(hairpin=True):
            return None
        case Plain():
            return FlowKey(
                identity="",
                source="",
                workload=workload,
                arrival=Arrival.PLAINTEXT,
                destination=route.workload,
                address=address.text(route.target),
                port=route.port,
                allowed=True,
                outbound=True,
                service=_host(state, route.service),
                policy=policy(route.origin),
            )
        case Passthrough() | Refuse():
            called = state.workload_at(key.destination)
            refused = isinstance(route, Refuse)
            return FlowKey(
                identity="",
                source="",
                workload=workload,
                arrival=Arrival.PLAINTEXT,
                destination=called.uid if called is not None else "",
                address=address.text(key.destination),
                port=key.port,
                allowed=not refused,
                reason=route.reason.value if isinstance(route, Refuse) else "",
                outbound=True,
                service=_host(state, route.service) if isinstance(route, Refuse) else "",
            )


def policy(origin: str) -> str:
    """Return the policy that an origin names, without the place: edits around it move that."""
    return printable(_PLACE.sub("", origin))


def printable(name: str) -> str:
    """Return a name of documents, whatever is in it."""
    said = "".join(each if each.isprintable() else "\N{REPLACEMENT CHARACTER}" for each in name)
    return said[:MAX_NAME]


def _host(state: State, service: str) -> str:
    found = state.services.get(service)
    return printable(found.hostname) if found is not None else ""
