"""The server side of the seam against a ztunnel that is written out here, over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from pathlib import Path

import msgspec
import pytest

from nodeagent import control, session
from nodeagent.channel import Closed
from support.control_server import Harness, bundle, change, run, uids, version_of
from ztunnel import protocol


def test_snapshot_waits_for_the_gate_and_deltas_follow(tmp_path: Path) -> None:
    async def test(h: Harness) -> None:
        first = h.server.apply((bundle("a"),))
        channel = await h.greeted()
        await channel.send(protocol.Query(1, "anything"))
        assert isinstance((await channel.receive()).message, protocol.Answer)  # and no Update
        h.gate.set()
        parts = await change(channel)
        assert version_of(parts) == first
        assert uids(parts) == ["a"]
        await channel.send(protocol.Ack(first))
        assert await h.server.acknowledged(first, 10)
        second = h.server.apply((bundle("b"),), (protocol.Removal("trust_bundle", "a"),))
        parts = await change(channel)
        assert uids(parts) == ["b"]
        update = parts[0].message
        assert isinstance(update, protocol.Update)
        assert not update.reset
        assert update.removals == (protocol.Removal("trust_bundle", "a"),)
        await channel.send(protocol.Ack(second))
        assert await h.server.acknowledged(second, 10)
        assert len(h.seconds) == 2
        channel.close()

    run(test, tmp_path)


def test_pod_arrives_with_its_descriptors(tmp_path: Path) -> None:
    async def test(h: Harness) -> None:
        pipes = [os.pipe() for _ in range(4)]
        fds = [read for read, _ in pipes]
        h.gate.set()
        channel = await h.greeted()
        await change(channel)
        await channel.send(protocol.Ack(100))
        pod = protocol.Pod("u", "ns/a", ("10.0.0.1",), 9)
        version = h.server.put_pod(pod, control.PodDescriptors(*fds))
        parts = await change(channel)
        assert parts[0].message == protocol.Update(version, upserts=(pod,), commit=False)
        assert [os.fstat(fd).st_ino for fd in parts[0].fds] == [os.fstat(fd).st_ino for fd in fds]
        await channel.send(protocol.Ack(version))
        version = h.server.drop_pod("u")
        parts = await change(channel)
        update = parts[0].message
        assert isinstance(update, protocol.Update)
        assert update.removals == (protocol.Removal("pod", "u"),)
        for received in parts:
            for fd in received.fds:
                os.close(fd)
        channel.close()
        for pair in pipes:
            for fd in pair:
                os.close(fd)

    run(test, tmp_path)


def test_what_a_ztunnel_has_counted_is_handed_on_and_not_answered(tmp_path: Path) -> None:
    key = protocol.FlowKey(
        "", "10.0.0.9", "", protocol.Arrival.PLAINTEXT, "default/a", "10.0.0.1", 80, allowed=True
    )
    counted = protocol.Flow(key, 10, 20, 3, 1, 100, 200)

    async def test(h: Harness) -> None:
        channel = await h.greeted(started=7)
        message = protocol.Flows((counted, counted), 1, 10, 20)
        await channel.send(message)
        await channel.send(protocol.Query(1, "anything"))
        answer = (await channel.receive()).message
        assert isinstance(answer, protocol.Answer)
        assert answer.id == 1
        assert h.flows == [(7, message)]
        channel.close()

    run(test, tmp_path)


@pytest.mark.parametrize(
    "changes", [{"connections": -1}, {"received": 2**53 + 1}, {"first": 2**64 - 1}]
)
def test_counts_that_no_table_holds_end_the_conversation(
    tmp_path: Path, changes: dict[str, int]
) -> None:
    key = protocol.FlowKey("", "", "", protocol.Arrival.HBONE, "a/b", "", 0, allowed=False)
    counted = msgspec.structs.replace(protocol.Flow(key, 1, 1, 1, 0, 0, 0), **changes)

    async def test(h: Harness) -> None:
        channel = await h.greeted()
        await channel.send(protocol.Flows((counted,), 1, 10, 20))
        with pytest.raises(Closed):
            await channel.receive()
        assert h.flows == []
        channel.close()

    run(test, tmp_path)


def test_a_pod_put_again_is_sent_again(tmp_path: Path) -> None:
    async def test(h: Harness) -> None:
        pipes = [os.pipe() for _ in range(2)]
        fds = [fd for pair in pipes for fd in pair]
        h.gate.set()
        channel = await h.greeted()
        await change(channel)
        await channel.send(protocol.Ack(100))
        for _ in range(2):
            pod = protocol.Pod("u", "ns/a", ("10.0.0.1",), 9)
            version = h.server.put_pod(pod, control.PodDescriptors(*fds))
            parts = await change(channel)
            assert uids(parts) == ["u"]
            for fd in parts[0].fds:
                os.close(fd)
            await channel.send(protocol.Ack(version))
            assert await h.server.acknowledged(version, 10)
        channel.close()
        for fd in fds:
            os.close(fd)

    run(test, tmp_path)


def test_changes_while_one_is_in_flight_are_coalesced(tmp_path: Path) -> None:
    async def test(h: Harness) -> None:
        h.gate.set()
        channel = await h.greeted()
        await change(channel)  # the reset, not acknowledged yet
        for index in range(500):
            newest = h.server.apply((bundle("hot"), bundle(f"d{index % 3}")))
            h.server.apply((), (protocol.Removal("trust_bundle", "d0"),))
        newest = h.server.apply((bundle("last"),))
        await channel.send(protocol.Ack(100))
        parts = await change(channel)
        assert version_of(parts) == newest
        assert sorted(uids(parts)) == ["d1", "d2", "hot", "last"]
        channel.close()

    run(test, tmp_path)


def test_rejected_change_keeps_the_base_of_the_next(tmp_path: Path) -> None:
    async def test(h: Harness) -> None:
        h.gate.set()
        channel = await h.greeted()
        await change(channel)
        await channel.send(protocol.Ack(100))
        version = h.server.apply((bundle("a"),))
        await change(channel)
        await channel.send(protocol.Ack(version, "no room"))
        refused = control.Rejected(version, "no room")
        await h.until(lambda: h.server.status.rejected == refused)
        assert h.server.status.acknowledged_version == 100
        version = h.server.apply((bundle("b"),))
        parts = await change(channel)
        assert sorted(uids(parts)) == ["a", "b"]
        await channel.send(protocol.Ack(version))
        assert await h.server.acknowledged(version, 10)
        assert h.server.status.rejected is None
        channel.close()

    run(test, tmp_path)


def test_what_is_too_large_is_named_until_it_is_not(tmp_path: Path) -> None:
    async def test(h: Harness) -> None:
        async def told(*upserts: protocol.Resource) -> tuple[list[str], list[str]]:
            """Return whom ztunnel was told of, and what it is not told."""
            version = h.server.apply(upserts)
            parts = await change(channel)
            await channel.send(protocol.Ack(version))
            assert await h.server.acknowledged(version, 10)
            return uids(parts), list(h.server.status.oversized)

        h.gate.set()
        channel = await h.greeted()
        await change(channel)
        await channel.send(protocol.Ack(100))
        huge = protocol.TrustBundle("huge", (b"x" * protocol.MAX_FRAME,))
        assert await told(bundle("a"), huge) == (["a"], ["trust_bundle/huge"])
        assert await told(bundle("b")) == (["b"], ["trust_bundle/huge"])
        assert await told(bundle("huge")) == (["huge"], [])
        channel.close()

    run(test, tmp_path)


def test_held_pods_are_handed_over_before_the_welcome(tmp_path: Path) -> None:
    async def test(h: Harness) -> None:
        pipes = [os.pipe() for _ in range(2)]
        fds = [fd for pair in pipes for fd in pair][:3]
        channel = await h.connect()
        await channel.send(protocol.Hello(protocol.PROTOCOL_VERSION, 1, 2))
        await channel.send(protocol.HeldPod("p", 5), fds)
        await channel.send(protocol.HeldPod("q", 6), fds)
        await channel.receive()
        assert [pod.uid for pod, _ in h.held] == ["p", "q"]
        await channel.send(protocol.Query(1, "anything"))
        await channel.receive()
        assert h.asked == [frozenset({"p", "q"})]
        assert [os.fstat(fd).st_ino for fd in h.held[0][1]] == [os.fstat(fd).st_ino for fd in fds]
        channel.close()
        for pair in pipes:
            for fd in pair:
                os.close(fd)

    run(test, tmp_path)


def test_other_version_is_refused_with_a_remedy(tmp_path: Path) -> None:
    async def test(h: Harness) -> None:
        channel = await h.connect()
        await channel.send(protocol.Hello(protocol.PROTOCOL_VERSION + 1, 1, 0))
        refusal = (await channel.receive()).message
        assert isinstance(refusal, protocol.Refusal)
        assert "same release" in refusal.reason
        with pytest.raises(Closed):
            await channel.receive()
        channel.close()

    run(test, tmp_path)


def test_query_and_answer(tmp_path: Path) -> None:
    async def test(h: Harness) -> None:
        channel = await h.greeted()
        asked = asyncio.ensure_future(h.server.query("status", {"a": "b"}))
        query = (await channel.receive()).message
        assert isinstance(query, protocol.Query)
        assert (query.what, query.args) == ("status", {"a": "b"})
        await channel.send(protocol.Answer(query.id, b"{}"))
        assert await asked == b"{}"
        asked = asyncio.ensure_future(h.server.query("status"))
        query = (await channel.receive()).message
        assert isinstance(query, protocol.Query)
        await channel.send(protocol.Answer(query.id, error="not now"))
        with pytest.raises(control.QueryError, match="not now"):
            await asked
        with pytest.raises(control.QueryError, match="within"):
            await h.server.query("status", seconds=0.01)
        asked = asyncio.ensure_future(h.server.query("status"))
        await channel.receive()
        await channel.receive()
        channel.close()
        with pytest.raises(control.QueryError):
            await asked

    run(test, tmp_path)


def test_our_side_answers_unknown_questions(tmp_path: Path) -> None:
    async def test(h: Harness) -> None:
        channel = await h.greeted()
        await channel.send(protocol.Query(7, "weather"))
        answer = (await channel.receive()).message
        assert isinstance(answer, protocol.Answer)
        assert answer.id == 7
        assert "weather" in answer.error
        channel.close()

    run(test, tmp_path)


BAD_STARTS = [
    pytest.param(b"\xff" * 64, id="garbage"),
    pytest.param(b"\x00\x00\x00\x01\x00\xc1", id="not messagepack"),
    pytest.param(b"\x00\x00\x00\x04\x00\x81\xa1\xff\x00", id="not UTF-8"),
    pytest.param(protocol.encode(protocol.Ack(1)), id="no hello"),
    pytest.param(protocol.encode(protocol.Hello(1, 1, 10**6)), id="too many pods"),
    pytest.param(protocol.encode(protocol.Hello(1, 1, 1), 3), id="descriptors that did not come"),
    pytest.param(
        protocol.encode(protocol.Hello(1, 1, 1)) + protocol.encode(protocol.HeldPod("p", 1)),
        id="held pod without descriptors",
    ),
    pytest.param(
        protocol.encode(protocol.Hello(1, 1, 0)) + protocol.encode(protocol.Ack(100)),
        id="ack of nothing",
    ),
]


@pytest.mark.parametrize("data", BAD_STARTS)
def test_broken_peers_are_cut_and_harm_nobody(tmp_path: Path, data: bytes) -> None:
    async def test(h: Harness) -> None:
        raw = socket.socket(socket.AF_UNIX)
        raw.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(raw, str(h.path))
        await loop.sock_sendall(raw, data)
        with contextlib.suppress(ConnectionResetError):
            while await loop.sock_recv(raw, 4096):
                pass
        raw.close()
        channel = await h.greeted()
        h.gate.set()
        await change(channel)
        channel.close()

    run(test, tmp_path)


@pytest.mark.parametrize("limit,size", [("SEND_SECONDS", 400_000), ("ACK_SECONDS", 10)])
def test_hung_ztunnel_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, size: int
) -> None:
    monkeypatch.setattr(session, limit, 0.2)

    async def test(h: Harness) -> None:
        h.server.apply(protocol.TrustBundle(f"d{i}", (b"x" * size,)) for i in range(20))
        h.gate.set()
        channel = await h.greeted()  # and never reads or answers again
        await h.until(lambda: h.server.status.connected)
        await h.until(lambda: not h.server.status.connected)
        channel.close()

    run(test, tmp_path)


def test_acknowledged_is_false_without_ztunnel_and_when_it_goes(tmp_path: Path) -> None:
    async def test(h: Harness) -> None:
        h.gate.set()
        assert not await h.server.acknowledged(100, 10)
        channel = await h.greeted()
        waiting = asyncio.ensure_future(h.server.acknowledged(100, 10))
        await change(channel)
        channel.close()
        assert not await waiting

    run(test, tmp_path)
