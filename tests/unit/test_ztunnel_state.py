from __future__ import annotations

import pytest

from support.mesh_state import (
    authorization,
    bundle,
    change,
    identity,
    ip,
    pod,
    policy,
    ports,
    principals,
    service,
    source,
    state,
    workload,
)
from ztunnel.protocol import (
    Action,
    Attribute,
    Authorization,
    Condition,
    Credential,
    DataPlane,
    Endpoint,
    Removal,
    Resource,
    Rule,
    Workload,
)
from ztunnel.state import EMPTY, MAX_PODS, Change, StateError, apply


def test_a_reset_replaces_everything_that_it_does_not_name() -> None:
    first = state(workload("a", "10.0.0.1"), workload("b", "10.0.0.2"), policy("default/a"))
    second = apply(first, change(2, workload("b", "10.0.0.2"), reset=True))
    assert set(second.workloads) == {"default/b"}
    assert second.workload_at(ip("10.0.0.1")) is None
    assert not second.policies
    assert set(first.workloads) == {"default/a", "default/b"}


def test_a_delta_shares_the_kinds_that_it_does_not_touch() -> None:
    first = state(workload("a", "10.0.0.1"), policy("default/a"))
    second = apply(first, change(2, workload("b", "10.0.0.2")))
    assert second.policies is first.policies
    assert second.workloads is not first.workloads
    assert second.workload_at(ip("10.0.0.1")) is first.workloads["default/a"]
    assert second.settings is first.settings


def test_what_is_set_again_unchanged_is_no_change() -> None:
    first = state(workload("a", "10.0.0.1"), policy("default/a"), bundle(b"root"))
    for reset in (False, True):
        again = apply(
            first,
            change(2, workload("a", "10.0.0.1"), policy("default/a"), bundle(b"root"), reset=reset),
        )
        assert again.workloads is first.workloads
        assert again.by_address is first.by_address
        assert again.policies is first.policies
        assert again.bundles is first.bundles


def test_an_address_goes_to_the_newest_workload_and_back() -> None:
    first = state(workload("old", "10.0.0.1"))
    second = apply(first, change(2, workload("new", "10.0.0.1")))
    found = second.workload_at(ip("10.0.0.1"))
    assert found is not None
    assert found.uid == "default/new"
    third = apply(second, change(3, removals=(Removal("workload", "default/new"),)))
    found = third.workload_at(ip("10.0.0.1"))
    assert found is not None
    assert found.uid == "default/old"


def test_an_address_that_moved_away_is_found_no_more() -> None:
    first = state(workload("a", "10.0.0.1", "fd00::1"))
    second = apply(first, change(2, workload("a", "10.0.0.1")))
    assert second.workload_at(ip("fd00::1")) is None
    assert second.workload_at(ip("10.0.0.1")) is not None


def test_services_are_found_by_virtual_address() -> None:
    one = service("one", ("10.96.0.1",), ())
    first = state(one)
    assert first.by_vip[ip("10.96.0.1")] == (one.uid,)
    second = apply(first, change(2, removals=(Removal("service", one.uid),)))
    assert not second.by_vip


def test_no_key_is_kept() -> None:
    credential = Credential(identity("a"), (b"chain",), b"SECRET", 1, 2)
    found = state(credential)
    assert b"SECRET" not in repr(found.identities).encode()
    assert found.identities[identity("a")].not_after == 2
    rotated = apply(found, change(2, Credential(identity("a"), (b"chain",), b"OTHER", 1, 2)))
    assert rotated.identities is not found.identities


def _bad_workload(**fields: object) -> Workload:
    good = workload("a", "10.0.0.1")
    values = {name: getattr(good, name) for name in good.__struct_fields__} | fields
    return Workload(**values)


@pytest.mark.parametrize(
    "resource",
    [
        workload("a", "fe80::1%eth0"),
        workload("a", "not an address"),
        _bad_workload(identity=""),
        _bad_workload(identity="spiffe://cluster.local/ns/a/sa/b\n"),
        service("s", ("10.0.0.256",), ()),
        service("s", ("10.0.0.1",), (), ports=((0, 80),)),
        service("s", ("10.0.0.1",), (), ports=((80, 65536),)),
        service("s", ("10.0.0.1",), (Endpoint("default/a", "", 0),)),
        service("s", ("10.0.0.1",), (Endpoint("", ""),)),
        service("s", ("10.0.0.1",), (Endpoint("default/a", "", 1, {80: 0}),)),
        pod("p", "default/a"),
        Credential("no spiffe id", (), b"", 0, 0),
        authorization("shop/a", Action.DENY, source(principals("*a*"))),
        authorization("shop/a", Action.DENY, source(ports(0))),
        authorization("shop/a", Action.DENY, source(Condition(Attribute.SOURCE_IP, ("10.0.0",)))),
        authorization("shop/a", Action.ALLOW, source(Condition(Attribute.PRINCIPAL))),
        authorization("shop/a", Action.ALLOW, source(), Rule("", sources=((),))),
        authorization("shop/a", Action.ALLOW, Rule("", operations=((),))),
        authorization("shop/a", Action.ALLOW, Rule("", conditions=(principals(""),))),
        authorization("shop/a", Action.ALLOW, source(), workloads=("shop/x", "default/x")),
        authorization("istio-system/a", Action.ALLOW, source(), workloads=("shop",)),
        authorization("shop/" + "a" * 9000, Action.ALLOW),
        Authorization("AuthorizationPolicy/shop/a", Action.DENY, (), "a", "shop/pay"),
    ],
)
def test_what_no_judgement_can_use_is_refused_by_name(resource: Resource) -> None:
    with pytest.raises(StateError) as refusal:
        state(resource)
    assert refusal.value.uid == resource.uid
    assert refusal.value.reason


def test_a_bad_rule_is_named_with_its_place() -> None:
    bad = authorization("shop/a", Action.DENY, source(), source(ports(99999)))
    with pytest.raises(StateError) as refusal:
        state(bad)
    assert refusal.value.kind == "authorization"
    assert refusal.value.reason == (
        "shop/a rules[1] (policy.yaml:1): destination.port: '99999' is no pattern: "
        "a port is a number in 1..65535"
    )


def test_authorizations_are_kept_and_taken_away() -> None:
    one = authorization("shop/a", Action.DENY, source(ports(80)))
    first = state(one, policy("default/a"))
    assert first.authorizations == {one.uid: one}
    again = apply(first, change(2, one))
    assert again.authorizations is first.authorizations
    gone = apply(first, change(2, removals=(Removal("authorization", one.uid),)))
    assert not gone.authorizations
    assert gone.policies is first.policies


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(StateError, match="no such kind"):
        apply(EMPTY, change(1, removals=(Removal("wormhole", "x"),)))


def test_more_pods_than_a_node_can_have_are_refused() -> None:
    pods = tuple(pod(f"p{number}", "default/a", "10.0.0.1") for number in range(MAX_PODS + 1))
    with pytest.raises(StateError, match="exceed"):
        apply(EMPTY, Change(1, True, pods))


def test_a_workload_without_hbone_needs_no_identity() -> None:
    found = state(workload("legacy", "10.0.0.9", plane=DataPlane.TCP))
    assert found.workloads["default/legacy"].identity == ""
