"""AuthorizationPolicy, identity sets and callers: what the tunnel is told, what fails closed."""

from __future__ import annotations

from typing import Any

import pytest

from nodeagent import mesh, published
from nodeagent.policy import _authorization, _identity_sets
from support.compiled import ROOT, A, B, build, compiled, matches, policy, sources
from support.resources import authorization, identities, workload
from ztunnel.protocol import Action, Attribute, Authorization, Condition, Removal, Rule

# --- scope -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "uid, selector, namespace, workloads",
    [
        ("shop/p", None, "shop", None),
        (f"{ROOT}/p", None, "", None),
        ("shop/p", {"app": "web"}, "shop", ("shop/web",)),
        (f"{ROOT}/p", {"app": "db"}, "", ("data/db",)),
    ],
)
def test_scope_is_namespace_mesh_or_selected_workloads(
    uid: str, selector: dict[str, str] | None, namespace: str, workloads: tuple[str, ...] | None
) -> None:
    found = compiled(authorization(uid, "DENY", [{}], selector=selector), uid=uid)
    assert (found.namespace, found.workloads) == (namespace, workloads)


@pytest.mark.parametrize(
    "uid, selector",
    [
        ("other/p", None),
        ("shop/p", {"app": "db"}),
        ("shop/p", {"app": "far"}),
        ("shop/p", {"app": "web", "version": "v2"}),
        (f"{ROOT}/p", {"app": "none"}),
    ],
)
def test_scope_without_a_workload_of_this_node_is_not_told(
    uid: str, selector: dict[str, str] | None
) -> None:
    assert build(authorization(uid, "DENY", [{}], selector=selector)).authorizations == {}


def test_scope_of_a_waypoint_is_nobody_here() -> None:
    target = {"kind": "Service", "name": "web"}
    assert build(policy({}, targetRefs=[target])).authorizations == {}


def test_scope_names_workloads_outside_the_mesh() -> None:
    vm = workload("shop/vm", "10.1.0.9", labels={"app": "web"})
    (warning,) = build(vm, policy({}, selector={"app": "web"})).warnings
    assert "no effect on workloads outside the mesh: shop/vm" in warning
    assert build(vm, policy({}, selector={"app": "x"})).warnings == ()


# --- rules -------------------------------------------------------------------------------------


def test_a_rule_is_told_whole() -> None:
    found = compiled(
        policy(
            {
                **sources(
                    {"principals": [A], "notPrincipals": [B], "ipBlocks": ["10.0.0.0/8"]},
                    {"serviceAccounts": ["x", "other/y"], "notIpBlocks": ["::ffff:10.1.1.1"]},
                    {"namespaces": ["prod-*"], "notNamespaces": ["prod-x"]},
                    {"notServiceAccounts": ["z"]},
                ),
                "to": [{"operation": {"ports": ["80"]}}, {"operation": {"notPorts": ["81"]}}],
                "when": [
                    {"key": "source.principal", "values": ["*"], "notValues": [B]},
                    {"key": "destination.ip", "values": ["::ffff:10.1.0.0/112"]},
                    {"key": "source.serviceAccount", "notValues": ["x"]},
                ],
            },
            action="DENY",
            annotations={"istio.io/dry-run": "true"},
        )
    )
    assert found == Authorization(
        uid="AuthorizationPolicy/shop/p",
        action=Action.DENY,
        origin="shop/p (mesh.yaml:7)",
        namespace="shop",
        dry_run=True,
        rules=(
            Rule(
                origin="shop/p rules[0] (mesh.yaml:7)",
                sources=(
                    (
                        Condition(Attribute.PRINCIPAL, (A,), (B,)),
                        Condition(Attribute.SOURCE_IP, ("10.0.0.0/8",)),
                    ),
                    (
                        Condition(Attribute.SERVICE_ACCOUNT, ("shop/x", "other/y")),
                        Condition(Attribute.SOURCE_IP, (), ("10.1.1.1",)),
                    ),
                    (Condition(Attribute.NAMESPACE, ("prod-*",), ("prod-x",)),),
                    (Condition(Attribute.SERVICE_ACCOUNT, (), ("shop/z",)),),
                ),
                operations=(
                    (Condition(Attribute.DESTINATION_PORT, ("80",)),),
                    (Condition(Attribute.DESTINATION_PORT, (), ("81",)),),
                ),
                conditions=(
                    Condition(Attribute.PRINCIPAL, ("*",), (B,)),
                    Condition(Attribute.DESTINATION_IP, ("10.1.0.0/16",)),
                    Condition(Attribute.SERVICE_ACCOUNT, (), ("shop/x",)),
                ),
            ),
        ),
    )


