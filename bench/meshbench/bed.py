"""The test bed: the same two nodes and pods for every subject, and programs run in them.

    node-1: client, neighbour          node-2: server, outside (unknown to the mesh)

This module owns the lab's description and everything that is set alike for every subject: TCP's
congestion control on every route, port ranges, the programs that answer. It may not know what a
subject is.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from meshbench import parse
from nodeagent.lab import App, Lab, LabSpec, Node, Pod

__all__ = [
    "BULK_PORT",
    "CONGESTION_CONTROL",
    "ECHO_PORT",
    "HTTP_PORT",
    "WORKERS",
    "Bed",
    "FailedError",
    "ready",
    "spec",
    "tune",
]

CONGESTION_CONTROL: Final = "cubic"
"""Set on every route: hosts that default to bbr pace what a veth pair could carry unhindered."""
ALGORITHMS: Final = frozenset({"bbr", "cubic", "reno"})

WORKERS: Final = 2
"""Of each tunnel, whatever it is: one a processor on the machines where this was written."""

HTTP_PORT: Final = 8080
ECHO_PORT: Final = 8081
BULK_PORT: Final = 5201

SYSCTLS: Final = {
    # Connections are closed by the client and leave its port in TIME_WAIT for a minute: without
    # these the default 28,000 ports would be what is measured.
    "net.ipv4.ip_local_port_range": "20000 64999",
    "net.ipv4.tcp_tw_reuse": "1",
}

READY_SECONDS: Final = 20.0
READY_STEP_SECONDS: Final = 0.05
"""Between two requests that ask whether the way stands: a proxy of others' tells of its first
certificate and route only by an answer."""

COMMAND_SECONDS: Final = 60.0
"""Beyond any scenario's own time: whatever takes longer hangs."""


class FailedError(Exception):
    """A program failed, or the bed is not what it must be."""


@dataclass
class Bed:
    """A lab with a subject in it. `tunnels` are pids by side; `agents` are the control daemons'.

    `server` is where the client finds the server: the pod itself, or the first of two relays.
    """

    lab: Lab
    tools: Path
    server: str
    http_port: int = HTTP_PORT
    bulk_port: int = BULK_PORT
    tunnels: dict[str, int] = field(default_factory=dict)
    agents: dict[str, int] = field(default_factory=dict)
    outside: tuple[str, int] | None = None

    def run(self, pod: str, argv: list[str]) -> str:
        """Run a program in a pod and return what it printed. Raises FailedError."""
        try:
            done = self.lab.run(pod, argv, timeout=COMMAND_SECONDS)
        except subprocess.TimeoutExpired:
            raise FailedError(f"{argv[0]} in {pod} did not end in {COMMAND_SECONDS} s") from None
        if done.returncode != 0:
            said = (done.stderr.strip() or done.stdout.strip())[-500:]
            shown = " ".join([Path(argv[0]).name, *argv[1:]])
            raise FailedError(f"{shown} in {pod}: code {done.returncode}: {said}")
        return str(done.stdout)

    def load(self, *arguments: str) -> dict[str, float]:
        """Run our load program in the client's pod against the server."""
        kind, *rest = arguments
        where = [self.server, str(self.http_port)]
        return parse.load(self.run("client", [str(self.tools / "load"), kind, *where, *rest]))

    def popen(self, pod: str, argv: list[str], **options: Any) -> subprocess.Popen[Any]:  # noqa: ANN401 - subprocess's own
        """Start a program in a pod; it ends with the lab at the latest."""
        return self.lab.popen(pod, argv, **options)

    def cubic(self) -> set[str]:
        """Return the congestion control of all connections of client and server now."""
        found: set[str] = set()
        for pod in ("client", "server"):
            text = self.run(pod, ["ss", "-tinH", "state", "established"])
            found |= parse.congestion_controls(text, ALGORITHMS)
        return found


def spec(
    name: str,
    tools: Path,
    *,
    extra_pods: int = 0,
    pairs: int = 0,
    settings: Callable[[str], Mapping[str, Any]] = lambda _node: {},
    arguments: tuple[str, ...] = (),
) -> LabSpec:
    """Return the lab's description; `extra_pods` more on node-1, which the mesh does not know.

    `pairs` are so many more callers on node-1 ("caller-0", …), and on node-2 as many servers
    ("called-0", …). `settings` are further ones of a node, `arguments` further ones of each
    ztunnel.
    """
    serve = App(name="serve", command=(str(tools / "serve"), str(HTTP_PORT)), ready=HTTP_PORT)
    echo = (str(tools / "serve"), str(ECHO_PORT), "echo")
    echoes = App(name="echo", command=echo, ready=ECHO_PORT)
    bulk = App(name="iperf3", command=("iperf3", "-s", "-p", str(BULK_PORT)), ready=BULK_PORT)

    def pod(which: str, node: str, *, mesh: bool = True) -> Pod:
        return Pod(
            name=which, node=node, service_account=which, mesh=mesh, apps=(serve, echoes, bulk)
        )

    pods = (
        Pod(name="client", node="node-1", service_account="client"),
        pod("neighbour", "node-1"),
        pod("server", "node-2"),
        pod("outside", "node-2", mesh=False),
        *(Pod(name=f"extra-{index}", node="node-1", mesh=False) for index in range(extra_pods)),
        *(Pod(name=f"caller-{index}", node="node-1") for index in range(pairs)),
        *(Pod(name=f"called-{index}", node="node-2", apps=(serve,)) for index in range(pairs)),
    )
    workers = ("--workers", str(WORKERS), *arguments)
    nodes = tuple(
        Node(
            name=node,
            ztunnel_arguments=workers,
            # Between the nodes it changes nothing: what crosses is mutual TLS, which is checked.
            settings={"same_node": "direct", **settings(node)},
        )
        for node in ("node-1", "node-2")
    )
    return LabSpec(name=name, nodes=nodes, pods=pods, large=extra_pods > 0)


def tune(lab: Lab) -> None:
    """Set what is alike for every subject, also on routes that the subject itself has made."""
    for pod in ("client", "neighbour", "server", "outside"):
        settings = [f"{key}={value}" for key, value in SYSCTLS.items()]
        _check(lab, pod, ["sysctl", "-q", "-w", *settings])
        listed = _check(lab, pod, ["ip", "-json", "-4", "route", "show", "table", "all"])
        for route in json.loads(listed):
            if route.get("type", "unicast") in {"unicast", "local"}:
                _check(lab, pod, ["ip", "route", "change", *_words(route)])


def ready(bed: Bed) -> None:
    """Wait until a request is answered on the subject's way, and with it the tunnels' first
    handshakes are over. Raises FailedError.
    """
    deadline = time.monotonic() + READY_SECONDS
    while True:
        try:
            bed.load("connect", "1", "4")
        except FailedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(READY_STEP_SECONDS)
        else:
            return


def _words(route: dict[str, Any]) -> list[str]:
    """Return a route as `ip route` takes it, with our congestion control."""
    words = [route.get("type", "unicast"), route["dst"]]
    for key, word in {
        "gateway": "via",
        "dev": "dev",
        "table": "table",
        "protocol": "proto",
        "scope": "scope",
        "prefsrc": "src",
        "metric": "metric",
    }.items():
        if key in route:
            words += [word, str(route[key])]
    return [*words, *(route.get("flags") or []), "congctl", CONGESTION_CONTROL]


def _check(lab: Lab, pod: str, argv: list[str]) -> str:
    done = lab.run(pod, argv)
    if done.returncode != 0:
        raise FailedError(f"{' '.join(argv)} in {pod}: {done.stderr.strip()}")
    return str(done.stdout)
