"""Frames of the seam: a length, a count of descriptors, a body (of `ztunnel.protocol`'s messages).

This module owns the header and its limits. It promises that nothing is allocated for a length that
is beyond them, and that a reader holds one frame at most. It may not know messages.
"""

from __future__ import annotations

import struct
from typing import Final

__all__ = ["HEADER", "MAX_FDS", "MAX_FRAME", "ProtocolError", "Splitter", "pack"]

MAX_FRAME: Final = 4 * 1024 * 1024
"""Bytes of one frame's body. A snapshot of any size is split into frames far below this; a larger
length is garbage on the socket, and is refused before anything is allocated."""

MAX_FDS: Final = 16
"""Descriptors of one frame: a pod needs four. The kernel's own limit is 253 (SCM_MAX_FD)."""

HEADER: Final = struct.Struct("!IB")


class ProtocolError(Exception):
    """The other side broke the protocol; the connection is of no further use.

    `reason` says what was wrong in words for the log and never quotes message contents.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def pack(body: bytes, fds: int) -> bytes:
    """Return the frame of `body`. Raises ValueError, our own error, above the limits."""
    if len(body) > MAX_FRAME:
        raise ValueError(f"message of {len(body)} bytes exceeds {MAX_FRAME}")
    if not 0 <= fds <= MAX_FDS:
        raise ValueError(f"{fds} descriptors exceed {MAX_FDS}")
    return HEADER.pack(len(body), fds) + body


class Splitter:
    """Cuts bytes as they come into frames. Holds at most one frame (MAX_FRAME) at any time."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[tuple[bytes, int]]:
        """Return body and descriptors of each frame that `data` completes. Raises ProtocolError."""
        self._buffer += data
        frames: list[tuple[bytes, int]] = []
        while len(self._buffer) >= HEADER.size:
            length, fds = HEADER.unpack_from(self._buffer)
            if length > MAX_FRAME or fds > MAX_FDS:
                raise ProtocolError(
                    f"frame of {length} bytes and {fds} descriptors exceeds the limits"
                )
            end = HEADER.size + length
            if len(self._buffer) < end:
                break
            frames.append((bytes(memoryview(self._buffer)[HEADER.size : end]), fds))
            del self._buffer[:end]
        return frames
