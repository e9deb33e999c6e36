"""A pod's keeper against a capture that is written out here: order of effects, failures, ends."""

# ruff: noqa: ARG002 - the stand-in for the capture looks at few of its arguments

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from nodeagent import reconcile
from nodeagent.admin.model import PodState
from nodeagent.capture.model import (
    CaptureError,
    CaptureReason,
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
from nodeagent.control import PodDescriptors
from nodeagent.podkeeper import OLDER_AUDITS, PodKeeper
from nodeagent.pods import NetnsHandle
from nodeagent.reconcile import Closed, Wanted
from ztunnel import protocol

OPEN = Closed(default=False)
CLOSED = Closed(default=True)
ONE_PORT = Closed(default=False, ports=frozenset({80}))
UID = "default/a@7"


def handle(cookie: int = 7) -> NetnsHandle:
    return NetnsHandle(os.open("/dev/null", os.O_RDONLY), cookie, Path("/run/netns/a"))


def wanted(closed: Closed = OPEN, *addresses: str) -> Wanted:
    identity = "spiffe://x/ns/default/sa/a"
    return Wanted("default/a", "a", identity, addresses or ("10.0.0.1",), closed)


class World:
    """Capture, seam and owner in one, writing down what happens in order."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.problems: list[CaptureError] = []
        self.broken: list[Deviation] = []
        self.lasting: list[Deviation] = []
        self.adopted: list[Listeners | None] = []
        self.offer: Listeners | None = None
        self.enforcement: Enforcement | None = None
        self.older_callers: tuple[OlderCaller, ...] | CaptureError = ()
        self.failures = 0
        self.task: asyncio.Task[None] | None = None
        self.repairs: list[str] = []
        self.moved = asyncio.Event()
        self.keeper = PodKeeper("default/a", self, self, self, lambda: 1.0)

    def _note(self, event: str) -> None:
        self.events.append(event)
        self.moved.set()

    def _do(self, event: str) -> None:
        self._note(event)
        if self.problems:
            raise self.problems.pop(0)

    def fail(self, *details: str) -> None:
        for detail in details:
            self.problems.append(CaptureError(UID, CaptureReason.KERNEL, detail))

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self.moved.clear()
            await self.moved.wait()

    async def state(self, state: PodState) -> None:
        await self.until(lambda: self.keeper.view.state is state)

    # Capture

    async def enrol(self, spec: PodSpec, adopt: Listeners | None = None) -> Enrolment:
        os.fstat(spec.netns.fd)
        self.adopted.append(adopt)
        self._do(f"enrol {spec.uid} {','.join(spec.addresses)}")
        self.enforcement = spec.enforcement
        remaining = tuple(self.lasting)
        return Enrolment(spec.uid, spec.netns.cookie, 0, Listeners(0, 1, 2), remaining)

    async def remove(self, uid: str) -> None:
        self._do(f"remove {uid}")

    async def set_enforcement(self, uid: str, enforcement: Enforcement) -> int:
        self._do("enforce")
        self.enforcement = enforcement
        self.moved.set()
        return 0

    async def audit(self, uid: str) -> list[Deviation]:
        return list(self.lasting)

    async def repair(self, uid: str) -> Repair:
        self._do("repair")
        found, self.broken = self.broken, []
        enrolment = Enrolment(uid, 7, 0, Listeners(0, 1, 2)) if found else None
        return Repair((*found, *self.lasting), enrolment)

    async def recover(self) -> list[Recovered]:
        return []

    async def older(self, uid: str) -> tuple[OlderCaller, ...]:
        if isinstance(self.older_callers, CaptureError):
            raise self.older_callers
        return self.older_callers

    async def counters(self, uid: str) -> dict[str, int]:
        return {"captured_outbound": 5, "egress_bypass": 2}

    async def probe(self) -> list[Finding]:
        return []

    async def close(self) -> None:
        pass

    # Seam

    def put_pod(self, pod: protocol.Pod, descriptors: PodDescriptors) -> int:
        self._note(f"put {pod.uid}")
        return 1

    def drop_pod(self, uid: str) -> int:
        self._note(f"drop {uid}")
        return 2

    async def acknowledged(self, version: int, seconds: float) -> bool:
        self._note(f"acknowledged {version}")
        return True

    # Owner

    def adoptable(self, uid: str) -> Listeners | None:
        return self.offer

    def enrolled(self, enrolment: Enrolment) -> None:
        self._note("kept")

    def removed(self, uid: str) -> None:
        self._note("forgotten")

    def repaired(self, workload: str, kind: str) -> None:
        self.repairs.append(kind)
        self.moved.set()

    def pods(self) -> int:
        return 1

    def failed(self, workload: str) -> None:
        self.failures += 1
        self.moved.set()

    def progressed(self) -> None:
        self.moved.set()


def run(test: Callable[[World], Awaitable[None]]) -> None:
    async def main() -> None:
        world = World()
        async with asyncio.timeout(20):
            world.task = task = asyncio.ensure_future(world.keeper.run())
            try:
                await test(world)
            finally:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    asyncio.run(main())


def test_enrols_audits_and_publishes() -> None:
    async def test(world: World) -> None:
        world.offer = Listeners(7, 8, 9)
        world.keeper.want(wanted())
        world.keeper.appeared(handle())
        await world.keeper.settled.wait()
        assert world.adopted == [world.offer]
        view = world.keeper.view
        assert view.state is PodState.ENROLLED
        world.keeper.wake()
        await world.until(lambda: "repair" in world.events)
        # The enrolment itself was the first audit.
        assert world.events == [f"enrol {UID} 10.0.0.1", "kept", f"put {UID}", "repair"]
        await world.until(lambda: bool(world.keeper.view.drops))
        assert world.keeper.view.drops == {"egress_bypass": 2}
        assert view.enrolled is not None
        assert view.enrolled.cookie == 7

    run(test)


def test_what_others_have_put_in_the_way_degrades_at_once() -> None:
    async def test(world: World) -> None:
        world.lasting = [Deviation("rule_before_ours", "rule 50 comes before ours")]
        world.keeper.want(wanted())
        world.keeper.appeared(handle())
        await world.keeper.settled.wait()
        assert world.keeper.view.state is PodState.DEGRADED
        assert world.keeper.view.deviations == ("rule 50 comes before ours",)

    run(test)


def test_waits_for_the_namespace_and_says_why() -> None:
    async def test(world: World) -> None:
        world.keeper.left((UID,))
        world.keeper.want(wanted())
        world.keeper.unusable("does not exist", absent=True)
        await world.keeper.settled.wait()
        assert world.keeper.view.state is PodState.WAITING
        assert world.keeper.view.error == "does not exist"
        assert world.events == [], "an earlier capture stays while its namespace cannot be read"
        world.keeper.appeared(handle())
        await world.state(PodState.ENROLLED)
        assert "remove" not in " ".join(world.events)
        assert world.keeper.view.error == ""

    run(test)


def test_ztunnel_lets_go_before_the_capture_is_removed() -> None:
    async def test(world: World) -> None:
        world.keeper.want(wanted())
        world.keeper.appeared(handle())
        await world.state(PodState.ENROLLED)
        world.events.clear()
        world.keeper.want(None)
        await world.until(lambda: "forgotten" in world.events)
        assert world.events == [f"drop {UID}", "acknowledged 2", f"remove {UID}", "forgotten"]
        assert not world.keeper.finished, "the watcher still holds the namespace"
        world.keeper.gone()
        assert world.task is not None
        await world.task
        assert world.keeper.finished

    run(test)


def test_a_namespace_made_anew_is_another_pod() -> None:
    async def test(world: World) -> None:
        world.keeper.want(wanted())
        world.keeper.appeared(handle(7))
        await world.state(PodState.ENROLLED)
        world.events.clear()
        world.keeper.gone()
        world.keeper.appeared(handle(8))
        await world.until(lambda: "repair" in world.events)
        assert world.events[2] == f"remove {UID}"
        assert "enrol default/a@8 10.0.0.1" in world.events

    run(test)


def test_changed_addresses_are_enrolled_in_place() -> None:
    async def test(world: World) -> None:
        world.keeper.want(wanted())
        world.keeper.appeared(handle())
        await world.state(PodState.ENROLLED)
        world.events.clear()
        world.keeper.want(wanted(OPEN, "10.0.0.2"))
        await world.until(lambda: bool(world.events))
        assert world.events[0] == f"enrol {UID} 10.0.0.2"
        assert "remove" not in " ".join(world.events)

    run(test)


def test_failures_are_counted_shown_and_tried_again() -> None:
    async def test(world: World) -> None:
        world.fail("one", "two")
        world.keeper.want(wanted())
        world.keeper.appeared(handle())
        await world.keeper.settled.wait()
        assert world.keeper.view.state is PodState.FAILED
        assert world.keeper.view.error == "one"
        await world.state(PodState.ENROLLED)
        assert world.failures == 2
        assert world.keeper.view.error == ""

    run(test)


def test_a_defect_of_ours_does_not_end_the_keeper() -> None:
    async def test(world: World) -> None:
        world.problems.append(ZeroDivisionError("oops"))  # type: ignore[arg-type]  # that is the defect
        world.keeper.want(wanted())
        world.keeper.appeared(handle())
        await world.state(PodState.FAILED)
        assert "ZeroDivisionError" in world.keeper.view.error
        await world.state(PodState.ENROLLED)

    run(test)


def test_repairs_are_counted_and_new_listeners_published(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconcile, "AUDIT_SECONDS", 0.01)

    async def test(world: World) -> None:
        world.keeper.want(wanted())
        world.keeper.appeared(handle())
        await world.state(PodState.ENROLLED)
        world.events.clear()
        world.broken = [Deviation("rule_missing", "rule 101"), Deviation("listener", "15001")]
        await world.until(lambda: len(world.repairs) == 2)
        assert world.repairs == ["rule_missing", "listener"]
        assert f"put {UID}" in world.events
        assert world.keeper.view.state is PodState.ENROLLED
        assert world.keeper.view.repaired == 2

    run(test)


def test_a_namespace_that_cannot_be_used_may_have_a_pod_that_is_open() -> None:
    async def test(world: World) -> None:
        world.keeper.want(wanted())
        world.keeper.unusable("is the node's own", absent=False)
        await world.state(PodState.FAILED)
        assert world.keeper.view.error == "is the node's own"
        world.keeper.unusable("does not exist", absent=True)
        await world.state(PodState.WAITING)

    run(test)


def test_older_callers_are_looked_for_until_there_are_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reconcile, "AUDIT_SECONDS", 0.001)

    async def test(world: World) -> None:
        there = OlderCaller("10.0.0.9", 80, 2)
        world.older_callers = CaptureError(UID, CaptureReason.KERNEL, "no sock_diag")
        world.keeper.want(wanted())
        world.keeper.appeared(handle())
        await world.state(PodState.ENROLLED)
        assert world.keeper.view.older is None
        world.older_callers = (there,)
        await world.until(lambda: world.keeper.view.older == (there,))
        world.older_callers = ()
        await world.until(lambda: world.keeper.view.older == ())
        # Only a new capture has older connections again.
        world.older_callers = (there,)
        done = world.events.count("repair") + 3 * OLDER_AUDITS
        await world.until(lambda: world.events.count("repair") >= done)
        assert world.keeper.view.older == ()

    run(test)


def test_what_cannot_be_repaired_degrades_and_is_not_counted_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reconcile, "AUDIT_SECONDS", 0.01)

    async def test(world: World) -> None:
        world.lasting = [Deviation("rule_before_ours", "rule 5 comes first")]
        world.keeper.want(wanted())
        world.keeper.appeared(handle())
        await world.state(PodState.DEGRADED)
        assert list(world.keeper.view.deviations) == ["rule 5 comes first"]
        assert world.repairs == []
        world.lasting = []
        await world.state(PodState.ENROLLED)
        assert not world.keeper.view.deviations

    run(test)


def test_closes_at_once_and_opens_when_permitted() -> None:
    async def test(world: World) -> None:
        world.keeper.want(wanted(ONE_PORT))
        world.keeper.appeared(handle())
        await world.state(PodState.ENROLLED)
        # From port 80 strict to all strict but nothing open: all closed before ztunnel hears of it.
        await world.keeper.tighten(CLOSED)
        assert world.enforcement == Enforcement(strict_default=True)
        world.keeper.want(wanted(CLOSED))
        # Back to open: nothing opens until ztunnel has it in force.
        world.events.clear()
        await world.keeper.tighten(OPEN)
        world.keeper.want(wanted(OPEN))
        assert world.enforcement == Enforcement(strict_default=True)
        world.keeper.permit()
        await world.until(lambda: world.enforcement == Enforcement(strict_default=False))

    run(test)


def test_a_failed_closing_is_tried_again() -> None:
    async def test(world: World) -> None:
        world.keeper.want(wanted(OPEN))
        world.keeper.appeared(handle())
        await world.state(PodState.ENROLLED)
        world.fail("busy")
        await world.keeper.tighten(CLOSED)
        assert world.keeper.view.state is PodState.DEGRADED
        await world.until(lambda: world.enforcement == Enforcement(strict_default=True))
        await world.state(PodState.ENROLLED)

    run(test)


def test_unwanted_captures_of_an_earlier_run_are_removed() -> None:
    async def test(world: World) -> None:
        world.fail("busy")
        world.keeper.left((UID, "default/a@6"))
        world.keeper.want(None)
        world.keeper.gone()
        await world.until(lambda: world.events.count("forgotten") == 2)
        assert world.events.count(f"remove {UID}") == 2, "a failure is tried again"

    run(test)
