"""HTTP/2 as peers may speak it and seldom do: whoever keeps to RFC 9113 is carried.

What breaks the rules stands in tests/faults/test_http2_abuse.py. The other side is spoken by hand.
"""

from __future__ import annotations

import itertools
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from typing import Final

import pytest

from support.corelab import PORT, SERVER_V4, Pair, hand_rule, pair
from support.hbone import END_HEADERS, END_STREAM, Client, Headers, Kind, Server, encoded, literal

pytestmark = pytest.mark.netns

PADDED, PRIORITY_FLAG = 0x8, 0x20
HEADER_TABLE_SIZE, INITIAL_WINDOW_SIZE, MAX_FRAME_SIZE, UNKNOWN = 1, 4, 5, 0xFAFA
"""RFC 9113, 6.5.2."""

CONNECT: Final[Headers] = [
    (b":method", b"CONNECT"),
    (b":authority", f"{SERVER_V4}:{PORT}".encode()),
]
OK: Final[Headers] = [(b":status", b"200")]


@pytest.fixture(scope="module")
def lab() -> Iterator[Pair]:
    with pair(workers=1, outbound=hand_rule) as made:
        yield made


@pytest.fixture
def listener(lab: Pair) -> Iterator[socket.socket]:
    with lab.listen() as made:
        yield made


@pytest.fixture
def client(lab: Pair) -> Iterator[Client]:
    made = lab.hand_client()
    yield made
    made.close()


# --- header blocks --------------------------------------------------------------------------------


def whole(stream: int, block: bytes, flags: int = 0) -> bytes:
    return encoded(Kind.HEADERS, END_HEADERS | flags, stream, block)


def padded(stream: int, block: bytes) -> bytes:
    """With a priority, which depends on a stream that nobody has opened."""
    payload = b"\xc8" + struct.pack("!IB", stream + 1000, 10) + block + bytes(0xC8)
    return whole(stream, payload, PADDED | PRIORITY_FLAG)


def in_pieces(stream: int, block: bytes) -> bytes:
    """As many CONTINUATIONs as libnghttp2 takes (8), the first of them and HEADERS empty."""
    rest = [block[at : at + 1] for at in range(6)] + [block[6:]]
    last = len(rest) - 1
    return encoded(Kind.HEADERS, 0, stream) + b"".join(
        encoded(Kind.CONTINUATION, END_HEADERS if at == last else 0, stream, piece)
        for at, piece in enumerate(rest)
    )


def resized(stream: int, block: bytes) -> bytes:
    """RFC 7541, 6.3: the dynamic table has no room from here on."""
    return whole(stream, b"\x20" + block)


FORMS: Final = {each.__name__: each for each in (whole, padded, in_pieces, resized)}

MORE: Final[dict[str, Headers]] = {
    "nothing": [],
    "baggage of 10 KB": [(b"baggage", b"x" * 10_000)],
    "another host": [(b"host", b"elsewhere.example")],
    "what proxies add": [(b"user-agent", b"x"), (b"te", b"trailers"), (b"via", b"2 proxy")],
    "no content": [(b"content-length", b"0")],
}


def read(sock: socket.socket, length: int) -> bytes:
    said = b""
    while len(said) < length and (more := sock.recv(length - len(said))):
        said += more
    return said


def echoes(client: Client, stream: int, app: socket.socket) -> None:
    """Assert that bytes pass both ways, and then both ends."""
    client.send(stream, b"ping", end=True)
    assert read(app, 4) == b"ping"
    assert app.recv(1) == b""
    app.sendall(b"pong")
    app.close()
    assert client.receive(stream, 4) == b"pong"
    while stream not in client.ended:
        client.step()


@pytest.mark.parametrize(
    "form,more", [*((f, "nothing") for f in FORMS), *(("whole", m) for m in MORE)]
)
def test_a_legal_request_is_served(
    lab: Pair, listener: socket.socket, client: Client, form: str, more: str
) -> None:
    client.tls.send(FORMS[form](1, literal([*CONNECT, *MORE[more]])))
    assert client.status(1) == 200
    echoes(client, 1, lab.accept(listener)[0])


