"""What changed from one state to the next, as the seam's resources and removals.

This module owns the comparison. It promises that applying the result of `diff(old, new)` to what
`old` was made of gives `new`, and that equal states give nothing. It may not order resources in
any way that a receiver could depend on: an update is applied as a whole.
"""

from __future__ import annotations

from collections.abc import Mapping

from nodeagent.mesh._state import MeshState
from ztunnel.protocol import Authorization, Removal, Service, Workload, WorkloadPolicy

__all__ = ["Resource", "diff"]

Resource = Workload | Service | WorkloadPolicy | Authorization


def diff(old: MeshState | None, new: MeshState) -> tuple[tuple[Resource, ...], tuple[Removal, ...]]:
    """Return the upserts and removals that lead from `old` (None: from nothing) to `new`."""
    before = old or MeshState()
    upserts: list[Resource] = []
    removals: list[Removal] = []
    pairs: tuple[tuple[str, Mapping[str, Resource], Mapping[str, Resource]], ...] = (
        ("workload", before.workloads, new.workloads),
        ("service", before.services, new.services),
        ("workload_policy", before.policies, new.policies),
        ("authorization", before.authorizations, new.authorizations),
    )
    for kind, had, has in pairs:
        if had is has:
            continue
        # Most are the very same, and a comparison of each takes longer than to see that.
        different = [
            uid
            for uid, value in has.items()
            if (known := had.get(uid)) is not value and known != value
        ]
        upserts += [has[uid] for uid in sorted(different)]
        removals += [Removal(kind, uid) for uid in sorted(had.keys() - has.keys())]
    return tuple(upserts), tuple(removals)
