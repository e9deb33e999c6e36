"""What a pod costs: time to enrol it, memory, threads, and what it makes of others' connections.

This module owns that one scenario. It promises that the pods, their namespaces and links exist
before the clock runs: only our own work is counted. It is ours alone; nobody else enrols like this.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path
from typing import Any, Final

from meshbench import held, host
from meshbench.bed import Bed, FailedError, ready, spec, tune
from nodeagent.lab import Lab, LabNode

__all__ = ["IDENTITIES", "PODS", "measure"]

PODS: Final = 1000
IDENTITIES: Final = 50
"""Service accounts, 20 pods each: a node's pods are replicas of some tens of workloads."""
PARALLEL: Final = 32

ENROL_SECONDS: Final = 120.0
WARM_SECONDS: Final = 1
STEP_SECONDS: Final = 0.2
"""Between two questions: only the agent's page knows what both daemons have, and it cannot wait.
Its answer for 1,000 pods takes some 20 ms: not more often than this."""
NODE: Final = "node-1"


def measure(tools: Path, seconds: int) -> dict[str, float]:
    """Enrol PODS pods at once. `seconds`: for connections before and after, each. Raises
    FailedError, LabError.
    """
    name = f"bench-enrolment-{os.getpid()}"
    with Lab.up(spec(name, tools, extra_pods=PODS)) as lab:
        node = lab.node(NODE)
        pids = [node.process(daemon).pid for daemon in ("nodeagent", "ztunnel")]
        tune(lab)
        bed = Bed(lab, tools, lab.addresses("server")[0])
        bed.tunnels = {side.name: side.process("ztunnel").pid for side in lab.nodes}
        ready(bed)
        few = _connection_us(bed, seconds)
        before = _count(node)
        memory = [held.settled(pid) for pid in pids]
        threads = sum(map(host.threads, pids))
        with host.Meter(pids) as meter:
            lab.apply(_documents(lab))
            _wait(node, before + PODS)
        crowd = [held.settled(pid) for pid in pids]
        grown = sum(map(host.threads, pids)) - threads
        return {
            "pods": float(PODS),
            "seconds": meter.seconds,
            "cpu_milliseconds_each": meter.used(pids) / PODS * 1000,
            "kilobytes_each": (sum(crowd) - sum(memory)) / PODS,
            "nodeagent_kilobytes_each": (crowd[0] - memory[0]) / PODS,
            "ztunnel_kilobytes_each": (crowd[1] - memory[1]) / PODS,
            "threads_each": grown / PODS,
            "few_us": few,
            "many_us": (many := _connection_us(bed, seconds)),
            "crowded": many / few,
        }


def _connection_us(bed: Bed, seconds: int) -> float:
    """Return both tunnels' CPU per connection, in µs, once they have warmed up."""
    bed.load("connect", str(WARM_SECONDS), str(PARALLEL))
    with host.Meter(bed.tunnels.values()) as meter:
        values = bed.load("connect", str(seconds), str(PARALLEL))
    if values["errors"]:
        raise FailedError(f"{values['errors']:.0f} connections failed beside {PODS} pods")
    return meter.used(bed.tunnels.values()) / values["connections"] * 1e6


def _documents(lab: Lab) -> Iterator[dict[str, Any]]:
    names = [f"extra-{index}" for index in range(PODS)]
    # All at once: the lab reads its record for each single question.
    known = {one.pod.name: one for one in lab.state.plan.pods}
    for index, name in enumerate(names):
        first, *more = known[name].addresses
        yield {
            "apiVersion": "networking.istio.io/v1",
            "kind": "WorkloadEntry",
            "metadata": {
                "name": name,
                "namespace": "default",
                "annotations": {
                    "nodeagent.io/netns": f"{NODE}:{lab.layout.pod_space(known[name])}",
                    "nodeagent.io/addresses": ",".join(more),
                },
            },
            "spec": {"address": first, "serviceAccount": f"extra-{index % IDENTITIES}"},
        }


def _count(node: LabNode) -> int:
    """Return how many pods the tunnel has in its hands: enrolled, and known to it."""
    with contextlib.suppress(OSError, HTTPException):
        status = json.loads(node.get("/status", 15000)[1])
        known = {pod["uid"] for pod in (status["ztunnel"].get("own") or {}).get("pods", [])}
        return sum(pod["state"] == "Enrolled" and pod["uid"] in known for pod in status["pods"])
    return 0


def _wait(node: LabNode, wanted: int) -> None:
    deadline = time.monotonic() + ENROL_SECONDS
    while (found := _count(node)) < wanted:
        if time.monotonic() > deadline:
            raise FailedError(f"{found} of {wanted} pods enrolled in {ENROL_SECONDS:.0f} s")
        time.sleep(STEP_SECONDS)
