"""What a pod costs: the time to enrol it, and the memory and threads that it takes.

This module owns that one measurement. It promises that the pods, their namespaces and links exist
before the clock runs: only our own work is counted. It is ours alone; nobody else enrols like this.
"""

from __future__ import annotations

import json
import os
import time
from http.client import HTTPException
from pathlib import Path
from typing import Any, Final

from meshbench import host
from meshbench.bed import FailedError, spec
from nodeagent.lab import Lab, LabNode

__all__ = ["measure"]

ENROL_SECONDS: Final = 120.0
STEP_SECONDS: Final = 0.02
NODE: Final = "node-1"


def measure(tools: Path, pods: int) -> dict[str, float]:
    """Enrol `pods` pods at once; return the cost of each. Raises FailedError, LabError."""
    name = f"bench-enrolment-{os.getpid()}"
    with Lab.up(spec(name, tools, extra_pods=pods)) as lab:
        node = lab.node(NODE)
        pids = [node.process(daemon).pid for daemon in ("nodeagent", "ztunnel")]
        memory = sum(map(host.resident_kb, pids))
        threads = sum(map(host.threads, pids))
        before = len(_enrolled(node))
        with host.Meter(pids) as meter:
            lab.apply(_workload(lab, f"extra-{index}") for index in range(pods))
            _wait(node, before + pods)
        return {
            "pods": float(pods),
            "milliseconds_each": meter.seconds / pods * 1000,
            "cpu_milliseconds_each": meter.used(pids) / pods * 1000,
            "kilobytes_each": (sum(map(host.resident_kb, pids)) - memory) / pods,
            "threads_each": (sum(map(host.threads, pids)) - threads) / pods,
        }


def _workload(lab: Lab, pod: str) -> dict[str, Any]:
    first, *more = lab.addresses(pod)
    return {
        "apiVersion": "networking.istio.io/v1",
        "kind": "WorkloadEntry",
        "metadata": {
            "name": pod,
            "namespace": "default",
            "annotations": {
                "nodeagent.io/netns": f"{NODE}:{lab.namespace(pod)}",
                "nodeagent.io/addresses": ",".join(more),
            },
        },
        "spec": {"address": first, "serviceAccount": "extra"},
    }


def _enrolled(node: LabNode) -> list[str]:
    """Return the pods whose traffic the tunnel has: enrolled, and known to it."""
    try:
        _, body = node.get("/status", 15000)
    except (OSError, HTTPException):
        return []
    status = json.loads(body)
    known = {pod["uid"] for pod in (status["ztunnel"].get("own") or {}).get("pods", [])}
    return [
        pod["uid"] for pod in status["pods"] if pod["state"] == "Enrolled" and pod["uid"] in known
    ]


def _wait(node: LabNode, wanted: int) -> None:
    deadline = time.monotonic() + ENROL_SECONDS
    while (found := len(_enrolled(node))) < wanted:
        if time.monotonic() > deadline:
            raise FailedError(f"{found} of {wanted} pods enrolled in {ENROL_SECONDS:.0f} s")
        time.sleep(STEP_SECONDS)