def test_a_request_may_bring_all_it_has_to_say(
    lab: Pair, listener: socket.socket, client: Client
) -> None:
    """Data, padded, and its end in trailers, before the answer and in one record."""
    data = encoded(Kind.DATA, PADDED, 1, b"\x03abc" + bytes(3)) + encoded(Kind.DATA, 0, 1, b"def")
    trailers = whole(1, literal([(b"x-checksum", b"1")]), END_STREAM)
    client.tls.send(whole(1, literal(CONNECT)) + data + trailers)
    app, _ = lab.accept(listener)
    assert read(app, 6) == b"abcdef"
    assert app.recv(1) == b""
    app.sendall(b"answer")
    app.close()
    assert client.receive(1, 6) == b"answer"


def interim(status: bytes) -> Callable[[int], bytes]:
    block = literal([(b":status", status), (b"link", b"</x>")])
    return lambda stream: whole(stream, block) * 3 + whole(stream, literal(OK))


def formed(form: Callable[[int, bytes], bytes]) -> Callable[[int], bytes]:
    return lambda stream: form(stream, literal(OK))


ANSWERS: Final[dict[str, Callable[[int], bytes]]] = {
    **{name: formed(form) for name, form in FORMS.items()},
    "behind 100": interim(b"100"),
    "behind 103": interim(b"103"),
    # RFC 9110, 9.3.6: a client ignores it in an answer to CONNECT.
    "with a length": lambda stream: whole(stream, literal([*OK, (b"content-length", b"5")])),
    "behind frames of other RFCs": lambda stream: (
        encoded(0xA, 0, 0, b"\0\0x")
        + encoded(0xF0, 0xFF, stream, b"?")
        + whole(stream, literal(OK))
    ),
}


@pytest.mark.parametrize("why", ANSWERS)
def test_a_legal_answer_opens_the_tunnel(lab: Pair, why: str) -> None:
    with lab.hand_listen() as listener:
        sock = lab.connect()
        server = lab.hand_server(listener)
        stream, _ = server.request()
        server.tls.send(ANSWERS[why](stream))
        sock.sendall(b"ping")
        assert server.receive(stream, 4) == b"ping"
        server.send(stream, b"pong", end=True)
        assert read(sock, 4) == b"pong"
        finish(sock, server, stream)


def test_an_answer_may_be_the_end(lab: Pair) -> None:
    """200 with END_STREAM: the other way goes on."""
    with lab.hand_listen() as listener:
        sock = lab.connect()
        server = lab.hand_server(listener)
        stream, _ = server.request()
        server.tls.send(whole(stream, literal(OK), END_STREAM))
        assert sock.recv(1) == b""
        sock.sendall(b"still")
        assert server.receive(stream, 5) == b"still"
        finish(sock, server, stream)


def finish(sock: socket.socket, server: Server, stream: int) -> None:
    sock.close()
    while stream not in server.ended:
        server.step()
    server.close()


# --- windows and sizes ----------------------------------------------------------------------------


def test_windows_that_shrink_below_nothing_lose_no_byte(
    lab: Pair, listener: socket.socket, client: Client
) -> None:
    """RFC 9113, 6.9.2: a new INITIAL_WINDOW_SIZE may make the window of an open stream negative."""
    client.limits((INITIAL_WINDOW_SIZE, 100_000))
    stream = client.connect(CONNECT[1][1].decode())
    assert client.status(stream) == 200
    app, _ = lab.accept(listener)
    said = os.urandom(2 << 20)

    def say() -> None:
        app.sendall(said)
        app.close()

    speaker = threading.Thread(target=say)
    speaker.start()
    sizes = itertools.cycle([0, 5, 16_384, 70_000, 1, 1 << 18])
    allowed = 16_384
    while stream not in client.ended:
        if not client.has_come(0.02):
            client.limits(
                (INITIAL_WINDOW_SIZE, next(sizes)),
                (HEADER_TABLE_SIZE, 0),
                (UNKNOWN, 7),
                (MAX_FRAME_SIZE, allowed := allowed + 1),
            )
            client.frame(Kind.WINDOW_UPDATE, 0, stream, struct.pack("!I", 150_000))
        frame = client.step()
        assert frame.kind != Kind.DATA or len(frame.payload) <= allowed
    speaker.join()
    assert client.data[stream] == said
