"""The mesh as ztunnel was last told: one immutable snapshot, and how a change makes the next.

This module owns `State`, its indexes and `apply`. It promises that a snapshot never changes, that
a change is applied whole or not at all, and that a kind that a change does not touch is shared
with the snapshot before (so `new.policies is old.policies` means "no policy changed"). Addresses
are indexed in the core's 16-byte form. It may not keep private keys, open anything or read a
clock.

Cost: a change copies the dictionaries of the kinds that it touches, a copy of pointers: about a
millisecond for 100,000 workloads. Authorizations are compiled here and not when they are first
asked for, so that no connection waits for it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any, Final

import msgspec

from ztunnel import address, policy, protocol, spiffe

__all__ = [
    "EMPTY",
    "OWN_PORTS",
    "Change",
    "Identity",
    "LocalPod",
    "State",
    "StateError",
    "apply",
    "is_large",
    "mode_of",
]

OUTBOUND_PORT: Final = 15001
INBOUND_PORT: Final = 15006
HBONE_PORT: Final = 15008
OWN_PORTS: Final = frozenset({OUTBOUND_PORT, INBOUND_PORT, HBONE_PORT})
"""Ports on which the tunnel itself listens in every pod: never an application's."""

MAX_PODS: Final = 2048
"""Pods of one node. A pod costs eight descriptors (four here, four in the core), and Kubernetes
stops at 110 to 512; beyond this the other side is broken."""


LARGE: Final = 2000
"""Resources, and values in them, above which a change takes tens of milliseconds."""


class StateError(Exception):
    """A change cannot be applied. `kind` and `uid` name the resource, `reason` what is wrong."""

    def __init__(self, kind: str, uid: str, reason: str) -> None:
        super().__init__(f"{kind} {uid!r}: {reason}")
        self.kind = kind
        self.uid = uid
        self.reason = reason


class Identity(msgspec.Struct, frozen=True):
    """What the state keeps of a credential: no key. `fingerprint` is SHA-256 over chain and key.

    Times are seconds since the epoch.
    """

    uid: str
    not_before: int
    not_after: int
    fingerprint: bytes


class LocalPod(msgspec.Struct, frozen=True):
    """A pod of this node. `workload` is the uid of its workload, which may not be known (yet)."""

    uid: str
    workload: str
    addresses: frozenset[bytes]
    netns_cookie: int


class State(msgspec.Struct, frozen=True):
    """Everything that judgements read. Compare kinds by `is` to learn what a change touched."""

    version: int
    settings: protocol.Settings | None
    workloads: Mapping[str, protocol.Workload]
    by_address: Mapping[bytes, tuple[str, ...]]
    """Address to workloads, the newest last: an address moves to a new pod before the old goes."""
    services: Mapping[str, protocol.Service]
    by_vip: Mapping[bytes, tuple[str, ...]]
    policies: Mapping[str, protocol.WorkloadPolicy]
    authorizations: Mapping[str, protocol.Authorization]
    scopes: policy.Scopes
    """The authorizations, as they are decided by."""
    identities: Mapping[str, Identity]
    bundles: Mapping[str, tuple[bytes, ...]]
    """Trust domain to its roots, DER."""
    pods: Mapping[str, LocalPod]

    def __repr__(self) -> str:
        return (
            f"State(version={self.version}, workloads={len(self.workloads)}, "
            f"services={len(self.services)}, pods={len(self.pods)})"
        )

    def workload_at(self, packed: bytes) -> protocol.Workload | None:
        """Return the workload that has this address now."""
        uids = self.by_address.get(packed)
        return self.workloads[uids[-1]] if uids else None

    def workload_of(self, pod: LocalPod) -> protocol.Workload | None:
        return self.workloads.get(pod.workload)


def mode_of(state: State, workload: str, port: int) -> tuple[protocol.Mode | None, str]:
    """Return the mode in force for a port of a workload and its origin; None where none is known.

    Of another node's workloads DISABLE alone is known for certain: see `protocol.WorkloadPolicy`.
    """
    policy = state.policies.get(workload)
    if policy is None:
        return None, ""
    mode = policy.port_modes.get(port, policy.mode)
    return mode, policy.port_origins.get(port, policy.origin)


