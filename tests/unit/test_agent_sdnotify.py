"""Messages to the service manager, and descriptors from it, over a real datagram socket."""

from __future__ import annotations

import array
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from nodeagent.capture.model import Enrolment, Listeners
from nodeagent.descriptors import KeptDescriptors
from nodeagent.sdnotify import ServiceManager, StoredDescriptor


class Manager:
    """The other end of NOTIFY_SOCKET."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(path))
        self.socket.settimeout(10)

    def receive(self) -> tuple[str, list[int]]:
        data, ancillary, _, _ = self.socket.recvmsg(4096, socket.CMSG_SPACE(64))
        fds = array.array("i")
        for _, _, content in ancillary:
            fds.frombytes(content)
        return data.decode(), list(fds)


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    made = Manager(tmp_path / "notify")
    yield made
    made.socket.close()


def client(tmp_path: Path, **extra: str) -> ServiceManager:
    return ServiceManager({"NOTIFY_SOCKET": str(tmp_path / "notify"), **extra})


def test_messages(tmp_path: Path, manager: Manager) -> None:
    sender = client(tmp_path)
    sender.ready()
    sender.status("one\nREADY=1")
    sender.status("one\nREADY=1")
    sender.watchdog()
    sender.stopping()
    sender.close()
    expected = ["READY=1", "STATUS=one READY=1", "WATCHDOG=1", "STOPPING=1"]
    assert [manager.receive()[0] for _ in expected] == expected


def test_variables_are_taken_away_from_children() -> None:
    environ = {"NOTIFY_SOCKET": "", "WATCHDOG_USEC": "1000000", "WATCHDOG_PID": str(os.getpid())}
    sender = ServiceManager(environ)
    assert sender.watchdog_seconds == 1
    assert environ == {}
    assert not sender.present
    sender.ready()
    assert sender.failures == 0


@pytest.mark.parametrize(
    "variables", [{"WATCHDOG_USEC": "x"}, {"WATCHDOG_USEC": "5", "WATCHDOG_PID": "1"}, {}]
)
def test_watchdog_of_somebody_else_is_ignored(variables: dict[str, str]) -> None:
    assert ServiceManager(dict(variables)).watchdog_seconds is None


def test_an_absent_manager_is_counted_and_harmless(tmp_path: Path) -> None:
    sender = client(tmp_path)
    assert not sender.present
    assert sender.failures == 1
    sender.ready()


@pytest.mark.parametrize("name", ["", "a:b", "ä", "a\n", "x" * 256])
def test_bad_names_of_descriptors(tmp_path: Path, manager: Manager, name: str) -> None:
    sender = client(tmp_path)
    with pytest.raises(ValueError, match="colon"):
        sender.store(name, 0)
    sender.close()


def test_stored_descriptors_of_a_child_process() -> None:
    """The variables name this process, so a child stands in for the daemon."""
    program = """
import os, socket, sys
os.environ["LISTEN_PID"] = str(os.getpid())
from nodeagent.sdnotify import stored_descriptors
found = stored_descriptors(os.environ)
print([(each.name, each.fd, os.get_inheritable(each.fd)) for each in found],
      sorted(name for name in os.environ if name.startswith("LISTEN_")))
"""
    root = str(Path(__file__).parents[2])
    shell = 'exec "$0" -c "$1" 3</dev/null 4</dev/null'
    result = subprocess.run(
        ["sh", "-c", shell, sys.executable, program],
        env={"LISTEN_FDS": "2", "LISTEN_FDNAMES": "a:b", "PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == "[('a', 3, False), ('b', 4, False)] []"


# --- what is kept of pods ----------------------------------------------------------------------


def sockets(count: int) -> list[int]:
    return [socket.socket(socket.AF_UNIX).detach() for _ in range(count)]


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def stored(uid: str, fds: list[int], roles: tuple[str, ...]) -> list[StoredDescriptor]:
    return [StoredDescriptor(f"{uid}|{role}", fd) for role, fd in zip(roles, fds, strict=True)]


def test_offers_of_the_store() -> None:
    whole, part, strange = sockets(3), sockets(2), sockets(1)
    kept = KeptDescriptors(
        ServiceManager({}),
        [
            *stored("ns/a@1", whole, ("hbone", "inbound", "outbound")),
            *stored("ns/b@2", part, ("hbone", "inbound")),
            *stored("ns/a@1", strange, ("netns",)),
        ],
    )
    assert kept.listeners("ns/a@1") == Listeners(whole[2], whole[1], whole[0])
    assert kept.listeners("ns/b@2") is None
    assert not any(map(is_open, part + strange))
    kept.retain(lambda uid: uid != "ns/a@1")
    assert not any(map(is_open, whole))


def test_enrolled_pods_are_stored_once_and_forgotten(tmp_path: Path, manager: Manager) -> None:
    fds = sockets(4)
    offered = sockets(3)
    sender = client(tmp_path)
    kept = KeptDescriptors(sender, ())
    kept.offer("ns/a@1", Listeners(*offered))
    enrolment = Enrolment("ns/a@1", 1, fds[0], Listeners(*fds[1:]))
    kept.keep(enrolment)
    kept.keep(enrolment)
    assert not any(map(is_open, offered))
    roles = ("netns", "outbound", "inbound", "hbone")
    for role in roles:
        assert manager.receive() == (f"FDSTOREREMOVE=1\nFDNAME=ns/a@1|{role}", [])
    for role, fd in zip(roles, fds, strict=True):
        text, sent = manager.receive()
        assert text == f"FDSTORE=1\nFDNAME=ns/a@1|{role}"
        assert [os.fstat(each).st_ino for each in sent] == [os.fstat(fd).st_ino]
        for each in sent:
            os.close(each)
    kept.forget("ns/a@1")
    assert manager.receive() == ("FDSTOREREMOVE=1\nFDNAME=ns/a@1|netns", [])
    assert all(map(is_open, fds)), "an enrolled pod's descriptors are the capture's"
    for fd in fds:
        os.close(fd)
    sender.close()


def test_more_descriptors_than_the_queue_holds_are_all_stored(manager: Manager) -> None:
    """The queue of a socket holds ten messages by default (net.unix.max_dgram_qlen)."""
    many = 200
    told = ServiceManager({"NOTIFY_SOCKET": manager.socket.getsockname()})
    with Path("/dev/null").open("rb") as kept:

        def store() -> None:
            for number in range(many):
                told.store(f"pod-{number}", kept.fileno())

        storing = threading.Thread(target=store)
        storing.start()
        for number in range(many):
            text, fds = manager.receive()
            assert text == f"FDSTORE=1\nFDNAME=pod-{number}"
            os.close(*fds)
        storing.join(30)
    assert told.failures == 0
    told.close()


def test_a_manager_that_does_not_read_is_waited_for_once(
    manager: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nodeagent.sdnotify.WAIT_SECONDS", 0.01)
    told = ServiceManager({"NOTIFY_SOCKET": manager.socket.getsockname()})
    for _ in range(10_000):
        told.watchdog()
    failed = told.failures
    for _ in range(10_000):
        told.ready()
    assert told.failures == failed + 10_000
    told.close()
