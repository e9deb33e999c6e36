"""What an AuthorizationPolicy or IdentitySet must keep to beyond the types of its fields.

This module owns Istio's webhook rules for them, what is said about each field that has no effect at
layer 4 or another than its author may expect, and the places that are kept for later. It promises
that nothing an author wrote is silently without effect. It may not compare documents.

What is layer 7 is dropped towards less access, whatever the action. An ALLOW rule with such a part
is dropped whole; of a DENY rule only that part is, so that a rule of nothing else denies everyone;
so it is with AUDIT, whose record names what was not evaluated.

Source: istio/istio pkg/config/validation (ValidateAuthorizationPolicy) and pkg/config/security
(ValidateAttribute); pilot, ambient/authorization.go for what a layer-4 agent is told.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

from nodeagent.api import patterns
from nodeagent.api._authorization import (
    CONDITION_KEYS,
    DRY_RUN,
    AuthorizationPolicySpec,
    AuthorizationRule,
    Condition,
    Operation,
    PolicyAction,
    Source,
    TargetReference,
    is_layer7_key,
    layer7,
    only_layer7,
)
from nodeagent.api._base import Mark
from nodeagent.api._errors import quote
from nodeagent.api._place import Place
from nodeagent.api._types import AuthorizationPolicy, IdentitySet

__all__ = [
    "EMPTY_SELECTOR",
    "check_authorization_policy",
    "check_identity_set",
    "past",
    "policy_marks",
    "set_marks",
]

Keys = tuple[str | int, ...]

EMPTY_SELECTOR: Final = (
    "is empty and would select every workload: name at least one label; to mean all, "
    "delete the whole selector"
)

_TARGETS: Final = frozenset(
    {
        ("gateway.networking.k8s.io", "Gateway"),
        ("gateway.networking.k8s.io", "GatewayClass"),
        ("networking.istio.io", "ServiceEntry"),
        ("", "Service"),
        ("core", "Service"),
    }
)

_REPLACED_KEYS: Final = {
    "destination.namespace": "is replaced by metadata.namespace",
    "destination.name": "is of v1alpha1: use a selector",
    "destination.user": "is of v1alpha1: use a selector",
}

_LAYER7: Final = {
    PolicyAction.ALLOW: (
        "is of layer 7, which is not read here: the whole rule is dropped, so that what it would "
        "allow is denied; delete the field to allow all that the rest of the rule says"
    ),
    PolicyAction.DENY: (
        "is of layer 7, which is not read here: the rule denies all that its rest says, "
        "more than is written"
    ),
    PolicyAction.AUDIT: (
        "is of layer 7, which is not read here: the rule marks all that its rest says, "
        "and the record names this field"
    ),
}
_NO_REST: Final = {
    PolicyAction.DENY: "; there is no rest, so it denies every connection in the policy's scope",
    PolicyAction.AUDIT: "; there is no rest, so it marks every connection in the policy's scope",
}

_IDENTITY_KEYS: Final = frozenset({"source.principal", "source.namespace", "source.serviceAccount"})

_PLAINTEXT: Final = (
    "also holds for callers without an identity (plaintext), which this rule therefore lets in: "
    'add principals: ["*"] to ask for one'
)


def check_authorization_policy(place: Place, document: AuthorizationPolicy) -> None:
    """Report what is wrong with a policy, and what of it has no effect."""
    spec = document.spec
    _scope(place, spec)
    _action(place, document)
    for index, rule in enumerate(spec.rules or ()):
        at: Keys = ("spec", "rules", index)
        for number, each in enumerate(rule.sources):
            _source(place, each.source, (*at, "from", number, "source"))
        for number, to in enumerate(rule.operations):
            keys: Keys = (*at, "to", number, "operation")
            if to.operation == type(to.operation)():
                place.error("is empty: give it a field, or delete the operation", *keys)
        for number, condition in enumerate(rule.when):
            _condition(place, condition, (*at, "when", number))
        if spec.action is not PolicyAction.CUSTOM:
            _effects(place, spec.action, rule, at)


def check_identity_set(place: Place, document: IdentitySet) -> None:
    """Report what is wrong with a set."""
    found = document.spec.identities
    for index, value in enumerate(found):
        if patterns.set_of(value) and patterns.qualified(value, _own(document)) == document.uid:
            place.error("refers to the set itself: remove it", "spec", "identities", index)
        elif patterns.looks_past(value):
            place.warn(past(value), "spec", "identities", index)
    _repeated(place, found, ("spec", "identities"))


def policy_marks(place: Place, document: AuthorizationPolicy) -> tuple[Mark, ...]:
    """Return the places of the rules, and those of references to sets."""
    marks: list[Mark] = []
    for index, rule in enumerate(document.spec.rules or ()):
        at: Keys = ("spec", "rules", index)
        marks.append(place.mark(*at))
        for keys, value in _principals(rule):
            if patterns.set_of(value):
                refers = patterns.qualified(value, _own(document))
                marks.append(place.mark(*at, *keys, refers=refers))
    return tuple(marks)


def set_marks(place: Place, document: IdentitySet) -> tuple[Mark, ...]:
    """Return the places of references to other sets."""
    return tuple(
        place.mark(
            "spec", "identities", index, refers=patterns.qualified(value, _own(document))
        )
        for index, value in enumerate(document.spec.identities)
        if patterns.set_of(value)
    )  # fmt: skip


def _own(document: AuthorizationPolicy | IdentitySet) -> str:
    return document.metadata.namespace


def _principals(rule: AuthorizationRule) -> Iterator[tuple[Keys, str]]:
    """Yield every place of a rule where a principal stands, and the principal."""
    for index, each in enumerate(rule.sources):
        for field, found in (
            ("principals", each.source.principals),
            ("notPrincipals", each.source.not_principals),
        ):
            for number, value in enumerate(found):
                yield ("from", index, "source", field, number), value
    for index, condition in enumerate(rule.when):
        if condition.key == "source.principal":
            for field, found in (
                ("values", condition.values),
                ("notValues", condition.not_values),
            ):
                for number, value in enumerate(found):
                    yield ("when", index, field, number), value


def _scope(place: Place, spec: AuthorizationPolicySpec) -> None:
    if spec.selector is not None and not spec.selector.match_labels:
        place.error(EMPTY_SELECTOR, "spec", "selector", "matchLabels")
    references: list[tuple[TargetReference, Keys]] = []
    if spec.target_ref is not None:
        references.append((spec.target_ref, ("spec", "targetRef")))
    references += [
        (each, ("spec", "targetRefs", index)) for index, each in enumerate(spec.target_refs)
    ]
    for reference, keys in references:
        if reference.namespace:
            place.error("must be left out: a target is of the policy's namespace",
                        *keys, "namespace")  # fmt: skip
        if (reference.group, reference.kind) not in _TARGETS:
            place.error("is no target; known: Gateway and GatewayClass of "
                        "gateway.networking.k8s.io, Service, ServiceEntry of networking.istio.io",
                        *keys, "kind")  # fmt: skip
    if sum((spec.selector is not None, spec.target_ref is not None, bool(spec.target_refs))) > 1:
        place.error("only one of selector, targetRef and targetRefs can stand here", "spec")
    elif references:
        place.warn(
            "the whole policy has no effect here: it is for a waypoint or gateway, and this agent "
            "protects workloads; to protect them, use a selector instead",
            *references[0][1],
        )


def _action(place: Place, document: AuthorizationPolicy) -> None:
    spec = document.spec
    dry_run = document.metadata.annotations.get(DRY_RUN)
    at = ("metadata", "annotations", DRY_RUN)
    if dry_run not in {None, "true", "false"}:
        place.error(f'{quote(dry_run or "")} has no meaning; write "true" or "false"', *at)
    match spec.action:
        case PolicyAction.CUSTOM:
            reason = (
                "CUSTOM asks an external authorizer about each request, which an agent at layer 4 "
                "cannot: enforce it at a waypoint or gateway, or write ALLOW and DENY rules"
            )
            place.error(reason, "spec", "action")
        case PolicyAction.DENY if not spec.rules:
            place.error("DENY without rules denies nothing: add rules; [{}] denies everything",
                        "spec", "rules")  # fmt: skip
        case PolicyAction.AUDIT if not spec.rules:
            place.warn("AUDIT without rules marks nothing: add rules; [{}] marks everything",
                       "spec", "rules")  # fmt: skip
    if spec.action is PolicyAction.AUDIT and dry_run == "true":
        place.warn("has no effect: AUDIT never changes a verdict", *at)
    if spec.provider is not None and spec.action is not PolicyAction.CUSTOM:
        place.error("can only stand beside action: CUSTOM", "spec", "provider")


def _source(place: Place, source: Source, at: Keys) -> None:
    if source == Source():
        place.error("is empty: give it a field, or delete the source", *at)
    named = source.principals or source.not_principals or source.namespaces or source.not_namespaces
    for field, given in (
        ("serviceAccounts", source.service_accounts),
        ("notServiceAccounts", source.not_service_accounts),
    ):
        if given and named:
            reason = "cannot stand beside principals or namespaces: write principals instead"
            place.error(reason, *at, field)


def _condition(place: Place, condition: Condition, at: Keys) -> None:
    key = condition.key
    if not condition.values and not condition.not_values:
        # A list that was given and is empty has its own error.
        place.error("needs values or notValues", *at)
    check = CONDITION_KEYS.get(key)
    if check is None:
        if key in _REPLACED_KEYS:
            place.error(f"{key} {_REPLACED_KEYS[key]}", *at, "key")
        elif key.startswith("destination.labels"):
            place.error("destination.labels is replaced by the selector", *at, "key")
        elif not is_layer7_key(key):
            known = ", ".join(sorted(CONDITION_KEYS))
            place.error(f"{quote(key)} is no attribute; known: {known}", *at, "key")
        return
    for field, found in (("values", condition.values), ("notValues", condition.not_values)):
        for index, value in enumerate(found):
            try:
                check(value)
            except ValueError as error:
                place.error(str(error), *at, field, index)


def _effects(place: Place, action: PolicyAction, rule: AuthorizationRule, at: Keys) -> None:
    """Warn of what a rule does that its author may not expect."""
    unread = list(layer7(rule))
    rest = "" if _has_rest(rule) else _NO_REST.get(action, "")
    for keys, name in unread:
        place.warn(f"{name} {_LAYER7[action]}{rest}", *at, *keys)
    if unread and action is PolicyAction.ALLOW:
        return
    denies = action is PolicyAction.DENY
    for number, each in enumerate(rule.sources):
        keys = (*at, "from", number, "source")
        source = each.source
        opening = {"principals": source.principals, "namespaces": source.namespaces}
        if denies:
            opening = {
                "notPrincipals": source.not_principals,
                "notNamespaces": source.not_namespaces,
            }
        for field, found in opening.items():
            _past(place, action, found, (*keys, field))
        _plaintext(place, action, rule, source, keys)
    for number, condition in enumerate(rule.when):
        if condition.key in {"source.principal", "source.namespace"}:
            field, found = (
                ("notValues", condition.not_values) if denies else ("values", condition.values)
            )
            _past(place, action, found, (*at, "when", number, field))
    _plaintext_when(place, action, rule, at)


def _has_rest(rule: AuthorizationRule) -> bool:
    """Return whether anything of a rule is left without its layer-7 fields."""
    # Each alternative needs a field of its own: one that lost all of them matches anyone.
    sides: tuple[list[Source | Operation], ...] = (
        [each.source for each in rule.sources],
        [each.operation for each in rule.operations],
    )
    for alternatives in sides:
        if alternatives and not any(only_layer7(part) for part in alternatives):
            return True
    return any(condition.key in CONDITION_KEYS for condition in rule.when)


def _past(place: Place, action: PolicyAction, found: Iterable[str], at: Keys) -> None:
    """Warn of a star that adjoins a name, where matching more lets more in."""
    if action is PolicyAction.AUDIT:
        return
    for index, value in enumerate(found):
        if patterns.looks_past(value):
            place.warn(past(value), *at, index)


def past(value: str) -> str:
    """Return the warning about a pattern whose star adjoins a name."""
    other = f"{value[:-1]}-evil" if value.endswith("*") else f"evil-{value[1:]}"
    return (
        f"{quote(value)} also matches names that merely go on, such as {quote(other)}: "
        "end it at a separator, or list the names"
    )


def _plaintext(
    place: Place, action: PolicyAction, rule: AuthorizationRule, source: Source, at: Keys
) -> None:
    """Warn of an ALLOW that only says who is not meant."""
    if action is not PolicyAction.ALLOW:
        return
    if _asks_when(rule) or _asks(source):
        return
    for field, given in (
        ("notPrincipals", source.not_principals),
        ("notNamespaces", source.not_namespaces),
        ("notServiceAccounts", source.not_service_accounts),
    ):
        if given:
            place.warn(_PLAINTEXT, *at, field)


def _plaintext_when(place: Place, action: PolicyAction, rule: AuthorizationRule, at: Keys) -> None:
    """Warn of conditions of an ALLOW that only say who is not meant."""
    if action is not PolicyAction.ALLOW or _asks_when(rule):
        return
    if rule.sources and all(_asks(each.source) for each in rule.sources):
        return
    for number, condition in enumerate(rule.when):
        if condition.key in _IDENTITY_KEYS and condition.not_values:
            place.warn(_PLAINTEXT, *at, "when", number, "notValues")


def _asks(source: Source) -> bool:
    """Return whether a source asks for an identity."""
    return bool(source.principals or source.namespaces or source.service_accounts)


def _asks_when(rule: AuthorizationRule) -> bool:
    """Return whether a condition of a rule asks for an identity."""
    return any(each.values for each in rule.when if each.key in _IDENTITY_KEYS)


def _repeated(place: Place, found: tuple[str, ...], at: Keys) -> None:
    seen: set[str] = set()
    for index, value in enumerate(found):
        if value in seen:
            place.error("is given twice: remove one", *at, index)
        seen.add(value)
