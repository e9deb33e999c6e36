"""Authorization at layer 4: who may call whom, as AuthorizationPolicy says it.

This package owns the compiled form of the policies and the decision by it. It promises that a
decision depends on nothing but the policies and the connection, that its cost hardly depends on
how many policies there are, and that what it cannot read it refuses whole. It is pure: no clock,
no core, no state but what it returns. It may import nothing of ztunnel but the seam and the
grammars of addresses and SPIFFE IDs.
"""

from ztunnel.policy.rules import check

__all__ = ["check"]
