"""Outbound judgement: where does a connection of a local pod go, and under whose identities?

This module owns the routing rules. It promises that the answer depends on nothing but the
snapshot and the arguments, and that no rule fails open: what the snapshot says speaks HBONE is
never reached in plaintext unless a policy asks for it, which the answer then names; and what it
only half knows is refused. It may not open a socket, read
a clock or draw random numbers (balancing is described, the core chooses).

The rules, in order
-------------------
1. Loopback and unspecified destinations, also IPv4-mapped, are refused, and so are probes of the
   capture, which want nothing else.
2. The pod's own workload must be known: it names the identity to act under.
3. A service's virtual address and port become endpoints: healthy ones, of the best locality, by
   weight. A port that the service does not have is refused, unless a workload has that address.
4. An endpoint, or a destination that is a workload's address: HBONE to podIP:15008 if it speaks it,
   plain TCP if it does not, or if its PeerAuthentication says DISABLE for that port. The tunnel's
   own ports on a workload's address are refused, also when they are what a service's port stands
   for.
5. The pod itself, reached through a service or by its own address, is delivered straight inside its
   namespace: those bytes never leave the pod, and the capture passes direct calls to itself
   likewise.
6. Anything else is outside the mesh: passed through untouched.

A workload of the same node takes the same path as any other, unless the settings say otherwise
(`same_node`, which turns a `Tunnel` into a `HandOver`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final
from urllib.parse import quote

import msgspec

from ztunnel import address
from ztunnel.probe import is_probe
from ztunnel.protocol import DataPlane, Endpoint, Mode, Service, Workload
from ztunnel.reasons import Reason
from ztunnel.state import HBONE_PORT, OWN_PORTS, LocalPod, State, mode_of

if TYPE_CHECKING:
    from ztunnel.authorize import Verdict
    from ztunnel.identities import Proven

__all__ = [
    "MAX_CHOICES",
    "Balance",
    "Choice",
    "HandOver",
    "Passthrough",
    "Plain",
    "Refuse",
    "Route",
    "Tunnel",
    "Way",
    "baggage",
    "endpoints",
    "route",
]

MAX_CHOICES: Final = 64
"""Endpoints that one pod balances over. Each costs a decision, a peer and a series; larger services
are thinned by rendezvous hashing, so that every pod of the mesh takes another subset."""


class Refuse(msgspec.Struct, frozen=True):
    """Not carried. `service` is the uid of the service that was called, if any."""

    reason: Reason
    service: str = ""


class Passthrough(msgspec.Struct, frozen=True):
    """To the original destination, untouched: outside the mesh."""


class Plain(msgspec.Struct, frozen=True):
    """Plain TCP to `target`. `workload` and `service` are uids, empty when unknown.

    `hairpin`: the target is the calling pod itself. `origin` names the policy because of which a
    workload that speaks HBONE is called so.
    """

    target: bytes
    port: int
    workload: str = ""
    service: str = ""
    hairpin: bool = False
    origin: str = ""


class Tunnel(msgspec.Struct, frozen=True):
    """HBONE to `target`:`hbone_port` under `identity`, proved to be one of `expected`.

    `authority`, `baggage` and `host` go on the wire (`host`: the called service's name, or empty).
    """

    target: bytes
    port: int
    identity: str
    expected: frozenset[str]
    authority: str
    baggage: str
    host: str
    workload: str
    service: str = ""
    hbone_port: int = HBONE_PORT


class HandOver(msgspec.Struct, frozen=True):
    """Into the namespace of `pod`, the core's number of it, which is where `way` would have led.

    `proofs` are the client's certificate and the server's, `verdict` lets the client in.
    """

    way: Tunnel
    pod: int
    proofs: tuple[Proven, Proven]
    verdict: Verdict


Choice = Plain | Tunnel
Way = Choice | HandOver


class Balance(msgspec.Struct, frozen=True):
    """One of several, chosen anew for each connection in proportion to the weights."""

    choices: tuple[tuple[Way, int], ...]
    service: str


Route = Refuse | Passthrough | Way | Balance


def route(state: State, pod: LocalPod, destination: bytes, port: int) -> Route:
    """Return where a connection of `pod` to `destination`:`port` goes.

    `Refuse(UNKNOWN_WORKLOAD)` means that the pod's own workload is not known: worth a short wait.
    """
    if address.is_local_only(destination) or not port or is_probe(destination, port):
        return Refuse(Reason.SELF_CALL)
    source = state.workload_of(pod)
    if source is None:
        return Refuse(Reason.UNKNOWN_WORKLOAD)
    services = [state.services[uid] for uid in state.by_vip.get(destination, ())]
    for service in reversed(services):
        if any(known.number == port for known in service.ports):
            return _to_service(state, pod, source, service, destination, port)
    workload = state.workload_at(destination)
    if workload is not None:
        return _to_workload(state, pod, source, workload, destination, port)
    if services:
        return Refuse(Reason.UNKNOWN_PORT, services[-1].uid)
    if destination in pod.addresses:
        return _hairpin(destination, port, "", "")
    return Passthrough()


def _to_workload(
    state: State,
    pod: LocalPod,
    source: Workload,
    workload: Workload,
    target: bytes,
    port: int,
    service: Service | None = None,
) -> Choice | Refuse:
    uid = service.uid if service is not None else ""
    if port in OWN_PORTS:
        return Refuse(Reason.SELF_CALL, uid)
    if target in pod.addresses:
        return _hairpin(target, port, workload.uid, uid)
    if workload.data_plane is DataPlane.TCP:
        return Plain(target, port, workload.uid, uid)
    mode, origin = mode_of(state, workload.uid, port)
    if mode is Mode.DISABLE:
        return Plain(target, port, workload.uid, uid, origin=origin)
    if not source.identity:
        # The pod's own workload has opted out of the mesh: it has no identity to prove.
        return Refuse(Reason.NO_CREDENTIAL, uid)
    return Tunnel(
        target=target,
        port=port,
        identity=source.identity,
        expected=frozenset({workload.identity}),
        authority=address.authority(target, port),
        baggage=baggage(source),
        host=service.hostname if service is not None else "",
        workload=workload.uid,
        service=uid,
    )


def _hairpin(target: bytes, port: int, workload: str, service: str) -> Plain | Refuse:
    if port in OWN_PORTS:
        return Refuse(Reason.SELF_CALL, service)
    return Plain(target, port, workload, service, hairpin=True)


def _to_service(
    state: State,
    pod: LocalPod,
    source: Workload,
    service: Service,
    vip: bytes,
    port: int,
) -> Route:
    here = source.locality or (state.settings.locality if state.settings is not None else "")
    ranked: dict[int, list[tuple[Choice, int]]] = {}
    refusal = Refuse(Reason.NO_ENDPOINTS, service.uid)
    for endpoint, workload, target, target_port in endpoints(state, service, vip, port):
        found: Choice | Refuse
        if workload is None:
            found = _to_unknown(pod, service, target, target_port)
            locality = ""
        elif workload.healthy:
            found = _to_workload(state, pod, source, workload, target, target_port, service)
            locality = workload.locality
        else:
            continue
        if isinstance(found, Refuse):
            refusal = found
            continue
        ranked.setdefault(_rank(here, locality), []).append((found, endpoint.weight))
    if not ranked:
        return refusal
    best = ranked[max(ranked)]
    if len(best) == 1:
        return best[0][0]
    return Balance(_thinned(pod, best), service.uid)


def endpoints(
    state: State, service: Service, vip: bytes, port: int
) -> Iterator[tuple[Endpoint, Workload | None, bytes, int]]:
    """Yield where a port of a service leads: the endpoint, its workload, address and port there.

    `vip` is the virtual address that is called. What no address can be called of is left out.
    """
    for endpoint in service.endpoints:
        for target_port in _target_port(service, endpoint, port):
            workload, target = _resolve(state, endpoint, vip)
            if target:
                yield endpoint, workload, target, target_port


def _target_port(service: Service, endpoint: Endpoint, port: int) -> Iterator[int]:
    if port in endpoint.ports:
        yield endpoint.ports[port]
        return
    for known in service.ports:
        if known.number == port:
            yield known.target
            return


def _resolve(state: State, endpoint: Endpoint, vip: bytes) -> tuple[Workload | None, bytes]:
    """Return the endpoint's workload and the address to call; no address: leave it out.

    An address of the virtual address's family is preferred: both ends speak it. An endpoint that
    names a workload which is not known is left out: whether it speaks HBONE is not known either.
    """
    own = address.pack(endpoint.address) if endpoint.address else address.ANY
    if not endpoint.workload:
        return state.workload_at(own), own
    workload = state.workloads.get(endpoint.workload)
    if workload is None:
        return None, address.ANY
    candidates = [own] if own else []
    candidates += [address.pack(spelling) for spelling in workload.addresses]
    wanted = address.is_ipv4(vip)
    for candidate in candidates:
        if address.is_ipv4(candidate) is wanted:
            return workload, candidate
    return workload, candidates[0] if candidates else address.ANY


def _to_unknown(pod: LocalPod, service: Service, target: bytes, port: int) -> Plain | Refuse:
    """An endpoint outside the mesh, written down by its address."""
    if address.is_local_only(target):
        return Refuse(Reason.SELF_CALL, service.uid)
    if target in pod.addresses:
        return _hairpin(target, port, "", service.uid)
    return Plain(target, port, "", service.uid)


def _rank(here: str, there: str) -> int:
    """Return how many levels of region/zone/subzone the two share, from the widest down."""
    if not here or not there:
        return 0
    rank = 0
    for ours, theirs in zip(here.split("/"), there.split("/"), strict=False):
        if not ours or ours != theirs:
            break
        rank += 1
    return rank


def _thinned(pod: LocalPod, choices: list[tuple[Choice, int]]) -> tuple[tuple[Choice, int], ...]:
    if len(choices) <= MAX_CHOICES:
        return tuple(choices)

    def score(entry: tuple[Choice, int]) -> bytes:
        choice, _ = entry
        seed = f"{pod.uid}\0{choice.port}\0".encode() + choice.target
        return hashlib.blake2b(seed, digest_size=8).digest()

    return tuple(sorted(choices, key=score)[:MAX_CHOICES])


def baggage(source: Workload) -> str:
    """Return the `baggage` header (W3C Baggage: values percent-encoded), empty fields left out.

    It informs the other side's telemetry; nobody may judge by it.
    """
    region = source.locality.partition("/")[0]
    fields = (
        ("k8s.cluster.name", source.cluster),
        ("k8s.namespace.name", source.namespace),
        ("k8s.deployment.name", source.name),
        ("service.name", source.canonical_service),
        ("service.version", source.canonical_revision),
        ("cloud.region", region),
    )
    return ",".join(f"{key}={quote(value, safe='')}" for key, value in fields if value)
