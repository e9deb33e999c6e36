from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from support.mesh_state import SETTINGS, pod, workload
from ztunnel import control, protocol
from ztunnel.channel import Channel, ChannelError, connect
from ztunnel.pods import PodSockets
from ztunnel.state import Change

DEADLINE = 30


class Recorder:
    """A handler that takes what it is given."""

    def __init__(self) -> None:
        self.changes: list[Change] = []
        self.sockets: dict[str, PodSockets] = {}
        self.error = ""
        self.pods: list[tuple[protocol.HeldPod, tuple[int, ...]]] = []
        self.may_finish = asyncio.Event()
        self.may_finish.set()

    async def apply(self, change: Change, sockets: Mapping[str, PodSockets]) -> str:
        await self.may_finish.wait()
        self.changes.append(change)
        self.sockets.update(sockets)
        return self.error

    def held(self) -> Sequence[tuple[protocol.HeldPod, tuple[int, ...]]]:
        return self.pods


may_answer = asyncio.Event()
"""What a question that waits waits for."""


async def answer(what: str, args: Mapping[str, str]) -> bytes:
    if what not in {"status", "connections"}:
        raise KeyError(what)
    if "wait" in args:
        await may_answer.wait()
    return b'{"args":"%s"}' % ",".join(sorted(args)).encode()


class Agent:
    """nodeagent's end: a listening socket, and whatever a test sends."""

    def __init__(self, directory: Path) -> None:
        self.path = str(directory / "ztunnel.sock")
        self._listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listening.bind(self.path)
        self._listening.listen(8)
        self._listening.setblocking(False)
        self.channels: list[Channel] = []

    async def accept(self) -> Channel:
        loop = asyncio.get_running_loop()
        connected, _ = await loop.sock_accept(self._listening)
        channel = Channel(connected)
        self.channels.append(channel)
        return channel

    async def greet(self) -> Channel:
        channel = await self.accept()
        hello, _ = await channel.receive()
        assert isinstance(hello, protocol.Hello)
        await channel.send(protocol.Welcome(protocol.PROTOCOL_VERSION, SETTINGS))
        return channel

    def close(self) -> None:
        for channel in self.channels:
            channel.close()
        self._listening.close()


class Stage:
    def __init__(self, directory: Path) -> None:
        self.agent = Agent(directory)
        self.recorder = Recorder()
        self.control = control.Control(self.agent.path, self.recorder, answer, 7)


@contextlib.asynccontextmanager
async def running(stage: Stage) -> AsyncIterator[asyncio.Task[None]]:
    task = asyncio.create_task(stage.control.run())
    try:
        async with asyncio.timeout(DEADLINE):
            yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        stage.agent.close()
        for sockets in stage.recorder.sockets.values():
            sockets.close()


def play(directory: Path, scene: Callable[[Stage, asyncio.Task[None]], Awaitable[None]]) -> None:
    async def whole() -> None:
        stage = Stage(directory)
        async with running(stage) as task:
            await scene(stage, task)

    before = descriptors()
    asyncio.run(whole())
    assert descriptors() == before, "descriptors leaked"


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - a path per entry is not needed


@pytest.fixture
def private(tmp_path: Path) -> Path:
    directory = tmp_path / "run"
    directory.mkdir(mode=0o700)
    return directory


@contextlib.contextmanager
def four() -> Iterator[tuple[int, ...]]:
    made = tuple(socket.socket().detach() for _ in range(4))
    try:
        yield made
    finally:
        for descriptor in made:
            os.close(descriptor)


def update(
    version: int, *resources: protocol.Resource, reset: bool = False, commit: bool = True
) -> protocol.Update:
    return protocol.Update(version, resources, (), reset, commit)


async def until_closed(channel: Channel) -> None:
    while True:
        assert isinstance((await channel.receive())[0], protocol.Ack)


