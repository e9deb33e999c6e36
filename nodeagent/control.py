"""The server side of the seam: one ztunnel, told the whole state and then what changes.

This module owns the control socket's connections and the state that ztunnel is to hold. It promises
that a slow, hung or hostile ztunnel never blocks the agent and never makes it hold more than three
versions of the state (wanted, in flight, acknowledged); that at most one change is in flight and
the newest state wins; and that a ztunnel which already serves pods is told nothing before the
agent says that its own picture of them is complete (`before_snapshot`), since what a snapshot does
not name is dropped. It may not decide what the state is.

Two ztunnels
------------
One is served at a time. A newer one that has said a valid `Hello` replaces the older: the older is
sent a `Refusal` and its connection is closed. That is the order of an upgrade: the new process
takes over, and the old one drains what it has on the last state that it acknowledged. A drained
process must not connect again, or the two would replace each other in turn.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from typing import TYPE_CHECKING, Final

import msgspec
import structlog

from nodeagent import published
from nodeagent.channel import Channel, Closed, Peer, close_all
from ztunnel import protocol

if TYPE_CHECKING:
    import socket
    from collections.abc import Awaitable, Callable, Iterable, Mapping

__all__ = ["ControlServer", "PodDescriptors", "QueryError", "Rejected", "ZtunnelStatus"]

HELLO_SECONDS: Final = 5.0
"""From accept to the last HeldPod: both daemons are on one machine."""

SEND_SECONDS: Final = 10.0
"""To hand one part to the kernel; a reader that takes longer has stopped reading."""

ACK_SECONDS: Final = 30.0
"""From the last part to the Ack: ztunnel may have to build a TLS context for each credential."""

QUERY_SECONDS: Final = 3.0
"""For an Answer: a person may be waiting for it."""

RETRY_SECONDS: Final = 10.0
"""Until a rejected change is tried again, if nothing changes before."""

MAX_STRANGERS: Final = 4
"""Connections that have not said Hello yet; a fifth is closed at once."""

MAX_HELD: Final = 4096
"""Pods that a ztunnel may claim to hold, three descriptors each."""

MAX_QUERIES: Final = 16
"""Questions of ours without an answer."""

_LISTENERS: Final = 3

log = structlog.get_logger()


class QueryError(Exception):
    """No answer: ztunnel is not connected, too slow, or says that it cannot."""


class Rejected(msgspec.Struct, frozen=True):
    """The last change that ztunnel refused; the state before it is in force."""

    version: int
    error: str


class PodDescriptors(msgspec.Struct, frozen=True):
    """A pod's descriptors, owned by whoever enrolled it and open while the pod is published."""

    netns: int
    outbound: int
    inbound: int
    hbone: int


class ZtunnelStatus(msgspec.Struct, frozen=True):
    """One coherent picture of the connection. Times are seconds of the server's clock."""

    connected: bool
    pid: int = 0
    since: float = 0.0
    wanted_version: int = 0
    acknowledged_version: int = 0
    rejected: Rejected | None = None
    rejections: int = 0
    oversized: tuple[str, ...] = ()


