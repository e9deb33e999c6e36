"""Whose settings the doctor goes by, and when it may not look at all."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

from nodeagent.cli import cli, doctor
from nodeagent.settings import Settings
from support.recorded import answering

ANSWERS = Path(__file__).parents[1] / "snapshots/cli/answers/fine"


@pytest.fixture(autouse=True)
def nothing_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "DEFAULT_SETTINGS", tmp_path / "none.yaml")


def test_the_daemons_own_settings_count(tmp_path: Path) -> None:
    written = Settings(run_dir=tmp_path, node="of-the-file")
    with answering(tmp_path, ANSWERS):
        found, file = doctor._in_force(written, None)
    assert found.node == "node-2"
    assert str(found.bpf_dir).endswith("/bpf/node-2")
    assert isinstance(found.ca_dir, Path)
    assert file == Path("nodeagent.yaml")


def test_a_daemon_that_does_not_say_them_goes_by_the_file(tmp_path: Path) -> None:
    answers = tmp_path / "answers"
    answers.mkdir()
    shutil.copy(ANSWERS / "status.json", answers)
    written = Settings(run_dir=tmp_path, node="of-the-file")
    with answering(tmp_path, answers):
        assert doctor._in_force(written, None) == (written, None)


def test_the_file_counts_while_the_daemon_is_away(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(f"node: here\nrun_dir: {tmp_path}\n")
    settings, used, problem = doctor._written(None, file)
    assert (settings.node, used, problem) == ("here", file, "")
    # Of another run directory's daemon it says nothing.
    other, used, problem = doctor._written(tmp_path / "other", file)
    assert (used, problem) == (None, "")
    assert other == msgspec.structs.replace(Settings(), run_dir=tmp_path / "other")
    file.write_text("nodes: here\n")
    settings, used, problem = doctor._written(None, file)
    assert (settings, used) == (Settings(), file)
    assert "nodes" in problem


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(cli, ["doctor", *arguments])
    return result.exit_code, result.stdout, result.stderr


def test_without_root_it_may_not_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    code, out, err = run("-o", "json")
    assert (code, out) == (3, "")
    assert "run this command as root" in err


def test_a_run_directory_of_nobody_is_wrong_usage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    code, out, err = run("--run-dir", str(tmp_path))
    assert (code, out) == (2, "")
    assert "name the file with --settings" in err
    assert run("--run-dir", ".", "--settings", "x")[0] == 2
