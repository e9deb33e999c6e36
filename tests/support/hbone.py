"""An HBONE peer that can misbehave: TLS by pyOpenSSL, and just enough HTTP/2 to ask and to answer.

Owns the other side of port 15008 in tests, client or server. It shares no code with the product.
Everything is sent exactly as told, right or wrong; header blocks are literal (RFC 7541, 6.2.2) and
what comes back is read by libnghttp2's decoder. Every wait ends at the socket's timeout.

    identity = Shown.by(workload(ca, "spiffe://…"), chain=[ca], roots=[root])
    client = Client(connected_socket, identity.context())
    stream = client.connect("10.244.2.2:8080")
    assert client.status(stream) == 200
"""

from __future__ import annotations

import contextlib
import ctypes
import ctypes.util
import dataclasses
import enum
import select
import socket
import struct
from collections.abc import Sequence
from typing import Final, NamedTuple

from cryptography import x509
from OpenSSL import SSL, crypto

from support.certificates import Identity

__all__ = [
    "Client",
    "Frame",
    "Gone",
    "Kind",
    "Server",
    "Shown",
    "StreamReset",
    "Tls",
    "encoded",
    "literal",
]

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
READ_BYTES: Final = 65536
END_STREAM: Final = 0x1
ACK: Final = 0x1
END_HEADERS: Final = 0x4
WINDOW: Final = 1 << 30


class Kind(enum.IntEnum):
    """Types of frames (RFC 9113, 6)."""

    DATA = 0
    HEADERS = 1
    PRIORITY = 2
    RST_STREAM = 3
    SETTINGS = 4
    PUSH_PROMISE = 5
    PING = 6
    GOAWAY = 7
    WINDOW_UPDATE = 8
    CONTINUATION = 9
    PRIORITY_UPDATE = 0x10


class Gone(Exception):  # noqa: N818 - an end, no error
    """The other side has ended the connection: by an alert, FIN, reset or GOAWAY (in words)."""


class StreamReset(Exception):  # noqa: N818 - an end, no error
    """RST_STREAM; the argument is its error code."""


class Frame(NamedTuple):
    kind: int
    flags: int
    stream: int
    payload: bytes


