"""The answers that are made of recorded flows, when somebody asks for them.

This module owns how they come about: what ztunnel has counted is fetched first, and the work is
done on a thread, so that it holds nobody up. It promises that metrics cost one look in
SCORE_SECONDS, however often they are read, and none where nobody reads them. What the answers say
is decided in `observe`.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING, Final

import msgspec

from nodeagent.admin.server import NoAnswerError
from nodeagent.control import QueryError
from nodeagent.observe import asdex, graph, plaintext
from nodeagent.observe.asdex_metrics import AsdexSeries
from nodeagent.offline import Offline, UnusableError

if TYPE_CHECKING:
    from nodeagent.agent import Agent
    from nodeagent.observe.asdex_model import AsdexReport

__all__ = ["Reports"]

SCORE_WINDOW: Final = 3600
"""Seconds that the metric of ASDEX is about: what is in memory."""

SCORE_SECONDS: Final = 60.0
"""Between two looks for that metric: an hour's score does not move faster."""


class Reports:
    """The reports of one agent. All methods belong to the event loop's thread."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._node = agent.settings.node
        self._flows = agent.parts.flows
        self._series = AsdexSeries()
        agent.instruments.registry.register(self._series)
        self._scoring = asyncio.Lock()
        self._scored = -SCORE_SECONDS
        self._judge: tuple[object, Offline] | None = None

    async def graph(self, age: int) -> bytes:
        """Return `/graph` for the last `age` seconds, as JSON."""
        await self.reported()
        place = self._agent.place()
        off: Offline | None = None
        with contextlib.suppress(NoAnswerError):
            off = await self._off()

        def made() -> bytes:
            recording = self._flows.seen(self._node, age)
            known = place
            if off is not None:
                scores = asdex.scores(asdex.build(recording, place.pods, off))
                known = msgspec.structs.replace(place, asdex=scores)
            return msgspec.json.encode(graph.build(recording, known))

        return await asyncio.to_thread(made)

    async def plaintext(self, age: int) -> bytes:
        """Return `/report/plaintext` for the last `age` seconds, as JSON.

        Raises NoAnswerError where it is not known yet which workloads there are: a report on none
        says of none that STRICT is not safe.
        """
        if not self._agent.loaded.is_set():
            raise NoAnswerError("no configuration has been loaded yet: ask again")
        asked = await self.reported()
        pods, off = self._agent.picture().pods, await self._off()
        own = self._agent.settings.node_addresses

        def made() -> bytes:
            recording = self._flows.read(self._node, age, asked=asked)
            return msgspec.json.encode(plaintext.build(recording, pods, own, off))

        return await asyncio.to_thread(made)

    async def asdex(self, age: int) -> bytes:
        """Return `/asdex` for the last `age` seconds, as JSON."""
        await self.reported()
        return msgspec.json.encode(await self._asdex(age))

    async def score(self) -> None:
        """Have the metric of ASDEX show what is so now, or was a minute ago."""
        async with self._scoring:
            if time.monotonic() - self._scored >= SCORE_SECONDS:
                found: AsdexReport | None = None
                with contextlib.suppress(NoAnswerError):
                    found = await self._asdex(SCORE_WINDOW)
                self._series.show(found)
                self._scored = time.monotonic()

    async def reported(self) -> float:
        """Have ztunnel tell what it has counted since its last report.

        Returns the time up to which it must have told everything, seconds since the epoch. Whether
        it has is known by what is recorded then.
        """
        asked = time.time()
        try:
            await self._agent.control.query("report")
        except QueryError:
            # Reports count whole seconds: one of this very second was before.
            return asked + 1
        return asked

    async def _asdex(self, age: int) -> AsdexReport:
        pods, off = self._agent.picture().pods, await self._off()
        return await asyncio.to_thread(
            lambda: asdex.build(self._flows.seen(self._node, age), pods, off)
        )

    async def _off(self) -> Offline:
        """Return what judges as ztunnel does, made anew only when that has been told otherwise.

        Raises NoAnswerError if ztunnel would not take what it is to be told.
        """
        state = self._agent.control.state
        if self._judge is None or self._judge[0] is not state:
            resources = tuple(state.values())
            try:
                off = await asyncio.to_thread(Offline.in_force, resources, self._agent.settings)
            except UnusableError as error:
                raise NoAnswerError(f"ztunnel would refuse the configuration: {error}") from error
            self._judge = (state, off)
        return self._judge[1]
