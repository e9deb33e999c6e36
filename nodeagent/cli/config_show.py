"""`nodeagent config show`: what is in force here, what is not, and where each setting comes from.

This module owns the command, and the words and columns of its answer. It promises that whatever is
written and not in force is a finding: documents that were refused, references that lead nowhere,
and settings that the file has by now and the daemon has not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NoReturn

import click
import msgspec

from nodeagent.admin.configuration import CONFIGURATION_SCHEMA, Configuration
from nodeagent.admin.model import Problem, Status
from nodeagent.admin.settings import (
    SETTINGS_SCHEMA,
    SettingReport,
    SettingsReport,
    settings_report,
)
from nodeagent.api import ConfigError, Document
from nodeagent.cli.ending import ExitCode
from nodeagent.cli.output import Answer, Printer, Watch, answer, output_option, watch_options
from nodeagent.cli.policy_source import MAX_ANSWER
from nodeagent.cli.reach import agent_options, get, run_directory
from nodeagent.cli.status import fetch
from nodeagent.cli.status_view import Finding, not_in_force, unenforced_lines
from nodeagent.cli.table import Column, Tone
from nodeagent.cli.text import many
from nodeagent.settings import read_settings

__all__ = ["documents_in_force", "settings_in_force", "show"]

SCHEMA: Final = 1
"""Of the document: fields are only added."""

MAX_SETTINGS: Final = 1024 * 1024
"""Bytes of the settings: some fifty, and their file is bounded."""

_KINDS_LISTED: Final = ("PeerAuthentication", "AuthorizationPolicy", "IdentitySet")
"""Kinds that are listed one by one; of the others there is one for each workload and service."""

MAX_LISTED: Final = 100
"""Documents listed without -o wide: a few screens."""


@click.command()
@agent_options
@output_option()
@watch_options
def show(run_dir: Path | None, settings_file: Path | None, output: str, watch: Watch) -> NoReturn:
    """Show the documents and settings in force, and what is not.

    Workloads and services are counted; -o wide lists them, and the settings that have their
    defaults.

    \b
    Exit codes: 0 all that is written is in force; 1 some is not; 2 wrong
    usage; 3 the agent cannot be reached.
    """
    directory = run_directory(run_dir, settings_file)
    answer(lambda: _look(directory), output, watch)


def settings_in_force(directory: Path) -> SettingsReport:
    """Ask the daemon of a run directory for its settings. Raises UnreachableError."""
    return get(directory, "/settings", SettingsReport, SETTINGS_SCHEMA, MAX_SETTINGS)


def documents_in_force(directory: Path) -> Configuration:
    """Ask the daemon of a run directory for its documents. Raises UnreachableError."""
    return get(directory, "/configuration", Configuration, CONFIGURATION_SCHEMA, MAX_ANSWER)


def _look(directory: Path) -> Answer:
    status = fetch(directory)
    settings = settings_in_force(directory)
    documents: tuple[Document, ...] = ()
    if status.config.loaded:
        documents = documents_in_force(directory).documents.all()
    findings = [*not_in_force(status), *_settings_findings(settings)]

    def people(printer: Printer) -> None:
        said = f"{status.node}: {many(len(documents), 'document')} of {status.config.source}"
        said += f", {many(len(findings), 'finding')}" if findings else " in force"
        printer.line(said, Tone.BAD if findings else Tone.GOOD)
        _findings(printer, findings)
        _documents(printer, documents)
        _settings(printer, settings)
        for title, lines in (
            ("Policies that are not enforced as they are written:", unenforced_lines(status)),
            ("Warnings:", status.config.warnings),
        ):
            if lines:
                printer.line()
                printer.line(title)
                for line in lines:
                    printer.text(line, 2)

    return Answer(
        _document(status, settings, documents, findings),
        people,
        ExitCode.FINDING if findings else ExitCode.FINE,
    )


def _settings_findings(told: SettingsReport) -> list[Finding]:
    """Return what the settings' file says by now and is not in force."""
    try:
        written = settings_report(told.file, read_settings(told.file))
    except ConfigError as error:
        return [
            Finding(
                "settings-unusable",
                f"{error}; those in force were read before",
                "correct the file: nodeagent would not start with it",
            )
        ]
    now = {each.name: each.value for each in written.settings}
    return [
        Finding(
            "settings-not-in-force",
            f"{each.name} is {_value(each.value)} in force, and {_value(now[each.name])} in "
            f"{told.file}",
            "systemctl reload nodeagent",
        )
        for each in told.settings
        if each.name in now and now[each.name] != each.value
    ]


def _document(
    status: Status,
    settings: SettingsReport,
    documents: Sequence[Document],
    findings: Sequence[Finding],
) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "node": status.node,
        "source": status.config.source,
        "documents": [
            {
                "kind": type(each).__name__,
                "namespace": each.metadata.namespace,
                "name": each.metadata.name,
                "file": each.origin.file,
                "line": each.origin.line,
            }
            for each in documents
        ],
        "settings_file": settings.file,
        "settings": msgspec.to_builtins(settings.settings),
        "problems": _problems(status.config.problems),
        "unresolved": _problems(status.config.unresolved),
        "unenforced": msgspec.to_builtins(status.config.unenforced),
        "warnings": list(status.config.warnings),
        "findings": msgspec.to_builtins(findings),
    }


def _problems(problems: Sequence[Problem]) -> list[dict[str, Any]]:
    return [msgspec.to_builtins(each) for each in problems]


def _findings(printer: Printer, findings: Sequence[Finding]) -> None:
    if findings:
        printer.line()
        printer.line("Not in force:")
    for finding in findings:
        printer.text(f"{finding.code}: {finding.text}", 2)
        printer.text(f"do: {finding.remedy}", 4)


def _documents(printer: Printer, documents: Sequence[Document]) -> None:
    if not documents:
        return
    listed = [each for each in documents if printer.wide or type(each).__name__ in _KINDS_LISTED]
    if not printer.wide:
        listed = listed[:MAX_LISTED]
    if listed:
        printer.line()
        printer.table(
            (Column("KIND", folds=False), Column("NAME"), Column("FROM")),
            (
                (type(each).__name__, each.uid, f"{each.origin.file}:{each.origin.line}")
                for each in listed
            ),
        )
    counts = Counter(type(each).__name__ for each in documents)
    counts.subtract(Counter(type(each).__name__ for each in listed))
    rest = [f"{count} {kind}" for kind, count in counts.items() if count]
    if rest:
        printer.line()
        printer.text(f"Also in force: {', '.join(rest)}; -o wide lists them")


def _settings(printer: Printer, told: SettingsReport) -> None:
    shown = [each for each in told.settings if printer.wide or each.line]
    printer.line()
    printer.line(f"Settings of {told.file}:")
    if shown:
        columns = [Column("SETTING", folds=False), Column("VALUE"), Column("FROM", folds=False)]
        columns += [Column("DEFAULT")] if printer.wide else []
        printer.table(columns, (_setting(each, wide=printer.wide) for each in shown))
    defaults = len(told.settings) - len(shown)
    if defaults:
        rest = many(defaults, "setting has its default", "settings have their defaults")
        printer.line(f"{rest}; -o wide shows them")


def _setting(each: SettingReport, *, wide: bool) -> tuple[str, ...]:
    row = (each.name, _value(each.value), f"line {each.line}" if each.line else "default")
    return (*row, _value(each.default)) if wide else row


def _value(value: Any) -> str:  # noqa: ANN401 - of any setting
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    return "none" if value in (None, "") else str(value)
