"""`nodeagent config diff`: what is written that is not in force, and the other way round.

This module owns the command and the words of its answer. It promises that two documents are the
same when they mean the same: places and order of files do not count. It may not say what a
difference would do to traffic: that is `nodeagent policy diff`.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final, NoReturn

import click
import msgspec

from nodeagent import offline
from nodeagent.api import ConfigError, Document, Origin
from nodeagent.cli import RefusedInputError
from nodeagent.cli.config_show import documents_in_force
from nodeagent.cli.ending import ExitCode
from nodeagent.cli.output import Answer, Printer, Watch, answer, output_option, watch_options
from nodeagent.cli.reach import agent_options, run_directory
from nodeagent.cli.table import Tone
from nodeagent.cli.text import many

__all__ = ["diff"]

SCHEMA: Final = 1
"""Of the document: fields are only added."""

MAX_SHOWN: Final = 100
"""Differences shown to people; JSON has all."""

_NOWHERE: Final = Origin("", 0)


class _Difference(msgspec.Struct, frozen=True, kw_only=True):
    """`change` is "added" (written, not in force), "removed" (in force, not written) or "changed",
    with the names of the fields that differ.
    """

    change: str
    kind: str
    name: str
    in_force: str = ""
    written: str = ""
    fields: tuple[str, ...] = ()


class _Report(msgspec.Struct, frozen=True, kw_only=True):
    schema: int = SCHEMA
    node: str
    paths: tuple[str, ...]
    pending: str
    differences: tuple[_Difference, ...]
    errors: tuple[str, ...]


@click.command()
@click.argument("paths", nargs=-1, metavar="[PATH...]")
@agent_options
@output_option(("text",))
@watch_options
def diff(
    paths: tuple[str, ...],
    run_dir: Path | None,
    settings_file: Path | None,
    output: str,
    watch: Watch,
) -> NoReturn:
    """Compare what is in force with what is written.

    PATH is a file, a directory (its *.yaml, *.yml and *.json), or - for standard input; without,
    the directory that the agent watches. All paths together are taken for a whole configuration.

    What a difference would do to callers is said by `nodeagent policy diff`.

    \b
    Exit codes: 0 no difference; 1 there is one, or a file that has errors; 2
    wrong usage, or no such path; 3 the agent cannot be reached.
    """
    directory = run_directory(run_dir, settings_file)
    if watch.on and offline.STDIN in paths:
        raise click.UsageError("standard input can be read once: leave --watch out")
    answer(lambda: _look(directory, paths), output, watch)


def _look(directory: Path, paths: tuple[str, ...]) -> Answer:
    found = documents_in_force(directory)
    named = paths or (found.source,)
    try:
        written = offline.read(named, found.node, may_be_empty=not paths)
    except offline.NoFilesError as error:
        raise RefusedInputError(str(error)) from None
    report = _Report(
        node=found.node,
        paths=named,
        pending=found.pending,
        differences=tuple(_differences(found.documents.all(), written.documents)),
        errors=tuple(map(_line, written.errors)),
    )
    fine = not (report.differences or report.errors or report.pending)
    return Answer(
        report, lambda printer: _show(printer, report), ExitCode.FINE if fine else ExitCode.FINDING
    )


def _line(error: ConfigError) -> str:
    return str(ConfigError(error.file, error.line, error.column, error.field, error.reason))


def _differences(
    in_force: Iterable[Document], written: Iterable[Document]
) -> Iterable[_Difference]:
    old = {(type(each).__name__, each.uid): each for each in in_force}
    new = {(type(each).__name__, each.uid): each for each in written}
    for key in sorted(old.keys() | new.keys()):
        kind, name = key
        before, after = old.get(key), new.get(key)
        if before is None and after is not None:
            yield _Difference(change="added", kind=kind, name=name, written=str(after.origin))
        elif after is None and before is not None:
            yield _Difference(change="removed", kind=kind, name=name, in_force=str(before.origin))
        elif before is not None and after is not None:
            fields = tuple(_fields(_meaning(before), _meaning(after), ""))
            if fields:
                yield _Difference(
                    change="changed",
                    kind=kind,
                    name=name,
                    in_force=str(before.origin),
                    written=str(after.origin),
                    fields=fields,
                )


def _meaning(document: Document) -> Any:  # noqa: ANN401 - JSON's values
    plain = msgspec.structs.replace(document, origin=_NOWHERE, marks=())
    return msgspec.to_builtins(plain, str_keys=True)


def _fields(old: Any, new: Any, path: str) -> Iterable[str]:  # noqa: ANN401 - JSON's values
    """Yield the paths of the smallest mappings' fields that differ."""
    if old == new:
        return
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted(old.keys() | new.keys()):
            yield from _fields(old.get(name), new.get(name), f"{path}.{name}" if path else name)
    else:
        yield path


_MARKS: Final = {
    "added": ("+", "written, not in force", Tone.GOOD),
    "removed": ("-", "in force, not written", Tone.BAD),
    "changed": ("~", "differs", Tone.CAREFUL),
}


def _show(printer: Printer, report: _Report) -> None:
    count = len(report.differences)
    what = ", ".join(report.paths)
    same = not (count or report.errors)
    verdict = f"what is in force is what is written in {what}"
    if not same:
        verdict = f"{many(count, 'difference')} to {what}"
        if report.errors:
            verdict += f", {many(len(report.errors), 'error')} in it"
    printer.line(f"{report.node}: {verdict}", Tone.GOOD if same else Tone.BAD)
    if report.pending:
        printer.text(f"not in force yet: {report.pending}", 2)
    for each in report.differences[:MAX_SHOWN]:
        mark, means, tone = _MARKS[each.change]
        said = f"{mark} {each.kind} {each.name}: {means}"
        if each.fields:
            said += f" in {', '.join(each.fields)}"
        printer.text(f"{said} ({each.written or each.in_force})", 0, tone)
    if count > MAX_SHOWN:
        printer.line(f"and {count - MAX_SHOWN} more: -o json has them all")
    for error in report.errors:
        printer.text(f"error: {error}", 0, Tone.BAD)
