"""The agent with real configuration, mesh, identities and seam; capture and namespaces stand in."""

# ruff: noqa: ARG002 - the stand-ins look at few of their arguments

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path

from nodeagent import api
from nodeagent.admin import Configuration
from nodeagent.agent import Agent, Parts
from nodeagent.api import ConfigError
from nodeagent.capture.model import (
    Deviation,
    Enforcement,
    Enrolment,
    Finding,
    Listeners,
    OlderCaller,
    PodSpec,
    Recovered,
    Repair,
)
from nodeagent.channel import Channel, close_all
from nodeagent.descriptors import KeptDescriptors
from nodeagent.flows import Recorder
from nodeagent.identity import EmbeddedCa
from nodeagent.offline import Offline
from nodeagent.pods import Appeared, Change, Gone, NetnsHandle, pod_uid
from nodeagent.rundir import CONTROL_SOCKET, RunDirectory
from nodeagent.sdnotify import ServiceManager
from nodeagent.settings import Settings
from nodeagent.sources import SourceState
from ztunnel import protocol

COOKIE = 7
UID = pod_uid("default/a", COOKIE)
ID = "spiffe://cluster.local/ns/default/sa/default"

WORKLOAD = """
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {name: a, namespace: default, annotations: {nodeagent.io/netns: a}}
spec: {address: 10.0.0.1}
"""

STRICT = """
---
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: default, namespace: istio-system}
spec: {mtls: {mode: STRICT}}
"""

DENY = """
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: deny, namespace: istio-system}
spec: {action: DENY, rules: [{from: [{source: {principals: ["set:default/nobody"]}}]}]}
"""

LAYER7 = """
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: read, namespace: default}
spec: {action: DENY, rules: [{to: [{operation: {methods: [GET]}}]}]}
"""


class FakeCapture:
    def __init__(self) -> None:
        self.earlier: list[str] = []
        self.enrolled: dict[str, Listeners | None] = {}
        self.removed: list[str] = []
        self.enforcement: Enforcement | None = None
        self.sockets = [socket.socket(socket.AF_UNIX) for _ in range(4)]

    async def enrol(self, spec: PodSpec, adopt: Listeners | None = None) -> Enrolment:
        self.enrolled[spec.uid] = adopt
        self.enforcement = spec.enforcement
        netns, *listeners = (each.fileno() for each in self.sockets)
        return Enrolment(spec.uid, spec.netns.cookie, netns, Listeners(*listeners))

    async def remove(self, uid: str) -> None:
        self.removed.append(uid)

    async def set_enforcement(self, uid: str, enforcement: Enforcement) -> int:
        self.enforcement = enforcement
        return 0

    async def audit(self, uid: str) -> list[Deviation]:
        return []

    async def repair(self, uid: str) -> Repair:
        return Repair(())

    async def recover(self) -> list[Recovered]:
        return [Recovered(uid, COOKIE, "/x", alive=True, listening=True) for uid in self.earlier]

    async def older(self, uid: str) -> tuple[OlderCaller, ...]:
        return ()

    async def counters(self, uid: str) -> dict[str, int]:
        return {}

    async def probe(self) -> list[Finding]:
        return []

    async def close(self) -> None:
        for each in self.sockets:
            each.close()


