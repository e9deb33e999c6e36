"""`nodeagent policy diff`: what would a change of configuration do, and to whom?

This module owns the command's options, the way to the recorded flows and the exit codes. It
promises the same exit code with every output form, one document on standard output, and that what
cannot be told counts as a change for the worse. The words are those of `policy_diff_view`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any, Final, NoReturn

import click
import msgspec

from nodeagent import flows, whatif
from nodeagent.api import own_conflicts
from nodeagent.cli import RefusedInputError, clock
from nodeagent.cli.ending import say
from nodeagent.cli.output import DOCUMENTS, output_option, write_document
from nodeagent.cli.policy import settings_of, settings_option
from nodeagent.cli.policy_diff_view import lines
from nodeagent.cli.policy_source import Source, from_agent, of_files
from nodeagent.cli.reach import EXIT_UNREACHABLE, UnreachableError, get, report, run_directory
from nodeagent.cli.since import since_option
from nodeagent.cli.text import many, moment, printable
from nodeagent.flows import Recording
from nodeagent.settings import Settings
from nodeagent.whatif import Comparison, DiffReport, Replay

__all__ = ["diff"]

EXIT_BREAKS: Final = 1

MAX_ANSWER: Final = 128 * 1024 * 1024
"""Bytes of recorded flows: as many as the agent gives, each with names of the greatest length that
occurs."""

_SIDES: Final = 2


@click.command()
@click.argument("paths", nargs=-1, required=True, metavar="[OLD] NEW")
@click.option("--running", is_flag=True, help="OLD is what the running agent has in force.")
@click.option("--add", is_flag=True, help="NEW is added to OLD: what both have, NEW replaces.")
@click.option("--flows", "live", is_flag=True, help="Replay what the running agent has recorded.")
@click.option(
    "--flows-db",
    "file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Replay what is recorded in this file: an agent's flows.db, or a copy (with -wal).",
)
@since_option("24h", "How old a recorded flow may be")
@click.option(
    "--trust",
    multiple=True,
    metavar="DOMAIN",
    help="A further trust domain whose roots the nodes hold. May be repeated.",
)
@click.option(
    "--run-dir",
    type=click.Path(path_type=Path),
    help="With --running or --flows: the agent's run directory.  [/run/nodeagent]",
)
@settings_option
@output_option(("text",))
def diff(output: str, **options: Any) -> NoReturn:  # noqa: ANN401 - the fields of _Asked
    """Say which calls NEW would refuse that OLD lets in, and which the other way round.

    OLD and NEW are files, directories (their *.yaml, *.yml and *.json), or - for standard input;
    each is a whole configuration, workloads included, but for NEW with --add. Of callers whom no
    policy tells apart one stands for all; ports that no policy names are "other".

    With --flows or --flows-db, recorded calls are judged again by both: these callers would break.

    \b
    Exit codes, without recorded flows:
      0 nothing that OLD lets in would be refused
      1 something would, or there is too much to look at all of it
    With recorded flows they alone decide:
      0 no recorded caller would be refused
      1 one would, or some were not recorded one by one and may be
    2 wrong usage, files with errors, or nothing is recorded
    3 the agent cannot be reached
    """
    asked = _Asked(**options)
    _check_usage(asked)
    try:
        recording = _recording(asked)
        old, new = _sides(asked, recording)
    except UnreachableError as error:
        report(error)
        sys.exit(EXIT_UNREACHABLE)
    found = _answer(old, new, recording, "the running agent" if asked.live else str(asked.file))
    if output in DOCUMENTS:
        write_document(found, output)
    else:
        for line in lines(found, clock.now()):
            click.echo(printable(line))
    sys.exit(EXIT_BREAKS if found.breaks else 0)


class _Asked(msgspec.Struct, frozen=True, kw_only=True):
    """The options of the command."""

    paths: tuple[str, ...]
    running: bool
    add: bool
    live: bool
    file: Path | None
    since: datetime
    trust: tuple[str, ...]
    run_dir: Path | None
    settings_file: Path | None

    @property
    def age(self) -> int:
        """Whole seconds since `since`."""
        return round((clock.now() - self.since).total_seconds())

    @property
    def agent(self) -> Path:
        """The agent's run directory. The settings may be named besides, for what is judged by."""
        return run_directory(self.run_dir, self.settings_file if self.run_dir is None else None)


