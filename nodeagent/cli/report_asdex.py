"""`nodeagent report asdex`: how well are the connections to this node's workloads protected?

This module owns the command and its words. It promises that every score stands beside what it has
lost and by whom, and that the exit code says whether the score is at least what was asked for. The
formula is that of `nodeagent.observe.asdex`.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Final, NoReturn

import click
import msgspec

from nodeagent.cli.ending import ExitCode
from nodeagent.cli.output import Answer, Printer, Watch, answer, output_option, watch_options
from nodeagent.cli.reach import agent_options, get, run_directory
from nodeagent.cli.report import age, named, picking_options
from nodeagent.cli.since import since_option
from nodeagent.cli.table import Cell, Column, Tone
from nodeagent.cli.text import duration, many, moment
from nodeagent.observe.asdex import score
from nodeagent.observe.asdex_model import SCHEMA, AsdexReport, AsdexWorkload, Loss

__all__ = ["asdex"]

MAX_ANSWER: Final = 64 * 1024 * 1024
"""Bytes: thousands of workloads, each with as many losses as are named."""

MOST_LOSSES: Final = 3
"""Of one workload that are shown; `-o wide` shows all."""

GOOD: Final = 0.8
"""From here on a score is not shown as bad: attested, and by a policy that names who may call."""

NO_DATA: Final = "no data"

SHOWN: Final = 0.01
"""What two digits show at least."""


@click.command()
@picking_options
@since_option("1h", "How far back connections matter")
@click.option(
    "--least",
    type=click.FloatRange(0, 1),
    metavar="SCORE",
    help="Fail if any of the workloads has a lower score, or none.",
)
@agent_options
@output_option()
@watch_options
def asdex(
    names: tuple[str, ...],
    namespaces: tuple[str, ...],
    since: datetime,
    least: float | None,
    run_dir: Path | None,
    settings_file: Path | None,
    output: str,
    watch: Watch,
) -> NoReturn:
    """Score how well connections to this node's workloads are protected, 0.00 to 1.00.

    Of 100 points a connection that was let in has 50 for an attested identity, 30 if a policy that
    names who may call let it in, and 5 each if it was encrypted, no caller without identity could
    have come the same way, the rule has no patterns, and the certificate lives a day at most.
    Without an identity it has none. What costs how much stands below each score.

    \b
    Exit codes:
      0 there is an answer; with --least: every score is at least that
      1 with --least: one is lower, or there were no connections
      2 wrong usage, or a workload that is not of this node
      3 the agent cannot be reached
    """
    directory = run_directory(run_dir, settings_file)

    def look() -> Answer:
        resource = f"/asdex?seconds={age(since)}"
        found = get(directory, resource, AsdexReport, SCHEMA, MAX_ANSWER)
        picked = _picked(found, names, namespaces)
        low = least is not None and any(
            each.score is None or each.score < least for each in picked.workloads
        )
        code = ExitCode.FINDING if low else ExitCode.FINE
        return Answer(picked, lambda printer: _show(printer, picked), code)

    answer(look, output, watch)


def _picked(found: AsdexReport, names: tuple[str, ...], namespaces: tuple[str, ...]) -> AsdexReport:
    """Return the report of those that are asked for. Raises RefusedInputError."""
    if not names and not namespaces:
        return found
    wanted = named((each.workload for each in found.workloads), names, namespaces)
    workloads = tuple(each for each in found.workloads if each.workload in wanted)
    points = sum(each.points for each in workloads)
    connections = sum(each.connections for each in workloads)
    return msgspec.structs.replace(
        found,
        workloads=workloads,
        namespaces=tuple(each for each in found.namespaces if each.namespace in namespaces),
        score=score(points, connections),
        points=points,
        connections=connections,
    )


def _show(printer: Printer, report: AsdexReport) -> None:
    what = many(len(report.workloads), "workload")
    printer.text(
        f"ASDEX {_score(report.score)} of {what} of {report.node}, by "
        f"{many(report.connections, 'connection')}",
        tone=_tone(report.score),
    )
    ago = duration((report.time - report.since).total_seconds())
    gap = "" if report.complete else "; NOT ALL of that time is recorded"
    problem = f": {report.problem}" if report.problem else ""
    printer.text(f"Connections of the last {ago}, since {moment(report.since)}{gap}{problem}")
    if not report.workloads:
        return
    printer.line()
    columns = [
        Column("NAME"),
        Column("ASDEX", right=True, folds=False),
        Column("CONNECTIONS", right=True, folds=False),
        Column("MOST LOST BY"),
    ]
    rows: list[Sequence[Cell | str]] = [
        [each.workload, *_numbers(each.score, each.connections), _most(each)]
        for each in report.workloads
    ]
    rows += [
        [f"namespace {each.namespace}", *_numbers(each.score, each.connections), "-"]
        for each in report.namespaces
    ]
    printer.table(columns, rows)
    for each in report.workloads:
        _losses(printer, each)


def _numbers(value: float | None, connections: int) -> tuple[Cell, str]:
    return Cell(_score(value), _tone(value)), str(connections)


def _score(value: float | None) -> str:
    return NO_DATA if value is None else f"{value:.2f}"


def _tone(value: float | None) -> Tone:
    if value is None:
        return Tone.FAINT
    if value >= GOOD:
        return Tone.GOOD
    return Tone.BAD if value == 0 else Tone.CAREFUL


def _most(each: AsdexWorkload) -> str:
    if not each.losses:
        return "nothing" if each.connections else "-"
    return f"{each.losses[0].reason} ({_cost(each.losses[0].cost)})"


def _losses(printer: Printer, each: AsdexWorkload) -> None:
    if not each.losses:
        return
    shown = each.losses if printer.wide else each.losses[:MOST_LOSSES]
    printer.line()
    printer.line(f"{each.workload}: {_score(each.score)}, lost by")
    for loss in shown:
        printer.text(_loss(loss), 2)
    left = sum(loss.cost for loss in each.losses[len(shown) :]) + each.left_out
    if left:
        more = "" if printer.wide else " (-o wide)"
        printer.text(f"{_cost(left)} others{more}", 2)


def _loss(loss: Loss) -> str:
    who = f"{loss.caller}: " if loss.caller else ""
    by = f", by {loss.policy}" if loss.policy else ""
    calls = many(loss.connections, "connection")
    return f"{_cost(loss.cost)} {loss.check.value}: {who}{loss.reason}{by} ({calls})"


def _cost(cost: float) -> str:
    # What is lost is never shown as nothing.
    return f"-{cost:.2f}" if cost >= SHOWN else "-<0.01"
