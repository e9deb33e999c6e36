"""What `nodeagent status` says: verdict, rows, findings, exit codes and output forms."""

from __future__ import annotations

import json
import socket
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from click.testing import CliRunner, Result

from nodeagent.admin.model import (
    SCHEMA,
    AuthorizationReport,
    CertificateReport,
    ConfigReport,
    DrainReport,
    PodReport,
    PodState,
    PortMode,
    Problem,
    RecordingReport,
    Status,
    UnenforcedReport,
    ZtunnelReport,
)
from nodeagent.cli import cli, status_view
from nodeagent.cli.ending import ExitCode
from support.admin import Answers, beside

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
ID = "spiffe://cluster.local/ns/default/sa/a"


def certificate(left: float | None = 3000, error: str = "") -> CertificateReport:
    until = None if left is None else NOW + timedelta(seconds=left)
    return CertificateReport(identity=ID, not_after=until, error=error)


def pod(**changes: Any) -> PodReport:  # noqa: ANN401 - its fields
    base = PodReport(
        workload="default/a",
        identity=ID,
        netns="a",
        state=PodState.ENROLLED,
        since=NOW - timedelta(minutes=3),
        mode="STRICT",
        mode_origin="default/strict (a.yaml:1)",
        addresses=("10.0.0.1",),
        certificate=certificate(),
    )
    return msgspec.structs.replace(base, **changes)


def picture(**changes: Any) -> Status:  # noqa: ANN401 - its fields
    base = Status(
        schema=SCHEMA,
        time=NOW,
        version="1",
        node="node-1",
        cluster="c",
        trust_domain="cluster.local",
        pid=1,
        started=NOW,
        ready=True,
        missing=(),
        ztunnel=ZtunnelReport(connected=True),
        config=ConfigReport(source="/etc/x", loaded=True),
        pods=(pod(),),
        certificates=(certificate(),),
    )
    return msgspec.structs.replace(base, **changes)


def test_healthy_node_has_no_finding() -> None:
    assert status_view.findings(picture(), NOW) == ()
    assert status_view.verdict(picture(), ()) == "node-1: healthy, 1 of 1 pods enrolled"


PROBLEM = Problem(file="a.yaml", line=3, column=7, field="spec.mtls", reason="unknown mode")
OF_A_FILE = Problem(file="b.yaml", line=0, column=0, field="", reason="is empty")


@pytest.mark.parametrize(
    "changes,code,word",
    [
        ({"config": ConfigReport(source="/etc/x", loaded=False)}, "config-not-loaded", "/etc/x"),
        (
            {"config": ConfigReport(source="x", loaded=True, problems=(PROBLEM,))},
            "config-refused",
            "a.yaml:3:7: spec.mtls",
        ),
        (
            {"config": ConfigReport(source="x", loaded=True, problems=(OF_A_FILE,))},
            "config-refused",
            "b.yaml: is empty",
        ),
        (
            {"config": ConfigReport(source="x", loaded=True, unresolved=(PROBLEM,))},
            "config-unresolved",
            "a.yaml:3:7: spec.mtls",
        ),
        ({"ztunnel": ZtunnelReport(connected=False)}, "ztunnel-not-connected", "not connected"),
        (
            {
                "ztunnel": ZtunnelReport(
                    connected=True,
                    own={"audit": {"file": "", "journal": "unavailable: no such file"}},
                )
            },
            "audit-sink",
            "sink journal: unavailable: no such file",
        ),
        (
            {"ztunnel": ZtunnelReport(connected=True, rejected="full")},
            "ztunnel-rejected",
            "full",
        ),
        ({"certificates": (certificate(None),)}, "certificate", "no certificate"),
        ({"certificates": (certificate(-1),)}, "certificate", "expired"),
        ({"certificates": (certificate(600, "CA down"),)}, "certificate", "10m left: CA down"),
        (
            {"pods": (pod(state=PodState.WAITING),)},
            "pod-namespace-missing",
            "a does not exist",
        ),
        (
            {"pods": (pod(state=PodState.DEGRADED, deviations=("rule 101 missing",)),)},
            "pod-degraded",
            "rule 101",
        ),
        ({"pods": (pod(state=PodState.FAILED, error="EPERM"),)}, "pod-failed", "EPERM"),
        ({"ready": False, "missing": ("something new",)}, "not-ready", "something new"),
    ],
)
def test_every_trouble_is_a_finding_with_a_remedy(
    changes: dict[str, Any], code: str, word: str
) -> None:
    (finding,) = status_view.findings(picture(**changes), NOW)
    assert finding.code == code
    assert word in finding.text
    assert finding.remedy


