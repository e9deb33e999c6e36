"""What `nodeagent certs` makes of a report: states and findings, as values."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest

from nodeagent.admin.certificates import (
    CertificateDetail,
    CertificatesReport,
    IdentityReport,
    RootReport,
)
from nodeagent.cli import certs_view as view

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
HOUR = timedelta(hours=1)
DAY = timedelta(days=1)
ID = "spiffe://cluster.local/ns/shop/sa/web"


def identity(**changes: Any) -> IdentityReport:  # noqa: ANN401 - its fields
    base = IdentityReport(
        identity=ID,
        phase="valid",
        not_before=NOW - HOUR / 2,
        not_after=NOW + HOUR / 2,
        renew_at=NOW + HOUR / 6,
    )
    return msgspec.structs.replace(base, **changes)


def root(left: timedelta = 3650 * DAY, life: timedelta = 3650 * DAY) -> RootReport:
    detail = CertificateDetail(
        sha256="0" * 64,
        subject="O=x,CN=the root",
        not_before=NOW + left - life,
        not_after=NOW + left,
    )
    return RootReport(trust_domain="cluster.local", certificate=detail)


def found(*identities: IdentityReport, **changes: Any) -> list[str]:  # noqa: ANN401 - its fields
    report = CertificatesReport(
        time=NOW, node="n", trust_domain="cluster.local", identities=identities, roots=(root(),)
    )
    report = msgspec.structs.replace(report, **changes)
    findings = view.findings(report, report.identities, NOW)
    assert all(each.text and each.remedy for each in findings)
    return [each.code for each in findings]


@pytest.mark.parametrize(
    "changes,state",
    [
        ({}, "valid"),
        ({"failures": 1, "error": "CA down"}, "failing"),
        # A quarter of an hour's life.
        ({"not_before": NOW - 0.76 * HOUR, "not_after": NOW + 0.24 * HOUR}, "near-expiry"),
        ({"not_before": NOW - 0.74 * HOUR, "not_after": NOW + 0.26 * HOUR}, "valid"),
        ({"not_after": NOW}, "expired"),
        ({"not_before": NOW + HOUR / 4}, "not-yet-valid"),
        ({"not_after": None, "phase": "pending"}, "pending"),
        ({"not_after": None, "phase": "unavailable", "error": "denied"}, "none"),
    ],
)
def test_each_state_but_valid_is_a_finding(changes: dict[str, Any], state: str) -> None:
    one = identity(**changes)
    assert view.state(one, NOW) == state
    assert found(one) == ([] if state == "valid" else [f"certificate-{state}"])


@pytest.mark.parametrize(
    "left,life,codes",
    [
        (31 * DAY, 3650 * DAY, []),
        (29 * DAY, 3650 * DAY, ["root-near-expiry"]),
        (-DAY, 3650 * DAY, ["root-expired"]),
        # Of a short life a quarter is less than thirty days.
        (23 * DAY, 90 * DAY, []),
        (22 * DAY, 90 * DAY, ["root-near-expiry"]),
    ],
)
def test_a_root_near_its_end_is_a_finding(
    left: timedelta, life: timedelta, codes: list[str]
) -> None:
    assert found(identity(), roots=(root(left, life),)) == codes


def test_an_intermediate_is_looked_at_once_however_many_have_it() -> None:
    spent = CertificateDetail(
        sha256="1" * 64, subject="CN=between", not_before=NOW - 90 * DAY, not_after=NOW + DAY
    )
    leaf = CertificateDetail(sha256="2" * 64)
    both = [identity(chain=(leaf, spent)), identity(identity=ID + "2", chain=(leaf, spent))]
    assert found(*both) == ["intermediate-near-expiry"]


def test_roots_that_do_not_come_and_roots_that_are_not_there() -> None:
    assert found(identity(), bundle_error="no answer") == ["bundles-failing"]
    assert found(identity(), roots=()) == ["root-missing"]
    assert found(roots=()) == []


def test_a_root_that_cannot_be_read_is_a_finding() -> None:
    broken = CertificateDetail(sha256="3" * 64, error="cannot be read: x")
    report = RootReport(trust_domain="cluster.local", certificate=broken)
    assert found(identity(), roots=(report,)) == ["root-unreadable"]


def test_renewal_is_said_with_its_failures() -> None:
    assert view.renewal(identity(), NOW) == "in 10m"
    assert view.renewal(identity(failures=3, renew_at=NOW), NOW) == "now (3 failed)"
    assert view.renewal(identity(renew_at=None), NOW) == "<none>"
