"""What `nodeagent certs` says: states, findings and words from the report, as values.

This module owns what "near expiry" means and the findings on certificates. It promises that every
finding has a stable code, a cause and a remedy. Pure: the time comes in as a value.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Final, NamedTuple

from nodeagent.admin.certificates import CertificateDetail, CertificatesReport, IdentityReport
from nodeagent.cli import status_view
from nodeagent.cli.status_view import Finding
from nodeagent.cli.text import NONE, duration, moment

__all__ = [
    "Finding",
    "IdentityReport",
    "Issuer",
    "State",
    "common_name",
    "findings",
    "issuer_state",
    "issuers",
    "left",
    "renewal",
    "seconds_left",
    "short_identity",
    "state",
    "until",
]

NEAR_PART: Final = 0.25
"""Of a life: renewal comes at two thirds of it, and has failed for long when less is left."""

NEAR_MOST: Final = timedelta(days=30)
"""Time enough to replace a root on every node; a quarter of its ten years is no news."""


class State(enum.StrEnum):
    VALID = "valid"
    NEAR = "near-expiry"
    FAILING = "failing"
    """Valid, and the last attempt to renew it has failed."""
    EXPIRED = "expired"
    EARLY = "not-yet-valid"
    PENDING = "pending"
    """It has been asked for, for the first time."""
    MISSING = "none"
    UNREADABLE = "unreadable"


class Issuer(NamedTuple):
    """`kind` is "intermediate" or "root"."""

    kind: str
    trust_domain: str
    certificate: CertificateDetail


def state(identity: IdentityReport, now: datetime) -> State:
    """Return where an identity stands, the worst first."""
    if identity.not_after is None:
        return State.PENDING if identity.phase == "pending" else State.MISSING
    found = _by_time(identity.not_before, identity.not_after, now)
    if found is State.VALID and identity.failures:
        return State.FAILING
    return found


def issuer_state(certificate: CertificateDetail, now: datetime) -> State:
    if certificate.not_after is None:
        return State.UNREADABLE
    return _by_time(certificate.not_before, certificate.not_after, now)


def _by_time(begins: datetime | None, ends: datetime, now: datetime) -> State:
    if ends <= now:
        return State.EXPIRED
    if begins is not None and now < begins:
        return State.EARLY
    life = ends - (begins or now)
    return State.NEAR if ends - now < min(life * NEAR_PART, NEAR_MOST) else State.VALID


def issuers(found: CertificatesReport, identities: Iterable[IdentityReport]) -> list[Issuer]:
    """Return every intermediate of these identities once, and every root."""
    between = {
        each.sha256: Issuer("intermediate", found.trust_domain, each)
        for identity in identities
        for each in identity.chain[1:]
    }
    roots = [Issuer("root", each.trust_domain, each.certificate) for each in found.roots]
    return [*between.values(), *roots]


def findings(
    found: CertificatesReport, identities: Iterable[IdentityReport], now: datetime
) -> list[Finding]:
    """Return what somebody must see to, the causes before their consequences."""
    shown = tuple(identities)
    made: list[Finding] = []
    if found.bundle_error:
        made.append(
            Finding(
                "bundles-failing",
                f"no newer roots come: {found.bundle_error}",
                "look at the identity provider; the roots in hand stay in force",
            )
        )
    if shown and not any(each.trust_domain == found.trust_domain for each in found.roots):
        made.append(
            Finding(
                "root-missing",
                f"no root of {found.trust_domain} is held: none of its identities is believed",
                "look at the identity provider",
            )
        )
    for issuer in issuers(found, shown):
        made += _of_issuer(issuer, now)
    for each in shown:
        made += _of_identity(each, now)
    return made


_WORDS: Final = {
    State.NEAR: "is near its end",
    State.EXPIRED: "has expired",
    State.EARLY: "is not valid yet",
    State.UNREADABLE: "cannot be read",
}


def _of_issuer(issuer: Issuer, now: datetime) -> list[Finding]:
    stands = issuer_state(issuer.certificate, now)
    if stands is State.VALID:
        return []
    what = f"the {issuer.kind} {common_name(issuer.certificate)} of {issuer.trust_domain}"
    detail = f": {_ends(issuer.certificate.not_after, now)}"
    remedy = "replace the root on every node, then the certificates below it"
    if issuer.kind == "intermediate":
        remedy = "the CA renews it by itself while it has the root's key: look at the daemon's log"
    if stands is State.EARLY:
        remedy = "compare the clocks of this machine and of the CA"
    return [Finding(f"{issuer.kind}-{stands.value}", f"{what} {_WORDS[stands]}{detail}", remedy)]


def _of_identity(identity: IdentityReport, now: datetime) -> list[Finding]:
    stands = state(identity, now)
    if stands is State.VALID:
        return []
    cause = f": {identity.error}" if identity.error else ""
    who = identity.identity
    remedy = "look at the identity provider; journalctl -u nodeagent has every attempt"
    match stands:
        case State.MISSING:
            text = f"{who} has no certificate{cause}"
        case State.PENDING:
            text = f"{who} has no certificate yet{cause}"
        case State.FAILING:
            text = (
                f"the certificate of {who} cannot be renewed, "
                f"{left(identity.not_after, now)} left{cause}"
            )
        case State.EARLY:
            text = f"the certificate of {who} is not valid yet{cause}"
            remedy = "compare the clocks of this machine and of the CA"
        case _:
            text = f"the certificate of {who} {_WORDS[stands]}, {_ends(identity.not_after, now)}"
            text += cause
    return [Finding(f"certificate-{stands.value}", text, remedy)]


def _ends(ends: datetime | None, now: datetime) -> str:
    if ends is None:
        return "no end is known"
    ago = (now - ends).total_seconds()
    return f"{duration(ago)} ago" if ago >= 0 else f"{duration(-ago)} left"


# --- words --------------------------------------------------------------------------------------


def short_identity(identity: IdentityReport, trust_domain: str) -> str:
    return status_view.short_identity(identity.identity, trust_domain)


def seconds_left(ends: datetime | None, now: datetime) -> int:
    """Return the seconds to the end, 0 when it is reached or there is none."""
    return max(0, int((ends - now).total_seconds())) if ends is not None else 0


def left(ends: datetime | None, now: datetime) -> str:
    if ends is None:
        return NONE
    return duration((ends - now).total_seconds()) if ends > now else "0s"


def until(when: datetime | None) -> str:
    return moment(when)


def renewal(identity: IdentityReport, now: datetime) -> str:
    """Return when the next request is planned, and how many have failed since the last success."""
    if identity.renew_at is None:
        return NONE
    seconds = (identity.renew_at - now).total_seconds()
    planned = f"in {duration(seconds)}" if seconds > 0 else "now"
    return f"{planned} ({identity.failures} failed)" if identity.failures else planned


def common_name(certificate: CertificateDetail) -> str:
    """Return the CN of the subject, all of it if there is none."""
    for part in certificate.subject.split(","):
        kind, _, value = part.partition("=")
        if kind == "CN":
            return value
    return certificate.subject or f"sha256 {certificate.sha256[:16]}"
