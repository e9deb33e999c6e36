"""The talk with a receiver of spans: slow, endless, hostile, behind TLS; each attempt ends."""

from __future__ import annotations

import contextlib
import re
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from structlog.testing import capture_logs

from support import certificates
from support.netns import wait_until
from support.otlp import Receiver, receiver
from ztunnel import settings
from ztunnel.observe import otlp
from ztunnel.observe.traces import Node

SPANS = [b"", b""]
"""Of no content: what is said about them is what counts here."""


def collector(
    port: int, *, host: str = "127.0.0.1", tls: bool = False, ca: str = ""
) -> otlp.Collector:
    return otlp.Collector(settings.Receiver(host, port, tls=tls), ca, Node("node-1", "cluster"))


@contextlib.contextmanager
def told(why: str) -> Iterator[None]:
    """Expect an error of these words; where it is stands beside them."""
    with pytest.raises(OSError) as caught:  # noqa: PT011 - its words are looked at below
        yield
    assert re.search(why, caught.value.args[0])
    assert ":" in caught.value.filename


@pytest.fixture
def taking() -> Iterator[Receiver]:
    with receiver(socket.create_server(("127.0.0.1", 0))) as made:
        yield made


@contextlib.contextmanager
def talking(says: Callable[[socket.socket], None]) -> Iterator[int]:
    """Serve connections, one after the other, by what `says` does with each; yields the port."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    with listening.accept()[0] as sock, contextlib.suppress(OSError):
                        says(sock)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield listening.getsockname()[1]
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            thread.join()


def take_request(sock: socket.socket) -> None:
    """Read a request to its end: who closes with something unread resets instead."""
    with sock.makefile("rb") as stream:
        length = 0
        while (line := stream.readline()) not in {b"\r\n", b""}:
            name, _, value = line.partition(b":")
            if name.lower() == b"content-length":
                length = int(value)
        stream.read(length)


# --- time -----------------------------------------------------------------------------------------


def dripping(sock: socket.socket) -> None:
    sock.sendall(b"HTTP/1.1 200 OK\r\nX-Slow: ")
    while True:
        sock.sendall(b"a")
        time.sleep(0.02)


def dripping_body(sock: socket.socket) -> None:
    sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 60000\r\n\r\n")
    while True:
        sock.sendall(b"a")
        time.sleep(0.02)


def dripping_to_the_end(sock: socket.socket) -> None:
    sock.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
    while True:
        sock.sendall(b"a")
        time.sleep(0.02)


def always_going_on(sock: socket.socket) -> None:
    while True:
        sock.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        time.sleep(0.02)


def silent(sock: socket.socket) -> None:
    while sock.recv(4096):
        pass


@pytest.mark.parametrize("tls", [False, True])
@pytest.mark.parametrize(
    "says", [dripping, dripping_body, dripping_to_the_end, always_going_on, silent]
)
def test_an_attempt_ends_whatever_is_said(
    says: Callable[[socket.socket], None], tls: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(otlp, "ANSWER_SECONDS", 0.3)
    with talking(says) as port:
        made = collector(port, tls=tls)
        made.open()
        with told(r"no answer within 0\.3 s|no TLS"):
            made.send(SPANS)
        made.close()
    assert (made.taken, made.refused) == (0, 0)


def test_an_endless_answer_is_not_read_to_its_end() -> None:
    def endless(sock: socket.socket) -> None:
        sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000000\r\n\r\n")
        while True:
            sock.sendall(bytes(65536))

    with talking(endless) as port:
        made = collector(port)
        made.open()
        for _ in range(2):
            assert made.send(SPANS) == 2
        made.close()


@pytest.mark.parametrize("says", [b"", b"SSH-2.0-x\r\n", b"HTTP/1.1 abc\r\n\r\n", bytes(70_000)])
def test_what_is_no_http_is_told(says: bytes) -> None:
    def say(sock: socket.socket) -> None:
        take_request(sock)
        sock.sendall(says)

    with talking(say) as port:
        made = collector(port)
        made.open()
        with told("no HTTP"):
            made.send(SPANS)
        made.close()


def test_a_connection_that_was_closed_while_idle_is_no_failure(taking: Receiver) -> None:
    """A proxy before the receiver closes it after a minute."""
    taking.fields = {"Connection": "keep-alive"}
    closed = threading.Event()

    def once(sock: socket.socket) -> None:
        take_request(sock)
        sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        sock.shutdown(socket.SHUT_WR)
        closed.set()

    with talking(once) as port:
        made = collector(port)
        made.open()
        for _ in range(3):
            closed.clear()
            assert made.send(SPANS) == 2
            closed.wait(10)
        made.close()
    assert made.taken == 6


# --- answers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, seconds",
    [
        ("0", 0),
        ("120", 120),
        ("999999999999999999999999", otlp.MAX_ASKED_SECONDS),
        ("Sun, 01 Mar 2026 12:01:00 GMT", 60),
        ("Sun, 01 Mar 2026 11:00:00 GMT", 0),
        ("Sun, 01 Mar 2066 11:00:00 GMT", otlp.MAX_ASKED_SECONDS),
        ("", None),
        ("-1", None),
        ("1.5", None),
        ("soon", None),
        ("٣", None),
    ],
)
def test_how_long_to_wait_is_read_within_bounds(text: str, seconds: float | None) -> None:
    assert otlp.retry_after(text, datetime(2026, 3, 1, 12, tzinfo=UTC)) == seconds


def test_who_asks_for_time_gets_it(taking: Receiver) -> None:
    taking.statuses, taking.fields = [503], {"Retry-After": "120"}
    made = collector(taking.port)
    made.open()
    with told("answers 503, and is asked again in 120 s"):
        made.send(SPANS)
    with told(r"it is given 1[12][0-9] s"):
        made.open()
    assert len(taking.requests) == 1


def test_who_takes_nothing_is_asked_ever_more_seldom(
    taking: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    taking.statuses = [503] * 7
    made = collector(taking.port)
    pauses = []
    for _ in range(7):
        monkeypatch.setattr(made, "_not_before", 0.0)
        made.open()
        with pytest.raises(OSError) as caught:  # noqa: PT011 - its words are looked at below
            made.send(SPANS)
        pauses.append(int(caught.value.args[0].rpartition("in ")[2].removesuffix(" s")))
    assert pauses == [1, 2, 4, 8, 16, 30, 30]
    monkeypatch.setattr(made, "_not_before", 0.0)
    made.open()
    assert made.send(SPANS) == 2
    taking.statuses = [429]
    with told("in 1 s"):
        made.send(SPANS)


def test_a_redirect_is_not_followed(taking: Receiver) -> None:
    with receiver(socket.create_server(("127.0.0.1", 0))) as other:
        taking.statuses = [307]
        taking.fields = {"Location": f"http://127.0.0.1:{other.port}/v1/traces"}
        made = collector(taking.port)
        made.open()
        assert made.send(SPANS) == 2
        made.close()
        assert (made.taken, made.refused, other.requests) == (0, 2, [])


@pytest.mark.parametrize("said, refused", [(1, 1), (2, 2), (10**15, 2), (-5, 0)])
def test_a_part_that_is_refused_is_counted_and_never_more_than_was_sent(
    taking: Receiver, said: int, refused: int
) -> None:
    taking.rejects = said
    made = collector(taking.port)
    made.open()
    assert made.send(SPANS) == 2
    made.close()
    assert (made.taken, made.refused) == (2 - refused, refused)


def test_a_receiver_that_refuses_everything_fills_no_log(taking: Receiver) -> None:
    taking.statuses = [401] * 5 + [200, 401]
    made = collector(taking.port)
    made.open()
    with capture_logs() as logs:
        for _ in range(7):
            assert made.send(SPANS) == 2
    made.close()
    assert [(each["event"][:18], each["status"]) for each in logs] == [
        ("spans were refused", 401),
        ("spans were refused", 401),
    ]
    assert (made.taken, made.refused) == (2, 12)


# --- TLS and names --------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Make a CA, a certificate for "localhost" by it, and another CA."""
    now = time.time()
    root, other = (
        certificates.authority(not_before=now - 60, not_after=now + 3600) for _ in range(2)
    )
    leaf = certificates.issue(
        root, subject="collector", dns=["localhost"], not_before=now - 60, not_after=now + 3600
    )
    for name, made in (("ca.pem", root), ("other.pem", other), ("leaf.pem", leaf)):
        (tmp_path / name).write_bytes(made.certificate.public_bytes(Encoding.PEM))
    (tmp_path / "leaf-key.pem").write_bytes(
        leaf.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    )
    return tmp_path


