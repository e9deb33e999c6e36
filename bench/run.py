"""`make bench`: measure every subject in turn, round after round, and report.

This module owns the command: rounds, order, and the files of a run. It promises that subjects are
interleaved within each round, each in fresh namespaces, and that nothing is left behind when it
ends or is told to end (SIGINT, SIGTERM).

Exit codes: 0, everything was measured and every target met; 1, something could not be measured, so
that the table has holes; 2, wrong usage; 3, everything was measured and a target was missed.
"""

from __future__ import annotations

import datetime as dt
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

import click
import msgspec

from meshbench import (
    cipher,
    decisions,
    edit,
    enormous,
    enrolment,
    figures,
    held,
    host,
    observe,
    opened,
    policy,
    report,
    scrape,
    subjects,
)
from meshbench.bed import CONGESTION_CONTROL, SYSCTLS, WORKERS, FailedError
from meshbench.model import SUBJECTS, Run, Sample, decode
from meshbench.parse import BadOutputError
from meshbench.rows import METRICS
from meshbench.scenarios import CONNECTIONS, PARALLEL, SCENARIOS, Scenario, Timing
from nodeagent.lab import LabError

ROOT: Final = Path(__file__).parents[1]
RUNS: Final = ROOT / "bench" / "runs"

ROUNDS: Final = 5
TIMING: Final = Timing(bulk=4, requests=4, connections=4)
QUICK_ROUNDS: Final = 2
QUICK_TIMING: Final = Timing(bulk=3, requests=3, connections=3)
OWN: Final = ("enrolment", "policy", "observe", "scrape")
"""Scenarios of ours alone, each in a lab of its own, in the first round."""
NOT_MEASURED: Final = 1
TARGET_MISSED: Final = 3

PATIENCE_SECONDS: Final = 3.0
"""How long each scenario waits for a quiet machine before it goes ahead and says so."""
NOISE_SHARE: Final = 0.15
"""Others' use of all processors from which on a sample counts as disturbed."""


class Bench:
    """One run in the making."""

    def __init__(
        self, tools: Path, timing: Timing, patience: float, wanted: frozenset[str]
    ) -> None:
        self._tools = tools
        self._timing = timing
        self._patience = patience
        self._wanted = wanted
        self.samples: list[Sample] = []
        self.notes: list[str] = []
        self.failed = False

    def _wants(self, scenario: str) -> bool:
        return not self._wanted or scenario in self._wanted

    def _due(self, scenario: Scenario, subject: str, number: int) -> bool:
        """Say whether a scenario is measured now; what is asked for by name is in every round."""
        if subject not in scenario.subjects or not self._wants(scenario.name):
            return False
        return bool(self._wanted) or scenario.due(number)

    def round(self, number: int, names: tuple[str, ...]) -> None:
        """Visit each subject once. Raises FailedError, LabError."""
        for subject in names:
            chosen = [one for one in SCENARIOS if self._due(one, subject, number)]
            if not chosen:
                continue
            with subjects.up(subject, self._tools) as bed:
                for scenario in chosen:
                    self._measure(
                        number, subject, scenario.name, partial(scenario.measure, bed, self._timing)
                    )
        if "ours" in names and number == 1:
            works: dict[str, Callable[[], dict[str, float]]] = {
                "enrolment": partial(enrolment.measure, self._tools, self._timing.connections),
                "policy": partial(policy.measure, self._tools),
                "observe": partial(observe.measure, self._tools, self._timing),
                "scrape": lambda: opened.measure(self._tools, self._timing) | scrape.measure(),
            }
            for name in filter(self._wants, OWN):
                self._measure(number, "ours", name, works[name])

    def _measure(
        self, number: int, subject: str, scenario: str, work: Callable[[], dict[str, float]]
    ) -> None:
        busy = host.quiet(self._patience)
        try:
            values = work()
        except (
            FailedError,
            BadOutputError,
            ProcessLookupError,
            FileNotFoundError,
            subprocess.CalledProcessError,
        ) as error:
            # Said and left out, never filled in: the other figures of the round still stand.
            self.failed = True
            self.notes.append(f"round {number}, {subject}, {scenario}: {error}")
            click.echo(f"  {subject:7} {scenario:19} FAILED: {error}", err=True)
            return
        self._keep(number, subject, scenario, values, busy)

    def _keep(
        self, number: int, subject: str, scenario: str, values: dict[str, float], busy: float
    ) -> None:
        self.samples.append(
            Sample(round=number, subject=subject, scenario=scenario, values=values, busy=busy)
        )
        shown = " ".join(f"{key}={report.number(value)}" for key, value in list(values.items())[:6])
        click.echo(f"  {subject:7} {scenario:19} {shown}", err=True)

    def disturbed(self) -> int:
        return sum(1 for sample in self.samples if sample.busy > NOISE_SHARE)


