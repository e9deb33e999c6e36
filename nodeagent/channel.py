"""One connection of the seam: frames and descriptors over a unix stream socket.

This module owns a connected non-blocking socket and the descriptors that have arrived on it and
nobody has taken yet. It promises that a frame is delivered with exactly its own descriptors, that
descriptors lost by the kernel end the connection instead of shifting to another frame, and that
`close` leaks none. It may not know what the messages mean.
"""

from __future__ import annotations

import array
import asyncio
import os
import socket
import struct
from collections import deque
from typing import TYPE_CHECKING, Final

import msgspec

from ztunnel import protocol

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = ["Channel", "Closed", "Peer", "Received", "close_all"]

READ_SIZE: Final = 64 * 1024
"""Bytes taken by one recvmsg: a few messages, far below a frame's limit."""

_INT = struct.calcsize("i")
_UCRED = struct.Struct("3i")


class Closed(Exception):  # noqa: N818 - an ordinary end, not an error
    """The other side closed the connection."""


class Peer(msgspec.Struct, frozen=True):
    """Who is at the other end, from the kernel (SO_PEERCRED, unix(7))."""

    pid: int
    uid: int
    gid: int


class Received(msgspec.Struct, frozen=True):
    """A message and its descriptors, which now belong to the receiver."""

    message: protocol.Message
    fds: tuple[int, ...]


class Channel:
    """Frames in, frames out. One receiver and one sender at a time."""

    def __init__(self, connected: socket.socket) -> None:
        connected.settimeout(0)
        self._socket = connected
        self._decoder = protocol.FrameDecoder()
        self._fds: deque[int] = deque()
        self._ready: deque[Received] = deque()

    def peer(self) -> Peer:
        data = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
        return Peer(*_UCRED.unpack(data))

    async def receive(self) -> Received:
        """Return the next message. Raises Closed, ProtocolError or OSError; all end the channel."""
        while not self._ready:
            try:
                data = self._read()
            except BlockingIOError:
                await _ready(self._socket, write=False)
                continue
            if not data:
                raise Closed
            for frame in self._decoder.feed(data):
                if len(self._fds) < frame.fds:
                    raise protocol.ProtocolError(
                        f"frame announces {frame.fds} descriptors, {len(self._fds)} came"
                    )
                fds = tuple(self._fds.popleft() for _ in range(frame.fds))
                self._ready.append(Received(frame.message, fds))
            if len(self._fds) > protocol.MAX_FDS:
                raise protocol.ProtocolError("more descriptors came than a frame may carry")
        return self._ready.popleft()

    def _read(self) -> bytes:
        space = socket.CMSG_SPACE(protocol.MAX_FDS * _INT)
        data, ancillary, flags, _ = self._socket.recvmsg(READ_SIZE, space, socket.MSG_CMSG_CLOEXEC)
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                numbers = array.array("i")
                numbers.frombytes(content[: len(content) - len(content) % _INT])
                self._fds.extend(numbers)
        if flags & socket.MSG_CTRUNC:
            # At the descriptor limit the kernel drops them silently: nothing later can be trusted.
            raise protocol.ProtocolError("descriptors were lost (MSG_CTRUNC); raise LimitNOFILE")
        return data

    async def send(self, message: protocol.Message, fds: Sequence[int] = ()) -> None:
        """Send one frame. Raises OSError. After a cancellation the channel is of no further use."""
        view = memoryview(protocol.encode(message, len(fds)))
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        while view:
            try:
                sent = self._socket.sendmsg([view], rights, socket.MSG_NOSIGNAL)
            except BlockingIOError:
                await _ready(self._socket, write=True)
                continue
            view = view[sent:]
            rights = []

    def close(self) -> None:
        """Close the socket and every descriptor that nobody took."""
        self._socket.close()
        close_all(self._fds)
        for received in self._ready:
            close_all(received.fds)
        self._fds.clear()
        self._ready.clear()


def close_all(fds: Iterable[int]) -> None:
    """Close descriptors that we own."""
    for fd in fds:
        os.close(fd)


async def _ready(waiting: socket.socket, *, write: bool) -> None:
    loop = asyncio.get_running_loop()
    future: asyncio.Future[None] = loop.create_future()

    def wake() -> None:
        if not future.done():
            future.set_result(None)

    add, remove = (
        (loop.add_writer, loop.remove_writer) if write else (loop.add_reader, loop.remove_reader)
    )
    add(waiting, wake)
    try:
        await future
    finally:
        # A closed socket has no number any more, and left the loop when it was closed.
        if waiting.fileno() >= 0:
            remove(waiting)
