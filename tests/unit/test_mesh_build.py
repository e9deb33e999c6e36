"""The mesh: what documents mean together, and how conflicts are settled."""

from __future__ import annotations

import itertools
import random
from typing import Any

import msgspec
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from nodeagent.api import Document, Origin
from nodeagent.mesh import Binding, MeshState, build, diff
from nodeagent.settings import Settings
from support.resources import peer, read, service, workload
from ztunnel.protocol import DataPlane, Endpoint, Mode, Removal, ServicePort, Workload
from ztunnel.spiffe import SpiffeId

SETTINGS = Settings(
    node="n1", cluster="c", trust_domain="td.example", node_addresses=("192.0.2.1",)
)
OLD, YOUNG = "2026-01-01T00:00:00Z", "2026-02-01T00:00:00Z"
TUNNEL = {"networking.istio.io/tunnel": "http"}


def separately(*texts: str) -> list[Document]:
    """Return the documents as if from one file each, so that the loader sees no conflicts."""
    return [document for text in texts for document in read(text)]


def mesh(*texts: str) -> MeshState:
    return build(separately(*texts), SETTINGS)


# --- workloads ---------------------------------------------------------------------------------


def test_mesh_workload_of_this_node() -> None:
    state = mesh(
        workload(
            "shop/web", "10.1.0.2", netns="web", addresses="fd00::2",
            labels={"app": "web", "version": "v2"}, serviceAccount="web-sa", locality="eu/a",
        )
    )  # fmt: skip
    assert state.workloads == {
        "shop/web": Workload(
            uid="shop/web", name="web", namespace="shop", service_account="web-sa",
            trust_domain="td.example", identity="spiffe://td.example/ns/shop/sa/web-sa",
            addresses=("10.1.0.2", "fd00::2"), data_plane=DataPlane.HBONE, cluster="c", node="n1",
            locality="eu/a", canonical_service="web", canonical_revision="v2", app="web",
            version="v2",
        )
    }  # fmt: skip
    assert state.bindings == {"shop/web": Binding("shop/web", "web")}
    assert state.policies["shop/web"].mode is Mode.PERMISSIVE
    assert state.warnings == ()


def test_mesh_identity_is_a_valid_spiffe_id() -> None:
    state = mesh(workload("shop/web", "10.1.0.2", netns="web"))
    found = SpiffeId.parse(state.workloads["shop/web"].identity)
    assert (found.trust_domain, found.namespace) == ("td.example", "shop")
    assert found.service_account == "default"


def test_mesh_workload_of_another_node_is_not_bound_here() -> None:
    state = mesh(workload("shop/web", "10.1.0.2", netns="n2:web"), peer("shop/x", "STRICT"))
    assert state.workloads["shop/web"].data_plane is DataPlane.HBONE
    assert state.workloads["shop/web"].node == "n2"
    assert (state.bindings, state.policies) == ({}, {})


def test_mesh_binding_with_this_nodes_name_is_bound() -> None:
    state = mesh(workload("shop/web", "10.1.0.2", netns="n1:/run/netns/web"))
    assert state.bindings == {"shop/web": Binding("shop/web", "web")}


def test_mesh_workload_outside_has_no_identity() -> None:
    state = mesh(workload("shop/vm", "10.1.0.2"))
    found = state.workloads["shop/vm"]
    assert (found.data_plane, found.identity, found.node) == (DataPlane.TCP, "", "")


def test_mesh_opted_out_workload_is_neither_bound_nor_hbone() -> None:
    text = workload("shop/web", "10.1.0.2", netns="web", labels={"istio.io/dataplane-mode": "none"})
    state = mesh(text, peer("shop/x", "STRICT"))
    assert state.workloads["shop/web"].data_plane is DataPlane.TCP
    assert (state.bindings, state.policies) == ({}, {})
    assert any("outside the mesh: shop/web" in warning for warning in state.warnings)


def test_mesh_telemetry_labels_follow_istios_order() -> None:
    labels = {
        "service.istio.io/canonical-name": "canon",
        "service.istio.io/canonical-revision": "rev",
        "app.kubernetes.io/name": "k8s",
        "app.kubernetes.io/version": "kv",
        "app": "app",
        "version": "v",
    }
    found = mesh(workload("a/w", "10.0.0.1", labels=labels)).workloads["a/w"]
    assert (found.canonical_service, found.canonical_revision) == ("canon", "rev")
    assert (found.app, found.version) == ("app", "v")
    bare = mesh(workload("a/w", "10.0.0.1")).workloads["a/w"]
    assert (bare.canonical_service, bare.canonical_revision, bare.app) == ("w", "latest", "")


