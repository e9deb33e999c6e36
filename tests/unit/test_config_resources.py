"""Resources: Istio's rules, the envelope, and what must never be silently without effect."""

from __future__ import annotations

import json
from typing import Any

import pytest

from nodeagent.api import (
    ConfigError,
    MtlsMode,
    NetnsBinding,
    PeerAuthentication,
    ServiceEntry,
    WorkloadEntry,
    addresses,
    load,
    netns_binding,
    opted_out,
    speaks_hbone,
)
from support.resources import docs, peer, read, refuse, service, workload

ENDPOINT = [{"address": "10.0.0.1"}]
SELECTOR = {"labels": {"a": "b"}}


def ports(*pairs: tuple[int, str]) -> list[dict[str, object]]:
    return [{"number": number, "name": name} for number, name in pairs]


def fields(errors: tuple[ConfigError, ...]) -> list[str]:
    return [error.field for error in errors]


def warnings(*texts: str) -> list[str]:
    loaded = load(docs(*texts), "f", "n1")
    assert not loaded.errors
    return [f"{warning.field}: {warning.reason}" for warning in loaded.warnings]


# --- envelope ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "version, kind",
    [
        ("security.istio.io/v1", "PeerAuthentication"),
        ("security.istio.io/v1beta1", "PeerAuthentication"),
        ("networking.istio.io/v1", "WorkloadEntry"),
        ("networking.istio.io/v1beta1", "WorkloadEntry"),
        ("networking.istio.io/v1alpha3", "ServiceEntry"),
    ],
)
def test_config_accepts_the_versions_that_istio_serves(version: str, kind: str) -> None:
    text = {
        "PeerAuthentication": peer("a/b"),
        "WorkloadEntry": workload("a/b", "10.0.0.1"),
        "ServiceEntry": service("a/b", endpoints=ENDPOINT),
    }[kind]
    document = {**json.loads(text), "apiVersion": version}
    assert type(read(json.dumps(document))[0]).__name__ == kind


@pytest.mark.parametrize(
    "version", ["v1", "security.istio.io/v2", "networking.istio.io/v1", "security.istio.io/v1\n"]
)
def test_config_other_versions_are_refused(version: str) -> None:
    (error,) = refuse(json.dumps({**json.loads(peer("a/b")), "apiVersion": version}))
    assert error.field == "kind"
    assert "known: security.istio.io/v1" in error.reason


def test_config_kind_that_is_not_enforced_is_refused_not_ignored() -> None:
    policy = {**json.loads(peer("a/b")), "kind": "RequestAuthentication", "spec": {}}
    (error,) = refuse(docs(peer("a/a", "STRICT"), json.dumps(policy)))
    assert error.field == "kind"
    assert "RequestAuthentication is for layer 7" in error.reason


@pytest.mark.parametrize("kind", ["DestinationRule", "Gateway", "Pod", "peerauthentication", "X"])
def test_config_unknown_kind_is_refused(kind: str) -> None:
    (error,) = refuse(json.dumps({**json.loads(peer("a/b")), "kind": kind}))
    assert "WorkloadEntry" in error.reason


def test_config_namespace_defaults_as_in_kubernetes() -> None:
    (document,) = read(peer("b"))
    assert document.uid == "default/b"


@pytest.mark.parametrize("missing", ["apiVersion", "kind", "metadata", "spec"])
def test_config_missing_part_of_the_envelope(missing: str) -> None:
    document = json.loads(peer("a/b"))
    del document[missing]
    (error,) = refuse(json.dumps(document))
    assert (error.field, error.reason) == (missing, "is missing: add it")


def test_config_unknown_field_is_an_error_at_every_level() -> None:
    document = json.loads(workload("a/b", "10.0.0.1"))
    document["extra"] = 1
    document["metadata"]["nmae"] = "x"
    document["spec"]["adress"] = "10.0.0.2"
    errors = refuse(json.dumps(document, indent=1))
    assert sorted(fields(errors)) == ["extra", "metadata.nmae", "spec.adress"]
    assert all(error.line and error.column for error in errors)


