"""The decision, with everything that was looked at: for people who ask why, and never for traffic.

This module owns the trace of a decision: each policy that counts, and each of its rules with the
conditions that did not hold. It promises that the verdict is `decide`'s own, that a rule is said to
match exactly if all of it holds by the conditions that the index is made of, and the same order for
the same policies. It is pure, and costs as much as there are rules: nothing on the way of a
connection may call it.

How near a rule was is the number of conditions that would have to hold for it to match: those that
fail in the source that has the fewest of them, in such an operation, and in `when`. 0 is a match.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence

import msgspec

from ztunnel import address
from ztunnel.policy.conditions import Facts, read
from ztunnel.policy.decide import Decision, decide
from ztunnel.policy.scopes import Group
from ztunnel.protocol import Attribute, Authorization, Condition, Rule

__all__ = ["Considered", "Miss", "Part", "Trace", "trace"]


class Part(enum.StrEnum):
    """Where in a rule a condition stands."""

    SOURCE = "from"
    OPERATION = "to"
    CONDITION = "when"


class Miss(msgspec.Struct, frozen=True):
    """A condition that does not hold for what was `seen`, which is empty for "has none".

    Either none of `wanted` matches, or those of `excluded` do, or both. Of several alternatives
    that want one thing only, and of one attribute, all that is wanted is together in one.
    """

    part: Part
    attribute: Attribute
    seen: str
    wanted: tuple[str, ...] = ()
    excluded: tuple[str, ...] = ()


class Considered(msgspec.Struct, frozen=True):
    """A rule that counts. `number` is its place among the rules that its policy has here."""

    policy: Authorization
    number: int
    rule: Rule
    misses: tuple[Miss, ...]
    decided: bool = False
    """Whether the verdict is this rule's."""

    @property
    def matches(self) -> bool:
        return not self.misses


class Trace(msgspec.Struct, frozen=True):
    """`policies` are all that count, by uid. `rules` are all of theirs, the nearest first."""

    decision: Decision
    policies: tuple[Authorization, ...]
    rules: tuple[Considered, ...]


def trace(groups: Sequence[Group], seen: Facts) -> Trace:
    """Return how `decide(groups, seen)` comes about."""
    decision = decide(groups, seen)
    policies = sorted(
        (
            policy
            for group in groups
            for index in group.indexes.values()
            for policy in index.policies.values()
        ),
        key=lambda policy: policy.uid,
    )
    rules = [
        _considered(policy, number, rule, decision, seen)
        for policy in policies
        for number, rule in enumerate(policy.rules)
    ]
    rules.sort(key=lambda each: (len(each.misses), each.policy.uid, each.number))
    return Trace(decision, tuple(policies), tuple(rules))


def _considered(
    policy: Authorization, number: int, rule: Rule, decision: Decision, seen: Facts
) -> Considered:
    misses = (
        *_nearest(Part.SOURCE, rule.sources, seen),
        *_nearest(Part.OPERATION, rule.operations, seen),
        *_misses(Part.CONDITION, rule.conditions, seen),
    )
    # An origin has the rule's number and its file: no two rules share one.
    decided = not policy.dry_run and rule.origin == decision.origin
    return Considered(policy, number, rule, misses, decided)


def _nearest(
    part: Part, alternatives: Sequence[Sequence[Condition]], seen: Facts
) -> tuple[Miss, ...]:
    """Return what fails in the alternative in which the fewest conditions do."""
    found = [_misses(part, conditions, seen) for conditions in alternatives]
    best = min(found, key=len, default=())
    if len(best) != 1 or best[0].excluded:
        return best
    first = best[0]
    alike = [
        miss
        for misses in found
        for miss in misses
        if len(misses) == 1 and miss.attribute is first.attribute and not miss.excluded
    ]
    wanted = dict.fromkeys(value for miss in alike for value in miss.wanted)
    return (msgspec.structs.replace(first, wanted=tuple(wanted)),)


def _misses(part: Part, conditions: Sequence[Condition], seen: Facts) -> tuple[Miss, ...]:
    return tuple(
        _miss(part, condition, seen)
        for condition in conditions
        if not read((condition,)).holds(seen)
    )


def _miss(part: Part, condition: Condition, seen: Facts) -> Miss:
    attribute = condition.attribute
    wanted = condition.values
    if wanted and read((Condition(attribute, wanted),)).holds(seen):
        wanted = ()
    excluded = tuple(
        value
        for value in condition.not_values
        if read((Condition(attribute, (value,)),)).holds(seen)
    )
    return Miss(part, attribute, _shown(attribute, seen), wanted, excluded)


def _shown(attribute: Attribute, seen: Facts) -> str:
    """Return a fact as conditions are written."""
    match attribute:
        case Attribute.PRINCIPAL:
            return seen.principal
        case Attribute.NAMESPACE:
            return seen.namespace
        case Attribute.SERVICE_ACCOUNT:
            return seen.service_account
        case Attribute.SOURCE_IP:
            return address.text(seen.source.to_bytes(16))
        case Attribute.DESTINATION_IP:
            return address.text(seen.destination.to_bytes(16))
        case Attribute.DESTINATION_PORT:
            return str(seen.port)
