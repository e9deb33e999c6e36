"""AuthorizationPolicy and IdentitySet as written: what is refused, and what is warned about."""

from __future__ import annotations

import json
from typing import Any

import pytest

from nodeagent.api import (
    AuthorizationPolicy,
    Mark,
    PolicyAction,
    load,
    patterns,
)
from support.resources import authorization, docs, peer, read, refuse

WEB = "cluster.local/ns/shop/sa/web"


def policy(rules: list[Any] | None = None, action: str = "ALLOW", **fields: Any) -> str:  # noqa: ANN401 - whatever the builder takes
    return authorization("shop/p", action, [{}] if rules is None else rules, **fields)


def source(**fields: Any) -> str:  # noqa: ANN401 - the fields of a source
    return policy([{"from": [{"source": fields}]}])


def operation(**fields: Any) -> str:  # noqa: ANN401 - the fields of an operation
    return policy([{"to": [{"operation": fields}]}])


def when(key: str, **fields: Any) -> str:  # noqa: ANN401 - values, notValues
    return policy([{"when": [{"key": key, **fields}]}])


def fields(text: str) -> list[str]:
    return [error.field for error in refuse(text)]


def reason(text: str) -> str:
    """Return what is wrong with a document that has one error."""
    (error,) = refuse(text)
    assert error.line
    assert error.column
    return f"{error.field}: {error.reason}"


def warned(text: str) -> list[str]:
    loaded = load(docs(text), "f", "n1")
    assert not loaded.errors, [str(error) for error in loaded.errors]
    assert all(warning.line and warning.column for warning in loaded.warnings)
    return [f"{warning.field}: {warning.reason}" for warning in loaded.warnings]


# --- shape -------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["security.istio.io/v1", "security.istio.io/v1beta1"])
def test_authorization_is_read_in_both_versions(version: str) -> None:
    (document,) = read(json.dumps({**json.loads(policy()), "apiVersion": version}))
    assert isinstance(document, AuthorizationPolicy)
    assert document.spec.action is PolicyAction.ALLOW
    assert len(document.spec.rules or ()) == 1


def test_authorization_without_anything_is_an_allow_without_rules() -> None:
    (document,) = read(authorization("shop/p"))
    assert isinstance(document, AuthorizationPolicy)
    assert (document.spec.action, document.spec.rules) == (PolicyAction.ALLOW, None)
    assert warned(authorization("shop/p")) == []


def test_authorization_remembers_the_lines_of_its_rules_and_references() -> None:
    text = """
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: p, namespace: shop}
spec:
  rules:
  - from:
    - source:
        principals: ["a/b", "set:own"]
        notPrincipals: ["set:other/x"]
  - when:
    - {key: source.principal, notValues: ["set:own"]}
"""
    (document,) = read(text)
    assert document.marks == (
        Mark("spec.rules[0]", 7, 5),
        Mark("spec.rules[0].from[0].source.principals[1]", 9, 29, "shop/own"),
        Mark("spec.rules[0].from[0].source.notPrincipals[0]", 10, 25, "other/x"),
        Mark("spec.rules[1]", 11, 5),
        Mark("spec.rules[1].when[0].notValues[0]", 12, 43, "shop/own"),
    )


@pytest.mark.parametrize(
    "wrong",
    [
        {"rules": {}},
        {"rules": [None]},
        {"rules": [[]]},
        {"rules": [{"froms": []}]},
        {"rules": [{"from": {}}]},
        {"rules": [{"from": []}]},
        {"rules": [{"to": []}]},
        {"rules": [{"when": []}]},
        {"rules": [{"from": [{}]}]},
        {"rules": [{"from": [{"source": {}}]}]},
        {"rules": [{"from": [{"source": None}]}]},
        {"rules": [{"from": [{"source": {"principal": ["a/b"]}}]}]},
        {"rules": [{"from": [{"source": {"principals": "a/b"}}]}]},
        {"rules": [{"from": [{"source": {"principals": [1]}}]}]},
        {"rules": [{"to": [{}]}]},
        {"rules": [{"to": [{"operation": {}}]}]},
        {"rules": [{"to": [{"operation": {"port": ["80"]}}]}]},
        {"rules": [{"to": [{"operation": {"ports": [80]}}]}]},
        {"rules": [{"when": [{"key": "source.ip"}]}]},
        {"rules": [{"when": [{"values": ["10.0.0.1"]}]}]},
        {"action": "allow"},
        {"action": "LOG"},
        {"selector": {}},
        {"selector": {"matchLabels": {}}},
        {"selector": {"matchLabels": {"app": "web*"}}},
        {"selector": {"matchlabels": {"app": "web"}}},
        {"rule": [{}]},
    ],
    ids=json.dumps,
)
def test_authorization_of_another_shape_is_refused(wrong: dict[str, Any]) -> None:
    document = json.loads(policy())
    document["spec"] |= wrong
    errors = refuse(json.dumps(document))
    assert all(error.line and error.field.startswith("spec") for error in errors)


