"""The end of this tunnel: it hands over to a successor, or is stopped.

This module owns the order of the last steps. It promises that this tunnel goes on as before until a
successor has the whole state in force (nodeagent says so) and for ever if none gets there; that
from then on it accepts nothing, serves what it carries to the end or to the deadline `drain`, and
goes on being told what is no longer allowed; and that it ends in bounded time when it is stopped.
It may not judge connections, nor know how nodeagent chooses.

SIGHUP    start a successor: the same command line, from the package that is installed now.
SIGTERM   while draining for a successor: nothing new, it ends by itself. Else stop: what is carried
          has STOP_SECONDS to end; a second one ends at once.
SIGINT    end at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any, Final, Protocol

import structlog

if TYPE_CHECKING:
    from ztunnel.corelike import CoreLike
    from ztunnel.successor import Started

__all__ = ["Manager", "Upgrade"]

_log: Final[structlog.stdlib.BoundLogger] = structlog.get_logger("ztunnel.upgrade")

STOP_SECONDS: Final = 3.0
"""For what is carried, when nobody takes over: most requests are over within it, and new
connections wait in the backlog meanwhile."""

SUCCESSOR_SECONDS: Final = 25.0
"""From a successor's start until it serves: it takes about a second. Below the unit's
TimeoutStartSec, which also ends a reload."""

KILL_SECONDS: Final = STOP_SECONDS + 2.0
"""From a failed successor's SIGTERM to its SIGKILL: it may have accepted connections."""

POLL_SECONDS: Final = 0.1
"""Between looks at what is left: an empty tunnel should not stay for long."""

TELL_SECONDS: Final = 1.0
"""For the last word to nodeagent."""


class Manager(Protocol):
    """The service manager (`sdnotify.Notifier`)."""

    def ready(self) -> None: ...

    def reloading(self) -> None: ...

    def handed_over(self, pid: int) -> None: ...

    def stopping(self) -> None: ...


Tell = Callable[[str, Mapping[str, str]], Awaitable[bool]]


class Upgrade:
    """The steps of one tunnel. `clock` is monotonic, seconds; all methods belong to the loop.

    `drain` stops accepting. `launch` starts a successor. `tell` says something to nodeagent.
    `cut` returns how many connections the drain's deadline has ended so far.
    """

    def __init__(
        self,
        core: CoreLike,
        drain: Callable[[], None],
        launch: Callable[[], Awaitable[Started]],
        tell: Tell,
        cut: Callable[[], int],
        manager: Manager,
        clock: Callable[[], float],
    ) -> None:
        self._core = core
        self._drain = drain
        self._launch = launch
        self._tell = tell
        self._cut = cut
        self._manager = manager
        self._clock = clock
        self._draining = asyncio.Event()
        self._reload = asyncio.Event()
        self._since = 0.0
        self._until: float | None = None
        self._successor = 0
        self.over = asyncio.Event()
        """Set when the process is to end."""
        self.problem = ""
        """Why the last reload failed."""

    @property
    def draining(self) -> bool:
        return self._draining.is_set()

    def status(self) -> dict[str, Any] | None:
        """Return what an operator sees of the drain; None while there is none."""
        if not self.draining:
            return None
        return {
            "seconds": round(self._clock() - self._since, 1),
            "successor": self._successor,
            "cut": self._cut(),
        }

    # --- orders -------------------------------------------------------------------------------

    def hand_over(self, successor: int) -> None:
        """Take nodeagent's order: the process `successor` serves from now on."""
        _log.info("a successor serves; draining", successor=successor)
        self._successor = successor
        self._until = None
        self._begin()
        self._manager.handed_over(successor)

    def stop(self) -> None:
        if self._successor:
            _log.info("draining goes on until all has ended; SIGINT ends it now")
        elif self.draining:
            self.over.set()
        else:
            _log.info("stopping", seconds=STOP_SECONDS)
            self._manager.stopping()
            self._until = self._clock() + STOP_SECONDS
            self._begin()

    def end(self) -> None:
        self.over.set()

    def reload(self) -> None:
        if self.draining:
            _log.warning("no reload: this tunnel drains, its successor serves")
        else:
            self._reload.set()

    def _begin(self) -> None:
        if not self.draining:
            self._since = self._clock()
            self._draining.set()
            self._drain()

    # --- loops --------------------------------------------------------------------------------

    async def run(self) -> None:
        """Set `over` when a drain is at its end."""
        await self._draining.wait()
        while True:
            if self._core.drained() or self._late():
                break
            await asyncio.sleep(POLL_SECONDS)
        left = self._core.stats().connections
        cut = self._cut() + left
        seconds = self._clock() - self._since
        _log.info("drained", seconds=round(seconds, 1), cut=cut)
        if self._successor:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TELL_SECONDS):
                    await self._tell("drained", {"cut": str(cut), "seconds": f"{seconds:.1f}"})
        self.over.set()

    def _late(self) -> bool:
        return self._until is not None and self._clock() >= self._until

    async def reloads(self) -> None:
        """Serve the orders to reload."""
        while True:
            await self._reload.wait()
            self._manager.reloading()
            self.problem = await self._succeed()
            self._reload.clear()
            if self.draining:
                return
            _log.error("reload failed; this tunnel goes on", problem=self.problem)
            # The reload is over for the service manager, and nothing has changed.
            self._manager.ready()

    async def _succeed(self) -> str:
        """Start a successor and wait until it has taken over; return why not, or ""."""
        try:
            started = await self._launch()
        except OSError as error:
            return f"no successor could be started: {error}"
        _log.info("successor started", pid=started.pid)
        ended = asyncio.ensure_future(started.ended())
        drained = asyncio.ensure_future(self._draining.wait())
        try:
            await asyncio.wait(
                {ended, drained}, timeout=SUCCESSOR_SECONDS, return_when=asyncio.FIRST_COMPLETED
            )
            if self.draining:
                return ""
            if ended.done():
                return f"the successor (pid {started.pid}) ended; its own lines above say why"
            started.signal(signal.SIGTERM)
            await asyncio.wait({ended}, timeout=KILL_SECONDS)
            started.signal(signal.SIGKILL)
            return (
                f"the successor (pid {started.pid}) did not serve within {SUCCESSOR_SECONDS:.0f} s"
            )
        finally:
            for each in (ended, drained):
                each.cancel()
            await asyncio.gather(ended, drained, return_exceptions=True)
            started.close()