def test_no_rules_and_an_empty_rule() -> None:
    assert compiled(authorization("shop/p")).rules == ()
    (rule,) = compiled(policy({})).rules
    assert rule == Rule(origin="shop/p rules[0] (mesh.yaml:7)")


def test_the_origin_of_a_rule_has_its_line() -> None:
    text = policy({}, sources({"principals": [A]})).replace('{"from"', '\n{"from"')
    assert [rule.origin for rule in compiled(text).rules] == [
        "shop/p rules[0] (mesh.yaml:7)",
        "shop/p rules[1] (mesh.yaml:8)",
    ]


def test_dry_run_of_an_audit_is_an_audit() -> None:
    text = policy({}, action="AUDIT", annotations={"istio.io/dry-run": "true"})
    assert not compiled(text).dry_run
    text = policy({}, annotations={"istio.io/dry-run": "false"})
    assert not compiled(text).dry_run


# --- layer 7 -----------------------------------------------------------------------------------

GET = {"operation": {"methods": ["GET"]}}
GET_80 = {"operation": {"methods": ["GET"], "ports": ["80"]}}
HEADER = {"key": "request.headers[x]", "values": ["a"]}


@pytest.mark.parametrize(
    "rule",
    [
        {"to": [GET]},
        {"to": [{"operation": {"ports": ["80"]}}, GET]},
        {**sources({"principals": [A]}), "when": [HEADER]},
        sources({"principals": [A], "requestPrincipals": ["x"]}),
    ],
)
def test_layer_7_drops_a_rule_of_an_allow_so_that_it_denies(rule: dict[str, Any]) -> None:
    assert compiled(policy(rule)).rules == ()
    kept = compiled(policy(rule, sources({"principals": [B]})))
    assert [each.origin for each in kept.rules] == ["shop/p rules[1] (mesh.yaml:7)"]


@pytest.mark.parametrize("action", ["DENY", "AUDIT"])
def test_layer_7_is_left_out_of_other_rules_which_then_match_more(action: str) -> None:
    found = compiled(
        policy(
            {"to": [GET_80], **sources({"principals": [A], "notRequestPrincipals": ["x"]})},
            {"to": [GET], "when": [HEADER]},
            {"to": [GET, {"operation": {"ports": ["81"]}}]},
            action=action,
        )
    )
    first, second, third = found.rules
    assert first.sources == ((Condition(Attribute.PRINCIPAL, (A,)),),)
    assert first.operations == ((Condition(Attribute.DESTINATION_PORT, ("80",)),),)
    assert first.unread == ("notRequestPrincipals", "methods")
    assert (second.sources, second.operations, second.conditions) == ((), (), ())
    assert second.unread == ("methods", "request.headers[x]")
    # One of its alternatives asks for nothing that is read: any destination will do.
    assert (third.operations, third.unread) == ((), ("methods",))


def test_layer_7_audit_of_the_rollout_lab_marks_plaintext() -> None:
    """The AUDIT policy that finds who is not yet in the mesh, with its methods and paths."""
    rule = {
        **sources({"notNamespaces": ["shop"]}),
        "to": [{"operation": {"methods": ["GET"], "paths": ["/*"]}}],
    }
    found = compiled(policy(rule, action="AUDIT", selector={"app": "web"}))
    assert matches(found, "")
    assert matches(found, "td/ns/other/sa/x")
    assert not matches(found, A)
    assert found.rules[0].unread == ("methods", "paths")


# --- identity sets ------------------------------------------------------------------------------


def test_sets_stand_wherever_a_principal_does() -> None:
    sets = (
        identities("shop/s", f"spiffe://{A}", "set:data/more"),
        identities("data/more", "other.td/*", "*/sa/prom", "set:last"),
        identities("data/last", B, A),
    )
    members = (A, "other.td/*", "*/sa/prom", B)
    rule = {
        **sources({"principals": ["set:s", "td/x"], "notPrincipals": ["set:data/last"]}),
        "when": [{"key": "source.principal", "values": ["set:shop/s"], "notValues": ["set:s"]}],
    }
    (found,) = compiled(policy(rule), *sets).rules
    assert found.sources == ((Condition(Attribute.PRINCIPAL, (*members, "td/x"), (B, A)),),)
    assert found.conditions == (Condition(Attribute.PRINCIPAL, members, members),)
    assert build(policy(rule), *sets).problems == ()