WORKLOAD = workload("a", "10.0.0.1")
POD = pod("p", WORKLOAD.uid, "10.0.0.1")


def test_nothing_is_applied_before_the_commit_and_then_all_at_once(private: Path) -> None:
    async def scene(stage: Stage, _: asyncio.Task[None]) -> None:
        channel = await stage.agent.greet()
        await channel.send(update(1, reset=True, commit=False))
        await channel.send(update(1, WORKLOAD, commit=False))
        with four() as descriptors_of_pod:
            await channel.send(update(1, POD, commit=False), descriptors_of_pod)
        await channel.send(protocol.Query(7, "status"))
        reply = (await channel.receive())[0]
        assert isinstance(reply, protocol.Answer)
        assert not stage.recorder.changes
        await channel.send(update(1))
        assert (await channel.receive())[0] == protocol.Ack(1)
        (change,) = stage.recorder.changes
        assert change.reset
        assert change.upserts == (WORKLOAD, POD)
        assert change.settings == SETTINGS
        assert set(stage.recorder.sockets) == {"p"}
        assert stage.control.status.connected
        assert stage.control.status.version == 1

    play(private, scene)


def test_later_changes_keep_the_settings_and_a_refusal_is_acknowledged(private: Path) -> None:
    async def scene(stage: Stage, _: asyncio.Task[None]) -> None:
        channel = await stage.agent.greet()
        await channel.send(update(1, reset=True))
        assert (await channel.receive())[0] == protocol.Ack(1)
        stage.recorder.error = "workload 'a': wrong"
        await channel.send(update(2, WORKLOAD))
        assert (await channel.receive())[0] == protocol.Ack(2, "workload 'a': wrong")
        assert stage.recorder.changes[1].settings is None
        assert stage.control.status.version == 1

    play(private, scene)


def test_a_change_is_acknowledged_only_when_it_is_in_force(private: Path) -> None:
    async def scene(stage: Stage, _: asyncio.Task[None]) -> None:
        stage.recorder.may_finish.clear()
        channel = await stage.agent.greet()
        await channel.send(update(1, reset=True))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(channel.receive(), 0.05)
        stage.recorder.may_finish.set()
        assert (await channel.receive())[0] == protocol.Ack(1)

    play(private, scene)


def test_a_long_question_keeps_no_change_waiting(private: Path) -> None:
    async def scene(stage: Stage, _: asyncio.Task[None]) -> None:
        channel = await stage.agent.greet()
        await channel.send(protocol.Query(1, "connections", {"wait": ""}))
        await channel.send(update(1, reset=True))
        assert (await channel.receive())[0] == protocol.Ack(1)
        may_answer.set()
        assert (await channel.receive())[0] == protocol.Answer(1, b'{"args":"wait"}')
        # One that nobody will answer ends with the conversation.
        may_answer.clear()
        await channel.send(protocol.Query(2, "connections", {"wait": ""}))
        await channel.send(protocol.Query(3, "status"))
        assert (await channel.receive())[0] == protocol.Answer(3, b'{"args":""}')
        channel.close()
        assert (await stage.agent.greet()) is not channel

    may_answer.clear()
    play(private, scene)


def test_held_pods_are_offered_with_their_listeners(private: Path) -> None:
    async def scene(stage: Stage, _: asyncio.Task[None]) -> None:
        with four() as mine:
            stage.recorder.pods = [(protocol.HeldPod("p", 9), (mine[0], mine[1], mine[2]))]
            channel = await stage.agent.accept()
            hello, none = await channel.receive()
            assert isinstance(hello, protocol.Hello)
            assert hello.pods == 1
            assert none == ()
            held, came = await channel.receive()
            assert held == protocol.HeldPod("p", 9)
            assert [os.fstat(each).st_ino for each in came] == [
                os.fstat(each).st_ino for each in mine[:3]
            ]
            for each in came:
                os.close(each)
            stage.recorder.pods = []

    play(private, scene)


