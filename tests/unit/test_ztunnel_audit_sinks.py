"""The audit log's sinks on real sockets and files: each alone, hung, gone and back."""

from __future__ import annotations

import json
import re
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import rfc5424
from support.audit_lines import TIME, entry, heard, journal_fields, listening
from support.netns import wait_until
from ztunnel import log_writer
from ztunnel.audit import outlets, sinks
from ztunnel.audit.outlets import Outlets
from ztunnel.settings import AuditForm, AuditSettings, Facility, Syslog, Transport

SECONDS = 15.0
FAMILIES = pytest.mark.parametrize("address", ["127.0.0.1", "::1"])


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_writer, "RETRY_SECONDS", 0.02)
    monkeypatch.setattr(log_writer, "TURN_SECONDS", 0.05)
    monkeypatch.setattr(sinks, "SEND_SECONDS", 0.1)


@pytest.fixture
def given() -> Iterator[Outlets]:
    made = Outlets(lambda: TIME, None, None)
    yield made
    made.stop(SECONDS, time.monotonic)


def settings(tmp_path: Path, *names: str, form: AuditForm = AuditForm.TEXT) -> AuditSettings:
    return AuditSettings(
        form=form,
        file=str(tmp_path / "audit.log") if "file" in names else "",
        journal=str(tmp_path / "journal") if "journal" in names else "",
        syslog=Syslog(Transport.UNIX, str(tmp_path / "syslog")) if "syslog" in names else None,
    )


def lines(tmp_path: Path) -> list[str]:
    path = tmp_path / "audit.log"
    return path.read_text(encoding="ascii").splitlines() if path.exists() else []


def written(of: Outlets, **wanted: int) -> None:
    wait_until(
        lambda: all(of.written[name] >= lines for name, lines in wanted.items()),
        f"written are {wanted}, not {of.written}",
    )


def test_every_sink_gets_every_line_in_its_form(given: Outlets, tmp_path: Path) -> None:
    with (
        listening(tmp_path / "journal") as journal,
        listening(tmp_path / "syslog") as syslog,
    ):
        given.configure(settings(tmp_path, "file", "journal", "syslog"), "node-1")
        given.give(entry())
        written(given, file=1, journal=1, syslog=1)
        assert dict(journal_fields(journal.recv(65536)))["AUDIT_VERDICT"] == b"AUTHORIZED"
        message = rfc5424.parse(syslog.recv(65536))
    assert message.text.endswith("AUTHORIZED policy=strict")
    (line,) = lines(tmp_path)
    assert line.startswith("2021-06-14T10:27:59.758123Z [[node-1]] WARN SPIFFE ")
    assert given.problems == {"file": "", "journal": "", "syslog": ""}
    assert not given.lost


@pytest.mark.parametrize(
    "form,key", [(AuditForm.JSON, "audit_version"), (AuditForm.OCSF, "class_uid")]
)
def test_a_form_is_that_of_the_file_and_of_the_message(
    given: Outlets, tmp_path: Path, form: AuditForm, key: str
) -> None:
    with listening(tmp_path / "syslog") as syslog:
        given.configure(settings(tmp_path, "file", "syslog", form=form), "node-1")
        given.give(entry())
        written(given, file=1, syslog=1)
        message = rfc5424.parse(syslog.recv(65536))
    assert json.loads(message.text) == json.loads(lines(tmp_path)[0])
    assert key in json.loads(message.text)


@FAMILIES
def test_udp_has_one_message_a_datagram(given: Outlets, address: str) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as receiver:
        receiver.bind((address, 0))
        receiver.settimeout(SECONDS)
        port = receiver.getsockname()[1]
        there = Syslog(Transport.UDP, address, port)
        given.configure(AuditSettings(syslog=there, facility=Facility.LOCAL3), "node-1")
        for _ in range(3):
            given.give(entry())
        for _ in range(3):
            assert rfc5424.parse(receiver.recv(65536)).facility == 19


@pytest.fixture
def receiver() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as made:
        made.settimeout(SECONDS)
        yield made


def stream(receiver: socket.socket) -> AuditSettings:
    host, port = receiver.getsockname()[:2]
    return AuditSettings(syslog=Syslog(Transport.TCP, host, port))


@FAMILIES
def test_tcp_counts_octets(given: Outlets, address: str) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.create_server((address, 0), family=family) as receiver:
        receiver.settimeout(SECONDS)
        given.configure(stream(receiver), "node-1")
        for _ in range(3):
            given.give(entry())
        with receiver.accept()[0] as connected:
            assert len(received(connected, 3)) == 3


def test_a_receiver_that_comes_back_has_every_line(given: Outlets, receiver: socket.socket) -> None:
    given.configure(stream(receiver), "node-1")
    for number in range(3):
        given.give(entry(source=f"10.1.0.{number}:1"))
        with receiver.accept()[0] as connected:
            (message,) = received(connected, 1)
            assert dict(message.elements["audit@32473"])["src.addr"] == f"10.1.0.{number}:1"
    assert not given.lost


def test_a_receiver_that_takes_nothing_gets_whole_messages_on_another_connection(
    given: Outlets, receiver: socket.socket
) -> None:
    # Small, and inherited by what is accepted: a message ends in the middle of the window.
    receiver.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    given.configure(stream(receiver), "node-1")

    def stuck() -> bool:
        for _ in range(100):
            given.give(entry())
        return bool(given.problems["syslog"])

    wait_until(stuck, "the receiver takes nothing more")
    host, port = receiver.getsockname()[:2]
    assert given.problems["syslog"] == f"unavailable: {host}:{port}: the receiver takes nothing"
    with receiver.accept()[0], receiver.accept()[0] as second:
        assert len(received(second, 3)) >= 3


