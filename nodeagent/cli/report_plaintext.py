"""`nodeagent report plaintext`: who calls without identity, and is it safe to switch to STRICT?

This module owns the command and which workloads its answer is about. It promises that the exit code
is 0 only if STRICT is safe for all that are asked for, in every form of the answer. The words are
those of `report_plaintext_view`.
"""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Final, NoReturn

import click
import msgspec

from nodeagent.cli.ending import ExitCode
from nodeagent.cli.output import Answer, Watch, answer, output_option, watch_options
from nodeagent.cli.reach import agent_options, get, run_directory
from nodeagent.cli.report import age, named, picking_options
from nodeagent.cli.report_plaintext_view import show
from nodeagent.cli.since import since_option
from nodeagent.observe.plaintext_model import SCHEMA, PlaintextReport, Verdict, worst

__all__ = ["plaintext"]

MAX_ANSWER: Final = 128 * 1024 * 1024
"""Bytes: as many callers as are read of the file, each with the longest names that occur."""


@click.command()
@picking_options
@since_option("7d", "How far back callers matter")
@agent_options
@output_option()
@watch_options
def plaintext(
    names: tuple[str, ...],
    namespaces: tuple[str, ...],
    since: datetime,
    run_dir: Path | None,
    settings_file: Path | None,
    output: str,
    watch: Watch,
) -> NoReturn:
    """Say who has called without an identity, and whether STRICT would lock anybody out.

    Every caller of the time that is asked for is judged again as if its workload were STRICT.
    "Safe" is a fact about all of that time: where the recording has a gap, or a workload was not
    captured yet, the answer is "not known", and since when it would be.

    \b
    Exit codes:
      0 STRICT is safe for all that are asked for
      1 it is not, or it is not known
      2 wrong usage, or a workload that is not of this node
      3 the agent cannot be reached
    """
    directory = run_directory(run_dir, settings_file)

    def look() -> Answer:
        resource = f"/report/plaintext?seconds={age(since)}"
        found = get(directory, resource, PlaintextReport, SCHEMA, MAX_ANSWER)
        picked = _picked(found, names, namespaces)
        code = ExitCode.FINE if picked.verdict is Verdict.SAFE else ExitCode.FINDING
        return Answer(picked, lambda printer: show(printer, picked), code)

    answer(look, output, watch)


def _picked(
    found: PlaintextReport, names: tuple[str, ...], namespaces: tuple[str, ...]
) -> PlaintextReport:
    """Return the report of those that are asked for. Raises RefusedInputError."""
    wanted = named((each.workload for each in found.workloads), names, namespaces)
    workloads = tuple(each for each in found.workloads if each.workload in wanted)
    # Of a namespace all, or what is said of it would be about another set.
    whole = namespaces or ({each.namespace for each in workloads} if not names else ())
    return msgspec.structs.replace(
        found,
        workloads=workloads,
        namespaces=tuple(each for each in found.namespaces if each.namespace in whole),
        verdict=worst(each.verdict for each in workloads),
    )