class ControlServer:
    """Publishes the state to ztunnel. All methods belong to the event loop's thread."""

    def __init__(
        self,
        settings: protocol.Settings,
        *,
        on_held: Callable[[protocol.HeldPod, tuple[int, int, int]], None],
        before_snapshot: Callable[[frozenset[str]], Awaitable[None]],
        on_change: Callable[[], None],
        observe_seconds: Callable[[float], None],
        clock: Callable[[], float],
        first_version: int,
    ) -> None:
        """`on_held` takes over the three listeners. `on_change` follows every change of `status`.

        `before_snapshot` is awaited once for each ztunnel, with the uids of the pods that it holds;
        it bounds its own time.
        `first_version` must exceed every version that an earlier run can have used.
        `observe_seconds` is told how long each change took from its first part to its Ack.
        """
        self.settings = settings
        self.clock = clock
        self.on_held = on_held
        self.on_change = on_change
        self.observe_seconds = observe_seconds
        self.version = first_version
        self.state: published.State = {}
        self.pods: dict[str, PodDescriptors] = {}
        self.rejections = 0
        self.before_snapshot = before_snapshot
        self._session: _Session | None = None
        self._strangers = 0

    # --- what the agent says ---------------------------------------------------------------

    def apply(
        self,
        upserts: Iterable[protocol.Resource] = (),
        removals: Iterable[protocol.Removal] = (),
    ) -> int:
        """Change the wanted state; return the version that holds the change."""
        fresh = published.changed(self.state, upserts, removals)
        if fresh is not None:
            self.state = fresh
            self.version += 1
            if self._session is not None:
                self._session.wake.set()
        return self.version

    def put_pod(self, pod: protocol.Pod, descriptors: PodDescriptors) -> int:
        """Publish the pod, or publish it again because its descriptors are others now."""
        self.pods[pod.uid] = descriptors
        return self.apply((pod,))

    def drop_pod(self, uid: str) -> int:
        """Withdraw the pod. Its descriptors may be closed once this returns."""
        self.pods.pop(uid, None)
        return self.apply((), (protocol.Removal("pod", uid),))

    async def acknowledged(self, version: int, seconds: float) -> bool:
        """Wait until ztunnel has `version` in force. False after `seconds`, or at once if no
        ztunnel has been told anything yet.
        """
        session = self._session
        if session is None or not session.begun:
            return False
        try:
            async with asyncio.timeout(seconds):
                return await session.reached(version)
        except TimeoutError:
            return False

    async def query(
        self, what: str, args: Mapping[str, str] | None = None, seconds: float = QUERY_SECONDS
    ) -> bytes:
        """Ask ztunnel; return the JSON of its answer. Raises QueryError."""
        session = self._session
        if session is None:
            raise QueryError("ztunnel is not connected")
        return await session.query(what, dict(args or {}), seconds)

    @property
    def status(self) -> ZtunnelStatus:
        session = self._session
        if session is None:
            return ZtunnelStatus(
                connected=False, wanted_version=self.version, rejections=self.rejections
            )
        return ZtunnelStatus(
            connected=True,
            pid=session.pid,
            since=session.since,
            wanted_version=self.version,
            acknowledged_version=session.acknowledged_version,
            rejected=session.rejected,
            rejections=self.rejections,
            oversized=tuple("/".join(key) for key in session.oversized),
        )

    # --- connections -----------------------------------------------------------------------

    async def run(self, listening: socket.socket) -> None:
        """Serve until cancelled. `listening` is non-blocking and stays the caller's."""
        loop = asyncio.get_running_loop()
        async with asyncio.TaskGroup() as group:
            while True:
                try:
                    connected, _ = await loop.sock_accept(listening)
                except OSError as error:
                    # Out of descriptors, or the peer has already gone: neither may end the agent.
                    log.warning("control socket: cannot accept", error=error.strerror)
                    await asyncio.sleep(1)
                    continue
                if self._strangers >= MAX_STRANGERS:
                    connected.close()
                    continue
                group.create_task(self._serve(connected))

    async def _serve(self, connected: socket.socket) -> None:
        channel = Channel(connected)
        peer = Peer(0, 0, 0)
        reason = "closed by ztunnel"
        try:
            peer = channel.peer()
            if peer.uid != os.geteuid():
                log.warning("control socket: foreign user refused", uid=peer.uid, pid=peer.pid)
                return
            session = await self._greet(channel)
            if session is None:
                return
            await self._converse(session)
        except asyncio.CancelledError:
            reason = "nodeagent ends"
            raise
        except Closed:
            pass
        except protocol.ProtocolError as error:
            reason = error.reason
        except TimeoutError:
            reason = "deadline passed: ztunnel does not read or answer"
        except OSError as error:
            reason = error.strerror or str(error)
        finally:
            channel.close()
            log.info("ztunnel connection ended", pid=peer.pid, reason=reason)

    async def _greet(self, channel: Channel) -> _Session | None:
        self._strangers += 1
        try:
            async with asyncio.timeout(HELLO_SECONDS):
                hello = await self._hello(channel)
                if hello is None:
                    return None
                held = await _held_pods(channel, hello.pods)
                for pod, fds in held:
                    self.on_held(pod, fds)
                await channel.send(protocol.Welcome(protocol.PROTOCOL_VERSION, self.settings))
                return _Session(self, channel, hello, frozenset(pod.uid for pod, _ in held))
        finally:
            self._strangers -= 1

    async def _hello(self, channel: Channel) -> protocol.Hello | None:
        received = await channel.receive()
        close_all(received.fds)
        hello = received.message
        if not isinstance(hello, protocol.Hello) or received.fds:
            raise protocol.ProtocolError("the first message is no plain hello")
        reason = ""
        if hello.version != protocol.PROTOCOL_VERSION:
            reason = (
                f"ztunnel speaks protocol version {hello.version}, "
                f"nodeagent {protocol.PROTOCOL_VERSION}: install both from the same release"
            )
        elif not 0 <= hello.pods <= MAX_HELD:
            reason = f"{hello.pods} held pods exceed {MAX_HELD}"
        if not reason:
            return hello
        log.error("ztunnel refused", pid=hello.pid, reason=reason)
        await channel.send(protocol.Refusal(reason))
        return None

    async def _converse(self, session: _Session) -> None:
        older, self._session = self._session, session
        if older is not None:
            older.replace(session.pid)
        log.info("ztunnel connected", pid=session.pid, held_pods=len(session.held))
        self.on_change()
        try:
            await session.run()
        finally:
            if self._session is session:
                self._session = None
            self.on_change()