def unenforced(number: int) -> UnenforcedReport:
    return UnenforcedReport(
        policy=f"shop/p{number}", action="DENY", origin="a.yaml:1",
        fields=("methods", "paths"), effect="it denies more",
    )  # fmt: skip


def test_policies_that_are_not_enforced_as_written_have_a_line_each_and_no_screens() -> None:
    def lines(count: int) -> tuple[str, ...]:
        found = tuple(unenforced(number) for number in range(count))
        return status_view.unenforced_lines(
            picture(config=ConfigReport(source="x", loaded=True, unenforced=found))
        )

    assert lines(0) == ()
    assert lines(1) == ("DENY shop/p0 (a.yaml:1): without methods, paths; it denies more",)
    many = lines(status_view.MAX_UNENFORCED + 7)
    assert len(many) == status_view.MAX_UNENFORCED + 1
    assert many[-1] == "and 7 more: -o json has all of them"


def test_rows_are_short_or_wide() -> None:
    found = picture(pods=(pod(port_modes=(PortMode(port=80, mode="DISABLE", origin="x"),)),))
    columns, (row,) = status_view.pod_rows(found, NOW, UTC, wide=False)
    headings = ["WORKLOAD", "IDENTITY", "MODE", "CERT", "STATE", "AGE"]
    assert [column.heading for column in columns] == headings
    cells = ["default/a", "ns/default/sa/a", "STRICT*", "50m", "Enrolled", "3m"]
    assert [cell.text for cell in row] == cells
    zone = timezone(timedelta(hours=1))
    columns, (row,) = status_view.pod_rows(found, NOW, zone, wide=True)
    assert row[1].text == ID
    at = [column.heading for column in columns].index("CERT-UNTIL")
    assert row[at].text == "2026-01-02T04:54:05+01:00"


def test_wide_rows_count_the_policies_that_are_asked() -> None:
    policies = tuple(
        AuthorizationReport(
            policy=f"AuthorizationPolicy/a/{i}", action=action, origin="", dry_run=dry
        )
        for i, (action, dry) in enumerate(
            [("DENY", False), ("ALLOW", False), ("ALLOW", True), ("ALLOW", False)]
        )
    )
    found = picture(pods=(pod(authorizations=policies), pod(workload="default/b")))
    columns, (first, second) = status_view.pod_rows(found, NOW, UTC, wide=True)
    at = [column.heading for column in columns].index("AUTHORIZATION")
    assert first[at].text == "1 DENY, 2 ALLOW, 1 ALLOW (dry run)"
    assert second[at].text == ""


# --- the command against a real socket -----------------------------------------------------------


def test_recording_that_does_not_work_is_a_finding_and_one_that_is_off_is_none() -> None:
    assert status_view.findings(picture(recording=None), NOW) == ()
    fine = RecordingReport(recorded=10, lost=0, bytes=4096)
    assert status_view.findings(picture(recording=fine), NOW) == ()
    failing = msgspec.structs.replace(fine, problem="/x/flows.db: no room")
    (found,) = status_view.findings(picture(recording=failing), NOW)
    assert found.code == "flows-not-recorded"
    assert "traffic goes on" in found.text
    assert "/x/flows.db: no room" in found.text


def invoke(tmp_path: Path, answer: Status, *arguments: str) -> Result:
    return beside(tmp_path, Answers(status=answer), "status", *arguments)