EMPTY: Final = State(0, None, {}, {}, {}, {}, {}, {}, policy.NOWHERE, {}, {}, {})


class Change(msgspec.Struct, frozen=True):
    """A committed change: all its parts together. `settings` come with the first of a session."""

    version: int
    reset: bool
    upserts: tuple[protocol.Resource, ...] = ()
    removals: tuple[protocol.Removal, ...] = ()
    settings: protocol.Settings | None = None


def is_large(change: Change) -> bool:
    """Return whether `apply` takes so long that an event loop should not wait for it."""
    left = LARGE - len(change.removals)
    for resource in change.upserts:
        left -= 1
        if isinstance(resource, protocol.Authorization):
            left -= sum(map(_values, resource.rules))
        if left < 0:
            return True
    return left < 0


def _values(rule: protocol.Rule) -> int:
    alternatives = (rule.conditions, *rule.sources, *rule.operations)
    return sum(
        len(condition.values) + len(condition.not_values)
        for conditions in alternatives
        for condition in conditions
    )


class _Draft:
    """One kind in the making: a copy of what was there, made when it is first written."""

    def __init__(self, before: Mapping[str, Any], *, reset: bool) -> None:
        self._before = before
        self._reset = reset
        self.entries: dict[str, Any] | None = {} if reset else None

    def _own(self) -> dict[str, Any]:
        if self.entries is None:
            self.entries = dict(self._before)
        return self.entries

    def get(self, uid: str) -> Any:  # noqa: ANN401 - the kind is the caller's
        return (self._before if self.entries is None else self.entries).get(uid)

    def put(self, uid: str, value: object) -> None:
        if self.get(uid) != value:
            self._own()[uid] = value

    def drop(self, uid: str) -> None:
        if self.get(uid) is not None:
            del self._own()[uid]

    def result(self) -> Mapping[str, Any]:
        """Return the new mapping; the old one itself if nothing differs."""
        if self.entries is None or (self._reset and self.entries == self._before):
            return self._before
        return self.entries


_FIELDS: Final = {
    "workload": "workloads",
    "service": "services",
    "workload_policy": "policies",
    "authorization": "authorizations",
    "credential": "identities",
    "trust_bundle": "bundles",
    "pod": "pods",
}
"""Tag of a resource to the field of State that holds its kind."""

_TAGS: Final[dict[type, str]] = {
    protocol.Workload: "workload",
    protocol.Service: "service",
    protocol.WorkloadPolicy: "workload_policy",
    protocol.Authorization: "authorization",
    protocol.Credential: "credential",
    protocol.TrustBundle: "trust_bundle",
    protocol.Pod: "pod",
}

MAX_PORT: Final = 65535


def apply(state: State, change: Change) -> State:
    """Return the state after `change`. Raises StateError and then nothing has changed."""
    drafts = {
        tag: _Draft(getattr(state, field), reset=change.reset) for tag, field in _FIELDS.items()
    }
    touched: dict[str, list[str]] = {"workload": [], "service": [], "authorization": []}
    for resource in change.upserts:
        tag = _TAGS[type(resource)]
        drafts[tag].put(resource.uid, _checked(resource))
        if tag in touched:
            touched[tag].append(resource.uid)
    for removal in change.removals:
        if removal.kind not in drafts:
            raise StateError(removal.kind, removal.uid, "no such kind of resource")
        drafts[removal.kind].drop(removal.uid)
        if removal.kind in touched:
            touched[removal.kind].append(removal.uid)
    fields = {field: drafts[tag].result() for tag, field in _FIELDS.items()}
    if len(fields["pods"]) > MAX_PODS:
        raise StateError("pod", "", f"{len(fields['pods'])} pods exceed {MAX_PODS}")
    settings = change.settings if change.settings is not None else state.settings
    return State(
        version=change.version,
        settings=settings,
        by_address=_reindex(
            state.by_address,
            state.workloads,
            fields["workloads"],
            None if change.reset else touched["workload"],
        ),
        by_vip=_reindex(
            state.by_vip,
            state.services,
            fields["services"],
            None if change.reset else touched["service"],
        ),
        scopes=policy.updated(
            state.scopes,
            state.authorizations,
            fields["authorizations"],
            None if change.reset else touched["authorization"],
        ),
        **fields,
    )


