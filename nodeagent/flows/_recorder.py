"""The thread that writes recorded flows: takes messages, keeps the file, says what went wrong once.

This module owns the queue and the thread. It promises that `put` returns at once whatever the disk
does, that what finds no room or cannot be written is counted, that an error is logged when it comes
and when it has gone and not with every message, and that no defect here ends more than recording.
It may not know what flows mean.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Collection, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, NamedTuple, Protocol

import msgspec
import structlog

from nodeagent.flows._errors import DamagedError, StoreError
from nodeagent.flows._heard import Heard
from nodeagent.flows._model import SCHEMA, Recording
from nodeagent.flows._reading import recording
from nodeagent.flows._recent import Recent
from nodeagent.flows._store import HOUR, FlowStore
from nodeagent.settings.flows import Keep
from ztunnel.protocol import Flows

__all__ = ["Recorder", "RecorderStatus"]

MAX_QUEUED: Final = 20_000
"""Flows that wait for the disk, 10 MB at most: several reports of a busy node. More are dropped and
counted; the next report counts on from there."""

WRITTEN_SECONDS: Final = 2.0
"""For a reader to wait for the writer: who asks wants to see what he has just done."""

SHORT_SECONDS: Final = 900
"""Of a shorter window, the hours of the file would tell mostly of another time: what is in memory
is the better answer, even if that began after the window."""

RETRY_SECONDS: Final = 30.0
"""Until a file that cannot be used is tried again."""

log = structlog.get_logger()


OFF: Final = "the settings do not ask for it: flows.retention_hours is 0"


class RecorderStatus(msgspec.Struct, frozen=True):
    """One picture. `lost` counts flows that were reported and not recorded."""

    recorded: int
    lost: int
    bytes: int
    problem: str


class _Told(NamedTuple):
    process: int
    message: Flows


class _Watch(NamedTuple):
    """Who is captured. `going_on` are those that were all the time, None: whose pod is the same."""

    pods: dict[str, str]
    going_on: frozenset[str] | None


class _Check(NamedTuple):
    """The file is to be looked at, as at the start."""


class _Store(Protocol):
    def add(self, process: int, message: Flows, /) -> None: ...

    def retain(self, pods: Collection[str], /) -> None: ...

    def watch(
        self, pods: Mapping[str, str], going_on: Collection[str] | None, now: float, /
    ) -> None: ...

    @property
    def files(self) -> int: ...

    def prune(self, now: float, /) -> None: ...

    def close(self) -> None: ...

    @property
    def bytes(self) -> int: ...


class Recorder:
    """Writes to the file `path`, on a thread of its own. `wall` is seconds since the epoch."""

    def __init__(
        self,
        path: Path,
        keep: Keep,
        wall: Callable[[], float],
        clock: Callable[[], float],
        store: _Store | None = None,
    ) -> None:
        self.path = path
        self.enabled = keep.retention_hours > 0
        self._wall = wall
        self._clock = clock
        self._store = store or FlowStore(path, keep)
        self._recent = Recent(wall())
        self._heard = Heard(wall())
        self._queue: queue.SimpleQueue[_Told | _Watch | _Check | threading.Event | None]
        self._queue = queue.SimpleQueue()
        self._before: frozenset[str] = frozenset()
        self._watched: dict[str, str] | None = None
        self._given = 0  # flows and messages, by the thread that puts
        self._taken = 0  # the same, by the thread that writes
        self._dropped = 0  # by the thread that puts
        self._failed = 0  # by the thread that writes, as all below
        self._recorded = 0
        self._bytes = 0
        self._problem = ""
        self._retry_at = 0.0
        self._pruned = -1
        self._retained = False
        self._now_watched: dict[str, str] = {}
        self._watch: _Watch | None = None  # what is not written yet
        self._files = 0
        self._thread = threading.Thread(target=self._run, name="flows", daemon=True)

    def start(self) -> None:
        if self.enabled:
            self._thread.start()

    def stop(self, timeout: float) -> None:
        """Write what waits, within `timeout` seconds, and close the file."""
        if self._thread.ident is None:
            return
        self._queue.put(None)
        self._thread.join(timeout)
        if self._thread.is_alive():
            log.warning("recorded flows did not drain", flows=self._given - self._taken)

    def put(self, process: int, message: Flows) -> None:
        """Take what a process (by when it was started) has told. Never blocks; one thread only."""
        if not self.enabled:
            return
        self._recent.add(message.flows, self._wall())
        self._heard.add(process, message)
        size = 1 + len(message.flows)
        if self._given - self._taken + size > MAX_QUEUED:
            self._dropped += len(message.flows)
            return
        self._given += size
        self._queue.put(_Told(process, message))

    def resume(self, pods: Collection[str]) -> None:
        """Say which pods have been found captured. Before `start`: of all others it is not known
        whether they were captured all the time.
        """
        self._before = frozenset(pods)

    def watch(self, pods: Mapping[str, str]) -> None:
        """Say which workloads are captured, by the pod of each. Never blocks; as `put`.

        Of those that are in it again, this is so all the time, also where the pod is another.
        """
        found = dict(pods)
        if self.enabled and found != self._watched:
            before = self._watched
            going_on = None if before is None else frozenset(found.keys() & before.keys())
            self._queue.put(_Watch(found, going_on))
            self._watched = found

    @property
    def status(self) -> RecorderStatus:
        return RecorderStatus(
            self._recorded, self._dropped + self._failed, self._bytes, self._problem
        )

    def read(
        self, node: str, age: int, *, outbound: bool = False, asked: float | None = None
    ) -> Recording:
        """Return what was seen in the last `age` seconds; on any thread, and never raises.

        `outbound` and `asked` as of `recording`. Waits a moment for what has been put and is not
        written yet.
        """
        if self._thread.is_alive():
            written = threading.Event()
            self._queue.put(written)
            written.wait(WRITTEN_SECONDS)
        if not self.enabled:
            return _nothing(node, self._wall(), age, OFF)
        try:
            found = recording(self.path, node, self._wall(), age, outbound=outbound, asked=asked)
        except StoreError as error:
            if isinstance(error, DamagedError) and self._thread.is_alive():
                # Who writes may not have met the damage yet.
                self._queue.put(_Check())
            return _nothing(node, self._wall(), age, self._problem or str(error))
        return msgspec.structs.replace(found, problem=self._problem)

    def seen(self, node: str, age: int) -> Recording:
        """Return what was seen in the last `age` seconds, of callers and of called, as `read` does.

        From memory, where that has it all; else from the file, with all of its oldest hour.
        """
        now = self._wall()
        window = self._recent.read(now, age)
        began = datetime.fromtimestamp(window.began, UTC)
        since = self._heard.since(now)
        recent = Recording(
            schema=SCHEMA,
            node=node,
            time=datetime.fromtimestamp(now, UTC),
            since=datetime.fromtimestamp(window.since, UTC),
            oldest=began,
            flows=window.flows,
            problem=self._problem,
            complete=None if since is None else max(began, datetime.fromtimestamp(since, UTC)),
        )
        if self.enabled and (window.whole or age < SHORT_SECONDS):
            return recent
        found = self.read(node, age, outbound=True)
        if self.enabled and all(flow.first >= began for flow in found.flows):
            # The file holds nothing older than memory does, which knows better when it was.
            return msgspec.structs.replace(recent, complete=found.complete)
        hour = int(found.since.timestamp()) // HOUR * HOUR
        return msgspec.structs.replace(found, since=datetime.fromtimestamp(hour, UTC))

    # --- the thread -----------------------------------------------------------------------------

    def _run(self) -> None:
        # Once before anything is reported: what is over goes also on a node where nobody calls.
        self._write(None)
        while True:
            given = self._queue.get()
            if given is None:
                break
            if isinstance(given, threading.Event):
                given.set()
            elif isinstance(given, _Check):
                self._pruned = -1
                self._write(None)
            elif isinstance(given, _Watch):
                self._now_watched = given.pods
                # Where the one before is not written, what is in the file is older than that.
                self._watch = given if self._watch is None else _Watch(given.pods, frozenset())
                self._write(None)
            else:
                self._write(given)
                self._taken += 1 + len(given.message.flows)
        self._store.close()

    def _write(self, told: _Told | None) -> None:
        flows = 0 if told is None else len(told.message.flows)
        if self._problem and self._clock() < self._retry_at:
            self._failed += flows
            return
        try:
            self._prune()
            if told is not None:
                self._store.add(told.process, told.message)
            self._write_watch()
        except StoreError as error:
            self._trouble(str(error))
            self._failed += flows
        except Exception as error:
            if not self._problem:
                log.exception("a defect in recording flows")
            self._trouble(f"internal error ({type(error).__name__}): see the log")
            self._failed += flows
        else:
            self._recorded += flows
            self._bytes = self._store.bytes
            if self._problem:
                self._problem = ""
                log.info("flows are recorded again", file=str(self.path), lost=self._failed)

    def _write_watch(self) -> None:
        if not self._retained:
            self._store.retain(self._before)
            self._retained = True
        if self._store.files != self._files:
            # A new file knows of nobody.
            self._files = self._store.files
            self._watch = self._watch or _Watch(self._now_watched, frozenset())
        if self._watch is not None:
            self._store.watch(self._watch.pods, self._watch.going_on, self._wall())
            self._watch = None

    def _prune(self) -> None:
        hour = int(self._wall()) // HOUR
        if hour != self._pruned:
            self._store.prune(self._wall())
            self._pruned = hour

    def _trouble(self, problem: str) -> None:
        if not self._problem:
            log.error("flows are not recorded; traffic is not concerned", error=problem)
        self._problem = problem
        self._retry_at = self._clock() + RETRY_SECONDS
        # The next attempt begins with the file itself.
        self._store.close()


def _nothing(node: str, now: float, age: int, problem: str) -> Recording:
    return Recording(
        schema=SCHEMA,
        node=node,
        time=datetime.fromtimestamp(now, UTC),
        since=datetime.fromtimestamp(max(0.0, now - age), UTC),
        oldest=None,
        flows=(),
        problem=problem,
    )
