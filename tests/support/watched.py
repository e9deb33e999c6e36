"""A watched directory, and a reader of the states that its source yields."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

from nodeagent.sources import FilesSource, LastGood, Source, SourceState

DEADLINE = 20.0
"""Seconds until a test gives up; nothing is measured."""


class Reader:
    """Reads a source's states until one fulfils a condition."""

    def __init__(self, states: AsyncIterator[SourceState]) -> None:
        self._states = states
        self.seen: list[SourceState] = []

    async def until(self, condition: Callable[[SourceState], bool]) -> SourceState:
        if self.seen and condition(self.seen[-1]):
            return self.seen[-1]
        async with asyncio.timeout(DEADLINE):
            async for state in self._states:
                self.seen.append(state)
                if condition(state):
                    return state
        raise AssertionError("the source ended")

    async def names(self, *wanted: str) -> SourceState:
        return await self.until(lambda state: names(state) == list(wanted))

    async def problem(self, text: str) -> SourceState:
        return await self.until(lambda state: text in problems(state))


def names(state: SourceState) -> list[str]:
    return [document.metadata.name for document in state.documents]


def problems(state: SourceState) -> str:
    return "\n".join(str(problem) for problem in state.problems)


def run(source: Source, body: Callable[[Reader], Awaitable[None]]) -> None:
    async def main() -> None:
        states = source.states()
        try:
            await body(Reader(states))
        finally:
            await states.aclose()  # type: ignore[attr-defined]  # a generator

    asyncio.run(main())


def put(path: Path, *texts: str) -> None:
    """Replace a file as a whole, as good editors do."""
    new = path.with_name(f".{path.name}.new")
    new.write_text("\n---\n".join(texts))
    new.rename(path)


def chmod(path: Path, mode: int) -> None:
    path.chmod(mode)


def move(path: Path, to: Path) -> None:
    path.rename(to)


def source(folder: Path, last_good: bool = False) -> FilesSource:
    store = LastGood(folder.parent / "state" / "files", folder) if last_good else None
    return FilesSource(folder, "n1", store)
