"""The scenarios: what is asked of a subject, and the numbers that come of it.

This module owns what is measured and in which order. It promises the same work for every subject,
and values named as `figures` expects them. It may not know how a subject is built.
"""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Callable
from typing import Final

import msgspec

from meshbench import cipher, held, host, parse
from meshbench.bed import BULK_PORT, CONGESTION_CONTROL, HTTP_PORT, Bed, FailedError

__all__ = ["SCENARIOS", "Scenario", "Timing"]

CONNECTIONS: Final = 64
PARALLEL: Final = 32

BESIDE_SECONDS: Final = 3
"""How much longer the stream runs than the requests beside it."""
READY_SECONDS: Final = 20.0
READY_STEP_SECONDS: Final = 0.05
"""Between two looks at the pod's connections: iperf3 says nothing before the end of its JSON, and
the kernel tells nobody of a connection that another program opens."""

Values = dict[str, float]


class Timing(msgspec.Struct, frozen=True):
    """How long each scenario runs, in whole seconds."""

    bulk: int
    requests: int
    connections: int


class Scenario(msgspec.Struct, frozen=True):
    """A scenario of this name; only `subjects` meet it, in each round or only in `rounds`."""

    name: str
    subjects: frozenset[str]
    measure: Callable[[Bed, Timing], Values]
    rounds: frozenset[int] = frozenset()

    def due(self, number: int) -> bool:
        return not self.rounds or number in self.rounds


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


def _cipher(_: Bed, __: Timing) -> Values:
    return cipher.measure()


def _memory(bed: Bed, _: Timing) -> Values:
    return held.idle(bed)


def _many(bed: Bed, _: Timing) -> Values:
    return held.many(bed)


def _flowing(bed: Bed) -> None:
    """Wait until iperf3 has both its connections: the one for control, and the one with data.

    Raises FailedError.
    """
    deadline = time.monotonic() + READY_SECONDS
    argv = ["ss", "-tnH", "state", "established", "dst", bed.server, "dport", f"= :{bed.bulk_port}"]
    while len(bed.run("client", argv).splitlines()) < 2:
        if time.monotonic() > deadline:
            raise FailedError(f"iperf3 did not connect to {bed.server} in {READY_SECONDS:.0f} s")
        time.sleep(READY_STEP_SECONDS)


def _beside_bulk(bed: Bed, timing: Timing) -> Values:
    """One request at a time between the same two pods, beside a stream that takes all it gets."""
    seconds = str(timing.requests + BESIDE_SECONDS)
    argv = ["iperf3", "--json", "-c", bed.server, "-p", str(bed.bulk_port), "-t", seconds]
    with bed.popen("client", argv, stdout=subprocess.PIPE, text=True) as bulk:
        try:
            _flowing(bed)
            values = bed.load("latency", str(timing.requests))
            if bulk.poll() is not None:
                raise FailedError("the bulk stream ended before the requests did")
            said = bulk.communicate(timeout=READY_SECONDS)[0]
        except subprocess.TimeoutExpired:
            raise FailedError(f"iperf3 did not end in {READY_SECONDS:.0f} s") from None
        finally:
            bulk.kill()
    return values | {"gbit_per_second": parse.iperf3(said)["gbit_per_second"]}


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
    # Memory first: what later scenarios leave in the allocators is not a connection's. In rounds
    # of their own, as these two take longest, hardly vary, and need tunnels that did nothing yet.
    Scenario("memory", _TUNNELS, _memory, frozenset({1, 3})),
    Scenario("many", _TUNNELS, _many, frozenset({2})),
    Scenario("cipher", frozenset({"relay"}), _cipher),
    Scenario("bulk_send", _ALL, _bulk()),
    Scenario("bulk_receive", _ALL, _bulk("-R")),
    Scenario("bulk_8", _ALL, _bulk("-P", "8")),
    Scenario("latency", _ALL, _latency),
    Scenario("beside_bulk", _ALL, _beside_bulk),
    Scenario("requests", _ALL, _requests),
    Scenario("connections", _ALL, _connections),
    Scenario("first_byte", _ALL, _first_byte),
    Scenario("same_node_bulk", frozenset({"direct", "ours"}), _same_node_bulk),
    Scenario("same_node_requests", frozenset({"direct", "ours"}), _same_node_requests),
    Scenario("outside_bulk", frozenset({"direct", "ours", "relay"}), _outside),
)
