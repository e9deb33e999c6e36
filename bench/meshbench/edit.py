"""From an edit to its effect: a file of policies is replaced, and a caller meets the new verdict.

This module owns that measurement, with both real daemons of one node in a mesh of 100,000 workloads
and 10,000 policies. It promises that everything is in force before the first edit, and that an
effect is a connection that ends otherwise than the one before it. It is ours alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import statistics
import subprocess
import sys
import threading
import time
from http.client import HTTPException
from pathlib import Path
from typing import Any, Final

from meshbench import enormous, held, host
from meshbench.bed import ECHO_PORT, FailedError
from nodeagent.lab import App, Lab, LabNode, LabSpec, Node, Pod

__all__ = ["EDITS", "measure"]

EDITS: Final = 20
"""To and fro: the verdict changes with each."""
FIRST: Final = 2
"""Before those that count: only an effect shows that all that was read is in force."""
LOAD_SECONDS: Final = 240.0
"""For 110,000 documents to be read: some ten times what a quiet machine takes."""
EFFECT_SECONDS: Final = 60.0
"""The first edit waits until the documents before it are in force."""
STEP_SECONDS: Final = 1.0
"""Between two looks whether all is in force; nothing waits for it meanwhile."""
NODE: Final = "node-1"

_FILE: Final = "policies-edited"
_DENY: Final = """\
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: edited, namespace: default}
spec:
  selector: {matchLabels: {app: server}}
  action: DENY
  rules:
  - from:
    - source:
        principals: ["*/sa/%s"]
"""


def measure(tools: Path) -> dict[str, float]:
    """Return milliseconds from edit to effect, and memory in MB. Raises FailedError, LabError."""
    with Lab.up(_spec(f"bench-edit-{os.getpid()}", tools)) as lab:
        node = lab.node(NODE)
        begun = time.monotonic()
        for name, text in enormous.files():
            lab.apply(text, name.removesuffix(".yaml"))
        _wait(node)
        loaded = time.monotonic() - begun
        agent, tunnel = (node.process(daemon).pid for daemon in ("nodeagent", "ztunnel"))
        address = lab.addresses("server")[0]
        argv = [sys.executable, "-m", "meshbench.asker", address, str(ECHO_PORT)]
        bench = Path(__file__).parents[1]
        with lab.popen("client", argv, stdout=subprocess.PIPE, text=True, cwd=bench) as asker:
            try:
                with host.Meter([agent]) as meter:
                    times = _edits(lab, asker)
            finally:
                asker.kill()
        return {
            "effect_p50_ms": statistics.median(times) * 1e3,
            "effect_max_ms": max(times) * 1e3,
            "nodeagent_cpu_ms": meter.used([agent]) / (FIRST + EDITS) * 1e3,
            "loaded_seconds": loaded,
            "nodeagent_mb": held.settled(agent) / held.KIB_A_MB,
            "ztunnel_mb": held.settled(tunnel) / held.KIB_A_MB,
        }


def _spec(name: str, tools: Path) -> LabSpec:
    command = (str(tools / "serve"), str(ECHO_PORT), "echo")
    echo = App(name="echo", command=command, ready=ECHO_PORT)
    pods = (
        Pod(name="client", node=NODE, service_account="client"),
        Pod(
            name="server",
            node=NODE,
            service_account="server",
            labels={"app": "server"},
            apps=(echo,),
        ),
    )
    return LabSpec(name=name, nodes=(Node(name=NODE),), pods=pods)


def _edits(lab: Lab, asker: subprocess.Popen[str]) -> list[float]:
    said: queue.Queue[tuple[float, bool]] = queue.Queue()

    def listen() -> None:
        for line in asker.stdout or ():
            moment, answer = line.split()
            said.put((float(moment), answer == "yes"))

    threading.Thread(target=listen, daemon=True).start()
    _expect(said, allowed=True)
    times: list[float] = []
    for number in range(FIRST + EDITS):
        allowed = bool(number % 2)
        text = _DENY % ("nobody" if allowed else "client")
        edited = time.monotonic()
        lab.apply(text, _FILE)
        times.append(_expect(said, allowed=allowed) - edited)
    return times[FIRST:]


def _expect(said: queue.Queue[tuple[float, bool]], *, allowed: bool) -> float:
    try:
        moment, answer = said.get(timeout=EFFECT_SECONDS)
    except queue.Empty:
        raise FailedError(f"an edit had no effect in {EFFECT_SECONDS:.0f} s") from None
    if answer is not allowed:
        raise FailedError("a verdict changed that nobody had edited")
    return moment


def _wait(node: LabNode) -> None:
    deadline = time.monotonic() + LOAD_SECONDS
    wanted = enormous.WORKLOADS + enormous.POLICIES
    while (found := _documents(node)) < wanted:
        if time.monotonic() > deadline:
            raise FailedError(f"{found} of {wanted} documents in force in {LOAD_SECONDS:.0f} s")
        time.sleep(STEP_SECONDS)


def _documents(node: LabNode) -> int:
    """Return how many documents are in force in both daemons."""
    with contextlib.suppress(OSError, HTTPException):
        status: dict[str, Any] = json.loads(node.get("/status", 15000)[1])
        own = status["ztunnel"]
        if own["acknowledged_version"] == own["wanted_version"]:
            return int(status["config"]["documents"])
    return 0
