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

ENROLLING_SECONDS: Final = 10.0
"""For a new pod to be captured: usually one. What takes longer is a pod that is called unseen."""


def captured(before: Mapping[str, str], views: Mapping[str, PodView], now: float) -> dict[str, str]:
    """Return the uid of the pod by workload. `before` is what the last question returned.

    `now` is in seconds of the keepers' clock.
    """
    found: dict[str, str] = {}
    for workload, view in views.items():
        if view.enrolled is not None and view.state in _CAPTURED:
            if view.older == ():
                found[workload] = view.enrolled.uid
        elif workload in before and _changes(view, now):
            found[workload] = before[workload]
    return found


def _changes(view: PodView, now: float) -> bool:
    """Return whether there is no pod, or one that is a moment old."""
    if view.state is PodState.WAITING:
        return True
    return view.state is PodState.ENROLLING and now - view.since <= ENROLLING_SECONDS


def taken_over(recovered: Collection[str], views: Mapping[str, PodView]) -> bool:
    """Return whether the workloads that an earlier run has captured are no longer in between."""
    settled = _CAPTURED | {PodState.WAITING}
    return all(views[uid].state in settled for uid in recovered if uid in views)
