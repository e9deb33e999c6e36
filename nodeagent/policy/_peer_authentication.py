"""PeerAuthentication: narrowest wins, the oldest wins on one level, UNSET inherits.

This module owns the precedence. It promises that the order of documents never matters, that every
document which loses, has no effect or takes traffic out of mutual TLS is named in a warning, and
that a port without a mode of its own takes its workload's. It may not look at anything but labels,
namespaces and ages.

Precedence, from Istio's reference of PeerAuthentication: a policy with a selector (not in the root
namespace) is for the workloads of its namespace that it selects; one without is for its namespace,
in the root namespace for the mesh. On each of the three levels the oldest policy is the level's
only one, even if its mode is UNSET; policies of one level are not merged. The narrowest level whose
mode is not UNSET decides; if none does, PERMISSIVE. Port modes come from the workload level only.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Final

import msgspec

from nodeagent.api import ConfigWarning, MtlsMode, PeerAuthentication
from nodeagent.policy._subjects import Subject, Subjects
from ztunnel.protocol import Mode, WorkloadPolicy

__all__ = [
    "DEFAULT_MODE",
    "DEFAULT_ORIGIN",
    "Level",
    "Resolution",
    "level_of",
    "origin_of",
    "resolve",
]

DEFAULT_MODE: Final = Mode.PERMISSIVE
"""Istio's: what is enrolled first accepts both, so that enrolling breaks nobody."""

DEFAULT_ORIGIN: Final = "default"

_NAMED: Final = 5
"""Workloads named in one warning; a mesh-wide policy may concern thousands."""


class Level(enum.StrEnum):
    """Where a mode in force comes from, the narrowest first."""

    PORT = "port"
    WORKLOAD = "workload"
    NAMESPACE = "namespace"
    MESH = "mesh"
    DEFAULT = "default"


def level_of(policy: PeerAuthentication, root_namespace: str) -> Level | None:
    """Return the level of a policy's mode, None if it has no effect."""
    in_root = policy.metadata.namespace == root_namespace
    if policy.spec.selector is None:
        return Level.MESH if in_root else Level.NAMESPACE
    return None if in_root else Level.WORKLOAD


class Resolution(msgspec.Struct, frozen=True):
    """`policies` by workload uid, of subjects in the mesh: see `resolve`."""

    policies: dict[str, WorkloadPolicy]
    warnings: tuple[ConfigWarning, ...]


class _Levels:
    """The policies sorted into the three levels, oldest first."""

    def __init__(self, policies: Iterable[PeerAuthentication], root_namespace: str) -> None:
        self.mesh: list[PeerAuthentication] = []
        self.namespaces: dict[str, list[PeerAuthentication]] = {}
        self.warnings: list[ConfigWarning] = []
        self._selectors: dict[str, dict[tuple[str, str], list[_Ranked]]] = {}
        """Policies with a selector by namespace, and there by the first of its labels."""
        ordered = sorted(policies, key=lambda item: (item.age, item.origin))
        self.disabling = [policy for policy in ordered if _disables(policy)]
        self._disabling = frozenset(map(id, self.disabling))
        for rank, policy in enumerate(ordered):
            namespace = policy.metadata.namespace
            match level_of(policy, root_namespace):
                case Level.MESH:
                    self.mesh.append(policy)
                case Level.NAMESPACE:
                    self.namespaces.setdefault(namespace, []).append(policy)
                case Level.WORKLOAD:
                    self._add(rank, policy)
                case _:
                    reason = (
                        "has no effect: in the root namespace a policy is for the whole mesh, and "
                        "one with a selector is ignored; put it into the workloads' namespace"
                    )
                    self.warnings.append(_warning(policy, "spec.selector", reason))
        for level in (self.mesh, *self.namespaces.values()):
            for loser in level[1:]:
                self.warnings.append(_overruled(loser, level[0], ""))

    def _add(self, rank: int, policy: PeerAuthentication) -> None:
        selector = policy.spec.selector
        label = None if selector is None else next(iter(selector.match_labels.items()), None)
        # The loader refuses an empty selector; one that was made in another way selects nothing,
        # for selecting all is what must never happen by accident.
        if label is not None:
            there = self._selectors.setdefault(policy.metadata.namespace, {})
            there.setdefault(label, []).append((rank, policy))

    @property
    def with_selectors(self) -> Iterable[str]:
        """The namespaces that have policies with a selector."""
        return self._selectors.keys()

    def selecting(self, subject: Subject) -> list[PeerAuthentication]:
        """Return the policies with a selector that selects `subject`, oldest first."""
        there = self._selectors.get(subject.namespace)
        if there is None:
            return []
        labels = subject.labels
        found = [
            (rank, policy)
            for label in labels.items()
            for rank, policy in there.get(label, ())
            if policy.spec.selector is not None
            and policy.spec.selector.match_labels.items() <= labels.items()
        ]
        return [policy for _, policy in sorted(found, key=lambda each: each[0])]

    def chain(
        self, subject: Subject, selecting: Sequence[PeerAuthentication]
    ) -> list[PeerAuthentication]:
        """Return the one policy of each level that has any, narrowest first."""
        namespace = self.namespaces.get(subject.namespace, ())
        return [*selecting[:1], *namespace[:1], *self.mesh[:1]]

    def disables(self, chain: Iterable[PeerAuthentication]) -> bool:
        """Return whether any policy of a chain says DISABLE anywhere."""
        return not self._disabling.isdisjoint(map(id, chain))


