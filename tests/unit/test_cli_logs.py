"""`nodeagent logs`: lines of both logs in both forms, filters, files, the journal, following."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from nodeagent.cli import cli
from nodeagent.cli.log_lines import ENDS, REFUSALS, Log, read, sentence
from support import audit_lines
from support.recorded import answering
from ztunnel.audit import forms
from ztunnel.audit.entry import Event
from ztunnel.observe.access_log import certificate, json_line, text_line
from ztunnel.reasons import RESPONSE_FLAGS, Reason

ANSWERS = Path(__file__).parents[1] / "snapshots" / "cli" / "answers" / "fine"
SECONDS = 60

HOSTILE = 'a "b" \\ x="1" \x1b[2J\n audit_flag: "true"'


def fields(line: str, log: Log) -> dict[str, Any]:
    found = read(line)
    assert found is not None
    assert found.log is log
    return {"time": found.time, **found.fields}


# --- lines, as the product spells them ------------------------------------------------------------


@pytest.mark.parametrize("reason", list(Reason))
@pytest.mark.parametrize("principal", ["", "spiffe://cluster.local/ns/a/sa/b"])
def test_an_access_line_is_the_same_in_both_forms(reason: Reason, principal: str) -> None:
    line = audit_lines.line(principal, reason=reason, error=HOSTILE, policy='p "q" (f.yaml:1)')
    text, jsoned = fields(text_line(line), Log.ACCESS), fields(json_line(line), Log.ACCESS)
    # Of both: text has neither level nor scope, and bytes are numbers in either.
    for key in jsoned.keys() - {"level", "scope"}:
        assert text[key] == jsoned[key], key
    found = read(json_line(line))
    assert found is not None
    assert found.failed == (RESPONSE_FLAGS[reason] != "-" or reason.value not in ENDS)


@pytest.mark.parametrize("subject", ["", "CN=a", 'CN=a"b', r"CN=a\,b", 'CN=x";URI=spiffe://evil/x'])
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"opened": True},
        {"direction": "outbound"},
        {"handshake": True},
        {"audit_rules": HOSTILE},
    ],
)
def test_a_line_with_a_certificate_is_the_same_in_both_forms(
    subject: str, more: dict[str, Any]
) -> None:
    shown = certificate("spiffe://a/b", "0" * 64, subject, "spiffe://a/c")
    line = audit_lines.line(cert=shown, **more)
    text, jsoned = fields(text_line(line), Log.ACCESS), fields(json_line(line), Log.ACCESS)
    assert jsoned["cert"] == shown
    of_json = {"level", "scope"}
    assert text == {key: value for key, value in jsoned.items() if key not in of_json}


def test_both_sides_of_a_connection_within_a_node_are_told_apart() -> None:
    read_back = [
        read(json_line(audit_lines.line(direction=each))) for each in ("outbound", "inbound")
    ]
    said = [sentence(entry, UTC) for entry in read_back if entry is not None]
    assert said[0] == said[1].replace("  inbound  ", "  outbound  ") != said[1]


def test_every_refusal_is_a_reason() -> None:
    known = {reason.value for reason in Reason}
    assert known >= REFUSALS
    assert known >= ENDS - {"", "-"}


AUDITED = [
    audit_lines.entry(),
    audit_lines.entry(audit_lines.REFUSED),
    audit_lines.entry(audit_lines.REFUSED, "", error=HOSTILE),
    audit_lines.entry(event=Event.CALLER),
    forms.LeftOut(1.0, 5, "rate", "UNAUTHORIZED"),
    forms.LeftOut(1.0, 5, "sink"),
]


@pytest.mark.parametrize("line", AUDITED)
def test_an_audit_line_is_the_same_in_both_forms(line: forms.Line) -> None:
    text = fields(forms.text_line(line, "n1"), Log.AUDIT)
    jsoned = fields(forms.json_line(line, "n1"), Log.AUDIT)
    for key in jsoned.keys() - {"level", "audit_version", "lines"}:
        assert str(text[key]) == str(jsoned[key]), key
    one, other = read(forms.text_line(line, "n1")), read(forms.json_line(line, "n1"))
    assert one is not None
    assert other is not None
    assert (one.refused, one.failed) == (other.refused, other.failed)
    assert sentence(one, UTC) == sentence(other, UTC)


@pytest.mark.parametrize(
    "line",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"time": "2026-01-01T00:00:00Z", "event": "starting"}',
        '{"time": 5, "direction": "x", "src.addr": "y"}',
        '[2026-01-01T00:00:00Z] "TCP a" closed',
        "2026-01-01T00:00:00Z info starting workers=2",
        "x" * 100_000,
        '{"a":' * 2000,
    ],
)
def test_what_is_no_line_of_either_log_is_none(line: str) -> None:
    assert read(line) is None


@given(st.text())
def test_no_text_is_an_error(text: str) -> None:
    read(text)
    found = read(text_line(audit_lines.line(error=text)))
    assert found is not None
    assert found.fields.get("error", "-") == (text or "-")


@given(st.recursive(st.none() | st.booleans() | st.text() | st.integers(), st.lists))
def test_no_value_of_json_is_an_error(value: object) -> None:
    line = {"time": "2026-01-01T00:00:00Z", "direction": value, "src.addr": value, "reason": value}
    found = read(json.dumps({**line, "audit_flag": value, "duration": value, "bytes_sent": value}))
    assert found is not None
    sentence(found, UTC)


# --- the command ----------------------------------------------------------------------------------


ENDED = (Reason.CLOSED, Reason.POLICY_DENIED, Reason.CONNECT_REFUSED)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    lines = [
        audit_lines.line(start=audit_lines.TIME + number, reason=reason)
        for number, reason in enumerate(
            (Reason.CLOSED, Reason.POLICY_DENIED, Reason.CONNECT_REFUSED)
        )
    ]
    file = tmp_path / "access.log"
    file.write_text("".join(f"{text_line(each)}\n" for each in lines) + "something else\n")
    return file


def logs(*arguments: str | Path, given: str | None = None) -> Result:
    return CliRunner().invoke(cli, ["logs", *map(str, arguments)], input=given)


@pytest.mark.parametrize(
    "arguments,count",
    [
        ((), 3),
        (("--refused",), 1),
        (("--failed",), 2),
        (("--workload", "sleep"), 3),
        (("--workload", "bookstore/books"), 3),
        (("--workload", "default/books"), 0),
        (("--workload", "book"), 0),
        (("--identity", "sa/sleep"), 3),
        (("--identity", "a/sleep"), 0),
        (("--identity", "spiffe://cluster.local/ns/default/sa/sleep"), 3),
        (("--since", "2021-06-14T10:28:00Z"), 2),
        (("--log", "audit"), 0),
    ],
)
def test_filters(log: Path, arguments: tuple[str, ...], count: int) -> None:
    result = logs("--file", log, *arguments)
    assert len(result.stdout.splitlines()) == count
    assert result.exit_code == (0 if count else 1)
    assert ("no such line" in result.stderr) == (not count)


def test_standard_input_and_raw_lines(log: Path) -> None:
    result = logs("--file", "-", "-o", "raw", "--refused", given=log.read_text())
    assert result.exit_code == 0
    assert result.stdout.strip() in log.read_text().splitlines()


def test_two_logs_are_shown_in_the_order_of_time(log: Path, tmp_path: Path) -> None:
    other = tmp_path / "audit.log"
    verdict = audit_lines.REFUSED
    other.write_text(forms.text_line(audit_lines.entry(verdict), "n1") + "\n")
    result = logs("--file", other, "--file", log, "-o", "json")
    found = [json.loads(line)["log"] for line in result.stdout.splitlines()]
    assert found == ["access", "audit", "access", "access"]


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """A run directory with a recorded agent, and its answers, to be changed."""
    answers = tmp_path / "answers"
    answers.mkdir()
    for file in ANSWERS.iterdir():
        (answers / file.name).write_bytes(file.read_bytes())
    with answering(tmp_path, answers) as directory:
        yield directory, answers


def says(answers: Path, access: str, **audit: object) -> None:
    """Have the agent say where the logs go."""
    status = json.loads((answers / "status.json").read_text())
    status["ztunnel"]["own"]["access_log"] = access
    (answers / "status.json").write_text(json.dumps(status))
    settings = json.loads((answers / "settings.json").read_text())
    for each in settings["settings"]:
        kind, _, name = each["name"].partition(".")
        if kind == "audit" and name in audit:
            each["value"] = audit[name]
    (answers / "settings.json").write_text(json.dumps(settings))


@pytest.fixture
def journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: Path) -> Path:
    """A `journalctl` that says how it was called, and has the lines of `log`."""
    folder = tmp_path / "bin"
    folder.mkdir()
    program = folder / "journalctl"
    program.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/called\nexec /bin/cat {log}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    return tmp_path / "called"


def test_the_journal_is_read_where_the_log_goes_there(
    agent: tuple[Path, Path], journal: Path
) -> None:
    directory, answers = agent
    says(answers, "-")
    result = logs("--run-dir", directory, "--since", "2021-06-14T10:27:59Z", "--refused")
    assert (result.exit_code, len(result.stdout.splitlines())) == (0, 1)
    called = journal.read_text()
    assert "--unit ztunnel --output cat" in called
    assert f"--since=@{datetime(2021, 6, 14, 10, 27, 59, tzinfo=UTC).timestamp():.6f}" in called


def test_files_are_read_where_the_logs_go_there(agent: tuple[Path, Path], log: Path) -> None:
    directory, answers = agent
    says(answers, str(log), stdout=False, file=str(log))
    result = logs("--run-dir", directory, "--log", "access")
    assert (result.exit_code, len(result.stdout.splitlines())) == (0, 3)


def test_a_journal_that_is_not_there_is_said_with_what_to_do(
    agent: tuple[Path, Path], log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, answers = agent
    monkeypatch.setenv("PATH", "/nowhere")
    says(answers, "-")
    result = logs("--run-dir", directory)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "there is no journalctl here" in result.stderr
    assert "--file" in result.stderr
    # One of two is better than nothing.
    says(answers, str(log))
    result = logs("--run-dir", directory)
    assert result.exit_code == 0
    assert "note: without the audit log" in result.stderr


def test_no_audit_log_is_said(agent: tuple[Path, Path]) -> None:
    directory, answers = agent
    says(answers, "-", stdout=False, file="")
    result = logs("--run-dir", directory, "--log", "audit")
    assert result.exit_code == 2
    assert "write no audit log" in result.stderr
    says(answers, "-", stdout=False, file="/var/log/x", form="ocsf")
    assert "OCSF" in logs("--run-dir", directory, "--log", "audit").stderr


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    result = logs("--file", tmp_path / "nowhere")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "nowhere cannot be read: No such file" in result.stderr


# --- following, as a process ----------------------------------------------------------------------


@contextlib.contextmanager
def following(*files: Path) -> Iterator[subprocess.Popen[str]]:
    arguments = [word for file in files for word in ("--file", str(file))]
    command = [sys.executable, "-m", "nodeagent", "logs", "--follow", "-o", "json", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def next_reason(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return str(json.loads(process.stdout.readline())["fields"]["reason"])


def spelled(reason: Reason) -> str:
    return text_line(audit_lines.line(reason=reason)) + "\n"


@pytest.mark.timeout(4 * SECONDS)
def test_following_goes_on_over_rotation_and_truncation_and_ends_with_an_interrupt(
    tmp_path: Path,
) -> None:
    file = tmp_path / "access.log"
    file.write_text(spelled(Reason.CLOSED))
    with following(file) as process:
        assert next_reason(process) == "closed"
        with file.open("a") as stream:
            # In two pieces: a line is whole, or is not shown.
            text = spelled(Reason.POLICY_DENIED)
            stream.write(text[:40])
            stream.flush()
            time.sleep(0.5)
            stream.write(text[40:])
        assert next_reason(process) == "policy_denied"
        file.rename(tmp_path / "access.log.1")
        with (tmp_path / "access.log.1").open("a") as stream:
            # ztunnel has not reopened it yet.
            stream.write(spelled(Reason.CONNECT_REFUSED))
        assert next_reason(process) == "connect_refused"
        file.write_text(spelled(Reason.SELF_CALL))
        assert next_reason(process) == "self_call"
        os.truncate(file, 0)
        with file.open("a") as stream:
            # Shorter than what was there: that is how a truncation is told.
            stream.write(spelled(Reason.IDLE))
        assert next_reason(process) == "idle"
        process.send_signal(signal.SIGINT)
        assert process.wait(SECONDS) == 128 + signal.SIGINT