def test_mesh_policies_are_of_bound_workloads_and_of_whom_to_call_in_plaintext() -> None:
    state = mesh(
        workload("shop/web", "10.1.0.2", netns="web", labels={"app": "web"}),
        workload("shop/far", "10.1.0.3", netns="n2:web", labels={"app": "web"}),
        workload("shop/other", "10.1.0.4", netns="n2:other"),
        workload("shop/legacy", "10.1.0.5", labels={"app": "web"}),
        peer("shop/web", "STRICT", selector={"app": "web"}, ports={80: "DISABLE"}),
    )
    assert set(state.policies) == {"shop/web", "shop/far"}
    for found in state.policies.values():
        assert found.port_modes == {80: Mode.DISABLE}
        assert found.origin == "shop/web (mesh.yaml:1)"
    assert "DISABLE" in " ".join(state.warnings)


# --- conflicts ---------------------------------------------------------------------------------


def test_mesh_address_conflict_gives_no_workload_anothers_identity() -> None:
    state = mesh(
        workload("b/new", "10.1.0.2", netns="x", created=YOUNG),
        workload("z/old", "10.1.0.2", netns="y", created=OLD, addresses="fd00::2"),
    )
    assert state.workloads["z/old"].addresses == ("10.1.0.2", "fd00::2")
    loser = state.workloads["b/new"]
    assert loser.addresses == ()
    # It keeps its own name, and stays enrolled, so that nothing of it falls back to plaintext.
    assert loser.identity == "spiffe://td.example/ns/b/sa/default"
    assert set(state.bindings) == {"b/new", "z/old"}
    (warning,) = state.warnings
    assert "10.1.0.2" in warning
    assert "z/old" in warning
    assert warning.startswith("mesh.yaml:1:")


def test_mesh_address_conflict_over_mapped_spelling_is_one() -> None:
    state = mesh(
        workload("a/x", "::ffff:10.1.0.2", netns="x"), workload("b/y", "10.1.0.2", netns="y")
    )
    assert state.workloads["b/y"].addresses == ()


def test_mesh_workload_outside_cannot_turn_an_address_to_plaintext() -> None:
    """Older, and first by name: it would win, if the mesh did not come first."""
    state = mesh(
        workload("a/evil", "10.1.0.2", created=OLD),
        workload("shop/web", "10.1.0.2", netns="web", created=YOUNG),
    )
    assert state.workloads["shop/web"].addresses == ("10.1.0.2",)
    assert state.workloads["a/evil"].addresses == ()


def test_mesh_address_of_the_node_belongs_to_no_workload() -> None:
    state = mesh(workload("a/w", "192.0.2.1", netns="w"))
    assert state.workloads["a/w"].addresses == ()
    assert "this node's own" in state.warnings[0]
    assert mesh(workload("a/vm", "192.0.2.1")).workloads["a/vm"].addresses == ("192.0.2.1",)


def test_mesh_namespace_conflict_binds_only_the_oldest() -> None:
    state = mesh(
        workload("a/new", "10.1.0.2", netns="web", created=YOUNG),
        workload("z/old", "10.1.0.3", netns="n1:/run/netns/web", created=OLD),
    )
    assert state.bindings == {"z/old": Binding("z/old", "web")}
    assert set(state.policies) == {"z/old"}
    assert "not enrolled" in state.warnings[0]
    # On another node the same name is another namespace.
    state = mesh(
        workload("a/x", "10.1.0.2", netns="web"), workload("b/y", "10.1.0.3", netns="n2:web")
    )
    assert state.warnings == ()


def test_mesh_same_document_twice_is_decided_alike() -> None:
    first = workload("a/w", "10.0.0.1", created=OLD)
    second = workload("a/w", "10.0.0.2", created=YOUNG)
    for texts in ((first, second), (second, first)):
        state = mesh(*texts)
        assert state.workloads["a/w"].addresses == ("10.0.0.1",)
        assert len(state.warnings) == 1


# --- services ----------------------------------------------------------------------------------

WEB = workload(
    "shop/web", "10.1.0.2", netns="web", labels={"app": "web"}, ports={"http": 8080}, weight=3
)
WEB2 = workload("shop/web2", "10.1.0.3", netns="n2:web", labels={"app": "web", "x": "y"})
PORTS = [{"number": 80, "name": "http", "targetPort": 8000}, {"number": 9, "name": "tcp"}]
SELECT = {"labels": {"app": "web"}}


