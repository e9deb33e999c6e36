"""What a scrape of a full node costs: 1,000 pods and 50,000 series, in this process.

This module owns that one measurement. It promises the product's own tables, copy, text and HTTP
server, on the real core's counters; what stands in is the pods (a record for each: the copy reads
nothing else of them) and the name of the mesh. The client is a program of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any, Final

from meshbench.bed import FailedError
from ztunnel import _core, daemon, tls
from ztunnel.admin import Asked, Page, Server
from ztunnel.control import ControlStatus
from ztunnel.observe import access_log, labels, stats
from ztunnel.protocol import Arrival, DataPlane, FlowKey, Workload
from ztunnel.tunnel import Tunnel

__all__ = ["LINES", "PODS", "measure"]

PODS: Final = 1000
LABEL_SETS: Final = 10_000
FAILED: Final = 4000
"""Label sets that have failed connections besides."""
FLOWS: Final = 4000
"""Label sets that a flow counts for besides: of the called pods' side."""
LINES: Final = 50_000
"""That come of it: four for each label set, one more for failures, six for each pod."""
SCRAPES: Final = 5
BEAT_SECONDS: Final = 0.001
"""Between looks at the event loop's delay."""


class _Core:
    """The real core, but for pods, whose listeners would need namespaces."""

    def __init__(self) -> None:
        self._core = _core.Core(2, tls.function_table(_core.FUNCTIONS))
        self._pod = _core.PodCounters((4, 7, 1, 1, 2, 65536, (0,) * len(_core.REASONS)))  # type: ignore[call-arg,arg-type]  # made from one sequence

    def read_pod(self, _number: int) -> _core.PodCounters:
        return self._pod

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - the core's methods
        return getattr(self._core, name)


class _Pods(list[Any]):
    def by_number(self, number: int) -> object:
        return self[number]


def _workload(kind: str, number: int) -> Workload:
    name = f"{kind}-{number:05}"
    return Workload(
        uid=f"default/{name}",
        name=name,
        namespace="default",
        service_account=name,
        trust_domain="cluster.local",
        addresses=(),
        identity=f"spiffe://cluster.local/ns/default/sa/{name}",
        cluster="Kubernetes",
        data_plane=DataPlane.HBONE,
    )


def _filled(core: Any) -> Tunnel:  # noqa: ANN401 - see _Core
    sink: Any = SimpleNamespace(write=lambda _lines: None)
    tunnel = Tunnel(core, sink, time.monotonic, time.time)
    pods = [_workload("server", number) for number in range(PODS)]
    for number in range(LABEL_SETS):
        source, destination = _workload("client", number), pods[number % PODS]
        series = tunnel.series.acquire(
            labels.make(
                labels.DESTINATION,
                labels.MUTUAL_TLS,
                source,
                destination,
                None,
                source_principal=source.identity,
                destination_principal=destination.identity,
            )
        )
        if number < FAILED:
            tunnel.events.early.add((series.labels, "CONNECT"))
        if number < FLOWS:
            key = FlowKey(
                source.identity, "10.0.0.1", source.uid, Arrival.HBONE, destination.uid, "10.0.0.2",
                80, allowed=True,
            )  # fmt: skip
            tunnel.flows.acquire(key, series)
    held = [
        SimpleNamespace(number=number, pod=SimpleNamespace(workload=pod.uid))
        for number, pod in enumerate(pods)
    ]
    tunnel.pods = _Pods(held)  # type: ignore[assignment]  # see the module
    return tunnel


def measure() -> dict[str, float]:
    """Return CPU and wall time of a scrape, and the longest delay of the event loop meanwhile."""
    with _as_in_the_daemon():
        return asyncio.run(_measure())


@contextlib.contextmanager
def _as_in_the_daemon() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(daemon.SWITCH_SECONDS)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


async def _measure() -> dict[str, float]:
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
    core: Any = _Core()
    tunnel = _filled(core)
    log = access_log.AccessLog("/dev/null", access_log.text_line)

    async def metrics(asked: Asked) -> Page:
        picture = await stats.take(
            tunnel,
            core,
            ControlStatus(connected=True, version=1, problem=""),
            log,
            time.monotonic,
            _core.HISTOGRAM_BOUNDS_US,
            tuple(_core.DEADLINES),
        )
        media, portions = stats.render(picture, asked.accept)
        return Page(200, media, b"", portions)

    server = Server({"/metrics": metrics})
    _, port = await server.start("127.0.0.1", 0)
    delays: list[float] = []
    beat = asyncio.create_task(_beat(delays))
    try:
        # The first spells the labels.
        await _scrape(port)
        delays.clear()
        began, cpu = time.perf_counter(), time.process_time()
        lines = [await _scrape(port) for _ in range(SCRAPES)]
        cpu, wall = time.process_time() - cpu, time.perf_counter() - began
    finally:
        beat.cancel()
        await server.stop()
    if min(lines) < LINES:
        raise FailedError(f"a scrape had {min(lines)} lines, not {LINES}")
    return {
        "full_cpu_ms": cpu / SCRAPES * 1000,
        "full_wall_ms": wall / SCRAPES * 1000,
        "full_delay_ms": max(delays) * 1000,
        "full_lines": float(min(lines)),
    }


async def _beat(delays: list[float]) -> None:
    while True:
        before = time.perf_counter()
        await asyncio.sleep(BEAT_SECONDS)
        delays.append(time.perf_counter() - before - BEAT_SECONDS)


async def _scrape(port: int) -> int:
    """Return how many samples a scrape has, counted by programs that are not measured."""
    command = (
        "set -o pipefail; curl -sf -H 'accept: application/openmetrics-text;version=1.0.0' "
        f"http://127.0.0.1:{port}/metrics | grep -vc '^#'"
    )
    process = await asyncio.create_subprocess_exec(
        "bash", "-c", command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    said, _ = await process.communicate()
    if process.returncode != 0:
        raise FailedError("curl could not scrape")
    return int(said)
