"""Asks the core what it carries, and answers nodeagent's question for it.

This module owns the one listing that the core makes at a time, and the pages of the last snapshot
until they are taken. It promises that the loop turns between portions of it, that what nobody
fetches is let go, and that a core which does not answer keeps nobody waiting for long. It may not
know what a connection means (`connections`).
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

import msgspec

from ztunnel.connection_messages import Connection, ConnectionFilter, ConnectionPage
from ztunnel.observe.connections import Joiner, paged

if TYPE_CHECKING:
    from ztunnel._core import Listed
    from ztunnel.corelike import CoreLike
    from ztunnel.tunnel import Tunnel

__all__ = ["Listing"]

LISTED_A_TURN: Final = 256
"""Connections joined before the loop turns: about two milliseconds."""

CORE_SECONDS: Final = 2.0
"""For all workers to copy what they carry, which takes a millisecond for each thousand; below what
nodeagent waits for the answer."""

KEEP_SECONDS: Final = 15.0
"""For the further pages of a snapshot to be fetched, which happens at once."""


class Listing:
    """One core's snapshots. `clock` is monotonic, `wall` since the epoch; both seconds."""

    def __init__(
        self,
        core: CoreLike,
        tunnel: Tunnel,
        states: Sequence[str],
        clock: Callable[[], float],
        wall: Callable[[], float],
    ) -> None:
        self._core = core
        self._tunnel = tunnel
        self._states = states
        self._clock = clock
        self._wall = wall
        self._one = asyncio.Lock()
        self._ready = asyncio.Event()
        tunnel.on_pump = self._ready.set
        self._snapshot = 0
        self._pages: list[ConnectionPage] = []

    async def answer(self, args: Mapping[str, str]) -> bytes:
        """Answer with a `ConnectionPage`: of a new snapshot, or a further one.

        `args` are a `ConnectionFilter`, or `snapshot` and `page`. Raises KeyError for anything else
        and for a page that is not there (any more), TimeoutError.
        """
        if "snapshot" in args:
            page = self._page(args)
        else:
            async with self._one:
                page = await self._take(args)
        return await asyncio.to_thread(msgspec.json.encode, page)

    def _page(self, args: Mapping[str, str]) -> ConnectionPage:
        number = args.get("page", "")
        if args["snapshot"] != str(self._snapshot) or not number.isdecimal():
            raise KeyError("page")
        if not 0 < int(number) < len(self._pages):
            raise KeyError("page")
        page = self._pages[int(number)]
        if int(number) == len(self._pages) - 1:
            self._pages = []
        return page

    async def _take(self, args: Mapping[str, str]) -> ConnectionPage:
        try:
            wanted = ConnectionFilter.read(args)
        except ValueError as error:
            raise KeyError(str(error)) from None
        now = self._wall()
        found, missed = await self._listed(
            Joiner(self._tunnel, os.getpid(), self._states, now - self._clock()), wanted
        )
        parts = await asyncio.to_thread(paged, found, wanted.limit)
        self._snapshot += 1
        self._pages = [
            ConnectionPage(
                snapshot=self._snapshot,
                pages=len(parts),
                time=datetime.fromtimestamp(now, UTC),
                total=len(found),
                missed=missed,
                connections=part,
            )
            for part in parts
        ]
        first = self._pages[0]
        if len(self._pages) == 1:
            self._pages = []
        else:
            asyncio.get_running_loop().call_later(KEEP_SECONDS, self._forget, self._snapshot)
        return first

    def _forget(self, snapshot: int) -> None:
        if snapshot == self._snapshot:
            self._pages = []

    async def look(self, take: Callable[[list[Listed]], None]) -> int:
        """Show `take` all connections in portions; return how many there was no room for.

        Raises TimeoutError.
        """
        async with self._one:
            return await self._look(take)

    async def _look(self, take: Callable[[list[Listed]], None]) -> int:
        async with asyncio.timeout(CORE_SECONDS):
            await self._begin()
            while True:
                listed, over, missed = await self._portion()
                take(listed)
                if over:
                    return missed

    async def _listed(
        self, joiner: Joiner, wanted: ConnectionFilter
    ) -> tuple[list[Connection], int]:
        found: list[Connection] = []

        def take(listed: list[Listed]) -> None:
            joined = map(joiner.join, listed)
            found.extend(each for each in joined if wanted.admits(each))

        missed = await self._look(take)
        return found, missed

    async def _begin(self) -> None:
        """Have the core begin, once what an asker left behind that gave up is out of the way."""
        while True:
            try:
                self._core.list_connections()
            except BlockingIOError:
                await self._portion()
            else:
                return

    async def _portion(self) -> tuple[list[Listed], bool, int]:
        self._ready.clear()
        listed, over, missed = self._core.listed(LISTED_A_TURN)
        if listed or over:
            await asyncio.sleep(0)
        else:
            await self._ready.wait()
        return listed, over, missed
