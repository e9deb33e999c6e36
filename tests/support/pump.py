"""Much data both ways at once, and the proof that it arrived.

This module owns what is sent and its digests. It promises that both sides send while they receive,
to the end of either direction. It may not know what lies between the two sockets.
"""

from __future__ import annotations

import hashlib
import socket
import threading
from collections.abc import Iterable, Iterator

__all__ = ["exchange", "turned"]


def turned(block: bytes, count: int) -> Iterator[bytes]:
    """Give a block `count` times, each time begun one byte later: no two are alike."""
    for number in range(count):
        yield block[number:] + block[:number]


def exchange(
    near: socket.socket, far: socket.socket, there: Iterable[bytes], back: Iterable[bytes]
) -> None:
    """Send `there` from near to far and `back` from far to near; assert that all arrives intact."""
    result: list[tuple[str, str]] = []
    thread = threading.Thread(target=lambda: result.append(_pump(far, back)))
    thread.start()
    sent, received = _pump(near, there)
    thread.join()
    assert result == [(received, sent)]


def _pump(sock: socket.socket, blocks: Iterable[bytes]) -> tuple[str, str]:
    """Send and read to the end at once; digests of what was sent and received."""
    sent, received = hashlib.sha256(), hashlib.sha256()

    def send() -> None:
        for block in blocks:
            sent.update(block)
            sock.sendall(block)
        sock.shutdown(socket.SHUT_WR)

    thread = threading.Thread(target=send)
    thread.start()
    while data := sock.recv(1 << 20):
        received.update(data)
    thread.join()
    return sent.hexdigest(), received.hexdigest()