Headers = list[tuple[bytes, bytes]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shown:
    """What a side of TLS shows and believes: by default as HBONE wants it."""

    leaf: Identity | None
    chain: Sequence[x509.Certificate] = ()
    alpn: bytes = b"h2"
    version: int = SSL.TLS1_3_VERSION

    def context(self, *, server: bool = False) -> SSL.Context:
        """Return a context that shows this, and asks for the other side's chain unchecked."""
        context = SSL.Context(SSL.TLS_SERVER_METHOD if server else SSL.TLS_CLIENT_METHOD)
        context.set_min_proto_version(self.version)
        context.set_max_proto_version(self.version)
        if self.leaf is not None:
            context.use_certificate(self.leaf.certificate)
            context.use_privatekey(self.leaf.key)
            for one in self.chain:
                context.add_extra_chain_cert(one)
        if server:
            context.set_alpn_select_callback(
                lambda _, offered: (
                    self.alpn if self.alpn in offered else SSL.NO_OVERLAPPING_PROTOCOLS
                )
            )
        elif self.alpn:
            context.set_alpn_protos([self.alpn])
        context.set_verify(SSL.VERIFY_PEER, lambda *_: True)
        return context


class Tls:
    """TLS over a connected socket, which it owns. Methods raise Gone when the other side ended."""

    def __init__(self, sock: socket.socket, context: SSL.Context, *, server: bool = False) -> None:
        self.sock = sock
        self._tls = SSL.Connection(context, None)
        if server:
            self._tls.set_accept_state()
        else:
            self._tls.set_connect_state()

    def handshake(self) -> None:
        while True:
            try:
                self._tls.do_handshake()
            except SSL.WantReadError:
                self._flush()
                self._fill()
            except SSL.Error as error:
                self._flush()
                raise Gone(f"TLS: {error}") from None
            else:
                self._flush()
                return

    def send(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            # pyOpenSSL writes one record at a time, and says how much of `rest` it was.
            rest = rest[self._tls.send(rest[:READ_BYTES].tobytes()) :]
            self._flush()

    def receive(self) -> bytes:
        while True:
            try:
                return self._tls.recv(READ_BYTES)
            except SSL.WantReadError:
                self._flush()
                self._fill()
            except SSL.ZeroReturnError:
                raise Gone("close_notify") from None
            except SSL.Error as error:
                raise Gone(f"TLS: {error}") from None

    def peer(self) -> x509.Certificate:
        """Return the certificate that the other side has shown."""
        found: crypto.X509 | None = self._tls.get_peer_certificate()
        assert found is not None
        return found.to_cryptography()

    def identity(self) -> str:
        """Return the one URI that the other side's certificate names."""
        names = self.peer().extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        (found,) = names.get_values_for_type(x509.UniformResourceIdentifier)
        return found

    def close(self) -> None:
        self.sock.close()

    def _flush(self) -> None:
        with contextlib.suppress(SSL.WantReadError):
            while True:
                data = self._tls.bio_read(READ_BYTES)
                try:
                    self.sock.sendall(data)
                except OSError as error:
                    # What it said before it ended may still be in the receive buffer.
                    if not isinstance(error, ConnectionResetError | BrokenPipeError):
                        raise

    def has_come(self, seconds: float = 0) -> bool:
        """Whether `receive` would have something to say, now or within `seconds`."""
        try:
            # Of what was read from the socket before, too.
            self._tls.recv(1, socket.MSG_PEEK)
        except SSL.WantReadError:
            return bool(select.select([self.sock], [], [], seconds)[0])
        except SSL.Error:
            return True
        return True

    def _fill(self) -> None:
        try:
            data = self.sock.recv(READ_BYTES)
        except ConnectionResetError:
            raise Gone("reset") from None
        if not data:
            raise Gone("FIN")
        self._tls.bio_write(data)


class _Field(ctypes.Structure):
    """nghttp2_nv (nghttp2.h)."""

    _fields_ = (
        ("name", ctypes.POINTER(ctypes.c_uint8)),
        ("value", ctypes.POINTER(ctypes.c_uint8)),
        ("namelen", ctypes.c_size_t),
        ("valuelen", ctypes.c_size_t),
        ("flags", ctypes.c_uint8),
    )


class _Inflater:
    """HPACK, read by libnghttp2."""

    EMIT: Final = 0x2
    FINAL: Final = 0x1

    def __init__(self) -> None:
        name = ctypes.util.find_library("nghttp2")
        assert name is not None, "libnghttp2 is not installed"
        self._library = ctypes.CDLL(name)
        self._library.nghttp2_hd_inflate_hd2.restype = ctypes.c_ssize_t
        self._state = ctypes.c_void_p()
        assert self._library.nghttp2_hd_inflate_new(ctypes.byref(self._state)) == 0

    def __del__(self) -> None:
        self._library.nghttp2_hd_inflate_del(self._state)

    def read(self, block: bytes) -> Headers:
        found: Headers = []
        at = 0
        while True:
            field, flags = _Field(), ctypes.c_int(0)
            rest = block[at:]
            taken = self._library.nghttp2_hd_inflate_hd2(
                self._state,
                ctypes.byref(field),
                ctypes.byref(flags),
                rest,
                ctypes.c_size_t(len(rest)),
                ctypes.c_int(1),
            )
            assert taken >= 0, f"bad header block: {taken}"
            at += taken
            if flags.value & self.EMIT:
                name = ctypes.string_at(field.name, field.namelen)
                found.append((name, ctypes.string_at(field.value, field.valuelen)))
            if flags.value & self.FINAL:
                self._library.nghttp2_hd_inflate_end_headers(self._state)
                return found


def _integer(number: int, bits: int) -> bytes:
    """RFC 7541, 5.1, with the first byte's upper bits clear."""
    most = (1 << bits) - 1
    if number < most:
        return bytes([number])
    rest = bytearray([most])
    number -= most
    while number >= 128:
        rest.append(number % 128 + 128)
        number //= 128
    return bytes([*rest, number])


def literal(fields: Sequence[tuple[bytes, bytes]]) -> bytes:
    return b"".join(
        b"\0" + _integer(len(name), 7) + name + _integer(len(value), 7) + value
        for name, value in fields
    )


def encoded(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """Return a frame (RFC 9113, 4.1)."""
    head = struct.pack("!I", len(payload))[1:] + struct.pack("!BBI", kind, flags, stream)
    return head + payload


class _Side:
    """What client and server share."""

    def __init__(self, tls: Tls) -> None:
        self.tls = tls
        self._buffer = b""
        self._inflater = _Inflater()
        self.headers: dict[int, Headers] = {}
        self.data: dict[int, bytes] = {}
        self.ended: set[int] = set()
        self.resets: dict[int, int] = {}
        self.goaways: list[int] = []
        """The last stream that each GOAWAY named."""

    def frame(self, kind: int, flags: int, stream: int, payload: bytes = b"") -> None:
        self.tls.send(encoded(kind, flags, stream, payload))

    def settings(self, *extra: tuple[int, int]) -> None:
        """Send SETTINGS (INITIAL_WINDOW_SIZE and `extra`) and open the connection's window."""
        self.limits((4, WINDOW), *extra)
        self.frame(Kind.WINDOW_UPDATE, 0, 0, struct.pack("!I", WINDOW))

    def limits(self, *settings: tuple[int, int]) -> None:
        """Send SETTINGS of these identifiers and values, and nothing else."""
        self.frame(Kind.SETTINGS, 0, 0, b"".join(struct.pack("!HI", *each) for each in settings))

    def goaway(self, last_stream: int, code: int = 0) -> None:
        self.frame(Kind.GOAWAY, 0, 0, struct.pack("!II", last_stream, code))

    def send_headers(
        self, stream: int, fields: Sequence[tuple[bytes, bytes]], *, end: bool = False
    ) -> None:
        flags = END_HEADERS | (END_STREAM if end else 0)
        self.frame(Kind.HEADERS, flags, stream, literal(fields))

    def send(self, stream: int, data: bytes, *, end: bool = False) -> None:
        self.frame(Kind.DATA, END_STREAM if end else 0, stream, data)

    def reset(self, stream: int, code: int = 8) -> None:
        self.frame(Kind.RST_STREAM, 0, stream, struct.pack("!I", code))

    def has_come(self, seconds: float = 0) -> bool:
        """Whether there is something of a frame to take in, now or within `seconds`."""
        return bool(self._buffer) or self.tls.has_come(seconds)

    def frame_in(self) -> Frame:
        """Take one frame in and do nothing about it. Raises Gone."""
        while len(self._buffer) < 9:
            self._buffer += self.tls.receive()
        length = int.from_bytes(self._buffer[:3])
        kind, flags, stream = struct.unpack("!BBI", self._buffer[3:9])
        while len(self._buffer) < 9 + length:
            self._buffer += self.tls.receive()
        payload = self._buffer[9 : 9 + length]
        self._buffer = self._buffer[9 + length :]
        return Frame(kind, flags, stream, payload)

    def step(self) -> Frame:
        """Take one frame in, do what HTTP/2 demands at once, and return it. Raises Gone."""
        frame = self.frame_in()
        if frame.kind == Kind.HEADERS:
            self.headers[frame.stream] = self._inflater.read(frame.payload)
        elif frame.kind == Kind.DATA:
            self.data[frame.stream] = self.data.get(frame.stream, b"") + frame.payload
        elif frame.kind == Kind.RST_STREAM:
            self.resets[frame.stream] = int.from_bytes(frame.payload)
        elif frame.kind == Kind.SETTINGS and not frame.flags & ACK:
            self.frame(Kind.SETTINGS, ACK, 0)
        elif frame.kind == Kind.PING and not frame.flags & ACK:
            self.frame(Kind.PING, ACK, 0, frame.payload)
        elif frame.kind == Kind.GOAWAY:
            self.goaways.append(int.from_bytes(frame.payload[:4]))
            raise Gone(f"GOAWAY {int.from_bytes(frame.payload[4:8])}")
        if frame.kind in (Kind.HEADERS, Kind.DATA) and frame.flags & END_STREAM:
            self.ended.add(frame.stream)
        return frame

    def receive(self, stream: int, length: int) -> bytes:
        """Return `length` bytes of the stream's data. Raises StreamReset, Gone."""
        while len(self.data.get(stream, b"")) < length:
            if stream in self.resets:
                raise StreamReset(self.resets[stream])
            self.step()
        found = self.data[stream]
        self.data[stream] = found[length:]
        return found[:length]

    def close(self) -> None:
        self.tls.close()


class Client(_Side):
    """The side that asks. Making it performs the handshake and sends the preface."""

    def __init__(self, sock: socket.socket, context: SSL.Context) -> None:
        super().__init__(Tls(sock, context))
        self._next = 1
        self.tls.handshake()
        self.tls.send(PREFACE)
        self.settings()

    def ask(self, fields: Sequence[tuple[bytes, bytes]]) -> int:
        """Send a request of these header fields and return its stream."""
        stream, self._next = self._next, self._next + 2
        self.send_headers(stream, fields)
        return stream

    def connect(self, authority: str, *extra: tuple[bytes, bytes]) -> int:
        return self.ask([(b":method", b"CONNECT"), (b":authority", authority.encode()), *extra])

    def status(self, stream: int) -> int:
        """Return the answer's status. Raises StreamReset, Gone."""
        while stream not in self.headers:
            if stream in self.resets:
                raise StreamReset(self.resets[stream])
            self.step()
        return int(dict(self.headers[stream])[b":status"])


class Server(_Side):
    """The side that answers. Making it performs the handshake and reads the preface."""

    def __init__(
        self, sock: socket.socket, context: SSL.Context, extra: Sequence[tuple[int, int]] = ()
    ) -> None:
        super().__init__(Tls(sock, context, server=True))
        self.tls.handshake()
        self.settings(*extra)
        while len(self._buffer) < len(PREFACE):
            self._buffer += self.tls.receive()
        assert self._buffer.startswith(PREFACE)
        self._buffer = self._buffer[len(PREFACE) :]

    def request(self) -> tuple[int, dict[str, str]]:
        """Return the next request's stream and header fields. Raises Gone."""
        while True:
            frame = self.step()
            if frame.kind == Kind.HEADERS:
                fields = self.headers[frame.stream]
                return frame.stream, {name.decode(): value.decode() for name, value in fields}

    def answer(self, stream: int, status: int, *, end: bool = False) -> None:
        self.send_headers(stream, [(b":status", str(status).encode())], end=end)