def _method(timing: Timing) -> dict[str, Any]:
    return {
        "order": "subjects in turn within each round, fresh namespaces for each",
        "bulk": f"iperf3, {timing.bulk} s after 1 s that does not count",
        "latency": f"bench/load/load latency, {timing.requests} s, one connection, answer of 1 KB",
        "requests": f"wrk, {CONNECTIONS} connections, 1 thread, {timing.requests} s",
        "connections": f"bench/load/load connect, {PARALLEL} at a time, {timing.connections} s",
        "first_byte": f"bench/load/load connect, one at a time, {timing.requests} s, right after",
        "beside_bulk": f"latency for {timing.requests} s beside one iperf3 stream, same pods",
        "memory": f"VmRSS, idle after the first requests, then with {held.IDLE} idle connections",
        "many": f"{held.MANY} connections, {held.BUSY} of them with 1 KB back and forth for "
        f"{held.WORK_SECONDS} s; VmRSS {held.CLOSED_SECONDS:.0f} s after all are closed",
        "enrolment": f"{enrolment.PODS} pods of {enrolment.IDENTITIES} service accounts in one "
        "file, until agent and tunnel both say so; connections as above, in turn before, with the "
        f"pods and once they are removed, {enrolment.WINDOWS} times each",
        "policy": f"{decisions.DECISIONS} decisions each beside {decisions.COUNTS} policies, in "
        f"one process; {edit.EDITS} edits of one file beside {enormous.WORKLOADS} workloads and "
        f"{enormous.POLICIES} policies, until a caller meets the new verdict",
        "observe": f"{observe.WINDOWS} windows each of two labs in turn: everything off, and "
        f"everything on, asked for /metrics and /stats every {observe.ASK_SECONDS} s",
        "scrape": f"{opened.OPEN} open connections of {opened.PAIRS} pairs of pods, by ztunnel's "
        f"own CPU; {scrape.LINES} series of {scrape.PODS} pods in one process",
        "rounds": {one.name: sorted(one.rounds) or "all" for one in SCENARIOS}
        | {name: [1] for name in OWN},
        "cipher": f"AES-128-GCM, {cipher.CHUNK_BYTES} bytes at a time, once sealed, once opened",
        "cpu": "utime and stime of each process; system: /proc/stat without idle",
        "congestion_control": f"{CONGESTION_CONTROL}, on every route of every pod, checked",
        "sysctls": SYSCTLS,
        "workers_per_tunnel": WORKERS,
    }


def _stop(number: int, _: object) -> None:
    raise SystemExit(128 + number)


def _prepare() -> None:
    if os.geteuid() != 0:
        raise click.ClickException("the benchmark makes network namespaces: run this as root")
    # As it is for the daemons and the load programs, so that Envoy has as many.
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    signal.signal(signal.SIGTERM, _stop)


@click.command()
@click.option("--quick", is_flag=True, help="Two shorter rounds.")
@click.option("--rounds", type=click.IntRange(1), help=f"Default: {ROUNDS}; {QUICK_ROUNDS} quick.")
@click.option("--subject", "names", multiple=True, type=click.Choice(SUBJECTS), help="Only these.")
@click.option("--scenario", "wanted", multiple=True, help="Only these (as in the samples).")
@click.option("--patience", default=PATIENCE_SECONDS, help="Seconds to wait for a quiet machine.")
@click.option("--tools", type=click.Path(path_type=Path), default=ROOT / "build" / "bench")
@click.option("--save/--no-save", default=True, help="Write the run to bench/runs.")
@click.option(
    "--show",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Measure nothing: print this run's table again, and draw its picture anew.",
)
def command(
    *,
    quick: bool,
    rounds: int | None,
    names: tuple[str, ...],
    wanted: tuple[str, ...],
    patience: float,
    tools: Path,
    save: bool,
    show: Path | None,
) -> None:
    """Measure no mesh, ours, Envoy and plaintext relays beside each other.

    Exit codes, after everything is reported: 0, all measured and all targets met; 1, a scenario
    failed; 2, wrong usage; 3, a target was missed.
    """
    if show:
        _print(run := decode(show.read_bytes()))
        show.with_suffix(".svg").write_text(report.picture(run))
        return
    scenarios = {one.name for one in SCENARIOS} | {*OWN}
    unknown = set(wanted) - scenarios
    if unknown:
        raise click.BadParameter(f"no scenario is called {', '.join(sorted(unknown))}")
    _prepare()
    started = dt.datetime.now(dt.UTC)
    began = time.monotonic()
    timing = QUICK_TIMING if quick else TIMING
    rounds = rounds or (QUICK_ROUNDS if quick else ROUNDS)
    facts = host.facts(ROOT)
    bench = Bench(tools.resolve(), timing, patience, frozenset(wanted))
    for number in range(1, rounds + 1):
        click.echo(f"round {number} of {rounds}", err=True)
        try:
            bench.round(number, names or SUBJECTS)
        except (FailedError, LabError) as error:
            raise click.ClickException(str(error)) from error
    if disturbed := bench.disturbed():
        bench.notes.append(
            f"others used more than {NOISE_SHARE:.0%} of the processors just before {disturbed} "
            f"of {len(bench.samples)} samples"
        )
    found = figures.figures(bench.samples, METRICS)
    run = Run(
        started=f"{started:%Y-%m-%dT%H:%M:%SZ}",
        seconds=round(time.monotonic() - began, 1),
        rounds=rounds,
        host=facts,
        method=_method(timing),
        notes=bench.notes,
        figures=found,
        unmeasured=figures.unmeasured(found, METRICS, wanted or scenarios),
        samples=bench.samples,
    )
    if save:
        _save(run)
    _print(run)
    if bench.failed or run.unmeasured:
        sys.exit(NOT_MEASURED)
    if any(figure.met is False for figure in run.figures):
        sys.exit(TARGET_MISSED)


def _save(run: Run) -> None:
    RUNS.mkdir(exist_ok=True)
    path = RUNS / f"{run.started.replace(':', '')}.json"
    path.write_bytes(msgspec.json.format(msgspec.json.encode(run), indent=1) + b"\n")
    path.with_suffix(".svg").write_text(report.picture(run))
    click.echo(f"samples: {path.relative_to(ROOT)}\npicture: {path.stem}.svg beside it\n")


def _print(run: Run) -> None:
    click.echo(report.table(run.figures))
    for note in run.notes:
        click.echo(f"note: {note}")
    click.echo(report.verdict(run))


if __name__ == "__main__":
    command()