LISTS = [
    *(f"source.{name}" for name in (
        "principals", "notPrincipals", "requestPrincipals", "notRequestPrincipals", "namespaces",
        "notNamespaces", "serviceAccounts", "notServiceAccounts", "ipBlocks", "notIpBlocks",
        "remoteIpBlocks", "notRemoteIpBlocks",
    )),
    *(f"operation.{name}" for name in (
        "hosts", "notHosts", "ports", "notPorts", "methods", "notMethods", "paths", "notPaths",
    )),
]  # fmt: skip


@pytest.mark.parametrize("where", LISTS)
@pytest.mark.parametrize("values", [[], [""], None])
def test_authorization_list_that_lost_its_items_does_not_become_any(
    where: str, values: list[str] | None
) -> None:
    """CVE-2025-64715: an emptied list became allow-all. Also beside a field that has items."""
    part, name = where.split(".")
    other = {"ipBlocks": ["10.0.0.1"]} if part == "source" else {"ports": ["80"]}
    key = "from" if part == "source" else "to"
    text = policy([{key: [{part: {**other, name: values}}]}])
    assert fields(text)[0].startswith(f"spec.rules[0].{key}[0].{part}.{name}")


def test_authorization_conditions_lists_must_not_be_empty() -> None:
    text = when("source.namespace", values=[], notValues=["a"])
    assert fields(text) == ["spec.rules[0].when[0].values"]


# --- values ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        "*", WEB, "cluster.local/*", "cluster.local/ns/shop/*", "*/sa/web", "*/ns/shop/sa/web",
        "*web", "cluster.local/ns/sh*", "td/x", "set:partners", "set:platform/scrapers", "t*",
        "cluster.local/ns/a.b_c-D/sa/x",
    ],
)  # fmt: skip
def test_authorization_principals_that_can_match(value: str) -> None:
    assert patterns.principal(value) == value
    read(source(principals=[value]), source(notPrincipals=[value]).replace('"p"', '"q"'))


