"""The capture's audit: what a pod's own processes changed is found, closed and put right."""

from __future__ import annotations

import socket
from contextlib import ExitStack

import pytest

from nodeagent.capture import (
    CaptureError,
    CaptureReason,
)
from nodeagent.capture.layout import INBOUND_PORT
from support.captured import FAMILIES, STRICT, Captured, plain

# --- auditing ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, value",
    [
        ("net.ipv4.conf.all.rp_filter", "1"),
        ("net.ipv4.conf.eth0.rp_filter", "2"),
        ("net.ipv4.conf.all.accept_local", "0"),
        ("net.ipv4.tcp_fwmark_accept", "0"),
    ],
)
def test_a_sysctl_reverted_by_the_pod_is_put_back(world: Captured, name: str, value: str) -> None:
    world.enrol()
    right = world.pod.sysctl(name)
    world.pod.sysctl(name, value)
    assert world.deviations() == {"sysctl_changed"}

    repair = world.run(world.capture.repair(world.uid))

    assert [item.kind for item in repair.repaired] == ["sysctl_changed"]
    assert repair.enrolment is None
    assert world.pod.sysctl(name) == right
    assert world.deviations() == set()


@pytest.mark.parametrize(
    "line, kind",
    [
        ("rule del pref 101", "rule_missing"),
        ("-6 rule del pref 100", "rule_missing"),
        ("route del local default dev lo table 100", "route_missing"),
        ("rule add pref 98 lookup main", "rule_foreign"),
        ("rule add pref 50 to 10.9.0.0/24 lookup main", "rule_before_ours"),
    ],
)
def test_routing_changed_by_the_pod(world: Captured, line: str, kind: str) -> None:
    world.enrol()
    world.pod.ip(line)
    assert kind in world.deviations()

    world.run(world.capture.repair(world.uid))

    left = {"rule_before_ours"} if kind == "rule_before_ours" else set()
    assert world.deviations() == left


def test_a_listener_destroyed_by_the_pod_is_opened_anew(world: Captured) -> None:
    application = world.pod.listen(FAMILIES[0].pod)
    world.enrol()
    world.pod.check_output("ss", "-K", "-l", "sport", "=", f":{INBOUND_PORT}")
    assert "listener_lost" in world.deviations()

    client = world.peer.make_socket()
    client.setblocking(False)
    with pytest.raises(BlockingIOError):
        client.connect(application.getsockname())
    world.wait_count("closed_inbound")
    repair = world.run(world.capture.repair(world.uid))

    assert repair.enrolment is not None
    tunnel = world.tunnel(repair.enrolment)
    assert plain(tunnel.accept("inbound").getsockname()) == application.getsockname()
    assert world.deviations() == set()
    application.setblocking(False)
    with pytest.raises(BlockingIOError):
        application.accept()


def test_a_port_stolen_from_a_destroyed_listener_closes_the_pod(world: Captured) -> None:
    world.enrol(STRICT)
    world.pod.check_output("ss", "-K", "-l", "sport", "=", f":{INBOUND_PORT}")
    with ExitStack() as stack:
        thief = stack.enter_context(world.pod.listen("::", INBOUND_PORT))
        with pytest.raises(CaptureError) as caught:
            world.run(world.capture.repair(world.uid))
        assert caught.value.reason is CaptureReason.PORT_TAKEN
        client = world.peer.make_socket()
        client.setblocking(False)
        with pytest.raises(BlockingIOError):
            client.connect((FAMILIES[0].pod, INBOUND_PORT))
        world.wait_count("closed_inbound")
        thief.setblocking(False)
        with pytest.raises(BlockingIOError):
            thief.accept()

    repair = world.run(world.capture.repair(world.uid))
    assert repair.enrolment is not None
    assert world.deviations() == set()


def test_probe_finds_everything_here(world: Captured) -> None:
    findings = world.run(world.capture.probe())
    assert [item.name for item in findings if not item.present] == []
    assert socket.AF_INET6 in {family.family for family in FAMILIES}