class FakeWatcher:
    """Every bound namespace exists."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[Change] = asyncio.Queue()
        self._bound: set[str] = set()

    def set_bindings(self, bindings: Mapping[str, str]) -> None:
        for workload in bindings.keys() - self._bound:
            netns = NetnsHandle(os.open("/dev/null", os.O_RDONLY), COOKIE, Path("/x"))
            self._queue.put_nowait(Appeared(pod_uid(workload, COOKIE), workload, netns))
        for workload in self._bound - bindings.keys():
            self._queue.put_nowait(Gone(pod_uid(workload, COOKIE), workload))
        self._bound = set(bindings)

    async def changes(self) -> AsyncIterator[Change]:
        while True:
            yield await self._queue.get()


class FakeSource:
    def __init__(self) -> None:
        self._queue: asyncio.Queue[SourceState] = asyncio.Queue()
        self._version = 0

    def say(self, text: str, *problems: ConfigError) -> None:
        loaded = api.load(text.encode(), "mesh.yaml", "node-1")
        assert not loaded.errors
        self._version += 1
        state = SourceState(loaded.documents, problems, loaded.warnings, self._version)
        self._queue.put_nowait(state)

    async def states(self) -> AsyncIterator[SourceState]:
        while True:
            yield await self._queue.get()


class Ztunnel:
    """Applies and acknowledges what it is told, and keeps the state."""

    def __init__(self, channel: Channel, world: World) -> None:
        self._channel = channel
        self._world = world
        self.state: dict[tuple[str, str], protocol.Resource] = {}
        self.changes = 0
        self.hold: asyncio.Event | None = None
        """While set and not done, changes are applied and not acknowledged."""
        self.strict_when_told: list[bool] = []

    async def run(self) -> None:
        while True:
            received = await self._channel.receive()
            close_all(received.fds)
            message = received.message
            if isinstance(message, protocol.Query):
                answer = json.dumps({"ready": {"state": ""}}).encode()
                await self._channel.send(protocol.Answer(message.id, answer))
            elif isinstance(message, protocol.Update):
                await self._update(message)

    async def _update(self, update: protocol.Update) -> None:
        if update.reset:
            self.state = {}
        for removal in update.removals:
            self.state.pop((removal.kind, removal.uid), None)
        for resource in update.upserts:
            self.state[str(resource.__struct_config__.tag), resource.uid] = resource
        if not update.commit:
            return
        enforcement = self._world.capture.enforcement
        self.strict_when_told.append(enforcement is not None and enforcement.strict_default)
        self.changes += 1
        if self.hold is not None:
            await self.hold.wait()
        await self._channel.send(protocol.Ack(update.version))


class World:
    def __init__(self, tmp_path: Path) -> None:
        self.capture = FakeCapture()
        self.watcher = FakeWatcher()
        self.source = FakeSource()
        self.kept = KeptDescriptors(ServiceManager({}), ())
        self.settings = Settings(
            node="node-1", run_dir=tmp_path / "run", state_dir=tmp_path / "state"
        )
        self.flows = Recorder(tmp_path / "flows.db", self.settings.flows, time.time, time.monotonic)
        self.directory = RunDirectory(self.settings.run_dir)
        self.listener = self.directory.listen(CONTROL_SOCKET)
        self._tasks: list[asyncio.Task[None]] = []
        self._channels: list[Channel] = []
        self.agent = Agent(
            self.settings,
            Parts(
                source=self.source,
                source_name="here",
                capture=self.capture,
                watcher=self.watcher,
                provider=lambda bound: EmbeddedCa(
                    self.settings.ca_dir, "cluster.local", ttl_seconds=3600, permitted=bound
                ),
                kept=self.kept,
                flows=self.flows,
                version="1",
            ),
        )

    async def start(self) -> None:
        await self.agent.recover()
        self._tasks.append(asyncio.ensure_future(self.agent.run(self.listener.socket)))

    async def ztunnel(self, *held: str) -> Ztunnel:
        raw = socket.socket(socket.AF_UNIX)
        raw.settimeout(0)
        await asyncio.get_running_loop().sock_connect(raw, str(self.listener.path))
        channel = Channel(raw)
        self._channels.append(channel)
        await channel.send(protocol.Hello(protocol.PROTOCOL_VERSION, 42, len(held)))
        for uid in held:
            fds = [each.fileno() for each in self.capture.sockets[:3]]
            await channel.send(protocol.HeldPod(uid, COOKIE), fds)
        assert isinstance((await channel.receive()).message, protocol.Welcome)
        ztunnel = Ztunnel(channel, self)
        self._tasks.append(asyncio.ensure_future(ztunnel.run()))
        return ztunnel

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            seen = self.agent.progress
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.02):
                    await self.agent.progress_after(seen)

    async def ready(self) -> None:
        while await self.agent.missing():
            self.agent._own_at = 0.0
            seen = self.agent.progress
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.02):
                    await self.agent.progress_after(seen)

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for channel in self._channels:
            channel.close()
        self.listener.close()
        self.directory.close()
        self.kept.close()
        self.flows.stop(20)
        await self.capture.close()


def run(tmp_path: Path, test: Callable[[World], Awaitable[None]]) -> None:
    async def main() -> None:
        world = World(tmp_path)
        try:
            async with asyncio.timeout(20):
                await test(world)
        finally:
            await world.close()

    asyncio.run(main())


def test_a_bound_workload_is_enrolled_published_and_ready(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        await world.start()
        assert any("configuration" in line for line in await world.agent.missing())
        ztunnel = await world.ztunnel()
        world.source.say(WORKLOAD)
        await world.ready()
        assert set(ztunnel.state) == {
            ("workload", "default/a"),
            ("workload_policy", "default/a"),
            ("pod", UID),
            ("credential", ID),
            ("trust_bundle", "cluster.local"),
        }
        status = await world.agent.status()
        assert status.ready
        assert status.pods[0].certificate is not None
        assert status.pods[0].mode == "PERMISSIVE"
        agent = world.agent
        text = agent.instruments.render(agent.picture(), openmetrics=False)
        assert b"nodeagent_ready 1.0" in text

    run(tmp_path, test)


def test_closes_before_and_opens_after_ztunnel(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        await world.start()
        world.source.say(WORKLOAD)
        ztunnel = await world.ztunnel()
        await world.ready()
        told = len(ztunnel.strict_when_told)
        world.source.say(WORKLOAD + STRICT)
        await world.until(lambda: len(ztunnel.strict_when_told) > told)
        assert ztunnel.strict_when_told[told] is True, "the guard closed first"
        await world.ready()
        ztunnel.hold = asyncio.Event()
        told = len(ztunnel.strict_when_told)
        world.source.say(WORKLOAD)
        await world.until(lambda: len(ztunnel.strict_when_told) > told)
        assert world.capture.enforcement == Enforcement(strict_default=True)
        ztunnel.hold.set()
        await world.until(lambda: world.capture.enforcement == Enforcement(strict_default=False))

    run(tmp_path, test)


def test_policies_on_who_may_call_come_before_the_pod_and_show_in_the_status(
    tmp_path: Path,
) -> None:
    async def test(world: World) -> None:
        key = ("authorization", "AuthorizationPolicy/istio-system/deny")
        await world.start()
        ztunnel = await world.ztunnel()
        world.source.say(WORKLOAD + DENY)
        await world.until(lambda: ("workload", "default/a") in ztunnel.state)
        # Without it the pod, which comes later, would be open to whom it denies.
        assert key in ztunnel.state
        await world.ready()
        status = await world.agent.status()
        (report,) = status.pods[0].authorizations
        assert (report.policy, report.action, report.dry_run) == (key[1], "DENY", False)
        (unresolved,) = status.config.unresolved
        assert (unresolved.line, unresolved.field) == (
            11,
            "spec.rules[0].from[0].source.principals[0]",
        )
        assert status.config.problems == ()
        world.source.say(WORKLOAD)
        await world.until(lambda: key not in ztunnel.state)

    run(tmp_path, test)


def test_the_documents_that_questions_are_answered_by_are_those_in_force(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        def served() -> Configuration:
            found = world.agent.configuration()
            assert found is not None
            return found

        await world.start()
        assert world.agent.configuration() is None
        world.source.say(WORKLOAD)
        await world.until(lambda: world.agent.configuration() is not None)
        assert "not connected" in served().pending
        ztunnel = await world.ztunnel()
        await world.ready()
        assert served().pending == ""
        assert served().trusted == ("cluster.local",)
        ztunnel.hold = asyncio.Event()
        broken = ConfigError("other.yaml", 3, 1, "spec", "is wrong")
        world.source.say(WORKLOAD + DENY + STRICT, broken)
        key = ("authorization", "AuthorizationPolicy/istio-system/deny")
        await world.until(lambda: key in ztunnel.state)
        assert "not put the newest state in force" in served().pending
        ztunnel.hold.set()
        await world.ready()
        found = served()
        assert (found.pending, found.problems) == ("", ("other.yaml:3:1: spec: is wrong",))
        told = Offline.of(found.documents.all(), found.settings(), found.trusted).state
        assert told.authorizations[key[1]] == ztunnel.state[key]
        assert told.policies["default/a"] == ztunnel.state["workload_policy", "default/a"]
        assert told.workloads["default/a"] == ztunnel.state["workload", "default/a"]

    run(tmp_path, test)


def test_policies_with_parts_of_layer_7_show_in_the_status(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        await world.start()
        await world.ztunnel()
        world.source.say(WORKLOAD + LAYER7)
        await world.ready()
        status = await world.agent.status()
        (found,) = status.config.unenforced
        assert (found.policy, found.action) == ("default/read", "DENY")
        assert (found.fields, found.origin) == (("methods",), "mesh.yaml:8")
        (warning,) = status.config.warnings
        assert "mesh.yaml:11:" in warning
        world.source.say(WORKLOAD)
        await world.until(lambda: not world.agent.picture().config.unenforced)

    run(tmp_path, test)


def test_a_restarted_agent_adopts_and_drops_nothing(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        world.capture.earlier = [UID]
        await world.start()
        ztunnel = await world.ztunnel(UID)
        assert ztunnel.changes == 0
        world.source.say(WORKLOAD)
        await world.until(lambda: ztunnel.changes > 0)
        # The very first snapshot names what ztunnel serves, and with what.
        assert ("pod", UID) in ztunnel.state
        assert ("credential", ID) in ztunnel.state
        await world.ready()
        assert world.capture.enrolled[UID] is not None
        assert world.capture.removed == []

    run(tmp_path, test)


def test_an_unreadable_configuration_takes_nothing_away(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        world.capture.earlier = [UID, "default/gone@9"]
        await world.start()
        ztunnel = await world.ztunnel(UID)
        problem = ConfigError("/x", 0, 0, "", "cannot be read")
        world.source.say("", problem)
        await world.until(lambda: world.agent.picture().config.version == 1)
        assert not world.agent.picture().config.loaded
        # Partly readable: what is there is done, what is missing may just not be readable.
        world.source.say(WORKLOAD, problem)
        await world.ready()
        assert world.capture.removed == []
        assert ("pod", UID) in ztunnel.state
        world.source.say(WORKLOAD)
        await world.until(lambda: world.capture.removed == ["default/gone@9"])

    run(tmp_path, test)


def test_an_unbound_workload_leaves(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        await world.start()
        world.source.say(WORKLOAD)
        ztunnel = await world.ztunnel()
        await world.ready()
        world.source.say("")
        await world.until(lambda: world.capture.removed == [UID])
        await world.ready()
        await world.until(lambda: set(ztunnel.state) == {("trust_bundle", "cluster.local")})
        await world.until(lambda: not world.agent.picture().pods)
        # And may come back.
        world.source.say(WORKLOAD)
        await world.until(lambda: ("pod", UID) in ztunnel.state)

    run(tmp_path, test)


def test_ending_the_agent_removes_nothing(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        await world.start()
        world.source.say(WORKLOAD)
        await world.agent.settled()
        await world.close()
        assert world.capture.removed == []

    async def main() -> None:
        async with asyncio.timeout(20):
            await test(World(tmp_path))

    asyncio.run(main())
