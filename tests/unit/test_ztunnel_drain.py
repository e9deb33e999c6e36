"""Draining, seen from the control side: pods only leave, changes count, the end is bounded."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable, Iterator, Mapping

import pytest

from support.fake_core import FakeCore
from support.mesh_state import pod, policy
from support.tunnel_rig import HTTPBIN, POD, SLEEP, Rig, credential, is_open, sockets
from ztunnel import upgrade
from ztunnel.protocol import Mode, Removal


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig()
    made.start()
    yield made
    made.close()


def test_the_listeners_are_closed_and_the_namespace_is_kept(rig: Rig) -> None:
    held = rig.tunnel.pods.get(POD.uid)
    assert held is not None
    before = held.sockets
    rig.tunnel.drain()
    rig.tunnel.drain()
    assert [is_open(each) for each in before] == [True, False, False, False]
    assert [listeners for _, listeners in rig.tunnel.held()] == [()]
    assert rig.core.calls.count(("drain", ())) == 2


def test_a_pod_that_is_named_again_is_kept_and_a_new_one_is_left_to_the_successor(
    rig: Rig,
) -> None:
    number = rig.pod
    rig.tunnel.drain()
    given = {POD.uid: sockets(), "pod-new": sockets()}
    new = pod("pod-new", HTTPBIN.uid, "10.2.0.1")
    # A restarted nodeagent says everything anew.
    assert rig.apply(SLEEP, HTTPBIN, POD, new, credential(), reset=True, given=given) == ""
    assert rig.pod == number
    assert list(rig.core.pods) == [number]
    assert not any(is_open(each) for found in given.values() for each in found)


def test_a_certificate_is_rotated_and_a_pod_leaves(rig: Rig) -> None:
    number = rig.pod
    rig.tunnel.drain()
    assert rig.apply(credential(serial=b"2")) == ""
    assert rig.pod == number
    assert len(rig.built) == 2
    assert rig.apply(policy(SLEEP.uid, Mode.STRICT)) == ""
    assert rig.apply(removals=(Removal("pod", POD.uid),)) == ""
    assert not rig.core.pods


class Service:
    """The service manager, nodeagent and a successor, which only remember."""

    def __init__(self) -> None:
        self.core = FakeCore()
        self.now = 0.0
        self.said: list[object] = []
        self.started: Service | OSError = self
        self.pid = 7
        self.gone = asyncio.Event()
        self.told = asyncio.Event()
        self.cut = 0
        self.upgrade = upgrade.Upgrade(
            self.core,
            lambda: self.said.append("drain"),
            self.launch,
            self.tell,
            lambda: self.cut,
            self,
            lambda: self.now,
        )

    async def launch(self) -> Service:
        if isinstance(self.started, OSError):
            raise self.started
        return self.started

    async def tell(self, what: str, args: Mapping[str, str]) -> bool:
        self.said.append((what, dict(args)))
        return True

    async def ended(self) -> None:
        await self.gone.wait()

    def signal(self, number: signal.Signals) -> None:
        self.said.append(number)
        self.gone.set()

    def close(self) -> None:
        self.said.append("close")

    def ready(self) -> None:
        self.said.append("ready")
        self.told.set()

    async def over_again(self) -> None:
        """Return once a reload is over for the service manager."""
        await self.told.wait()
        self.told.clear()

    def reloading(self) -> None:
        self.said.append("reloading")

    def handed_over(self, pid: int) -> None:
        self.said.append(("handed over", pid))

    def stopping(self) -> None:
        self.said.append("stopping")


def play(work: Callable[[Service], Awaitable[None]]) -> None:
    async def whole() -> None:
        service = Service()
        try:
            async with asyncio.timeout(20):
                await work(service)
        finally:
            service.core.close()

    asyncio.run(whole())


def test_a_drain_for_a_successor_has_no_end_but_its_own() -> None:
    async def work(service: Service) -> None:
        run = asyncio.create_task(service.upgrade.run())
        service.upgrade.hand_over(9)
        service.now = 1e6
        service.upgrade.stop()
        await asyncio.sleep(2 * upgrade.POLL_SECONDS)
        assert not service.upgrade.over.is_set()
        assert service.upgrade.status() == {"seconds": 1e6, "successor": 9, "cut": 0}
        service.cut = 2
        service.core.emptied = True
        await run
        # What the fake core still counts as open is cut as well.
        left = service.core.stats().connections
        assert service.said == [
            "drain",
            ("handed over", 9),
            ("drained", {"cut": str(2 + left), "seconds": "1000000.0"}),
        ]

    play(work)


def test_a_stop_waits_for_so_long_and_no_longer() -> None:
    async def work(service: Service) -> None:
        run = asyncio.create_task(service.upgrade.run())
        service.upgrade.stop()
        await asyncio.sleep(2 * upgrade.POLL_SECONDS)
        assert not run.done()
        service.now = upgrade.STOP_SECONDS
        await run
        assert service.upgrade.over.is_set()
        assert service.said == ["stopping", "drain"]

    play(work)


def test_a_second_stop_ends_at_once() -> None:
    async def work(service: Service) -> None:
        service.upgrade.stop()
        service.upgrade.stop()
        assert service.upgrade.over.is_set()

    play(work)


def test_a_successor_that_does_not_serve_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upgrade, "SUCCESSOR_SECONDS", 0.01)

    async def work(service: Service) -> None:
        task = asyncio.create_task(service.upgrade.reloads())
        service.upgrade.reload()
        await service.over_again()
        assert service.said == [
            "reloading", signal.SIGTERM, signal.SIGKILL, "close", "ready",
        ]  # fmt: skip
        assert "did not serve" in service.upgrade.problem
        assert not service.upgrade.draining
        service.started = OSError("no memory")
        service.upgrade.reload()
        await service.over_again()
        assert "no memory" in service.upgrade.problem
        task.cancel()

    play(work)


def test_who_drains_starts_no_successor() -> None:
    async def work(service: Service) -> None:
        service.upgrade.hand_over(9)
        service.upgrade.reload()
        task = asyncio.create_task(service.upgrade.reloads())
        await asyncio.sleep(0)
        assert "reloading" not in service.said
        task.cancel()

    play(work)