def test_config_metadata_of_a_server_is_tolerated() -> None:
    document = json.loads(peer("a/b", "STRICT"))
    document["metadata"] |= {
        "uid": "1-2-3",
        "resourceVersion": "17",
        "generation": 3,
        "managedFields": [{"manager": "kubectl", "time": "2026-01-01T00:00:00Z"}],
        "ownerReferences": [],
        "finalizers": ["x"],
        "creationTimestamp": None,
        "annotations": {"kubectl.kubernetes.io/last-applied-configuration": '{"a": "b"}\n'},
    }
    document["status"] = {"conditions": []}
    (read_back,) = read(json.dumps(document))
    assert read_back.metadata.creation_timestamp is None


def test_config_list_of_kubectl_is_read() -> None:
    items = [json.loads(peer("a/b", "STRICT")), json.loads(workload("a/w", "10.0.0.1"))]
    text = json.dumps({"apiVersion": "v1", "kind": "List", "metadata": {}, "items": items})
    assert [type(document) for document in read(text)] == [PeerAuthentication, WorkloadEntry]


def test_config_list_errors_name_the_item() -> None:
    bad = json.loads(peer("a/b"))
    bad["spec"]["mtls"] = {"mode": "x"}
    for item, field in ((bad, "items[1].spec.mtls.mode"), (1, "items[1]")):
        items = [json.loads(peer("a/a")), item]
        (error,) = refuse(json.dumps({"apiVersion": "v1", "kind": "List", "items": items}))
        assert error.field == field
    nested = {"apiVersion": "v1", "kind": "List", "items": [{"apiVersion": "v1", "kind": "List"}]}
    assert fields(refuse(json.dumps(nested))) == ["items[0].kind"]
    assert fields(refuse('{"apiVersion": "v1", "kind": "List"}')) == ["items"]


def test_config_same_name_twice_in_one_file_is_refused() -> None:
    (error,) = refuse(docs(peer("a/b", "STRICT"), peer("a/b", "DISABLE")))
    assert error.line == 3
    assert "PeerAuthentication a/b is already taken" in error.reason
    assert "bad.yaml:1" in error.reason


# --- PeerAuthentication ------------------------------------------------------------------------


def test_config_peer_authentication_is_read() -> None:
    (document,) = read(
        peer("a/b", "STRICT", selector={"app": "web"}, ports={80: "DISABLE", 443: "UNSET"},
             created="2026-01-31T13:00:00+01:00")
    )  # fmt: skip
    assert isinstance(document, PeerAuthentication)
    assert document.spec.mtls.mode is MtlsMode.STRICT
    assert document.spec.selector is not None
    assert document.spec.selector.match_labels == {"app": "web"}
    modes = {port: mtls.mode for port, mtls in document.spec.port_level_mtls.items()}
    assert modes == {80: MtlsMode.DISABLE, 443: MtlsMode.UNSET}
    assert document.age[0].isoformat() == "2026-01-31T12:00:00+00:00"
    assert str(document.origin) == "mesh.yaml:1"


def test_config_emptied_selector_does_not_become_select_all() -> None:
    """CVE-2025-64715: a selector set that lost its entries became allow-all."""
    for selector in ("{}", "{matchLabels: {}}", "null", "{matchLabels: null}", "[]", "''"):
        text = peer("a/b", "DISABLE", selector={"x": "y"}).replace(
            '{"matchLabels": {"x": "y"}}', selector
        )
        assert fields(refuse(text))[0].startswith("spec.selector")
    text = service("a/b", workloadSelector={"labels": {}})
    assert fields(refuse(text)) == ["spec.workloadSelector.labels"]
    text = service("a/b", workloadSelector={})
    assert fields(refuse(text)) == ["spec.workloadSelector.labels"]


def test_config_misspelt_selector_does_not_become_select_all() -> None:
    text = peer("a/b", "DISABLE", selector={"x": "y"})
    for wrong in ("matchlabels", "match_labels", "labels"):
        assert refuse(text.replace("matchLabels", wrong))
    assert refuse(text.replace("selector", "Selector"))


@pytest.mark.parametrize(
    "labels", [{"app": "*"}, {"app": "web*"}, {"*": "x"}, {"": "x"}, {"a?": "x"}, {"a": "[ab]"}]
)
def test_config_selector_takes_no_patterns(labels: dict[str, str]) -> None:
    """Fnmatch would honour `[` and `?`; a label is compared whole."""
    assert "patterns are not supported" in refuse(peer("a/b", selector=labels))[0].reason


