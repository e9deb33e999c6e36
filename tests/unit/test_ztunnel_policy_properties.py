"""The compiled policies against a second opinion, and what must hold of any set of them.

`POLICY_CASES=1000000` decides as many connections; without it as many as a few seconds allow.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Iterable, Mapping
from random import Random

import msgspec
import pytest

from support import random_policy
from support.mesh_state import ip
from support.naive_policy import Call, Opinion, judge
from ztunnel.policy import (
    DEFAULT_DENY,
    MAX_AUDITS,
    NOWHERE,
    Decision,
    Facts,
    Scopes,
    check,
    decide,
    facts,
    updated,
)
from ztunnel.protocol import Action, Authorization
from ztunnel.spiffe import SpiffeId

CASES = int(os.environ.get("POLICY_CASES", "12000"))
"""Connections that each test decides, about 100 microseconds each."""

CALLS = 60
"""Connections decided by one set of policies."""

Policies = Mapping[str, Authorization]


CHANGED_SETS = max(1, CASES // CALLS // 4)
"""Sets of policies that are changed ten times, with everything compiled anew to compare."""


def compiled(policies: Iterable[Authorization]) -> Scopes:
    held = {policy.uid: policy for policy in policies}
    for policy in held.values():
        check(policy)
    return updated(NOWHERE, {}, held, None)


@functools.cache
def shown(call: Call) -> Facts:
    """Return what a connection shows; the world is small, so that most have come before."""
    identity = SpiffeId.parse(f"spiffe://{call.principal}") if call.principal else None
    return facts(identity, ip(call.source), ip(call.destination), call.port)


def decided(scopes: Scopes, call: Call) -> Decision:
    return decide(scopes.of(call.workload), shown(call))


def some(random: Random, most: int = 10) -> list[Authorization]:
    return [
        random_policy.policy(random, f"p{number:02}") for number in range(random.randint(0, most))
    ]


def agrees(decision: Decision, opinion: Opinion, enforced: Opinion) -> None:
    assert decision.allow is enforced.allow
    if enforced.rules:
        assert decision.origin == enforced.rules[0]
    elif enforced.allow:
        assert not decision.origin
    else:
        assert decision.origin.startswith(DEFAULT_DENY)
    assert tuple(match.origin for match in decision.audits) == enforced.audits[:MAX_AUDITS]
    if decision.dry_run is not None:
        assert decision.dry_run.allow is opinion.allow
        if opinion.rules:
            assert decision.dry_run.origin == opinion.rules[0]
    else:
        assert opinion == enforced


def sets(seed: int) -> Iterable[Random]:
    """Give a source of randomness for each set of policies that a test may decide by."""
    for number in range(-(-CASES // CALLS)):
        yield Random(f"{seed}/{number}")  # noqa: S311 - a test's cases, the same each time


def test_the_index_agrees_with_the_book() -> None:
    verdicts = set()
    for random in sets(1):
        policies = some(random)
        scopes = compiled(policies)
        for _ in range(CALLS):
            call = random_policy.call(random)
            decision = decided(scopes, call)
            agrees(decision, judge(policies, call, dry_run=True), judge(policies, call))
            verdicts.add((decision.allow, bool(decision.origin), bool(decision.audits)))
    # All that there is has been seen: no policy's say only ever allows.
    assert len(verdicts) == 6


def test_it_agrees_after_every_change_and_ends_empty() -> None:
    for random in itertools.islice(sets(2), CHANGED_SETS):
        held: dict[str, Authorization] = {}
        scopes = NOWHERE
        for step in range(10):
            after = dict(held)
            for _ in range(random.randint(1, 4)):
                fresh = random_policy.policy(random, f"p{random.randrange(8)}")
                if random.randrange(3):
                    after[fresh.uid] = fresh
                else:
                    after.pop(fresh.uid, None)
            touched = None if random.randrange(2) else held.keys() | after.keys()
            before, kept = scopes, dict(scopes.groups)
            scopes = updated(scopes, held, after, touched)
            assert dict(before.groups) == kept
            held = after
            for _ in range(CALLS // 10):
                call = random_policy.call(random)
                decision = decided(scopes, call)
                assert decision == decided(compiled(held.values()), call), step
                agrees(
                    decision, judge(held.values(), call, dry_run=True), judge(held.values(), call)
                )
        assert updated(scopes, held, {}, None).groups == {}


def test_a_further_deny_never_allows_more() -> None:
    for random in sets(3):
        policies = some(random)
        deny = random_policy.policy(random, "z", Action.DENY, dry_run=False)
        before, after = compiled(policies), compiled([*policies, deny])
        for _ in range(CALLS):
            call = random_policy.call(random)
            assert decided(before, call).allow or not decided(after, call).allow


def test_a_first_allow_never_allows_more() -> None:
    for random in sets(4):
        policies = [
            policy for policy in some(random) if policy.action is not Action.ALLOW or policy.dry_run
        ]
        allow = random_policy.policy(random, "z", Action.ALLOW, dry_run=False)
        before, after = compiled(policies), compiled([*policies, allow])
        for _ in range(CALLS):
            call = random_policy.call(random)
            assert decided(before, call).allow or not decided(after, call).allow


def test_the_order_of_documents_never_matters() -> None:
    for random in sets(5):
        policies = some(random)
        one = compiled(policies)
        random.shuffle(policies)
        other: Scopes = NOWHERE
        held: Policies = {}
        for policy in policies:
            after = {**held, policy.uid: policy}
            other = updated(other, held, after, (policy.uid,))
            held = after
        for _ in range(CALLS):
            call = random_policy.call(random)
            assert decided(one, call) == decided(other, call)


@pytest.mark.parametrize("action", Action)
def test_a_dry_run_never_changes_a_verdict(action: Action) -> None:
    for random in sets(6):
        policies = some(random)
        tried = random_policy.policy(random, "z", action, dry_run=True)
        enforced = msgspec.structs.replace(tried, dry_run=False)
        before, after = compiled(policies), compiled([*policies, tried])
        for _ in range(CALLS):
            call = random_policy.call(random)
            was, now = decided(before, call), decided(after, call)
            assert msgspec.structs.replace(now, dry_run=was.dry_run) == was
            if now.dry_run is not None:
                would = judge([*policies, enforced], call, dry_run=True)
                assert now.dry_run.allow is would.allow


def test_audit_never_changes_a_verdict() -> None:
    for random in sets(7):
        policies = some(random)
        audit = random_policy.policy(random, "z", Action.AUDIT, dry_run=False)
        before, after = compiled(policies), compiled([*policies, audit])
        for _ in range(CALLS):
            call = random_policy.call(random)
            was, now = decided(before, call), decided(after, call)
            assert (now.allow, now.origin) == (was.allow, was.origin)