@pytest.mark.parametrize(
    "value",
    [
        "a*b", "**", "*a*", "", "cluster.local/ns/*/sa/web", "spiffe://cluster.local/ns/a/sa/b",
        "Cluster.local/ns/a/sa/b", "cluster.local", "cluster.local/", "cluster.local//a",
        "cluster.local/ns/../sa/b", "cluster.local/ns/a b", "cluster.local/ns/a\n", "/ns/a/sa/b",
        "cluster.local:8080/x", "user@cluster.local/x", "cluster.local/é", "*/", "*//x", "/*",
        "cluster.local/ns/[ab]", "cluster.local/ns/a?", "set:", "set:a/b/c", "set:A", "set:a*",
        "set:*", "x/" + "a" * 2048,
    ],
)  # fmt: skip
def test_authorization_principals_that_can_match_nobody_are_refused(value: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        patterns.principal(value)
    assert refuse(source(principals=[value]))[0].field.startswith("spec.rules[0].from[0].source")


def test_authorization_principal_with_a_scheme_is_told_how_to_write_it() -> None:
    text = source(principals=["spiffe://cluster.local/ns/a/sa/b"])
    assert "write 'cluster.local/ns/a/sa/b'" in reason(text)


@pytest.mark.parametrize("value", ["*", "shop", "prod-*", "*-test", "teamRed-NS", "a.b_c"])
def test_authorization_namespaces_that_can_match(value: str) -> None:
    assert patterns.namespace(value) == value


@pytest.mark.parametrize("value", ["a*b", "**", "", "a/b", "a b", "é", "a\n", "x" * 300, "[a]"])
def test_authorization_namespaces_that_cannot_are_refused(value: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        patterns.namespace(value)


@pytest.mark.parametrize("value", ["web", "shop/web", "a.b/c-d"])
def test_authorization_service_accounts_are_read(value: str) -> None:
    assert patterns.account(value) == value


@pytest.mark.parametrize("value", ["", "/", "a/", "/a", "a/b/c", "*", "shop/*", "web*", "a b"])
def test_authorization_service_accounts_take_no_patterns(value: str) -> None:
    assert "no service account" in reason(source(serviceAccounts=[value]))


@pytest.mark.parametrize("beside", ["principals", "notPrincipals", "namespaces", "notNamespaces"])
@pytest.mark.parametrize("account", ["serviceAccounts", "notServiceAccounts"])
def test_authorization_service_accounts_stand_alone(beside: str, account: str) -> None:
    """Istio's testdata authz-invalid.yaml."""
    value = WEB if "rincipals" in beside else "shop"
    text = source(**{account: ["shop/web"], beside: [value]})
    assert "cannot stand beside" in reason(text)


@pytest.mark.parametrize(
    "value, canonical",
    [
        ("10.0.0.1", "10.0.0.1"),
        ("10.1.0.0/16", "10.1.0.0/16"),
        ("0.0.0.0/0", "0.0.0.0/0"),
        ("FD00::/8", "fd00::/8"),
        ("::/0", "::/0"),
        ("127.0.0.1", "127.0.0.1"),
        ("::ffff:10.0.0.1", "10.0.0.1"),
        ("::ffff:10.1.0.0/112", "10.1.0.0/16"),
        ("fe80::1", "fe80::1"),
    ],
)
def test_authorization_blocks_have_one_spelling(value: str, canonical: str) -> None:
    assert patterns.block(value) == canonical
    assert patterns.block(canonical) == canonical
    for text in (source(ipBlocks=[value]), when("source.ip", values=[value])):
        read(text)


@pytest.mark.parametrize(
    "value",
    [
        "", "10.0.0", "010.0.0.1", "127.1", "10.0.0.1/", "10.0.0.0/33", "10.0.0.0/255.0.0.0",
        "10.0.0.0/0.255.255.255", "10.0.0.0/+8", "10.0.0.0/08", "10.0.0.0/٨", "fe80::1%eth0",
        "fe80::%0/10", "fd00::/129", "::ffff:0:0/90", "10.0.0.1/8", "fd00::1/8", "10.0.0.0/8\n",
        "10.0.0.1-10.0.0.9", "*", "localhost", "10.0.0.0/8/8", "1" * 100,
    ],
)  # fmt: skip
def test_authorization_blocks_of_another_form_are_refused(value: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        patterns.block(value)
    assert refuse(source(notIpBlocks=[value]))
    assert refuse(when("destination.ip", notValues=[value]))


@pytest.mark.parametrize("value", ["0", "65536", "080", "+80", "80 ", "http", "8e1", "٨٠", "80-90"])
def test_authorization_ports_are_numbers(value: str) -> None:
    assert "no port" in reason(operation(ports=[value]))
    assert "no port" in reason(when("destination.port", values=[value]))


# --- when --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key, value",
    [
        ("source.ip", "10.0.0.0/8"),
        ("source.namespace", "prod-*"),
        ("source.principal", "set:partners"),
        ("source.serviceAccount", "shop/web"),
        ("destination.ip", "fd00::1"),
        ("destination.port", "443"),
    ],
)
def test_authorization_conditions_of_layer_4(key: str, value: str) -> None:
    assert warned(when(key, values=[value])) == []
    assert warned(policy([{"when": [{"key": key, "notValues": [value]}]}], "DENY")) == []
    assert "spec.rules[0].when[0].values[1]" in fields(when(key, values=[value, "a*b,"]))


@pytest.mark.parametrize(
    "key",
    [
        "source.user", "Source.ip", "source.ip ", "", "request.headers", "request.headers[]",
        "request.headers[x", "request.auth.claims", "request.path", "destination.name",
        "destination.user", "destination.namespace", "destination.labels[app]", "source",
    ],
)  # fmt: skip
def test_authorization_conditions_that_nobody_knows_are_refused(key: str) -> None:
    assert reason(when(key, values=["a"])).startswith("spec.rules[0].when[0].key")


@pytest.mark.parametrize("key", ["source.ip", "source.namespace", "request.headers[x]"])
def test_authorization_conditions_need_values(key: str) -> None:
    assert "needs values or notValues" in reason(when(key))


# --- actions and scope -------------------------------------------------------------------------


def test_authorization_custom_is_refused_and_says_where_to_go() -> None:
    text = policy(action="CUSTOM", provider={"name": "opa"})
    assert reason(text).startswith("spec.action: CUSTOM asks an external authorizer")


def test_authorization_provider_is_for_custom() -> None:
    assert reason(policy(provider={"name": "opa"})).startswith("spec.provider")


@pytest.mark.parametrize("rules", [None, []])
def test_authorization_deny_without_rules_is_refused(rules: list[Any] | None) -> None:
    assert reason(authorization("shop/p", "DENY", rules)).startswith("spec.rules: DENY without")
    assert "marks nothing" in warned(authorization("shop/p", "AUDIT", rules))[0]
    assert warned(authorization("shop/p", "ALLOW", rules)) == []


@pytest.mark.parametrize("value", ["yes", "", "True", "1"])
def test_authorization_dry_run_is_true_or_false(value: str) -> None:
    text = policy(annotations={"istio.io/dry-run": value})
    assert 'write "true" or "false"' in reason(text)


def test_authorization_dry_run_of_an_audit_has_no_effect() -> None:
    (warning,) = warned(policy(action="AUDIT", annotations={"istio.io/dry-run": "true"}))
    assert "AUDIT never changes a verdict" in warning


@pytest.mark.parametrize(
    "target",
    [
        {"group": "gateway.networking.k8s.io", "kind": "Gateway", "name": "waypoint"},
        {"group": "", "kind": "Service", "name": "web"},
        {"kind": "Service", "name": "web"},
        {"group": "networking.istio.io", "kind": "ServiceEntry", "name": "web"},
    ],
)
def test_authorization_for_a_waypoint_has_no_effect_and_says_so(target: dict[str, str]) -> None:
    (warning,) = warned(policy(targetRefs=[target]))
    assert warning.startswith("spec.targetRefs[0]: the whole policy has no effect here")
    (warning,) = warned(policy(targetRef=target))
    assert warning.startswith("spec.targetRef: ")


@pytest.mark.parametrize(
    "wrong, field",
    [
        ({"kind": "Deployment", "name": "web"}, "kind"),
        ({"group": "apps", "kind": "Service", "name": "web"}, "kind"),
        ({"kind": "Service", "name": "web", "namespace": "b"}, "namespace"),
        ({"kind": "Service"}, "name"),
        ({"name": "web"}, "kind"),
    ],
)
def test_authorization_of_an_impossible_target_is_refused(
    wrong: dict[str, str], field: str
) -> None:
    assert fields(policy(targetRefs=[wrong])) == [f"spec.targetRefs[0].{field}"]


def test_authorization_has_one_kind_of_scope() -> None:
    target = {"kind": "Service", "name": "web"}
    text = policy(selector={"app": "web"}, targetRefs=[target])
    assert "only one of selector" in reason(text)
    assert fields(policy(targetRefs=[])) == ["spec.targetRefs"]


# --- what has another effect than it looks ------------------------------------------------------

LAYER7: dict[str, dict[str, list[Any]]] = {
    "requestPrincipals": {"from": [{"source": {"requestPrincipals": ["*"]}}]},
    "remoteIpBlocks": {"from": [{"source": {"remoteIpBlocks": ["10.0.0.1"]}}]},
    "notRemoteIpBlocks": {"from": [{"source": {"notRemoteIpBlocks": ["10.0.0.1"]}}]},
    "methods": {"to": [{"operation": {"methods": ["GET"]}}]},
    "notMethods": {"to": [{"operation": {"notMethods": ["GET"]}}]},
    "paths": {"to": [{"operation": {"paths": ["/x*"]}}]},
    "notPaths": {"to": [{"operation": {"notPaths": ["/{*}/y"]}}]},
    "hosts": {"to": [{"operation": {"hosts": ["a.example"]}}]},
    "notHosts": {"to": [{"operation": {"notHosts": ["a.example"]}}]},
    "request.headers[x]": {"when": [{"key": "request.headers[x]", "values": ["a"]}]},
    "remote.ip": {"when": [{"key": "remote.ip", "values": ["10.0.0.1"]}]},
    "request.auth.principal": {"when": [{"key": "request.auth.principal", "values": ["a"]}]},
    "request.auth.claims[x]": {"when": [{"key": "request.auth.claims[x]", "notValues": ["a"]}]},
    "connection.sni": {"when": [{"key": "connection.sni", "values": ["a.example"]}]},
}


@pytest.mark.parametrize("name", LAYER7)
@pytest.mark.parametrize(
    "action, effect",
    [("ALLOW", "is dropped"), ("DENY", "it denies every connection"), ("AUDIT", "it marks every")],
)
def test_authorization_of_layer_7_is_never_silently_without_effect(
    name: str, action: str, effect: str
) -> None:
    (warning,) = warned(policy([LAYER7[name]], action))
    assert warning.startswith("spec.rules[0].")
    assert f"{name} is of layer 7" in warning
    assert effect in warning


@pytest.mark.parametrize("name", LAYER7)
@pytest.mark.parametrize(
    "rest",
    [
        {"from": [{"source": {"ipBlocks": ["10.0.0.1"]}}]},
        {"to": [{"operation": {"ports": ["80"]}}]},
        {"when": [{"key": "destination.port", "values": ["80"]}]},
    ],
    ids=json.dumps,
)
def test_authorization_of_layer_7_says_whether_there_is_a_rest(
    name: str, rest: dict[str, list[Any]]
) -> None:
    rule: dict[str, list[Any]] = {}
    parts: tuple[dict[str, list[Any]], ...] = (LAYER7[name], rest)
    for part in parts:
        for key, found in part.items():
            if key != "when" and key in rule:
                inner = "source" if key == "from" else "operation"
                rule[key] = [{inner: {**rule[key][0][inner], **found[0][inner]}}]
            else:
                rule[key] = [*rule.get(key, []), *found]
    (warning,) = warned(policy([rule], "DENY"))
    assert "there is no rest" not in warning


def test_authorization_star_beside_a_name_says_what_else_it_matches() -> None:
    """`ns/prod*` matches prod-evil: said where matching more lets more in."""
    past = ["cluster.local/ns/prod*", "*web"]
    (first, second) = warned(source(principals=past))
    assert "'cluster.local/ns/prod-evil'" in first
    assert "'evil-web'" in second
    assert warned(source(principals=["cluster.local/ns/prod/*", "*/sa/web", "*"])) == []
    assert len(warned(source(namespaces=["prod*", "prod-*"]))) == 1
    rule = [{"from": [{"source": {"principals": past, "notNamespaces": ["prod*"]}}]}]
    assert [text.partition(": ")[0] for text in warned(policy(rule, "DENY"))] == [
        "spec.rules[0].from[0].source.notNamespaces[0]"
    ]
    assert warned(policy(rule, "AUDIT")) == []
    assert len(warned(when("source.namespace", values=["prod*"]))) == 1


@pytest.mark.parametrize(
    "fields",
    [{"notPrincipals": [WEB]}, {"notNamespaces": ["a"]}, {"notServiceAccounts": ["a/b"]}],
    ids=json.dumps,
)
def test_authorization_that_says_only_who_is_not_meant_lets_plaintext_in(
    fields: dict[str, list[str]],
) -> None:
    (warning,) = warned(source(**fields))
    assert "plaintext" in warning
    rule = {"from": [{"source": fields}]}
    assert warned(policy([rule], "DENY")) == warned(policy([rule], "AUDIT")) == []
    asked = {**rule, "when": [{"key": "source.principal", "values": ["*"]}]}
    assert warned(policy([asked])) == []
    if "notServiceAccounts" not in fields:
        assert warned(source(**fields, principals=["*"])) == []


def test_annotations_of_another_kind_are_not_silently_without_effect() -> None:
    text = policy(annotations={"nodeagent.io/callers": WEB})
    assert "on a WorkloadEntry only" in reason(text)
    document = json.loads(peer("shop/p", "STRICT"))
    document["metadata"]["annotations"] = {"istio.io/dry-run": "true"}
    assert "only an AuthorizationPolicy can be a dry run" in warned(json.dumps(document))[0]
