"""Inbound judgement: may this peer, or nobody in particular, talk to this pod on this port?

This module owns the rules by which a connection to a local pod is let in. It promises that the
verdict depends on nothing but the arguments, that it names the policy that decided, and that it
fails closed: a pod, workload or policy that the snapshot does not hold lets nobody in. It may not
read a clock, or believe anything that a peer says of itself beyond its verified identity.

`CHECKS` run in order and the first that refuses decides. AuthorizationPolicy comes at the end: peer
authentication says *how* a caller must prove itself, authorization *who* may call. What the
settings let pass STRICT is judged by it like any other plaintext.

PeerAuthentication, as understood here: STRICT refuses who has no identity, unless the settings let
the node's own addresses pass (`node_plaintext`, off by default), which the verdict then names.
PERMISSIVE takes both. DISABLE takes plaintext, which is what callers with this agent send then
(`route`), and HBONE as well: others do not know the mode, they call by HBONE whoever has an agent,
and a call that proves an identity is never worse than one that does not.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable
from typing import Final

import msgspec

from ztunnel import address
from ztunnel.policy import DryRun, Match, decide, facts
from ztunnel.protocol import Mode
from ztunnel.reasons import Reason
from ztunnel.spiffe import SpiffeId
from ztunnel.state import OWN_PORTS, LocalPod, State, mode_of

__all__ = ["CHECKS", "NODE_PLAINTEXT", "Client", "Request", "Verdict", "authorize"]


class Request(msgspec.Struct, frozen=True):
    """What is asked. `identity` is None for plaintext. `source` is the client's address.

    For HBONE `destination` and `port` are the CONNECT authority's.
    """

    pod: LocalPod
    identity: SpiffeId | None
    source: bytes
    destination: bytes
    port: int


class Client(enum.StrEnum):
    """What kind of caller was judged."""

    WITHOUT_IDENTITY = "without_identity"
    NOT_ALLOWED = "identity_not_allowed"
    ALLOWED = "identity_allowed"


class Verdict(msgspec.Struct, frozen=True):
    """`reason` is Reason.CLOSED when allowed. `origin` names the policy that decided, "" if none.

    `mode` is the PeerAuthentication mode in force, None if none was reached. `client` is None where
    no caller was judged. `audits` are the AUDIT rules that match, and `dry_run` is what policies of
    a dry run would have done, None without any: neither has had a part in the verdict.
    """

    allow: bool
    reason: Reason
    origin: str = ""
    mode: Mode | None = None
    client: Client | None = None
    audits: tuple[Match, ...] = ()
    dry_run: DryRun | None = None


Check = Callable[[State, Request], Verdict]


NODE_PLAINTEXT: Final = "settings (node_plaintext)"
"""The origin of a verdict that rests on the settings and on no policy."""


def _refuse(reason: Reason, origin: str = "", mode: Mode | None = None) -> Verdict:
    return Verdict(allow=False, reason=reason, origin=origin, mode=mode)


def _allow(origin: str = "", mode: Mode | None = None) -> Verdict:
    return Verdict(allow=True, reason=Reason.CLOSED, origin=origin, mode=mode)


def _destination(_state: State, request: Request) -> Verdict:
    """The destination is this pod, and no port of the tunnel's own."""
    if request.destination not in request.pod.addresses:
        return _refuse(Reason.AUTHORITY_MISMATCH)
    if request.port in OWN_PORTS or not request.port:
        return _refuse(Reason.SELF_CALL)
    return _allow()


def _trust_domain(state: State, request: Request) -> Verdict:
    """The identity's trust domain is one that is trusted now, not only when it was verified."""
    if request.identity is not None and request.identity.trust_domain not in state.bundles:
        return _refuse(Reason.TRUST_DOMAIN)
    return _allow()


@functools.lru_cache(maxsize=8)
def _packed(spellings: tuple[str, ...]) -> frozenset[bytes]:
    return frozenset(map(address.pack, spellings))


def _is_probe(state: State, request: Request) -> bool:
    """The settings let the node's own calls pass. An address is all that the kubelet can show."""
    settings = state.settings
    return (
        settings is not None
        and settings.node_plaintext
        and request.source in _packed(settings.node_addresses)
    )


def _peer_authentication(state: State, request: Request) -> Verdict:
    mode, origin = mode_of(state, request.pod.workload, request.port)
    match mode:
        case None:
            return _refuse(Reason.POLICY_MISSING)
        case Mode.STRICT:
            if request.identity is None and _is_probe(state, request):
                return _allow(NODE_PLAINTEXT, mode)
            if request.identity is None:
                return _refuse(Reason.STRICT_PLAINTEXT, origin, mode)
            return _allow(origin, mode)
        case Mode.PERMISSIVE | Mode.DISABLE:
            return _allow(origin, mode)


def _authorization(state: State, request: Request) -> Verdict:
    groups = state.scopes.of(request.pod.workload)
    if not groups:
        return _allow()
    seen = facts(request.identity, request.source, request.destination, request.port)
    decision = decide(groups, seen)
    return Verdict(
        allow=decision.allow,
        reason=Reason.CLOSED if decision.allow else Reason.POLICY_DENIED,
        origin=decision.origin,
        audits=decision.audits,
        dry_run=decision.dry_run,
    )


CHECKS: Final[tuple[Check, ...]] = (
    _destination,
    _trust_domain,
    _peer_authentication,
    _authorization,
)


def authorize(state: State, request: Request) -> Verdict:
    """Return the verdict on `request`: that of the first check that refuses, else of the last.

    Where the last names no policy, the one before it that does has let the caller in.
    """
    verdict = _refuse(Reason.POLICY_MISSING)
    mode: Mode | None = None
    origin = ""
    for check in CHECKS:
        verdict = check(state, request)
        mode = verdict.mode or mode
        if not verdict.allow:
            origin = verdict.origin
            break
        origin = verdict.origin or origin
    return msgspec.structs.replace(
        verdict, origin=origin, mode=mode, client=_client(request, allow=verdict.allow)
    )


def _client(request: Request, *, allow: bool) -> Client:
    if request.identity is None:
        return Client.WITHOUT_IDENTITY
    return Client.ALLOWED if allow else Client.NOT_ALLOWED
