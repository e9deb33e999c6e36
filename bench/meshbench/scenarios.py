"""The scenarios: what is asked of a subject, and the numbers that come of it.

This module owns what is measured and in which order. It promises the same work for every subject,
and values named as `figures` expects them. It may not know how a subject is built.
"""

from __future__ import annotations

import json
import subprocess
import threading
import time
from collections.abc import Callable
from typing import Final

import msgspec

from meshbench import host, parse
from meshbench.bed import BULK_PORT, CONGESTION_CONTROL, HTTP_PORT, Bed, FailedError

__all__ = ["SCENARIOS", "Scenario", "Timing"]

CONNECTIONS: Final = 64
PARALLEL: Final = 32
IDLE: Final = 2000

SETTLE_SECONDS: Final = 5.0
SETTLE_STEP_SECONDS: Final = 0.25
"""Memory is read when it has not changed for two steps, at the latest after the former."""
READY_SECONDS: Final = 60.0

Values = dict[str, float]


class Timing(msgspec.Struct, frozen=True):
    """How long each scenario runs, in whole seconds."""

    bulk: int
    requests: int
    connections: int


class Scenario(msgspec.Struct, frozen=True):
    """A scenario of this name; only `subjects` meet it."""

    name: str
    subjects: frozenset[str]
    measure: Callable[[Bed, Timing], Values]


def _meter(bed: Bed) -> host.Meter:
    return host.Meter([*bed.tunnels.values(), *bed.agents.values()])


def _side(bed: Bed, side: str) -> list[int]:
    return [pid for name, pid in bed.tunnels.items() if name.startswith(side)]


def _iperf3(bed: Bed, seconds: int, where: tuple[str, int], *options: str) -> Values:
    address, port = where
    argv = ["iperf3", "--json", "-c", address, "-p", str(port), "-t", str(seconds), "-O", "1"]
    return parse.iperf3(bed.run("client", [*argv, *options]))


def _bulk(*options: str) -> Callable[[Bed, Timing], Values]:
    def measure(bed: Bed, timing: Timing) -> Values:
        seen: list[set[str]] = []
        # In the middle: sockets whose handshake is over.
        watcher = threading.Timer(timing.bulk / 2, lambda: seen.append(bed.cubic()))
        with _meter(bed) as meter:
            watcher.start()
            try:
                values = _iperf3(bed, timing.bulk, (bed.server, bed.bulk_port), *options)
            finally:
                watcher.cancel()
                watcher.join()
        if seen and seen[0] != {CONGESTION_CONTROL}:
            raise FailedError(f"connections are not all {CONGESTION_CONTROL}: {sorted(seen[0])}")
        # The meter covers the first second too, which the rate leaves out.
        moved = values["gigabytes"] * (values["seconds"] + 1) / values["seconds"]
        return values | _per_gigabyte(bed, meter, moved)

    return measure


def _per_gigabyte(bed: Bed, meter: host.Meter, gigabytes: float) -> Values:
    values = {"system_per_gb": meter.system / gigabytes}
    if bed.tunnels:
        for side in ("client", "server"):
            used = meter.used(_side(bed, side))
            if used <= 0:
                raise FailedError(f"the {side}'s tunnel did nothing: traffic went past it")
            values[f"{side}_tunnel_per_gb"] = used / gigabytes
        values["tunnels_per_gb"] = meter.used(bed.tunnels.values()) / gigabytes
    if bed.agents:
        values["agents_per_gb"] = meter.used(bed.agents.values()) / gigabytes
    return values


def _each(bed: Bed, meter: host.Meter, count: float) -> Values:
    """Return CPU per request or connection, in µs."""
    values = {"system_each_us": meter.system / count * 1e6}
    if bed.tunnels:
        values["tunnels_each_us"] = meter.used(bed.tunnels.values()) / count * 1e6
    if bed.agents:
        values["agents_each_us"] = meter.used(bed.agents.values()) / count * 1e6
    return values


def _latency(bed: Bed, timing: Timing) -> Values:
    return bed.load("latency", str(timing.requests))


def _wrk(bed: Bed, timing: Timing, address: str, port: int) -> Values:
    argv = ["wrk", "-t1", f"-c{CONNECTIONS}", f"-d{timing.requests}s"]
    with _meter(bed) as meter:
        values = parse.wrk(bed.run("client", [*argv, f"http://{address}:{port}/"]))
    return values | _each(bed, meter, values["requests"])


