"""The server side of the seam: who is connected, which ztunnel serves, and what all of them hold.

This module owns the control socket's connections and the state that ztunnel is to hold. It promises
that a slow, hung or hostile ztunnel never blocks the agent and never makes it hold more than three
versions of the state (wanted, in flight, acknowledged) for each; that a ztunnel is told nothing
before the agent says that its own picture of the pods which any of them serves is complete
(`before_snapshot`), since what a snapshot does not name is dropped; and that a ztunnel hands over
only once its successor has the whole state in force. It may not decide what the state is.

Several ztunnels
----------------
The one that was started last, of those that have had the whole state in force, serves: an upgrade,
or a DaemonSet, starts the next one beside it. Every older one is told to drain: it closes its
listening sockets, which both have, serves what it carries to the end, and is told every change
meanwhile. A successor that never gets so far changes nothing. The order is by the processes'
start, so that it is the same after a restart of this daemon, whoever connects first.
"""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Final

import msgspec
import structlog

from nodeagent import published
from nodeagent.channel import Channel, Closed, Peer, close_all
from nodeagent.session import (
    QUERY_SECONDS,
    Draining,
    PodDescriptors,
    QueryError,
    Rejected,
    Session,
)
from ztunnel import protocol

if TYPE_CHECKING:
    import socket
    from collections.abc import Awaitable, Callable, Iterable, Mapping

__all__ = [
    "ControlServer",
    "Draining",
    "PodDescriptors",
    "QueryError",
    "Rejected",
    "ZtunnelStatus",
]

HELLO_SECONDS: Final = 5.0
"""From accept to the last HeldPod: both daemons are on one machine."""

MAX_STRANGERS: Final = 4
"""Connections that have not said Hello yet; a fifth is closed at once."""

MAX_HELD: Final = 4096
"""Pods that a ztunnel may claim to hold, three descriptors each."""

MAX_DRAINING: Final = 4
"""ztunnels that drain: each holds its memory and connections. One more, and the oldest is ended:
who upgrades five times within the drain's deadline has decided so."""

_LISTENERS: Final = 3

log = structlog.get_logger()


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
    draining: tuple[Draining, ...] = ()


