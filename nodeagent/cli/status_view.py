"""What `nodeagent status` says: findings, lines and tables from a status, as values.

This module owns the words and columns that an operator reads. It promises that every finding has
a stable code, a cause and a remedy, that meaning never hangs on colour, and that columns are only
added at the end. Pure: the time and the time zone come in as values.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, tzinfo
from typing import Any, Final

import msgspec

from nodeagent.admin.model import CertificateReport, PodReport, PodState, Problem, Status
from nodeagent.api import ConfigError
from nodeagent.cli.table import Cell, Column, Tone
from nodeagent.cli.text import NONE, duration, many, moment
from ztunnel.protocol import SameNode

__all__ = [
    "Finding",
    "certificate_left",
    "drain_lines",
    "findings",
    "mode",
    "not_in_force",
    "notes",
    "pending",
    "pod_rows",
    "short_identity",
    "unenforced_lines",
    "verdict",
]


MAX_UNENFORCED: Final = 20
"""Lines of policies that are not enforced as written: a screen of them. JSON has all."""

_COLUMNS: Final = (
    Column("WORKLOAD"),
    Column("IDENTITY"),
    Column("MODE", folds=False),
    Column("CERT", folds=False),
    Column("STATE", folds=False),
    Column("AGE", folds=False),
)
_WIDE_COLUMNS: Final = tuple(
    map(Column, ("NETNS", "ADDRESSES", "POLICY", "CERT-UNTIL", "REPAIRED", "AUTHORIZATION"))
)


class Finding(msgspec.Struct, frozen=True):
    """Something an operator should act on. `code` is stable; `remedy` says how."""

    code: str
    text: str
    remedy: str


def certificate_left(certificate: CertificateReport | None, now: datetime) -> str:
    """Return what is left of a certificate: a duration, "expired" or "<none>"."""
    if certificate is None or certificate.not_after is None:
        return NONE
    left = (certificate.not_after - now).total_seconds()
    text = duration(left) if left > 0 else "expired"
    return f"{text} (failing)" if certificate.error else text


def verdict(status: Status, found: tuple[Finding, ...]) -> str:
    """Return the one line that answers "is it all right?"."""
    enrolled = sum(pod.state is PodState.ENROLLED for pod in status.pods)
    pods = f"{enrolled} of {len(status.pods)} pods enrolled"
    if status.ready and not found:
        return f"{status.node}: healthy, {pods}"
    count = f"{len(found)} finding{'s' if len(found) != 1 else ''}"
    return f"{status.node}: {'ready' if status.ready else 'NOT READY'}, {pods}, {count}"


def findings(status: Status, now: datetime) -> tuple[Finding, ...]:
    """Return everything that needs somebody, the causes before their consequences."""
    found = [*not_in_force(status), *_ztunnel(status)]
    for certificate in status.certificates:
        found += _certificate(certificate, now)
    for pod in status.pods:
        found += _pod(pod)
    found += _recording(status)
    if not found:
        # Readiness knows something that has no finding of its own yet: never hide it.
        for missing in status.missing:
            found.append(Finding("not-ready", missing, "look at the daemon's log"))
    return tuple(found)


def notes(status: Status) -> tuple[str, ...]:
    """Return what was chosen in the settings and yet must not be overlooked."""
    if status.same_node != SameNode.DIRECT:
        return ()
    note = (
        "same node, direct: not encrypted between pods of this node, identity and policy by the "
        "node (settings: same_node)"
    )
    return (note,)


def unenforced_lines(status: Status) -> tuple[str, ...]:
    """Return the policies that are in force otherwise than they are written, the first of many."""
    found = status.config.unenforced
    lines = tuple(
        f"{each.action} {each.policy} ({each.origin}): without {', '.join(each.fields)}; "
        f"{each.effect}"
        for each in found[:MAX_UNENFORCED]
    )
    left = len(found) - MAX_UNENFORCED
    return (*lines, f"and {left} more: -o json has all of them") if left > 0 else lines


def not_in_force(status: Status) -> list[Finding]:
    """Return what is written and is not in force as it is written."""
    found = [
        Finding(
            "config-refused",
            _place(problem),
            "correct the file; its last good version stays in force until then",
        )
        for problem in status.config.problems
    ]
    found += [
        Finding(
            "config-unresolved",
            _place(problem),
            "correct it; the file is in force, and what depends on this is closed until then",
        )
        for problem in status.config.unresolved
    ]
    if not status.config.loaded:
        found.insert(
            0,
            Finding(
                "config-not-loaded",
                f"no configuration has been loaded from {status.config.source}",
                "nothing is enrolled or removed until it can be read",
            ),
        )
    return found


def _place(problem: Problem) -> str:
    """Return the problem in the words of the log and of `policy check`."""
    return str(
        ConfigError(problem.file, problem.line, problem.column, problem.field, problem.reason)
    )


def _ztunnel(status: Status) -> list[Finding]:
    ztunnel = status.ztunnel
    if not ztunnel.connected:
        return [
            Finding(
                "ztunnel-not-connected",
                "ztunnel is not connected; it goes on with the last state that it had, if it runs",
                "systemctl status ztunnel; journalctl -u ztunnel",
            )
        ]
    found: list[Finding] = []
    if ztunnel.rejected:
        found.append(
            Finding(
                "ztunnel-rejected",
                f"ztunnel refused the newest state: {ztunnel.rejected}",
                "the state before it is in force; journalctl -u ztunnel",
            )
        )
    for resource in ztunnel.oversized:
        found.append(
            Finding(
                "resource-too-large",
                f"{resource} is too large to be handed to ztunnel and is left out",
                "split it into several documents",
            )
        )
    if ztunnel.error:
        found.append(Finding("ztunnel-silent", ztunnel.error, "journalctl -u ztunnel"))
    for sink, problem in _audit_problems(ztunnel.own):
        found.append(
            Finding(
                "audit-sink",
                f"the audit log does not get on with its sink {sink}: {problem}",
                "mend what it names; lines wait, and those that find no room are counted",
            )
        )
    return found


def _audit_problems(own: dict[str, Any] | None) -> Iterator[tuple[str, str]]:
    """Return the sinks of the audit log with which something is wrong. A ztunnel of another release
    may not say.
    """
    sinks = own.get("audit") if own is not None else None
    if isinstance(sinks, dict):
        for sink, problem in sinks.items():
            if problem:
                yield str(sink), str(problem)


def _certificate(certificate: CertificateReport, now: datetime) -> list[Finding]:
    until = certificate.not_after
    if until is None:
        text = f"{certificate.identity} has no certificate"
    elif until <= now:
        text = f"the certificate of {certificate.identity} has expired"
    elif certificate.error:
        left = duration((until - now).total_seconds())
        text = f"the certificate of {certificate.identity} cannot be renewed, {left} left"
    else:
        return []
    cause = f": {certificate.error}" if certificate.error else ""
    return [Finding("certificate", text + cause, "look at the identity provider")]


def _pod(pod: PodReport) -> list[Finding]:
    detail = f": {pod.error}" if pod.error else ""
    if pod.state is PodState.ENROLLED:
        return []
    if pod.state is PodState.WAITING:
        return [
            Finding(
                "pod-namespace-missing",
                f"{pod.workload}: {pod.error or f'network namespace {pod.netns} does not exist'}",
                "start the workload, or correct its nodeagent.io/netns annotation",
            )
        ]
    if pod.state is PodState.DEGRADED:
        wrong = ", ".join(pod.deviations) or "an audit failed"
        return [
            Finding(
                "pod-degraded",
                f"{pod.workload}: {wrong}{detail}",
                "the pod is kept closed there; look for what changes its namespace",
            )
        ]
    return [
        Finding(
            f"pod-{pod.state.value.lower()}",
            f"{pod.workload} is {pod.state.value.lower()}{detail}",
            "it is tried again; the daemon's log has every attempt",
        )
    ]


def _recording(status: Status) -> list[Finding]:
    if status.recording is None or not status.recording.problem:
        return []
    return [
        Finding(
            "flows-not-recorded",
            f"who calls is not recorded (traffic goes on): {status.recording.problem}",
            "make room, or remove the file; it is tried again every half a minute",
        )
    ]


def drain_lines(status: Status, now: datetime) -> tuple[str, ...]:
    """Return a line for each ztunnel that an upgrade has replaced and that still carries something.

    That is no finding: it ends by itself.
    """
    lines: list[str] = []
    for drain in status.ztunnel.draining:
        since = duration((now - drain.since).total_seconds())
        what = "has not said what it carries"
        if drain.connections is not None:
            plural = "" if drain.connections == 1 else "s"
            what = f"{drain.connections} connection{plural} left"
        cut = f", {drain.cut} cut at the deadline" if drain.cut else ""
        lines.append(f"ztunnel {drain.pid} drains for {since}: {what}{cut}")
    return tuple(lines)


def pod_rows(
    status: Status, now: datetime, zone: tzinfo | None, *, wide: bool
) -> tuple[tuple[Column, ...], list[tuple[Cell, ...]]]:
    """Return the columns and the rows of the pods' table. `zone` None is the local time zone."""
    columns = _COLUMNS + (_WIDE_COLUMNS if wide else ())
    rows: list[tuple[Cell, ...]] = []
    for pod in sorted(status.pods, key=lambda pod: pod.workload):
        tone = Tone.GOOD if pod.state is PodState.ENROLLED else Tone.BAD
        cells: list[Cell | str] = [
            pod.workload,
            pod.identity if wide else short_identity(pod.identity, status.trust_domain),
            mode(pod),
            certificate_left(pod.certificate, now),
            Cell(pod.state.value, tone),
            duration((now - pod.since).total_seconds()),
        ]
        if wide:
            cells += [
                pod.netns,
                ",".join(pod.addresses),
                pod.mode_origin,
                moment(pod.certificate.not_after if pod.certificate else None, zone),
                str(pod.repaired),
                _authorizations(pod),
            ]
        rows.append(tuple(each if isinstance(each, Cell) else Cell(each) for each in cells))
    return columns, rows