def test_mesh_service_selects_workloads_of_its_namespace() -> None:
    state = mesh(
        WEB, WEB2, workload("other/web", "10.1.0.4", labels={"app": "web"}),
        service("shop/s", addresses=["10.96.0.1", "fd00:96::1"], ports=PORTS,
                workloadSelector=SELECT),
    )  # fmt: skip
    found = state.services["shop/s.shop"]
    assert (found.hostname, found.namespace) == ("s.shop", "shop")
    assert found.addresses == ("10.96.0.1", "fd00:96::1")
    assert found.ports == (ServicePort(80, 8000, "http"), ServicePort(9, 9, "tcp"))
    assert found.endpoints == (
        Endpoint("shop/web", "10.1.0.2", 3, {80: 8080}),
        Endpoint("shop/web2", "10.1.0.3", 1, {}),
    )
    assert state.warnings == ()


def test_mesh_service_that_selects_nothing_has_no_endpoint_and_says_so() -> None:
    """Not all workloads, and no passthrough: its connections are refused."""
    state = mesh(WEB, service("shop/s", workloadSelector={"labels": {"app": "wbe"}}))
    assert state.services["shop/s.shop"].endpoints == ()
    assert "selects no workload" in state.warnings[0]


def test_mesh_service_leaves_out_a_workload_that_lost_its_address() -> None:
    state = mesh(
        WEB, workload("shop/twin", "10.1.0.2", netns="t", labels={"app": "web"}, created=OLD),
        service("shop/s", workloadSelector=SELECT),
    )  # fmt: skip
    assert [each.workload for each in state.services["shop/s.shop"].endpoints] == ["shop/twin"]


def test_mesh_service_with_written_endpoints_finds_their_workloads() -> None:
    state = mesh(
        WEB,
        service("db/s", endpoints=[
            {"address": "10.1.0.2", "ports": {"http": 8080}, "weight": 2},
            {"address": "203.0.113.9"},
        ]),
    )  # fmt: skip
    assert state.services["db/s.db"].endpoints == (
        Endpoint("shop/web", "10.1.0.2", 2, {80: 8080}),
        Endpoint("", "203.0.113.9", 1, {}),
    )


def test_mesh_service_inside_the_mesh_with_plaintext_endpoint_says_so() -> None:
    endpoints = [{"address": "203.0.113.9", "serviceAccount": "x", "locality": "eu"}]
    state = mesh(service("a/s", location="MESH_INTERNAL", endpoints=endpoints))
    assert any("in plaintext" in warning for warning in state.warnings)
    assert any("locality" in warning for warning in state.warnings)
    state = mesh(WEB, service("a/s", endpoints=[{"address": "10.1.0.2", "serviceAccount": "x"}]))
    assert any("serviceAccount has no effect" in warning for warning in state.warnings)


def test_mesh_service_of_several_hosts_is_one_each() -> None:
    state = mesh(
        WEB, service("shop/s", hosts=["b", "a"], addresses=["10.96.0.1"], workloadSelector=SELECT)
    )
    assert list(state.services) == ["shop/a", "shop/b"]
    assert state.services["shop/b"].addresses == ("10.96.0.1",)
    assert state.services["shop/a"].addresses == ()
    assert state.services["shop/a"].endpoints == state.services["shop/b"].endpoints


def test_mesh_service_without_address_has_none() -> None:
    state = mesh(WEB, service("shop/s", workloadSelector=SELECT))
    assert state.services["shop/s.shop"].addresses == ()


def test_mesh_service_with_resolution_none_or_only_udp_is_none() -> None:
    udp = [{"number": 53, "name": "dns", "protocol": "UDP"}]
    state = mesh(
        service("a/n", resolution="NONE", addresses=["10.96.0.1"]),
        service("a/u", ports=udp, endpoints=[{"address": "10.0.0.9"}]),
        service(
            "a/m", ports=[*udp, {"number": 53, "name": "tcp"}], endpoints=[{"address": "10.0.0.9"}]
        ),
    )
    assert list(state.services) == ["a/m.a"]
    assert state.services["a/m.a"].ports == (ServicePort(53, 53, "tcp"),)


def test_mesh_service_address_conflict_oldest_keeps_it() -> None:
    spec: dict[str, Any] = {
        "addresses": ["10.96.0.1", "10.96.0.2"],
        "endpoints": [{"address": "203.0.113.9"}],
    }
    state = mesh(
        service("a/new", created=YOUNG, **spec),
        service("z/old", created=OLD, **{**spec, "addresses": ["10.96.0.1"]}),
        service("b/other", ports=[{"number": 81, "name": "x"}], **spec),
    )
    assert state.services["z/old.z"].addresses == ("10.96.0.1",)
    assert state.services["a/new.a"].addresses == ("10.96.0.2",)
    # Another port of the same address is no conflict.
    assert state.services["b/other.b"].addresses == ("10.96.0.1", "10.96.0.2")
    assert len(state.warnings) == 1


