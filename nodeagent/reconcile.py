"""What is to be done for a pod, from what is wanted and what is there: decisions as values.

This module owns the join of bindings with enrolled pods, the order of tightening and loosening, and
the retry delays. It promises that a pod is uncaptured only because its binding or its namespace has
gone, never because something could not be read; and that no port is open at any step of a change
unless it is open both before and after. Pure: no sockets, no clocks.
"""

from __future__ import annotations

import enum
import zlib
from collections.abc import Iterable, Mapping
from typing import Final

import msgspec

from ztunnel import protocol

__all__ = [
    "AUDIT_SECONDS",
    "AUDIT_SHARE_SECONDS",
    "Closed",
    "Enrolled",
    "Step",
    "Wanted",
    "audit_seconds",
    "closed_by",
    "decide",
    "first_audit_seconds",
    "retry_seconds",
    "together",
    "unwanted",
    "wanted_pods",
    "workload_of",
]

AUDIT_SECONDS: Final = 5.0
"""Between two audits of a pod: how long a pod that undoes its own capture goes unnoticed. It stays
closed meanwhile (the guard is at the device), so this bounds an outage, not a leak."""

AUDIT_SHARE_SECONDS: Final = 0.05
"""For each pod of the node, where that is longer: an audit takes one to two milliseconds of CPU, so
that all of them together take a thirtieth of a processor however many pods there are."""

FIRST_RETRY_SECONDS: Final = 0.25
MAX_RETRY_SECONDS: Final = 30.0
"""A pod that cannot be enrolled is closed or not there yet; a person who repairs it will not wait
longer than this."""


MAX_WAIT_SECONDS: Final = 1.0
"""For what somebody else is about to do: give the pod its address, hand over its listeners."""


class Closed(msgspec.Struct, frozen=True):
    """Which local ports take mutual TLS only: all by default or none, with exceptions.

    Equal values mean the same and the other way round: only ports that differ from `default` are
    named, in `ports`.
    """

    default: bool
    ports: frozenset[int] = frozenset()

    def is_strict(self, port: int) -> bool:
        return self.default != (port in self.ports)


class Wanted(msgspec.Struct, frozen=True):
    """A workload that is bound to this node. `netns` is a name or an absolute path."""

    workload: str
    netns: str
    identity: str
    addresses: tuple[str, ...]
    closed: Closed


class Enrolled(msgspec.Struct, frozen=True):
    """A captured pod. `addresses` are those that its capture was made for."""

    uid: str
    cookie: int
    addresses: tuple[str, ...]


class Step(enum.Enum):
    """What a pod's keeper does next."""

    FINISH = "finish"
    """Nothing is wanted and nothing is there."""
    REMOVE = "remove"
    WAIT = "wait"
    """The namespace does not exist."""
    ENROL = "enrol"
    """Also of a pod whose addresses have changed: in place, so that it is open at no moment."""
    AUDIT = "audit"


def decide(wanted: Wanted | None, enrolled: Enrolled | None, cookie: int | None) -> Step:
    """Return the next step. `cookie` is that of the namespace that the binding leads to now."""
    if enrolled is None:
        if wanted is None:
            return Step.FINISH
        return Step.WAIT if cookie is None else Step.ENROL
    if wanted is None or cookie != enrolled.cookie:
        return Step.REMOVE
    return Step.AUDIT if wanted.addresses == enrolled.addresses else Step.ENROL


def wanted_pods(
    bindings: Mapping[str, str],
    workloads: Mapping[str, protocol.Workload],
    policies: Mapping[str, protocol.WorkloadPolicy],
    authorizations: Iterable[protocol.Authorization],
) -> dict[str, Wanted]:
    """Join the bindings (workload uid to namespace) with what else a pod needs.

    A workload without a resolved policy is strict: nothing is open because something is missing. So
    is one whose callers a policy chooses: a connection that nobody judged is none that was chosen.
    """
    chosen = _chosen(authorizations)
    pods: dict[str, Wanted] = {}
    for uid, netns in bindings.items():
        workload = workloads.get(uid)
        if workload is not None:
            judged = not chosen.isdisjoint(("", workload.namespace, uid))
            closed = Closed(default=True) if judged else closed_by(policies.get(uid))
            pods[uid] = Wanted(uid, netns, workload.identity, workload.addresses, closed)
    return pods


def _chosen(authorizations: Iterable[protocol.Authorization]) -> set[str]:
    """Return whose callers are chosen: workloads, namespaces (without a slash), or "" for all."""
    return {
        scope
        for each in authorizations
        if each.action is not protocol.Action.AUDIT and not each.dry_run
        for scope in ((each.namespace,) if each.workloads is None else each.workloads)
    }


def closed_by(policy: protocol.WorkloadPolicy | None) -> Closed:
    """Return what a policy closes to plaintext."""
    if policy is None:
        return Closed(default=True)
    default = policy.mode is protocol.Mode.STRICT
    differs = (
        port
        for port, mode in policy.port_modes.items()
        if (mode is protocol.Mode.STRICT) != default
    )
    return Closed(default, frozenset(differs))


def together(old: Closed, new: Closed) -> Closed:
    """Return what `old` or `new` closes: in force while one becomes the other."""
    default = old.default or new.default
    differs = (
        port
        for port in old.ports | new.ports
        if (old.is_strict(port) or new.is_strict(port)) != default
    )
    return Closed(default, frozenset(differs))


def workload_of(pod_uid: str) -> str:
    """Return the workload of a pod's uid (`nodeagent.pods.pod_uid`)."""
    return pod_uid.rpartition("@")[0]


def unwanted(left: Iterable[str], wanted: Mapping[str, Wanted]) -> tuple[str, ...]:
    """Return the pods (uids) of an earlier run whose workload is not bound here any more."""
    return tuple(uid for uid in left if workload_of(uid) not in wanted)


def audit_seconds(pods: int) -> float:
    """Return the time between two audits of one pod, of a node that has `pods`."""
    return max(AUDIT_SECONDS, AUDIT_SHARE_SECONDS * pods)


def first_audit_seconds(workload: str, pods: int) -> float:
    """Return the time from a pod's enrolment, which is its first audit, to the next one.

    It differs from pod to pod: those that were enrolled at once are not audited at once.
    """
    share = zlib.crc32(workload.encode()) / 2**32
    return audit_seconds(pods) * (0.5 + share / 2)


def retry_seconds(failures: int, *, soon: bool) -> float:
    """Return the delay after the `failures`th failure in a row (1 is the first).

    `soon` says that somebody else is about to bring what is missing.
    """
    most = MAX_WAIT_SECONDS if soon else MAX_RETRY_SECONDS
    return min(most, FIRST_RETRY_SECONDS * 2.0 ** min(failures - 1, 16))
