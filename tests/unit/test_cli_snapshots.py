"""What every command says, to people and to programs, word for word.

The inputs are fixed: what a node of a lab once answered (tests/snapshots/cli/answers), its files
and logs, a moment and a time zone. `make snapshots` writes what the commands say now; look at the
difference before it is committed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import click
import pytest
import yaml
from click.testing import CliRunner, Result

from nodeagent.cli import cli, clock
from support.recorded import answering
from ztunnel.daemon import command as ztunnel

SNAPSHOTS = Path(__file__).parents[1] / "snapshots" / "cli"
UPDATE = bool(os.environ.get("UPDATE_SNAPSHOTS"))

NOW = datetime(2026, 11, 21, 23, 11, 40, tzinfo=UTC)
"""Shortly after the answers were recorded."""

COLUMNS = 80

AGENT = "--run-dir ."
"""The socket of the recorded agent is in the working directory."""

FORMS = {
    "table": ".txt",
    "text": ".txt",
    "wide": ".wide.txt",
    "json": ".json",
    "yaml": ".yaml",
    "dot": ".dot",
}


def commands(
    command: click.Command, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Yield every command with its path, groups included."""
    yield path, command
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            below = command.get_command(context, name)
            assert below is not None
            yield from commands(below, (*path, name))


LEAVES = {
    " ".join(path): command
    for path, command in commands(cli)
    if not isinstance(command, click.Group)
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The node's files, in a working directory, at a fixed time."""
    shutil.copytree(SNAPSHOTS / "mesh.d", tmp_path / "mesh.d")
    shutil.copytree(SNAPSHOTS / "logs", tmp_path / "logs")
    shutil.copy(SNAPSHOTS / "nodeagent.yaml", tmp_path)
    (tmp_path / "new.d").mkdir()
    for file in (tmp_path / "mesh.d").iterdir():
        text = file.read_text().replace("STRICT", "DISABLE").replace("sa/web-api", "sa/nobody")
        (tmp_path / "new.d" / file.name).write_text(text)
    (tmp_path / "bad.yaml").write_text(BAD)
    (tmp_path / "table.yaml").write_text(TABLE)
    (tmp_path / "failing.yaml").write_text(TABLE.replace("allow", "deny"))
    (tmp_path / "settings.yaml").write_text(
        "node: node-2\nconfig_dir: /nowhere\nlimits: {dials: x}"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    monkeypatch.setattr(clock, "now", lambda: NOW)
    for name in ("NO_COLOR", "CLICOLOR", "CLICOLOR_FORCE", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    yield tmp_path
    monkeypatch.undo()
    time.tzset()


BAD = """\
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: typo, namespace: shop}
spec: {mtls: {mode: STRIKT}}
"""

TABLE = """\
tests:
- name: the web application may ask for recommendations
  from: istioinaction/web-api
  to: istioinaction/recommendation:8080
  expect: allow
"""


def said(arguments: str) -> Result:
    return CliRunner().invoke(cli, arguments.split(), prog_name="nodeagent", terminal_width=COLUMNS)


def compare(name: str, text: str) -> None:
    file = SNAPSHOTS / "said" / name
    if UPDATE:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    assert file.exists(), f"no snapshot {name}: make snapshots"
    assert text == file.read_text(), f"{name} differs; if it is meant: make snapshots"


# --- help ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [path for path, _ in commands(cli)], ids=" ".join)
def test_help(path: tuple[str, ...]) -> None:
    result = said(" ".join([*path, "--help"]))
    assert result.exit_code == 0
    compare(f"help/{'-'.join(['nodeagent', *path])}.txt", result.stdout)


def test_help_of_ztunnel() -> None:
    result = CliRunner().invoke(ztunnel, ["--help"], prog_name="ztunnel", terminal_width=COLUMNS)
    compare("help/ztunnel.txt", result.stdout)


# --- answers ------------------------------------------------------------------------------------

QUESTIONS: dict[str, tuple[str, str, str]] = {
    # name: what the agent answers, the command, its forms
    "status": ("fine", f"status {AGENT}", "table wide json yaml"),
    "status-trouble": ("trouble", f"status {AGENT}", "table wide json yaml"),
    "workloads": ("fine", f"workloads {AGENT}", "table wide json yaml"),
    "workloads-trouble": ("trouble", f"workloads {AGENT} shop/ a/b", "table wide json yaml"),
    "certs": ("fine", f"certs {AGENT}", "table wide json yaml"),
    "certs-of-one": ("fine", f"certs {AGENT} default/httpbin a/b", "table wide json yaml"),
    "config": ("fine", f"config {AGENT}", "table wide json yaml"),
    "config-trouble": ("trouble", f"config show {AGENT}", "table wide json yaml"),
    "config-diff": ("fine", f"config diff {AGENT}", "text json yaml"),
    "config-diff-other": ("fine", f"config diff {AGENT} new.d bad.yaml", "text json yaml"),
    "config-check": ("fine", "config check settings.yaml", "text json yaml"),
    "connections": ("fine", f"connections {AGENT} --interval 0", "table wide json yaml"),
    "graph": ("fine", f"graph {AGENT}", "table wide json yaml dot"),
    "report-plaintext": ("fine", f"report plaintext {AGENT}", "table wide json yaml"),
    "report-plaintext-trouble": ("trouble", f"report plaintext {AGENT}", "table wide json yaml"),
    "report-asdex": ("fine", f"report asdex {AGENT}", "table wide json yaml"),
    "logs": ("fine", "logs --file logs/access.json --file logs/audit.json", "text json yaml"),
    "logs-refused": ("fine", "logs --file logs/access.json --refused", "text json yaml"),
    "policy-check": ("fine", "policy check mesh.d bad.yaml", "text json yaml"),
    "policy-explain": (
        "fine",
        f"policy explain {AGENT} istioinaction/sleep istioinaction/recommendation:8080",
        "text json yaml",
    ),
    "policy-diff": ("fine", f"policy diff {AGENT} --running --flows new.d", "text json yaml"),
    "policy-test": ("fine", f"policy test {AGENT} failing.yaml", "text json yaml"),
}

CASES = [(name, form) for name, (_, _, forms) in QUESTIONS.items() for form in forms.split()]


@pytest.mark.parametrize("name,form", CASES)
def test_answer(place: Path, name: str, form: str) -> None:
    answers, command, _ = QUESTIONS[name]
    with answering(place, SNAPSHOTS / "answers" / answers):
        result = said(f"{command} -o {form}")
    text = result.stdout
    if form in {"table", "text"} and not name.startswith("logs"):
        # Only what is never folded in a pipe may be longer.
        tables = [line for line in text.splitlines() if "  " in line.strip()]
        assert [line for line in tables if len(line) > COLUMNS] == []
    if form == "json" and not name.startswith("logs"):
        assert isinstance(json.loads(text)["schema"], int)
    if form == "json" and name.startswith("logs"):
        assert all(json.loads(line)["schema"] == 1 for line in text.splitlines())
    if form == "yaml":
        assert all(each["schema"] for each in yaml.safe_load_all(text))
    assert "\x1b" not in text
    stderr = "".join(f"stderr: {line}\n" for line in result.stderr.splitlines())
    compare(f"{name}{FORMS[form]}", f"{text}{stderr}exit code: {result.exit_code}\n")


@pytest.mark.parametrize(
    "later,word", [(timedelta(minutes=50), "near-expiry"), (timedelta(days=100), "expired")]
)
def test_certificates_later(
    place: Path, monkeypatch: pytest.MonkeyPatch, later: timedelta, word: str
) -> None:
    monkeypatch.setattr(clock, "now", lambda: NOW + later)
    with answering(place, SNAPSHOTS / "answers" / "fine"):
        result = said(f"certs {AGENT}")
    compare(f"certs-{word}.txt", result.stdout)
    assert result.exit_code == 1
    assert word in result.stdout


# --- exit codes ---------------------------------------------------------------------------------

PROVOKED: dict[str, dict[int, tuple[str, str]]] = {
    # command: exit code: what the agent answers (nothing: there is none), the arguments
    "status": {0: ("fine", AGENT), 1: ("trouble", AGENT), 2: ("fine", "--settings x --run-dir y")},
    "workloads": {0: ("fine", AGENT), 1: ("trouble", AGENT), 2: ("fine", f"{AGENT} --unknown")},
    "certs": {0: ("fine", AGENT), 1: ("fine", f"{AGENT} a/b"), 2: ("fine", f"{AGENT} --every x")},
    "config show": {0: ("fine", AGENT), 1: ("trouble", AGENT), 2: ("fine", f"{AGENT} more")},
    "config diff": {
        0: ("fine", AGENT),
        1: ("fine", f"{AGENT} new.d"),
        2: ("fine", f"{AGENT} nowhere"),
    },
    "connections": {
        0: ("fine", f"{AGENT} --interval 0"),
        2: ("fine", f"{AGENT} --limit x"),
        3: ("", f"{AGENT} --interval 0"),
    },
    "graph": {
        0: ("fine", AGENT),
        1: ("fine", f"{AGENT} --fail-on refused"),
        2: ("fine", f"{AGENT} --padlock open"),
    },
    "report plaintext": {
        0: ("fine", f"{AGENT} -n default"),
        1: ("trouble", AGENT),
        2: ("fine", f"{AGENT} a/b"),
    },
    "report asdex": {
        0: ("fine", AGENT),
        1: ("fine", f"{AGENT} --least 1"),
        2: ("fine", f"{AGENT} -n nowhere"),
    },
    "config check": {0: ("", "good.yaml"), 1: ("", "settings.yaml"), 2: ("", "nowhere.yaml")},
    "logs": {
        0: ("", "--file logs/access.json"),
        1: ("", "--file logs/access.json --workload nobody"),
        2: ("", "--file nowhere"),
        3: ("", AGENT),
    },
    "policy check": {0: ("", "mesh.d"), 1: ("", "bad.yaml"), 2: ("", "nowhere.yaml")},
    "policy explain": {
        0: ("fine", f"{AGENT} istioinaction/web-api istioinaction/recommendation:8080"),
        1: ("fine", f"{AGENT} istioinaction/sleep istioinaction/recommendation:8080"),
        2: ("fine", f"{AGENT} a/b c/d:1"),
        3: ("", f"{AGENT} a/b c/d:1"),
    },
    "policy diff": {
        0: ("fine", f"{AGENT} --running mesh.d"),
        1: ("fine", f"{AGENT} --running new.d"),
        2: ("fine", f"{AGENT} --running nowhere"),
        3: ("", f"{AGENT} --running mesh.d"),
    },
    "policy test": {
        0: ("fine", f"{AGENT} table.yaml"),
        1: ("fine", f"{AGENT} failing.yaml"),
        2: ("fine", f"{AGENT} bad.yaml"),
        3: ("", f"{AGENT} table.yaml"),
    },
}

ASKS_NOBODY = {"config check", "policy check"}
"""Without an agent: there is no 3."""

FINDS_NOTHING = {"connections"}
"""However many there are, it is no finding: there is no 1."""

ELSEWHERE = {
    "completion": "asks nobody: tests/unit/test_cli_completion.py",
    "doctor": "looks at the machine: tests/netns/test_doctor.py",
    "run": "a daemon, and no answer: tests/netns/test_agent_daemon.py",
    "trace": "looks at the kernel: tests/netns/test_trace.py",
    "uninstall": "changes the node: tests/netns/test_agent_daemon.py",
    **{
        name: "builds nodes, and asks no agent: tests/unit/test_lab_cli.py, tests/netns/test_lab_*"
        for name in LEAVES
        if name.startswith("lab ")
    },
}


def test_the_exit_codes_of_every_command_are_provoked() -> None:
    assert PROVOKED.keys() | ELSEWHERE.keys() == LEAVES.keys()


def forms_of(name: str) -> list[str]:
    for option in LEAVES[name].params:
        if option.name == "output" and isinstance(option.type, click.Choice):
            return list(option.type.choices)
    raise AssertionError(f"{name} has no -o")


def provocations() -> Iterator[tuple[str, int, str]]:
    for name, codes in PROVOKED.items():
        expected = {0, 1, 2, 3}
        expected -= {3} if name in ASKS_NOBODY else set()
        expected -= {1} if name in FINDS_NOTHING else set()
        for code in sorted(expected):
            assert code == 3 or code in codes, f"{name}: {code} is not provoked"
            for form in forms_of(name):
                yield name, code, form


@pytest.mark.parametrize("name,code,form", list(provocations()))
def test_the_exit_code_is_the_same_in_every_form(
    place: Path, name: str, code: int, form: str
) -> None:
    (place / "good.yaml").write_text("node: node-2\nconfig_dir: " + str(place / "mesh.d"))
    answers, arguments = PROVOKED[name].get(code, ("", AGENT))
    command = f"{name} {arguments} -o {form}"
    if answers:
        with answering(place, SNAPSHOTS / "answers" / answers):
            result = said(command)
    else:
        result = said(command)
    assert result.exit_code == code, result.output
    if code in {2, 3}:
        # No answer, and why is said where nobody takes it for one.
        assert result.stdout == ""
        assert result.stderr


def test_a_node_whose_mesh_is_still_to_be_written_has_no_fault(place: Path) -> None:
    empty = place / "empty.d"
    empty.mkdir()
    (place / "fresh.yaml").write_text(f"config_dir: {empty}")
    result = said("config check fresh.yaml")
    assert result.exit_code == 0, result.output
    assert f"{empty}: 0 documents would be in force; 0 errors" in result.stdout
    answers = place / "answers"
    shutil.copytree(SNAPSHOTS / "answers" / "fine", answers)
    in_force = json.loads((answers / "configuration.json").read_text())
    in_force["source"] = str(empty)
    (answers / "configuration.json").write_text(json.dumps(in_force))
    with answering(place, answers):
        result = said(f"config diff {AGENT}")
        assert "in force, not written" in result.stdout
        # A directory that somebody names, and that is empty, is the wrong one.
        assert said(f"config diff {AGENT} {empty}").exit_code == 2
    assert said(f"policy check {empty}").exit_code == 2


# --- the documentation ----------------------------------------------------------------------------

SPOKEN = re.compile(r"`nodeagent ([a-z]+(?: [a-z]+)?)")


def test_the_table_of_questions_has_every_command_that_answers_one() -> None:
    text = (Path(__file__).parents[2] / "docs" / "cli.md").read_text()
    table = text.split("## Which command answers what")[1].split("\n## ")[0]
    named = set(SPOKEN.findall(table)) | {each.split()[0] for each in SPOKEN.findall(table)}
    answers = {name for name in LEAVES if name not in {"run", "uninstall", "completion"}}
    assert {name for name in answers - named if not name.startswith("lab ")} == {"config show"}
    groups = {name.split()[0] for name in LEAVES}
    assert {name for name in named if name not in LEAVES and name not in groups} == set()
