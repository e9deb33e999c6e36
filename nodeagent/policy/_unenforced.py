"""Policies that are in force otherwise than they are written, as one list.

This module owns the summary of what an AuthorizationPolicy says and this agent cannot do: layer 7,
and targets that are no workloads. It promises that no such policy is left out, whatever it selects,
and that each says what is done instead. It may not change a policy's meaning: that is
`_authorization`'s, and each single field was named where the document was read.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import msgspec

from nodeagent import api
from nodeagent.api import AuthorizationPolicy, PolicyAction

__all__ = ["Unenforced", "unenforced"]

_EFFECTS: Final = {
    PolicyAction.ALLOW: "a rule with them is dropped: what it would allow is denied",
    PolicyAction.DENY: "a rule with them denies more than is written",
    PolicyAction.AUDIT: "a rule with them marks more than is written",
}
_TARGET: Final = "it has no effect here: it is for a waypoint or gateway"


class Unenforced(msgspec.Struct, frozen=True, order=True):
    """A policy ("namespace/name"), the `fields` that are not evaluated, and what that means.

    `origin` is "FILE:LINE" of the policy.
    """

    policy: str
    action: str
    origin: str
    fields: tuple[str, ...]
    effect: str


def unenforced(policies: Iterable[AuthorizationPolicy]) -> tuple[Unenforced, ...]:
    """Return the policies that are not enforced as they are written, in order of their names."""
    return tuple(sorted(found for policy in policies if (found := _of(policy)) is not None))


def _of(policy: AuthorizationPolicy) -> Unenforced | None:
    spec = policy.spec
    targets = (("targetRef", spec.target_ref is not None), ("targetRefs", bool(spec.target_refs)))
    fields = tuple(name for name, given in targets if given)
    effect = _TARGET
    if not fields:
        names = (name for rule in spec.rules or () for _, name in api.layer7(rule))
        fields = tuple(dict.fromkeys(names))
        effect = _EFFECTS.get(spec.action, "")
    if not fields:
        return None
    return Unenforced(policy.uid, spec.action.value, str(policy.origin), fields, effect)
