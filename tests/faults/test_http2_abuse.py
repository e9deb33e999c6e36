"""HTTP/2 abuse on port 15008: each ends that connection only, with a reason and a counter.

Downstream, the attacker is a client with a good certificate; upstream, a server that our client
dials. Its answers are read while it goes on, so that nothing but the tunnel's own limits bounds it.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Final

import pytest

from support.abuse import PLACES, Attack, attack, say
from support.e2e import Mesh, authority, read_all, reset
from support.hbone import ACK, END_HEADERS, END_STREAM, Client, Gone, Kind, encoded, literal
from support.netns import wait_until

BURST: Final = 1000
"""ZT_GLITCH_BURST."""
FLOOD: Final = 5 * BURST
"""Frames of an attack: more than the burst and what time gives back while it is sent."""
MOST_HEADER_BYTES: Final = 16 * 1024
"""ZT_MAX_HEADER_BYTES."""

PADDED, PRIORITY_FLAG = 0x8, 0x20
LAST_STREAM: Final = (1 << 31) - 1
HIGH: Final = 1 << 20
"""A stream that nobody has opened, odd plus one."""

BOTH = pytest.mark.parametrize("place", PLACES)


def number(value: int) -> bytes:
    return struct.pack("!I", value)


def connect(at: Attack, stream: int, *extra: tuple[bytes, bytes], end: bool = False) -> bytes:
    fields = [(b":method", b"CONNECT"), (b":authority", at.to.encode()), *extra]
    flags = END_HEADERS | (END_STREAM if end else 0)
    return encoded(Kind.HEADERS, flags, stream, literal(fields))


def trailers(at: Attack, block: bytes) -> bytes:
    """A header block on the stream that is open: its end."""
    return encoded(Kind.HEADERS, END_HEADERS | END_STREAM, at.stream, block)


# --- floods: frames that do no work ---------------------------------------------------------------

FLOODS: dict[str, tuple[Callable[[Attack], bytes], str]] = {
    "ping": (lambda _: encoded(Kind.PING, 0, 0, bytes(8)), "PING"),
    "ping_answers": (lambda _: encoded(Kind.PING, ACK, 0, bytes(8)), "PING"),
    "settings": (lambda _: encoded(Kind.SETTINGS, 0, 0, struct.pack("!HI", 3, 100)), "SETTINGS"),
    "empty_settings": (lambda _: encoded(Kind.SETTINGS, 0, 0), "SETTINGS"),
    "empty_data": (lambda at: encoded(Kind.DATA, 0, at.stream), "empty DATA"),
    "padding_only": (
        lambda at: encoded(Kind.DATA, PADDED, at.stream, b"\x07" + bytes(7)),
        "empty DATA",
    ),
    "priority": (
        lambda at: encoded(Kind.PRIORITY, 0, at.stream, number(0) + b"\x10"),
        "PRIORITY",
    ),
    "priority_idle_stream": (
        lambda _: encoded(Kind.PRIORITY, 0, HIGH + 1, number(0) + b"\x10"),
        "PRIORITY",
    ),
    "priority_update": (
        lambda at: encoded(Kind.PRIORITY_UPDATE, 0, 0, number(at.stream) + b"u=1"),
        "unknown",
    ),
    "unknown_frames": (lambda _: encoded(0xFA, 0xFF, 0, b"what"), "unknown"),
    "unknown_frames_on_a_stream": (lambda at: encoded(0xFA, 0, at.stream), "unknown"),
    "window_update": (
        lambda _: encoded(Kind.WINDOW_UPDATE, 0, 0, number(1)),
        "WINDOW_UPDATE",
    ),
    "window_update_on_a_stream": (
        lambda at: encoded(Kind.WINDOW_UPDATE, 0, at.stream, number(1)),
        "WINDOW_UPDATE",
    ),
    "goaway": (
        # It names the last stream that its receiver has begun: odd for a client (RFC 9113, 6.8).
        lambda at: encoded(
            Kind.GOAWAY, 0, 0, number(LAST_STREAM - isinstance(at.side, Client)) + number(0)
        ),
        "GOAWAY",
    ),
    "resets_of_an_ended_stream": (
        lambda at: encoded(Kind.RST_STREAM, 0, at.stream, number(8)),
        "reset",
    ),
}


@BOTH
@pytest.mark.parametrize("why", FLOODS)
def test_flood(mesh: Mesh, place: str, why: str) -> None:
    make, word = FLOODS[why]
    with attack(mesh, place) as at:
        say(at.side, [make(at)] * FLOOD)
        # libnghttp2 has limits of its own for some, and they may be met first.
        at.refused("h2_limit", "h2_protocol", word=word)


def test_rapid_reset(mesh: Mesh) -> None:
    """CVE-2023-44487."""
    with attack(mesh, "downstream") as at:
        streams = range(at.stream + 2, at.stream + 2 + 2 * FLOOD, 2)
        flood = [
            connect(at, stream) + encoded(Kind.RST_STREAM, 0, stream, number(8))
            for stream in streams
        ]
        say(at.side, flood)
        at.refused("h2_limit", word="reset before they were answered")


def test_server_caused_resets(mesh: Mesh) -> None:
    """CVE-2025-8671: streams that break the rules, so that our side resets them."""
    with attack(mesh, "downstream") as at:
        stream = at.stream
        with pytest.raises(Gone):  # noqa: PT012 - at any of these
            for stream in range(at.stream + 2, at.stream + 2 * FLOOD, 2):
                at.side.tls.send(connect(at, stream, (b":path", b"/")))
                while stream not in at.side.resets:
                    at.side.step()
        # Reset one by one, so that streams are never too many.
        assert stream > at.stream + BURST
        at.refused("h2_limit", word="broke HTTP/2")


def test_too_many_streams(mesh: Mesh) -> None:
    with attack(mesh, "downstream") as at:
        streams = range(at.stream + 2, at.stream + 2 + 2 * FLOOD, 2)
        say(at.side, [connect(at, stream) for stream in streams])
        at.refused("h2_limit", "h2_protocol")


def test_interim_answers_without_end(mesh: Mesh) -> None:
    """Upstream only: 1xx answers to one CONNECT that is never answered."""
    with attack(mesh, "upstream", answer=False) as at:
        interim = encoded(Kind.HEADERS, END_HEADERS, at.stream, literal([(b":status", b"103")]))
        say(at.side, [interim] * FLOOD)
        at.refused("h2_limit", word="interim")


# --- header bombs ---------------------------------------------------------------------------------

INDEXED: Final = b"\xbe"
"""RFC 7541, 6.1: the newest entry of the dynamic table."""


def incremental(name: bytes, value: bytes) -> bytes:
    """RFC 7541, 6.2.1: a literal field that goes into the dynamic table."""
    return b"\x40" + literal([(name, value)])[1:]


BOMBS: dict[str, Callable[[], bytes]] = {
    # CVE-2026-47774, CVE-2026-49975: one byte on the wire, four thousand when decoded.
    "indexed": lambda: incremental(b"bomb", b"x" * 3900) + INDEXED * 1000,
    # The same with a name that RFC 9113 forbids: dropped after it was decoded.
    "indexed_and_ignored": lambda: incremental(b"bo mb", b"x" * 3900) + INDEXED * 1000,
    # Many fields of no length, from the static table (accept-charset).
    "many_fields": lambda: b"\x8f" * 10_000,
    "one_long_field": lambda: literal([(b"long", b"x" * MOST_HEADER_BYTES)]),
    "cookie_crumbs": lambda: literal([(b"cookie", b"a=b")]) * 1000,
}


@pytest.mark.parametrize("where", ["request", "trailers", "answer"])
@pytest.mark.parametrize("why", BOMBS)
def test_header_bomb(mesh: Mesh, where: str, why: str) -> None:
    place = "upstream" if where == "answer" else "downstream"
    with attack(mesh, place, answer=False) as at:
        fields = [(b":method", b"CONNECT"), (b":authority", at.to.encode())]
        begin, stream, flags = {
            "request": (literal(fields), at.stream + 2, END_HEADERS),
            "trailers": (b"", at.stream, END_HEADERS | END_STREAM),
            "answer": (literal([(b":status", b"200")]), at.stream, END_HEADERS),
        }[where]
        say(at.side, [encoded(Kind.HEADERS, flags, stream, begin + BOMBS[why]())])
        at.refused("h2_limit", word="header")


CONTINUATIONS: dict[str, bytes] = {
    "continuation": literal([(b"more", b"x")]),
    # Envoy's empty_headers_continuation.
    "empty_headers_continuation": b"",
}


@BOTH
@pytest.mark.parametrize("why", CONTINUATIONS)
def test_continuation_flood(mesh: Mesh, place: str, why: str) -> None:
    """CVE-2024-28182: a header block without an end."""
    with attack(mesh, place, answer=False) as at:
        more = encoded(Kind.CONTINUATION, 0, at.stream, CONTINUATIONS[why])
        begin = encoded(Kind.HEADERS, END_STREAM, at.stream, CONTINUATIONS[why])
        say(at.side, [begin, *[more] * FLOOD])
        at.refused("h2_limit", "h2_protocol")


# --- illegal states -------------------------------------------------------------------------------

ILLEGAL: dict[str, Callable[[Attack], bytes]] = {
    "data_on_no_stream": lambda _: encoded(Kind.DATA, 0, 0, b"x"),
    "data_on_an_unknown_stream": lambda _: encoded(Kind.DATA, 0, HIGH + 1, b"x"),
    "headers_on_no_stream": lambda _: encoded(Kind.HEADERS, END_HEADERS, 0, b"\x82"),
    "headers_on_an_even_stream": lambda _: encoded(Kind.HEADERS, END_HEADERS, HIGH, b"\x82"),
    "headers_without_a_block_s_end": lambda at: (
        encoded(Kind.HEADERS, 0, at.stream, b"") + encoded(Kind.PING, 0, 0, bytes(8))
    ),
    "continuation_of_nothing": lambda at: encoded(Kind.CONTINUATION, END_HEADERS, at.stream, b""),
    "a_block_that_does_not_decode": lambda at: trailers(at, b"\xff\xff\xff\xff\xff\xff"),
    "a_table_of_four_gigabytes": lambda at: trailers(at, b"\x3f\xe1\xff\xff\xff\x0f"),
    "rst_on_no_stream": lambda _: encoded(Kind.RST_STREAM, 0, 0, number(8)),
    "rst_on_an_unknown_stream": lambda _: encoded(Kind.RST_STREAM, 0, HIGH + 1, number(8)),
    "rst_of_another_length": lambda at: encoded(Kind.RST_STREAM, 0, at.stream, b"\0"),
    "settings_on_a_stream": lambda at: encoded(Kind.SETTINGS, 0, at.stream),
    "settings_of_half_an_entry": lambda _: encoded(Kind.SETTINGS, 0, 0, b"\0\4\0"),
    "settings_answer_with_entries": lambda _: encoded(Kind.SETTINGS, ACK, 0, bytes(6)),
    "a_window_too_large": lambda _: encoded(
        Kind.SETTINGS, 0, 0, struct.pack("!HI", 4, LAST_STREAM + 1)
    ),
    "a_frame_size_too_small": lambda _: encoded(Kind.SETTINGS, 0, 0, struct.pack("!HI", 5, 1)),
    "ping_on_a_stream": lambda at: encoded(Kind.PING, 0, at.stream, bytes(8)),
    "ping_of_another_length": lambda _: encoded(Kind.PING, 0, 0, bytes(7)),
    "window_update_of_zero": lambda _: encoded(Kind.WINDOW_UPDATE, 0, 0, number(0)),
    "window_update_too_far": lambda _: encoded(Kind.WINDOW_UPDATE, 0, 0, number(LAST_STREAM)) * 2,
    "window_update_on_an_unknown_stream": lambda _: encoded(
        Kind.WINDOW_UPDATE, 0, HIGH + 1, number(1)
    ),
    "goaway_on_a_stream": lambda at: encoded(Kind.GOAWAY, 0, at.stream, bytes(8)),
    "push_promise": lambda at: encoded(
        Kind.PUSH_PROMISE, END_HEADERS, at.stream, number(2) + b"\x82"
    ),
    "more_padding_than_payload": lambda at: encoded(Kind.DATA, PADDED, at.stream, b"\xffx"),
    "a_frame_too_large": lambda at: encoded(Kind.DATA, 0, at.stream, bytes(1024 * 1024 + 1)),
}


@BOTH
@pytest.mark.parametrize("why", ILLEGAL)
def test_illegal_state(mesh: Mesh, place: str, why: str) -> None:
    with attack(mesh, place) as at:
        assert say(at.side, [ILLEGAL[why](at)])
        at.refused("h2_protocol", "h2_limit")


STREAM_ERRORS: dict[str, Callable[[Attack], bytes]] = {
    "window_update_of_zero": lambda at: encoded(Kind.WINDOW_UPDATE, 0, at.stream, number(0)),
    "window_update_too_far": lambda at: (
        encoded(Kind.WINDOW_UPDATE, 0, at.stream, number(LAST_STREAM)) * 2
    ),
    "headers_in_the_middle": lambda at: encoded(Kind.HEADERS, END_HEADERS, at.stream, b"\x8f"),
    "a_bomb_after_an_invalid_field": lambda at: trailers(
        at, literal([(b"BOMB", b"x")]) + incremental(b"bomb", b"x" * 3900) + INDEXED * 10_000
    ),
    "more_data_than_its_window": lambda at: (
        encoded(Kind.DATA, 0, at.stream, bytes(1024 * 1024)) * 17
    ),
    "status_in_trailers": lambda at: trailers(at, literal([(b":status", b"200")])),
    "data_after_the_end": lambda at: (
        encoded(Kind.DATA, END_STREAM, at.stream, b"x") + encoded(Kind.DATA, 0, at.stream, b"y")
    ),
}


@BOTH
@pytest.mark.parametrize("why", STREAM_ERRORS)
def test_error_on_a_stream_ends_the_stream_or_the_connection(
    mesh: Mesh, place: str, why: str
) -> None:
    with attack(mesh, place) as at:
        at.side.tls.send(STREAM_ERRORS[why](at))
        try:
            while at.stream not in at.side.resets:
                at.side.step()
        except Gone:
            at.refused("h2_protocol", "h2_limit")


MALFORMED: dict[str, list[tuple[bytes, bytes]]] = {
    "no_status": [(b"server", b"x")],
    "no_number": [(b":status", b"+20")],
    "two": [(b":status", b"200"), (b":status", b"200")],
    "switching_protocols": [(b":status", b"101")],
    "a_field_of_http_1": [(b":status", b"200"), (b"transfer-encoding", b"chunked")],
}


@pytest.mark.parametrize("why", MALFORMED)
def test_a_malformed_answer_is_told_from_a_reset_of_the_peers(mesh: Mesh, why: str) -> None:
    """RFC 9113, 8.1.1: it is we who reset the stream, and the log must not say that they did."""
    with attack(mesh, "upstream", answer=False) as at:
        port = int(at.to.rpartition(":")[2])
        known = len(mesh.lines(at.pod, "outbound", port))
        at.side.send_headers(at.stream, MALFORMED[why])
        while at.stream not in at.side.resets:
            at.side.step()
        (line,) = wait_until(lambda: mesh.lines(at.pod, "outbound", port)[known:], "its line")
        assert line["reason"] == "h2_protocol"


def test_data_on_a_closed_stream_is_given_back_and_harmless(mesh: Mesh) -> None:
    """More of it than the connection's window: it is counted as read."""
    with attack(mesh, "downstream") as at:
        assert isinstance(at.side, Client)
        at.side.reset(at.stream)
        for _ in range(20):
            at.side.frame(Kind.DATA, 0, at.stream, bytes(1024 * 1024))
            while at.side.has_come():
                at.side.step()
        assert at.side.status(at.side.connect(at.to)) == 200


