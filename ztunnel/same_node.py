"""Same node, direct: which connections between two pods of this node need no tunnel in between.

This module owns the rules by which a tunnelled route becomes a hand-over into the other pod's
namespace, when the settings ask for it (`same_node: direct`). It promises that a hand-over is
allowed only where HBONE between the same two pods would be, by the same judgement: both pods are in
service here, each holds a certificate that proves, now and against the roots of now, the identity
which the other side expects, and the destination's own policy lets that identity in. Where anything
of this is missing the route stays as it was: HBONE waits, refuses and reports by its own rules, so
nothing is refused here and nothing is let in that HBONE would keep out. It may not make decisions
of the core.

The price is said where it is asked for: the bytes are not encrypted. They stay in the memory of
this node, on the loopback devices of the two pods, and never reach a device that leads out of one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from ztunnel import address, svid
from ztunnel.authorize import Request, authorize
from ztunnel.protocol import SameNode
from ztunnel.route import Balance, HandOver, Route, Tunnel

if TYPE_CHECKING:
    from ztunnel.authorize import Verdict
    from ztunnel.identities import Identities, Proven
    from ztunnel.pods import Held, Pods
    from ztunnel.spiffe import SpiffeId
    from ztunnel.state import State

__all__ = ["Join", "admit", "is_direct"]


def is_direct(state: State) -> bool:
    """True when the settings ask for hand-overs."""
    return state.settings is not None and state.settings.same_node is SameNode.DIRECT


def admit(state: State, client: Held, identity: SpiffeId, server: Held, way: Tunnel) -> Verdict:
    """Return the inbound verdict of `server` on a call of `client` that takes `way`.

    The client may call from any of its addresses: each is judged, and the first refusal counts.
    """
    verdicts = _verdicts(state, client, identity, server, way)
    return next((verdict for verdict in verdicts if not verdict.allow), verdicts[0])


def _verdicts(
    state: State, client: Held, identity: SpiffeId, server: Held, way: Tunnel
) -> list[Verdict]:
    family = address.is_ipv4(way.target)
    sources = sorted(own for own in client.pod.addresses if address.is_ipv4(own) is family)
    # One at least: a pod has an address, state._local_pod.
    return [
        authorize(state, Request(server.pod, identity, source, way.target, way.port))
        for source in sources or sorted(client.pod.addresses)
    ]


class Join:
    """Turns routes into hand-overs. `wall` is seconds since the epoch."""

    def __init__(self, identities: Identities, pods: Pods, wall: Callable[[], float]) -> None:
        self._identities = identities
        self._pods = pods
        self._wall = wall

    def __call__(self, state: State, client: Held, route: Route) -> Route:
        """Return `route` with every tunnel replaced that may be a hand-over."""
        if not is_direct(state):
            return route
        match route:
            case Tunnel():
                return self._joined(state, client, route)
            case Balance():
                choices = tuple(
                    (self._joined(state, client, way) if isinstance(way, Tunnel) else way, weight)
                    for way, weight in route.choices
                )
                return msgspec.structs.replace(route, choices=choices)
            case _:
                return route

    def _joined(self, state: State, client: Held, way: Tunnel) -> Tunnel | HandOver:
        server = self._pods.at(way.target)
        if server is None or server.pod.workload != way.workload:
            return way
        if not any(
            address.is_ipv4(own) is address.is_ipv4(way.target) for own in client.pod.addresses
        ):
            # The application could not be told who calls: the client has no such address.
            return way
        proofs = (
            self._proof(state, client, frozenset({way.identity})),
            self._proof(state, server, way.expected),
        )
        if proofs[0] is None or proofs[1] is None:
            return way
        verdict, *others = _verdicts(state, client, proofs[0].id, server, way)
        # From another address another rule may count: HBONE knows the one that was called from.
        if not verdict.allow or any(other != verdict for other in others):
            return way
        return HandOver(way, server.number, (proofs[0], proofs[1]), verdict)

    def _proof(self, state: State, held: Held, expected: frozenset[str]) -> Proven | None:
        """Return whom the pod's certificate proves now, None if not one of `expected`."""
        chain = self._pods.chain(held)
        if not chain:
            return None
        now = self._wall()
        try:
            proven = self._identities.verify(chain, state.bundles, now)
        except svid.SvidError:
            return None
        return proven if now < proven.not_after and str(proven.id) in expected else None
