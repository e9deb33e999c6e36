"""Connections whose every byte is checked, both ways, and what became of each.

This module owns the traffic of the soak: a stream of bytes that depends on a connection's key and
on the place in it, the servers and clients that send and compare it, and the ledger of outcomes.
It promises that a byte that is wrong, missing, doubled or out of order is noticed by whoever reads
it, that an end which looks orderly in the middle of a stream is noticed too, and that each
connection has exactly one outcome. It may not know of daemons, faults or policies.
"""

from __future__ import annotations

import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

__all__ = ["BULK", "ROUNDS", "Ledger", "Outcome", "Shape", "Traffic"]

PERIOD: Final = (1 << 24) - 3
"""Bytes after which the stream repeats: a prime, so that no buffer's size divides it."""

CHUNK: Final = 256 * 1024
"""Bytes of one call: those of the tunnel's own, so that its edges are met."""

PATIENCE: Final = 60.0
"""Seconds without a byte after which a connection counts as stuck: a daemon's restart takes a
few, on a busy machine some more."""

HEADER: Final = struct.Struct("!QQQIB")
"""Key, bytes up and down of one round, rounds, and how."""

ROUNDS: Final = 0
"""Question and answer in turn."""
BULK: Final = 1
"""Both directions at once, one round."""

_random = random.Random(20_011)  # noqa: S311 - a pattern, not a secret
_stream: Final = memoryview((block := _random.randbytes(PERIOD)) + block[:CHUNK])
del block


class WrongBytesError(Exception):
    """What was read is not what was sent."""


class TruncatedError(Exception):
    """An orderly end in the middle of a stream: whoever reads would take it for all there is."""


@dataclass(frozen=True)
class Shape:
    """What one connection does: `rounds` times `up` bytes to the server and `down` bytes back."""

    up: int
    down: int
    rounds: int = 1
    how: int = ROUNDS


@dataclass(frozen=True)
class Outcome:
    """A connection that did not end as it should. Times are monotonic, seconds."""

    kind: str
    began: float
    ended: float
    problem: str


