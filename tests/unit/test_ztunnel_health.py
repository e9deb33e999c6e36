from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterator, Mapping, Sequence

import pytest

from support.certificates import NOW
from support.fake_core import FakeCore
from support.mesh_state import (
    authorization,
    bundle,
    change,
    identity,
    ip,
    pod,
    policy,
    source,
    workload,
)
from ztunnel.admin import Check
from ztunnel.control import Control
from ztunnel.corelike import Kind
from ztunnel.health import MAX_LISTED_BYTES, STALL_SECONDS, Health
from ztunnel.observe.access_log import Line
from ztunnel.pods import Pair, PodSockets
from ztunnel.protocol import Action, Credential, Mode, Removal, Resource
from ztunnel.tunnel import UPCALLS_A_TURN, Tunnel

SLEEP = workload("sleep", "10.1.0.1")
POD = pod("pod-sleep", SLEEP.uid, "10.1.0.1")
CREDENTIAL = Credential(identity("sleep"), (b"c",), b"PRIVATE", NOW - 5, NOW + 50)
MESH: tuple[Resource, ...] = (SLEEP, policy(SLEEP.uid, Mode.STRICT), CREDENTIAL, bundle(b"root"))


class Nowhere:
    def write(self, lines: Sequence[Line], /) -> None:
        assert not lines

    def form(self, lines: Sequence[Line], /) -> bytes:
        return b"%d lines" % len(lines)

    def put(self, text: bytes, count: int, /) -> None:
        raise AssertionError(text, count)


class Rig:
    def __init__(self) -> None:
        self.core = FakeCore()
        self.now = 100.0
        self.wall = float(NOW)
        clocks = (lambda: self.now), (lambda: self.wall)
        self.tunnel = Tunnel(
            self.core, Nowhere(), *clocks, lambda credential, _: Pair(1, 2, credential)
        )
        control = Control("/nowhere/ztunnel.sock", self.tunnel, self._answer)
        self.health = Health(self.core, self.tunnel, control, *clocks)
        self.core.last_loop_us = (100_000_000, 100_000_000)
        self.version = 0

    async def _answer(self, what: str, args: Mapping[str, str]) -> bytes:
        return await self.health.answer(what, args)

    def apply(
        self, *resources: Resource, removals: tuple[Removal, ...] = (), with_pod: bool = False
    ) -> None:
        self.version += 1
        given = {}
        if with_pod:
            resources += (POD,)
            given[POD.uid] = PodSockets(*(socket.socket().detach() for _ in range(4)))
        found = change(self.version, *resources, removals=removals, reset=self.version == 1)
        assert asyncio.run(self.tunnel.apply(found, given)) == ""

    def failing(self) -> dict[str, str]:
        return {name: problem for name, problem in self.health.ready() if problem}


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig()
    yield made
    made.tunnel.stop()
    made.core.close()


def test_nothing_is_ready_before_the_first_state(rig: Rig) -> None:
    assert set(rig.failing()) == {"state"}
    assert "never connected" in rig.failing()["state"]


def test_a_node_without_pods_is_ready(rig: Rig) -> None:
    rig.apply()
    assert rig.failing() == {}


def test_a_complete_pod_is_ready(rig: Rig) -> None:
    rig.apply(*MESH, with_pod=True)
    assert rig.failing() == {}


@pytest.mark.parametrize(
    "missing, said",
    [
        (SLEEP, "not known"),
        (CREDENTIAL, "no certificate"),
        (policy(SLEEP.uid, Mode.STRICT), "no policy"),
    ],
)
def test_what_a_pod_lacks_is_said(rig: Rig, missing: Resource, said: str) -> None:
    rig.apply(*(each for each in MESH if each != missing), with_pod=True)
    assert said in rig.failing()["certificates"]
    assert POD.uid in rig.failing()["certificates"]


