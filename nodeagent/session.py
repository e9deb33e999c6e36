"""One ztunnel on the control socket: told the state and what changes, asked, and handed over from.

This module owns a greeted connection. It promises that at most one change is in flight and that
the newest state wins; that nothing is told before the agent says that its own picture is complete;
that what the other side sends out of turn, or not in time, ends the connection and nothing else;
and that an order to drain is repeated until it is carried out. It may not decide which ztunnel
serves (`control` does) nor what the state is.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import TYPE_CHECKING, Any, Final, Protocol

import msgspec
import structlog

from nodeagent import published
from nodeagent.channel import Channel, close_all
from ztunnel import protocol

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Mapping

__all__ = ["Draining", "PodDescriptors", "Publisher", "QueryError", "Rejected", "Session"]

SEND_SECONDS: Final = 10.0
"""To hand one part to the kernel; a reader that takes longer has stopped reading."""

ACK_SECONDS: Final = 30.0
"""From the last part to the Ack: ztunnel may have to build a TLS context for each credential."""

QUERY_SECONDS: Final = 3.0
"""For an Answer: a person may be waiting for it."""

DRAIN_SECONDS: Final = 10.0
"""For the answer to an order to drain, and between two of them."""

RETRY_SECONDS: Final = 10.0
"""Until a rejected change is tried again, if nothing changes before."""

BATCH_SECONDS: Final = 0.05
"""Between the beginnings of two changes: each is compared over the whole state, here and in
ztunnel, and a thousand pods that are enrolled at once would make a thousand changes. The first
after a quiet while goes at once."""

LARGE: Final = 2000
"""Resources from which on a change is made on a thread: 100,000 take half a second."""

MAX_QUERIES: Final = 16
"""Questions of ours without an answer."""

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


class Draining(msgspec.Struct, frozen=True):
    """A ztunnel that has handed over: `since` in seconds of the server's clock.

    `connections` and `hbone` are what it still carries, None while it has not said.
    """

    pid: int
    since: float
    connections: int | None = None
    hbone: int | None = None
    cut: int = 0


class Publisher(Protocol):
    """Whose state a session tells (`control.ControlServer`)."""

    clock: Callable[[], float]
    on_change: Callable[[], None]
    on_flows: Callable[[int, protocol.Flows], None]
    observe_seconds: Callable[[float], None]
    version: int
    state: published.State
    pods: dict[str, PodDescriptors]
    rejections: int

    async def complete(self, session: Session) -> None:
        """Return once the state may be told to `session`."""

    def settle(self) -> None:
        """A session has put the whole state in force for the first time."""

    def drained(self, session: Session, args: Mapping[str, str]) -> None:
        """`session` has nothing left to carry, and ends."""


class Session:
    """One greeted ztunnel: a reader, and a writer that always sends the newest state."""

    def __init__(
        self, server: Publisher, channel: Channel, hello: protocol.Hello, held: frozenset[str]
    ) -> None:
        self.pid = hello.pid
        self.started = hello.started
        self.held = held
        self.begun = False
        self.has_served = False
        """Whether it has had the whole state in force."""
        self.draining = hello.draining
        """Whether it has handed over, or has been told to."""
        self.since = server.clock()
        self.drains_since = self.since
        self.acknowledged_version = 0
        self.rejected: Rejected | None = None
        self.oversized: tuple[published.Key, ...] = ()
        self._wake = asyncio.Event()
        self._server = server
        self._channel = channel
        self._sending = asyncio.Lock()
        self._acknowledged: published.State | None = None
        self._differ: set[published.Key] = set()
        """In which the server's state may differ from what is acknowledged, or in flight."""
        self._awaited: asyncio.Future[protocol.Ack] | None = None
        self._awaited_version = 0
        self._progress = asyncio.Condition()
        self._questions: dict[int, asyncio.Future[protocol.Answer]] = {}
        self._next_question = 1
        loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[str] = loop.create_future()
        self._order: asyncio.Future[int] = loop.create_future()
        self._own: dict[str, Any] = {}

    async def run(self) -> None:
        works: tuple[Awaitable[None], ...] = (
            self._read(),
            self._write(),
            self._until_dismissed(),
            self._ordered(),
        )
        tasks = [asyncio.ensure_future(work) for work in works]
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

    # --- what the server says ----------------------------------------------------------------

    def changed(self, keys: Iterable[published.Key]) -> None:
        """Tell the server's state, which differs from the one before in `keys`."""
        self._differ.update(keys)
        self._wake.set()

    def order_drain(self, successor: int) -> None:
        """Have it hand over to the process `successor`; again: no effect."""
        if not self.draining:
            self.draining = True
            self.drains_since = self._server.clock()
            self._order.set_result(successor)

    def dismiss(self, reason: str) -> None:
        """Send it away: it ends, and what it carries is cut."""
        if not self._ended.done():
            self._ended.set_result(reason)

    @property
    def drain(self) -> Draining:
        """The picture of a drain, as of the last `ask`."""
        own = self._own.get("draining")
        cut = own.get("cut") if isinstance(own, dict) else None
        return Draining(
            self.pid,
            self.drains_since,
            _count(self._own.get("connections")),
            _count(self._own.get("hbone_connections")),
            _count(cut) or 0,
        )

    async def ask(self) -> None:
        """Take its own status anew, for `drain`. What is not answered stays as it was."""
        with contextlib.suppress(QueryError, ValueError, RecursionError):
            own = json.loads(await self.query("status", {}, QUERY_SECONDS))
            self._own = own if isinstance(own, dict) else {}

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

    # --- loops --------------------------------------------------------------------------------

    async def _until_dismissed(self) -> None:
        reason = await self._ended
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(1):
                await self._send(protocol.Refusal(reason))
        raise protocol.ProtocolError(reason)

    async def _ordered(self) -> None:
        """Give the order to drain until it is carried out; until then both accept."""
        successor = await self._order
        while True:
            try:
                await self.query("drain", {"successor": str(successor)}, DRAIN_SECONDS)
            except QueryError as error:
                log.error("ztunnel does not drain", pid=self.pid, error=str(error))  # noqa: TRY400 - it says all
                await asyncio.sleep(DRAIN_SECONDS)
            else:
                log.info("ztunnel drains", pid=self.pid, successor=successor)
                # Nothing more to do here; the others go on.
                await self._never()

    async def _never(self) -> None:
        await asyncio.get_running_loop().create_future()

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
                await self._send(self._answer(message))
            elif isinstance(message, protocol.Flows):
                self._server.on_flows(self.started, message)
            else:
                raise protocol.ProtocolError(f"unexpected {type(message).__name__}")

    def _answer(self, query: protocol.Query) -> protocol.Answer:
        """Answer `drained`: a last word; its arguments are `cut` and `seconds`."""
        if query.what == "drained":
            self._server.drained(self, query.args)
            return protocol.Answer(query.id, b"{}")
        return protocol.Answer(query.id, error=f"unknown question {query.what!r}")

    async def _write(self) -> None:
        await self._server.complete(self)
        self.begun = True
        loop = asyncio.get_running_loop()
        while True:
            self._wake.clear()
            due = loop.time() + BATCH_SECONDS
            server = self._server
            state, version = server.state, server.version
            differ, self._differ = self._differ, set()
            if self._acknowledged is None or state is not self._acknowledged:
                await self._change(state, version, differ)
            retry = RETRY_SECONDS if self.rejected is not None else None
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(retry):
                    await self._wake.wait()
            await asyncio.sleep(due - loop.time())

    async def _change(
        self, state: published.State, version: int, differ: set[published.Key]
    ) -> None:
        change = await self._plan(state, version, differ)
        old = self._acknowledged or {}
        # Those that have not changed since are still left out.
        kept = [key for key in self.oversized if key in state and old.get(key) == state[key]]
        self.oversized = tuple(sorted({*kept, *change.oversized}))
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
            self._differ |= differ
            self.rejected = Rejected(version, ack.error)
            self._server.rejections += 1
            self._server.on_change()
            return
        await self._accept(state, version)

    async def _plan(
        self, state: published.State, version: int, differ: set[published.Key]
    ) -> published.Change:
        old = self._acknowledged
        if len(state if old is None else differ) > LARGE:
            return await asyncio.to_thread(published.plan, old, state, version, differ)
        return published.plan(old, state, version, differ)

    async def _accept(self, state: published.State, version: int) -> None:
        self._acknowledged = state
        self.rejected = None
        async with self._progress:
            self.acknowledged_version = version
            self._progress.notify_all()
        if not self.has_served:
            self.has_served = True
            self._server.settle()
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


def _count(value: object) -> int | None:
    return value if isinstance(value, int) else None