async def _held_pod(channel: Channel) -> tuple[protocol.HeldPod, tuple[int, int, int]]:
    received = await channel.receive()
    message = received.message
    if not isinstance(message, protocol.HeldPod) or len(received.fds) != _LISTENERS:
        close_all(received.fds)
        raise protocol.ProtocolError("expected a held pod with three descriptors")
    outbound, inbound, hbone = received.fds
    return message, (outbound, inbound, hbone)


async def _held_pods(
    channel: Channel, count: int
) -> list[tuple[protocol.HeldPod, tuple[int, int, int]]]:
    held: list[tuple[protocol.HeldPod, tuple[int, int, int]]] = []
    try:
        while len(held) < count:
            held.append(await _held_pod(channel))
    except BaseException:
        for _, fds in held:
            close_all(fds)
        raise
    return held


class _Session:
    """One greeted ztunnel: a reader, and a writer that always sends the newest state."""

    def __init__(
        self, server: ControlServer, channel: Channel, hello: protocol.Hello, held: frozenset[str]
    ) -> None:
        self.pid = hello.pid
        self.held = held
        self.begun = False
        self.since = server.clock()
        self.acknowledged_version = 0
        self.rejected: Rejected | None = None
        self.oversized: tuple[published.Key, ...] = ()
        self.wake = asyncio.Event()
        self._server = server
        self._channel = channel
        self._sending = asyncio.Lock()
        self._acknowledged: published.State | None = None
        self._awaited: asyncio.Future[protocol.Ack] | None = None
        self._awaited_version = 0
        self._progress = asyncio.Condition()
        self._questions: dict[int, asyncio.Future[protocol.Answer]] = {}
        self._next_question = 1
        self._ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def run(self) -> None:
        tasks = [
            asyncio.ensure_future(work)
            for work in (self._read(), self._write(), self._until_replaced())
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for future in self._questions.values():
                future.cancel()
            async with self._progress:
                self.acknowledged_version = -1
                self._progress.notify_all()

    def replace(self, pid: int) -> None:
        if not self._ended.done():
            self._ended.set_result(f"replaced by ztunnel with pid {pid}")

    async def reached(self, version: int) -> bool:
        async with self._progress:
            await self._progress.wait_for(lambda: not 0 <= self.acknowledged_version < version)
        return self.acknowledged_version >= version

    async def query(self, what: str, args: dict[str, str], seconds: float) -> bytes:
        if len(self._questions) >= MAX_QUERIES:
            raise QueryError("too many questions to ztunnel are unanswered")
        number = self._next_question
        self._next_question += 1
        future: asyncio.Future[protocol.Answer] = asyncio.get_running_loop().create_future()
        self._questions[number] = future
        try:
            async with asyncio.timeout(seconds):
                await self._send(protocol.Query(number, what, args))
                answer = await asyncio.shield(future)
        except TimeoutError:
            raise QueryError(f"ztunnel did not answer {what!r} within {seconds:g} s") from None
        except OSError as error:
            raise QueryError(f"ztunnel: {error.strerror}") from error
        except asyncio.CancelledError:
            if future.cancelled():
                raise QueryError("ztunnel disconnected") from None
            raise
        finally:
            del self._questions[number]
        if answer.error:
            raise QueryError(f"ztunnel: {answer.error}")
        return answer.body

    async def _until_replaced(self) -> None:
        reason = await self._ended
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(1):
                await self._send(protocol.Refusal(reason))
        raise protocol.ProtocolError(reason)

    async def _read(self) -> None:
        while True:
            received = await self._channel.receive()
            message = received.message
            if received.fds:
                close_all(received.fds)
                raise protocol.ProtocolError("descriptors with a message that carries none")
            if isinstance(message, protocol.Ack):
                if (
                    self._awaited is None
                    or self._awaited.done()
                    or message.version != self._awaited_version
                ):
                    raise protocol.ProtocolError(
                        f"ack of version {message.version}, which is not in flight"
                    )
                self._awaited.set_result(message)
            elif isinstance(message, protocol.Answer):
                # An answer that came after its deadline finds no question any more.
                future = self._questions.get(message.id)
                if future is not None and not future.done():
                    future.set_result(message)
            elif isinstance(message, protocol.Query):
                # nodeagent answers no question yet; it says so instead of leaving ztunnel waiting.
                await self._send(
                    protocol.Answer(message.id, error=f"unknown question {message.what!r}")
                )
            else:
                raise protocol.ProtocolError(f"unexpected {type(message).__name__}")

    async def _write(self) -> None:
        await self._server.before_snapshot(self.held)
        self.begun = True
        while True:
            self.wake.clear()
            server = self._server
            state, version = server.state, server.version
            if self._acknowledged is None or state is not self._acknowledged:
                await self._change(state, version)
            retry = RETRY_SECONDS if self.rejected is not None else None
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(retry):
                    await self.wake.wait()

    async def _change(self, state: published.State, version: int) -> None:
        change = published.plan(self._acknowledged, state, version)
        self.oversized = change.oversized
        for kind, uid in change.oversized:
            log.error("resource is too large for ztunnel and is left out", kind=kind, uid=uid)
        if not change.parts:
            await self._accept(state, version)
            return
        started = self._server.clock()
        self._awaited = asyncio.get_running_loop().create_future()
        self._awaited_version = version
        for part in change.parts:
            await self._send_part(part)
        async with asyncio.timeout(ACK_SECONDS):
            ack = await self._awaited
        self._awaited = None
        self._server.observe_seconds(self._server.clock() - started)
        if ack.error:
            log.error("ztunnel rejected a change", version=version, error=ack.error)
            self.rejected = Rejected(version, ack.error)
            self._server.rejections += 1
            self._server.on_change()
            return
        await self._accept(state, version)

    async def _accept(self, state: published.State, version: int) -> None:
        self._acknowledged = state
        self.rejected = None
        async with self._progress:
            self.acknowledged_version = version
            self._progress.notify_all()
        self._server.on_change()

    async def _send_part(self, part: published.Part) -> None:
        if not part.pod:
            await self._send(part.update)
            return
        async with self._sending, asyncio.timeout(SEND_SECONDS):
            descriptors = self._server.pods.get(part.pod)
            if descriptors is None:
                return  # withdrawn meanwhile; the next change says so
            await self._channel.send(
                part.update,
                (descriptors.netns, descriptors.outbound, descriptors.inbound, descriptors.hbone),
            )

    async def _send(self, message: protocol.Message) -> None:
        async with self._sending, asyncio.timeout(SEND_SECONDS):
            await self._channel.send(message)
