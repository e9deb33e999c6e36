"""nodeagent's control socket, served for a test, and the other end of it.

Owns a `ControlServer` whose callbacks only remember, and the words of a ztunnel that a test plays.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

from nodeagent import control
from nodeagent.channel import Channel, Received
from nodeagent.rundir import CONTROL_SOCKET, RunDirectory
from ztunnel import protocol

SETTINGS = protocol.Settings("node-1", "c", "cluster.local")
DEADLINE = 20


class Harness:
    """A server on a socket of its own, and what it called back with."""

    def __init__(
        self,
        server: control.ControlServer,
        path: Path,
        seconds: list[float],
        flows: list[tuple[int, protocol.Flows]],
    ) -> None:
        self.server = server
        self.path = path
        self.held: list[tuple[protocol.HeldPod, tuple[int, int, int]]] = []
        self.seconds = seconds
        self.changed = asyncio.Event()
        self.gate = asyncio.Event()
        self.asked: list[frozenset[str]] = []
        self.drained: list[int] = []
        self.flows = flows

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self.changed.clear()
            await self.changed.wait()

    async def connect(self) -> Channel:
        raw = socket.socket(socket.AF_UNIX)
        raw.setblocking(False)
        await asyncio.get_running_loop().sock_connect(raw, str(self.path))
        return Channel(raw)

    async def greeted(self, pid: int = 42, started: int = 0, *, draining: bool = False) -> Channel:
        channel = await self.connect()
        await channel.send(protocol.Hello(protocol.PROTOCOL_VERSION, pid, 0, started, draining))
        welcome = await channel.receive()
        assert welcome.message == protocol.Welcome(protocol.PROTOCOL_VERSION, SETTINGS)
        return channel


@contextlib.asynccontextmanager
async def serving(tmp_path: Path) -> AsyncIterator[Harness]:
    directory = RunDirectory(tmp_path / "run")
    listener = directory.listen(CONTROL_SOCKET)
    harness: Harness
    seconds: list[float] = []

    def on_held(pod: protocol.HeldPod, fds: tuple[int, int, int]) -> None:
        harness.held.append((pod, fds))

    def on_change() -> None:
        harness.changed.set()

    def on_drained(cut: int) -> None:
        harness.drained.append(cut)

    async def before_snapshot(held: frozenset[str]) -> None:
        harness.asked.append(held)
        await harness.gate.wait()

    flows: list[tuple[int, protocol.Flows]] = []
    server = control.ControlServer(
        SETTINGS,
        on_held=on_held,
        before_snapshot=before_snapshot,
        on_change=on_change,
        on_drained=on_drained,
        on_flows=lambda process, message: flows.append((process, message)),
        observe_seconds=seconds.append,
        clock=time.monotonic,
        first_version=100,
    )
    harness = Harness(server, listener.path, seconds, flows)
    task = asyncio.ensure_future(server.run(listener.socket))
    try:
        yield harness
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        listener.close()
        directory.close()
        for _, fds in harness.held:
            for fd in fds:
                os.close(fd)


def run(test: Callable[[Harness], Awaitable[None]], tmp_path: Path) -> None:
    async def main() -> None:
        async with asyncio.timeout(DEADLINE), serving(tmp_path) as harness:
            await test(harness)

    asyncio.run(main())


async def change(channel: Channel) -> list[Received]:
    """Receive one whole change, without acknowledging it."""
    parts = []
    while True:
        received = await channel.receive()
        assert isinstance(received.message, protocol.Update)
        parts.append(received)
        if received.message.commit:
            return parts


def version_of(parts: list[Received]) -> int:
    message = parts[-1].message
    assert isinstance(message, protocol.Update)
    return message.version


def uids(parts: list[Received]) -> list[str]:
    return [
        r.uid
        for part in parts
        if isinstance(part.message, protocol.Update)
        for r in part.message.upserts
    ]


def bundle(uid: str) -> protocol.TrustBundle:
    return protocol.TrustBundle(uid, (b"root",))


async def synced(channel: Channel) -> int:
    """Put one change in force."""
    version = version_of(await change(channel))
    await channel.send(protocol.Ack(version))
    return version


async def drained_for(channel: Channel) -> str:
    """Take the order to drain, and return for whom."""
    query = (await channel.receive()).message
    assert isinstance(query, protocol.Query)
    assert query.what == "drain"
    await channel.send(protocol.Answer(query.id, b"{}"))
    return query.args["successor"]
