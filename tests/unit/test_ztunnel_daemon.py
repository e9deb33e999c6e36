from __future__ import annotations

import asyncio
import contextlib
import json
import os
import queue
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import msgspec
import pytest

from support.mesh_state import SETTINGS
from support.netns import wait_until
from ztunnel import _core, corelike, protocol, successor
from ztunnel.channel import Channel
from ztunnel.corelike import Kind
from ztunnel.observe import access_log
from ztunnel.reasons import check

DEADLINE = 60
ROOT = Path(corelike.__file__).parent.parent


def test_the_core_has_the_reasons_kinds_and_methods_that_are_expected() -> None:
    check(_core.REASONS)
    for kind in Kind:
        assert getattr(_core, kind.name) == kind.value
    assert _core.LINE_FIELDS == access_log.FIELDS
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


class Manager:
    """A service manager that reads what it is told, as the real one does, and keeps it."""

    def __init__(self, path: Path) -> None:
        self._heard: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._thread = threading.Thread(target=self._read, name="manager")
        self._thread.start()

    def _read(self) -> None:
        while message := self._socket.recv(4096).decode():
            self._heard.put(message)

    def until(self, message: str) -> list[str]:
        """Return what was heard since the last time, up to and with `message`."""
        heard: list[str] = []
        end = time.monotonic() + DEADLINE
        while message not in heard:
            try:
                heard.append(self._heard.get(timeout=max(0, end - time.monotonic())))
            except queue.Empty:
                raise AssertionError(f"{message!r} was not told, but {heard}") from None
        return heard

    def close(self) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as last:
            last.connect(self._socket.getsockname())
            last.send(b"")
        self._thread.join(DEADLINE)
        self._socket.close()


@pytest.fixture
def manager(directory: Path) -> Iterator[Manager]:
    with contextlib.closing(Manager(directory / "notify")) as made:
        yield made


@pytest.fixture
def process(directory: Path, manager: Manager) -> Iterator[Process]:
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


@contextlib.contextmanager
def agent_socket(directory: Path) -> Iterator[socket.socket]:
    """Listen as nodeagent would."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as agent:
        agent.bind(str(directory / "ztunnel.sock"))
        agent.listen(4)
        agent.setblocking(False)
        yield agent


async def greeted(
    listening: socket.socket, settings: protocol.Settings = SETTINGS
) -> tuple[Channel, protocol.Hello]:
    connected, _ = await asyncio.get_running_loop().sock_accept(listening)
    channel = Channel(connected)
    hello = (await channel.receive())[0]
    assert isinstance(hello, protocol.Hello)
    await channel.send(protocol.Welcome(protocol.PROTOCOL_VERSION, settings))
    return channel, hello


async def in_force(channel: Channel) -> None:
    await channel.send(protocol.Update(1, reset=True))
    assert (await channel.receive())[0] == protocol.Ack(1)


async def give_state(listening: socket.socket) -> Channel:
    """Be nodeagent until the first state is in force."""
    channel, _ = await greeted(listening)
    await in_force(channel)
    return channel


def parent_of(pid: int) -> int:
    status = Path(f"/proc/{pid}/stat").read_text(encoding="ascii")
    return int(status.rpartition(")")[2].split()[1])


def test_a_life_from_start_to_end(process: Process, directory: Path, manager: Manager) -> None:
    listening = process.next_event("listening")
    # Alive, and not ready: nobody has told it anything.
    assert "READY=1" not in manager.until("WATCHDOG=1")
    status, body = get(listening["ready"], "/healthz/ready")
    assert status == 503
    assert "no state from nodeagent" in body
    assert get(listening["ready"], "/healthz/live")[0] == 200

    with agent_socket(directory) as agent:
        channel = asyncio.run(give_state(agent))
        manager.until("READY=1")
        assert get(listening["ready"], "/healthz/ready")[0] == 200
        status, text = get(listening["stats"], "/metrics")
        assert status == 200
        assert "ztunnel_control_connected 1.0" in text
        channel.close()

    # nodeagent has gone, and it serves on.
    assert get(listening["ready"], "/healthz/ready")[0] == 200

    log = directory / "access.log"
    log.rename(directory / "moved")
    process.popen.send_signal(signal.SIGUSR1)
    wait_until(log.exists, "the log is opened anew")
    process.popen.send_signal(signal.SIGTERM)
    assert process.popen.wait(DEADLINE) == 0
    assert "STOPPING=1" in manager.until("STOPPING=1")


def blocked(pid: int) -> set[int]:
    """Return the signals that a process's first thread blocks."""
    (mask,) = (
        int(line.split()[1], 16)
        for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
        if line.startswith("SigBlk:")
    )
    return {number for number in range(1, 65) if mask >> (number - 1) & 1}


def test_a_rotation_while_it_starts_does_not_end_it(process: Process) -> None:
    wait_until(lambda: signal.SIGUSR1 in blocked(process.popen.pid), "main")
    process.popen.send_signal(signal.SIGUSR1)
    process.next_event("listening")
    assert signal.SIGUSR1 not in blocked(process.popen.pid)
    process.popen.send_signal(signal.SIGTERM)
    assert process.popen.wait(DEADLINE) == 0


