"""The seam's channel by itself: frames with their own descriptors, and no descriptor lost."""

from __future__ import annotations

import array
import asyncio
import contextlib
import os
import socket
from collections.abc import Iterator

import pytest

from ztunnel import protocol
from ztunnel.channel import Channel


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - a path per entry is not needed


@contextlib.contextmanager
def four() -> Iterator[tuple[int, ...]]:
    made = tuple(socket.socket().detach() for _ in range(4))
    try:
        yield made
    finally:
        for descriptor in made:
            os.close(descriptor)


def test_frames_keep_their_own_descriptors_when_they_arrive_together() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    receiving = Channel(ours)

    async def scene() -> None:
        with four() as mine:
            for number, count in enumerate((1, 0, 2)):
                frame = protocol.encode(protocol.Ack(number), count)
                rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", mine[:count]))]
                theirs.sendmsg([frame], rights if count else [])
        for number, count in enumerate((1, 0, 2)):
            message, came = await receiving.receive()
            assert message == protocol.Ack(number)
            assert len(came) == count
            for each in came:
                os.close(each)

    before = descriptors()
    asyncio.run(scene())
    receiving.close()
    theirs.close()
    assert descriptors() == before - 2


@pytest.mark.parametrize("announced", [0, 2])
def test_descriptors_that_do_not_match_the_frame_end_the_channel(announced: int) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    receiving = Channel(ours)

    async def scene() -> None:
        with four() as mine:
            # One came; the second frame finds them mixed up.
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", mine[:1]))]
            for _ in range(protocol.MAX_FDS + 1):
                theirs.sendmsg([protocol.encode(protocol.Ack(1), announced)], rights)
        while True:
            await receiving.receive()

    before = descriptors()
    with pytest.raises(protocol.ProtocolError):
        asyncio.run(scene())
    receiving.close()
    theirs.close()
    assert descriptors() == before - 2


def test_descriptors_lost_by_the_kernel_end_the_channel() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    receiving = Channel(ours)

    async def scene() -> None:
        with four() as mine:
            many = array.array("i", mine * protocol.MAX_FDS)
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, many)]
            theirs.sendmsg([protocol.encode(protocol.Ack(1), 1)], rights)
        await receiving.receive()

    before = descriptors()
    with pytest.raises(protocol.ProtocolError, match="MSG_CTRUNC"):
        asyncio.run(scene())
    receiving.close()
    theirs.close()
    assert descriptors() == before - 2
