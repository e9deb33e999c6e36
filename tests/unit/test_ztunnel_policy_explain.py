"""The trace of a decision: it is the decision's own, and says of every rule what is true of it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from random import Random

from support import random_policy
from support.mesh_state import ip
from support.naive_policy import Call, holds, lacking, selects
from ztunnel.policy import DEFAULT_DENY, NOWHERE, Facts, Scopes, check, decide, facts, updated
from ztunnel.policy.explain import Miss, Part, Trace, trace
from ztunnel.protocol import Action, Attribute, Authorization, Condition, Rule
from ztunnel.spiffe import SpiffeId

CASES = int(os.environ.get("POLICY_CASES", "2400"))
"""Connections that are decided and explained, about a millisecond each."""

CALLS = 30
"""Connections for one set of policies."""


def compiled(policies: Iterable[Authorization]) -> Scopes:
    held = {policy.uid: policy for policy in policies}
    for policy in held.values():
        check(policy)
    return updated(NOWHERE, {}, held, None)


def shown(call: Call) -> Facts:
    identity = SpiffeId.parse(f"spiffe://{call.principal}") if call.principal else None
    return facts(identity, ip(call.source), ip(call.destination), call.port)


def test_the_trace_is_always_that_of_the_decision() -> None:
    kinds = set()
    for number in range(max(1, CASES // CALLS)):
        random = Random(f"explain/{number}")  # noqa: S311 - a test's cases, the same each time
        policies = [random_policy.policy(random, f"p{each:02}") for each in range(10)]
        scopes = compiled(policies)
        for _ in range(CALLS):
            call = random_policy.call(random)
            seen = shown(call)
            groups = scopes.of(call.workload)
            found = trace(groups, seen)
            assert found.decision == decide(groups, seen)
            assert list(found.policies) == sorted(
                (policy for policy in policies if selects(policy, call)), key=lambda each: each.uid
            )
            kinds.add(said_by_its_rules(found))
            true_of_every_rule(found, call)
    assert kinds == {"DENY", "ALLOW", "default deny", ""}


def said_by_its_rules(found: Trace) -> str:
    """Check that the rules say what the decision does; return what decided."""
    enforced = [each for each in found.rules if not each.policy.dry_run and each.matches]
    denies = [each for each in enforced if each.policy.action is Action.DENY]
    allows = [each for each in enforced if each.policy.action is Action.ALLOW]
    first = min(denies or allows, key=lambda each: (each.policy.uid, each.number), default=None)
    decided = [each for each in found.rules if each.decided]
    assert decided == ([first] if first is not None else [])
    if first is not None:
        assert found.decision.allow is (first.policy.action is Action.ALLOW)
        assert found.decision.origin == first.rule.origin
        return first.policy.action.value
    closing = [
        policy for policy in found.policies if policy.action is Action.ALLOW and not policy.dry_run
    ]
    assert found.decision.allow is not bool(closing)
    if not closing:
        return ""
    assert found.decision.origin.startswith(DEFAULT_DENY)
    return "default deny"


def true_of_every_rule(found: Trace, call: Call) -> None:
    rules = [rule for policy in found.policies for rule in policy.rules]
    assert sorted(each.rule.origin for each in found.rules) == sorted(each.origin for each in rules)
    for each in found.rules:
        assert len(each.misses) == lacking(each.rule, call)
        for miss in each.misses:
            if miss.wanted:
                assert not holds(Condition(miss.attribute, miss.wanted), call)
            for value in miss.excluded:
                assert holds(Condition(miss.attribute, (value,)), call)
            assert miss.wanted or miss.excluded
    distances = [len(each.misses) for each in found.rules]
    assert distances == sorted(distances)


A, B = "td/ns/shop/sa/a", "td/ns/shop/sa/b"
CALL = Call(A, "10.0.0.1", "10.2.0.1", 80)


def rule_trace(rule: Rule, call: Call = CALL, action: Action = Action.ALLOW) -> tuple[Miss, ...]:
    policy = Authorization("AuthorizationPolicy/shop/p", action, (rule,), "shop/p", "shop")
    (found,) = trace(compiled([policy]).of("shop/pay"), shown(call)).rules
    return found.misses


def test_a_miss_says_what_was_wanted_and_what_was_seen() -> None:
    rule = Rule(
        "o",
        sources=((Condition(Attribute.PRINCIPAL, (B,)),),),
        operations=((Condition(Attribute.DESTINATION_PORT, ("443", "8080")),),),
        conditions=(Condition(Attribute.SOURCE_IP, ("10.0.0.0/8",), ("10.0.0.1",)),),
    )
    assert rule_trace(rule) == (
        Miss(Part.SOURCE, Attribute.PRINCIPAL, A, (B,)),
        Miss(Part.OPERATION, Attribute.DESTINATION_PORT, "80", ("443", "8080")),
        Miss(Part.CONDITION, Attribute.SOURCE_IP, "10.0.0.1", (), ("10.0.0.1",)),
    )


def test_of_several_sources_the_nearest_is_told() -> None:
    far = (
        Condition(Attribute.NAMESPACE, ("prod",)),
        Condition(Attribute.SOURCE_IP, ("192.0.2.0/24",)),
    )
    near = (
        Condition(Attribute.NAMESPACE, ("shop",)),
        Condition(Attribute.SERVICE_ACCOUNT, ("shop/till",)),
    )
    found = rule_trace(Rule("o", sources=(far, near)))
    assert found == (Miss(Part.SOURCE, Attribute.SERVICE_ACCOUNT, "shop/a", ("shop/till",)),)


def test_alternatives_that_want_one_attribute_are_told_together() -> None:
    sources = tuple((Condition(Attribute.PRINCIPAL, (f"td/{name}",)),) for name in "xyz")
    found = rule_trace(Rule("o", sources=sources))
    assert found == (Miss(Part.SOURCE, Attribute.PRINCIPAL, A, ("td/x", "td/y", "td/z")),)


def test_without_identity_nothing_was_seen() -> None:
    rule = Rule("o", sources=((Condition(Attribute.PRINCIPAL, ("*",)),),))
    found = rule_trace(rule, CALL._replace(principal=""))
    assert found == (Miss(Part.SOURCE, Attribute.PRINCIPAL, "", ("*",)),)


def test_a_rule_that_matches_lacks_nothing() -> None:
    rule = Rule("o", sources=((Condition(Attribute.PRINCIPAL, (A,)),),))
    assert rule_trace(rule, action=Action.DENY) == ()