UNRESOLVED: dict[str, tuple[str, ...]] = {
    "dangling": (),
    "circle": (identities("shop/s", "set:t", "td/x"), identities("shop/t", "set:s")),
    "dangling inside": (identities("shop/s", "set:t"),),
    "circle inside": (
        identities("shop/s", "set:t"),
        identities("shop/t", "set:u"),
        identities("shop/u", "set:t"),
    ),
    "another namespace": (identities("data/s", A),),
}


@pytest.mark.parametrize("why", UNRESOLVED)
@pytest.mark.parametrize("caller", ["", A, B, "td/x"])
def test_unresolved_set_fails_closed(why: str, caller: str) -> None:
    """Nobody for whom it is asked is let in; nobody for whom it is excluded goes undenied."""
    sets = UNRESOLVED[why]
    asked, excluded = sources({"principals": ["set:s"]}), sources({"notPrincipals": ["set:s"]})
    when = {"when": [{"key": "source.principal", "notValues": ["set:s"]}]}
    for rule in (asked, excluded, when):
        assert not matches(compiled(policy(rule), *sets), caller)
        for action in ("DENY", "AUDIT"):
            assert matches(compiled(policy(rule, action=action), *sets), caller)


def test_unresolved_set_costs_no_other_caller_in_an_allow() -> None:
    rule = sources({"principals": ["set:missing", A]}, {"notPrincipals": ["set:missing"]})
    found = compiled(policy(rule))
    assert matches(found, A)
    assert not matches(found, B)
    (known,) = compiled(policy(rule), identities("shop/missing", B)).rules
    assert known.sources[0] == (Condition(Attribute.PRINCIPAL, (B, A)),)


def test_unresolved_set_is_named_with_its_place() -> None:
    state = build(
        policy(sources({"principals": ["set:x"]}), {}, action="DENY"),
        identities("data/s", A, "set:shop/y"),
        workload("shop/w", "10.1.0.7", netns="w", annotations={"nodeagent.io/callers": "set:z"}),
    )
    found = [(each.line, each.field, each.reason.partition(":")[0]) for each in state.problems]
    assert found == [
        (7, "spec.rules[0].from[0].source.principals[0]", "identity set shop/x does not exist"),
        (9, "spec.identities[1]", "identity set shop/y does not exist"),
        (
            11,
            "metadata.annotations['nodeagent.io/callers']",
            "identity set shop/z does not exist",
        ),
    ]
    assert all(each.column > 1 for each in state.problems)
    unread = state.authorizations["AuthorizationPolicy/shop/p"].rules[0].unread
    assert unread == ("identity set shop/x does not exist",)


def test_circles_are_named_once_each_with_their_way() -> None:
    state = build(
        identities("shop/a", "set:b"), identities("shop/b", "set:c", "td/x"),
        identities("shop/c", "set:a", "set:d"), identities("shop/d", "set:data/e"),
        identities("data/e", "set:shop/d"), identities("shop/f", "set:a"),
        identities("shop/g", "td/x"),
    )  # fmt: skip
    ways = [each.reason.split("circle: ")[1].split(";")[0] for each in state.problems]
    assert ways == ["shop/a → shop/b → shop/c → shop/a", "data/e → shop/d → data/e"]
    assert [each.field for each in state.problems] == ["spec.identities[0]"] * 2


def test_sets_that_multiply_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_identity_sets, "MAX_IDENTITIES", 20)
    sets = [identities(f"shop/s{i}", *(f"td/s{i}/{n}" for n in range(8)), *(
        [f"set:s{i - 1}"] if i else [])) for i in range(4)]  # fmt: skip
    rule = sources({"principals": ["set:s3"]})
    state = build(policy(rule), *sets)
    assert state.authorizations["AuthorizationPolicy/shop/p"].rules == ()
    first, second = state.problems
    assert "shop/s3 has more than 20 identities" in first.reason
    assert first.field == "spec.rules[0].from[0].source.principals[0]"
    assert "shop/s2 has more than 20 identities" in second.reason
    assert second.field == "spec.identities[8]"
    assert matches(compiled(policy(rule, action="DENY"), *sets), "")
    assert compiled(policy(sources({"principals": ["set:s1"]})), *sets).rules


