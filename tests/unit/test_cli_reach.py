"""What commands make of an agent that answers wrongly, slowly or not at all; and of wrong names."""

from __future__ import annotations

import contextlib
import os
import pty
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from nodeagent.cli import cli, reach
from nodeagent.cli.ending import ExitCode

SECONDS = 60


@contextlib.contextmanager
def agent(directory: Path, answer: Callable[[socket.socket], None]) -> Iterator[None]:
    """An agent that answers each request by `answer`, and hangs up."""
    ours = socket.socket(socket.AF_UNIX)
    ours.bind(str(directory / "admin.sock"))
    ours.listen()

    def serve() -> None:
        while True:
            try:
                connection, _ = ours.accept()
            except OSError:
                return
            # The command may have had enough before all is sent.
            with connection, contextlib.suppress(OSError):
                connection.recv(65536)
                answer(connection)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield
    finally:
        ours.shutdown(socket.SHUT_RDWR)
        thread.join()
        ours.close()


def page(body: bytes, status: str = "200 OK", length: int | None = None) -> bytes:
    size = len(body) if length is None else length
    return f"HTTP/1.1 {status}\r\nContent-Length: {size}\r\n\r\n".encode() + body


DEEP = b'{"schema":1,"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"

ANSWERS = {
    "nothing": (b"", "closed connection without response"),
    "no HTTP": (b"\x1b]0;yours\x07no\r\n\r\n", r"\x1b]0;yours\x07no"),
    "no JSON": (page(b'{"schema": 1, "x": "\x1b'), "is not understood"),
    "too deep": (page(DEEP), "is not understood"),
    "another document": (page(b"[]"), "is not understood"),
    "another release": (page(b'{"schema": 99}'), "the daemon speaks status schema 99"),
    "no such page": (page(b"", "404 Not Found"), "nodeagent knows no /status"),
    "its own error": (page(b"\x1b[2J\x1b]0;a\x07", "500 No"), r"500: \x1b[2J\x1b]0;a\x07"),
    "cut off": (page(b"{}", length=100), "ended 98 bytes too early"),
}


@pytest.mark.parametrize("form", ["table", "json"])
@pytest.mark.parametrize("name", ANSWERS)
def test_a_wrong_answer_is_no_answer_and_steers_no_terminal(
    tmp_path: Path, name: str, form: str
) -> None:
    said, complaint = ANSWERS[name]
    with agent(tmp_path, lambda connection: connection.sendall(said)):
        result = invoke("status", "--run-dir", str(tmp_path), "-o", form)
    assert (result.exit_code, result.stdout) == (ExitCode.UNREACHABLE, "")
    assert complaint in result.stderr
    assert "\n  do: " in result.stderr
    assert result.stderr.replace("\n", "").isprintable()


def test_an_answer_without_end_has_one(tmp_path: Path) -> None:
    def endless(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            connection.sendall(b" " * 65536)

    with agent(tmp_path, endless):
        result = invoke("status", "--run-dir", str(tmp_path))
    assert result.exit_code == ExitCode.UNREACHABLE
    assert "has more than" in result.stderr


def test_an_agent_is_not_waited_for_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reach, "SILENCE_SECONDS", 5.0)
    monkeypatch.setattr(reach, "WHOLE_SECONDS", 0.5)
    gone = threading.Event()

    def drip(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
        while not gone.wait(0.05):
            connection.sendall(b" ")

    with agent(tmp_path, drip):
        result = invoke("status", "--run-dir", str(tmp_path))
        gone.set()
    assert result.exit_code == ExitCode.UNREACHABLE
    assert "did not answer within 5 s, or not to the end within 0.5 s" in result.stderr


WITHOUT_ROOTS_KEYS = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]
"""Root is let in everywhere by these two capabilities."""


@pytest.mark.parametrize(
    "arguments,code,complaint",
    [
        ("status --run-dir RUN", 3, "run this command as root"),
        ("status -o json --run-dir RUN", 3, "run this command as root"),
        ("logs --run-dir RUN", 3, "run this command as root"),
        ("lab --base RUN status", 1, "labs are root's"),
        ("lab --base RUN status x", 1, "labs are root's"),
    ],
)
def test_who_may_not_look_is_told_to_be_root(
    tmp_path: Path, arguments: str, code: int, complaint: str
) -> None:
    private = tmp_path / "run"
    private.mkdir(0o000)
    words = arguments.replace("RUN", str(private)).split()
    command = [sys.executable, "-m", "nodeagent", *words]
    done = subprocess.run(
        [*WITHOUT_ROOTS_KEYS, *command] if os.geteuid() == 0 else command,
        capture_output=True,
        text=True,
        check=False,
        timeout=SECONDS,
    )
    assert (done.returncode, done.stdout) == (code, "")
    assert complaint in done.stderr


@pytest.mark.parametrize(
    "words,meant",
    [(["statsu"], "status"), (["policy", "explian"], "explain"), (["lab", "stauts"], "status")],
)
def test_a_command_that_is_not_there_is_answered_by_the_nearest(
    words: list[str], meant: str
) -> None:
    result = invoke(*words)
    assert result.exit_code == ExitCode.USAGE
    assert f"Did you mean '{meant}'?" in result.stderr


def test_names_in_errors_do_not_steer_a_terminal(tmp_path: Path) -> None:
    bad = tmp_path / "bad\x1b[2J.yaml"
    bad.write_text("nodes: []\n")
    for words in (
        ["lab", "up", str(bad)],
        ["status", "--settings", f"{bad}\x1b"],
        ["logs", "--file", str(bad)],
        ["policy", "explain", "a/b", "c/d:80", str(bad)],
        ["policy", "test", str(bad)],
    ):
        ours, theirs = pty.openpty()
        # On a terminal: elsewhere click removes some of them by itself.
        with subprocess.Popen(
            [sys.executable, "-m", "nodeagent", *words], stdout=theirs, stderr=theirs
        ) as process:
            os.close(theirs)
            said = b""
            # EIO: the other side is closed.
            with contextlib.suppress(OSError):
                while some := os.read(ours, 65536):
                    said += some
            assert process.wait(SECONDS) > 0
        os.close(ours)
        assert b"\x1b" not in said
        assert rb"\x1b[2J.yaml" in said


def invoke(*words: str) -> Result:
    return CliRunner().invoke(cli, words, prog_name="nodeagent")
