"""The `files` source: a watched directory of YAML and JSON files.

This module owns the life of each file: seen, settled, read, in force. It promises that an edit is
in force well within a second; that a file which is wrong in any way leaves its last good version in
force, also across a restart; and that the event loop never waits for the disk. It may not say which
documents conflict (`_admit`) or which paths may be read (`_directory`).

Theory of operation: events of the kernel only say when to look; a look compares every file's
signature with the one last taken, so that a lost event costs half a second and nothing else. What
differs is taken once it has kept still for SETTLE seconds: a file that is just being written would
otherwise be read half, and half a file of policies may well be valid. The first look takes
everything at once. What did not change is the same object from state to state, file by file and
document by document, so that whoever reads states can tell at once what is new.

What is in force is stored beside whoever puts it in force, and before the next look.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from pathlib import Path
from typing import Final

import msgspec
import structlog
import watchfiles

from nodeagent.api import ConfigError, Document, Loaded, load_file
from nodeagent.sources._admit import FileVersion, InForce, admit
from nodeagent.sources._directory import Listing, Signature, list_directory, read_file, unreadable
from nodeagent.sources._last_good import LastGood
from nodeagent.sources._source import SourceState

__all__ = ["RESCAN", "SETTLE", "FilesSource"]

SETTLE: Final = 0.1
"""Seconds that a file must keep still before it is read. Editors write within milliseconds."""

RESCAN: Final = 0.5
"""Seconds between looks without an event; with SETTLE it stays within the promised second."""

RESTLESS: Final = 5.0
"""Seconds after which a file that does not keep still is a problem that somebody must see."""

MAX_WARNINGS: Final = 100
"""Warnings of one change that are logged; a first load of very many policies may have thousands."""

_DEBOUNCE_MS: Final = 200
_STEP_MS: Final = 20

_log = structlog.get_logger()


class _Pending(msgspec.Struct, frozen=True):
    """A change that has not settled: what is seen (None: no file), since when, and first seen."""

    signature: Signature | None
    since: float
    first: float


class FilesSource:
    """Reads the files `*.yaml`, `*.yml` and `*.json` of `directory`, not of directories below.

    `node` is this node's name. With `last_good`, what was in force before a restart stays in force
    where the files are broken. `clock` gives seconds that never go back. For one reader.
    """

    def __init__(
        self,
        directory: Path,
        node: str,
        last_good: LastGood | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._directory = directory
        self._node = node
        self._last_good = last_good
        self._clock = clock
        self._taken: dict[str, Signature] = {}
        self._pending: dict[str, _Pending] = {}
        self._versions: dict[str, FileVersion] = {}
        self._errors: dict[str, tuple[ConfigError, ...]] = {}
        self._in_force = InForce()
        self._conflicts: list[ConfigError] = []
        self._decided: tuple[set[str], dict[str, FileVersion]] | None = None
        self._store_error: tuple[ConfigError, ...] = ()
        self._unsaved = False
        self._storing: asyncio.Task[None] | None = None
        self._identity: tuple[int, int] | None = None
        self._state: SourceState | None = None
        self._state_of: InForce | None = None
        self._listed = False
        """Whether the directory was read before. The first time files are taken as they are: a
        state without them would say that nothing is configured."""

    async def states(self) -> AsyncGenerator[SourceState, None]:
        """Yield the state now, then each later one; see `Source.states`."""
        await asyncio.to_thread(self._recall)
        try:
            yield await self._next()
            async with contextlib.aclosing(self._moments()) as moments:
                async for _ in moments:
                    before = self._state
                    state = await self._next()
                    if state is not before:
                        yield state
        finally:
            await self._stored()

    async def _next(self) -> SourceState:
        """Look, and begin to store what is in force."""
        await self._stored()
        state = await asyncio.to_thread(self._look)
        if self._unsaved:
            self._storing = asyncio.create_task(asyncio.to_thread(self._store))
        return state

    async def _stored(self) -> None:
        if self._storing is not None:
            await self._storing
            self._storing = None

    async def _moments(self) -> AsyncGenerator[None, None]:
        """Yield when it is time to look: on events, while changes settle, and every RESCAN."""
        while True:
            identity = self._identity
            if identity is None:
                # There is nothing to watch yet.
                await asyncio.sleep(RESCAN)
                yield
                continue
            try:
                async with contextlib.aclosing(self._events()) as events:
                    async for _ in events:
                        yield
                        while self._pending:
                            await asyncio.sleep(SETTLE)
                            yield
                        if self._identity != identity:
                            break
            except (OSError, RuntimeError) as error:
                # Gone between the look and the watch, or no watches left (watchfiles says that as
                # a RuntimeError): looking still works.
                _log.warning("config_watch_failed", path=str(self._directory), error=str(error))
                await asyncio.sleep(RESCAN)
                yield

    async def _events(self) -> AsyncGenerator[None, None]:
        changes: AsyncIterator[object] = watchfiles.awatch(
            self._directory,
            watch_filter=None,
            debounce=_DEBOUNCE_MS,
            step=_STEP_MS,
            rust_timeout=int(RESCAN * 1000),
            yield_on_timeout=True,
            recursive=False,
        )
        async for _ in changes:
            yield

    # --- what follows runs on a worker thread, one call at a time ------------------------------

    def _recall(self) -> None:
        """Take up what was in force before a restart."""
        if self._last_good is None:
            return
        try:
            stored = self._last_good.load()
        except OSError as error:
            self._note_store(error)
            return
        found = {name: self._load(name, data) for name, data in sorted(stored.items())}
        good = {
            name: FileVersion(loaded.documents, loaded.warnings, stored[name])
            for name, loaded in found.items()
            if not loaded.errors
        }
        self._in_force, _ = admit(InForce(), good, self._node)

    def _load(self, name: str, data: bytes) -> Loaded:
        return load_file(data, str(self._directory / name), self._node)

    def _look(self) -> SourceState:
        """Return the state, the same object if nothing has changed."""
        listing = list_directory(self._directory)
        self._identity = listing.identity
        problems: list[ConfigError] = []
        if listing.failure is not None:
            problems.append(listing.failure)
            self._pending.clear()
        else:
            self._examine(listing)
            self._decide({*self._taken, *self._pending, *listing.files, *listing.errors})
            self._listed = True
        for name in sorted(self._errors):
            problems += self._errors[name]
        problems += self._conflicts
        problems += self._restless()
        problems += self._store_error
        return self._publish(tuple(problems))

    def _examine(self, listing: Listing) -> None:
        """Take what has changed and settled, and forget what is gone."""
        for name, error in listing.errors.items():
            for kept in (self._pending, self._taken, self._versions):
                kept.pop(name, None)
            self._errors[name] = (error,)
        known = {*self._taken, *self._pending, *self._errors, *self._in_force.files}
        for name in sorted({*listing.files, *known} - {*listing.errors}):
            self._consider(name, listing.files.get(name))

    def _consider(self, name: str, seen: Signature | None) -> None:
        """Take a file that has changed and settled."""
        now = self._clock()
        if seen is not None and seen == self._taken.get(name):
            self._pending.pop(name, None)
            return
        pending = self._pending.get(name)
        if self._listed and (pending is None or pending.signature != seen):
            first = now if pending is None else pending.first
            self._pending[name] = _Pending(seen, now, first)
            return
        if pending is not None and now - pending.since < SETTLE:
            return
        if seen is not None:
            self._take(name, seen, now)
            return
        for kept in (self._pending, self._taken, self._versions, self._errors):
            kept.pop(name, None)

    def _take(self, name: str, seen: Signature, now: float) -> None:
        pending = self._pending.pop(name, None)
        try:
            found = read_file(self._directory, name)
        except OSError as error:
            # Not taken, so tried again at the next look: descriptors may be short, or a disk slow.
            self._taken.pop(name, None)
            self._versions.pop(name, None)
            path = str(self._directory / name)
            self._errors[name] = (ConfigError(path, 0, 0, "", unreadable(error)),)
            return
        if found is None:
            self._pending[name] = _Pending(seen, now, pending.first if pending else now)
            return
        data, self._taken[name] = found
        loaded = self._load(name, data)
        before = self._versions.pop(name, None)
        self._errors.pop(name, None)
        if loaded.errors:
            self._errors[name] = loaded.errors
        else:
            known = before or self._in_force.files.get(name)
            documents = _reused(loaded.documents, known.documents if known is not None else ())
            self._versions[name] = FileVersion(documents, loaded.warnings, data)

    def _decide(self, present: set[str]) -> None:
        """Put into force what may be. Files that are not in `present` are gone."""
        inputs = (present, dict(self._versions))
        if inputs == self._decided:
            return
        self._decided = inputs
        files = self._in_force.files
        wanted = {name: each for name, each in files.items() if name in present}
        wanted.update(self._versions)
        in_force, self._conflicts = admit(self._in_force, wanted, self._node)
        if in_force.files != files:
            self._in_force = in_force
            self._unsaved = self._last_good is not None

    def _store(self) -> None:
        """Keep what is in force across a restart. What cannot be is tried again at each look."""
        if self._last_good is None:
            return
        try:
            self._last_good.save({name: each.data for name, each in self._in_force.files.items()})
        except OSError as error:
            self._note_store(error)
        else:
            self._unsaved = False
            self._store_error = ()

    def _note_store(self, error: OSError) -> None:
        if self._last_good is not None:
            reason = f"the last good state is not kept across a restart: {error.strerror or error}"
            self._store_error = (ConfigError(os.fspath(self._last_good.path), 0, 0, "", reason),)

    def _restless(self) -> list[ConfigError]:
        now = self._clock()
        return [
            ConfigError(
                str(self._directory / name), 0, 0, "",
                "keeps changing, so it is not read: write it elsewhere and rename it to this name",
            )
            for name, pending in sorted(self._pending.items())
            if now - pending.first > RESTLESS and name not in self._errors
        ]  # fmt: skip

    def _publish(self, problems: tuple[ConfigError, ...]) -> SourceState:
        before = self._state
        if before is not None and self._state_of is self._in_force and before.problems == problems:
            return before
        versions = self._in_force.files.values()
        state = SourceState(
            documents=tuple(itertools.chain.from_iterable(each.documents for each in versions)),
            problems=problems,
            warnings=tuple(itertools.chain.from_iterable(each.warnings for each in versions)),
            version=1 if self._state is None else self._state.version,
        )
        self._state_of = self._in_force
        if state == self._state:
            return self._state
        if self._state is not None:
            state = msgspec.structs.replace(state, version=self._state.version + 1)
        self._log_change(self._state, state)
        self._state = state
        return state

    @staticmethod
    def _log_change(before: SourceState | None, now: SourceState) -> None:
        known = set() if before is None else set(before.problems)
        for problem in now.problems:
            if problem not in known:
                _log.error("config_refused", problem=str(problem))
        told = set() if before is None else set(before.warnings)
        fresh = [warning for warning in now.warnings if warning not in told]
        for warning in fresh[:MAX_WARNINGS]:
            _log.warning("config_warning", warning=str(warning))
        if len(fresh) > MAX_WARNINGS:
            left = len(fresh) - MAX_WARNINGS
            _log.warning("config_warnings_left_out", count=left, remedy="nodeagent status -o json")
        _log.info(
            "config_state",
            version=now.version,
            documents=len(now.documents),
            problems=len(now.problems),
            warnings=len(now.warnings),
        )


def _reused(documents: tuple[Document, ...], before: tuple[Document, ...]) -> tuple[Document, ...]:
    """Return `documents`; those that were there before, as the same objects."""
    known = {(type(each), each.uid): each for each in before}

    def same(document: Document) -> Document:
        held = known.get((type(document), document.uid))
        return held if held is not None and held == document else document

    return tuple(map(same, documents))
