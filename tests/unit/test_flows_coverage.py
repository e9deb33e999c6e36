"""Since when nobody can have called unrecorded: lost messages, crashes, restarts, captures."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest

from nodeagent.flows import FlowStore, Recorder, Recording, _coverage, _spans, recording
from nodeagent.flows._coverage import CRASHED, DOWN, LOST, NOTHING, SILENT, Covered, Hole, Span
from nodeagent.settings.flows import Keep
from support.netns import wait_until
from ztunnel.protocol import Arrival, Flow, FlowKey, Flows

HOUR = 3600
NOW = 1_700_000_000 // HOUR * HOUR
KEY = FlowKey("", "10.0.0.9", "", Arrival.PLAINTEXT, "shop/db", "10.0.0.1", 5432, allowed=True)
LATE = _coverage.LATE_SECONDS
DEADLINE = 20


def covered(*spans: tuple[int, int, int, bool], since: int = 0, now: int = 1000) -> Covered:
    return _coverage.covered([Span(*span) for span in spans], since, now)


# --- from spans to what is known ----------------------------------------------------------------


def test_one_that_reports_covers_from_its_beginning() -> None:
    assert covered((1, 100, 1000, False), since=100) == Covered(100, (), ())
    assert covered((1, 100, 1000, False), since=50) == Covered(100, (Hole(50, 100, NOTHING),), ())
    # As late as it may be when nobody calls.
    assert covered((1, 100, 1000 - LATE, False), since=100) == Covered(100, (), ())


def test_without_a_word_nothing_is_known() -> None:
    assert covered(since=10) == Covered(None, (Hole(10, 1000, NOTHING),), ())
    silent = Hole(500, 1000, SILENT)
    assert covered((1, 100, 500, False), since=100) == Covered(None, (silent,), ())


def test_a_tunnel_that_was_asked_and_has_told_nothing_is_silent() -> None:
    """It may have crashed a moment ago, or what it told waits for the disk."""
    spans = [Span(1, 100, 995, ended=False)]
    assert _coverage.covered(spans, 100, 1000, expected=995) == Covered(100, (), ())
    silent = Hole(995, 1000, SILENT)
    assert _coverage.covered(spans, 100, 1000, expected=996) == Covered(None, (silent,), ())
    # But where it has ended in good order nobody has been let in.
    ended = [Span(1, 100, 995, ended=True)]
    down = (Hole(995, 1000, DOWN),)
    assert _coverage.covered(ended, 100, 1000, expected=1000) == Covered(100, (), down)


def test_what_was_lost_on_the_way_is_a_gap() -> None:
    found = covered((1, 100, 300, False), (1, 340, 1000, False), since=100)
    assert found == Covered(340, (Hole(300, 340, LOST),), ())


def test_a_crash_is_a_gap_until_the_next_one_begins() -> None:
    found = covered((1, 100, 300, False), (2, 320, 1000, False), since=100)
    assert found == Covered(320, (Hole(300, 320, CRASHED),), ())


def test_an_end_in_good_order_is_none_for_nobody_is_let_in() -> None:
    found = covered((1, 100, 300, True), (2, 320, 1000, False), since=100)
    assert found == Covered(100, (), (Hole(300, 320, DOWN),))
    assert covered((1, 100, 300, True), since=100) == Covered(100, (), (Hole(300, 1000, DOWN),))


def test_an_upgrade_leaves_no_gap() -> None:
    found = covered((1, 100, 500, True), (2, 400, 1000, False), since=100)
    assert found == Covered(100, (), ())


def test_one_that_is_killed_while_another_serves_may_have_had_something_to_tell() -> None:
    found = covered((1, 100, 500, False), (2, 400, 1000, False), since=100)
    assert found == Covered(500 + LATE, (Hole(500, 500 + LATE, CRASHED),), ())
    # It is merely a little behind.
    found = covered((1, 100, 990, False), (2, 400, 1000, False), since=100)
    assert found == Covered(100, (), ())


def test_what_one_lost_is_lost_whatever_another_told() -> None:
    found = covered((1, 100, 500, False), (1, 600, 900, True), (2, 400, 1000, False), since=100)
    assert found == Covered(600, (Hole(500, 600, LOST),), ())


def test_gaps_that_touch_are_one_and_those_of_before_are_left_out() -> None:
    spans = [(1, 100, 200, False), (1, 210, 210, False), (2, 211, 1000, False)]
    assert covered(*spans, since=150) == Covered(211, (Hole(200, 211, LOST),), ())
    assert covered(*spans, since=300) == Covered(211, (), ())
    assert covered(*spans, since=205) == Covered(211, (Hole(205, 211, LOST),), ())


# --- from messages to spans ---------------------------------------------------------------------


def told(number: int, until: int, *flows: Flow, more: bool = False, last: bool = False) -> Flows:
    return Flows(flows, number, NOW, NOW + until, more, last)


def flow(at: int, **changes: int) -> Flow:
    values = {"connections": 1, "open": 0, "received": 0, "sent": 0} | changes
    return Flow(KEY, NOW + at, NOW + at, **values)


def kept(tmp_path: Path, messages: Sequence[tuple[int, Flows]], **keep: int) -> FlowStore:
    found = FlowStore(tmp_path / "flows.db", Keep(**keep))
    for process, message in messages:
        found.add(process, message)
    return found


def read(tmp_path: Path, now: int, age: int = HOUR) -> Recording:
    return recording(tmp_path / "flows.db", "n1", NOW + now, age)


def since(found: Recording) -> int | None:
    return None if found.complete is None else int(found.complete.timestamp()) - NOW


def test_messages_without_a_gap_cover_from_the_first_ones_beginning(tmp_path: Path) -> None:
    kept(tmp_path, [(7, told(1, 5)), (7, told(2, 10, flow(8))), (7, told(3, 40))]).close()
    found = read(tmp_path, 50, age=50)
    assert (since(found), found.gaps, found.is_complete) == (0, (), True)


def test_a_message_that_is_missing_is_a_gap_up_to_the_one_after_it(tmp_path: Path) -> None:
    kept(tmp_path, [(7, told(1, 5)), (7, told(3, 40)), (7, told(4, 45))]).close()
    found = read(tmp_path, 50, age=50)
    (gap,) = found.gaps
    assert (gap.begin.timestamp() - NOW, gap.until.timestamp() - NOW) == (5, 41)
    assert (gap.cause, since(found), found.is_complete) == (LOST, 41, False)
    # Of a time behind it all is known.
    assert read(tmp_path, 50, age=9).is_complete


def test_portions_count_only_with_the_last_of_them(tmp_path: Path) -> None:
    messages = [(7, told(1, 5)), (7, told(2, 40, flow(30), more=True))]
    store = kept(tmp_path, messages)
    # It was killed before it could tell the rest.
    store.add(8, Flows((), 1, NOW + 50, NOW + 60))
    (gap,) = read(tmp_path, 60, age=60).gaps
    assert (gap.begin.timestamp() - NOW, gap.until.timestamp() - NOW) == (5, 50)
    store.close()


def test_a_portion_that_was_lost_is_not_forgotten_by_those_after_it(tmp_path: Path) -> None:
    messages = [(7, told(1, 5)), (7, told(3, 40, more=True)), (7, told(4, 40)), (7, told(5, 45))]
    kept(tmp_path, messages).close()
    assert since(read(tmp_path, 50, age=50)) == 41


def test_hours_that_were_dropped_are_not_known_any_more(tmp_path: Path) -> None:
    store = kept(tmp_path, [(7, told(1, 5, flow(3)))], retention_hours=2)
    for hour in range(1, 6):
        store.add(7, told(1 + hour, hour * HOUR + 5, flow(hour * HOUR)))
    store.prune(NOW + 5 * HOUR + 10)
    assert since(read(tmp_path, 5 * HOUR + 10)) == 3 * HOUR
    store.close()


def test_a_file_that_was_put_aside_or_removed_is_a_new_beginning(tmp_path: Path) -> None:
    store = kept(tmp_path, [(7, told(1, 5))])
    store.close()
    (tmp_path / "flows.db").write_bytes(b"no database" * 1000)
    store.add(7, told(2, 10))
    assert since(read(tmp_path, 20, age=20)) == 11
    for each in tmp_path.iterdir():
        each.unlink()
    store.add(7, told(3, 30))
    assert since(read(tmp_path, 40, age=40)) == 31
    assert store.files == 3
    store.close()


def test_what_ends_and_begins_within_one_second_leaves_a_gap(tmp_path: Path) -> None:
    """A tunnel that is killed and there again at once: whole seconds are rounded against it."""
    store = kept(tmp_path, [(7, told(1, 5))])
    # It began to count at 5.7: the first whole second is the next.
    store.add(8, Flows((), 1, NOW + 6, NOW + 5))
    store.add(8, Flows((), 2, NOW + 6, NOW + 10))
    store.close()
    found = read(tmp_path, 12, age=12)
    (gap,) = found.gaps
    assert (gap.begin.timestamp() - NOW, gap.until.timestamp() - NOW) == (5, 6)
    assert (gap.cause, since(found)) == (CRASHED, 6)


def test_spans_are_bounded_and_the_oldest_give_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_spans, "MAX_SPANS", 3)
    spans = [((7, told(3 * n, 10 * n)), (7, told(3 * n + 1, 10 * n + 5))) for n in range(1, 9)]
    kept(tmp_path, [message for span in spans for message in span]).close()
    found = read(tmp_path, 85, age=85)
    assert [int(gap.until.timestamp()) - NOW for gap in found.gaps] == [61, 71, 81]


# --- clocks that are wrong ----------------------------------------------------------------------


def test_after_the_clock_was_put_back_a_crash_is_a_gap_all_the_same(tmp_path: Path) -> None:
    store = kept(tmp_path, [(7, told(1, HOUR)), (7, told(2, HOUR + 5))])
    # An hour back; nothing was lost by that.
    store.add(7, told(3, 10))
    assert since(read(tmp_path, 11, age=10)) == 0
    # It crashes, and another comes before the time at which the first one had been already.
    store.add(8, Flows((), 1, NOW + 60, NOW + 60))
    store.add(8, Flows((), 2, NOW + 60, NOW + 65))
    store.close()
    found = read(tmp_path, 66, age=60)
    (gap,) = found.gaps
    assert (gap.begin.timestamp() - NOW, gap.until.timestamp() - NOW) == (10, 60)
    assert (gap.cause, since(found)) == (CRASHED, 60)


def test_a_clock_that_was_far_ahead_costs_what_it_dropped_and_no_more(tmp_path: Path) -> None:
    store = kept(tmp_path, [(7, told(1, 5))])
    ahead = 90 * 24 * HOUR
    store.watch({"shop/db": "shop/db@1"}, None, NOW + ahead)
    store.add(7, told(2, ahead))
    store.prune(NOW + ahead)
    # Right again: it is known since then, and not only in three months.
    store.add(7, told(3, 20))
    store.add(7, told(4, 25))
    store.close()
    found = read(tmp_path, 30)
    assert since(found) == 21
    assert found.watched == {"shop/db": datetime.fromtimestamp(NOW + 20, UTC)}


# --- who is captured ----------------------------------------------------------------------------


class Watching:
    """A recorder on a real file, whose clock the test turns."""

    def __init__(self, tmp_path: Path) -> None:
        self.path = tmp_path / "flows.db"
        self.now = float(NOW)
        self.recorder = self.made()
        self.number = 0

    def made(self) -> Recorder:
        return Recorder(self.path, Keep(), lambda: self.now, lambda: self.now)

    def again(self, *found: str) -> None:
        """Start anew: these pods are found captured."""
        self.recorder.stop(DEADLINE)
        self.recorder = self.made()
        self.recorder.resume(found)
        self.recorder.start()

    def until(self, wanted: dict[str, int]) -> None:
        wait_until(lambda: self.says() == wanted, f"{wanted} are watched since then")

    def says(self) -> dict[str, int]:
        found = self.recorder.read("n1", HOUR)
        return {uid: int(begin.timestamp()) - NOW for uid, begin in found.watched.items()}


@pytest.fixture
def watching(tmp_path: Path) -> Watching:
    made = Watching(tmp_path)
    made.recorder.start()
    return made


def test_a_workload_is_watched_from_when_it_is_captured(watching: Watching) -> None:
    watching.recorder.watch({"a/b": "a/b@1"})
    watching.until({"a/b": 0})
    watching.now += 10
    watching.recorder.watch({"a/b": "a/b@2", "a/c": "a/c@1"})
    watching.until({"a/b": 0, "a/c": 10})
    watching.recorder.watch({"a/c": "a/c@1"})
    watching.now += 10
    watching.recorder.watch({"a/b": "a/b@2", "a/c": "a/c@1"})
    watching.until({"a/b": 20, "a/c": 10})
    watching.recorder.stop(DEADLINE)


def test_after_a_restart_only_what_was_found_captured_was_so_meanwhile(watching: Watching) -> None:
    watching.recorder.watch({"a/b": "a/b@1", "a/c": "a/c@1", "a/d": "a/d@1"})
    watching.until({"a/b": 0, "a/c": 0, "a/d": 0})
    watching.now += 10
    watching.again("a/b@1", "a/d@1")
    watching.recorder.watch({"a/b": "a/b@1", "a/c": "a/c@1", "a/d": "a/d@2"})
    watching.until({"a/b": 0, "a/c": 10, "a/d": 10})
    watching.recorder.stop(DEADLINE)


def test_what_ztunnel_was_asked_for_and_is_not_in_the_file_is_not_known(
    watching: Watching,
) -> None:
    """However short ago the last report is: callers since then are in none."""
    watching.now += 10
    watching.recorder.put(7, told(1, 10))

    def complete(asked: float | None) -> bool:
        found = watching.recorder.read("n1", 5, asked=asked)
        return found.complete is not None and found.is_complete

    wait_until(lambda: complete(watching.now), "it has answered")
    watching.now += 5
    assert complete(None)
    assert not complete(watching.now)
    watching.recorder.put(7, told(2, 15))
    assert complete(watching.now)
    watching.recorder.stop(DEADLINE)


def test_who_is_watched_is_told_to_a_new_file_too(watching: Watching) -> None:
    watching.recorder.watch({"a/b": "a/b@1"})
    watching.until({"a/b": 0})
    for each in watching.path.parent.iterdir():
        each.unlink()
    watching.now += 10
    watching.recorder.put(7, told(1, 5))
    watching.until({"a/b": 10})
    watching.recorder.stop(DEADLINE)


def test_a_file_that_is_damaged_while_it_is_written_is_begun_anew_when_it_is_read(
    watching: Watching,
) -> None:
    watching.recorder.watch({"a/b": "a/b@1"})
    flows = [
        Flow(msgspec.structs.replace(KEY, port=1 + n), NOW, NOW, 1, 0, 0, 0) for n in range(900)
    ]
    watching.recorder.put(7, told(1, 5, *flows))
    watching.until({"a/b": 0})
    with contextlib.closing(sqlite3.connect(watching.path)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    with watching.path.open("r+b") as stream:
        stream.seek(4096)
        stream.write(b"\xff" * (watching.path.stat().st_size - 8192))
    assert "damaged" in watching.recorder.read("n1", HOUR).problem
    watching.now += 20
    watching.recorder.put(7, told(2, 15, *flows[:1]))

    def anew() -> bool:
        found = watching.recorder.read("n1", HOUR)
        return (found.problem, len(found.flows), since(found)) == ("", 1, 16)

    wait_until(anew, "a new file has what was told since")
    assert watching.path.with_name("flows.db.broken").exists()
    watching.recorder.stop(DEADLINE)


def test_damage_that_nobody_reads_is_found_within_the_hour(tmp_path: Path) -> None:
    flows = [
        Flow(msgspec.structs.replace(KEY, port=1 + n), NOW, NOW, 1, 0, 0, 0) for n in range(900)
    ]
    store = kept(tmp_path, [(7, told(1, 5, *flows))])
    store.prune(NOW)
    with contextlib.closing(sqlite3.connect(store.path)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    with store.path.open("r+b") as stream:
        stream.seek(4096)
        stream.write(b"\xff" * (store.path.stat().st_size - 8192))
    store.prune(NOW + HOUR)
    store.add(7, told(2, 10))
    store.close()
    assert since(read(tmp_path, 20, age=20)) == 11


def test_what_could_not_be_written_of_it_begins_when_it_can(tmp_path: Path) -> None:
    watching = Watching(tmp_path)
    # No file can be made there.
    watching.path.mkdir()
    watching.path.joinpath("in-the-way").touch()
    (tmp_path / "flows.db.broken").mkdir()
    (tmp_path / "flows.db.broken" / "too").touch()
    watching.recorder.start()
    watching.recorder.watch({"a/b": "a/b@1"})
    wait_until(lambda: watching.recorder.status.problem, "it says that it cannot")
    shutil.rmtree(watching.path)
    watching.now += 40
    watching.recorder.put(7, told(1, 5))
    watching.until({"a/b": 40})
    watching.recorder.stop(DEADLINE)