def test_a_long_chain_of_sets_does_not_recurse() -> None:
    chain = [identities(f"shop/s{i}", f"set:s{i + 1}") for i in range(3000)]
    chain.append(identities("shop/s3000", A))
    (rule,) = compiled(policy(sources({"principals": ["set:s0"]})), *chain).rules
    assert rule.sources == ((Condition(Attribute.PRINCIPAL, (A,)),),)
    state = build(*chain[:-1], identities("shop/s3000", "set:s0"))
    assert len(state.problems) == 1


# --- too large ----------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", ["MAX_VALUES", "MAX_BYTES"])
def test_a_policy_that_is_too_large_fails_closed(
    limit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Left out on the wire, a DENY would let everybody in."""
    monkeypatch.setattr(_authorization, limit, 300 if limit == "MAX_BYTES" else 3)
    rule = sources({"principals": [f"td/{n}" for n in range(80)]})
    assert compiled(policy(rule)).rules == ()
    denying = build(policy(rule, action="DENY"))
    assert matches(denying.authorizations["AuthorizationPolicy/shop/p"], "")
    assert "until it is split it matches everyone" in denying.problems[0].reason
    text = workload("shop/w", "10.1.0.7", netns="w", annotations={
        "nodeagent.io/callers": ",".join(f"td/{n}" for n in range(80))})  # fmt: skip
    assert compiled(text, kind="WorkloadEntry", uid="shop/w").rules == ()


@pytest.mark.parametrize("times, fits", [(3, True), (4, False)])
def test_the_largest_policy_fits_a_frame(times: int, fits: bool) -> None:
    members = [f"td/{'x' * 195}{n}" for n in range(4_500)]
    rules = [sources({"principals": ["set:s"]})] * times
    found = compiled(policy(*rules, action="DENY"), identities("shop/s", *members))
    change = published.plan(None, {published.key_of(found): found}, 1)
    assert change.oversized == ()
    assert len(found.rules) == (times if fits else 1)
    assert matches(found, "") is not fits


# --- callers ------------------------------------------------------------------------------------


def test_callers_are_an_allow_for_that_workload() -> None:
    text = workload("shop/w", "10.1.0.7", netns="w", annotations={
        "nodeagent.io/callers": f"{A}, set:s"})  # fmt: skip
    found = compiled(text, identities("shop/s", B), kind="WorkloadEntry", uid="shop/w")
    assert found == Authorization(
        uid="WorkloadEntry/shop/w",
        action=Action.ALLOW,
        origin="shop/w nodeagent.io/callers (mesh.yaml:7)",
        namespace="shop",
        workloads=("shop/w",),
        rules=(
            Rule(
                origin="shop/w nodeagent.io/callers (mesh.yaml:7)",
                sources=((Condition(Attribute.PRINCIPAL, (A, B)),),),
            ),
        ),
    )
    unresolved = compiled(text, kind="WorkloadEntry", uid="shop/w")
    assert matches(unresolved, A)
    assert not matches(unresolved, B)


def test_callers_of_another_nodes_workload_are_its_business() -> None:
    annotations = {"nodeagent.io/callers": A}
    assert not build(
        workload("shop/w", "10.1.0.7", netns="n2:w", annotations=annotations),
        workload("shop/v", "10.1.0.8", annotations=annotations),
    ).authorizations


# --- changes -----------------------------------------------------------------------------------


def test_a_change_of_a_set_is_a_change_of_what_refers_to_it() -> None:
    texts = policy(sources({"principals": ["set:s"]})), authorization("data/q", "DENY", [{}])
    before = build(*texts, identities("shop/s", A))
    after = build(*texts, identities("shop/s", A, B))
    upserts, removals = mesh.diff(before, after)
    assert upserts == (after.authorizations["AuthorizationPolicy/shop/p"],)
    assert removals == ()
    assert mesh.diff(after, build(texts[0], identities("shop/s", A, B))) == (
        (),
        (Removal("authorization", "AuthorizationPolicy/data/q"),),
    )
