"""Which workloads are captured, so that nobody calls them unseen: pure.

This module owns that question, asked again and again. It promises that a workload is in the answer
only while its pod is captured, or is on the way from one pod to the next: no pod, no caller; and
only once nobody is connected any more who was before the capture. It may not ask anybody.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Final

from nodeagent.admin.model import PodState
from nodeagent.podkeeper import PodView

__all__ = ["captured", "taken_over"]

_CAPTURED: Final = frozenset({PodState.ENROLLED, PodState.DEGRADED})
_CHANGING: Final = frozenset({PodState.WAITING, PodState.ENROLLING})


def captured(before: Mapping[str, str], views: Mapping[str, PodView]) -> dict[str, str]:
    """Return the uid of the pod by workload. `before` is what the last question returned."""
    found: dict[str, str] = {}
    for workload, view in views.items():
        if view.enrolled is not None and view.state in _CAPTURED:
            if view.older == ():
                found[workload] = view.enrolled.uid
        elif workload in before and view.state in _CHANGING:
            found[workload] = before[workload]
    return found


def taken_over(recovered: Collection[str], views: Mapping[str, PodView]) -> bool:
    """Return whether the workloads that an earlier run has captured are no longer in between."""
    settled = _CAPTURED | {PodState.WAITING}
    return all(views[uid].state in settled for uid in recovered if uid in views)
