"""The lab's network alone: who reaches whom, on both families, and that nothing stays."""

from __future__ import annotations

import itertools
import json
import socket
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import msgspec
import pytest

from nodeagent.lab import LabSpec, Node, Pod, namespaces
from nodeagent.lab import plan as planning
from nodeagent.lab.model import LabPlan, Layout
from nodeagent.lab.topology import Topology
from support.netns import Namespace, namespace

UNREACHABLE_SECONDS = 3.0
"""Long enough for three SYNs; only what must not come through waits for it."""

SPEC = LabSpec(
    name="topology",
    nodes=(Node(name="one"), Node(name="two")),
    pods=(
        Pod(name="a", node="one"),
        Pod(name="b", node="one"),
        Pod(name="c", node="two"),
    ),
    congestion_control="reno",
    mtu=1400,
)


def output(space: Path, *argv: str) -> str:
    run = partial(subprocess.run, argv, check=True, capture_output=True, text=True)
    return namespaces.run_in(space, lambda: str(run().stdout))


def reach(source: Path, destination: Path, address: str) -> bool:
    """Whether a TCP connection from one namespace comes through to an address in another."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = namespaces.run_in(
        destination, lambda: socket.create_server((address, 0), family=family)
    )
    client = namespaces.run_in(source, lambda: socket.socket(family))
    with listener, client:
        client.settimeout(UNREACHABLE_SECONDS)
        try:
            client.connect(listener.getsockname()[:2])
        except OSError:
            return False
        return True


@pytest.fixture(params=[False, True], ids=["small", "large"])
def built(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[tuple[LabPlan, Layout]]:
    plan = planning.make(msgspec.structs.replace(SPEC, large=request.param))
    layout = Layout(tmp_path)
    try:
        Topology(plan, layout).build()
        yield plan, layout
    finally:
        namespaces.unmount_below(tmp_path)


def test_every_pod_reaches_every_other_at_once_on_both_families(
    built: tuple[LabPlan, Layout],
) -> None:
    plan, layout = built
    for source, destination in itertools.permutations(plan.pods, 2):
        for address in destination.addresses:
            spaces = layout.pod_space(source), layout.pod_space(destination)
            # At once: binding to an address under duplicate detection would fail.
            assert reach(*spaces, address)


def test_pods_and_nodes_reach_each_other(built: tuple[LabPlan, Layout]) -> None:
    plan, layout = built
    for node in plan.nodes:
        for pod in plan.pods:
            there, here = layout.node_space(node.name), layout.pod_space(pod)
            for address in pod.addresses:
                assert reach(there, here, address)
            for address in node.addresses:
                assert reach(here, there, address)


def test_traffic_between_nodes_crosses_the_fabric_and_no_other_does(
    built: tuple[LabPlan, Layout],
) -> None:
    plan, layout = built
    near, other, far = plan.pods

    def crossed() -> int:
        (link,) = json.loads(
            output(layout.fabric, "ip", "-j", "-s", "link", "show", plan.nodes[1].port)
        )
        return int(link["stats64"]["tx"]["packets"])

    here = layout.pod_space(near)

    def stays() -> bool:
        before = crossed()
        assert reach(here, layout.pod_space(other), other.addresses[0])
        return crossed() == before

    # IPv6 says something of its own to everybody now and then, but not each time.
    assert any(stays() for _ in range(5))
    before = crossed()
    assert reach(here, layout.pod_space(far), far.addresses[0])
    assert crossed() > before


def test_the_pods_interfaces_are_as_described(built: tuple[LabPlan, Layout]) -> None:
    plan, layout = built
    pod = plan.pods[0]
    (eth0,) = json.loads(output(layout.pod_space(pod), "ip", "-j", "addr", "show", "eth0"))
    assert eth0["mtu"] == 1400
    shown = {each["local"]: each for each in eth0["addr_info"] if each["scope"] == "global"}
    assert set(shown) == set(pod.addresses)
    assert not any(each.get("tentative") for each in eth0["addr_info"])
    own = [text.partition("/")[0] for text in plan.nodes[0].gateways]
    for family, gateway in zip(("-4", "-6"), own, strict=True):
        text = output(layout.pod_space(pod), "ip", "-j", family, "route", "show", "default")
        (route,) = json.loads(text)
        assert (route["dev"], route["gateway"]) == ("eth0", gateway)
    control = Path("/proc/sys/net/ipv4/tcp_congestion_control")
    assert namespaces.run_in(layout.pod_space(pod), control.read_text).strip() == "reno"


def test_pods_of_a_large_lab_ask_for_no_hardware_address(tmp_path: Path) -> None:
    """With a thousand ports on the bridge nobody would hear the answer."""
    plan, layout = planning.make(msgspec.structs.replace(SPEC, large=True)), Layout(tmp_path)
    try:
        Topology(plan, layout).build()
        near, other, far = plan.pods
        for address in (*other.addresses, *far.addresses):
            destination = other if address in other.addresses else far
            assert reach(layout.pod_space(near), layout.pod_space(destination), address)
        for space in (layout.pod_space(near), layout.node_space("one")):
            device = "eth0" if space == layout.pod_space(near) else "pods"
            known = json.loads(output(space, "ip", "-j", "neigh", "show", "dev", device))
            assert known
            assert {state for each in known for state in each["state"]} == {"PERMANENT"}
    finally:
        namespaces.unmount_below(tmp_path)


def dump() -> list[str]:
    """Everything about a network namespace that a lab could have changed."""
    commands = (
        ("ip", "-o", "addr"),
        ("ip", "-4", "rule"),
        ("ip", "-6", "rule"),
        ("ip", "-4", "route", "show", "table", "all"),
        ("ip", "-6", "route", "show", "table", "all"),
        ("nft", "list", "ruleset"),
        ("sysctl", "net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding"),
    )
    return [
        subprocess.run(command, check=True, capture_output=True, text=True).stdout
        for command in commands
    ]


def mounts_below(directory: Path) -> list[str]:
    table = Path("/proc/self/mountinfo").read_text()
    return [line for line in table.splitlines() if f" {directory}" in line]


def test_nothing_is_made_in_the_machines_own_network_and_nothing_stays(tmp_path: Path) -> None:
    layout = Layout(tmp_path)

    def build_and_remove(machine: Namespace) -> None:
        before = dump()
        Topology(planning.make(SPEC), layout).build()
        assert dump() == before
        assert len(mounts_below(tmp_path)) == 1 + 2 + 3
        namespaces.unmount_below(tmp_path)
        assert dump() == before
        assert machine.path.exists()

    with namespace("machine") as machine:
        machine.run(build_and_remove, machine)
    assert mounts_below(tmp_path) == []


def test_two_networks_with_the_same_addresses_do_not_meet(tmp_path: Path) -> None:
    plans = [planning.make(SPEC) for _ in range(2)]
    layouts = [Layout(tmp_path / name) for name in "xy"]
    try:
        for plan, layout in zip(plans, layouts, strict=True):
            layout.directory.mkdir()
            Topology(plan, layout).build()
        first, _, far = plans[0].pods
        here, there = (layouts[0].pod_space(pod) for pod in (first, far))
        assert reach(here, there, far.addresses[0])
        elsewhere = layouts[1].pod_space(first)
        namespaces.remove(layouts[1].pod_space(far))
        assert not reach(elsewhere, there, far.addresses[0])
    finally:
        namespaces.unmount_below(tmp_path)


def test_a_pod_alone_comes_and_goes(built: tuple[LabPlan, Layout]) -> None:
    plan, layout = built
    topology = Topology(plan, layout)
    pod = plan.pods[2]
    for _ in range(3):
        topology.remove_pod(pod)
        topology.add_pod(pod)
        spaces = layout.pod_space(plan.pods[0]), layout.pod_space(pod)
        assert reach(*spaces, pod.addresses[0])


def test_one_family_alone(tmp_path: Path) -> None:
    pods = (
        Pod(name="four", node="one", addresses=("10.244.1.9",)),
        Pod(name="six", node="one", addresses=("fd00:10:244:1::9",)),
        Pod(name="both", node="one"),
    )
    plan = planning.make(LabSpec(name="x", nodes=(Node(name="one"),), pods=pods))
    layout = Layout(tmp_path)
    try:
        Topology(plan, layout).build()
        for pod in plan.pods[:2]:
            both, alone = layout.pod_space(plan.pods[2]), layout.pod_space(pod)
            assert reach(both, alone, pod.addresses[0])
    finally:
        namespaces.unmount_below(tmp_path)
