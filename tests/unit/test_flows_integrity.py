"""A disk that changes what was written: no caller is missed, and recording goes on."""

from __future__ import annotations

import contextlib
import random
import shutil
import sqlite3
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest

from nodeagent.flows import FlowStore, Recording, StoreError, recording
from nodeagent.flows._errors import UnusableError, told
from nodeagent.settings.flows import Keep
from ztunnel.protocol import Arrival, Flow, FlowKey, Flows

HOUR = 3600
NOW = 1_700_000_000 // HOUR * HOUR
KNOWN = FlowKey(
    identity="spiffe://cluster.local/ns/shop/sa/web",
    source="10.0.0.9",
    workload="shop/web",
    arrival=Arrival.HBONE,
    destination="shop/db",
    address="10.0.0.1",
    port=5432,
    allowed=True,
)
CALLER = FlowKey("", "10.9.9.9", "", Arrival.PLAINTEXT, "shop/db", "10.0.0.1", 5432, allowed=True)
NOTED = datetime.fromtimestamp(NOW + 60, UTC)
"""When the caller came."""

PLACES = 60


def flow(key: FlowKey, at: int) -> Flow:
    return Flow(key, NOW + at, NOW + at, 1, 0, 10, 20)


def spoiled(data: bytes) -> Iterator[bytes]:
    """Yield a file with one byte changed, at places that hold something."""
    chance = random.Random(20260122)  # noqa: S311 - the same places every time
    for place in chance.sample([place for place, byte in enumerate(data) if byte], PLACES):
        changed = bytearray(data)
        changed[place] = chance.choice([0, 0xFF, data[place] ^ (1 << chance.randrange(8))])
        if changed != data:
            yield bytes(changed)


def said(folder: Path) -> tuple[Recording, bytes]:
    """Return a recording, and of it what a verdict rests on: all but numbers of bytes and such."""
    found = recording(folder / "flows.db", "n1", NOW + HOUR + 100, 3 * HOUR)
    numbers = {"connections": 0, "most_open": 0, "received": 0, "sent": 0, "carried": 0}
    flows = tuple(msgspec.structs.replace(each, **numbers) for each in found.flows)
    return found, msgspec.json.encode(msgspec.structs.replace(found, flows=flows))


@pytest.mark.parametrize("name", ["flows.db", "flows.db-wal"])
def test_a_byte_that_changes_hides_no_caller_and_stops_no_recording(
    tmp_path: Path, name: str
) -> None:
    """What is read is what was written, or less is covered, or the file is refused."""
    kept, made = tmp_path / "kept", tmp_path / "made"
    store = FlowStore(made / "flows.db", Keep())
    store.watch({"shop/db": "shop/db@1"}, None, NOW)
    store.add(1, Flows((flow(KNOWN, 1),), 1, NOW, NOW + 5))
    store.add(1, Flows((flow(CALLER, 60),), 2, NOW, NOW + 90))
    store.add(1, Flows((flow(KNOWN, HOUR),), 3, NOW, NOW + HOUR + 90))
    if name.endswith("wal"):
        shutil.copytree(made, kept, ignore=shutil.ignore_patterns("*-shm"))
        store.close()
    else:
        store.close()
        shutil.copytree(made, kept)
    whole, text = said(made)
    assert len(whole.flows) == 2
    for data in spoiled((kept / name).read_bytes()):
        folder = tmp_path / "spoiled"
        shutil.copytree(kept, folder)
        (folder / name).write_bytes(data)
        with contextlib.suppress(StoreError):
            found, what = said(folder)
            assert what == text or found.complete is None or found.complete > NOTED
        store = FlowStore(folder / "flows.db", Keep())
        store.add(1, Flows((flow(CALLER, HOUR + 95),), 4, NOW, NOW + HOUR + 95))
        store.close()
        found, _ = said(folder)
        assert any(not each.identity for each in found.flows), "what was told behind it is there"
        shutil.rmtree(folder)


def test_our_own_mistakes_are_no_damage(tmp_path: Path) -> None:
    """A file is put aside for what is in it, and not because a question was wrong."""
    connection = sqlite3.connect(tmp_path / "x.db")
    connection.close()
    with pytest.raises(StoreError), told(tmp_path / "x.db"):
        connection.execute("SELECT 1")
    with pytest.raises(UnusableError, match="no text"), told(tmp_path / "x.db"):
        b"\xff".decode()
