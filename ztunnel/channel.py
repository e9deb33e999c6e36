"""The socket under the seam, ztunnel's side: frames with their descriptors, and who is there.

This module owns the connected unix socket and every descriptor that came over it and was not yet
taken. It promises that a frame comes with exactly the descriptors that were sent with it, that
descriptors which the kernel dropped end the connection (MSG_CTRUNC: what follows would be matched
wrongly), that what waits here is bounded, and that `close` closes whatever was not taken. It may
not know what messages mean.
"""

from __future__ import annotations

import array
import asyncio
import os
import socket
import stat
import struct
from collections import deque
from collections.abc import Sequence
from typing import Final

from ztunnel import protocol

__all__ = ["Channel", "ChannelError", "connect"]

READ_BYTES: Final = 256 * 1024
"""Bytes of one recvmsg: a snapshot's frames come in a few calls, and the loop turns in between."""

_MODE_OTHERS_WRITE: Final = 0o022
_CREDENTIALS: Final = struct.Struct("3i")
_DESCRIPTOR: Final = array.array("i").itemsize


class ChannelError(Exception):
    """The connection cannot be made or has ended; the text says why and what to look at."""


class Channel:
    """One connection. A single task may receive, and a single task may send, at a time."""

    def __init__(self, connected: socket.socket) -> None:
        connected.setblocking(False)
        self._socket = connected
        self._decoder = protocol.FrameDecoder()
        self._descriptors: deque[int] = deque()
        self._frames: deque[tuple[protocol.Message, tuple[int, ...]]] = deque()

    def peer_uid(self) -> int:
        """Return the user id of the process at the other end (SO_PEERCRED)."""
        raw = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        uid: int = _CREDENTIALS.unpack(raw)[1]
        return uid

    async def receive(self) -> tuple[protocol.Message, tuple[int, ...]]:
        """Return the next message and its descriptors, which are the caller's from then on.

        Raises ProtocolError, ChannelError at the end, and OSError; the channel is useless after.
        """
        while not self._frames:
            try:
                self._read()
            except BlockingIOError:
                await _wait_for(self._socket, writable=False)
        return self._frames.popleft()

    async def send(self, message: protocol.Message, descriptors: Sequence[int] = ()) -> None:
        """Send one frame; the descriptors stay the caller's. Raises OSError."""
        rest = memoryview(protocol.encode(message, len(descriptors)))
        rights: list[tuple[int, int, array.array[int]]] = []
        if descriptors:
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
        while rest:
            try:
                sent = self._socket.sendmsg([rest], rights, socket.MSG_NOSIGNAL)
            except BlockingIOError:
                await _wait_for(self._socket, writable=True)
                continue
            # With the first byte of the header, and once only.
            rights = []
            rest = rest[sent:]

    def close(self) -> None:
        """Close the socket and all descriptors that nobody has taken."""
        self._socket.close()
        for _, descriptors in self._frames:
            self._descriptors.extend(descriptors)
        self._frames.clear()
        while self._descriptors:
            os.close(self._descriptors.popleft())

    def _read(self) -> None:
        data, ancillary, flags, _ = self._socket.recvmsg(
            READ_BYTES,
            socket.CMSG_SPACE(protocol.MAX_FDS * _DESCRIPTOR),
            socket.MSG_CMSG_CLOEXEC,
        )
        # Own what came before anything else can fail.
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                usable = len(payload) - len(payload) % _DESCRIPTOR
                self._descriptors.extend(array.array("i", payload[:usable]))
        if flags & socket.MSG_CTRUNC:
            raise protocol.ProtocolError(
                "descriptors were lost on the way (MSG_CTRUNC): raise LimitNOFILE"
            )
        if not data:
            raise ChannelError("nodeagent closed the connection")
        for frame in self._decoder.feed(data):
            if frame.fds > len(self._descriptors):
                raise protocol.ProtocolError(
                    f"a frame announced {frame.fds} descriptors, {len(self._descriptors)} came"
                )
            taken = tuple(self._descriptors.popleft() for _ in range(frame.fds))
            self._frames.append((frame.message, taken))
        # What is left belongs to the one frame that is still incomplete.
        if len(self._descriptors) > protocol.MAX_FDS:
            raise protocol.ProtocolError("more descriptors came than one frame may carry")


async def connect(path: str) -> Channel:
    """Connect to the unix socket `path` and check who listens. Raises ChannelError or OSError.

    The directory is opened first and looked at through its descriptor, so that what was checked is
    what is used: no symbolic link as last component, ours or root's, writable by nobody else.
    """
    directory, name = os.path.split(path)
    if not directory or not name:
        raise ChannelError(f"{path!r} must be an absolute path of a socket")
    handle = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        _check_directory(directory, os.fstat(handle))
        connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        channel = Channel(connected)
        try:
            # /proc/self/fd also lifts sun_path's limit of 107 bytes.
            await asyncio.get_running_loop().sock_connect(
                connected, f"/proc/self/fd/{handle}/{name}"
            )
            _check_peer(path, channel.peer_uid())
        except BaseException:
            channel.close()
            raise
    finally:
        os.close(handle)
    return channel


def _check_peer(path: str, uid: int) -> None:
    if uid not in (0, os.geteuid()):
        raise ChannelError(f"user {uid} listens on {path}, not root or ourselves: refused")


def _check_directory(directory: str, status: os.stat_result) -> None:
    if status.st_uid not in (0, os.geteuid()):
        raise ChannelError(f"{directory} belongs to user {status.st_uid}, not to root or us")
    if stat.S_IMODE(status.st_mode) & _MODE_OTHERS_WRITE:
        raise ChannelError(
            f"{directory} is writable by others (mode {stat.S_IMODE(status.st_mode):o}): "
            "anybody could listen there; make it 0700"
        )


async def _wait_for(waiting: socket.socket, *, writable: bool) -> None:
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()

    def wake() -> None:
        if not done.done():
            done.set_result(None)

    descriptor = waiting.fileno()
    (loop.add_writer if writable else loop.add_reader)(descriptor, wake)
    try:
        await done
    finally:
        # Only while it is ours: a closed socket's number may be another's by now.
        if waiting.fileno() == descriptor:
            (loop.remove_writer if writable else loop.remove_reader)(descriptor)
