"""`nodeagent policy explain`: why is this connection allowed, or refused?

This module owns the command's options and its exit codes. It promises the same exit code with every
output form, and one document on standard output. The words are those of `policy_explain_view`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NoReturn

import click
import msgspec

from nodeagent import offline
from nodeagent.cli import RefusedInputError, completion
from nodeagent.cli.ending import say
from nodeagent.cli.output import DOCUMENTS, output_option, write_document
from nodeagent.cli.policy import settings_option
from nodeagent.cli.policy_explain_view import lines
from nodeagent.cli.policy_source import Source, from_agent, from_files
from nodeagent.cli.reach import EXIT_UNREACHABLE, UnreachableError, report
from nodeagent.cli.text import printable
from nodeagent.offline import Caller, Explanation, Offline

__all__ = ["explain"]

EXIT_REFUSED = 1


@click.command()
@click.argument("source", metavar="SRC", shell_complete=completion.workloads)
@click.argument("destination", metavar="DST:PORT", shell_complete=completion.workloads)
@click.argument("files", nargs=-1, metavar="[FILE...]")
@click.option("--plaintext", is_flag=True, help="SRC calls without its identity.")
@click.option("--from-address", metavar="ADDRESS", help="The address that SRC calls from.")
@click.option("--all", "everything", is_flag=True, help="Show every rule, not only the nearest.")
@click.option(
    "--trust",
    multiple=True,
    metavar="DOMAIN",
    help="With FILE: a further trust domain whose roots the node holds. May be repeated.",
)
@click.option(
    "--run-dir",
    type=click.Path(path_type=Path),
    help="Without FILE: the agent's run directory.  [/run/nodeagent]",
)
@settings_option
@output_option(("text",))
def explain(
    source: str,
    destination: str,
    files: tuple[str, ...],
    plaintext: bool,  # noqa: FBT001 - click calls by name
    from_address: str | None,
    everything: bool,  # noqa: FBT001 - click calls by name
    trust: tuple[str, ...],
    run_dir: Path | None,
    settings_file: Path | None,
    output: str,
) -> NoReturn:
    """Say whether SRC may call DST, which rule decides, and how far the others are from it.

    \b
    SRC  a workload (NAMESPACE/NAME), a SPIFFE ID, an address, or "plaintext"
    DST  a workload, a service (NAMESPACE/HOST or HOST), or an address

    Without FILE the running agent is asked for what it has in force. With FILE (files, directories,
    or - for standard input) only these count; no agent is needed.

    A rule is as near as it lacks few conditions; the nearest come first.

    \b
    Exit codes: 0 allowed; 1 refused; 2 wrong usage, or files that cannot be used;
    3 the agent cannot be reached.
    """
    if files and run_dir is not None:
        raise click.UsageError("--run-dir is for the running agent: leave it out with FILE")
    if trust and not files:
        raise click.UsageError("--trust is for FILE: the running agent knows whose roots it holds")
    try:
        found = _source(files, settings_file, run_dir, trust)
    except UnreachableError as error:
        report(error)
        say("  or: name the files to answer by, as FILE")
        sys.exit(EXIT_UNREACHABLE)
    off = found.evaluator()
    try:
        explanation = _explain(off, found.name, source, destination, from_address, plaintext)
    except offline.QuestionError as error:
        raise RefusedInputError(str(error)) from None
    if output in DOCUMENTS:
        write_document(explanation, output)
    else:
        for line in lines(explanation, everything=everything):
            click.echo(printable(line))
    sys.exit(0 if explanation.allowed else EXIT_REFUSED)


def _source(
    files: tuple[str, ...],
    settings_file: Path | None,
    run_dir: Path | None,
    trust: tuple[str, ...],
) -> Source:
    if files:
        return from_files(files, settings_file, trust)
    return from_agent(run_dir, settings_file)


def _explain(
    off: Offline,
    configuration: str,
    source: str,
    destination: str,
    from_address: str | None,
    plaintext: bool,  # noqa: FBT001 - one of the options above
) -> Explanation:
    """Return the explanation. Raises QuestionError."""
    caller = offline.caller(off, source)
    if from_address is not None:
        at = offline.address_of(from_address)
        caller = msgspec.structs.replace(caller, sources=(at,))
    if plaintext:
        caller = msgspec.structs.replace(caller, identity=None)
    name, port = offline.split_port(destination)
    targets = offline.targets(off, name, port)
    answers = offline.explain(off, caller, targets)
    without: tuple[offline.Answer, ...] = ()
    if caller.identity is not None and caller.name != str(caller.identity):
        anonymous = Caller(caller.name, None, caller.sources)
        proved = [each for each in targets if offline.proves_identity(off, caller, each)]
        without = offline.explain(off, anonymous, proved)
    return Explanation(
        configuration=configuration,
        source=source,
        destination=destination,
        allowed=all(answer.allowed for answer in answers),
        answers=answers,
        without_identity=without,
    )
