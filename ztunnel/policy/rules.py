"""An AuthorizationPolicy of the seam as what is decided by: its rules in cases, tested as one.

This module owns the reading of a policy's rules. It promises that the cases of a rule match
together exactly what the rule says, and that a policy of which any part cannot be read is refused
whole. It is pure, and may not know of other policies.

A rule's sources become cases of their own, so that each can be found by what it asks for. Those
that ask for nothing but values of one attribute become one case, as they are mostly written:
`from: [{source: {principals: [a]}}, {source: {principals: [b]}}]`.
"""

from __future__ import annotations

from typing import Final

import msgspec

from ztunnel.policy.conditions import Facts, Test, read
from ztunnel.protocol import Attribute, Authorization, Condition, Rule

__all__ = ["MAX_ORIGIN", "Case", "cases", "check"]

MAX_ORIGIN: Final = 8192
"""Characters of an origin, which lines of the access log repeat: a file's path (PATH_MAX is 4096),
and names of Kubernetes (253) beside it."""


class Case(msgspec.Struct, frozen=True, cache_hash=True, gc=False):
    """Matches when all of `tests` hold, and all tests of one of `operations` (if there are any)."""

    tests: tuple[Test, ...]
    operations: tuple[tuple[Test, ...], ...]

    def holds(self, seen: Facts) -> bool:
        for test in self.tests:
            if not test.holds(seen):
                return False
        return not self.operations or any(
            all(test.holds(seen) for test in tests) for tests in self.operations
        )


def cases(rule: Rule) -> tuple[Case, ...]:
    """Return the cases of `rule`: it matches when one of them does. Raises ValueError."""
    always = tuple(read((condition,)) for condition in rule.conditions)
    operations = _alternatives(rule.operations, "operation")
    if len(operations) == 1:
        always += operations[0]
        operations = ()
    sources = _alternatives(rule.sources, "source") or ((),)
    return tuple(dict.fromkeys(Case(tests + always, operations) for tests in sources))


def _alternatives(
    written: tuple[tuple[Condition, ...], ...], kind: str
) -> tuple[tuple[Test, ...], ...]:
    """Return one tuple of tests for each alternative; those of one attribute are joined."""
    joined: dict[Attribute, list[Condition]] = {}
    found: list[tuple[Test, ...]] = []
    for conditions in written:
        if not conditions:
            # Not "anything": that is written without alternatives. An emptied list must not open.
            raise ValueError(f"a {kind} without conditions")
        if len(conditions) == 1 and not conditions[0].not_values:
            joined.setdefault(conditions[0].attribute, []).append(conditions[0])
        else:
            found.append(tuple(read((condition,)) for condition in conditions))
    found += [(read(together),) for together in joined.values()]
    return tuple(found)


def check(policy: Authorization) -> None:
    """Raise ValueError if `policy` cannot be decided by."""
    for origin in (policy.origin, *(rule.origin for rule in policy.rules)):
        if len(origin) > MAX_ORIGIN:
            raise ValueError(f"an origin of {len(origin)} characters exceeds {MAX_ORIGIN}")
    for rule in policy.rules:
        try:
            cases(rule)
        except ValueError as error:
            raise ValueError(f"{rule.origin}: {error}") from None
    if "/" in policy.namespace:
        raise ValueError("its namespace is none")
    for uid in policy.workloads or ():
        namespace, _, name = uid.partition("/")
        if not name or policy.namespace not in ("", namespace):
            # Nobody writes policy for another namespace, but in the mesh's own.
            raise ValueError(f"it selects {uid[:80]!a}, which is no workload of its namespace")