# --- what honest peers do is no abuse -------------------------------------------------------------


def test_keepalive_does_not_trigger_a_flood(mesh: Mesh) -> None:
    """Envoy's keepalive_triggers_flood: useless frames within the budget, again and again."""
    with attack(mesh, "downstream") as at:
        assert isinstance(at.side, Client)
        for _ in range(BURST // 4):
            at.side.frame(Kind.PING, 0, 0, bytes(8))
            at.side.frame(Kind.SETTINGS, 0, 0)
            while at.side.has_come():
                at.side.step()
        assert at.side.status(at.side.connect(at.to)) == 200


def test_many_window_updates_for_much_data_are_no_flood(mesh: Mesh) -> None:
    """A reader that gives back each KiB of what it has read, twice over the budget."""
    size = 3 * BURST * 1024
    listener = mesh.listen("far")
    client = mesh.hbone("twin", "far")
    stream = client.connect(authority(mesh.address("far"), listener.getsockname()[1]))
    assert client.status(stream) == 200
    app, _ = mesh.accept(listener)
    app.setblocking(False)
    block, sent, received = bytes(64 * 1024), 0, 0
    while received < size:
        while sent < size:
            try:
                sent += app.send(block[: size - sent])
            except BlockingIOError:
                break
        received += len(client.step().payload)
        while (had := len(client.data.get(stream, b""))) >= 1024:
            client.receive(stream, 1024)
            grant = encoded(Kind.WINDOW_UPDATE, 0, 0, number(1024))
            client.tls.send(grant + encoded(Kind.WINDOW_UPDATE, 0, stream, number(1024)))
            assert had
    stream = client.connect(authority(mesh.address("far"), listener.getsockname()[1]))
    assert client.status(stream) == 200


def test_small_messages_with_padding_are_no_flood(mesh: Mesh) -> None:
    """RFC 9113, 10.7: who hides how long a message is pads it, and a keystroke is short."""
    with attack(mesh, "downstream") as at:
        message = encoded(Kind.DATA, PADDED, at.stream, b"\x07" + b"x" + bytes(7)) * 100
        for _ in range(FLOOD // 100):
            # In pieces that are no frames, so that each byte of a frame comes first in one of them.
            for begin in range(0, len(message), 101):
                at.side.tls.send(message[begin : begin + 101])
            while at.side.has_come():
                at.side.step()
        assert isinstance(at.side, Client)
        assert at.side.status(at.side.connect(at.to)) == 200


def test_answered_streams_that_are_reset_are_no_rapid_reset(mesh: Mesh) -> None:
    """However quickly: each has cost its sender a connection, and others live beside it."""
    listener = mesh.listen("far")
    client = mesh.hbone("twin", "far")
    to = authority(mesh.address("far"), listener.getsockname()[1])
    for _ in range(3 * BURST // 100):
        streams = [client.connect(to) for _ in range(100)]
        for stream in streams:
            assert client.status(stream) == 200
            client.reset(stream)
            mesh.accept(listener)[0].close()
    assert client.status(client.connect(to)) == 200


def test_an_application_that_resets_all_its_connections_harms_nobody(mesh: Mesh) -> None:
    """More than the budget, one by one: each was answered, and so is no rapid reset."""
    listener = mesh.listen("far")
    bystander, app, _ = mesh.call("client", "far")
    for _ in range(2 * BURST):
        sock, far, _ = mesh.call("client", "far", listener=listener)
        reset(sock)
        far.close()
    mesh.carries(bystander, app)
    bystander.close()
    assert read_all(app) == b""
