"""`make soak`: mixed load and faults for a long while, and whether anything is left behind.

This module owns the command: the lab, the rounds, the table and the verdict. A run has rounds; in
each there is load of every kind with faults among it, then rest until no connection is left, then a
sample of all four daemons. Daemons are killed, upgraded and restarted in the first half of the
rounds only, in each way at least once, so that the processes which are there at the end have lived
through the second half. Flat means: the last sample of each process against the first of the same
process that was taken after a whole round of load.

Exit codes: 0, every byte was right, every failed connection is accounted for, and all is flat; 1,
not so; 2, wrong usage.
"""

from __future__ import annotations

import os
import resource
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Final

import click

from nodeagent.cli.run import SLOW_THREADS
from nodeagent.lab import Lab, namespaces
from nodeagent.pods import threads
from soak.faults import PLAIN, Faults, judge
from soak.resources import KB, Bounds, Sample, growth, sample
from soak.traffic import BULK, PATIENCE, Ledger, Shape, Traffic
from support.e2e import Mesh, running, spec
from support.netns import wait_until

__all__ = ["Report", "soak"]

PIPES_A_WORKER: Final = 2 * 64
"""Descriptors of ZT_PIPE_POOL pipes, in _core/base.h."""

MAIN_THREAD: Final = 1
WATCH_THREADS: Final = 2
"""watchfiles' own (inotify), and the one that waits for it."""
FLOWS_THREAD: Final = 1
"""Writes the callers that are recorded."""

BOUNDS: Final = {
    "nodeagent": Bounds(
        threads=MAIN_THREAD + WATCH_THREADS + FLOWS_THREAD + threads.THREADS + SLOW_THREADS
    ),
    "ztunnel": Bounds(pipes=PIPES_A_WORKER * len(os.sched_getaffinity(0))),
}

PORT: Final = 7000

SVID_SECONDS: Final = 60
"""The shortest lifetime that the settings allow: renewals every 40 s."""

SETTINGS: Final = {
    "svid_ttl_seconds": SVID_SECONDS,
    # So that rest, without any connection, comes within seconds after the load.
    "deadlines": {"idle": 5, "ping_interval": 1},
}

REST_SECONDS: Final = 90.0
"""For the last HBONE connection to close, on a busy machine."""

LEAST_ROUNDS: Final = 4
ROUND_SECONDS: Final = 100.0
"""Of load, in a long run: longer than a certificate lives."""

STRICT_SECONDS: Final = 2.0
STRICT_TURNS: Final = 3
"""Every third disturbance is STRICT, while there are others."""
MB: Final = 1 << 20

KINDS: Final[tuple[tuple[str, str, str, Shape, int, float], ...]] = (
    # kind, from, to, shape, at a time, seconds between two
    ("bulk both ways", "client", "far", Shape(48 * MB, 48 * MB, how=BULK), 1, 0.2),
    ("bulk back", "client", "far", Shape(1, 24 * MB), 1, 0.5),
    ("requests", "client", "far", Shape(1024, 1024, 300), 4, 0.05),
    ("large requests", "near", "far", Shape(300_001, 70_001, 10), 2, 0.1),
    ("new connections", "client", "far", Shape(100, 1024), 4, 0.01),
    ("same node", "client", "near", Shape(1024, 4096, 50), 2, 0.05),
    ("outside the mesh", "client", "outsider", Shape(2 * MB, 2 * MB, how=BULK), 2, 0.1),
    (PLAIN, "outsider", "far", Shape(1024, 1024, 5), 2, 0.05),
)