_Addressed = protocol.Workload | protocol.Service


def _reindex(
    index: Mapping[bytes, tuple[str, ...]],
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    touched: Iterable[str] | None,
) -> Mapping[bytes, tuple[str, ...]]:
    """Return the address index of `after`; `touched` are the uids that may differ, None all."""
    if after is before:
        return index
    if touched is None:
        entries: dict[bytes, tuple[str, ...]] = {}
        moved: Iterable[str] = after
        before = {}
    else:
        # In one piece: a copy of pointers.
        entries = dict(index)
        moved = dict.fromkeys(touched)
    for uid in moved:
        old: _Addressed | None = before.get(uid)
        new: _Addressed | None = after.get(uid)
        gone = old.addresses if old is not None else ()
        here = new.addresses if new is not None else ()
        if gone == here:
            continue
        for spelling in gone:
            _drop(entries, address.pack(spelling), uid)
        for spelling in here:
            packed = address.pack(spelling)
            _drop(entries, packed, uid)
            entries[packed] = (*entries.get(packed, ()), uid)
    return entries


def _drop(entries: dict[bytes, tuple[str, ...]], packed: bytes, uid: str) -> None:
    left = tuple(other for other in entries.get(packed, ()) if other != uid)
    if left:
        entries[packed] = left
    else:
        entries.pop(packed, None)


def fingerprint(credential: protocol.Credential) -> bytes:
    """Return what tells two credentials of one identity apart without keeping the key."""
    digest = hashlib.sha256(credential.key)
    for certificate in credential.chain:
        digest.update(certificate)
    return digest.digest()


def _checked(resource: protocol.Resource) -> object:
    """Return what the state keeps of a resource. Raises StateError on what no judgement can use."""
    try:
        match resource:
            case protocol.Workload():
                _check_workload(resource)
                return resource
            case protocol.Service():
                _check_service(resource)
                return resource
            case protocol.Pod():
                return _local_pod(resource)
            case protocol.Credential():
                spiffe.SpiffeId.parse(resource.uid)
                return Identity(
                    resource.uid, resource.not_before, resource.not_after, fingerprint(resource)
                )
            case protocol.TrustBundle():
                return resource.roots
            case protocol.WorkloadPolicy():
                return resource
            case protocol.Authorization():
                policy.check(resource)
                return resource
    except ValueError as error:
        raise StateError(_TAGS[type(resource)], resource.uid, str(error)) from None


def _local_pod(pod: protocol.Pod) -> LocalPod:
    if not pod.addresses:
        raise ValueError("it has no address")
    packed = frozenset(map(address.pack, pod.addresses))
    return LocalPod(pod.uid, pod.workload, packed, pod.netns_cookie)


def _check_workload(workload: protocol.Workload) -> None:
    for spelling in workload.addresses:
        address.pack(spelling)
    if workload.identity:
        spiffe.SpiffeId.parse(workload.identity)
    elif workload.data_plane is protocol.DataPlane.HBONE:
        raise ValueError("it speaks HBONE but has no identity to prove")


def _check_service(service: protocol.Service) -> None:
    for spelling in service.addresses:
        address.pack(spelling)
    for port in service.ports:
        _check_ports(port.number, port.target)
    for endpoint in service.endpoints:
        if endpoint.weight < 1:
            raise ValueError(f"endpoint weight {endpoint.weight} is below 1")
        if endpoint.address:
            address.pack(endpoint.address)
        elif not endpoint.workload:
            raise ValueError("an endpoint has neither workload nor address")
        for number, target in endpoint.ports.items():
            _check_ports(number, target)


def _check_ports(*ports: int) -> None:
    for port in ports:
        if not 1 <= port <= MAX_PORT:
            raise ValueError(f"port {port} is not in 1..{MAX_PORT}")