def _check_usage(asked: _Asked) -> None:
    count = len(asked.paths)
    if count != (1 if asked.running else _SIDES):
        what = "OLD and NEW (or --running and NEW)"
        if asked.running:
            what = "NEW only, for OLD is what runs"
        raise click.UsageError(f"{many(count, 'path')}: name {what}")
    if asked.paths.count("-") > 1:
        raise click.UsageError("standard input can be OLD or NEW, not both")
    if asked.live and asked.file is not None:
        raise click.UsageError("--flows and --flows-db exclude each other")
    if asked.run_dir is not None and not (asked.running or asked.live):
        raise click.UsageError("--run-dir is for --running and --flows")


def _recording(asked: _Asked) -> Recording | None:
    """Return the recorded flows that are asked for. Raises UnreachableError, RefusedInputError."""
    if asked.live:
        resource = f"/flows?seconds={asked.age}"
        found = get(asked.agent, resource, Recording, flows.SCHEMA, MAX_ANSWER)
        if found.oldest is None:
            cause = found.problem or "nobody has called since it was started"
            raise RefusedInputError(f"the agent has recorded nothing: {cause}")
        return found
    if asked.file is None:
        return None
    try:
        found = flows.recording(asked.file, "", time.time(), asked.age)
    except flows.StoreError as error:
        raise RefusedInputError(str(error)) from None
    if found.oldest is None:
        raise RefusedInputError(f"{asked.file}: nothing is recorded in it")
    return found


def _sides(asked: _Asked, recording: Recording | None) -> tuple[Source, Source]:
    """Return both configurations; what one of them trusts the other does too."""
    trusted = {*asked.trust, *(whatif.domains(recording) if recording is not None else ())}
    if asked.running:
        old = from_agent(asked.agent, None)
        trusted.update(old.trusted)
        settings = old.settings
        if asked.settings_file is not None:
            settings = settings_of(asked.settings_file)
        old = msgspec.structs.replace(old, trusted=tuple(sorted(trusted)))
    else:
        settings = settings_of(asked.settings_file)
        old = _of_path(asked.paths[0], settings, trusted)
    new = _of_path(asked.paths[-1], settings, trusted)
    if asked.add:
        new = _added(old, new)
    return old, new


def _of_path(path: str, settings: Settings, trusted: Iterable[str]) -> Source:
    found = of_files((path,), settings, sorted(trusted))
    return msgspec.structs.replace(found, name="standard input" if path == "-" else path)


def _added(old: Source, new: Source) -> Source:
    """Return `old` with `new` besides: of one kind, namespace and name there is one.

    Raises RefusedInputError where the agent would refuse what is added.
    """
    found = {(type(each), each.uid): each for each in (*old.documents, *new.documents)}
    documents = tuple(found.values())
    conflicts = own_conflicts(documents, new.settings.node)
    if conflicts:
        raise RefusedInputError(f"{conflicts[0]}; the agent would refuse it")
    return msgspec.structs.replace(new, name=f"OLD with {new.name}", documents=documents)


def _answer(old: Source, new: Source, recording: Recording | None, source: str) -> DiffReport:
    """Compare. Raises RefusedInputError."""
    before, after = old.evaluator(), new.evaluator()
    if before.workloads and before.workloads.keys().isdisjoint(after.workloads):
        raise RefusedInputError(
            f"{new.name} has none of OLD's {many(len(before.workloads), 'workload')}: name a whole "
            "configuration, or add it to OLD (--add)"
        )
    comparison = whatif.compare(before, after, {old.settings.trust_domain, *old.trusted})
    replay: Replay | None = None
    if recording is not None:
        replay = whatif.replay(before, after, recording, source)
        if recording.problem:
            say(f"note: the recording has gaps: {recording.problem}")
        # What was before the recording began, the answer says itself.
        elif gaps := [gap for gap in recording.gaps if gap.begin > recording.since]:
            text = f"note: the recording has {many(len(gaps), 'gap')} in this time, the last until "
            last = f"{moment(gaps[-1].until)}: {gaps[-1].cause}; who called then is not known"
            say(text + last)
    return DiffReport(
        schema=whatif.DIFF_SCHEMA,
        old=old.name,
        new=new.name,
        breaks=_breaks(comparison, replay),
        comparison=comparison,
        flows=replay,
    )


def _breaks(comparison: Comparison, replay: Replay | None) -> bool:
    if replay is not None:
        return bool(replay.breaks or replay.unknown or replay.truncated)
    return bool(comparison.refused or comparison.unlooked)