_Ranked = tuple[int, PeerAuthentication]


def _disables(policy: PeerAuthentication) -> bool:
    modes = (policy.spec.mtls, *policy.spec.port_level_mtls.values())
    return any(each.mode is MtlsMode.DISABLE for each in modes)


def resolve(
    policies: Iterable[PeerAuthentication],
    subjects: Subjects,
    root_namespace: str,
    here: Collection[str] | None = None,
) -> Resolution:
    """Return what is in force for each subject, or only for those `here` (uids) and those that are
    to be called in plaintext; the warnings are of all. No argument's order matters.
    """
    levels = _Levels(policies, root_namespace)
    resolved: dict[str, WorkloadPolicy] = {}
    clear: dict[str, tuple[PeerAuthentication, list[str]]] = {}
    for subject in _concerned(levels, subjects, here):
        if not subject.in_mesh:
            continue
        selecting = levels.selecting(subject)
        chain = levels.chain(subject, selecting)
        sources = []
        if levels.disables(chain):
            sources = _sources(MtlsMode.DISABLE, chain, selecting[:1])
        for source in sources:
            clear.setdefault(source.uid, (source, []))[1].append(subject.uid)
        if sources or here is None or subject.uid in here:
            resolved[subject.uid] = _in_force(subject, chain, selecting[:1])
    warnings = [
        *levels.warnings,
        *_all_overruled(levels, subjects),
        *_all_outside(levels, subjects),
        *(_clear(policy, sorted(uids)) for policy, uids in clear.values()),
        *(_idle(policy) for policy in levels.disabling if policy.uid not in clear),
    ]
    return Resolution(resolved, tuple(sorted(warnings)))


def _concerned(
    levels: _Levels, subjects: Subjects, here: Iterable[str] | None
) -> Iterable[Subject]:
    """Return those that are here, and all that may have to be called in plaintext: of a hundred
    thousand nearly all are neither.
    """
    if here is None or levels.disables(levels.mesh[:1]):
        return subjects.all()
    found = {subject.uid: subject for subject in subjects.some(here)}
    for policy in levels.disabling:
        found.update(subjects.namespaces.get(policy.metadata.namespace, {}))
    return found.values()


def _all_overruled(levels: _Levels, subjects: Subjects) -> Iterator[ConfigWarning]:
    """Yield the warnings of policies that lose to another one with a selector."""
    found: dict[tuple[str, str], tuple[PeerAuthentication, PeerAuthentication, str]] = {}
    for namespace in levels.with_selectors:
        for subject in subjects.namespaces.get(namespace, {}).values():
            selecting = levels.selecting(subject)
            for loser in selecting[1:]:
                winner = selecting[0]
                _, _, first = found.get((loser.uid, winner.uid), (loser, winner, subject.uid))
                found[loser.uid, winner.uid] = (loser, winner, min(first, subject.uid))
    return (_overruled(*entry) for _, entry in sorted(found.items()))


