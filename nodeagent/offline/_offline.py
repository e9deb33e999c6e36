"""A configuration, ready to be asked: what would become of a connection to any of its workloads?

This module owns the evaluator. It promises verdicts that are ztunnel's own, on a state that ztunnel
itself has taken, for every workload of the mesh and not only for those of one node; and that it
says so where nobody judges. It is pure: values in, values out.

Each node judges by its own settings. Here those of one node stand for all of them, which matters
for `node_plaintext` and the trust domain only.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Final

import msgspec

from nodeagent import mesh, policy
from nodeagent.api import AuthorizationPolicy, Document, PeerAuthentication, WorkloadEntry
from nodeagent.mesh import MeshState
from nodeagent.policy import Level
from nodeagent.settings import Settings, for_tunnel
from ztunnel import address, state
from ztunnel.address import pack
from ztunnel.authorize import NODE_PLAINTEXT, Request, Verdict, authorize
from ztunnel.policy import facts
from ztunnel.policy.explain import Trace, trace
from ztunnel.policy.scopes import Group, Kind
from ztunnel.protocol import (
    Action,
    Attribute,
    Authorization,
    DataPlane,
    Mode,
    Resource,
    Service,
    TrustBundle,
    Workload,
    WorkloadPolicy,
)
from ztunnel.spiffe import SpiffeId
from ztunnel.state import OWN_PORTS, LocalPod, State

__all__ = [
    "OWN_PORTS",
    "Group",
    "ModeInForce",
    "Offline",
    "PassedOver",
    "UnusableError",
    "Verdict",
    "pack",
]


STRICTLY: Final = "STRICT, if it were"
"""The origin of a verdict that rests on a mode which is only asked about."""


class UnusableError(Exception):
    """The tunnel would refuse this configuration as a whole; the message says why."""


class ModeInForce(msgspec.Struct, frozen=True):
    """The mutual TLS mode of a port, where it comes from, and the PeerAuthentication behind it."""

    mode: Mode
    level: Level
    origin: str


class PassedOver(msgspec.Struct, frozen=True):
    """A policy of a workload's namespace or of the mesh whose selector does not select it.

    `lacks` are the labels that it wants and the workload has not, with the workload's own values.
    """

    policy: AuthorizationPolicy
    lacks: tuple[tuple[str, str, str], ...]


class Offline:
    """Made by `of`. Workloads are named by their uids, "namespace/name"."""

    def __init__(
        self,
        settings: Settings,
        documents: Iterable[Document],
        found: MeshState,
        told: State,
    ) -> None:
        self.settings = settings
        self.mesh = found
        self.state = told
        self._asking: dict[int, str] = {}
        self._levels: dict[str, Level | None] = {}
        self._selecting: dict[str, list[AuthorizationPolicy]] = {}
        self._labels: dict[str, Mapping[str, str]] = {}
        for each in documents:
            match each:
                case PeerAuthentication():
                    level = policy.level_of(each, settings.root_namespace)
                    self._levels[policy.origin_of(each)] = level
                case WorkloadEntry():
                    self._labels[each.uid] = each.labels
                case AuthorizationPolicy() if each.spec.selector is not None:
                    self._selecting.setdefault(each.metadata.namespace, []).append(each)
                case _:
                    pass

    @classmethod
    def of(
        cls, documents: Iterable[Document], settings: Settings, trusted: Iterable[str] = ()
    ) -> Offline:
        """Return the evaluator of `documents`. Raises UnusableError.

        `trusted` are the trust domains whose roots the node holds, beside its own.
        """
        known = tuple(documents)
        found = mesh.build(known, settings, everywhere=True)
        resources, _ = mesh.diff(None, found)
        domains = sorted({settings.trust_domain, *trusted})
        bundles = tuple(TrustBundle(domain, ()) for domain in domains)
        change = state.Change(1, True, (*resources, *bundles), (), for_tunnel(settings))
        try:
            told = state.apply(state.EMPTY, change)
        except state.StateError as error:
            raise UnusableError(str(error)) from None
        return cls(settings, known, found, told)

    @classmethod
    def in_force(cls, resources: Collection[Resource], settings: Settings) -> Offline:
        """Return the evaluator of what a node's tunnel is told. Raises UnusableError.

        It judges the workloads of that node only, and knows no documents.
        """
        kinds = (Workload, Service, WorkloadPolicy, Authorization)
        known: list[Resource] = [each for each in resources if isinstance(each, kinds)]
        bundles = (each for each in resources if isinstance(each, TrustBundle))
        known += [TrustBundle(each.uid, ()) for each in bundles]
        change = state.Change(1, True, tuple(known), (), for_tunnel(settings))
        try:
            told = state.apply(state.EMPTY, change)
        except state.StateError as error:
            raise UnusableError(str(error)) from None
        return cls(settings, (), MeshState(), told)

    def strictly(self, uids: Iterable[str]) -> Offline:
        """Return the same with these workloads STRICT; their ports keep modes of their own."""
        policies = [self.state.policies[uid] for uid in uids if uid in self.state.policies]
        wanted = tuple(
            msgspec.structs.replace(each, mode=Mode.STRICT, origin=STRICTLY)
            for each in policies
            if each.mode is not Mode.STRICT
        )
        told = state.apply(self.state, state.Change(self.state.version + 1, False, wanted))
        return Offline(self.settings, (), self.mesh, told)

    @property
    def workloads(self) -> Mapping[str, Workload]:
        return self.state.workloads

    @functools.cached_property
    def by_identity(self) -> Mapping[str, Sequence[Workload]]:
        """Workloads by the SPIFFE ID that they prove."""
        found: dict[str, list[Workload]] = {}
        for workload in self.workloads.values():
            found.setdefault(workload.identity, []).append(workload)
        return found

    @functools.cached_property
    def services_called(self) -> Mapping[str, Sequence[Service]]:
        """Services by uid, and by host."""
        found: dict[str, list[Service]] = {}
        for service in self.state.services.values():
            for name in (service.uid, service.hostname):
                found.setdefault(name, []).append(service)
        return found

    def workload_at(self, packed: bytes) -> Workload | None:
        """Return the workload that has this address (`ztunnel.address.pack`)."""
        return self.state.workload_at(packed)

    def judged(self, uid: str) -> bool:
        """Return whether any agent judges who calls this workload: whether it is in the mesh."""
        workload = self.workloads.get(uid)
        return workload is not None and workload.data_plane is DataPlane.HBONE

    def judge(
        self,
        uid: str,
        port: int,
        identity: SpiffeId | None,
        source: bytes,
        destination: bytes | None = None,
    ) -> Verdict | None:
        """Return the verdict on a connection to a workload, None if nobody judges it.

        `identity` is None for plaintext. `source` is the caller's address, `destination` the one
        that it calls, by default the workload's first, both packed (`ztunnel.address`).
        """
        request = self._request(uid, port, identity, source, destination)
        return None if request is None else authorize(self.state, request)

    def trace(
        self,
        uid: str,
        port: int,
        identity: SpiffeId | None,
        source: bytes,
        destination: bytes | None = None,
    ) -> Trace:
        """Return how AuthorizationPolicy comes to its part of the verdict. Arguments as `judge`."""
        to = self._destination(uid) if destination is None else destination
        return trace(self.state.scopes.of(uid), facts(identity, source, to, port))

    def closing(self, uid: str) -> tuple[Authorization, ...]:
        """Return the ALLOW policies that close a workload to whoever none of them names, by uid."""
        wanted = Kind(Action.ALLOW, dry_run=False)
        found = [
            policy
            for group in self.state.scopes.of(uid)
            if wanted in group.indexes
            for policy in group.indexes[wanted].policies.values()
        ]
        return tuple(sorted(found, key=lambda policy: policy.uid))

    def mode(self, uid: str, port: int) -> ModeInForce | None:
        """Return the mode in force for a port of a workload, None if nobody judges it."""
        found = self.state.policies.get(uid)
        if found is None:
            return None
        if port in found.port_modes:
            return ModeInForce(found.port_modes[port], Level.PORT, found.port_origins[port])
        level = self._levels.get(found.origin) or Level.DEFAULT
        return ModeInForce(found.mode, level, found.origin)

    def asks_source(self, uid: str, port: int, identity: SpiffeId | None) -> str:
        """Return what makes a verdict depend on the caller's address, "" if nothing does."""
        if not self.judged(uid):
            return ""
        for group in self.state.scopes.of(uid):
            # Groups live as long as the state, and are shared by many workloads.
            origin = self._asking.get(id(group))
            if origin is None:
                origin = self._asking[id(group)] = _asks_source(group)
            if origin:
                return origin
        mode = self.mode(uid, port)
        strict = mode is not None and mode.mode is Mode.STRICT
        return NODE_PLAINTEXT if self.settings.node_plaintext and not identity and strict else ""

    def passed_over(self, uid: str) -> list[PassedOver]:
        """Return the policies that a workload's labels keep from it, those of the nearest first."""
        labels = self._labels.get(uid, {})
        namespaces = {uid.partition("/")[0], self.settings.root_namespace}
        found = [
            PassedOver(each, lacks)
            for namespace in namespaces
            for each in self._selecting.get(namespace, ())
            if (lacks := _lacks(each, labels))
        ]
        return sorted(found, key=lambda each: (len(each.lacks), each.policy.uid))

    def shown(self, uid: str, port: int, identity: SpiffeId | None) -> SpiffeId | None:
        """Return what a caller of this mesh shows of its identity there: nothing under DISABLE."""
        mode = self.mode(uid, port)
        return None if mode is not None and mode.mode is Mode.DISABLE else identity

    def _request(
        self,
        uid: str,
        port: int,
        identity: SpiffeId | None,
        source: bytes,
        destination: bytes | None,
    ) -> Request | None:
        if not self.judged(uid):
            return None
        packed = frozenset(map(address.pack, self.workloads[uid].addresses))
        pod = LocalPod(uid, uid, packed, 0)
        to = self._destination(uid) if destination is None else destination
        return Request(pod, identity, source, to, port)

    def _destination(self, uid: str) -> bytes:
        """Return the first address of a workload; what is no address if it has lost all."""
        addresses = self.workloads[uid].addresses
        return address.pack(addresses[0]) if addresses else address.ANY


def _asks_source(group: Group) -> str:
    """Return the first rule that looks at the caller's address, "" if none does."""
    policies = (each for index in group.indexes.values() for each in index.policies.values())
    for rule in (rule for each in policies for rule in each.rules):
        conditions = (*rule.conditions, *(each for found in rule.sources for each in found))
        if any(each.attribute is Attribute.SOURCE_IP for each in conditions):
            return rule.origin
    return ""


def _lacks(
    policy: AuthorizationPolicy, labels: Mapping[str, str]
) -> tuple[tuple[str, str, str], ...]:
    selector = policy.spec.selector
    wanted = selector.match_labels if selector is not None else {}
    return tuple(
        (key, value, labels.get(key, ""))
        for key, value in wanted.items()
        if labels.get(key) != value
    )