def test_an_ended_certificate_is_said(rig: Rig) -> None:
    rig.apply(*MESH, with_pod=True)
    rig.wall += 60
    assert "ended 10 s ago" in rig.failing()["certificates"]


def test_a_stalled_worker_is_neither_ready_nor_live(rig: Rig) -> None:
    rig.apply()
    rig.core.last_loop_us = (100_000_000, int((100 - STALL_SECONDS - 1) * 1e6))
    assert rig.failing()["workers"].startswith("worker 1 ")
    checks: list[Check] = rig.health.live()
    assert any(problem for _, problem in checks)


def test_the_status_answer_says_what_is_and_shows_no_key(rig: Rig) -> None:
    rig.apply(*MESH, with_pod=True)
    body = asyncio.run(rig.health.answer("status", {}))
    found = json.loads(body)
    assert found["version"] == 1
    assert found["connected"] is False
    assert found["access_log"] == "-"
    assert found["ready"] == {"state": "", "workers": "", "certificates": "", "decisions": ""}
    assert found["certificates"] == {
        identity("sleep"): {"not_before": NOW - 5, "not_after": NOW + 50}
    }
    (shown,) = found["pods"]
    assert shown == {
        "uid": "pod-sleep",
        "workload": SLEEP.uid,
        "addresses": ["10.1.0.1"],
        "identity": identity("sleep"),
        "certificate_not_after": NOW + 50,
        "mode": "STRICT",
        "policy": "istio-system/default",
        "problem": "",
        "connections": 0,
    }
    assert b"PRIVATE" not in body


def test_the_decisions_answer_tells_what_the_core_was_told(rig: Rig) -> None:
    other = workload("httpbin", "10.2.0.1")
    rig.apply(*MESH, other, with_pod=True)
    held = rig.tunnel.pods.get(POD.uid)
    assert held is not None
    rig.core.ask(Kind.OUTBOUND, held.number, destination=ip("10.2.0.1"), port=80)
    rig.core.ask(Kind.OUTBOUND, held.number, destination=ip("192.0.2.1"), port=80)
    rig.core.ask(
        Kind.INBOUND_PLAINTEXT,
        held.number,
        source=ip("10.9.0.1"),
        destination=ip("10.1.0.1"),
        port=80,
    )
    rig.tunnel.pump()
    found = json.loads(asyncio.run(rig.health.answer("decisions", {"pod": POD.uid})))
    assert [each["action"] for each in found] == ["tunnel", "passthrough", "refuse"]
    assert found[0]["expected"] == [identity("httpbin")]
    assert found[2]["reason"] == "strict_requires_mtls"
    assert found[2]["policy"] == "istio-system/default"
    assert found[2]["client"] == "without_identity"
    assert (found[2]["audits"], found[2]["dry_run"]) == ([], None)
    assert json.loads(asyncio.run(rig.health.answer("decisions", {"pod": "another"}))) == []


def test_decisions_by_policies_with_long_names_fit_into_one_answer(rig: Rig) -> None:
    long = authorization(f"default/{'x' * 8000}", Action.DENY, source(), dry_run=True)
    rig.apply(*MESH[1:], policy(SLEEP.uid, Mode.PERMISSIVE), SLEEP, long, with_pod=True)
    held = rig.tunnel.pods.get(POD.uid)
    assert held is not None
    for number in range(400):
        rig.core.ask(
            Kind.INBOUND_PLAINTEXT,
            held.number,
            source=ip(f"10.9.{number // 200}.{number % 200}"),
            destination=ip("10.1.0.1"),
            port=80,
        )
    for _ in range(400 // UPCALLS_A_TURN + 1):
        rig.tunnel.pump()
    body = asyncio.run(rig.health.answer("decisions", {}))
    assert 100 < len(json.loads(body)) < 400
    assert len(body) < MAX_LISTED_BYTES + 1000


def test_other_questions_are_not_known(rig: Rig) -> None:
    with pytest.raises(KeyError):
        asyncio.run(rig.health.answer("weather", {}))