def test_mesh_service_cannot_take_a_foreign_workloads_address() -> None:
    """Otherwise an author in one namespace would receive the connections of another."""
    spec: dict[str, Any] = {"addresses": ["10.1.0.2"], "workloadSelector": SELECT}
    state = mesh(WEB, service("evil/s", **spec), service("shop/s", **spec))
    assert state.services["evil/s.evil"].addresses == ()
    assert state.services["shop/s.shop"].addresses == ("10.1.0.2",)
    assert any("another namespace" in warning for warning in state.warnings)


def test_mesh_service_cannot_take_the_nodes_address() -> None:
    state = mesh(service("a/s", addresses=["192.0.2.1"], endpoints=[{"address": "10.0.0.9"}]))
    assert state.services["a/s.a"].addresses == ()


def test_mesh_service_host_belongs_to_the_oldest() -> None:
    spec: dict[str, Any] = {"hosts": ["db"], "endpoints": [{"address": "203.0.113.9"}]}
    texts = [
        service("a/new", created=YOUNG, addresses=["10.96.0.1"], **spec),
        service("a/old", created=OLD, **spec),
    ]
    for order in (texts, texts[::-1]):
        state = mesh(*order)
        assert state.services["a/db"].addresses == ()
        assert any("belongs to ServiceEntry a/old" in warning for warning in state.warnings)
    assert set(mesh(texts[0], service("b/x", **spec)).services) == {"a/db", "b/db"}


# --- as a whole --------------------------------------------------------------------------------

POOL = [
    WEB, WEB2,
    workload("a/x", "10.1.0.2", netns="web", created=OLD), workload("a/y", "10.1.0.3", created=OLD),
    workload("shop/web", "10.1.0.9", netns="other"), workload("b/x", "10.1.0.2", labels=TUNNEL),
    service("shop/s", addresses=["10.96.0.1", "10.1.0.2"], workloadSelector=SELECT),
    service("a/s", addresses=["10.96.0.1"], endpoints=[{"address": "10.1.0.2"}], created=OLD),
    service("shop/s2", hosts=["s.shop", "t"], addresses=["10.96.0.1"], workloadSelector=SELECT),
    peer("shop/p", "STRICT"), peer("shop/q", "DISABLE"), peer("istio-system/m", "STRICT"),
    peer("shop/r", selector={"app": "web"}, ports={80: "DISABLE"}),
]  # fmt: skip


@hypothesis_settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(range(len(POOL))), unique=True), st.randoms(use_true_random=False))
def test_mesh_document_order_never_matters(chosen: list[int], chance: random.Random) -> None:
    documents = [
        msgspec.structs.replace(document, origin=Origin(f"f{index}", 1))
        for index in chosen
        for document in read(POOL[index])
    ]
    expected = build(documents, SETTINGS)
    chance.shuffle(documents)
    state = build(documents, SETTINGS)
    assert state == expected
    assert msgspec.json.encode(state) == msgspec.json.encode(expected)
    # An address, a namespace and a pair of virtual address and port belong to one.
    addresses = [address for each in state.workloads.values() for address in each.addresses]
    assert len(addresses) == len(set(addresses))
    assert len({each.netns for each in state.bindings.values()}) == len(state.bindings)
    pairs = [
        pair
        for each in state.services.values()
        for pair in itertools.product(each.addresses, (port.number for port in each.ports))
    ]
    assert len(pairs) == len(set(pairs))
    assert state.bindings.keys() <= state.policies.keys() <= state.workloads.keys()
    for uid in state.policies.keys() - state.bindings.keys():
        found = state.policies[uid]
        assert Mode.DISABLE in {found.mode, *found.port_modes.values()}


def test_mesh_diff_of_equal_states_is_empty() -> None:
    assert diff(mesh(WEB, WEB2), mesh(WEB2, WEB)) == ((), ())
    assert diff(None, MeshState()) == ((), ())


def test_mesh_diff_leads_from_old_to_new() -> None:
    old = mesh(WEB, WEB2, peer("shop/p", "STRICT"), service("shop/s", workloadSelector=SELECT))
    new = mesh(WEB, peer("shop/p", "PERMISSIVE"))
    upserts, removals = diff(old, new)
    assert upserts == (new.policies["shop/web"],)
    assert removals == (Removal("workload", "shop/web2"), Removal("service", "shop/s.shop"))
    upserts, removals = diff(None, old)
    assert len(upserts) == 2 + 1 + 1
    assert removals == ()
    assert diff(old, MeshState())[1][-1] == Removal("workload_policy", "shop/web")