def _requests(bed: Bed, timing: Timing) -> Values:
    return _wrk(bed, timing, bed.server, bed.http_port)


def _connections(bed: Bed, timing: Timing) -> Values:
    with _meter(bed) as meter:
        values = bed.load("connect", str(timing.connections), str(PARALLEL))
    values["per_second"] = values["connections"] / values["seconds"]
    return _sound(values) | _each(bed, meter, values["connections"])


def _first_byte(bed: Bed, timing: Timing) -> Values:
    """One connection at a time, right after thousands have come and gone."""
    values = _sound(bed.load("connect", str(timing.requests), "1"))
    values["stalled_percent"] = 100 * values["stalled"] / values["connections"]
    return values


def _sound(values: Values) -> Values:
    if values["errors"]:
        raise FailedError(
            f"{values['errors']:.0f} of {values['connections']:.0f} connections failed"
        )
    return values


def _settled(pid: int) -> int:
    """Return a process's resident memory in KiB once it has come to rest."""
    deadline = time.monotonic() + SETTLE_SECONDS
    last, same = host.resident_kb(pid), 0
    while same < 2 and time.monotonic() < deadline:
        time.sleep(SETTLE_STEP_SECONDS)
        now = host.resident_kb(pid)
        last, same = now, same + 1 if now == last else 0
    return last


def _memory(bed: Bed, _: Timing) -> Values:
    """Resident memory after the first requests, and with connections that do nothing."""
    idle = {side: _settled(pid) for side, pid in bed.tunnels.items()}
    values = {f"{side}_idle_kb": float(kb) for side, kb in idle.items()}
    values["idle_mb"] = max(idle.values()) / 1024
    argv = [str(bed.tools / "load"), "idle", bed.server, str(bed.http_port), str(IDLE)]
    process = bed.popen(
        "client",
        argv,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    guard = threading.Timer(READY_SECONDS, process.kill)
    guard.start()
    try:
        if not process.stdout or process.stdout.readline() != "ready\n":
            process.kill()
            trouble = process.communicate()[1].strip()
            raise FailedError(f"load idle: {trouble or 'no answer in time'}")
        for side, pid in bed.tunnels.items():
            busy = _settled(pid)
            values[f"{side}_held_kb"] = float(busy)
            values[f"{side}_connection_kb"] = (busy - idle[side]) / IDLE
        said, trouble = process.communicate("")
        if json.loads(said or "{}") != {"held": IDLE}:
            raise FailedError(f"load idle: {trouble.strip() or 'ended early'}")
    finally:
        guard.cancel()
        process.kill()
        process.communicate()
    if bed.agents:
        values["agent_mb"] = max(_settled(pid) for pid in bed.agents.values()) / 1024
    return values


def _same_node_bulk(bed: Bed, timing: Timing) -> Values:
    where = (bed.lab.addresses("neighbour")[0], BULK_PORT)
    return _iperf3(bed, timing.bulk, where)


def _same_node_requests(bed: Bed, timing: Timing) -> Values:
    return _wrk(bed, timing, bed.lab.addresses("neighbour")[0], HTTP_PORT)


def _outside(bed: Bed, timing: Timing) -> Values:
    if bed.outside is None:
        raise FailedError("this subject knows no way to a pod outside the mesh")
    return _iperf3(bed, timing.bulk, bed.outside)


_ALL: Final = frozenset({"direct", "ours", "envoy", "relay"})
_TUNNELS: Final = frozenset({"ours", "envoy"})

SCENARIOS: Final = (
    # Memory first: what later scenarios leave in the allocators is not a connection's.
    Scenario("memory", _TUNNELS, _memory),
    Scenario("bulk_send", _ALL, _bulk()),
    Scenario("bulk_receive", _ALL, _bulk("-R")),
    Scenario("bulk_8", _ALL, _bulk("-P", "8")),
    Scenario("latency", _ALL, _latency),
    Scenario("requests", _ALL, _requests),
    Scenario("connections", _ALL, _connections),
    Scenario("first_byte", _ALL, _first_byte),
    Scenario("same_node_bulk", frozenset({"direct", "ours"}), _same_node_bulk),
    Scenario("same_node_requests", frozenset({"direct", "ours"}), _same_node_requests),
    Scenario("outside_bulk", frozenset({"direct", "ours", "relay"}), _outside),
)