def test_it_connects_again_and_is_told_everything_anew(private: Path) -> None:
    async def scene(stage: Stage, _: asyncio.Task[None]) -> None:
        channel = await stage.agent.greet()
        await channel.send(update(5, reset=True))
        await channel.receive()
        channel.close()
        channel = await stage.agent.greet()
        # A restarted nodeagent may count from anywhere: a reset starts anew.
        await channel.send(update(2, reset=True))
        assert (await channel.receive())[0] == protocol.Ack(2)

    play(private, scene)


def test_who_is_sent_away_does_not_come_back(private: Path) -> None:
    async def scene(stage: Stage, task: asyncio.Task[None]) -> None:
        channel = await stage.agent.greet()
        await channel.send(protocol.Refusal("too many drain"))
        await task
        assert "sent away" in stage.control.status.problem

    play(private, scene)


def test_who_drains_says_so_and_names_its_pods_without_listeners(private: Path) -> None:
    async def scene(stage: Stage, _: asyncio.Task[None]) -> None:
        channel = await stage.agent.greet()
        stage.recorder.pods = [(protocol.HeldPod("p", 5), ())]
        stage.control.draining = True
        channel.close()
        channel = await stage.agent.accept()
        hello = (await channel.receive())[0]
        assert hello == protocol.Hello(protocol.PROTOCOL_VERSION, os.getpid(), 1, 7, draining=True)
        assert await channel.receive() == (protocol.HeldPod("p", 5), ())

    play(private, scene)


def test_what_is_told_is_sent_and_its_answer_is_not_waited_for(private: Path) -> None:
    async def scene(stage: Stage, _: asyncio.Task[None]) -> None:
        assert not await stage.control.tell("drained", {"cut": "1"})
        channel = await stage.agent.greet()
        await channel.send(protocol.Query(1, "status"))
        await channel.receive()
        assert await stage.control.tell("drained", {"cut": "1"})
        query = (await channel.receive())[0]
        assert isinstance(query, protocol.Query)
        assert (query.what, query.args) == ("drained", {"cut": "1"})
        await channel.send(protocol.Answer(query.id, b"{}"))
        # And the conversation goes on.
        await channel.send(protocol.Query(2, "status"))
        assert isinstance((await channel.receive())[0], protocol.Answer)

    play(private, scene)


def test_an_unknown_question_is_answered_with_an_error(private: Path) -> None:
    async def scene(stage: Stage, _: asyncio.Task[None]) -> None:
        channel = await stage.agent.greet()
        await channel.send(protocol.Query(1, "status", {"a": "1"}))
        assert (await channel.receive())[0] == protocol.Answer(1, b'{"args":"a"}')
        await channel.send(protocol.Query(2, "weather"))
        assert (await channel.receive())[0] == protocol.Answer(2, error="no such question")

    play(private, scene)


@pytest.mark.parametrize(
    "first",
    [
        update(1, WORKLOAD),
        protocol.Ack(1),
        protocol.Welcome(1, SETTINGS),
        protocol.Hello(1, 1, 0),
    ],
    ids=["delta first", "ack", "welcome", "hello"],
)
def test_what_breaks_the_conversation_ends_it(private: Path, first: protocol.Message) -> None:
    async def scene(stage: Stage, _: asyncio.Task[None]) -> None:
        channel = await stage.agent.greet()
        await channel.send(first)
        with pytest.raises(ChannelError):
            await channel.receive()
        assert not stage.recorder.changes
        # And it starts over.
        await stage.agent.greet()

    play(private, scene)


