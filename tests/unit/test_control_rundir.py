"""The run directory lets nobody else in and removes nothing that is not its own."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest

from nodeagent.rundir import RunDirectory, RunDirectoryError


def test_directory_and_socket_are_private(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "run")
    listener = directory.listen("a.sock")
    assert stat.S_IMODE((tmp_path / "run").stat().st_mode) == 0o700
    assert stat.S_IMODE(listener.path.stat().st_mode) == 0o600
    assert not os.get_inheritable(listener.socket.fileno())
    listener.close()
    assert not listener.path.exists()
    directory.close()


def test_stale_socket_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "run" / "a.sock"
    path.parent.mkdir(0o700)
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(path))
    stale.close()
    directory = RunDirectory(path.parent)
    listener = directory.listen("a.sock")
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
    listener.close()
    directory.close()


def test_close_leaves_a_successors_socket(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "run")
    older = directory.listen("a.sock")
    newer = directory.listen("a.sock")
    older.close()
    assert newer.path.exists()
    newer.close()
    directory.close()


@pytest.mark.parametrize("name", ["a.sock", ".a.sock"])
@pytest.mark.parametrize("kind", ["file", "symlink"])
def test_other_files_are_refused_and_kept(tmp_path: Path, name: str, kind: str) -> None:
    directory = RunDirectory(tmp_path / "run")
    path = tmp_path / "run" / name
    target = tmp_path / "precious"
    target.write_text("x")
    if kind == "file":
        path.write_text("x")
    else:
        path.symlink_to(target)
    with pytest.raises(RunDirectoryError, match="no socket"):
        directory.listen("a.sock")
    assert path.is_symlink() or path.read_text() == "x"
    assert target.read_text() == "x"
    directory.close()


def test_open_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run").chmod(0o755)
    with pytest.raises(RunDirectoryError, match="chmod 0700"):
        RunDirectory(tmp_path / "run")


def test_symlinked_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(0o700)
    (tmp_path / "run").symlink_to(tmp_path / "real")
    with pytest.raises(RunDirectoryError, match="symbolic link"):
        RunDirectory(tmp_path / "run")


def test_second_daemon_is_refused(tmp_path: Path) -> None:
    first = RunDirectory(tmp_path / "run")
    with pytest.raises(RunDirectoryError, match="another nodeagent"):
        RunDirectory(tmp_path / "run")
    first.close()
    RunDirectory(tmp_path / "run").close()


def test_path_too_long_for_a_socket_is_named(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / ("x" * 100))
    with pytest.raises(RunDirectoryError, match="shorten"):
        directory.listen("a.sock")
    directory.close()