def living(**changes: Any) -> Status:  # noqa: ANN401 - its fields
    until = datetime.now(UTC) + timedelta(hours=1)
    fresh = CertificateReport(identity=ID, not_after=until)
    return picture(certificates=(fresh,), pods=(pod(certificate=fresh),), **changes)


@pytest.mark.parametrize("form", ["table", "wide", "json", "yaml"])
def test_exit_codes_do_not_depend_on_the_form(tmp_path: Path, form: str) -> None:
    result = invoke(tmp_path, living(), "-o", form)
    assert result.exit_code == ExitCode.FINE, result.output
    (tmp_path / "admin.sock").unlink(missing_ok=True)
    sick = living(ready=False, missing=("x",), ztunnel=ZtunnelReport(connected=False))
    result = invoke(tmp_path, sick, "-o", form)
    assert result.exit_code == ExitCode.FINDING, result.output
    assert "ztunnel-not-connected" in result.stdout


def test_what_is_not_encrypted_by_choice_is_said_and_is_no_finding(tmp_path: Path) -> None:
    result = invoke(tmp_path, living(same_node="direct"))
    assert result.exit_code == ExitCode.FINE
    assert "same node, direct: not encrypted" in result.stdout
    (tmp_path / "admin.sock").unlink(missing_ok=True)
    assert "not encrypted" not in invoke(tmp_path, living()).stdout


def test_what_an_upgrade_has_replaced_is_shown_and_is_no_finding(tmp_path: Path) -> None:
    since = datetime.now(UTC) - timedelta(minutes=12)
    drains = (
        DrainReport(pid=1, since=since, connections=3, cut=2),
        DrainReport(pid=2, since=since, connections=1),
        DrainReport(pid=3, since=since),
    )
    found = living(ztunnel=ZtunnelReport(connected=True, draining=drains))
    result = invoke(tmp_path, found)
    assert result.exit_code == ExitCode.FINE, result.output
    assert "ztunnel 1 drains for 12m: 3 connections left, 2 cut at the deadline" in result.stdout
    assert "ztunnel 2 drains for 12m: 1 connection left\n" in result.stdout
    assert "ztunnel 3 drains for 12m: has not said what it carries" in result.stdout


def test_table_fits_eighty_columns(tmp_path: Path) -> None:
    result = invoke(tmp_path, living())
    assert "node-1: healthy" in result.stdout
    assert "\x1b" not in result.stdout
    assert max(len(line) for line in result.stdout.splitlines()) <= 80


@pytest.mark.parametrize("form", ["json", "yaml"])
def test_documents_are_one_and_carry_the_schema(tmp_path: Path, form: str) -> None:
    result = invoke(tmp_path, living(), "-o", form)
    document = (json.loads if form == "json" else yaml.safe_load)(result.stdout)
    assert document["schema"] == SCHEMA
    assert document["findings"] == []
    assert document["pods"][0]["workload"] == "default/a"


def test_unreachable_daemon_has_cause_and_remedy(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["status", "--run-dir", str(tmp_path)])
    assert result.exit_code == ExitCode.UNREACHABLE
    assert "does not run here" in result.stderr
    assert "systemctl start" in result.stderr
    assert result.stdout == ""
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(tmp_path / "admin.sock"))
    stale.close()
    result = CliRunner().invoke(cli, ["status", "--run-dir", str(tmp_path)])
    assert result.exit_code == ExitCode.UNREACHABLE
    assert "stopped without cleaning up" in result.stderr


def test_other_schema_is_not_misread(tmp_path: Path) -> None:
    result = invoke(tmp_path, living(schema=SCHEMA + 1))
    assert result.exit_code == ExitCode.UNREACHABLE
    assert "own release" in result.stderr


def test_wrong_usage() -> None:
    result = CliRunner().invoke(cli, ["status", "--run-dir", "/x", "--settings", "/y"])
    assert result.exit_code == ExitCode.USAGE
