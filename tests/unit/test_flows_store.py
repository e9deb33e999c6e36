"""The file of recorded flows: what is summed, its bounds, and what happens to it in a crash."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest

from nodeagent.flows import FlowStore, Recorded, StoreError, _store, read
from nodeagent.settings.flows import Keep
from ztunnel.protocol import Arrival, Flow, FlowKey, Flows

HOUR = 3600
NOW = 1_700_000_000 // HOUR * HOUR
KEY = FlowKey(
    identity="spiffe://cluster.local/ns/shop/sa/web",
    source="10.0.0.9",
    workload="shop/web",
    arrival=Arrival.HBONE,
    destination="shop/db",
    address="10.0.0.1",
    port=5432,
    allowed=True,
)


def flow(at: int = NOW, connections: int = 1, *, open_now: int = 0, **key: Any) -> Flow:  # noqa: ANN401 - fields of a key
    return Flow(
        msgspec.structs.replace(KEY, **key), at, at, connections, open_now, received=10, sent=20
    )


def store(tmp_path: Path, **keep: int) -> FlowStore:
    return FlowStore(tmp_path / "flows.db", Keep(**keep))


def add(kept: FlowStore, flows: Sequence[Flow]) -> None:
    kept.add(1, Flows(tuple(flows), 1, NOW, NOW))


def everything(path: Path) -> list[Recorded]:
    return read(path, 0)[0]


def connections(path: Path) -> int:
    return sum(each.connections for each in everything(path))


# --- sums ---------------------------------------------------------------------------------------


def test_reports_of_one_caller_add_up_over_hours(tmp_path: Path) -> None:
    kept = store(tmp_path)
    add(kept, [flow(connections=2, open_now=3)])
    add(kept, [flow(NOW + 60, 5, open_now=1), flow(NOW + HOUR, 1)])
    kept.close()
    assert everything(kept.path) == [
        Recorded(
            identity=KEY.identity,
            source="10.0.0.9",
            workload="shop/web",
            arrival="hbone",
            destination="shop/db",
            address="10.0.0.1",
            port=5432,
            allowed=True,
            reason="",
            first=datetime.fromtimestamp(NOW, UTC),
            last=datetime.fromtimestamp(NOW + HOUR, UTC),
            connections=8,
            most_open=3,
            received=30,
            sent=60,
        )
    ]


def test_a_time_leaves_out_what_was_last_seen_before(tmp_path: Path) -> None:
    kept = store(tmp_path)
    add(kept, [flow(NOW, 4), flow(NOW + 5 * HOUR, 7), flow(NOW, 1, port=80)])
    found, oldest = read(kept.path, NOW + HOUR)
    kept.close()
    assert [(each.port, each.connections) for each in found] == [(5432, 7)]
    assert oldest == NOW


@pytest.mark.parametrize(
    "difference",
    [
        {"identity": ""},
        {"source": "10.0.0.10"},
        {"workload": ""},
        {"arrival": Arrival.PLAINTEXT},
        {"destination": "shop/other"},
        {"address": "fd00::1"},
        {"port": 5433},
        {"allowed": False, "reason": "policy_denied"},
        {"reason": "connect_refused"},
        {"policy": "shop/all (a.yaml:1)"},
        {"service": "db.shop.svc"},
    ],
)
def test_whatever_differs_is_another_flow(tmp_path: Path, difference: dict[str, Any]) -> None:
    kept = store(tmp_path)
    add(kept, [flow(), flow(**difference)])
    kept.close()
    assert len(everything(kept.path)) == 2


def test_what_was_called_is_read_when_it_is_asked_for(tmp_path: Path) -> None:
    kept = store(tmp_path)
    there: dict[str, Any] = {
        "outbound": True,
        "source": "",
        "service": "db.shop.svc",
        "policy": "p",
    }
    add(kept, [flow(), flow(connections=4, **there)])
    kept.close()
    assert [each.outbound for each in everything(kept.path)] == [False]
    found, _ = read(kept.path, 0, outbound=True)
    (called,) = [each for each in found if each.outbound]
    assert (called.connections, called.service, called.policy) == (4, "db.shop.svc", "p")


def test_what_was_open_before_is_that_of_the_first_hour(tmp_path: Path) -> None:
    kept = store(tmp_path)
    add(kept, [flow(connections=4, open_now=2)])
    add(kept, [msgspec.structs.replace(flow(NOW + HOUR, 1, open_now=3), carried=2)])
    add(kept, [msgspec.structs.replace(flow(NOW + HOUR + 5, 0, open_now=3), carried=3)])
    add(kept, [msgspec.structs.replace(flow(NOW + 2 * HOUR, 0, open_now=1), carried=3)])
    found = [read(kept.path, since)[0][0] for since in (0, NOW + HOUR, NOW + 2 * HOUR)]
    kept.close()
    assert [(each.connections, each.carried) for each in found] == [(5, 0), (1, 2), (0, 3)]


def test_a_restart_goes_on(tmp_path: Path) -> None:
    for _ in range(3):
        kept = store(tmp_path)
        add(kept, [flow()])
        kept.close()
    assert connections(tmp_path / "flows.db") == 3


def test_the_file_is_for_its_owner_only(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        kept = store(tmp_path / "made")
        add(kept, [flow()])
        files = sorted(kept.path.parent.iterdir())
        assert [file.name for file in files] == ["flows.db", "flows.db-shm", "flows.db-wal"]
        assert {file.stat().st_mode & 0o777 for file in files} == {0o600}
        assert kept.path.parent.stat().st_mode & 0o777 == 0o700
        kept.close()
    finally:
        os.umask(before)


def test_it_can_be_read_beside_its_writer_and_without_one(tmp_path: Path) -> None:
    kept = store(tmp_path)
    add(kept, [flow()])
    assert connections(kept.path) == 1
    kept.close()
    assert connections(kept.path) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["flows.db"]


def test_a_copy_of_all_its_files_can_be_read_and_half_of_one_says_so(tmp_path: Path) -> None:
    kept = store(tmp_path)
    add(kept, [flow()])
    whole, half = tmp_path / "whole", tmp_path / "half"
    for folder, names in ((whole, ("flows.db", "flows.db-wal")), (half, ("flows.db",))):
        folder.mkdir()
        for name in names:
            shutil.copy(tmp_path / name, folder)
    kept.close()
    assert connections(whole / "flows.db") == 1
    with pytest.raises(StoreError, match=r"of a copy, flows\.db-wal is a part"):
        read(half / "flows.db", 0)


def test_an_answer_is_bounded_and_shows_that_there_is_more(tmp_path: Path) -> None:
    kept = store(tmp_path)
    add(kept, [flow(NOW + port, port=port) for port in range(1, 6)])
    found, _ = read(kept.path, 0, most=2)
    kept.close()
    assert [each.port for each in found] == [5, 4, 3]


# --- bounds -------------------------------------------------------------------------------------


def test_hours_that_are_over_are_dropped(tmp_path: Path) -> None:
    kept = store(tmp_path, retention_hours=3)
    add(kept, [flow(NOW - hours * HOUR, port=hours + 1) for hours in range(6)])
    kept.prune(NOW)
    assert sorted(each.port for each in everything(kept.path)) == [1, 2, 3, 4]
    rows = kept._open.execute("SELECT count(*) FROM flow").fetchone()
    kept.close()
    assert rows == (4,)


def test_a_clock_that_begins_in_1970_loses_nothing(tmp_path: Path) -> None:
    kept = store(tmp_path)
    add(kept, [flow()])
    kept.prune(60)
    kept.close()
    assert connections(kept.path) == 1


def test_a_file_that_is_nearly_full_drops_its_oldest_hours(tmp_path: Path) -> None:
    kept = store(tmp_path, max_megabytes=1)
    for hour in range(20):
        add(kept, [flow(NOW + hour * HOUR, source=f"10.0.{hour}.{n}") for n in range(250)])
        assert kept.path.stat().st_size <= 1024 * 1024
    hours = {each.first for each in everything(kept.path)}
    kept.close()
    newest = datetime.fromtimestamp(NOW + 19 * HOUR, UTC)
    assert max(hours) == newest
    assert 3 <= len(hours) < 20


def test_a_batch_that_does_not_fit_is_refused_whole_and_the_next_is_taken(tmp_path: Path) -> None:
    kept = store(tmp_path, max_megabytes=1)
    add(kept, [flow()])
    large = [flow(identity=f"spiffe://x/{n:0500}", destination=f"a/{n}") for n in range(3000)]
    with pytest.raises(StoreError, match="no room"):
        add(kept, large)
    assert connections(kept.path) == 1
    add(kept, [flow()])
    assert connections(kept.path) == 2
    kept.close()


def test_a_smaller_size_makes_the_file_smaller(tmp_path: Path) -> None:
    kept = store(tmp_path, max_megabytes=4)
    for hour in range(20):
        add(kept, [flow(NOW + hour * HOUR, source=f"10.0.{hour}.{n}") for n in range(400)])
    kept.close()
    assert kept.path.stat().st_size > 3 * 512 * 1024
    smaller = store(tmp_path, max_megabytes=1)
    add(smaller, [flow(NOW + 20 * HOUR)])
    smaller.close()
    assert smaller.path.stat().st_size <= 1024 * 1024
    assert connections(smaller.path) > 400


def test_callers_of_one_workload_beyond_its_share_are_counted_as_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_store, "MAX_OF_WORKLOAD", 3)
    kept = store(tmp_path)
    add(kept, [flow(port=port, connections=port) for port in range(1, 7)])
    add(kept, [flow(port=1, connections=10), flow(destination="shop/quiet", port=7)])
    kept.close()
    # After a restart too, in the same hour.
    kept = store(tmp_path)
    add(kept, [flow(port=8), flow(NOW + HOUR, port=9)])
    kept.close()
    found = {(each.destination, each.port): each.connections for each in everything(kept.path)}
    assert found == {
        ("shop/db", 1): 11,
        ("shop/db", 2): 2,
        ("shop/db", 3): 3,
        ("shop/db", 0): 4 + 5 + 6 + 1,
        ("shop/quiet", 7): 1,
        ("shop/db", 9): 1,
    }
    (folded,) = [each for each in everything(kept.path) if each.is_folded]
    assert (folded.identity, folded.source, folded.workload, folded.address) == ("", "", "", "")


def test_a_reader_that_does_not_end_stops_recording_and_not_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_store, "MAX_WAL_BYTES", 100_000)
    monkeypatch.setattr(_store, "BUSY_SECONDS", 0.1)
    kept = store(tmp_path)
    add(kept, [flow()])
    reader = sqlite3.connect(kept.path, isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT count(*) FROM flow").fetchone()

    def fill() -> None:
        for number in range(1000):
            add(kept, [flow(port=number)])

    with pytest.raises(StoreError, match="somebody reads it"):
        fill()
    assert kept.bytes < 400_000
    reader.close()
    add(kept, [flow(port=1001)])
    kept.close()


# --- what breaks --------------------------------------------------------------------------------


def damage_header(path: Path) -> None:
    with path.open("r+b") as stream:
        stream.write(b"no database any more")


def damage_middle(path: Path) -> None:
    size = path.stat().st_size
    with path.open("r+b") as stream:
        stream.seek(size // 2)
        stream.write(random.Random(1).randbytes(size // 3))  # noqa: S311 - any bytes will do


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def another_release(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version = 99")


def something_else(path: Path) -> None:
    path.unlink()
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE mine (a)")


def link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


@pytest.mark.parametrize(
    "harm", [damage_header, damage_middle, truncate, another_release, something_else, link]
)
def test_a_file_that_cannot_be_used_is_put_aside_and_a_new_one_begun(
    tmp_path: Path, harm: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    kept = store(tmp_path)
    add(kept, [flow(source=f"10.0.1.{n}") for n in range(200)])
    kept.close()
    harm(kept.path)
    capsys.readouterr()
    again = store(tmp_path)
    add(again, [flow()])
    add(again, [flow()])
    again.close()
    assert connections(again.path) == 2
    aside = again.path.with_name("flows.db.broken")
    assert aside.is_symlink() or aside.is_file()
    assert capsys.readouterr().out.count("a new one is begun") == 1


def test_damage_while_it_is_open_is_found_and_costs_one_batch_at_most(tmp_path: Path) -> None:
    kept = store(tmp_path)
    add(kept, [flow(source=f"10.0.1.{n}") for n in range(250)])
    kept._open.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    damage_header(kept.path)
    # What it has read of the file stays with it; another cannot open it.
    kept.close()
    other = store(tmp_path)
    add(other, [flow()])
    other.close()
    assert connections(other.path) == 1


def test_only_the_last_broken_file_is_kept(tmp_path: Path) -> None:
    for _ in range(3):
        kept = store(tmp_path)
        add(kept, [flow()])
        kept.close()
        damage_header(kept.path)
    add(store(tmp_path), [flow()])
    assert sorted(file.name for file in tmp_path.iterdir() if "broken" in file.name) == [
        "flows.db.broken"
    ]


def test_a_directory_in_its_place_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "flows.db").mkdir()
    with pytest.raises(StoreError, match=r"flows\.db"):
        add(store(tmp_path), [flow()])


@pytest.mark.parametrize("harm", [damage_header, another_release, something_else])
def test_reading_what_is_no_recording_says_so_and_changes_nothing(
    tmp_path: Path, harm: Callable[[Path], None]
) -> None:
    kept = store(tmp_path)
    add(kept, [flow()])
    kept.close()
    harm(kept.path)
    before = kept.path.read_bytes()
    with pytest.raises(StoreError, match=r"flows\.db"):
        read(kept.path, 0)
    assert kept.path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [kept.path]


@pytest.mark.parametrize(
    "change",
    [
        "hourly SET first = 1 << 52, last = 1 << 52",
        "hourly SET first = -(1 << 60)",
        "hourly SET hour = 1 << 50",
        "flow SET port = 70000",
        "flow SET port = -5",
        "flow SET source = char(27) || '[31m'",
        "flow SET workload = 'a' || char(10) || 'b'",
        "flow SET identity = CAST(x'ff41' AS TEXT)",
    ],
)
def test_reading_what_no_flow_is_says_so(tmp_path: Path, change: str) -> None:
    kept = store(tmp_path)
    add(kept, [flow()])
    kept.close()
    with contextlib.closing(sqlite3.connect(kept.path)) as connection:
        connection.execute(f"UPDATE {change}")
        connection.commit()
    with pytest.raises(StoreError, match=r"flows\.db"):
        everything(kept.path)


def test_reading_what_is_not_there_says_so(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no such file"):
        read(tmp_path / "none.db", 0)


WRITER = """
import sys
from pathlib import Path
sys.path[:0] = {path!r}
from nodeagent.settings.flows import Keep
from nodeagent.flows import FlowStore
from ztunnel.protocol import Arrival, Flow, FlowKey, Flows