def test_config_port_level_needs_a_selector() -> None:
    (error,) = refuse(peer("a/b", "STRICT", ports={80: "DISABLE"}))
    assert error.field == "spec.portLevelMtls"
    assert "selector" in error.reason


def test_config_port_level_must_not_be_empty() -> None:
    (error,) = refuse(peer("a/b", "STRICT", selector={"a": "b"}, ports={}))
    assert error.field == "spec.portLevelMtls"


@pytest.mark.parametrize("port", ["0", "65536", "080", "0x50", "-1", "http", "", "8e3", "80 "])
def test_config_port_level_ports_are_numbers(port: str) -> None:
    text = peer("a/b", selector={"a": "b"}, ports={80: "STRICT"})
    assert refuse(text.replace('"80"', json.dumps(port)))[0].field.startswith("spec.portLevelMtls")


@pytest.mark.parametrize(
    "mode", ["strict", "Strict", "STRICT ", "", "MUTUAL", "ISTIO_MUTUAL", "no"]
)
def test_config_mode_is_one_of_four(mode: str) -> None:
    (error,) = refuse(peer("a/b", mode))
    assert "UNSET, DISABLE, PERMISSIVE, STRICT" in error.reason


# --- WorkloadEntry -----------------------------------------------------------------------------


def test_config_workload_entry_is_read() -> None:
    (document,) = read(
        workload(
            "shop/web", "::ffff:10.1.0.2", netns="n1:web", addresses="10.1.0.2, FD00::2",
            labels={"app": "web"}, ports={"http": 8080}, weight=3, locality="eu/a/1",
            serviceAccount="web-sa",
        )
    )  # fmt: skip
    assert isinstance(document, WorkloadEntry)
    assert document.spec.address == "10.1.0.2"
    assert addresses(document) == ("10.1.0.2", "fd00::2")
    assert netns_binding(document) == NetnsBinding("n1", "web")
    assert document.spec.ports == {"http": 8080}
    assert (document.spec.weight, document.spec.locality) == (3, "eu/a/1")


@pytest.mark.parametrize(
    "value, node, netns",
    [
        ("web", "", "web"),
        ("n1:web", "n1", "web"),
        ("/run/netns/web", "", "web"),
        ("n1:/var/run/netns/web", "n1", "web"),
        ("/run/docker/netns/1-abc", "", "/run/docker/netns/1-abc"),
        ("/proc/17/ns/net", "", "/proc/17/ns/net"),
        ("cni-5f7e", "", "cni-5f7e"),
    ],
)
def test_config_binding_has_one_spelling(value: str, node: str, netns: str) -> None:
    (document,) = read(workload("a/b", "10.0.0.1", netns=value))
    assert isinstance(document, WorkloadEntry)
    assert netns_binding(document) == NetnsBinding(node, netns)


@pytest.mark.parametrize(
    "value",
    [
        *[
            "",
            ":",
            "n1:",
            ":web",
            "..",
            ".",
            "a/b",
            "/",
            "//",
            "/a/../b",
            "/a/./b",
            "/run/netns/..",
        ],
        *["/run/netns/", "web\n", "a b", "N1:web", "n_1:web", "n1:a:b", "-web", "/a\x00b", "/a//b"],
        "/" + "a/" * 3000 + "a",
    ],
)
def test_config_binding_cannot_leave_its_place(value: str) -> None:
    errors = refuse(workload("a/b", "10.0.0.1", netns=value))
    assert errors[0].field == "metadata.annotations['nodeagent.io/netns']"


@pytest.mark.parametrize(
    "value",
    [
        "",
        "10.0.0.1,",
        "10.0.0.2,10.0.0.2",
        "127.0.0.1",
        "a",
        ",".join(f"10.0.0.{i}" for i in range(1, 30)),
    ],
)
def test_config_further_addresses_are_checked(value: str) -> None:
    assert fields(refuse(workload("a/b", "10.0.0.1", addresses=value))) == [
        "metadata.annotations['nodeagent.io/addresses']"
    ]


