"""Judges certificates and clocks: pure.

This module owns the findings NA4…. It promises that a certificate near its end is an error while
there is still time, and never a warning. It may not look at anything but the facts.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Final

from nodeagent.admin.model import CertificateReport
from nodeagent.doctor._make import finding
from nodeagent.doctor.facts import Authority, CaCertificate, Facts
from nodeagent.doctor.model import Finding

__all__ = ["NEAR_END", "judge"]

NEAR_END: Final = 0.25
"""Part of a certificate's life. Workloads' are renewed with a third left, the CA's intermediate is
replaced with a third left: whatever gets below a quarter is not being renewed."""

ROOT_NOTICE: Final = timedelta(days=180)
"""A root's successor has to reach every node before it is used; nobody hurries that."""

_CLOCK_REASONS: Final = ("certificate_not_yet_valid", "certificate_expired")
"""Reasons of failed handshakes (ztunnel's) that differing clocks bring about."""

MOST_ERROR_SECONDS: Final = 300.0
"""How far certificates are backdated: beyond it a peer refuses a fresh one."""


def judge(facts: Facts) -> Iterator[Finding]:
    status = facts.agent.status
    if status is not None:
        for certificate in status.certificates:
            yield from _workload(certificate, facts.now)
    elif facts.counts is not None:
        for identity, end in facts.counts.expiries.items():
            left = end - facts.now.timestamp()
            if left <= 0:
                yield _ended(identity, datetime.fromtimestamp(end, UTC), facts.now, "")
    if facts.authority is not None:
        yield from _authority(facts.authority, facts.now)
    yield from _clock(facts)


# --- workloads' ----------------------------------------------------------------------------------


def _workload(certificate: CertificateReport, now: datetime) -> Iterator[Finding]:
    until, since = certificate.not_after, certificate.not_before
    if until is None:
        yield finding(
            "NA4001",
            f"{certificate.identity} has none: {certificate.error or 'not issued yet'}",
            "look what the identity provider says",
            "journalctl -u nodeagent --since -15min --no-pager | grep -i certificate",
            affects=[certificate.identity],
        )
        return
    life = (until - since).total_seconds() if since is not None else 0.0
    if (until - now).total_seconds() < NEAR_END * life or until <= now:
        yield _ended(certificate.identity, until, now, certificate.error)
    elif certificate.error:
        yield finding(
            "NA4002",
            f"{certificate.identity}: {certificate.error}; {_span(until - now)} left",
            "mend what it names while there is time; it is tried again by itself",
            "journalctl -u nodeagent --since -15min --no-pager | grep -i certificate",
            affects=[certificate.identity],
        )


def _ended(identity: str, until: datetime, now: datetime, error: str) -> Finding:
    cause = f": {error}" if error else ""
    return finding(
        "NA4001",
        f"{identity} {_ends(until, now)}{cause}",
        "look what the identity provider says; without a certificate nobody reaches the "
        "workload, and it reaches nobody",
        "journalctl -u nodeagent --since -15min --no-pager | grep -i certificate",
        "systemctl restart nodeagent",
        affects=[identity],
    )


# --- the CA's ------------------------------------------------------------------------------------


def _authority(authority: Authority, now: datetime) -> Iterator[Finding]:
    if authority.problem:
        yield finding(
            "NA4004",
            f"{authority.directory}: {authority.problem}",
            "restore the directory from a backup; nothing in it is replaced by itself",
            f"ls -la {authority.directory}",
        )
    intermediates = [each for each in authority.certificates if each.kind == "intermediate"]
    roots = [each for each in authority.certificates if each.kind == "root"]
    for each in intermediates:
        if each.not_before > now:
            yield _future(each, authority, now)
        elif _near(each, now):
            yield _ca_ends(each, authority, now)
    # Of several roots the newest counts: the others are there for who still shows them.
    if roots:
        newest = max(roots, key=lambda each: each.not_after)
        if newest.not_before > now:
            yield _future(newest, authority, now)
        elif newest.not_after - now < min(ROOT_NOTICE, NEAR_END * _life(newest)):
            yield _ca_ends(newest, authority, now)


def _future(certificate: CaCertificate, authority: Authority, now: datetime) -> Finding:
    return finding(
        "NA4005",
        f"{authority.directory}/{certificate.file} begins only in "
        f"{_span(certificate.not_before - now)}: this clock is behind, or was ahead when it was "
        "made",
        "set the clock, and have something keep it right",
        "timedatectl",
        "systemctl enable --now systemd-timesyncd",
    )


def _ca_ends(certificate: CaCertificate, authority: Authority, now: datetime) -> Finding:
    where = f"the {certificate.kind} in {authority.directory}/{certificate.file}"
    text = f"{where} {_ends(certificate.not_after, now)}"
    if certificate.kind == "root":
        return finding(
            "NA4003",
            text,
            "add a new root to the bundle of every node, then its key here: docs/identity.md",
            f"openssl x509 -noout -dates -in {authority.directory}/root.pem",
        )
    if not authority.root_key:
        return finding(
            "NA4003",
            f"{text}, and root-key.pem, which would sign the next, is not here",
            "bring the root's key back; the next one is made within ten minutes",
            f"install -m 0600 root-key.pem {authority.directory}/root-key.pem",
        )
    return finding(
        "NA4003",
        f"{text}, and no new one has been made",
        "see why: the directory must be writable for nodeagent, and have room",
        "journalctl -u nodeagent --no-pager | grep ca_intermediate",
        f"openssl x509 -noout -dates -in {authority.directory}/{certificate.file}",
    )


def _near(certificate: CaCertificate, now: datetime) -> bool:
    return certificate.not_after - now < NEAR_END * _life(certificate)


def _life(certificate: CaCertificate) -> timedelta:
    return certificate.not_after - certificate.not_before


# --- clocks --------------------------------------------------------------------------------------


def _clock(facts: Facts) -> Iterator[Finding]:
    failures = facts.counts.handshake_failures if facts.counts is not None else {}
    seen = {reason: failures[reason] for reason in _CLOCK_REASONS if failures.get(reason)}
    unsure = facts.clock.synchronised is False or facts.clock.error > MOST_ERROR_SECONDS
    if seen:
        counted = ", ".join(f"{count} {reason}" for reason, count in seen.items())
        yield finding(
            "NA4005",
            f"handshakes have failed since ztunnel began: {counted}"
            + ("; nothing keeps this node's clock right" if unsure else ""),
            "compare the clocks of this node and the peers that the log names",
            "date -u",
            "journalctl -u ztunnel -o cat | grep -E 'certificate_(not_yet_valid|expired)' | tail",
        )
    if unsure:
        yield finding(
            "NA4006",
            "the kernel says that nothing disciplines this node's clock"
            if facts.clock.synchronised is False
            else f"the clock may be wrong by {facts.clock.error:.0f} s",
            "run an NTP client: peers judge certificates, which live for an hour, by their clocks",
            "systemctl enable --now systemd-timesyncd",
            "timedatectl",
        )


# --- words ---------------------------------------------------------------------------------------


def _ends(until: datetime, now: datetime) -> str:
    if until <= now:
        return f"ended {_span(now - until)} ago"
    return f"ends in {_span(until - now)}"


def _span(span: timedelta) -> str:
    seconds = int(span.total_seconds())
    for size, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= 2 * size:
            return f"{seconds // size}{unit}"
    return f"{seconds}s"