def received(sock: socket.socket, number: int) -> list[rfc5424.Message]:
    sock.settimeout(SECONDS)
    stream = b""
    while True:
        messages, _ = rfc5424.unframe(stream)
        if len(messages) >= number:
            return [rfc5424.parse(message) for message in messages]
        stream += sock.recv(65536)


def test_a_sink_that_hangs_holds_up_no_other_and_nobody_who_gives(
    given: Outlets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outlets, "QUEUE_LINES", 50)
    with listening(tmp_path / "journal") as journal:
        given.configure(settings(tmp_path, "file", "journal"), "node-1")
        # Nobody reads the journal's socket: its queue fills up, in the kernel and then here.
        given.give(entry())
        written(given, journal=1)
        count = 1

        def more() -> bool:
            nonlocal count
            for _ in range(20):
                given.give(entry())
            count += 20
            written(given, file=count)
            return ("journal", "slow") in given.lost

        wait_until(more, "the journal's queue is full")
        wait_until(lambda: given.problems["journal"], "the sink knows that nobody reads")
        assert not given.problems["file"]
        assert len(lines(tmp_path)) == count
        lost = given.lost["journal", "slow"]
        said: list[str] = []

        def reads() -> bool:
            for datagram in heard(journal):
                said.append(dict(journal_fields(datagram))["MESSAGE"].decode())
            return any(message.endswith("lines left out") for message in said)

        wait_until(reads, "the journal is told what it has missed")
        wait_until(lambda: not given.problems["journal"], "the journal works again")
        assert f"{lost} lines left out" in said
        given.give(entry())
        wait_until(lambda: reads() and given.written["journal"] + lost == count + 1, "no line more")


@pytest.mark.parametrize("name", ["journal", "syslog"])
def test_a_socket_that_is_gone_is_found_again(given: Outlets, tmp_path: Path, name: str) -> None:
    given.configure(settings(tmp_path, "file", name), "node-1")
    given.give(entry())
    written(given, file=1)
    wait_until(lambda: given.problems[name], "the sink knows that nobody is there")
    assert given.problems[name] == f"unavailable: {tmp_path / name}: No such file or directory"
    with listening(tmp_path / name) as first:
        assert first.recv(65536)
    (tmp_path / name).unlink()
    given.give(entry())
    written(given, file=2)
    with listening(tmp_path / name) as second:
        assert second.recv(65536)
    assert not given.lost


def test_a_directory_that_is_gone_is_found_again(given: Outlets, tmp_path: Path) -> None:
    there = tmp_path / "logs"
    given.configure(settings(there, "file"), "node-1")
    given.give(entry())
    wait_until(lambda: given.problems["file"], "the sink knows that there is no directory")
    there.mkdir()
    written(given, file=1)
    assert len(lines(there)) == 1
    shutil.rmtree(there)


def test_a_full_disk_is_counted_and_holds_up_no_other(
    given: Outlets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outlets, "QUEUE_LINES", 5)
    with listening(tmp_path / "journal") as journal:
        made = settings(tmp_path, "journal")
        full = AuditSettings(file="/dev/full", journal=made.journal)
        given.configure(full, "node-1")
        given.give(entry())
        wait_until(lambda: given.problems["file"], "the sink knows that the disk is full")
        assert given.problems["file"] == "unavailable: /dev/full: No space left on device"
        for number in range(2, 12):
            given.give(entry())
            written(given, journal=number)
            assert journal.recv(65536)
    assert given.lost == {("file", "unavailable"): 5}


def test_settings_that_change_begin_and_end_only_what_they_are_about(
    given: Outlets, tmp_path: Path
) -> None:
    with listening(tmp_path / "journal") as journal, listening(tmp_path / "syslog"):
        given.configure(settings(tmp_path, "file", "journal"), "node-1")
        given.give(entry())
        written(given, file=1, journal=1)
        before = threading.enumerate()
        given.configure(settings(tmp_path, "file", "journal"), "node-1")
        assert threading.enumerate() == before
        given.configure(settings(tmp_path, "journal", "syslog"), "node-1")
        given.give(entry())
        written(given, journal=2, syslog=1)
        assert len(heard(journal)) == 2
    assert len(lines(tmp_path)) == 1
    # What a sink has written counts after its end too.
    assert given.written["file"] == 1
    assert given.problems.keys() == {"journal", "syslog"}


def test_standard_output_is_one_writers_alone(tmp_path: Path) -> None:
    """Two threads that write there would mix lines: the access log has them, if it is there."""

    class AccessLog:
        got: list[tuple[bytes, int]]

        def put(self, text: bytes, count: int, /) -> None:
            self.got.append((text, count))

    shared = AccessLog()
    shared.got = []
    made = Outlets(lambda: TIME, AuditForm.JSON, shared)
    made.configure(AuditSettings(), "node-1")
    made.give(entry())
    ((text, count),) = shared.got
    assert count == 1
    assert re.fullmatch(rb"\{.*\}\n", text)
    assert json.loads(text)["verdict"] == "AUTHORIZED"
    assert made.written == {"stdout": 1}
    made.configure(AuditSettings(stdout=False), "node-1")
    assert not made
    made.give(entry())
    assert len(shared.got) == 1