@pytest.fixture
def secure(files: Path) -> Iterator[Receiver]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files / "leaf.pem", files / "leaf-key.pem")
    with receiver(socket.create_server(("127.0.0.1", 0)), context) as made:
        yield made


def test_spans_go_by_tls_to_a_name(secure: Receiver, files: Path) -> None:
    made = collector(secure.port, host="localhost", tls=True, ca=str(files / "ca.pem"))
    made.open()
    for _ in range(2):
        assert made.send(SPANS) == 2
    made.close()
    wait_until(lambda: len(secure.spans) == 4, "they have come")


@pytest.mark.parametrize(
    "host, ca, why",
    [
        ("localhost", "other.pem", "its certificate is not accepted: unable to get local issuer"),
        ("localhost", "", "its certificate is not accepted"),
        ("127.0.0.1", "ca.pem", "its certificate is not accepted: IP address mismatch"),
        ("localhost", "absent.pem", r"absent\.pem: No such file"),
        ("localhost", "leaf-key.pem", r"leaf-key\.pem: no TLS \(NO_CERTIFICATE_OR_CRL_FOUND\)"),
    ],
)
def test_nobody_else_gets_spans(
    secure: Receiver, files: Path, host: str, ca: str, why: str
) -> None:
    made = collector(secure.port, host=host, tls=True, ca=str(files / ca) if ca else "")
    with told(why):
        made.open()
        made.send(SPANS)
    made.close()
    assert secure.requests == []


def test_a_receiver_without_tls_is_told(taking: Receiver) -> None:
    made = collector(taking.port, host="localhost", tls=True)
    made.open()
    with told("no TLS"):
        made.send(SPANS)
    made.close()


LEAN = """
import sys
from ztunnel import lean
lean.leave_out()
from ztunnel import settings
from ztunnel.observe import otlp
from ztunnel.observe.traces import Node
plain, secure, ca = sys.argv[1:]
for port, tls in ((plain, False), (secure, True)):
    place = settings.Receiver("localhost", int(port), tls=tls)
    made = otlp.Collector(place, ca, Node("node-1", "cluster"))
    made.open()
    assert sys.modules["ssl"] is None or tls
    made.send([b""])
    made.close()
    assert made.taken == 1
"""


def test_the_daemon_loads_tls_for_https_and_only_then(
    taking: Receiver, secure: Receiver, files: Path
) -> None:
    command = [sys.executable, "-c", LEAN, str(taking.port), str(secure.port)]
    subprocess.run([*command, str(files / "ca.pem")], check=True, timeout=60)
    assert (len(taking.spans), len(secure.spans)) == (1, 1)
