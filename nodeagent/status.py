"""From what the daemon's parts say to the published status: pure.

This module owns the join of pods, certificates, configuration and seam into one `Status`, and the
answer to "would traffic pass, and if not, why?". It promises that `ready` is never true while
`missing` names something. It may not ask anybody: everything comes in as values.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import msgspec

from nodeagent.admin.configuration import CONFIGURATION_SCHEMA, Configuration, Documents
from nodeagent.admin.model import (
    SCHEMA,
    AuthorizationReport,
    CertificateReport,
    ConfigReport,
    DrainReport,
    OlderReport,
    PodReport,
    PodState,
    PortMode,
    Problem,
    RecordingReport,
    Status,
    UnenforcedReport,
    ZtunnelReport,
)
from nodeagent.api import ConfigError
from nodeagent.control import ZtunnelStatus
from nodeagent.flows import RecorderStatus
from nodeagent.identity import IdentityPhase, IdentityState, IdentityStatus
from nodeagent.podkeeper import PodView
from nodeagent.policy import Unenforced
from nodeagent.settings import Settings
from nodeagent.sources import SourceState
from ztunnel import protocol

__all__ = ["Facts", "Now", "OwnStatus", "build", "configuration", "missing"]

MAX_NAMED: Final = 10
"""Pods or identities named in an answer of readiness; the rest is counted."""


class Now(msgspec.Struct, frozen=True):
    """One moment on both clocks, to turn monotonic seconds into times."""

    wall: datetime
    monotonic: float

    def at(self, monotonic: float) -> datetime:
        return self.wall - timedelta(seconds=max(0.0, self.monotonic - monotonic))


class OwnStatus(msgspec.Struct, frozen=True):
    """What ztunnel last said of itself; `error` if it did not."""

    body: dict[str, Any] | None = None
    error: str = ""


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that a status is made of, read at one moment."""

    settings: Settings
    version: str
    started: datetime
    loaded: bool
    source: str
    documents: SourceState | None
    warnings: tuple[str, ...]
    unresolved: tuple[ConfigError, ...] = ()
    unenforced: tuple[Unenforced, ...] = ()
    policies: Mapping[str, protocol.WorkloadPolicy]
    authorizations: Mapping[str, protocol.Authorization] = {}
    pods: Mapping[str, PodView]
    identities: IdentityStatus
    ztunnel: ZtunnelStatus
    own: OwnStatus
    recorder: RecorderStatus | None = None
    """None: the settings do not ask for it."""


def missing(facts: Facts) -> tuple[str, ...]:
    """Return what keeps traffic from passing; empty when the node is ready."""
    lacks: list[str] = []
    if not facts.loaded:
        lacks.append(f"no configuration could be loaded from {facts.source}")
    lacks += _some(
        f"pod {workload} is {view.state.value}" + (f": {view.error}" if view.error else "")
        for workload, view in sorted(facts.pods.items())
        if view.wanted is not None and view.state is not PodState.ENROLLED
    )
    if not facts.identities.bundles and facts.identities.identities:
        lacks.append(f"no trust bundle: {facts.identities.bundle_error or 'not delivered yet'}")
    usable = {IdentityPhase.VALID, IdentityPhase.RENEWAL_FAILING}
    lacks += _some(
        f"no certificate for {each.identity}: {each.last_error or 'not issued yet'}"
        for each in facts.identities.identities
        if each.phase not in usable
    )
    lacks += _ztunnel_lacks(facts.ztunnel, facts.own)
    return tuple(lacks)


def _some(lines: Iterable[str]) -> list[str]:
    every = list(lines)
    rest = len(every) - MAX_NAMED
    return every[:MAX_NAMED] + ([f"and {rest} more like it"] if rest > 0 else [])