@dataclass
class Report:
    """What a soak found. `problems` is empty when all is well."""

    samples: list[dict[str, Sample]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    excused: Counter[str] = field(default_factory=Counter)
    ledger: Ledger = field(default_factory=Ledger)
    done: Counter[str] = field(default_factory=Counter)

    def table(self) -> Iterator[str]:
        """Yield the lines that are printed."""
        yield f"{'at rest after round':22}" + "".join(
            f"{number:>16}" for number in range(1, len(self.samples) + 1)
        )
        for name in self.samples[0] if self.samples else ():
            yield f"{name:22}" + "".join(f"{_cell(each[name]):>16}" for each in self.samples)
        yield "(MiB resident, descriptors + those of pipes, threads)"
        for kind, count in sorted(self.ledger.succeeded.items()):
            yield f"{count:>10,} connections: {kind}"
        yield f"{self.ledger.bytes / MB:>10,.0f} MiB, every byte compared"
        for what, count in sorted(self.done.items()):
            yield f"{count:>10,} times: {what}"
        for excuse, count in sorted(self.excused.items()):
            yield f"{count:>10,} connections failed, rightly: {excuse}"


def _cell(found: Sample) -> str:
    return f"{found.memory / KB:.1f} {found.descriptors}+{found.pipes} {found.threads}"


class _Soak:
    def __init__(self, lab: Lab, mesh: Mesh, say: Callable[[str], None]) -> None:
        self._lab = lab
        self._mesh = mesh
        self._say = say
        self.report = Report()
        self._faults = Faults(mesh)
        self._traffic = Traffic(self.report.ledger)
        self._turn = 0
        self._expiries: set[float] = set()

    def run(self, rounds: int, seconds: float) -> None:
        for pod in ("far", "near", "outsider"):
            listener = self._mesh.listen(pod, PORT)
            listener.settimeout(None)
            self._traffic.serve(listener)
        try:
            for number in range(rounds):
                half = rounds // 2
                self._round(number, seconds, faults=number < half, all_faults=number == half - 1)
        finally:
            self._traffic.close()
        self.report.done = self._faults.done
        self.report.done["certificate renewed"] = max(0, len(self._expiries) - 3)
        self.report.excused, wrong = judge(self.report.ledger, self._faults)
        self.report.problems += wrong
        self._compare()

    def _round(self, number: int, seconds: float, *, faults: bool, all_faults: bool) -> None:
        for kind, source, target, shape, many, pause in KINDS:
            connect = partial(self._connect, source, self._mesh.address(target))
            for _ in range(many):
                self._traffic.run(kind, connect, shape, keep=kind == PLAIN, pause=pause)
        end = time.monotonic() + seconds
        while time.monotonic() < end or (all_faults and self._missing()):
            self._disturb(faults=faults)
            self._look()
            time.sleep(min(1.0, max(0.0, end - time.monotonic())))  # the soak's own rhythm
        self._traffic.pause()
        self._rest()
        last = sample(self._pids(), lambda found: not any(self._grown(found).values()))
        self.report.samples.append(last)
        self._say(
            f"round {number + 1}: "
            + ", ".join(f"{name} {_cell(found)}" for name, found in last.items())
            + f"; {self.report.ledger.succeeded.total():,} connections,"
            f" {self.report.ledger.bytes / MB:,.0f} MiB, {len(self.report.ledger.wrong)} wrong"
        )

    def _disturb(self, *, faults: bool) -> None:
        """One thing: every fault in turn, on each node in turn, with edits of policy between."""
        self._turn += 1
        if self._turn % STRICT_TURNS == 0 or not faults:
            self._faults.strict(STRICT_SECONDS)
            return
        kinds = list(self._faults.kinds)
        turn, which = divmod(self._turn - self._turn // STRICT_TURNS - 1, len(kinds))
        nodes = self._lab.nodes
        self._faults.do(kinds[which], nodes[(turn + which) % len(nodes)])

    def _missing(self) -> bool:
        """Whether a fault has not been done yet."""
        return not self._faults.kinds.keys() <= self._faults.done.keys()

    def _look(self) -> None:
        """Note the certificates that are shown now."""
        text = self._lab.node("node-1").metrics() + self._lab.node("node-2").metrics()
        self._expiries |= {
            float(line.rpartition(" ")[2])
            for line in text.splitlines()
            if line.startswith("ztunnel_svid_expiry_timestamp_seconds{")
        }

    def _connect(self, pod: str, address: str) -> socket.socket:
        # Not by the mesh, which keeps every socket to its end.
        sock = _socket_in(self._mesh, pod)
        sock.settimeout(PATIENCE)
        try:
            sock.connect((address, PORT))
        except OSError:
            sock.close()
            raise
        return sock

    def _pids(self) -> dict[str, int]:
        nodes = self._lab.nodes
        agents = {f"{node.name} nodeagent": node.process("nodeagent").pid for node in nodes}
        tunnels = {f"{node.name} ztunnel": self._faults.serving(node.name).pid for node in nodes}
        return agents | tunnels

    def _rest(self) -> None:
        """Wait until both tunnels carry nothing, hold no HBONE connection, and are alone."""
        for node in self._lab.nodes:
            wait_until(
                partial(self._faults.drained, node.name),
                f"nobody drains on {node.name}",
                REST_SECONDS,
            )
        for pod in ("client", "far"):  # one on each node
            wait_until(
                partial(self._quiet, pod), f"the node of {pod} carries nothing", REST_SECONDS
            )

    def _quiet(self, pod: str) -> bool:
        names = ("ztunnel_connections", "ztunnel_hbone_connections")
        return all(self._mesh.count(pod, name) == 0 for name in names)

    def _grown(self, last: dict[str, Sample]) -> dict[str, list[str]]:
        """Return for each daemon in what it has grown since its warm-up, if it was sampled then."""
        found: dict[str, list[str]] = {}
        for name, now in last.items():
            same = [
                each[name]
                for each in self.report.samples
                if each is not last and each[name].pid == now.pid
            ]
            # The round in which it was started is its warm-up.
            first = same[1] if len(same) > 1 else (same or [now])[0]
            found[name] = growth(first, now, BOUNDS[name.split()[1]])
        return found

    def _compare(self) -> None:
        *before, last = self.report.samples
        self.report.problems += [
            f"{name}: {each}" for name, grown in self._grown(last).items() for each in grown
        ]
        for name, now in last.items():
            if all(each[name].pid != now.pid for each in before):
                self.report.problems.append(f"{name}: one sample only: nothing is shown by it")


def _socket_in(mesh: Mesh, pod: str) -> socket.socket:
    """Return a socket of a pod, which is the caller's."""
    return namespaces.run_in(mesh.space(pod), lambda: socket.socket(socket.AF_INET))


def soak(minutes: float, say: Callable[[str], None]) -> Report:
    """Build a lab, soak it for about so long, and remove it."""
    seconds = minutes * 60
    rounds = max(LEAST_ROUNDS, round(seconds / (ROUND_SECONDS * 1.2)))
    pods = ("client", "near", "far", "outsider")
    described = spec(settings=SETTINGS, pods=pods, apps=False)
    with running(described) as lab, Mesh(lab) as mesh:
        made = _Soak(lab, mesh, say)
        made.run(rounds, seconds / rounds / 1.2)
        return made.report


@click.command()
@click.option("--minutes", type=click.FloatRange(0.5), default=20.0, show_default=True)
def command(*, minutes: float) -> None:
    """Soak both daemons on two nodes, and say whether anything is left behind."""
    if os.geteuid() != 0:
        raise click.ClickException("the soak makes network namespaces: run this as root")
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    report = soak(minutes, lambda text: click.echo(text, err=True))
    click.echo("\n".join(report.table()))
    for problem in report.problems:
        click.echo(f"WRONG: {problem}")
    click.echo("not well" if report.problems else "flat, and every byte right")
    sys.exit(1 if report.problems else 0)


if __name__ == "__main__":
    command()