def _all_outside(levels: _Levels, subjects: Subjects) -> Iterator[ConfigWarning]:
    """Yield the warnings of policies that ask for STRICT where nobody can keep to it."""
    found: dict[str, tuple[PeerAuthentication, list[str]]] = {}
    for subject in subjects.outside.values():
        selecting = levels.selecting(subject)
        chain = levels.chain(subject, selecting)
        for strict in _sources(MtlsMode.STRICT, chain, selecting[:1]):
            found.setdefault(strict.uid, (strict, []))[1].append(subject.uid)
    return (_outside(policy, sorted(uids)) for _, (policy, uids) in sorted(found.items()))


def _in_force(
    subject: Subject, chain: Sequence[PeerAuthentication], selecting: Sequence[PeerAuthentication]
) -> WorkloadPolicy:
    """Return the policy of a subject; `chain` holds one policy a level, narrowest first."""
    mode, origin = DEFAULT_MODE, DEFAULT_ORIGIN
    for policy in chain:
        if policy.spec.mtls.mode is not MtlsMode.UNSET:
            mode, origin = Mode(policy.spec.mtls.mode.value), origin_of(policy)
            break
    port_modes: dict[int, Mode] = {}
    port_origins: dict[int, str] = {}
    for policy in selecting:
        for port, mtls in sorted(policy.spec.port_level_mtls.items()):
            if mtls.mode is not MtlsMode.UNSET:
                port_modes[port] = Mode(mtls.mode.value)
                port_origins[port] = origin_of(policy)
    return WorkloadPolicy(subject.uid, mode, origin, port_modes, port_origins)


def _sources(
    mode: MtlsMode,
    chain: Sequence[PeerAuthentication],
    selecting: Sequence[PeerAuthentication],
) -> list[PeerAuthentication]:
    """Return the policies whose `mode` is in force, or would be for a workload in the mesh."""
    deciding = next((p for p in chain if p.spec.mtls.mode is not MtlsMode.UNSET), None)
    found = [deciding] if deciding and deciding.spec.mtls.mode is mode else []
    for policy in selecting:
        ports = policy.spec.port_level_mtls.values()
        if policy not in found and any(mtls.mode is mode for mtls in ports):
            found.append(policy)
    return found


def origin_of(policy: PeerAuthentication) -> str:
    """Return how a mode in force names the policy that it comes from."""
    return f"{policy.uid} ({policy.origin})"


def _warning(policy: PeerAuthentication, field: str, reason: str) -> ConfigWarning:
    origin = policy.origin
    return ConfigWarning(
        origin.file, origin.line, origin.column, field, f"PeerAuthentication {policy.uid} {reason}"
    )


def _overruled(
    loser: PeerAuthentication, winner: PeerAuthentication, subject: str
) -> ConfigWarning:
    where = f" for workload {subject}" if subject else ""
    reason = (
        f"has no effect{where}: the older {origin_of(winner)} is in force on the same level, and "
        "policies of one level are not merged; remove one"
    )
    return _warning(loser, "metadata.name", reason)


def _outside(policy: PeerAuthentication, subjects: Sequence[str]) -> ConfigWarning:
    reason = (
        "asks for STRICT, and has no effect on workloads outside the mesh: "
        f"{_some(subjects)}; enrol them, or do not count on it"
    )
    return _warning(policy, "spec", reason)


def _clear(policy: PeerAuthentication, subjects: Sequence[str]) -> ConfigWarning:
    ports = sorted(
        port for port, mtls in policy.spec.port_level_mtls.items() if mtls.mode is MtlsMode.DISABLE
    )
    where = ""
    if policy.spec.mtls.mode is not MtlsMode.DISABLE:
        where = f", on port {', '.join(map(str, ports))}"
    reason = (
        "says DISABLE: traffic is in the clear, and callers prove no identity, to "
        f"{_some(subjects)}{where}; with PERMISSIVE callers that can use mutual TLS do"
    )
    return _warning(policy, "spec", reason)


def _idle(policy: PeerAuthentication) -> ConfigWarning:
    reason = (
        "says DISABLE, which has callers leave mutual TLS out; now it is in force for no workload"
    )
    return _warning(policy, "spec", reason)


def _some(subjects: Sequence[str]) -> str:
    more = f" and {len(subjects) - _NAMED} more" if len(subjects) > _NAMED else ""
    return ", ".join(subjects[:_NAMED]) + more
