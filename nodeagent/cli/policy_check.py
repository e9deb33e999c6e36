"""`nodeagent policy check`: would the agent take these documents?

This module owns the command's options and the words of the answer. It promises that a file is
judged exactly as the agent judges it, all files together; that every finding names its file, line
and field; the same exit code in every output form; and that nothing is changed. It may not talk to
a daemon.

Exit codes: 0, all documents would be in force as they stand; 1, at least one would not, or refers
to what is not there; 2, wrong usage, or a file that is not there.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import click
import msgspec

from nodeagent import mesh, offline
from nodeagent.api import ConfigError
from nodeagent.cli import RefusedInputError
from nodeagent.cli.output import DOCUMENTS, output_option, write_document
from nodeagent.cli.policy import settings_of, settings_option
from nodeagent.cli.text import many, printable
from nodeagent.settings import Settings

__all__ = ["Finding", "Report", "check", "check_documents"]

SCHEMA: Final = 1
"""Of the JSON: fields are only added."""

EXIT_FINDING: Final = 1


class Finding(msgspec.Struct, frozen=True):
    """What is wrong where; `line` and `column` count from 1, and are 0 for a whole file."""

    file: str
    line: int
    column: int
    field: str
    reason: str

    @classmethod
    def of(cls, error: ConfigError) -> Finding:
        return cls(error.file, error.line, error.column, error.field, error.reason)

    def __str__(self) -> str:
        return str(ConfigError(self.file, self.line, self.column, self.field, self.reason))


class Report(msgspec.Struct, frozen=True):
    files: int
    documents: int
    errors: tuple[Finding, ...]
    warnings: tuple[str, ...]
    schema: int = SCHEMA


@click.command()
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@settings_option
@output_option(("text",))
def check(files: tuple[str, ...], settings_file: Path | None, output: str) -> None:
    """Validate documents: would the agent take them, and what would have no effect?

    FILE is a file, a directory (its *.yaml, *.yml and *.json), or - for standard input. All of them
    are read as one configuration: two documents that fight over a name are found in two files too.

    \b
    Exit codes: 0 every document would be in force; 1 an error, or a reference
    that leads nowhere; 2 wrong usage, or a file that is not there. Warnings
    alone are no error.
    """
    report = check_documents(files, settings_of(settings_file))
    if output in DOCUMENTS:
        write_document(report, output)
    else:
        _print(report)
    sys.exit(EXIT_FINDING if report.errors else 0)


def check_documents(
    names: Sequence[str], settings: Settings, *, may_be_empty: bool = False
) -> Report:
    """Judge files and directories by `settings`. Raises RefusedInputError."""
    try:
        found = offline.read(names, settings.node, may_be_empty=may_be_empty)
    except offline.NoFilesError as error:
        raise RefusedInputError(str(error)) from None
    # For the workloads of all nodes: a file is written for the mesh.
    built = mesh.build(found.documents, settings, everywhere=True)
    errors = dict.fromkeys((*found.errors, *built.problems))
    return Report(
        files=found.files,
        documents=len(found.documents),
        errors=tuple(map(Finding.of, errors)),
        warnings=tuple(dict.fromkeys((*found.warnings, *built.warnings))),
    )


def _print(report: Report) -> None:
    for found in report.errors:
        click.echo(printable(f"error: {found}"))
    for warning in report.warnings:
        click.echo(printable(f"warning: {warning}"))
    verdict = "would not be taken as they are" if report.errors else "would be in force"
    click.echo(
        f"{many(report.documents, 'document')} in {many(report.files, 'file')}: {verdict}; "
        f"{many(len(report.errors), 'error')}, {many(len(report.warnings), 'warning')}"
    )
