"""What it costs to be observed: everything on against everything off.

This module owns that one scenario. It promises two labs side by side, alike but for what observes,
measured in turn within each window, so that what disturbs the machine disturbs both. It is ours
alone; nobody else offers the same to be turned on.

Off: no line of the access log is kept (`/dev/null`; they are still made), no audit log, no recorded
callers, nobody asks. On: the access log in a file, the audit log with every caller in another,
recorded callers, traces of one connection in a hundred to a receiver on each node, and somebody who
asks both daemons of both nodes for `/metrics`, and the tunnels for `/stats`, every ASK_SECONDS:
Prometheus does so every fifteen.
"""

from __future__ import annotations

import contextlib
import http.server
import os
import statistics
import tempfile
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import Any, Final

from meshbench import host, parse
from meshbench.bed import Bed, FailedError, ready, spec, tune
from meshbench.scenarios import PARALLEL, Timing
from nodeagent.lab import Lab, namespaces

__all__ = ["ASK_SECONDS", "WINDOWS", "Values", "asking", "bed_of", "measure", "sound", "watched"]

WINDOWS: Final = 3
ASK_SECONDS: Final = 2.0
TRACES_PORT: Final = 4318
"""The port that OpenTelemetry names for OTLP over HTTP."""
SAMPLE: Final = 100

PAGES: Final = ((15020, "/metrics"), (15000, "/metrics"), (15020, "/stats"))

Values = dict[str, float]


def measure(tools: Path, timing: Timing) -> Values:
    """Return the medians of on over off. Raises FailedError, LabError."""
    with contextlib.ExitStack() as stack:
        off = stack.enter_context(bed_of("off", tools, _off, ("--access-log", "/dev/null")))
        on = stack.enter_context(watched("on", tools))
        ratios: dict[str, list[float]] = {}
        found: Values = {}
        for window in range(1, WINDOWS + 1):
            plain = _window(off, timing)
            with asking(on) as asked:
                seen = _window(on, timing)
            if not asked():
                raise FailedError("nobody was answered: nothing was observed")
            for key, value in seen.items():
                ratios.setdefault(key, []).append(value / plain[key])
                found |= {f"{key}_off_{window}": plain[key], f"{key}_on_{window}": value}
        return found | {key: statistics.median(values) for key, values in ratios.items()}


@contextlib.contextmanager
def watched(name: str, tools: Path, *, pairs: int = 0) -> Iterator[Bed]:
    """Build a lab in which all is on, but nobody asks (`asking`)."""
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-observe-")))
        bed = stack.enter_context(
            bed_of(name, tools, lambda node: _on(directory, node), pairs=pairs)
        )
        for node in bed.lab.nodes:
            stack.enter_context(_receiver(node.space))
        yield bed


@contextlib.contextmanager
def bed_of(
    name: str,
    tools: Path,
    settings: Callable[[str], dict[str, Any]],
    arguments: tuple[str, ...] = (),
    *,
    pairs: int = 0,
) -> Iterator[Bed]:
    """Build a lab of ours with these settings."""
    described = spec(
        f"bench-{name}-{os.getpid()}", tools, pairs=pairs, settings=settings, arguments=arguments
    )
    with Lab.up(described) as lab:
        bed = Bed(lab, tools, lab.addresses("server")[0])
        bed.tunnels = {side.name: side.process("ztunnel").pid for side in lab.nodes}
        tune(lab)
        ready(bed)
        yield bed


def _off(_node: str) -> dict[str, Any]:
    return {"audit": {"authorized": "none", "stdout": False}, "flows": {"retention_hours": 0}}


def _on(directory: Path, node: str) -> dict[str, Any]:
    return {
        "audit": {"stdout": False, "file": str(directory / f"audit-{node}.log")},
        "traces": {"endpoint": f"http://127.0.0.1:{TRACES_PORT}", "sample_one_in": SAMPLE},
    }


class _Taken(http.server.BaseHTTPRequestHandler):
    """Takes spans and forgets them: an answer of OTLP's without a field is success."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("content-length", "0")))
        self.send_response(http.HTTPStatus.OK)
        self.send_header("content-type", "application/x-protobuf")
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the library's name
        """Say nothing."""


@contextlib.contextmanager
def _receiver(space: Path) -> Iterator[None]:
    """Run a receiver of traces on a node's loopback."""
    address = ("127.0.0.1", TRACES_PORT)
    make = partial(http.server.ThreadingHTTPServer, address, _Taken)
    with namespaces.run_in(space, make) as server:
        thread = threading.Thread(target=server.serve_forever, name="bench-traces")
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join()


def _window(bed: Bed, timing: Timing) -> Values:
    """Return what is compared: rates, delays in ns, CPU per connection in s."""
    argv = ["iperf3", "--json", "-c", bed.server, "-p", str(bed.bulk_port), "-O", "1"]
    bulk = parse.iperf3(bed.run("client", [*argv, "-t", str(timing.bulk)]))
    latency = bed.load("latency", str(timing.requests))
    with host.Meter(bed.tunnels.values()) as meter:
        connections = sound(bed.load("connect", str(timing.connections), str(PARALLEL)))
    used = meter.used(bed.tunnels.values())
    first = sound(bed.load("connect", str(timing.requests), "1"))
    return {
        "bulk": bulk["gbit_per_second"],
        "latency_p50": latency["p50_ns"],
        "latency_p99": latency["p99_ns"],
        "connections": connections["connections"] / connections["seconds"],
        "connection_cpu": used / connections["connections"],
        "first_p50": first["p50_ns"],
        "first_p99": first["p99_ns"],
    }


def sound(values: Values) -> Values:
    """Return what a load program reports. Raises FailedError if a connection failed."""
    if values["errors"]:
        raise FailedError(f"{values['errors']:.0f} connections failed")
    return values


@contextlib.contextmanager
def asking(bed: Bed, pause: float = ASK_SECONDS) -> Iterator[Callable[[], int]]:
    """Ask for PAGES meanwhile; hand over how many answers there were."""
    over = threading.Event()
    answers: list[int] = []

    def ask() -> None:
        while not over.wait(pause):
            for node in bed.lab.nodes:
                for port, path in PAGES:
                    with contextlib.suppress(OSError, HTTPException):
                        answers.append(len(node.get(path, port)[1]))

    asker = threading.Thread(target=ask, name="bench-asker")
    asker.start()
    try:
        yield lambda: len(answers)
    finally:
        over.set()
        asker.join()