def _ztunnel_lacks(ztunnel: ZtunnelStatus, own: OwnStatus) -> list[str]:
    if not ztunnel.connected:
        return ["ztunnel is not connected"]
    if ztunnel.rejected is not None:
        return [f"ztunnel refused the newest state: {ztunnel.rejected.error}"]
    if ztunnel.acknowledged_version < ztunnel.wanted_version:
        return ["ztunnel has not put the newest state in force yet"]
    if own.body is None:
        return [own.error or "ztunnel has not said yet whether it is ready"]
    checks = own.body.get("ready")
    if not isinstance(checks, dict):
        return ["ztunnel's word on itself is not understood: install both from the same release"]
    return [f"ztunnel, {name}: {problem}" for name, problem in checks.items() if problem]


def build(facts: Facts, now: Now) -> Status:
    """Return the whole picture."""
    lacks = missing(facts)
    authorizations = _Authorizations(facts.authorizations.values())
    certificates = {each.identity: _certificate(each) for each in facts.identities.identities}
    return Status(
        schema=SCHEMA,
        time=now.wall,
        version=facts.version,
        node=facts.settings.node,
        cluster=facts.settings.cluster,
        trust_domain=facts.settings.trust_domain,
        pid=os.getpid(),
        started=facts.started,
        ready=not lacks,
        missing=lacks,
        same_node=facts.settings.same_node.value,
        ztunnel=_ztunnel(facts.ztunnel, facts.own, now),
        config=_config(facts),
        pods=tuple(
            _pod(workload, view, facts, certificates, authorizations, now)
            for workload, view in sorted(facts.pods.items())
        ),
        certificates=tuple(certificates.values()),
        recording=_recording(facts.recorder),
    )


def _recording(found: RecorderStatus | None) -> RecordingReport | None:
    if found is None:
        return None
    return RecordingReport(
        recorded=found.recorded, lost=found.lost, bytes=found.bytes, problem=found.problem
    )


def configuration(
    facts: Facts, applied: SourceState | None, in_force: int | None
) -> Configuration | None:
    """Return the documents that ztunnel was told of, None before there are any.

    `applied` are those, `in_force` the version of the state that they made; None while it is made.
    """
    if applied is None:
        return None
    settings = facts.settings
    return Configuration(
        schema=CONFIGURATION_SCHEMA,
        source=facts.source,
        pending=_pending(facts, applied, in_force),
        problems=tuple(map(str, applied.problems)),
        node=settings.node,
        cluster=settings.cluster,
        trust_domain=settings.trust_domain,
        root_namespace=settings.root_namespace,
        locality=settings.locality,
        node_addresses=settings.node_addresses,
        node_plaintext=settings.node_plaintext,
        trusted=tuple(domain for domain, _ in facts.identities.bundles),
        documents=Documents.of(applied.documents),
    )


def _pending(facts: Facts, applied: SourceState, in_force: int | None) -> str:
    ztunnel = facts.ztunnel
    if not ztunnel.connected:
        return "ztunnel is not connected: if it runs, it judges by the last state that it had"
    if ztunnel.rejected is not None:
        return f"ztunnel refused the newest state: {ztunnel.rejected.error}"
    if ztunnel.oversized:
        return f"ztunnel is not told of {', '.join(ztunnel.oversized)}: too large, split it"
    if facts.documents is not applied:
        return "a newer configuration has been read and is not in force yet"
    if in_force is None or ztunnel.acknowledged_version < in_force:
        return "ztunnel has not put the newest state in force yet"
    return ""


def _certificate(state: IdentityState) -> CertificateReport:
    return CertificateReport(
        identity=state.identity,
        not_before=_moment(state.not_before),
        not_after=_moment(state.not_after),
        renewals=state.issued,
        failures=state.failures,
        failed=state.failed,
        error=state.last_error,
    )


def _moment(seconds: int) -> datetime | None:
    return datetime.fromtimestamp(seconds, UTC) if seconds else None