@pytest.mark.parametrize(
    "parts",
    [
        (update(3, reset=True, commit=False), update(4, WORKLOAD)),
        (update(3, WORKLOAD, reset=True, commit=False), update(3, reset=True)),
        (update(3, reset=True), update(3, WORKLOAD)),
        (update(3, reset=True), update(2, WORKLOAD)),
    ],
    ids=["version changes", "second reset", "version repeats", "version falls"],
)
def test_parts_out_of_order_end_it(
    private: Path, parts: tuple[protocol.Update, protocol.Update]
) -> None:
    async def scene(stage: Stage, _: asyncio.Task[None]) -> None:
        channel = await stage.agent.greet()
        for part in parts:
            await channel.send(part)
        with pytest.raises(ChannelError):
            await until_closed(channel)
        assert all(change.version == 3 for change in stage.recorder.changes)

    play(private, scene)


@pytest.mark.parametrize("count", [0, 3])
def test_a_pod_without_its_four_descriptors_ends_it(private: Path, count: int) -> None:
    async def scene(stage: Stage, _: asyncio.Task[None]) -> None:
        channel = await stage.agent.greet()
        with four() as mine:
            await channel.send(update(1, POD, reset=True), mine[:count])
        with pytest.raises(ChannelError):
            await channel.receive()

    play(private, scene)


def test_descriptors_with_a_message_that_has_none_are_closed(private: Path) -> None:
    async def scene(stage: Stage, _: asyncio.Task[None]) -> None:
        channel = await stage.agent.greet()
        with four() as mine:
            await channel.send(protocol.Query(1, "status"), mine)
        with pytest.raises(ChannelError):
            await channel.receive()

    play(private, scene)


def test_descriptors_of_a_change_that_never_commits_are_closed(private: Path) -> None:
    async def scene(stage: Stage, _: asyncio.Task[None]) -> None:
        channel = await stage.agent.greet()
        with four() as mine:
            await channel.send(update(1, POD, reset=True, commit=False), mine)
            # The same pod again: the newer ones count.
            await channel.send(update(1, POD, commit=False), mine)
        await channel.send(protocol.Query(1, "status"))
        await channel.receive()
        channel.close()
        await stage.agent.greet()
        assert not stage.recorder.changes

    play(private, scene)


def test_whoever_stops_in_the_middle_of_a_change_is_left(
    private: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "PART_SECONDS", 0.02)

    async def scene(stage: Stage, _: asyncio.Task[None]) -> None:
        channel = await stage.agent.greet()
        await channel.send(update(1, WORKLOAD, reset=True, commit=False))
        with pytest.raises(ChannelError):
            await channel.receive()

    play(private, scene)


@pytest.mark.parametrize(
    "reply",
    [
        protocol.Refusal("you are not wanted"),
        protocol.Welcome(protocol.PROTOCOL_VERSION + 1, SETTINGS),
        protocol.Ack(1),
    ],
)
def test_who_is_not_welcome_tries_again(private: Path, reply: protocol.Message) -> None:
    async def scene(stage: Stage, _: asyncio.Task[None]) -> None:
        channel = await stage.agent.accept()
        await channel.receive()
        await channel.send(reply)
        with pytest.raises(ChannelError):
            await channel.receive()
        await stage.agent.greet()

    play(private, scene)


def test_a_directory_that_others_may_write_is_not_trusted(tmp_path: Path) -> None:
    loose = tmp_path / "loose"
    loose.mkdir()
    loose.chmod(0o777)
    with pytest.raises(ChannelError, match="writable by others"):
        asyncio.run(connect(str(loose / "ztunnel.sock")))


def test_a_directory_behind_a_link_is_not_followed(private: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(private)
    with pytest.raises(OSError, match="Not a directory"):
        asyncio.run(connect(str(link / "ztunnel.sock")))


def test_a_path_longer_than_a_socket_address_works(tmp_path: Path) -> None:
    deep = tmp_path / ("x" * 120)
    deep.mkdir(mode=0o700)
    os.chdir(deep)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
            listening.bind("ztunnel.sock")
            listening.listen(1)
            channel = asyncio.run(connect(str(deep / "ztunnel.sock")))
            channel.close()
    finally:
        os.chdir("/")
