"""The plan: complete, ordered, and empty when nothing is to be done."""

from __future__ import annotations

import socket
from typing import Any

import msgspec
import pytest

from nodeagent.capture import actions, plan
from nodeagent.capture.layout import SLOTS
from nodeagent.pods.values import Address, Device, Interfaces

V4, V6 = int(socket.AF_INET), int(socket.AF_INET6)
ETH0 = Device(2, "eth0")
INTERFACES = Interfaces((ETH0,), (Address(2, "10.0.0.1"), Address(2, "fd00::1")))
WANTED = plan.Wanted(("10.0.0.1", "fd00::1"), b"settings", (11, 12, 13))
SYSCTLS = {
    "ipv4/conf/all/rp_filter": "1",
    "ipv4/conf/default/rp_filter": "1",
    "ipv4/conf/lo/rp_filter": "0",
    "ipv4/conf/eth0/rp_filter": "1",
    "ipv4/conf/all/accept_local": "0",
    "ipv4/tcp_fwmark_accept": "0",
}
BARE = plan.Found(
    interfaces=INTERFACES,
    families=frozenset({V4, V6}),
    rules=frozenset(),
    routes=frozenset(),
    sysctls=SYSCTLS,
    clsact=frozenset(),
    filters=frozenset(),
    listening=(None, None, None),
)


def after(  # noqa: C901 - a table
    found: plan.Found, wanted: plan.Wanted = WANTED
) -> plan.Found:
    """Return what the kernel would have once the plan is done: a model of the executor."""
    state: dict[str, Any] = {name: getattr(found, name) for name in plan.Found.__struct_fields__}
    state["capture"] = 7
    state["programs"] = {"egress": 8, "ingress": 9}
    for action in plan.plan(wanted, found):
        match action:
            case actions.OpenListener():
                state["listening"] = (True,) * SLOTS
            case actions.FillSlot():
                state["slots"] = wanted.sockets
            case actions.WriteSettings(value):
                state["settings"] = value
            case actions.SetSysctl(name, value):
                state["sysctls"] = state["sysctls"] | {name: value}
            case actions.AttachLink():
                state["link"] = 7
            case actions.AddRule(rule):
                state["rules"] |= {rule}
            case actions.DeleteRule(rule):
                state["rules"] -= {rule}
            case actions.AddRoute(route):
                state["routes"] |= {route}
            case actions.DeleteRoute(route):
                state["routes"] -= {route}
            case actions.AddClsact(device):
                state["clsact"] |= {device.index}
            case actions.AddFilter(device, direction):
                program = state["programs"][direction]
                state["filters"] |= {
                    actions.Filter(device.index, direction, 1, 1, "nodeagent", program)
                }
            case actions.DeleteFilter(item):
                state["filters"] -= {item}
    return plan.Found(**state)


HEALTHY = after(BARE)


def kinds(found: plan.Found, wanted: plan.Wanted = WANTED) -> list[str]:
    return [type(action).__name__ for action in plan.plan(wanted, found)]


def change(found: plan.Found, **values: Any) -> plan.Found:  # noqa: ANN401 - its fields
    return msgspec.structs.replace(found, **values)


def test_a_healthy_pod_needs_nothing() -> None:
    assert plan.plan(WANTED, HEALTHY) == []


def test_the_diverting_rules_and_then_the_guard_come_last() -> None:
    found = change(BARE, connected=True)
    order = plan.plan(WANTED, found)
    names = [type(action).__name__ for action in order]
    diverting = [
        i for i, a in enumerate(order) if isinstance(a, actions.AddRule) and a.rule.diverts
    ]
    others = [
        i for i, a in enumerate(order) if isinstance(a, actions.AddRule) and not a.rule.diverts
    ]
    assert max(others) < names.index("MarkOlder") < min(diverting)
    assert max(diverting) < names.index("AddClsact")
    assert names.index("AttachLink") < min(others)
    assert names.index("WriteSettings") < names.index("AddFilter")
    assert names[:2] == ["OpenListener", "FillSlot"]


def test_older_connections_are_marked_only_on_the_first_enrolment() -> None:
    assert "MarkOlder" not in kinds(BARE)
    assert "MarkOlder" in kinds(change(BARE, connected=True))
    deleted = change(HEALTHY, rules=frozenset(), connected=True)
    assert "MarkOlder" not in kinds(deleted)


def test_a_family_without_an_address_is_left_alone() -> None:
    only = Interfaces((ETH0,), (Address(2, "10.0.0.1"),))
    wanted = plan.Wanted(("10.0.0.1",), b"settings", (11, 12, 13))
    order = plan.plan(wanted, change(BARE, interfaces=only))
    rules = [action.rule for action in order if isinstance(action, actions.AddRule)]
    assert {rule.family for rule in rules} == {V4}
    assert plan.plan(wanted, after(change(BARE, interfaces=only), wanted)) == []


def test_ipv6_that_is_switched_off_is_left_alone() -> None:
    order = plan.plan(WANTED, change(BARE, families=frozenset({V4})))
    assert all(
        action.route.family == V4 for action in order if isinstance(action, actions.AddRoute)
    )


