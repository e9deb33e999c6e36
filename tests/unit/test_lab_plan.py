"""From a lab's description to addresses, documents and names."""

from __future__ import annotations

import ipaddress
from pathlib import Path

import msgspec
import pytest

from nodeagent import api
from nodeagent.lab import App, LabSpec, Node, Pod, Port, Service, exercises, load_exercise
from nodeagent.lab import plan as planning
from nodeagent.lab.documents import to_yaml
from nodeagent.lab.model import LabPlan, Layout

LAYOUT = Layout(Path("/run/labs/x"))


def make(*pods: Pod, services: tuple[Service, ...] = ()) -> LabPlan:
    nodes = (Node(name="one"), Node(name="two"))
    return planning.make(LabSpec(name="x", nodes=nodes, pods=pods, services=services))


def test_every_node_and_pod_has_both_families_and_no_address_twice() -> None:
    plan = make(*(Pod(name=f"p{n}", node="one" if n % 2 else "two") for n in range(20)))
    addresses = [text for pod in plan.pods for text in pod.addresses]
    addresses += [text for node in plan.nodes for text in node.addresses]
    addresses += [text.partition("/")[0] for node in plan.nodes for text in node.gateways]
    assert len(set(addresses)) == len(addresses) == (20 + 2 + 2) * 2
    for pod in plan.pods:
        assert [ipaddress.ip_address(text).version for text in pod.addresses] == [4, 6]
        networks = map(ipaddress.ip_network, plan.node_of(pod).networks)
        for text, network in zip(pod.addresses, networks, strict=True):
            assert ipaddress.ip_address(text) in network


def test_given_addresses_are_kept_and_not_assigned_again() -> None:
    given = Pod(name="b", node="one", addresses=("10.244.1.2",))
    plan = make(Pod(name="a", node="one"), given, Pod(name="c", node="one"))
    assert [pod.addresses[0] for pod in plan.pods] == ["10.244.1.3", "10.244.1.2", "10.244.1.4"]
    assert plan.pods[1].addresses == ("10.244.1.2",)


def test_a_large_lab_has_room_for_a_thousand_pods_of_one_node() -> None:
    nodes = (Node(name="one"), Node(name="two"))
    pods = tuple(Pod(name=f"p{n}", node="two") for n in range(1000))
    plan = planning.make(LabSpec(name="x", nodes=nodes, pods=pods, large=True))
    home, home6 = map(ipaddress.ip_network, plan.nodes[1].networks)
    assert (str(home), str(home6)) == ("10.130.0.0/16", "fd00:10:244:2::/64")
    addresses = [text for pod in plan.pods for text in pod.addresses]
    assert len(set(addresses)) == 2000
    assert all(ipaddress.ip_address(text) in home for text in addresses[::2])
    assert all(ipaddress.ip_address(text) in home6 for text in addresses[1::2])


def test_the_plan_survives_its_record() -> None:
    plan = planning.make(load_exercise("istioinaction"))
    assert msgspec.json.decode(msgspec.json.encode(plan), type=LabPlan) == plan


@pytest.mark.parametrize("name", exercises())
def test_generated_documents_are_what_the_mesh_reads(name: str) -> None:
    plan = planning.make(load_exercise(name))
    for file, documents in planning.mesh_documents(plan, LAYOUT).items():
        loaded = api.load(to_yaml(documents).encode(), file, "node-1")
        assert loaded.errors == ()
        assert loaded.warnings == ()
        assert len(loaded.documents) == len(documents)


def test_only_an_enrolled_pod_is_bound_to_its_namespace() -> None:
    plan = make(
        Pod(name="in", node="one"),
        Pod(name="known", node="one", enrolled=False),
        Pod(name="out", node="one", mesh=False),
    )
    files = planning.mesh_documents(plan, LAYOUT)
    assert set(files) == {"workload.default.in.yaml", "workload.default.known.yaml"}
    (bound,) = files["workload.default.in.yaml"]
    assert bound["metadata"]["annotations"] == {
        "nodeagent.io/netns": "one:/run/labs/x/net/pod.default.in",
        "nodeagent.io/addresses": "fd00:10:244:1::2",
    }
    (known,) = files["workload.default.known.yaml"]
    assert "nodeagent.io/netns" not in known["metadata"]["annotations"]