def test_a_successor_blocks_the_rotations_signal_from_its_beginning() -> None:
    async def started() -> None:
        async with asyncio.timeout(DEADLINE):
            new = await successor.launch(
                {}, [sys.executable, "-c", "import signal; signal.pause()"]
            )
            try:
                assert signal.SIGUSR1 in blocked(new.pid)
            finally:
                new.signal(signal.SIGKILL)
                await new.ended()
                new.close()

    asyncio.run(started())


def test_the_audit_logs_sinks_follow_the_settings_and_its_file_the_signal(
    process: Process, directory: Path
) -> None:
    path = directory / "audit.log"
    audit = protocol.AuditSettings(file=str(path), journal=str(directory / "journal"))
    settings = msgspec.structs.replace(SETTINGS, audit=audit)

    async def welcome(agent: socket.socket) -> Channel:
        channel, _ = await greeted(agent, settings)
        await in_force(channel)
        return channel

    stats = process.next_event("listening")["stats"]
    with agent_socket(directory) as agent:
        channel = asyncio.run(welcome(agent))
        assert process.next_event(
            "log cannot be written; what finds no room is dropped and counted"
        )
        wait_until(path.exists, "the audit log's file")
        up = [f'ztunnel_audit_sink_up{{sink="{sink}"}} 1.0' for sink in ("file", "stdout")]
        wanted = [*up, 'ztunnel_audit_sink_up{sink="journal"} 0.0']

        def shown() -> bool:
            _, text = get(stats, "/metrics")
            return all(series in text for series in wanted)

        # The log line stands before the sink is counted as down.
        wait_until(shown, f"the metrics have {wanted}")
        path.rename(directory / "moved")
        process.popen.send_signal(signal.SIGUSR1)
        wait_until(path.exists, "the audit log's new file")
        channel.close()
    process.popen.send_signal(signal.SIGTERM)
    assert process.popen.wait(DEADLINE) == 0


def test_a_reload_starts_a_successor_and_hands_the_service_over(
    process: Process, directory: Path, manager: Manager
) -> None:
    async def hand_over(agent: socket.socket) -> None:
        old = await give_state(agent)
        await asyncio.to_thread(manager.until, "READY=1")
        process.popen.send_signal(signal.SIGHUP)
        new, hello = await greeted(agent)
        watch = os.pidfd_open(hello.pid)
        try:
            assert hello.pid != process.popen.pid
            await in_force(new)
            await old.send(protocol.Query(1, "drain", {"successor": str(hello.pid)}))
            heard = await asyncio.to_thread(manager.until, f"MAINPID={hello.pid}\nREADY=1")
            assert any(each.startswith("RELOADING=1\nMONOTONIC_USEC=") for each in heard)
            assert (await old.receive())[0] == protocol.Answer(1, b"{}")
            last = (await old.receive())[0]
            assert isinstance(last, protocol.Query)
            assert (last.what, last.args["cut"]) == ("drained", "0")
            assert await asyncio.to_thread(process.popen.wait, DEADLINE) == 0
            # It is nobody's child of ours: the service manager reaps it.
            assert parent_of(hello.pid) != process.popen.pid
            old.close()
            new.close()
        finally:
            signal.pidfd_send_signal(watch, signal.SIGKILL)
            select.select([watch], [], [], DEADLINE)
            os.close(watch)

    with agent_socket(directory) as agent:
        asyncio.run(hand_over(agent))


def test_a_successor_that_fails_leaves_everything_as_it_was(
    directory: Path, manager: Manager
) -> None:
    logs = directory / "logs"
    logs.mkdir()
    process = Process(directory, "--access-log", str(logs / "a"), notify=str(directory / "notify"))
    with contextlib.closing(process), agent_socket(directory) as agent:
        channel = asyncio.run(give_state(agent))
        listening = process.next_event("listening")
        manager.until("READY=1")
        # The successor cannot open its access log.
        (logs / "a").unlink()
        logs.rmdir()
        process.popen.send_signal(signal.SIGHUP)
        assert "ended" in process.next_event("reload failed; this tunnel goes on")["problem"]
        assert any(each.startswith("RELOADING=1") for each in manager.until("READY=1"))
        assert get(listening["ready"], "/healthz/ready")[0] == 200
        channel.close()
        process.popen.send_signal(signal.SIGTERM)
        assert process.popen.wait(DEADLINE) == 0


def test_one_that_is_sent_away_ends(process: Process, directory: Path) -> None:
    async def send_away(agent: socket.socket) -> None:
        channel = await give_state(agent)
        await channel.send(protocol.Refusal("too many drain"))
        assert await asyncio.to_thread(process.popen.wait, DEADLINE) == 0
        channel.close()

    with agent_socket(directory) as agent:
        asyncio.run(send_away(agent))


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