def test_config_misspelt_annotation_of_ours_is_an_error() -> None:
    (error,) = refuse(workload("a/b", "10.0.0.1", annotations={"nodeagent.io/netn": "web"}))
    assert "nodeagent.io/netns" in error.reason
    assert refuse(workload("a/b", "10.0.0.1", labels={"nodeagent.io/netns": "web"}))


@pytest.mark.parametrize(
    "key, value",
    [
        ("networking.istio.io/tunnel", "HTTP"),
        ("istio.io/dataplane-mode", "None"),
        ("istio.io/dataplane-mode", ""),
    ],
)
def test_config_misspelt_mesh_label_does_not_mean_plaintext(key: str, value: str) -> None:
    assert "has no meaning" in refuse(workload("a/b", "10.0.0.1", labels={key: value}))[0].reason
    errors = refuse(
        workload("a/b", "10.0.0.1", labels=None).replace(
            '"spec": {"address": "10.0.0.1"',
            f'"spec": {{"labels": {{"{key}": "{value}"}}, "address": "10.0.0.1"',
        )
    )
    assert errors[0].field == f"spec.labels['{key}']"


@pytest.mark.parametrize(
    "text, hbone",
    [
        (workload("a/b", "10.0.0.1"), False),
        (workload("a/b", "10.0.0.1", netns="x"), True),
        (workload("a/b", "10.0.0.1", netns="other:x"), True),
        (workload("a/b", "10.0.0.1", labels={"networking.istio.io/tunnel": "http"}), True),
        (
            workload("a/b", "10.0.0.1", annotations={"ambient.istio.io/redirection": "enabled"}),
            True,
        ),
        (
            workload("a/b", "10.0.0.1", annotations={"ambient.istio.io/redirection": "disabled"}),
            False,
        ),
        (workload("a/b", "10.0.0.1", netns="x", labels={"istio.io/dataplane-mode": "none"}), False),
        (
            workload("a/b", "10.0.0.1", netns="x", labels={"istio.io/dataplane-mode": "ambient"}),
            True,
        ),
    ],
)
def test_config_who_speaks_hbone(text: str, hbone: bool) -> None:
    (document,) = read(text)
    assert isinstance(document, WorkloadEntry)
    assert speaks_hbone(document) is hbone


def test_config_opting_out_beats_the_binding_and_says_so() -> None:
    text = workload("a/b", "10.0.0.1", netns="x", labels={"istio.io/dataplane-mode": "none"})
    (document,) = read(text)
    assert isinstance(document, WorkloadEntry)
    assert opted_out(document)
    assert any("takes the workload out" in warning for warning in warnings(text))


def test_config_metadata_labels_win_over_the_specs() -> None:
    text = json.loads(workload("a/b", "10.0.0.1", labels={"app": "meta"}))
    text["spec"]["labels"] = {"app": "spec", "version": "v1"}
    (document,) = read(json.dumps(text))
    assert isinstance(document, WorkloadEntry)
    assert document.labels == {"app": "meta", "version": "v1"}
    assert any("spec.labels.app" in warning for warning in warnings(json.dumps(text)))


def test_config_network_has_no_effect_and_says_so() -> None:
    assert any(
        "spec.network" in warning for warning in warnings(workload("a/b", "10.0.0.1", network="x"))
    )


def test_config_two_workloads_of_a_file_cannot_share_an_address() -> None:
    (error,) = refuse(docs(workload("a/x", "10.0.0.1"), workload("b/y", "::ffff:10.0.0.1")))
    assert error.field == "spec.address"
    assert "address 10.0.0.1 is already taken by WorkloadEntry a/x" in error.reason


def test_config_two_workloads_of_a_file_cannot_share_a_namespace() -> None:
    first = workload("a/x", "10.0.0.1", netns="web")
    for other in ("n1:web", "/run/netns/web", "n1:/var/run/netns/web"):
        (error,) = refuse(docs(first, workload("a/y", "10.0.0.2", netns=other)))
        assert "network namespace web of node n1" in error.reason
    assert read(first, workload("a/y", "10.0.0.2", netns="n2:web"))


# --- ServiceEntry ------------------------------------------------------------------------------