class ControlServer:
    """Publishes the state to ztunnel. All methods belong to the event loop's thread."""

    def __init__(
        self,
        settings: protocol.Settings,
        *,
        on_held: Callable[[protocol.HeldPod, tuple[int, int, int]], None],
        before_snapshot: Callable[[frozenset[str]], Awaitable[None]],
        on_change: Callable[[], None],
        on_drained: Callable[[int], None],
        on_flows: Callable[[int, protocol.Flows], None],
        observe_seconds: Callable[[float], None],
        clock: Callable[[], float],
        first_version: int,
    ) -> None:
        """`on_held` takes over the three listeners. `on_change` follows every change of `status`.

        `before_snapshot` is awaited once for each ztunnel, with the uids of the pods that it holds;
        it bounds its own time.
        `on_drained` is told of each ztunnel that has ended its drain, and how many connections it
        had to cut. `on_flows` is given what any of them has counted of callers, and when that one
        was started (`Hello.started`), and never waits.
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
        self.on_drained = on_drained
        self.on_flows = on_flows
        self.before_snapshot = before_snapshot
        self._sessions: list[Session] = []
        """In the order in which they connected."""
        self._strangers = 0

    # --- what the agent says ---------------------------------------------------------------

    def apply(
        self,
        upserts: Iterable[protocol.Resource] = (),
        removals: Iterable[protocol.Removal] = (),
    ) -> int:
        """Change the wanted state; return the version that holds the change."""
        upserts, removals = tuple(upserts), tuple(removals)
        fresh = published.changed(self.state, upserts, removals)
        if fresh is not None:
            self.state = fresh
            self.version += 1
            keys = published.touched(upserts, removals)
            for session in self._sessions:
                session.changed(keys)
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
        """Wait until every ztunnel has `version` in force, or has gone. False if the one that
        serves has gone, after `seconds`, or at once if no ztunnel has been told anything yet.
        """
        sessions = [session for session in self._sessions if session.begun]
        if not sessions:
            return False
        try:
            async with asyncio.timeout(seconds):
                reached = await asyncio.gather(*(each.reached(version) for each in sessions))
        except TimeoutError:
            return False
        pairs = zip(sessions, reached, strict=True)
        return any(done for session, done in pairs if not session.draining)

    async def query(
        self, what: str, args: Mapping[str, str] | None = None, seconds: float = QUERY_SECONDS
    ) -> bytes:
        """Ask the ztunnel that serves; return the JSON of its answer. Raises QueryError."""
        session = self._serving
        if session is None:
            raise QueryError("ztunnel is not connected")
        return await session.query(what, dict(args or {}), seconds)

    def carrying(self) -> tuple[Session, ...]:
        """Return the ztunnel that serves, and those that still carry what they had.

        Raises QueryError without the former.
        """
        if self._serving is None:
            raise QueryError("ztunnel is not connected")
        draining = (each for each in self._sessions if each.draining)
        return (self._serving, *draining)

    async def ask_draining(self) -> None:
        """Take anew what the draining ones still carry, for `status`."""
        await asyncio.gather(*(session.ask() for session in self._sessions if session.draining))

    @property
    def status(self) -> ZtunnelStatus:
        session = self._serving
        draining = tuple(each.drain for each in self._sessions if each.draining)
        if session is None:
            return ZtunnelStatus(
                connected=False,
                wanted_version=self.version,
                rejections=self.rejections,
                draining=draining,
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
            draining=draining,
        )

    # --- which one serves ------------------------------------------------------------------

    @property
    def _serving(self) -> Session | None:
        """The newest that has had the state in force; while none has, the newest."""
        found = [session for session in self._sessions if not session.draining]
        ready = [session for session in found if session.has_served]
        # Of equals the one that connected last: sort and max keep the first.
        return max(reversed(ready or found), key=lambda each: each.started, default=None)

    def settle(self) -> None:
        """Let the older ones hand over: one more ztunnel has had the state in force."""
        newest = self._serving
        if newest is None or not newest.has_served:
            return
        at = self._sessions.index(newest)
        for position, each in enumerate(self._sessions):
            older = (each.started, position) < (newest.started, at)
            if older and not each.draining:
                log.info("ztunnel is to drain", pid=each.pid, successor=newest.pid)
                each.order_drain(newest.pid)
        self._limit()

    def drained(self, session: Session, args: Mapping[str, str]) -> None:
        """`session` ends in good order."""
        cut = args.get("cut", "")
        seconds = args.get("seconds", "")
        log.info("ztunnel has drained", pid=session.pid, cut=cut, seconds=seconds)
        self.on_drained(int(cut) if cut.isascii() and cut.isdigit() else 0)

    def _limit(self) -> None:
        draining = sorted(
            (session for session in self._sessions if session.draining),
            key=lambda each: each.started,
        )
        for session in draining[: max(0, len(draining) - MAX_DRAINING)]:
            session.dismiss(f"more than {MAX_DRAINING} ztunnels drain, and this is the oldest")

    async def complete(self, session: Session) -> None:
        """Return once the state names what any ztunnel holds, as far as it is still wanted."""
        held = [each.held for each in self._sessions]
        await self.before_snapshot(frozenset[str]().union(session.held, *held))

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

    async def _greet(self, channel: Channel) -> Session | None:
        self._strangers += 1
        try:
            async with asyncio.timeout(HELLO_SECONDS):
                hello = await self._hello(channel)
                if hello is None:
                    return None
                held = await _held_pods(channel, hello)
                for pod, fds in held:
                    if not hello.draining:
                        outbound, inbound, hbone = fds
                        self.on_held(pod, (outbound, inbound, hbone))
                await channel.send(protocol.Welcome(protocol.PROTOCOL_VERSION, self.settings))
                return Session(self, channel, hello, frozenset(pod.uid for pod, _ in held))
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

    async def _converse(self, session: Session) -> None:
        self._sessions.append(session)
        log.info(
            "ztunnel connected",
            pid=session.pid,
            held_pods=len(session.held),
            draining=session.draining,
        )
        self._limit()
        self.on_change()
        try:
            await session.run()
        finally:
            self._sessions.remove(session)
            self.on_change()


async def _held_pod(channel: Channel, listeners: int) -> tuple[protocol.HeldPod, tuple[int, ...]]:
    received = await channel.receive()
    message = received.message
    if not isinstance(message, protocol.HeldPod) or len(received.fds) != listeners:
        close_all(received.fds)
        raise protocol.ProtocolError(f"expected a held pod with {listeners} descriptors")
    return message, received.fds


async def _held_pods(
    channel: Channel, hello: protocol.Hello
) -> list[tuple[protocol.HeldPod, tuple[int, ...]]]:
    held: list[tuple[protocol.HeldPod, tuple[int, ...]]] = []
    try:
        while len(held) < hello.pods:
            held.append(await _held_pod(channel, 0 if hello.draining else _LISTENERS))
    except BaseException:
        for _, fds in held:
            close_all(fds)
        raise
    return held
