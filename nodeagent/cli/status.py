"""`nodeagent status`: is this node all right, in one line, and if not, what to do.

This module owns the command's options, its exit codes and the way to the daemon. It promises the
same exit code with every output form, one document on standard output and everything else on
standard error. The words are those of `status_view`.
"""

from __future__ import annotations

import enum
import http.client
import os
import socket
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
from nodeagent.api import ConfigError
from nodeagent.cli import status_view
from nodeagent.rundir import ADMIN_SOCKET
from nodeagent.settings import Settings, load_settings

__all__ = ["ExitCode", "status"]

ANSWER_SECONDS: Final = 10.0
"""The daemon itself waits at most a few seconds for ztunnel's part."""

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
    UNREACHABLE = 3


class UnreachableError(Exception):
    """The daemon did not answer; the message is the cause, `remedy` what to do."""

    def __init__(self, cause: str, remedy: str) -> None:
        super().__init__(cause)
        self.remedy = remedy


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=ANSWER_SECONDS)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(ANSWER_SECONDS)
        self.sock.connect(os.fspath(self._path))


def fetch(path: Path) -> Status:
    """Ask the daemon at the admin socket `path`. Raises UnreachableError."""
    connection = _UnixConnection(path)
    try:
        connection.request("GET", "/status")
        response = connection.getresponse()
        body = response.read(MAX_ANSWER + 1)
    except FileNotFoundError as error:
        raise UnreachableError(
            f"nodeagent does not run here: no {path}",
            "start it (systemctl start nodeagent), or name its run directory with --run-dir",
        ) from error
    except PermissionError as error:
        raise UnreachableError(f"{path}: permission denied", "run this command as root") from error
    except ConnectionRefusedError as error:
        raise UnreachableError(
            f"nodeagent has stopped without cleaning up: nobody listens on {path}",
            "journalctl -u nodeagent; systemctl start nodeagent",
        ) from error
    except TimeoutError as error:
        raise UnreachableError(
            f"nodeagent did not answer within {ANSWER_SECONDS:g} s",
            "journalctl -u nodeagent; systemctl restart nodeagent (connections stay)",
        ) from error
    except (OSError, http.client.HTTPException) as error:
        raise UnreachableError(f"{path}: {error}", "journalctl -u nodeagent") from error
    finally:
        connection.close()
    if response.status != http.HTTPStatus.OK or len(body) > MAX_ANSWER:
        raise UnreachableError(
            f"nodeagent answered {response.status}: {body[:200].decode(errors='replace').strip()}",
            "journalctl -u nodeagent",
        )
    try:
        schema = msgspec.json.decode(body, type=_SchemaOnly).schema
        if schema != SCHEMA:
            raise UnreachableError(
                f"the daemon speaks status schema {schema}, this command {SCHEMA}",
                "use the nodeagent command of the daemon's own release",
            )
        return msgspec.json.decode(body, type=Status)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise UnreachableError(
            f"nodeagent's answer is not understood: {error}",
            "use the nodeagent command of the daemon's own release",
        ) from error


class _SchemaOnly(msgspec.Struct):
    schema: int


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
    directory = _run_directory(run_dir, settings_file)
    try:
        found = fetch(directory / ADMIN_SOCKET)
    except UnreachableError as error:
        click.echo(f"error: {error}\n  do: {error.remedy}", err=True)
        sys.exit(ExitCode.UNREACHABLE)
    now = datetime.now(UTC)
    findings = status_view.findings(found, now)
    if output in {"json", "yaml"}:
        _document(found, findings, output)
    else:
        _people(found, findings, now, wide=output == "wide")
    healthy = found.ready and not findings
    sys.exit(ExitCode.HEALTHY if healthy else ExitCode.FINDING)


def _run_directory(run_dir: Path | None, settings_file: Path | None) -> Path:
    if run_dir is not None and settings_file is not None:
        raise click.UsageError("--run-dir and --settings exclude each other")
    if run_dir is not None:
        return run_dir
    if settings_file is None:
        return Settings().run_dir
    try:
        return load_settings(settings_file).run_dir
    except ConfigError as error:
        raise click.UsageError(str(error)) from error


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
    headings, rows = status_view.pod_rows(found, now, None, wide=wide)
    if rows:
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
    if found.config.warnings:
        console.print("\nWarnings:")
        _lines(console, found.config.warnings)


def _lines(console: Console, lines: Iterable[str]) -> None:
    for line in lines:
        _indented(console, line, 2)


def _indented(console: Console, text: str, columns: int) -> None:
    # Folded for a person; a line of its own for whatever reads a pipe.
    if console.is_terminal:
        console.print(Padding(Text(text), (0, 0, 0, columns)))
    else:
        console.print(" " * columns + text, soft_wrap=True)
