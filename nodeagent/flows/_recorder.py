"""The thread that writes recorded flows: takes batches, keeps the file, says what went wrong once.

This module owns the queue and the thread. It promises that `put` returns at once whatever the disk
does, that what finds no room or cannot be written is counted, that an error is logged when it comes
and when it has gone and not with every batch, and that no defect here ends more than recording. It
may not know what flows mean.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Protocol

import msgspec
import structlog

from nodeagent.flow_settings import Keep
from nodeagent.flows._model import SCHEMA, Recording
from nodeagent.flows._recent import Recent
from nodeagent.flows._store import HOUR, FlowStore, StoreError, recording
from ztunnel.protocol import Flow

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


class _Store(Protocol):
    def add(self, flows: Sequence[Flow], /) -> None: ...

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
        self._queue: queue.SimpleQueue[Sequence[Flow] | threading.Event | None]
        self._queue = queue.SimpleQueue()
        self._given = 0  # flows, by the thread that puts
        self._taken = 0  # flows, by the thread that writes
        self._dropped = 0  # by the thread that puts
        self._failed = 0  # by the thread that writes, as all below
        self._recorded = 0
        self._bytes = 0
        self._problem = ""
        self._retry_at = 0.0
        self._pruned = -1
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

    def put(self, flows: Sequence[Flow]) -> None:
        """Take a batch. Never blocks; one thread only."""
        if not self.enabled:
            return
        self._recent.add(flows, self._wall())
        if self._given - self._taken + len(flows) > MAX_QUEUED:
            self._dropped += len(flows)
            return
        self._given += len(flows)
        self._queue.put(flows)

    @property
    def status(self) -> RecorderStatus:
        return RecorderStatus(
            self._recorded, self._dropped + self._failed, self._bytes, self._problem
        )

    def read(self, node: str, age: int, *, outbound: bool = False) -> Recording:
        """Return what was seen in the last `age` seconds; on any thread, and never raises.

        With `outbound`, what this node's workloads called is in it, too. Waits a moment for what
        has been put and is not written yet.
        """
        if self._thread.is_alive():
            written = threading.Event()
            self._queue.put(written)
            written.wait(WRITTEN_SECONDS)
        if not self.enabled:
            return _nothing(node, self._wall(), age, OFF)
        try:
            found = recording(self.path, node, self._wall(), age, outbound=outbound)
        except StoreError as error:
            return _nothing(node, self._wall(), age, self._problem or str(error))
        return msgspec.structs.replace(found, problem=self._problem)

    def seen(self, node: str, age: int) -> Recording:
        """Return what was seen in the last `age` seconds, of callers and of called, as `read` does.

        From memory, where that has it all; else from the file, with all of its oldest hour.
        """
        now = self._wall()
        window = self._recent.read(now, age)
        if self.enabled and (window.whole or age < SHORT_SECONDS):
            return Recording(
                schema=SCHEMA,
                node=node,
                time=datetime.fromtimestamp(now, UTC),
                since=datetime.fromtimestamp(window.since, UTC),
                oldest=datetime.fromtimestamp(window.began, UTC),
                flows=window.flows,
                problem=self._problem,
            )
        found = self.read(node, age, outbound=True)
        hour = int(found.since.timestamp()) // HOUR * HOUR
        return msgspec.structs.replace(found, since=datetime.fromtimestamp(hour, UTC))

    # --- the thread -----------------------------------------------------------------------------

    def _run(self) -> None:
        # Once before anything is reported: what is over goes also on a node where nobody calls.
        self._write(())
        while True:
            flows = self._queue.get()
            if flows is None:
                break
            if isinstance(flows, threading.Event):
                flows.set()
                continue
            self._write(flows)
            self._taken += len(flows)
        self._store.close()

    def _write(self, flows: Sequence[Flow]) -> None:
        if self._problem and self._clock() < self._retry_at:
            self._failed += len(flows)
            return
        try:
            self._prune()
            self._store.add(flows)
        except StoreError as error:
            self._failed += len(flows)
            self._trouble(str(error))
        except Exception as error:
            self._failed += len(flows)
            if not self._problem:
                log.exception("a defect in recording flows")
            self._trouble(f"internal error ({type(error).__name__}): see the log")
        else:
            self._recorded += len(flows)
            self._bytes = self._store.bytes
            if self._problem:
                self._problem = ""
                log.info("flows are recorded again", file=str(self.path), lost=self._failed)

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
