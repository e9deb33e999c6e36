"""What the index and the scopes promise beyond the verdict: order, sharing, and little work."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec
import pytest

from support.mesh_state import authorization, ip, ports, principals, source
from ztunnel.policy import NOWHERE, Decision, Facts, Scopes, decide, facts, updated
from ztunnel.policy.rules import Case
from ztunnel.protocol import Action, Attribute, Authorization, Condition, Rule
from ztunnel.spiffe import SpiffeId

CALLER = "cluster.local/ns/shop/sa/till"


def seen(principal: str = CALLER, port: int = 8080) -> Facts:
    identity = SpiffeId.parse(f"spiffe://{principal}") if principal else None
    return facts(identity, ip("10.1.0.1"), ip("10.2.0.1"), port)


class Held:
    """Policies that change, and their scopes."""

    def __init__(self, *policies: Authorization) -> None:
        self.policies: dict[str, Authorization] = {}
        self.scopes: Scopes = NOWHERE
        self.put(*policies)

    def put(self, *policies: Authorization) -> None:
        self._become({**self.policies, **{policy.uid: policy for policy in policies}})

    def drop(self, *policies: Authorization) -> None:
        gone = {policy.uid for policy in policies}
        self._become({uid: each for uid, each in self.policies.items() if uid not in gone})

    def _become(self, after: dict[str, Authorization]) -> None:
        touched = self.policies.keys() | after.keys()
        self.scopes = updated(self.scopes, self.policies, after, touched)
        self.policies = after

    def decide(self, what: Facts | None = None, workload: str = "shop/pay") -> Decision:
        return decide(self.scopes.of(workload), what or seen())


def other_than(namespace: str) -> Condition:
    return Condition(Attribute.NAMESPACE, (), (namespace,))


def test_a_rule_that_comes_first_later_is_named_first() -> None:
    held = Held(
        authorization("shop/k", Action.DENY, source(other_than("y"))),
        authorization("shop/m", Action.DENY, source(other_than("x"))),
    )
    assert held.decide().origin.startswith("shop/k rules[0]")
    # Equal to m's, so only the order of what is there already changes.
    further = authorization("shop/a", Action.DENY, source(other_than("x")))
    held.put(further)
    assert held.decide().origin.startswith("shop/a rules[0]")
    held.drop(further)
    assert held.decide().origin.startswith("shop/k rules[0]")


def test_the_first_of_a_policys_rules_is_named() -> None:
    held = Held(
        authorization(
            "shop/a", Action.DENY, source(ports(1)), source(principals(CALLER)), source(ports(8080))
        )
    )
    assert held.decide().origin == "shop/a rules[1] (policy.yaml:1)"


def test_a_default_deny_names_the_policies_that_caused_it() -> None:
    held = Held(authorization("shop/b", Action.ALLOW), authorization("istio-system/a"))
    decision = held.decide()
    assert not decision.allow
    assert decision.origin == (
        "default deny: no rule matches of istio-system/a (policy.yaml:1), shop/b (policy.yaml:1)"
    )
    held.put(*(authorization(f"shop/p{number:02}") for number in range(20)))
    assert held.decide().origin.endswith("shop/p05 (policy.yaml:1) and 14 more")


def test_an_audit_says_what_it_did_not_look_at() -> None:
    rule = source(principals("*"), unread=("to[0].operation.methods",))
    held = Held(authorization("shop/a", Action.AUDIT, rule))
    (match,) = held.decide().audits
    assert match.origin == "shop/a rules[0] (policy.yaml:1)"
    assert match.unread == ("to[0].operation.methods",)


def test_workloads_that_the_same_policies_select_share_one_index() -> None:
    both = ("shop/pay-1", "shop/pay-2")
    policies = [
        authorization(f"shop/p{number}", Action.DENY, source(ports(number + 1)), workloads=both)
        for number in range(3)
    ]
    held = Held(*policies)
    first, second = (held.scopes.of(uid) for uid in both)
    assert first[0] is second[0]
    # A further replica finds the same, and the others' is not made anew.
    more = (*both, "shop/pay-3")
    held.put(*(msgspec.structs.replace(policy, workloads=more) for policy in policies))
    assert {id(held.scopes.of(uid)[0]) for uid in more} == {id(first[0])}
    # One of them is told apart again when another policy selects it.
    held.put(authorization("shop/own", Action.DENY, source(), workloads=("shop/pay-2",)))
    assert held.scopes.of("shop/pay-1")[0] is first[0]
    assert held.decide(workload="shop/pay-1").allow
    assert not held.decide(workload="shop/pay-2").allow


def test_a_change_leaves_alone_what_it_does_not_touch() -> None:
    held = Held(
        authorization("istio-system/m", Action.DENY, source(ports(1))),
        authorization("shop/s", Action.DENY, source(ports(2))),
        authorization("prod/p", Action.DENY, source(ports(3))),
    )
    mesh, shop = held.scopes.of("shop/pay")
    _, prod = held.scopes.of("prod/pay")
    held.put(authorization("shop/s", Action.DENY, source(ports(4))))
    assert held.scopes.of("shop/pay")[0] is mesh
    assert held.scopes.of("shop/pay")[1] is not shop
    assert held.scopes.of("prod/pay") == (mesh, prod)
    assert held.scopes.of("prod/pay")[1] is prod


def looked_at(held: Held, what: Facts) -> int:
    """Return how many cases a decision on `what` holds against it."""
    count = 0
    plain = Case.holds

    def counted(case: Case, seen: Facts) -> bool:
        nonlocal count
        count += 1
        return plain(case, seen)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Case, "holds", counted)
        held.decide(what)
    return count


def many(rules: Iterable[Rule], action: Action = Action.ALLOW) -> Held:
    return Held(
        *(authorization(f"shop/p{number:04}", action, rule) for number, rule in enumerate(rules))
    )


MANY = 500
FEW = 4


def test_of_many_rules_only_those_that_may_match_are_looked_at() -> None:
    shop = Condition(Attribute.NAMESPACE, ("shop",))
    by_caller = (
        source(shop, principals(f"cluster.local/ns/shop/sa/a{number}")) for number in range(MANY)
    )
    by_address = (
        source(
            principals(CALLER),
            Condition(Attribute.SOURCE_IP, (f"10.{number // 250}.{number % 250}.0/24",)),
        )
        for number in range(MANY)
    )
    by_prefix = (source(principals(f"cluster.local/ns/n{number:03}/*")) for number in range(MANY))
    by_suffix = (source(principals(f"*/sa/a{number:03}")) for number in range(MANY))
    copies = (source(shop, ports(9999)) for _ in range(MANY))
    excluding = (
        source(other_than("shop"), principals("*"), ports(number + 1)) for number in range(MANY)
    )
    for rules in (by_caller, by_address, by_prefix, by_suffix, copies, excluding):
        held = many(rules)
        assert looked_at(held, seen()) <= FEW
    assert looked_at(many(source(other_than("x")) for _ in range(MANY)), seen()) <= FEW


def test_of_many_that_match_the_first_ends_the_search() -> None:
    held = many((source(other_than(f"n{number}")) for number in range(MANY)), Action.DENY)
    assert looked_at(held, seen()) <= FEW
    assert held.decide().origin.startswith("shop/p0000 ")


def test_many_sources_of_one_rule_are_one_look_up() -> None:
    alternatives = tuple(
        (principals(f"cluster.local/ns/shop/sa/a{number}"),) for number in range(MANY)
    )
    held = Held(authorization("shop/a", Action.ALLOW, Rule("", sources=alternatives)))
    assert looked_at(held, seen()) == 0
    assert looked_at(held, seen("cluster.local/ns/shop/sa/a7")) == 1
