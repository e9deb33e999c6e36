"""The command line without a lab: help, usage errors, exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from nodeagent.cli import LazyGroup, cli
from nodeagent.lab import LabSpec, Node, Pod
from nodeagent.lab import plan as planning
from nodeagent.lab.processes import ProcessRecord
from nodeagent.lab.store import State, Store

COMMANDS = ["demo", "down", "enrol", "exec", "exercise", "logs", "status", "up"]


def invoke(base: Path, *arguments: str) -> Result:
    return CliRunner().invoke(cli, ["lab", "--base", str(base), *arguments])


def record(base: Path, name: str, **processes: ProcessRecord) -> None:
    spec = LabSpec(name=name, nodes=(Node(name="one"),), pods=(Pod(name="client", node="one"),))
    made = State(plan=planning.make(spec), created=0.0, daemons=False, complete=True)
    made.processes.update(processes)
    Store(base, name).create(made)


def test_the_group_knows_its_commands_without_loading_them() -> None:
    assert isinstance(cli, LazyGroup)
    assert {"lab", "run", "status"} <= set(cli.list_commands(click.Context(cli)))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(tmp_path: Path, command: str) -> None:
    result = invoke(tmp_path, command, "--help")
    assert result.exit_code == 0
    assert len(result.stdout.splitlines()) > 5


def test_the_help_of_lab_names_its_commands(tmp_path: Path) -> None:
    result = invoke(tmp_path, "-h")
    assert result.exit_code == 0
    assert all(f"\n  {command} " in result.stdout for command in COMMANDS)


@pytest.mark.parametrize(
    "arguments,code,said",
    [
        (["up", "/nowhere/lab.yaml"], 2, "sentences"),
        (["up"], 2, "FILE|NAME"),
        (["exec", "client"], 2, "COMMAND"),
        (["exec", "client", "--", "true"], 1, "no lab is up"),
        (["exec", "--lab", "x", "client", "--", "true"], 1, "there is no lab x"),
        (["exercise"], 2, "NAME"),
        (["exercise", "nothing"], 2, "known: istioinaction, sentences"),
        (["down", "--all", "x"], 2, "not both"),
        (["down", "../x"], 1, "no name"),
        (["status", "x"], 1, "there is no lab x"),
        (["logs", "node-1", "kernel"], 2, "access"),
    ],
)
def test_mistakes_are_said_on_standard_error(
    tmp_path: Path, arguments: list[str], code: int, said: str
) -> None:
    result = invoke(tmp_path, *arguments)
    assert result.exit_code == code
    assert said in result.stderr
    assert result.stdout == ""


def test_a_bad_lab_file_is_a_usage_error_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "lab.yaml"
    path.write_text("name: x\nnodes: [{name: one, colour: red}]\n")
    result = invoke(tmp_path, "up", str(path))
    assert result.exit_code == 2
    assert f"{path}:2:21: nodes[0].colour" in result.stderr


def test_no_labs_is_an_answer(tmp_path: Path) -> None:
    result = invoke(tmp_path / "none", "status", "-o", "json")
    assert (result.exit_code, json.loads(result.stdout)) == (0, {"schema": 1, "labs": []})
    assert invoke(tmp_path / "none", "down").exit_code == 0
    assert invoke(tmp_path / "none", "down", "--all").exit_code == 0


def test_several_labs_must_be_told_apart(tmp_path: Path) -> None:
    base = tmp_path / "labs"
    record(base, "a")
    record(base, "b")
    for arguments in (["down"], ["exec", "client", "--", "true"], ["logs", "one"]):
        result = invoke(base, *arguments)
        assert result.exit_code == 2
        assert "a, b" in result.stderr


def test_an_unknown_pod_is_answered_with_the_pods(tmp_path: Path) -> None:
    base = tmp_path / "labs"
    record(base, "a")
    result = invoke(base, "exec", "web", "--", "true")
    assert result.exit_code == 2
    assert "default/client" in result.stderr


def test_status_in_both_forms(tmp_path: Path) -> None:
    base = tmp_path / "labs"
    record(base, "a")
    text = invoke(base, "status")
    assert text.exit_code == 0
    assert "default/client" in text.stdout
    (found,) = json.loads(invoke(base, "status", "-o", "json").stdout)["labs"]
    assert found["good"] is True
    assert found["pods"][0]["mesh"] == "enrolled"