store = FlowStore(Path({file!r}), Keep())
number = 0
while True:
    # Three of a batch belong together.
    store.add(1, Flows(tuple(
        Flow(
            FlowKey("", f"10.0.{{number // 250 % 250}}.{{number % 250}}", "", Arrival.HBONE,
                    f"a/{{each}}", "10.1.0.1", 80, True),
            {now}, {now}, 1, 0, 0, 0,
        )
        for each in range(3)
    ), number + 1, {now}, {now} + number))
    number += 1
    print(number, flush=True)
"""


@pytest.mark.parametrize("attempt", range(3))
def test_a_kill_in_the_middle_of_a_write_loses_no_batch_that_was_done(
    tmp_path: Path, attempt: int
) -> None:
    file = tmp_path / "flows.db"
    code = WRITER.format(path=sys.path, file=str(file), now=NOW)
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        done = 0
        for line in writer.stdout:
            done = int(line)
            if done >= 40 + 7 * attempt:
                break
        writer.send_signal(signal.SIGKILL)
        done = max([done, *map(int, writer.stdout.read().split(b"\n")[:-1])])
    kept = FlowStore(file, Keep())
    add(kept, [])
    assert not file.with_name("flows.db.broken").exists()
    by_workload = {f"a/{each}": 0 for each in range(3)}
    for each in everything(file):
        by_workload[each.destination] += each.connections
    kept.close()
    # All of a batch or nothing, and at most the one batch more whose number was not read.
    assert len(set(by_workload.values())) == 1
    assert by_workload["a/0"] in (done, done + 1)
