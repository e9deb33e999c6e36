"""`nodeagent policy`: questions about policy that need no daemon.

This module owns the commands' options, the reading of the files that are named and the words of the
answer. It promises that a file is judged exactly as the agent judges it, all files together; that
every finding names its file, line and field; the same exit code in every output form; and that
nothing is changed. It may not talk to a daemon.

Exit codes of `check`: 0, all documents would be in force as they stand; 1, at least one would not,
or refers to what is not there; 2, wrong usage.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

import click
import msgspec

from nodeagent import api, mesh
from nodeagent.api import ConfigError, Document
from nodeagent.cli import LazyGroup, RefusedInputError
from nodeagent.settings import Settings, load_settings

__all__ = ["policy"]

STDIN: Final = "-"

SUFFIXES: Final = (".yaml", ".yml", ".json")
"""Of the files of a directory, as the agent reads its own."""

MOST_BYTES: Final = 1024 * 1024 + 1
"""Bytes read of one file: one more than the reader of documents accepts, so that it says so."""

EXIT_FINDING: Final = 1


class _Finding(msgspec.Struct, frozen=True):
    """What is wrong where; `line` and `column` count from 1, and are 0 for a whole file."""

    file: str
    line: int
    column: int
    field: str
    reason: str


class _Report(msgspec.Struct, frozen=True):
    files: int
    documents: int
    errors: tuple[_Finding, ...]
    warnings: tuple[str, ...]


@click.group(cls=LazyGroup)
def policy() -> None:
    """Look at policy before it is in force."""


@policy.command()
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@click.option(
    "--settings",
    "settings_file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="The agent's settings: trust domain, root namespace, node. Default: the defaults.",
)
@click.option(
    "-o", "--output", type=click.Choice(["text", "json"]), default="text", show_default=True
)
def check(files: tuple[str, ...], settings_file: Path | None, output: str) -> None:
    """Validate documents: would the agent take them, and what would have no effect?

    FILE is a file, a directory (its *.yaml, *.yml and *.json), or - for standard input. All of them
    are read as one configuration: two documents that fight over a name are found in two files too.

    \b
    Exit codes: 0 every document would be in force; 1 an error, or a reference that leads nowhere;
    2 wrong usage. Warnings alone are no error.
    """
    settings = _settings(settings_file)
    report = _check(_expand(files), settings)
    if output == "json":
        sys.stdout.buffer.write(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")
    else:
        _print(report)
    sys.exit(EXIT_FINDING if report.errors else 0)


def _settings(file: Path | None) -> Settings:
    if file is None:
        return Settings()
    try:
        return load_settings(file)
    except ConfigError as error:
        raise RefusedInputError(str(error)) from None


def _expand(names: Sequence[str]) -> list[str]:
    """Return the files that are meant, each once. A directory without any is a mistake."""
    found: dict[str, None] = {}
    for name in names:
        path = Path(name)
        if name == STDIN or not path.is_dir():
            found[name] = None
            continue
        inside = sorted(
            entry
            for entry in path.iterdir()
            if entry.suffix in SUFFIXES and not entry.name.startswith(".")
        )
        if not inside:
            raise RefusedInputError(f"{name} holds no file that ends in {', '.join(SUFFIXES)}")
        found.update(dict.fromkeys(map(str, inside)))
    return list(found)


def _read(name: str) -> bytes:
    if name == STDIN:
        return sys.stdin.buffer.read(MOST_BYTES)
    with Path(name).open("rb") as stream:
        return stream.read(MOST_BYTES)


def _check(files: Iterable[str], settings: Settings) -> _Report:
    documents: list[Document] = []
    errors: dict[ConfigError, None] = {}
    warnings: dict[str, None] = {}
    count = 0
    for name in files:
        count += 1
        shown = "standard input" if name == STDIN else name
        try:
            loaded = api.load(_read(name), shown, settings.node)
        except OSError as error:
            reason = f"cannot be read: {error.strerror or error}"
            errors[ConfigError(shown, 0, 0, "", reason)] = None
            continue
        documents += loaded.documents
        errors.update(dict.fromkeys(loaded.errors))
        warnings.update(dict.fromkeys(map(str, loaded.warnings)))
    errors.update(dict.fromkeys(api.own_conflicts(documents, settings.node)))
    built = mesh.build(documents, settings)
    errors.update(dict.fromkeys(built.problems))
    warnings.update(dict.fromkeys(built.warnings))
    return _Report(
        files=count,
        documents=len(documents),
        errors=tuple(
            _Finding(each.file, each.line, each.column, each.field, each.reason) for each in errors
        ),
        warnings=tuple(warnings),
    )


def _print(report: _Report) -> None:
    for found in report.errors:
        error = ConfigError(found.file, found.line, found.column, found.field, found.reason)
        click.echo(f"error: {error}")
    for warning in report.warnings:
        click.echo(f"warning: {warning}")
    verdict = "would not be taken as they are" if report.errors else "would be in force"
    click.echo(
        f"{_many(report.documents, 'document')} in {_many(report.files, 'file')}: {verdict}; "
        f"{_many(len(report.errors), 'error')}, {_many(len(report.warnings), 'warning')}"
    )


def _many(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
