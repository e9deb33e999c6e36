"""`nodeagent status`: is this node all right, in one line, and if not, what to do.

This module owns the command's options and its exit codes. It promises the same exit code with every
output form, one document on standard output and everything else on standard error. The words are
those of `status_view`.
"""

from __future__ import annotations

import enum
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, NoReturn

import click
import msgspec
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from nodeagent.admin.model import SCHEMA, Status
from nodeagent.cli import status_view
from nodeagent.cli.reach import EXIT_UNREACHABLE, UnreachableError, get, report, run_directory

__all__ = ["ExitCode", "status"]

MAX_ANSWER: Final = 64 * 1024 * 1024
"""Bytes of a status: tens of thousands of pods fit."""

PLAIN_WIDTH: Final = 80
"""Columns when standard output is no terminal."""

WIDE_WIDTH: Final = 10_000
"""Columns with `-o wide`: nothing is folded, as with kubectl."""


class ExitCode(enum.IntEnum):
    """What a script may rely on."""

    HEALTHY = 0
    FINDING = 1
    USAGE = 2
    UNREACHABLE = EXIT_UNREACHABLE


def fetch(directory: Path) -> Status:
    """Ask the daemon of a run directory. Raises UnreachableError."""
    return get(directory, "/status", Status, SCHEMA, MAX_ANSWER)


@click.command()
@click.option(
    "--run-dir",
    type=click.Path(path_type=Path),
    help="The daemon's run directory.  [/run/nodeagent]",
)
@click.option(
    "--settings",
    "settings_file",
    type=click.Path(path_type=Path),
    help="Take the run directory from this settings file.",
)
@click.option(
    "-o",
    "--output",
    type=click.Choice(["table", "wide", "json", "yaml"]),
    default="table",
    help="Form of the answer.  [table]",
)
def status(run_dir: Path | None, settings_file: Path | None, output: str) -> NoReturn:
    """Show whether this node is healthy, its pods, and what to do.

    Exits 0 when healthy, 1 with a finding, 2 on wrong usage, 3 when the daemon cannot be reached.
    """
    directory = run_directory(run_dir, settings_file)
    try:
        found = fetch(directory)
    except UnreachableError as error:
        report(error)
        sys.exit(ExitCode.UNREACHABLE)
    now = datetime.now(UTC)
    findings = status_view.findings(found, now)
    if output in {"json", "yaml"}:
        _document(found, findings, output)
    else:
        _people(found, findings, now, wide=output == "wide")
    healthy = found.ready and not findings
    sys.exit(ExitCode.HEALTHY if healthy else ExitCode.FINDING)


def _document(found: Status, findings: tuple[status_view.Finding, ...], output: str) -> None:
    document: dict[str, Any] = msgspec.to_builtins(found, str_keys=True)
    document["findings"] = msgspec.to_builtins(findings)
    if output == "json":
        text = msgspec.json.format(msgspec.json.encode(document), indent=2).decode()
    else:
        text = msgspec.yaml.encode(document).decode().rstrip("\n")
    click.echo(text)


def _people(
    found: Status, findings: tuple[status_view.Finding, ...], now: datetime, *, wide: bool
) -> None:
    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=False)
    if wide:
        console.width = WIDE_WIDTH
    elif not console.is_terminal:
        console.width = PLAIN_WIDTH
    healthy = found.ready and not findings
    console.print(Text(status_view.verdict(found, findings), "green" if healthy else "bold red"))
    _pods(console, found, now, wide=wide)
    for note in status_view.notes(found):
        console.print()
        _indented(console, note, 0)
    drains = status_view.drain_lines(found, now)
    if drains:
        console.print("\nReplaced and still serving:")
        _lines(console, drains)
    if findings:
        console.print("\nFindings:")
        for finding in findings:
            _indented(console, f"{finding.code}: {finding.text}", 2)
            _indented(console, f"do: {finding.remedy}", 4)
    for heading, lines in (
        (
            "Policies that are not enforced as they are written:",
            status_view.unenforced_lines(found),
        ),
        ("Warnings:", found.config.warnings),
    ):
        if lines:
            console.print(f"\n{heading}")
            _lines(console, lines)


def _pods(console: Console, found: Status, now: datetime, *, wide: bool) -> None:
    headings, rows = status_view.pod_rows(found, now, None, wide=wide)
    if not rows:
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="")
    for heading in headings:
        table.add_column(heading, overflow="fold", no_wrap=wide)
    state = headings.index("STATE")
    for row in rows:
        cells = [Text(cell) for cell in row.cells]
        cells[state].stylize("green" if row.good else "red")
        table.add_row(*cells)
    console.print()
    console.print(table)
    if any(pod.port_modes for pod in found.pods):
        console.print("* some ports have another mode: -o json shows them")


def _lines(console: Console, lines: Iterable[str]) -> None:
    for line in lines:
        _indented(console, line, 2)


def _indented(console: Console, text: str, columns: int) -> None:
    # Folded for a person; a line of its own for whatever reads a pipe.
    if console.is_terminal:
        console.print(Padding(Text(text), (0, 0, 0, columns)))
    else:
        console.print(" " * columns + text, soft_wrap=True)