def pending(status: Status) -> str:
    """Return why what is configured is not in force, all of it; empty when it is."""
    ztunnel = status.ztunnel
    if not status.config.loaded:
        return f"no configuration has been loaded from {status.config.source}"
    if not ztunnel.connected:
        return "ztunnel is not connected: if it runs, it judges by the last state that it had"
    if ztunnel.rejected:
        return f"ztunnel refuses the newest state: {ztunnel.rejected}"
    if ztunnel.oversized:
        return f"ztunnel is not told of {', '.join(ztunnel.oversized)}: too large, split it"
    if ztunnel.acknowledged_version < ztunnel.wanted_version:
        return "ztunnel has not put the newest state in force yet"
    if status.config.problems:
        count = many(len(status.config.problems), "document")
        return f"{count} refused, the last good version is in force: nodeagent config says which"
    return ""


def short_identity(identity: str, trust_domain: str) -> str:
    """Return an identity without what goes without saying on this node."""
    return identity.removeprefix(f"spiffe://{trust_domain}/").removeprefix("spiffe://")


def mode(pod: PodReport) -> str:
    """Return the mTLS mode, marked if it is not that of all ports."""
    # A port that differs must not hide behind the workload's mode.
    return (pod.mode or "<unknown>") + ("*" if pod.port_modes else "")


def _authorizations(pod: PodReport) -> str:
    """Return how many policies of each kind are asked who may call, such as "1 DENY, 2 ALLOW"."""
    counts: dict[str, int] = {}
    for each in pod.authorizations:
        action = f"{each.action} (dry run)" if each.dry_run else each.action
        counts[action] = counts.get(action, 0) + 1
    return ", ".join(f"{count} {action}" for action, count in counts.items())
