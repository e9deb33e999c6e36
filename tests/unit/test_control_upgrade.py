"""Which of several ztunnels serves: the newest that has the state in force; the others drain."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from nodeagent import control, session
from support.control_server import Harness, bundle, change, drained_for, run, synced, version_of
from ztunnel import protocol


def test_the_older_drains_once_the_newer_has_the_state_in_force(tmp_path: Path) -> None:
    async def test(h: Harness) -> None:
        h.gate.set()
        older = await h.greeted(1, 10)
        await synced(older)
        await h.until(lambda: h.server.status.acknowledged_version == 100)
        newer = await h.greeted(2, 20)
        await change(newer)
        # Not before its Ack: it may yet fail.
        assert h.server.status.pid == 1
        assert not h.server.status.draining
        await newer.send(protocol.Ack(100))
        assert await drained_for(older) == "2"
        assert h.server.status.pid == 2
        assert [drain.pid for drain in h.server.status.draining] == [1]
        # Both are told what changes, and a change is in force once both have it.
        version = h.server.apply((bundle("a"),))
        waiting = asyncio.ensure_future(h.server.acknowledged(version, 10))
        assert await synced(newer) == version
        parts = await change(older)
        assert not waiting.done()
        await older.send(protocol.Ack(version_of(parts)))
        assert await waiting
        # Its last word.
        await older.send(protocol.Query(1, "drained", {"cut": "3", "seconds": "1.5"}))
        assert isinstance((await older.receive()).message, protocol.Answer)
        assert h.drained == [3]
        older.close()
        await h.until(lambda: not h.server.status.draining)
        newer.close()

    run(test, tmp_path)


def test_a_successor_that_refuses_the_state_or_goes_changes_nothing(tmp_path: Path) -> None:
    async def test(h: Harness) -> None:
        h.gate.set()
        older = await h.greeted(1, 10)
        await synced(older)
        newer = await h.greeted(2, 20)
        await change(newer)
        await newer.send(protocol.Ack(100, "no room"))
        third = await h.greeted(3, 30)
        await change(third)
        third.close()
        asked = asyncio.ensure_future(h.server.query("status"))
        # The older is the one that is asked, and it was never told to drain.
        query = (await older.receive()).message
        assert isinstance(query, protocol.Query)
        assert query.what == "status"
        await older.send(protocol.Answer(query.id, b"{}"))
        await asked
        newer.close()
        older.close()

    run(test, tmp_path)


def test_after_a_restart_of_ours_the_newest_serves_whoever_comes_first(tmp_path: Path) -> None:
    async def test(h: Harness) -> None:
        h.gate.set()
        newer = await h.greeted(2, 20)
        await synced(newer)
        older = await h.greeted(1, 10)
        await synced(older)
        assert await drained_for(older) == "2"
        assert h.server.status.pid == 2
        oldest = await h.greeted(7, 5, draining=True)
        await synced(oldest)
        assert sorted(each.pid for each in h.server.status.draining) == [1, 7]
        for channel in (newer, older, oldest):
            channel.close()

    run(test, tmp_path)


def test_one_that_does_not_answer_the_order_is_told_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "DRAIN_SECONDS", 0.05)

    async def test(h: Harness) -> None:
        h.gate.set()
        older = await h.greeted(1, 10)
        await synced(older)
        newer = await h.greeted(2, 20)
        await synced(newer)
        query = (await older.receive()).message
        assert isinstance(query, protocol.Query)
        assert await drained_for(older) == "2"
        older.close()
        newer.close()

    run(test, tmp_path)


def test_the_oldest_of_too_many_that_drain_is_sent_away(tmp_path: Path) -> None:
    async def test(h: Harness) -> None:
        h.gate.set()
        channels = []
        for pid in range(1, control.MAX_DRAINING + 3):
            channels.append(await h.greeted(pid, pid))
            await synced(channels[-1])
            if pid > 1:
                assert await drained_for(channels[-2]) == str(pid)
        refusal = (await channels[0].receive()).message
        assert isinstance(refusal, protocol.Refusal)
        assert "oldest" in refusal.reason
        await h.until(lambda: len(h.server.status.draining) == control.MAX_DRAINING)
        for channel in channels:
            channel.close()

    run(test, tmp_path)


def test_a_snapshot_waits_for_the_pods_of_every_ztunnel(tmp_path: Path) -> None:
    async def test(h: Harness) -> None:
        old = await h.connect()
        await old.send(protocol.Hello(protocol.PROTOCOL_VERSION, 1, 1, 10, draining=True))
        # It has closed its listeners.
        await old.send(protocol.HeldPod("p", 5))
        await old.receive()
        new = await h.greeted(2, 20)
        await new.send(protocol.Query(1, "anything"))
        await new.receive()
        assert h.asked == [frozenset({"p"}), frozenset({"p"})]
        assert h.held == []
        old.close()
        new.close()

    run(test, tmp_path)


def test_what_a_draining_one_carries_is_asked_for(tmp_path: Path) -> None:
    async def test(h: Harness) -> None:
        h.gate.set()
        channel = await h.greeted(1, 10, draining=True)
        await synced(channel)
        assert h.server.status.draining[0].connections is None
        asked = asyncio.ensure_future(h.server.ask_draining())
        query = (await channel.receive()).message
        assert isinstance(query, protocol.Query)
        body = b'{"connections":5,"hbone_connections":2,"draining":{"cut":1}}'
        await channel.send(protocol.Answer(query.id, body))
        await asked
        found = h.server.status.draining[0]
        assert (found.connections, found.hbone, found.cut) == (5, 2, 1)
        with pytest.raises(control.QueryError):
            await h.server.query("status")
        channel.close()

    run(test, tmp_path)