@pytest.mark.parametrize(
    "values, expected",
    [
        ({"listening": (True, False, True)}, ["OpenListener", "FillSlot"]),
        ({"slots": (11, 0, 13)}, ["FillSlot"]),
        ({"slots": (11, 99, 13)}, ["FillSlot"]),
        ({"settings": b"others"}, ["WriteSettings"]),
        ({"sysctls": HEALTHY.sysctls | {"ipv4/tcp_fwmark_accept": "0"}}, ["SetSysctl"]),
        ({"link": 0}, ["AttachLink"]),
        ({"link": 6}, ["AttachLink"]),
        ({"routes": frozenset()}, ["AddRoute", "AddRoute"]),
        ({"rules": HEALTHY.rules | {actions.Rule(V4, 100, 1, 254)}}, ["DeleteRule"]),
        (
            {"routes": HEALTHY.routes | {actions.Route(V4, "", 2, "192.0.2.0/24", 1)}},
            ["DeleteRoute"],
        ),
        ({"clsact": frozenset(), "filters": frozenset()}, ["AddClsact", "AddFilter", "AddFilter"]),
        ({"programs": {"egress": 80, "ingress": 90}}, ["AddFilter", "AddFilter"]),
    ],
)
def test_each_deviation_has_its_remedy(values: dict[str, Any], expected: list[str]) -> None:
    assert kinds(change(HEALTHY, **values)) == expected


def test_every_remedy_has_a_token() -> None:
    for action in plan.plan(WANTED, change(BARE, connected=True)):
        assert actions.KINDS[type(action)]
        assert str(action)


def test_slots_held_by_a_tunnel_that_we_do_not_know_are_left_alone() -> None:
    found = change(HEALTHY, listening=(None,) * SLOTS, slots=(1, 2, 3))
    assert kinds(found, plan.Wanted(WANTED.addresses, b"settings", (0, 0, 0))) == []


def test_rules_of_others_that_come_first_are_named_and_left() -> None:
    rule = actions.Rule(V4, 50, 1, 254)
    found = change(HEALTHY, rules=HEALTHY.rules | {rule})
    assert plan.plan(WANTED, found) == []
    assert plan.foreign_rules(found) == [rule]


def test_nothing_of_ours_is_a_conflict() -> None:
    assert plan.conflicts(HEALTHY) == []


@pytest.mark.parametrize(
    "values",
    [
        {"rules": frozenset({actions.Rule(V4, 101, 1, 254)})},
        {"rules": frozenset({actions.Rule(V6, 9000, 1, 100)})},
        {"routes": frozenset({actions.Route(V4, "", 2, "192.0.2.0/24", 1)})},
        {"filters": frozenset({actions.Filter(2, "egress", 1, 1, "cilium", 5)})},
    ],
)
def test_what_others_have_in_our_place_is_a_conflict(values: dict[str, Any]) -> None:
    assert len(plan.conflicts(change(BARE, **values))) == 1


def test_removal_takes_the_guard_first_and_restores_sysctls() -> None:
    order = plan.removal(HEALTHY, SYSCTLS, frozenset())
    names = [type(action).__name__ for action in order]
    assert names[:4] == ["DeleteFilter", "DeleteFilter", "DeleteClsact", "DeleteRule"]
    first = next(action for action in order if isinstance(action, actions.DeleteRule))
    assert first.rule.diverts
    restored = {a.name: a.value for a in order if isinstance(a, actions.SetSysctl)}
    assert restored == {k: v for k, v in SYSCTLS.items() if v != HEALTHY.sysctls[k]}


def test_removal_leaves_what_others_changed_or_own() -> None:
    theirs = actions.Filter(2, "egress", 5, 1, "cilium", 5)
    found = change(
        HEALTHY,
        sysctls=HEALTHY.sysctls | {"ipv4/conf/eth0/rp_filter": "2"},
        filters=HEALTHY.filters | {theirs},
    )
    order = plan.removal(found, SYSCTLS, frozenset())
    assert actions.DeleteClsact(2) not in order
    assert actions.DeleteFilter(theirs) not in order
    assert "ipv4/conf/eth0/rp_filter" not in {
        a.name for a in order if isinstance(a, actions.SetSysctl)
    }
    kept = plan.removal(HEALTHY, SYSCTLS, frozenset({"eth0"}))
    assert actions.DeleteClsact(2) not in kept


def test_removal_of_a_bare_namespace_is_nothing() -> None:
    assert plan.removal(BARE, SYSCTLS, frozenset()) == []


def test_undoing_a_plan_backwards_restores_the_kernel() -> None:
    for action in plan.plan(WANTED, BARE):
        undo = actions.inverse(action)
        if isinstance(action, actions.AddRule):
            assert undo == actions.DeleteRule(action.rule)
        if isinstance(action, actions.SetSysctl):
            assert undo == actions.SetSysctl(action.name, action.before, action.value)
        if undo is not None and actions.inverse(undo) is not None:
            assert actions.inverse(undo) == action
