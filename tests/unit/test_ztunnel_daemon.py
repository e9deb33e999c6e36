from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pytest

from support.mesh_state import SETTINGS
from ztunnel import _core, corelike, protocol
from ztunnel.channel import Channel
from ztunnel.corelike import Kind
from ztunnel.reasons import check

DEADLINE = 60
ROOT = Path(corelike.__file__).parent.parent


def test_the_core_has_the_reasons_kinds_and_methods_that_are_expected() -> None:
    check(_core.REASONS)
    for kind in Kind:
        assert getattr(_core, kind.name) == kind.value
    wanted = {name for name in vars(corelike.CoreLike) if not name.startswith("_")}
    assert {name for name in vars(_core.Core) if not name.startswith("_")} == wanted


class Process:
    """A running daemon; `log` are the JSON lines that it has written so far."""

    def __init__(self, directory: Path, *options: str, notify: str = "") -> None:
        environ = {**os.environ, "PYTHONPATH": str(ROOT), "WATCHDOG_USEC": "600000"}
        if notify:
            environ["NOTIFY_SOCKET"] = notify
        self.popen = subprocess.Popen(
            [
                *(sys.executable, "-m", "ztunnel", "--log-format", "json", "--workers", "2"),
                *("--control", str(directory / "ztunnel.sock")),
                *("--access-log", str(directory / "access.log")),
                *("--stats-address", "127.0.0.1:0", "--ready-address", "127.0.0.1:0"),
                *options,
            ],
            env=environ,
            stderr=subprocess.PIPE,
            text=True,
        )

    def next_event(self, name: str) -> dict[str, Any]:
        """Read the log until an event of that name; the test's own timeout is the deadline."""
        assert self.popen.stderr is not None
        for line in self.popen.stderr:
            event: dict[str, Any] = json.loads(line)
            if event["event"] == name:
                return event
        raise AssertionError(f"ztunnel ended without {name!r}")

    def close(self) -> None:
        if self.popen.poll() is None:
            self.popen.kill()
        self.popen.wait(DEADLINE)
        stream: IO[str] | None = self.popen.stderr
        assert stream is not None
        stream.close()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    made = tmp_path / "run"
    made.mkdir(mode=0o700)
    return made


@pytest.fixture
def manager(directory: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(str(directory / "notify"))
        listening.settimeout(DEADLINE)
        yield listening


@pytest.fixture
def process(directory: Path, manager: socket.socket) -> Iterator[Process]:
    made = Process(directory, notify=str(directory / "notify"))
    yield made
    made.close()


def get(address: str, path: str) -> tuple[int, str]:
    request = f"http://{address}{path}"
    try:
        with urllib.request.urlopen(request, timeout=DEADLINE) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


async def give_state(listening: socket.socket) -> Channel:
    """Be nodeagent until the first state is in force."""
    connected, _ = await asyncio.get_running_loop().sock_accept(listening)
    channel = Channel(connected)
    hello = (await channel.receive())[0]
    assert isinstance(hello, protocol.Hello)
    await channel.send(protocol.Welcome(protocol.PROTOCOL_VERSION, SETTINGS))
    await channel.send(protocol.Update(1, reset=True))
    assert (await channel.receive())[0] == protocol.Ack(1)
    return channel


def until(manager: socket.socket, message: str) -> list[str]:
    """Return what the service manager heard up to and with `message`."""
    heard: list[str] = []
    while message not in heard:
        heard.append(manager.recv(4096).decode())
    return heard


def test_a_life_from_start_to_end(
    process: Process, directory: Path, manager: socket.socket
) -> None:
    listening = process.next_event("listening")
    # Alive, and not ready: nobody has told it anything.
    assert "READY=1" not in until(manager, "WATCHDOG=1")
    status, body = get(listening["ready"], "/healthz/ready")
    assert status == 503
    assert "no state from nodeagent" in body
    assert get(listening["ready"], "/healthz/live")[0] == 200

    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as agent:
        agent.bind(str(directory / "ztunnel.sock"))
        agent.listen(1)
        agent.setblocking(False)
        channel = asyncio.run(give_state(agent))
        until(manager, "READY=1")
        assert get(listening["ready"], "/healthz/ready")[0] == 200
        status, text = get(listening["stats"], "/metrics")
        assert status == 200
        assert "ztunnel_control_connected 1.0" in text
        channel.close()

    # nodeagent has gone, and it serves on.
    assert get(listening["ready"], "/healthz/ready")[0] == 200

    log = directory / "access.log"
    log.rename(directory / "moved")
    process.popen.send_signal(signal.SIGHUP)
    process.popen.send_signal(signal.SIGTERM)
    assert process.popen.wait(DEADLINE) == 0
    assert log.exists()
    assert "STOPPING=1" in until(manager, "STOPPING=1")


def test_secrets_cannot_be_dumped_and_descriptors_are_many(process: Process) -> None:
    process.next_event("listening")
    limits = Path(f"/proc/{process.popen.pid}/limits").read_text(encoding="ascii")
    rows = {line[:25].strip(): line[25:].split() for line in limits.splitlines()}
    assert rows["Max core file size"][:2] == ["0", "0"]
    assert rows["Max open files"][0] == rows["Max open files"][1]
    status = Path(f"/proc/{process.popen.pid}/status").read_text(encoding="ascii")
    assert "Umask:\t0077" in status
    if os.geteuid():
        with pytest.raises(PermissionError):
            Path(f"/proc/{process.popen.pid}/environ").read_bytes()


def test_a_port_in_use_ends_the_start_with_its_reason(directory: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        process = Process(directory, "--stats-address", address)
        with contextlib.closing(process):
            assert "address already in use" in process.next_event("cannot run")["error"].lower()
            assert process.popen.wait(DEADLINE) == 1


@pytest.mark.parametrize(
    "option, value",
    [("--workers", "0"), ("--stats-address", "nowhere"), ("--log-format", "xml")],
)
def test_wrong_options_are_refused(directory: Path, option: str, value: str) -> None:
    process = Process(directory, option, value)
    with contextlib.closing(process):
        assert process.popen.wait(DEADLINE) == 2
