"""`nodeagent status`: is this node all right, in one line, and if not, what to do.

This module owns the command and the layout of its answer. It promises that a finding is an exit
code of 1, whatever the form. The words are those of `status_view`.
"""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any, Final, NoReturn

import click
import msgspec

from nodeagent.admin.model import SCHEMA, Status
from nodeagent.cli import clock, status_view
from nodeagent.cli.ending import ExitCode
from nodeagent.cli.output import Answer, Printer, Watch, answer, output_option, watch_options
from nodeagent.cli.reach import agent_options, get, run_directory
from nodeagent.cli.table import Tone

__all__ = ["fetch", "status"]

MAX_ANSWER: Final = 64 * 1024 * 1024
"""Bytes of a status: tens of thousands of pods fit."""


def fetch(directory: Path) -> Status:
    """Ask the daemon of a run directory. Raises UnreachableError."""
    return get(directory, "/status", Status, SCHEMA, MAX_ANSWER)


@click.command()
@agent_options
@output_option()
@watch_options
def status(run_dir: Path | None, settings_file: Path | None, output: str, watch: Watch) -> NoReturn:
    """Show whether this node is healthy, its pods, and what to do.

    \b
    Exit codes: 0 healthy; 1 a finding; 2 wrong usage; 3 the agent cannot be
    reached.
    """
    directory = run_directory(run_dir, settings_file)
    answer(lambda: _look(directory), output, watch)


def _look(directory: Path) -> Answer:
    found = fetch(directory)
    now = clock.now()
    findings = status_view.findings(found, now)
    document: dict[str, Any] = msgspec.to_builtins(found, str_keys=True)
    document["findings"] = msgspec.to_builtins(findings)
    healthy = found.ready and not findings
    return Answer(
        document,
        lambda printer: _people(printer, found, findings, now),
        ExitCode.FINE if healthy else ExitCode.FINDING,
    )


def _people(
    printer: Printer, found: Status, findings: tuple[status_view.Finding, ...], now: datetime
) -> None:
    healthy = found.ready and not findings
    printer.line(status_view.verdict(found, findings), Tone.GOOD if healthy else Tone.BAD)
    columns, rows = status_view.pod_rows(found, now, None, wide=printer.wide)
    if rows:
        printer.line()
        printer.table(columns, rows)
        if any(pod.port_modes for pod in found.pods):
            printer.line("* some ports have another mode: -o json shows them")
    for note in status_view.notes(found):
        printer.line()
        printer.text(note)
    _listed(printer, "Replaced and still serving:", status_view.drain_lines(found, now))
    if findings:
        printer.line()
        printer.line("Findings:")
        for finding in findings:
            printer.text(f"{finding.code}: {finding.text}", 2)
            printer.text(f"do: {finding.remedy}", 4)
    _listed(
        printer,
        "Policies that are not enforced as they are written:",
        status_view.unenforced_lines(found),
    )
    _listed(printer, "Warnings:", found.config.warnings)


def _listed(printer: Printer, heading: str, lines: tuple[str, ...]) -> None:
    if not lines:
        return
    printer.line()
    printer.line(heading)
    for line in lines:
        printer.text(line, 2)
