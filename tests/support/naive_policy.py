"""AuthorizationPolicy by the book: every rule of every policy, in the plainest words.

Owns a second opinion for tests of ztunnel's compiled form. It shares no code with it, but the
seam's types: patterns by string methods, addresses by `ipaddress`.
"""

from __future__ import annotations

import functools
import ipaddress
from collections.abc import Iterable
from typing import NamedTuple

from ztunnel.protocol import Action, Attribute, Authorization, Condition, Rule


class Call(NamedTuple):
    """A connection. `principal` is without spiffe://, empty for plaintext; addresses are text."""

    principal: str
    source: str
    destination: str
    port: int
    workload: str = "shop/pay"


class Opinion(NamedTuple):
    """`rules` are the origins of all rules of the deciding action that match, first first."""

    allow: bool
    rules: tuple[str, ...]
    audits: tuple[str, ...]


def judge(policies: Iterable[Authorization], call: Call, *, dry_run: bool = False) -> Opinion:
    """Return the opinion on `call`; with `dry_run` as if those policies were enforced too."""
    counting = sorted(
        (
            policy
            for policy in policies
            if selects(policy, call) and (dry_run or not policy.dry_run)
        ),
        key=lambda policy: policy.uid,
    )

    def matching(action: Action) -> tuple[str, ...]:
        return tuple(
            rule.origin
            for policy in counting
            if policy.action is action
            for rule in policy.rules
            if _matches(rule, call)
        )

    audits = matching(Action.AUDIT)
    denied = matching(Action.DENY)
    if denied:
        return Opinion(False, denied, audits)
    allowed = matching(Action.ALLOW)
    if allowed:
        return Opinion(True, allowed, audits)
    closed = any(policy.action is Action.ALLOW for policy in counting)
    return Opinion(not closed, (), audits)


def lacking(rule: Rule, call: Call) -> int:
    """Return how many conditions would have to hold, at least, for `rule` to match."""

    def fewest(alternatives: tuple[tuple[Condition, ...], ...]) -> int:
        return min((failing(conditions) for conditions in alternatives), default=0)

    def failing(conditions: tuple[Condition, ...]) -> int:
        return sum(not holds(condition, call) for condition in conditions)

    return fewest(rule.sources) + fewest(rule.operations) + failing(rule.conditions)


def selects(policy: Authorization, call: Call) -> bool:
    if policy.workloads is not None:
        return call.workload in policy.workloads
    return policy.namespace in ("", call.workload.split("/")[0])


def _matches(rule: Rule, call: Call) -> bool:
    def one_of(alternatives: tuple[tuple[Condition, ...], ...]) -> bool:
        return not alternatives or any(
            all(holds(condition, call) for condition in conditions) for conditions in alternatives
        )

    return (
        one_of(rule.sources)
        and one_of(rule.operations)
        and all(holds(condition, call) for condition in rule.conditions)
    )


def holds(condition: Condition, call: Call) -> bool:
    def fits(pattern: str) -> bool:
        return _fits(condition.attribute, pattern, call)

    wanted = not condition.values or any(map(fits, condition.values))
    return wanted and not any(map(fits, condition.not_values))


def _fits(attribute: Attribute, pattern: str, call: Call) -> bool:
    match attribute:
        case Attribute.SOURCE_IP:
            return _within(pattern, call.source)
        case Attribute.DESTINATION_IP:
            return _within(pattern, call.destination)
        case Attribute.DESTINATION_PORT:
            return pattern == str(call.port)
    value = call.principal
    if attribute is not Attribute.PRINCIPAL:
        parts = call.principal.split("/")
        kubernetes = len(parts) == 5 and parts[1] == "ns" and parts[3] == "sa"
        namespace, account = (parts[2], f"{parts[2]}/{parts[4]}") if kubernetes else ("", "")
        value = namespace if attribute is Attribute.NAMESPACE else account
    if not value:
        return False
    if pattern == "*":
        return True
    if pattern.endswith("*"):
        return value.startswith(pattern.rstrip("*"))
    if pattern.startswith("*"):
        return value.endswith(pattern.lstrip("*"))
    return value == pattern


@functools.cache
def _within(pattern: str, text: str) -> bool:
    network = ipaddress.ip_network(pattern, strict=False)
    return ipaddress.ip_address(text) in network
