"""`nodeagent policy test`: do these policies decide as somebody wrote down that they should?

This module owns the command's options, its exit codes and the forms of its answer. It promises the
same exit code in every form, and that each failure names its place in the table, the rule that
decided and the command that says more. It may not compare anything.
"""

from __future__ import annotations

import shlex
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final, NoReturn
from xml.etree import ElementTree as ET

import click
import msgspec

from nodeagent import offline
from nodeagent.api import ConfigError, Mark
from nodeagent.cli import EXIT_USAGE, RefusedInputError
from nodeagent.cli.ending import say
from nodeagent.cli.output import DOCUMENTS, output_option, write_document
from nodeagent.cli.policy import settings_option
from nodeagent.cli.policy_source import Source, from_agent, from_files
from nodeagent.cli.reach import EXIT_UNREACHABLE, UnreachableError, report
from nodeagent.cli.text import many, printable, wrapped
from nodeagent.offline import Outcome, Result, Table

__all__ = ["test"]

SCHEMA: Final = 1
"""Of the JSON: fields are only added."""

EXIT_FAILED: Final = 1


class _Report(msgspec.Struct, frozen=True, kw_only=True):
    schema: int = SCHEMA
    file: str
    configuration: str
    tests: int
    passed: int
    failed: int
    broken: int
    results: tuple[Result, ...]


@click.command()
@click.argument("file", metavar="FILE")
@click.option(
    "--config",
    "files",
    multiple=True,
    metavar="PATH",
    help="What to test: a file, directory or -. May be repeated. Without: the running agent.",
)
@click.option(
    "--run-dir",
    type=click.Path(path_type=Path),
    help="Without --config: the agent's run directory.  [/run/nodeagent]",
)
@settings_option
@click.option("-v", "--verbose", is_flag=True, help="Show the tests that pass, too.")
@output_option(("text",), "junit")
def test(
    file: str,
    files: tuple[str, ...],
    run_dir: Path | None,
    settings_file: Path | None,
    verbose: bool,  # noqa: FBT001 - click calls by name
    output: str,
) -> NoReturn:
    """Hold policies against a table of expected verdicts, in FILE (or - for standard input).

    \b
    tests:
    - name: the web shop may pay
      from: shop/web                 # as SRC of `policy explain`
      to: shop/pay:8080              # as DST:PORT
      expect: allow                  # or deny
      by: shop/callers               # optional: what decides; see docs/policy.md

    \b
    Exit codes: 0 all as expected; 1 some not; 2 wrong usage, a table or
    configuration that cannot be used, or a test that names what does not exist;
    3 the agent cannot be reached.
    """
    if files and run_dir is not None:
        raise click.UsageError("--run-dir is for the running agent: leave it out with --config")
    if file == offline.STDIN and offline.STDIN in files:
        raise click.UsageError("standard input can be FILE or --config, not both")
    shown, table, marks = _table(file)
    try:
        found = _source(files, run_dir, settings_file, table)
    except UnreachableError as error:
        report(error)
        say("  or: name the files to test, with --config")
        sys.exit(EXIT_UNREACHABLE)
    off = found.evaluator()
    results = tuple(
        offline.run_case(off, case, mark, shown)
        for case, mark in zip(table.tests, marks, strict=True)
    )
    counts = Counter(result.outcome for result in results)
    answer = _Report(
        file=shown,
        configuration=found.name,
        tests=len(results),
        passed=counts[Outcome.PASSED],
        failed=counts[Outcome.FAILED],
        broken=counts[Outcome.BROKEN],
        results=results,
    )
    if output in DOCUMENTS:
        write_document(answer, output)
    elif output == "junit":
        click.echo(_junit(answer))
    else:
        trusts = [word for domain in table.trusts for word in ("--trust", domain)] if files else []
        for line in _lines(answer, (*trusts, *files), verbose=verbose):
            click.echo(printable(line))
    if answer.broken:
        sys.exit(EXIT_USAGE)
    sys.exit(EXIT_FAILED if answer.failed else 0)


def _table(file: str) -> tuple[str, Table, tuple[Mark, ...]]:
    """Return what FILE is called, what it holds, and the places of its tests."""
    try:
        shown, data = offline.read_file(file)
        table, marks = offline.read_table(data, shown)
    except ConfigError as error:
        raise RefusedInputError(str(error)) from None
    return shown, table, marks


def _source(
    files: Sequence[str], run_dir: Path | None, settings_file: Path | None, table: Table
) -> Source:
    if files:
        return from_files(files, settings_file, table.trusts)
    return from_agent(run_dir, settings_file)


def _lines(answer: _Report, further: Sequence[str], *, verbose: bool) -> Iterator[str]:
    """Yield the lines; `further` are arguments with which `explain` asks the same configuration."""
    for result in answer.results:
        if result.outcome is Outcome.PASSED:
            if verbose:
                yield from wrapped(f"ok: {result.name}")
            continue
        if result.outcome is Outcome.BROKEN:
            yield from wrapped(f"BROKEN: {result.name}")
            yield f"  {result.error}"
            continue
        yield from wrapped(f"FAILED: {result.name}")
        yield f"  {result.file}:{result.line}: {_question(result)}"
        for line in _details(result):
            yield from wrapped(line, 2)
        yield f"  more: {_command(result, further)}"
    broken = f", {answer.broken} broken" if answer.broken else ""
    yield (
        f"{many(answer.tests, 'test')}: {answer.passed} as expected, {answer.failed} not{broken} "
        f"({answer.configuration})"
    )


def _question(result: Result) -> str:
    return f"{result.source} -> {result.destination}"


def _details(result: Result) -> Iterable[str]:
    yield from result.differences
    if result.rule is not None:
        yield f"decided at {result.destination_address} by {result.rule.text}"


def _command(result: Result, further: Sequence[str]) -> str:
    return shlex.join(("nodeagent", "policy", "explain", *result.arguments, *further))


def _junit(answer: _Report) -> bytes:
    """Return the results as JUnit's XML, as far as CI systems agree on it."""
    suite = ET.Element(
        "testsuite",
        name=answer.file,
        tests=str(answer.tests),
        failures=str(answer.failed),
        errors=str(answer.broken),
    )
    for result in answer.results:
        case = ET.SubElement(
            suite,
            "testcase",
            classname=answer.file,
            name=result.name,
            file=result.file,
            line=str(result.line),
        )
        if result.outcome is Outcome.FAILED:
            failure = ET.SubElement(case, "failure", message="; ".join(result.differences))
            failure.text = "\n".join((_question(result), *_details(result)))
        elif result.outcome is Outcome.BROKEN:
            ET.SubElement(case, "error", message=result.error)
    ET.indent(suite)
    return bytes(ET.tostring(suite, encoding="utf-8", xml_declaration=True))
