from __future__ import annotations

import os
import select
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ztunnel.sdnotify import MAX_STATUS, Notifier


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[tuple[socket.socket, str]]:
    path = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(path)
        listening.settimeout(30)
        yield listening, path


def test_messages_arrive_and_the_variables_are_taken(manager: tuple[socket.socket, str]) -> None:
    listening, path = manager
    environ = {"NOTIFY_SOCKET": path, "WATCHDOG_USEC": "3000000", "OTHER": "x"}
    notifier = Notifier(environ)
    assert environ == {"OTHER": "x"}
    assert notifier.watchdog_seconds == 3
    notifier.ready()
    notifier.alive()
    notifier.status("a\nb" + "x" * 999)
    notifier.status("a\nb" + "x" * 999)
    notifier.stopping()
    notifier.close()
    found = [listening.recv(4096).decode() for _ in range(4)]
    assert found[:2] == ["READY=1", "WATCHDOG=1"]
    assert found[2].startswith("STATUS=a b")
    assert len(found[2]) == len("STATUS=") + MAX_STATUS
    assert found[3] == "STOPPING=1"


def test_an_abstract_socket_works() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind("")
        listening.settimeout(30)
        name = listening.getsockname().decode().replace("\0", "@", 1)
        notifier = Notifier({"NOTIFY_SOCKET": name})
        notifier.ready()
        notifier.close()
        assert listening.recv(100) == b"READY=1"


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"NOTIFY_SOCKET": "/nowhere/at/all"},
        {"NOTIFY_SOCKET": "relative"},
        {"NOTIFY_SOCKET": "", "WATCHDOG_USEC": "soon"},
        {"WATCHDOG_USEC": "1000000", "WATCHDOG_PID": str(os.getpid() + 1)},
    ],
)
def test_without_a_manager_nothing_happens(environ: dict[str, str]) -> None:
    notifier = Notifier(environ)
    notifier.ready()
    notifier.status("x")
    notifier.close()
    assert notifier.watchdog_seconds == 0


def test_a_manager_that_does_not_read_does_not_hold_us_up(
    manager: tuple[socket.socket, str],
) -> None:
    _, path = manager
    notifier = Notifier({"NOTIFY_SOCKET": path})
    for _ in range(10_000):
        notifier.alive()
    notifier.close()


def test_what_the_manager_has_to_know_waits_for_room(manager: tuple[socket.socket, str]) -> None:
    listening, path = manager
    notifier = Notifier({"NOTIFY_SOCKET": path})
    for _ in range(10_000):
        notifier.alive()
    telling = threading.Thread(target=notifier.handed_over, args=(42,))
    telling.start()
    while listening.recv(4096) != b"MAINPID=42\nREADY=1":
        pass
    telling.join(30)
    notifier.close()


def test_a_stuck_manager_is_waited_for_once(
    manager: tuple[socket.socket, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    listening, path = manager
    waits: list[float] = []

    class Room:
        def register(self, *_: object) -> None: ...

        def poll(self, milliseconds: float) -> None:
            waits.append(milliseconds)
            time.sleep(milliseconds / 1000)

    monkeypatch.setattr("ztunnel.sdnotify.WAIT_SECONDS", 0.01)
    monkeypatch.setattr(select, "poll", Room)
    notifier = Notifier({"NOTIFY_SOCKET": path})
    for _ in range(10_000):
        notifier.alive()
    assert not waits
    for _ in range(5):
        notifier.ready()
    assert len(waits) == 1
    # It takes messages again, and is waited for again.
    monkeypatch.setattr("ztunnel.sdnotify.WAIT_SECONDS", 0.01)
    listening.recv(4096)
    for _ in range(3):
        notifier.ready()
    assert len(waits) == 2
    notifier.close()