def test_config_service_entry_is_read() -> None:
    (document,) = read(
        service(
            "shop/web", hosts=["web.shop", "web"], addresses=["10.96.0.1", "fd00:96::1/128"],
            ports=[{"number": 80, "name": "http", "protocol": "HTTP", "targetPort": 8080}],
            location="MESH_INTERNAL", workloadSelector={"labels": {"app": "web"}}, exportTo=["*"],
        )
    )  # fmt: skip
    assert isinstance(document, ServiceEntry)
    assert document.spec.addresses == ("10.96.0.1", "fd00:96::1")
    assert document.spec.ports[0].target_port == 8080


@pytest.mark.parametrize(
    "spec, field",
    [
        ({"hosts": [], "endpoints": ENDPOINT}, "spec.hosts"),
        ({"hosts": ["a.b", "a.b"], "endpoints": ENDPOINT}, "spec.hosts[1]"),
        ({"hosts": ["*.b"], "endpoints": ENDPOINT}, "spec.hosts[0]"),
        ({"hosts": ["*"], "endpoints": ENDPOINT}, "spec.hosts[0]"),
        ({"ports": [], "endpoints": ENDPOINT}, "spec.ports"),
        ({"ports": [{"number": 80}], "endpoints": ENDPOINT}, "spec.ports[0].name"),
        ({"ports": ports((80, "a"), (80, "b")), "endpoints": ENDPOINT},
         "spec.ports[1].number"),
        ({"ports": ports((80, "a"), (81, "a")), "endpoints": ENDPOINT},
         "spec.ports[1].name"),
        ({"ports": [{"number": 80, "name": "a", "protocol": "SCTP"}], "endpoints": ENDPOINT},
         "spec.ports[0].protocol"),
        ({"addresses": ["10.0.0.9", "10.0.0.9"], "endpoints": ENDPOINT}, "spec.addresses[1]"),
        ({"addresses": ["10.0.0.0/8"], "endpoints": ENDPOINT}, "spec.addresses[0]"),
        ({}, "spec.resolution"),
        ({"resolution": "DNS", "endpoints": ENDPOINT}, "spec.resolution"),
        ({"resolution": "DNS_ROUND_ROBIN"}, "spec.resolution"),
        ({"resolution": "NONE", "endpoints": ENDPOINT}, "spec.endpoints"),
        ({"resolution": "NONE", "workloadSelector": SELECTOR}, "spec.workloadSelector"),
        ({"endpoints": ENDPOINT, "workloadSelector": SELECTOR}, "spec.workloadSelector"),
        ({"endpoints": [{"address": "web.shop"}]}, "spec.endpoints[0].address"),
        ({"endpoints": ENDPOINT * 2}, "spec.endpoints[1].address"),
        ({"endpoints": [{"address": "10.0.0.1", "ports": {"grpc": 1}}]},
         "spec.endpoints[0].ports.grpc"),
        ({"endpoints": [{"address": "10.0.0.1", "labels": {"networking.istio.io/tunnel": "http"}}]},
         "spec.endpoints[0].labels['networking.istio.io/tunnel']"),
    ],
)  # fmt: skip
def test_config_service_entry_rules(spec: dict[str, Any], field: str) -> None:
    assert field in fields(refuse(service("a/b", **spec)))


def test_config_service_entry_defaults_to_resolution_none() -> None:
    document = json.loads(service("a/b", endpoints=ENDPOINT))
    del document["spec"]["resolution"]
    (error,) = refuse(json.dumps(document))
    assert "STATIC" in error.reason


@pytest.mark.parametrize(
    "spec, field",
    [
        ({"exportTo": ["."], "endpoints": ENDPOINT}, "spec.exportTo"),
        ({"subjectAltNames": ["x"], "endpoints": ENDPOINT}, "spec.subjectAltNames"),
        ({"resolution": "NONE"}, "spec.resolution"),
        ({"ports": [{"number": 53, "name": "dns", "protocol": "UDP"}], "endpoints": ENDPOINT},
         "spec.ports[0].protocol"),
        ({"endpoints": [{"address": "10.0.0.1", "network": "n"}]}, "spec.endpoints[0].network"),
    ],
)  # fmt: skip
def test_config_field_without_effect_is_a_warning(spec: dict[str, Any], field: str) -> None:
    assert any(warning.startswith(field) for warning in warnings(service("a/b", **spec)))
