"""`nodeagent config check`: would the daemon start with this, and take all of it?

This module owns the command and the words of its answer. It promises that settings are judged as
the daemon judges them at its start, and the documents of their directory as `nodeagent policy
check` does; that nothing is changed; and the same exit code in every form. It may not talk to a
daemon.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final, NoReturn

import click
import msgspec

from nodeagent.api import ConfigError
from nodeagent.cli import RefusedInputError
from nodeagent.cli.ending import ExitCode
from nodeagent.cli.output import Answer, Printer, answer, output_option
from nodeagent.cli.policy_check import Finding, check_documents
from nodeagent.cli.run import DEFAULT_SETTINGS
from nodeagent.cli.table import Tone
from nodeagent.cli.text import many
from nodeagent.settings import Settings, load_settings

__all__ = ["check"]

SCHEMA: Final = 1
"""Of the document: fields are only added."""


class _Report(msgspec.Struct, frozen=True, kw_only=True):
    """`settings_errors` keep the daemon from its start; `errors` are of documents."""

    schema: int = SCHEMA
    settings_file: str
    config_dir: str
    documents: int
    settings_errors: tuple[Finding, ...]
    errors: tuple[Finding, ...]
    warnings: tuple[str, ...]


@click.command()
@click.argument(
    "file",
    metavar="[FILE]",
    type=click.Path(path_type=Path),
    default=DEFAULT_SETTINGS,
)
@output_option(("text",))
def check(file: Path, output: str) -> NoReturn:
    """Check a settings file, and the directory of documents that it names.

    FILE is /etc/nodeagent/nodeagent.yaml if it is not given. No agent is needed: ask before a
    start, a reload or an upgrade.

    \b
    Exit codes: 0 the daemon would start and take all; 1 it would not, or not
    all; 2 wrong usage, or no such file.
    """
    answer(lambda: _look(file), output)


def _look(file: Path) -> Answer:
    if not file.exists():
        raise RefusedInputError(f"{file}: no such file; name the settings as FILE")
    settings = Settings()
    wrong: tuple[ConfigError, ...] = ()
    try:
        settings = load_settings(file)
    except ConfigError as error:
        wrong = (error, *error.others)
    report = _Report(
        settings_file=str(file),
        config_dir="",
        documents=0,
        settings_errors=tuple(map(Finding.of, wrong)),
        errors=(),
        warnings=(),
    )
    if not wrong:
        found = check_documents([str(settings.config_dir)], settings, may_be_empty=True)
        report = msgspec.structs.replace(
            report,
            config_dir=str(settings.config_dir),
            documents=found.documents,
            errors=found.errors,
            warnings=found.warnings,
        )
    fine = not (report.settings_errors or report.errors)
    return Answer(
        report, lambda printer: _show(printer, report), ExitCode.FINE if fine else ExitCode.FINDING
    )


def _show(printer: Printer, report: _Report) -> None:
    for each in (*report.settings_errors, *report.errors):
        printer.text(f"error: {each}", 0, Tone.BAD)
    for warning in report.warnings:
        printer.text(f"warning: {warning}", 0, Tone.CAREFUL)
    if report.settings_errors:
        count = many(len(report.settings_errors), "error")
        printer.line(f"{report.settings_file}: the daemon would not start: {count}", Tone.BAD)
        return
    printer.line(f"{report.settings_file}: the daemon would start", Tone.GOOD)
    verdict = "would not be taken as they are" if report.errors else "would be in force"
    printer.line(
        f"{report.config_dir}: {many(report.documents, 'document')} {verdict}; "
        f"{many(len(report.errors), 'error')}, {many(len(report.warnings), 'warning')}",
        Tone.BAD if report.errors else Tone.GOOD,
    )