SHOP = Service(
    name="shop",
    namespace="a",
    ports=(Port(port=80, target_port=8080),),
    selector={"app": "shop"},
)


def test_a_service_finds_pods_outside_the_mesh_by_address() -> None:
    inside = Pod(name="s1", namespace="a", node="one", labels={"app": "shop"})
    outside = Pod(name="s2", namespace="a", node="two", labels={"app": "shop"}, mesh=False)
    selected = planning.mesh_documents(make(inside, services=(SHOP,)), LAYOUT)
    (by_label,) = selected["service.a.shop.yaml"]
    assert by_label["spec"]["workloadSelector"] == {"labels": {"app": "shop"}}
    assert by_label["spec"]["ports"][0]["targetPort"] == 8080
    listed = planning.mesh_documents(make(inside, outside, services=(SHOP,)), LAYOUT)
    (by_address,) = listed["service.a.shop.yaml"]
    assert "workloadSelector" not in by_address["spec"]
    assert {each["address"] for each in by_address["spec"]["endpoints"]} == {
        "10.244.1.2",
        "fd00:10:244:1::2",
        "10.244.2.2",
        "fd00:10:244:2::2",
    }


def names_of(hosts: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in hosts.splitlines():
        address, *names = line.split()
        for name in names:
            found.setdefault(name, []).append(address)
    return found


def test_names_lead_captured_pods_to_virtual_addresses_and_others_to_endpoints() -> None:
    server = Pod(name="s1", namespace="a", node="one", labels={"app": "shop"})
    near = Pod(name="near", namespace="a", node="one")
    far = Pod(name="far", namespace="b", node="two")
    plan = make(server, near, far, services=(SHOP,))
    captured = names_of(planning.hosts(plan, plan.pods[1], captured=True))
    full = ["shop.a", "shop.a.svc", "shop.a.svc.cluster.local"]
    for name in ["shop", *full]:
        assert captured[name] == ["10.96.0.1", "fd00:10:96::1"]
    elsewhere = names_of(planning.hosts(plan, plan.pods[2], captured=True))
    assert "shop" not in elsewhere
    assert all(elsewhere[name] == captured[name] for name in full)
    plain = names_of(planning.hosts(plan, plan.pods[1], captured=False))
    assert plain["shop"] == list(plan.pods[0].addresses)


def test_a_service_wins_over_a_pod_of_its_name() -> None:
    server = Pod(name="shop", namespace="a", node="one", labels={"app": "shop"})
    plan = make(server, services=(SHOP,))
    assert names_of(planning.hosts(plan, plan.pods[0], captured=True))["shop"] == [
        "10.96.0.1",
        "fd00:10:96::1",
    ]


def test_settings_keep_what_the_node_adds() -> None:
    nodes = (Node(name="one", locality="r/z", settings={"log_level": "debug"}),)
    plan = planning.make(LabSpec(name="x", nodes=nodes))
    settings = planning.settings(plan, plan.nodes[0], LAYOUT)
    assert settings["node"] == "one"
    assert settings["locality"] == "r/z"
    assert settings["log_level"] == "debug"
    assert "172.18.0.1" in settings["node_addresses"]
    assert "fd00:10:244:1::1" in settings["node_addresses"]


@pytest.mark.parametrize(
    "value",
    ["no", "y", "22:22", "010", "1e3", "~", "", "null", "0x1", " a", "a: b", "- a", "#", "é", "<<"],
)
def test_generated_yaml_means_to_every_reader_what_it_meant_here(value: str) -> None:
    pod = Pod(name="a", node="one", labels={"app": "x"}, apps=(App(name="a", command=(value,)),))
    assert make(pod).pods
    document = {
        "apiVersion": "networking.istio.io/v1",
        "kind": "WorkloadEntry",
        "metadata": {"name": "a", "annotations": {"example.com/x": value}},
        "spec": {"address": "10.0.0.1"},
    }
    loaded = api.load(to_yaml([document]).encode(), "x.yaml")
    assert loaded.errors == ()
    (found,) = loaded.documents
    assert found.metadata.annotations["example.com/x"] == value
