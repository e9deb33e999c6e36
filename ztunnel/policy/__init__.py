"""Authorization at layer 4: who may call whom, as AuthorizationPolicy says it.

This package owns the compiled form of the policies and the decision by it. It promises that a
decision depends on nothing but the policies and the connection, that its cost hardly depends on
how many policies there are, and that what it cannot read it refuses whole. It is pure: no clock,
no core, no state but what it returns. It may import nothing of ztunnel but the seam and the
grammars of addresses and SPIFFE IDs.

`conditions` reads single patterns, `rules` whole rules; `index` finds those that match among very
many, `scopes` knows which count for a workload and carries both from change to change, `decide`
draws the conclusion; `explain`, which the daemon does not load, says how it came about.
"""

from ztunnel.policy.conditions import Facts, facts
from ztunnel.policy.decide import DEFAULT_DENY, MAX_AUDITS, Decision, DryRun, Match, decide
from ztunnel.policy.rules import check
from ztunnel.policy.scopes import NOWHERE, Scopes, updated

__all__ = [
    "DEFAULT_DENY",
    "MAX_AUDITS",
    "NOWHERE",
    "Decision",
    "DryRun",
    "Facts",
    "Match",
    "Scopes",
    "check",
    "decide",
    "facts",
    "updated",
]