def _ztunnel(status: ZtunnelStatus, own: OwnStatus, now: Now) -> ZtunnelReport:
    return ZtunnelReport(
        connected=status.connected,
        pid=status.pid,
        since=now.at(status.since) if status.connected else None,
        wanted_version=status.wanted_version,
        acknowledged_version=status.acknowledged_version,
        rejected=status.rejected.error if status.rejected is not None else "",
        rejections=status.rejections,
        oversized=status.oversized,
        own=own.body if status.connected else None,
        error=own.error if status.connected else "",
        draining=tuple(
            DrainReport(
                pid=each.pid,
                since=now.at(each.since),
                connections=each.connections,
                hbone_connections=each.hbone,
                cut=each.cut,
            )
            for each in status.draining
        ),
    )


def _config(facts: Facts) -> ConfigReport:
    found = facts.documents
    if found is None:
        return ConfigReport(source=facts.source, loaded=False)
    return ConfigReport(
        source=facts.source,
        loaded=facts.loaded,
        version=found.version,
        documents=len(found.documents),
        problems=_problems(found.problems),
        unresolved=_problems(facts.unresolved),
        unenforced=tuple(
            UnenforcedReport(
                policy=each.policy,
                action=each.action,
                origin=each.origin,
                fields=each.fields,
                effect=each.effect,
            )
            for each in facts.unenforced
        ),
        warnings=(*map(str, found.warnings), *facts.warnings),
    )


def _problems(errors: Iterable[ConfigError]) -> tuple[Problem, ...]:
    return tuple(
        Problem(
            file=each.file,
            line=each.line,
            column=each.column,
            field=each.field,
            reason=each.reason,
        )
        for each in errors
    )


class _Authorizations:
    """The policies on who may call, by what they are for."""

    def __init__(self, policies: Iterable[protocol.Authorization]) -> None:
        self._found: dict[str, list[protocol.Authorization]] = {}
        for each in policies:
            # A namespace holds no slash, a workload's uid does, and the mesh is neither.
            for scope in (each.namespace,) if each.workloads is None else each.workloads:
                self._found.setdefault(scope, []).append(each)

    def of(self, workload: str) -> tuple[AuthorizationReport, ...]:
        """Return the policies for a workload, in the order in which they are asked."""
        scopes = ("", workload.partition("/")[0], workload)
        found = [each for scope in scopes for each in self._found.get(scope, ())]
        order = (protocol.Action.DENY, protocol.Action.ALLOW, protocol.Action.AUDIT)
        found.sort(key=lambda each: (order.index(each.action), each.uid))
        return tuple(
            AuthorizationReport(
                policy=each.uid, action=each.action.value, origin=each.origin, dry_run=each.dry_run
            )
            for each in found
        )


def _pod(
    workload: str,
    view: PodView,
    facts: Facts,
    certificates: Mapping[str, CertificateReport],
    authorizations: _Authorizations,
    now: Now,
) -> PodReport:
    wanted, enrolled = view.wanted, view.enrolled
    policy = facts.policies.get(workload)
    ports = () if policy is None else sorted(policy.port_modes.items())
    return PodReport(
        workload=workload,
        identity=wanted.identity if wanted else "",
        netns=wanted.netns if wanted else "",
        state=view.state,
        since=now.at(view.since),
        uid=enrolled.uid if enrolled else "",
        netns_cookie=enrolled.cookie if enrolled else 0,
        addresses=wanted.addresses if wanted else (),
        mode=policy.mode.value if policy else "",
        mode_origin=policy.origin if policy else "",
        port_modes=tuple(
            PortMode(
                port=port,
                mode=mode.value,
                origin=policy.port_origins.get(port, "") if policy else "",
            )
            for port, mode in ports
        ),
        authorizations=authorizations.of(workload),
        certificate=certificates.get(wanted.identity) if wanted else None,
        error=view.error,
        deviations=view.deviations,
        repaired=view.repaired,
        drops=view.drops,
        older=tuple(
            OlderReport(source=each.source, port=each.port, connections=each.connections)
            for each in view.older or ()
        ),
    )
