"""The seam, ztunnel's side: connects to nodeagent for ever, and hands on what it says.

This module owns the conversation. It promises that nothing of a change is handed on before its
commit and then all of it at once, that the next change waits for the one before, that every change
is acknowledged after it is in force and not before, and that descriptors leak on no path. When the
connection is lost the state stays in force, and it connects again. It may not judge, nor know what
resources mean, beyond pairing a pod with its descriptors.

A `Refusal` after `Welcome` means that this ztunnel is to end, and what it carries with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Final, Protocol

import msgspec
import structlog

from ztunnel import protocol
from ztunnel.channel import Channel, ChannelError, connect
from ztunnel.pods import PodSockets
from ztunnel.state import MAX_PODS, Change

__all__ = ["Control", "ControlStatus", "Dismissed", "Handler"]

_log: Final[structlog.stdlib.BoundLogger] = structlog.get_logger("ztunnel.control")

FIRST_BACKOFF: Final = 0.1
LAST_BACKOFF: Final = 5.0
"""Seconds between attempts, doubling: nodeagent's restart takes a second, and an attempt costs
microseconds."""

WELCOME_SECONDS: Final = 15.0
"""From Hello to Welcome. nodeagent greets before it has gathered its state."""

PART_SECONDS: Final = 30.0
"""Between two parts of one change: whoever started one must finish it."""

SEND_SECONDS: Final = 10.0
"""To hand a message to the kernel: a nodeagent that does not read is stuck."""

MAX_RESOURCES: Final = 1_000_000
"""Resources of one change: ten times the largest mesh that we plan for. Beyond it memory goes."""

LONG_QUESTIONS: Final = frozenset({"connections"})
"""Those whose answer takes so long that a change of policy must not wait for it."""

POD_DESCRIPTORS: Final = 4

_jitter: Final = random.SystemRandom()


class Dismissed(Exception):  # noqa: N818 - an order, not an error
    """nodeagent has no place for this ztunnel any more."""


class Handler(Protocol):
    """Who puts changes in force."""

    async def apply(self, change: Change, sockets: Mapping[str, PodSockets]) -> str:
        """Return "" or why not. `sockets` belong to the handler from the call on."""

    def held(self) -> Sequence[tuple[protocol.HeldPod, tuple[int, ...]]]:
        """Return the pods in service with their three listeners, which stay the handler's.

        Without listeners when it drains.
        """


class ControlStatus(msgspec.Struct, frozen=True):
    """One picture of the connection. Versions are 0 before the first change."""

    connected: bool
    version: int
    problem: str


Answerer = Callable[[str, Mapping[str, str]], Awaitable[bytes]]


class Control:
    """The client. `answer` answers nodeagent's questions: JSON, or KeyError for an unknown name.

    `started` is when this process began, nanoseconds of CLOCK_BOOTTIME.
    """

    def __init__(self, path: str, handler: Handler, answer: Answerer, started: int = 0) -> None:
        self._path = path
        self._handler = handler
        self._answer = answer
        self._started = started
        self.draining = False
        """Whether the next conversation begins as one that drains."""
        self._channel: Channel | None = None
        self._sending = asyncio.Lock()
        self._said = 0
        self._connected = False
        self._version = 0
        self._problem = "never connected"

    @property
    def status(self) -> ControlStatus:
        return ControlStatus(self._connected, self._version, self._problem)

    async def run(self) -> None:
        """Converse until cancelled. Returns only when nodeagent has sent us away."""
        backoff = FIRST_BACKOFF
        while True:
            try:
                channel = await connect(self._path)
            except (OSError, ChannelError) as error:
                self._lost(f"cannot connect to {self._path}: {_why(error)}")
            else:
                try:
                    await self._converse(channel)
                except Dismissed:
                    self._lost("sent away by nodeagent")
                    return
                except (OSError, ChannelError, protocol.ProtocolError) as error:
                    if self._connected:
                        backoff = FIRST_BACKOFF
                    self._lost(_why(error))
                except TimeoutError:
                    self._lost("nodeagent stopped in the middle of a message or does not read")
                finally:
                    self._connected = False
                    self._channel = None
                    channel.close()
            # Jitter: many nodes' tunnels, and many restarts, must not fall into step.
            await asyncio.sleep(backoff * _jitter.uniform(0.5, 1.0))
            backoff = min(2 * backoff, LAST_BACKOFF)

    def _lost(self, problem: str) -> None:
        if problem != self._problem:
            _log.warning("not connected to nodeagent", problem=problem)
        self._problem = problem

    async def _converse(self, channel: Channel) -> None:
        settings = await self._greet(channel)
        self._connected = True
        self._channel = channel
        self._problem = ""
        _log.info("connected to nodeagent", path=self._path, node=settings.node)
        pending: _Pending | None = None
        replies: set[asyncio.Future[None]] = set()
        # Only for the first change: later ones keep them.
        fresh: protocol.Settings | None = settings
        try:
            while True:
                deadline = PART_SECONDS if pending is not None else None
                async with asyncio.timeout(deadline):
                    message, descriptors = await channel.receive()
                match message:
                    case protocol.Update():
                        if pending is None:
                            pending = self._begin(message, descriptors, first=fresh is not None)
                        pending.add(message, descriptors)
                        if message.commit:
                            ready, pending = pending, None
                            await self._commit(channel, ready, fresh)
                            fresh = None
                    case protocol.Query(what=what) if what in LONG_QUESTIONS:
                        _none_expected(descriptors)
                        replies.add(asyncio.ensure_future(self._reply_later(channel, message)))
                        replies = {reply for reply in replies if not reply.done()}
                    case protocol.Query():
                        _none_expected(descriptors)
                        await self._reply(channel, message)
                    case protocol.Refusal():
                        _none_expected(descriptors)
                        _log.warning("nodeagent ended the conversation", reason=message.reason)
                        raise Dismissed
                    case protocol.Answer():
                        # To `tell`, which waits for none.
                        _none_expected(descriptors)
                    case _:
                        _close(descriptors)
                        raise protocol.ProtocolError(f"unexpected {type(message).__name__}")
        finally:
            for reply in replies:
                reply.cancel()
            if pending is not None:
                pending.close()

    def _begin(
        self, part: protocol.Update, descriptors: tuple[int, ...], *, first: bool
    ) -> _Pending:
        """Within a conversation versions grow; what nodeagent says first is the whole state."""
        problem = ""
        if first and not part.reset:
            problem = "the first change of a conversation must be a reset"
        elif not first and part.version <= self._version:
            problem = f"version {part.version} does not follow version {self._version}"
        if problem:
            _close(descriptors)
            raise protocol.ProtocolError(problem)
        return _Pending(part.version, reset=part.reset)

    async def _greet(self, channel: Channel) -> protocol.Settings:
        held = self._handler.held()
        async with asyncio.timeout(WELCOME_SECONDS):
            await channel.send(
                protocol.Hello(
                    protocol.PROTOCOL_VERSION, os.getpid(), len(held), self._started, self.draining
                )
            )
            for pod, listeners in held:
                await channel.send(pod, listeners)
            message, descriptors = await channel.receive()
        _none_expected(descriptors)
        match message:
            case protocol.Welcome(version=protocol.PROTOCOL_VERSION):
                return message.settings
            case protocol.Welcome():
                raise ChannelError(
                    f"nodeagent speaks protocol version {message.version}, ztunnel "
                    f"{protocol.PROTOCOL_VERSION}: install both from the same release"
                )
            case protocol.Refusal():
                raise ChannelError(f"nodeagent refused us: {message.reason}")
        raise protocol.ProtocolError(f"{type(message).__name__} instead of a welcome")

    async def _commit(
        self, channel: Channel, pending: _Pending, settings: protocol.Settings | None
    ) -> None:
        change = pending.change(settings)
        # Shielded from cancellation: a change is put in force whole, and so are its descriptors.
        error = await asyncio.shield(
            asyncio.ensure_future(self._handler.apply(change, pending.take()))
        )
        if error:
            _log.error(
                "a change was refused; the state before it stays in force",
                version=change.version,
                error=error,
            )
        else:
            self._version = change.version
        await self._send(channel, protocol.Ack(change.version, error))

    async def _reply(self, channel: Channel, query: protocol.Query) -> None:
        try:
            reply = protocol.Answer(query.id, await self._answer(query.what, query.args))
        except KeyError:
            reply = protocol.Answer(query.id, error="no such question")
        await self._send(channel, reply)

    async def _reply_later(self, channel: Channel, query: protocol.Query) -> None:
        """Answer while the conversation goes on. What cannot be sent, or not in time, is not."""
        with contextlib.suppress(OSError, TimeoutError):
            await self._reply(channel, query)

    async def tell(self, what: str, args: Mapping[str, str]) -> bool:
        """Tell nodeagent something, if it is there; what it answers is not waited for."""
        self._said += 1
        return await self.report(protocol.Query(self._said, what, dict(args)))

    async def report(self, message: protocol.Query | protocol.Flows) -> bool:
        """Hand `message` to the kernel for nodeagent; False if it cannot get there."""
        channel = self._channel
        if channel is None:
            return False
        try:
            await self._send(channel, message)
        except (OSError, TimeoutError):
            return False
        return True

    async def _send(self, channel: Channel, message: protocol.Message) -> None:
        async with asyncio.timeout(SEND_SECONDS), self._sending:
            await channel.send(message)


class _Pending:
    """A change whose parts are still coming. Owns the descriptors of its pods."""

    def __init__(self, version: int, *, reset: bool) -> None:
        self._version = version
        self._reset = reset
        self._upserts: list[protocol.Resource] = []
        self._removals: list[protocol.Removal] = []
        self._sockets: dict[str, PodSockets] = {}

    def add(self, part: protocol.Update, descriptors: tuple[int, ...]) -> None:
        """Take a part and, whatever happens, its descriptors."""
        pods = [entry for entry in part.upserts if isinstance(entry, protocol.Pod)]
        problem = self._problem_with(part, len(pods), len(descriptors))
        if problem:
            _close(descriptors)
            raise protocol.ProtocolError(problem)
        self._upserts += part.upserts
        self._removals += part.removals
        for position, pod in enumerate(pods):
            start = position * POD_DESCRIPTORS
            known = self._sockets.pop(pod.uid, None)
            if known is not None:
                known.close()
            self._sockets[pod.uid] = PodSockets(*descriptors[start : start + POD_DESCRIPTORS])

    def _problem_with(self, part: protocol.Update, pods: int, descriptors: int) -> str:
        if part.version != self._version:
            return "a change was begun before the last was committed"
        if part.reset and self._upserts:
            return "a reset in the middle of a change"
        if descriptors != POD_DESCRIPTORS * pods:
            return f"{pods} pods came with {descriptors} descriptors, each needs {POD_DESCRIPTORS}"
        held = len(self._upserts) + len(self._removals)
        if (
            held + len(part.upserts) + len(part.removals) > MAX_RESOURCES
            or len(self._sockets) + pods > MAX_PODS
        ):
            return "a change exceeds the limits"
        return ""

    def change(self, settings: protocol.Settings | None) -> Change:
        return Change(
            self._version, self._reset, tuple(self._upserts), tuple(self._removals), settings
        )

    def take(self) -> dict[str, PodSockets]:
        taken, self._sockets = self._sockets, {}
        return taken

    def close(self) -> None:
        for sockets in self.take().values():
            sockets.close()


def _close(descriptors: tuple[int, ...]) -> None:
    for descriptor in descriptors:
        with contextlib.suppress(OSError):
            os.close(descriptor)


def _none_expected(descriptors: tuple[int, ...]) -> None:
    if descriptors:
        _close(descriptors)
        raise protocol.ProtocolError("descriptors came with a message that carries none")


def _why(error: Exception) -> str:
    if isinstance(error, protocol.ProtocolError):
        return f"nodeagent broke the protocol: {error.reason}"
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return str(error)
