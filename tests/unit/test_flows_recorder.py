"""The thread that records: never in the way, and clear about what goes wrong."""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Mapping
from pathlib import Path

import pytest

from nodeagent.flows import Recorder, StoreError, _recorder
from nodeagent.settings.flows import Keep
from support.netns import wait_until
from ztunnel.protocol import Arrival, Flow, FlowKey, Flows

NOW = 1_700_000_000
KEY = FlowKey("", "10.0.0.9", "", Arrival.PLAINTEXT, "shop/db", "10.0.0.1", 5432, allowed=True)
FLOW = Flow(KEY, NOW, NOW, 1, 0, 0, 0)
DEADLINE = 20


def told(count: int, number: int = 1, until: int = NOW) -> Flows:
    return Flows((FLOW,) * count, number, NOW, until)


class Disk:
    """A store that does as the test says."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.pruned: list[float] = []
        self.retained: list[set[str]] = []
        self.watched: list[tuple[dict[str, str], Collection[str] | None, float]] = []
        self.files = 0
        self.error: Exception | None = None
        self.go = threading.Event()
        self.go.set()

    def add(self, _process: int, message: Flows, /) -> None:
        self.go.wait(DEADLINE)
        if self.error is not None:
            raise self.error
        self.batches.append(len(message.flows))

    def retain(self, pods: Collection[str], /) -> None:
        self.retained.append(set(pods))

    def watch(
        self, pods: Mapping[str, str], going_on: Collection[str] | None, now: float, /
    ) -> None:
        if self.error is not None:
            raise self.error
        self.watched.append((dict(pods), going_on, now))

    def prune(self, now: float, /) -> None:
        self.pruned.append(now)

    def close(self) -> None:
        pass

    @property
    def bytes(self) -> int:
        return 4096


class Made:
    def __init__(self, tmp_path: Path) -> None:
        self.disk = Disk()
        self.now = float(NOW)
        self.recorder = Recorder(
            tmp_path / "flows.db", Keep(), lambda: self.now, lambda: self.now, self.disk
        )

    def put(self, count: int) -> None:
        self.recorder.put(1, told(count))

    def settled(self, recorded: int, lost: int) -> None:
        def done() -> bool:
            status = self.recorder.status
            return (status.recorded, status.lost) == (recorded, lost)

        wait_until(done, f"{recorded} recorded and {lost} lost")


def test_batches_are_written_in_order_and_the_end_waits_for_them(tmp_path: Path) -> None:
    made = Made(tmp_path)
    made.recorder.start()
    for count in (1, 2, 3):
        made.put(count)
    made.recorder.stop(DEADLINE)
    assert made.disk.batches == [1, 2, 3]
    assert (made.recorder.status.recorded, made.recorder.status.bytes) == (6, 4096)


def test_a_disk_that_hangs_holds_nobody_up_and_the_queue_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_recorder, "MAX_QUEUED", 13)
    made = Made(tmp_path)
    made.disk.go.clear()
    made.recorder.start()
    begun = time.monotonic()
    for _ in range(100):
        made.put(3)
    made.recorder.stop(0.01)
    assert time.monotonic() - begun < DEADLINE
    assert made.recorder.status.lost == 97 * 3
    made.disk.go.set()
    made.settled(9, 97 * 3)


def test_an_error_is_said_once_and_its_end_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = Made(tmp_path)
    made.recorder.start()
    made.settled(0, 0)
    made.disk.error = StoreError("no room on the disk")
    for lost in (1, 2, 3):
        made.put(1)
        made.settled(0, lost)
    assert made.recorder.status.problem == "no room on the disk"
    made.disk.error = None
    # Not tried again before its time.
    made.put(1)
    made.settled(0, 4)
    made.now += _recorder.RETRY_SECONDS
    made.put(1)
    made.settled(1, 4)
    assert made.recorder.status.problem == ""
    made.recorder.stop(DEADLINE)
    said = capsys.readouterr().out
    assert said.count("flows are not recorded; traffic is not concerned") == 1
    assert said.count("flows are recorded again") == 1


def test_a_defect_costs_the_batch_and_nothing_else(tmp_path: Path) -> None:
    made = Made(tmp_path)
    made.disk.error = ZeroDivisionError("a defect")
    made.recorder.start()
    made.put(1)
    made.settled(0, 1)
    assert "ZeroDivisionError" in made.recorder.status.problem
    made.disk.error = None
    made.now += _recorder.RETRY_SECONDS
    made.put(1)
    made.settled(1, 1)
    made.recorder.stop(DEADLINE)


def test_old_hours_are_dropped_at_the_start_and_once_an_hour(tmp_path: Path) -> None:
    made = Made(tmp_path)
    made.recorder.start()
    for recorded in range(1, 6):
        made.put(1)
        made.settled(recorded, 0)
        made.now += 1300
    made.recorder.stop(DEADLINE)
    assert len(made.disk.pruned) == len({int(now) // 3600 for now in made.disk.pruned}) == 2


def test_without_retention_there_is_neither_thread_nor_file(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "flows.db", Keep(retention_hours=0), time.time, time.monotonic)
    recorder.start()
    recorder.put(1, told(1))
    recorder.stop(DEADLINE)
    assert list(tmp_path.iterdir()) == []
    assert "retention_hours is 0" in recorder.read("node-1", 3600).problem


def test_what_is_read_back_says_since_when_and_where(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "flows.db", Keep(), lambda: float(NOW + 60), time.monotonic)
    assert "nothing has been recorded" in recorder.read("node-1", 3600).problem
    recorder.start()
    recorder.put(1, told(1))
    recorder.stop(DEADLINE)
    found = recorder.read("node-1", 3600)
    assert (found.node, found.problem, found.truncated) == ("node-1", "", False)
    assert [each.source for each in found.flows] == ["10.0.0.9"]
    assert found.since.timestamp() == NOW + 60 - 3600
    assert found.oldest is not None
    assert found.oldest.timestamp() == NOW // 3600 * 3600
    assert recorder.read("node-1", 30).flows == ()
