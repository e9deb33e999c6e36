"""What a lab is doing now, as values.

This module owns looking at a lab without changing it. It promises that "ready" and "running" were
asked just now, not remembered. It may not print.
"""

from __future__ import annotations

import http.client

import msgspec

from nodeagent.lab import builder
from nodeagent.lab.lab import Lab
from nodeagent.lab.model import NodePlan, Pod, PodPlan
from nodeagent.lab.store import State

__all__ = ["LabReport", "NodeReport", "PodReport", "report"]

GOOD = frozenset({"ready", "running"})


class NodeReport(msgspec.Struct, frozen=True):
    """`daemons` maps a daemon to "ready", "not ready: …", "ended" or "not started"."""

    name: str
    addresses: tuple[str, ...]
    namespace: str
    daemons: dict[str, str]


class PodReport(msgspec.Struct, frozen=True):
    """`mesh` is "enrolled", "known" (not captured) or "outside"; `apps` as in NodeReport."""

    name: str
    node: str
    addresses: tuple[str, ...]
    namespace: str
    service_account: str
    mesh: str
    apps: dict[str, str]


class LabReport(msgspec.Struct, frozen=True):
    """`created` is in seconds since the epoch; `good` when nothing that was started has failed."""

    name: str
    directory: str
    created: float
    complete: bool
    good: bool
    nodes: tuple[NodeReport, ...]
    pods: tuple[PodReport, ...]
    services: dict[str, tuple[str, ...]]


def report(lab: Lab) -> LabReport:
    """Return what is there. Raises LabError."""
    state = lab.state
    nodes = tuple(_node(lab, state, node) for node in state.plan.nodes)
    pods = tuple(_pod(lab, state, pod) for pod in state.plan.pods)
    states = [text for node in nodes for text in node.daemons.values()]
    states += [text for pod in pods for text in pod.apps.values()]
    return LabReport(
        name=lab.name,
        directory=str(lab.layout.directory),
        created=state.created,
        complete=state.complete,
        good=state.complete and all(text in GOOD for text in states),
        nodes=nodes,
        pods=pods,
        services={one.service.uid: one.addresses for one in state.plan.services},
    )


def _node(lab: Lab, state: State, node: NodePlan) -> NodeReport:
    daemons = builder.DAEMONS if state.daemons else ()
    return NodeReport(
        name=node.name,
        addresses=node.addresses,
        namespace=str(lab.layout.node_space(node.name)),
        daemons={daemon: _daemon(lab, state, node.name, daemon) for daemon in daemons},
    )


def _daemon(lab: Lab, state: State, node: str, daemon: str) -> str:
    running = _process(state, f"{node}/{daemon}")
    if running != "running":
        return running
    host, port = builder.READY_ADDRESSES[daemon]
    try:
        status, body = builder.get(lab.layout.node_space(node), host, port, builder.READY_PATH)
    except (OSError, http.client.HTTPException) as error:
        return f"not ready: {error}"
    if status == http.client.OK:
        return "ready"
    return f"not ready: {body.decode(errors='replace').strip()}"


def _process(state: State, name: str) -> str:
    record = state.processes.get(name)
    if record is None:
        return "not started"
    return "running" if record.alive() else "ended"


def _mesh(pod: Pod) -> str:
    if not pod.mesh:
        return "outside"
    return "enrolled" if pod.enrolled else "known"


def _pod(lab: Lab, state: State, pod: PodPlan) -> PodReport:
    return PodReport(
        name=pod.uid,
        node=pod.pod.node,
        addresses=pod.addresses,
        namespace=str(lab.layout.pod_space(pod)),
        service_account=pod.pod.service_account,
        mesh=_mesh(pod.pod),
        apps={app.name: _process(state, f"{pod.uid}/{app.name}") for app in pod.pod.apps},
    )