@dataclass
class Ledger:
    """What became of every connection. `judge` names the outcomes that are allowed; it is asked for
    each failure, and for each success too, once the traffic has stopped.
    """

    succeeded: Counter[str] = field(default_factory=Counter)
    bytes: int = 0
    failed: list[Outcome] = field(default_factory=list)
    passed: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    """What no fault excuses."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def success(self, kind: str, began: float, ended: float, count: int, *, keep: bool) -> None:
        with self._lock:
            self.succeeded[kind] += 1
            self.bytes += count
            if keep:
                self.passed.setdefault(kind, []).append((began, ended))

    def failure(self, outcome: Outcome) -> None:
        with self._lock:
            self.failed.append(outcome)

    def is_wrong(self, what: str) -> None:
        with self._lock:
            self.wrong.append(what)


def _send(sock: socket.socket, key: int, start: int, count: int) -> None:
    end = start + count
    while start < end:
        at = (key + start) % PERIOD
        start += sock.send(_stream[at : at + min(CHUNK, end - start)])


def _receive(sock: socket.socket, key: int, start: int, count: int, room: memoryview) -> None:
    end = start + count
    while start < end:
        got = sock.recv_into(room, min(CHUNK, end - start))
        if not got:
            raise TruncatedError(f"an end after {start} of {end} bytes")
        at = (key + start) % PERIOD
        if room[:got] != _stream[at : at + got]:
            raise WrongBytesError(f"between bytes {start} and {start + got} of key {key}")
        start += got


def _both(sock: socket.socket, out: int, into: int, sent: int, received: int) -> None:
    """Send and receive at once. Raises what either raises."""
    problem: list[OSError] = []

    def send() -> None:
        try:
            _send(sock, out, 0, sent)
        except OSError as error:
            problem.append(error)

    thread = threading.Thread(target=send, name="soak-sends")
    thread.start()
    try:
        _receive(sock, into, 0, received, memoryview(bytearray(CHUNK)))
    except TruncatedError:
        thread.join()
        # A reset is told once: when it was the sender who heard of it, the reader sees an end. Only
        # a reset behind a real end is told as EPIPE (net/ipv4/tcp_input.c, tcp_reset).
        if problem and isinstance(problem[0], ConnectionResetError):
            raise problem[0] from None
        raise
    except OSError:
        thread.join()
        raise
    except WrongBytesError:
        sock.shutdown(socket.SHUT_RDWR)
        thread.join()
        raise
    thread.join()
    if problem:
        raise problem[0]


def abort(sock: socket.socket) -> None:
    """Close with a reset: what failed must not look complete to the other side (socket(7))."""
    if sock.fileno() >= 0:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.close()


def _header(sock: socket.socket) -> bytes:
    head = b""
    while len(head) < HEADER.size:
        part = sock.recv(HEADER.size - len(head))
        if not part:
            raise TruncatedError(f"an end after {len(head)} bytes of the header")
        head += part
    return head


def _expect_end(sock: socket.socket) -> None:
    if sock.recv(1):
        raise WrongBytesError("a byte behind the last")


def _talk(sock: socket.socket, key: int, shape: Shape, *, client: bool) -> None:
    """Play one side of a connection to its orderly end."""
    ours, theirs = (key, key + 1) if client else (key + 1, key)
    to, back = (shape.up, shape.down) if client else (shape.down, shape.up)
    if shape.how == BULK:
        _both(sock, ours, theirs, to, back)
    else:
        room = memoryview(bytearray(min(CHUNK, max(back, 1))))
        for number in range(shape.rounds):
            if client:
                _send(sock, ours, number * to, to)
            _receive(sock, theirs, number * back, back, room)
            if not client:
                _send(sock, ours, number * to, to)
    if client:
        sock.shutdown(socket.SHUT_WR)
        _expect_end(sock)
    else:
        _expect_end(sock)
        sock.shutdown(socket.SHUT_WR)


class Traffic:
    """Servers and clients on threads of their own; `stop` waits for the last connection's end."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._stopping = threading.Event()
        self._clients: list[threading.Thread] = []
        self._listeners: list[socket.socket] = []
        self._keys = random.Random(7)  # noqa: S311 - where in the pattern a stream begins
        self._lock = threading.Lock()

    def serve(self, listener: socket.socket) -> None:
        self._listeners.append(listener)
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def run(
        self,
        kind: str,
        connect: Callable[[], socket.socket],
        shape: Shape,
        *,
        keep: bool = False,
        pause: float = 0.0,
    ) -> None:
        """Make connections of this shape, one after the other, until told to stop.

        `keep` records the times of those that succeed; `pause` is in seconds, between two.
        """

        def loop() -> None:
            while not self._stopping.wait(pause):
                self._one(kind, connect, shape, keep=keep)

        thread = threading.Thread(target=loop, name=f"soak-{kind}", daemon=True)
        self._clients.append(thread)
        thread.start()

    def pause(self) -> None:
        """End the clients' connections in good order; the servers stay. Raises TimeoutError."""
        self._stopping.set()
        for thread in self._clients:
            thread.join(2 * PATIENCE)
            if thread.is_alive():
                raise TimeoutError(f"{thread.name} does not end")
        self._clients.clear()
        self._stopping.clear()

    def close(self) -> None:
        self._stopping.set()
        for listener in self._listeners:
            # Wakes the thread in accept(), which close() alone does not (Linux).
            listener.shutdown(socket.SHUT_RDWR)
            listener.close()

    def _key(self) -> int:
        with self._lock:
            return self._keys.randrange(PERIOD)

    def _one(
        self, kind: str, connect: Callable[[], socket.socket], shape: Shape, *, keep: bool
    ) -> None:
        key = self._key()
        began = time.monotonic()
        problem = ""
        sock: socket.socket | None = None
        try:
            sock = connect()
            sock.sendall(HEADER.pack(key, shape.up, shape.down, shape.rounds, shape.how))
            _talk(sock, key, shape, client=True)
            sock.close()
        except (WrongBytesError, TruncatedError) as error:
            self._ledger.is_wrong(f"{kind}, client: {error}")
            problem = str(error)
        except OSError as error:
            problem = f"{type(error).__name__}: {error}"
        finally:
            if sock is not None and problem:
                abort(sock)
        ended = time.monotonic()
        if problem:
            self._ledger.failure(Outcome(kind, began, ended, problem))
        else:
            count = (shape.up + shape.down) * shape.rounds
            self._ledger.success(kind, began, ended, count, keep=keep)

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        sock.settimeout(PATIENCE)
        try:
            key, up, down, rounds, how = HEADER.unpack(_header(sock))
            _talk(sock, key, Shape(up, down, rounds, how), client=False)
            sock.close()
        except (WrongBytesError, TruncatedError) as error:
            self._ledger.is_wrong(f"server: {error}")
            abort(sock)
        except OSError:
            # The client sees the same end, and it is the client who is asked.
            abort(sock)
