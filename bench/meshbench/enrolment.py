"""What a pod costs: time to enrol it, memory, threads, and what it makes of others' connections.

This module owns that one scenario. It promises that the pods, their namespaces and links exist
before the clock runs: only our own work is counted. It is ours alone; nobody else enrols like this.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
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
WINDOWS: Final = 3
"""Of new connections beside few pods, beside all, and beside few again: one window of each differed
by a tenth from the next one, and a machine that grows slower looked like a cost of pods."""
STEP_SECONDS: Final = 0.2
"""Between two questions: only the agent's page knows what both daemons have, and it cannot wait.
Its answer for 1,000 pods takes some 20 ms: not more often than this."""
NODE: Final = "node-1"


def measure(tools: Path, seconds: int) -> dict[str, float]:
    """Enrol PODS pods at once, and remove them. `seconds`: of a window of connections. Raises
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
        few = _windows(bed, seconds)
        if (before := _count(node)) < 0:
            raise FailedError("not all pods of the lab are enrolled")
        memory = [held.settled(pid) for pid in pids]
        threads = sum(map(host.threads, pids))
        with host.Meter(pids) as meter:
            lab.apply(_documents(lab))
            _wait(node, before + PODS)
        crowd = [held.settled(pid) for pid in pids]
        grown = sum(map(host.threads, pids)) - threads
        many = _windows(bed, seconds)
        lab.withdraw()
        _wait(node, before)
        few += _windows(bed, seconds)
        return {
            "pods": float(PODS),
            "seconds": meter.seconds,
            "cpu_milliseconds_each": meter.used(pids) / PODS * 1000,
            "kilobytes_each": (sum(crowd) - sum(memory)) / PODS,
            "nodeagent_kilobytes_each": (crowd[0] - memory[0]) / PODS,
            "ztunnel_kilobytes_each": (crowd[1] - memory[1]) / PODS,
            "threads_each": grown / PODS,
            "few_us": statistics.median(few),
            "many_us": statistics.median(many),
            "crowded": statistics.median(many) / statistics.median(few),
            **{f"few_us_{number}": value for number, value in enumerate(few, 1)},
            **{f"many_us_{number}": value for number, value in enumerate(many, 1)},
        }


def _windows(bed: Bed, seconds: int) -> list[float]:
    return [_connection_us(bed, seconds) for _ in range(WINDOWS)]


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
    """Return how many pods there are, if the tunnel has all of them in its hands: enrolled, and
    known to it. -1: it does not, or nobody answers.
    """
    with contextlib.suppress(OSError, HTTPException):
        status = json.loads(node.get("/status", 15000)[1])
        known = {pod["uid"] for pod in (status["ztunnel"].get("own") or {}).get("pods", [])}
        if known == {pod["uid"] for pod in status["pods"] if pod["state"] == "Enrolled"}:
            return len(known) if len(known) == len(status["pods"]) else -1
    return -1


def _wait(node: LabNode, wanted: int) -> None:
    deadline = time.monotonic() + ENROL_SECONDS
    while (found := _count(node)) != wanted:
        if time.monotonic() > deadline:
            raise FailedError(f"{found} pods after {ENROL_SECONDS:.0f} s, not {wanted}")
        time.sleep(STEP_SECONDS)
