"""`nodeagent logs`: what the access log and the audit log say, wherever they go.

This module owns the command: which logs are read, and which of their lines are shown. It promises
that a line is shown once, in the order of the log; that what cannot be read is said with what to do
about it; and that `--follow` goes on over a rotation of the file. What a line means is for
`log_lines`, the way to it for `log_sources`.

Exit codes: 0, some line was found; 1, none; 2, wrong usage, or no log can be read; 3, the agent,
which knows where the logs are, cannot be reached.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import click
import msgspec

from nodeagent.cli import completion
from nodeagent.cli.as_yaml import yaml_of
from nodeagent.cli.ending import ExitCode, say
from nodeagent.cli.log_lines import Entry, Log, read, sentence
from nodeagent.cli.log_sources import Source, find, merged, of_files
from nodeagent.cli.output import Printer, output_option, write_lines
from nodeagent.cli.reach import agent_options
from nodeagent.cli.since import since_option
from nodeagent.cli.table import Tone

__all__ = ["logs"]

SCHEMA = 1
"""Of each document: fields are only added."""


@click.command()
@click.option(
    "--workload",
    "workloads",
    multiple=True,
    metavar="WORKLOAD",
    shell_complete=completion.workloads,
    help="As caller or called: NAME or NAMESPACE/NAME. May be repeated.",
)
@click.option(
    "--identity",
    "identities",
    multiple=True,
    metavar="ID",
    shell_complete=completion.identities,
    help="Of caller or called: a SPIFFE ID, or its end. May be repeated.",
)
@click.option("--refused", is_flag=True, help="Only who was turned away, or cut, by a judgement.")
@click.option("--failed", is_flag=True, help="Only what came to nothing: refused or broken.")
@click.option(
    "--log",
    "which",
    type=click.Choice(["access", "audit", "both"]),
    default="both",
    help="Which log: access, audit, both.  [both]",
    metavar="LOG",
)
@since_option(None, "How old a line may be")
@click.option("-f", "--follow", is_flag=True, help="Go on with what comes, to Ctrl-C.")
@click.option(
    "--file",
    "files",
    multiple=True,
    type=click.Path(path_type=Path, allow_dash=True),
    help="Read this file (- is standard input) instead of asking the agent. May be repeated.",
)
@agent_options
@output_option(("text", "raw"))
def logs(
    *,
    refused: bool,
    failed: bool,
    which: str,
    since: datetime | None,
    follow: bool,
    files: tuple[Path, ...],
    run_dir: Path | None,
    settings_file: Path | None,
    output: str,
    **names: tuple[str, ...],
) -> NoReturn:
    """Show lines of ztunnel's access log and audit log.

    The agent says where they are: files, or systemd's journal. Both forms, text and JSON, are
    understood. With -o json and -o yaml each line is a document of its own; -o raw shows lines as
    they stand.

    \b
    nodeagent logs --refused --since 1h         who was kept out?
    nodeagent logs --workload shop/pay -f       what goes on there?

    \b
    Exit codes: 0 there are such lines; 1 there are none; 2 wrong usage, or no
    log can be read; 3 the agent cannot be reached.
    """
    kept = _filter(
        names["workloads"], names["identities"], refused=refused, failed=failed, since=since
    )
    wanted = {Log(which)} if which != "both" else set(Log)
    sources = of_files(files) if files else find(run_dir, settings_file, wanted, since)
    shown = 0
    for line in merged(sources, follow=follow):
        entry = read(line)
        if entry is None or entry.log not in wanted or not kept(entry):
            continue
        shown += 1
        write_lines(_spelled(entry, line, output))
    if not shown:
        _say_nothing(sources)
    sys.exit(ExitCode.FINE if shown else ExitCode.FINDING)


def _say_nothing(sources: Sequence[Source]) -> None:
    say(f"note: no such line in {', '.join(each.name for each in sources)}")
    if all(each.path is None for each in sources):
        say(
            "note: if ztunnel is no unit of systemd here, its standard output is elsewhere "
            "(kubectl logs …): save it and read it with --file, or pipe it into --file -"
        )


def _filter(
    workloads: tuple[str, ...],
    identities: tuple[str, ...],
    *,
    refused: bool,
    failed: bool,
    since: datetime | None,
) -> Callable[[Entry], bool]:
    def kept(entry: Entry) -> bool:
        if refused and not entry.refused:
            return False
        if failed and not entry.failed:
            return False
        if since is not None and entry.time < since:
            return False
        if workloads and not any(_is_party(entry, each) for each in workloads):
            return False
        return not identities or any(_has_identity(entry, each) for each in identities)

    return kept


def _is_party(entry: Entry, workload: str) -> bool:
    namespace, slash, name = workload.rpartition("/")
    for side in ("src", "dst"):
        if entry.text(f"{side}.workload") == name and (
            not slash or entry.text(f"{side}.namespace") == namespace
        ):
            return True
    return False


def _has_identity(entry: Entry, wanted: str) -> bool:
    for key in ("src.identity", "dst.identity", "identity"):
        found = entry.text(key)
        # Only behind a slash: "sa/web" is not the end of "…/sa/other-web".
        if found == wanted or found.endswith(f"/{wanted.lstrip('/')}"):
            return True
    return False


def _spelled(entry: Entry, line: str, output: str) -> Iterator[str]:
    if output in {"json", "yaml"}:
        document: dict[str, Any] = {
            "schema": SCHEMA,
            "log": entry.log.value,
            "time": entry.time.isoformat(),
            "refused": entry.refused,
            "failed": entry.failed,
            "fields": entry.fields,
        }
        if output == "json":
            yield msgspec.json.encode(document).decode()
        else:
            yield "---\n" + yaml_of(document).rstrip("\n")
        return
    printer = Printer(wide=True)
    tone = Tone.BAD if entry.refused else Tone.CAREFUL if entry.failed else Tone.PLAIN
    printer.line(line.rstrip("\n") if output == "raw" else sentence(entry), tone)
    yield from printer.lines
