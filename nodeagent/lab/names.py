"""Which pod of a lab somebody means.

This module owns that reading. It promises one pod or an answer that lists the pods; it never
guesses between two. It is pure.
"""

from __future__ import annotations

from typing import Final

from nodeagent.lab.model import LabPlan, PodPlan

__all__ = ["UnknownPodError", "find_pod"]

KINDS: Final = frozenset({"deploy", "deployment", "deployments", "deployment.apps", "pod", "pods"})
"""Written before a name by those who are used to kubectl; every pod here is its own deployment."""


class UnknownPodError(ValueError):
    """No pod, or more than one, is meant; the message lists what there is."""


def find_pod(plan: LabPlan, text: str, namespace: str = "") -> PodPlan:
    """Return the pod that `text` names: "name", "namespace/name", "deploy/name", or a beginning of
    a name that only one pod has. Raises UnknownPodError.
    """
    first, slash, rest = text.partition("/")
    wanted, within = text, namespace
    if slash and first in KINDS:
        wanted = rest
    elif slash:
        if namespace and namespace != first:
            raise UnknownPodError(f"{text} names namespace {first}, but {namespace} is asked for")
        wanted, within = rest, first
    pods = [pod for pod in plan.pods if not within or pod.pod.namespace == within]
    exact = [pod for pod in pods if pod.pod.name == wanted]
    found = exact or [pod for pod in pods if wanted and pod.pod.name.startswith(wanted)]
    if len(found) == 1:
        return found[0]
    if found:
        both = ", ".join(pod.uid for pod in found)
        raise UnknownPodError(f"{text!r} may mean {both}: write one of these")
    known = ", ".join(pod.uid for pod in plan.pods) or "none"
    raise UnknownPodError(f"no pod is called {text!r}; the pods of this lab: {known}")
