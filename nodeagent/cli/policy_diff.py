"""`nodeagent policy diff`: what would a change of configuration do, and to whom?

This module owns the command's options, the way to the recorded flows and the exit codes. It
promises the same exit code with every output form, one document on standard output, and that what
cannot be told counts as a change for the worse. The words are those of `policy_diff_view`.
"""

from __future__ import annotations

import re
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, NoReturn

import click
import msgspec

from nodeagent import flows, whatif
from nodeagent.cli import RefusedInputError
from nodeagent.cli.policy import settings_of, settings_option, write_json
from nodeagent.cli.policy_diff_view import lines
from nodeagent.cli.policy_source import Source, from_agent, of_files
from nodeagent.cli.reach import EXIT_UNREACHABLE, UnreachableError, get, report, run_directory
from nodeagent.flows import Recording
from nodeagent.whatif import Comparison, DiffReport, Replay

__all__ = ["diff"]

EXIT_BREAKS: Final = 1

MAX_ANSWER: Final = 128 * 1024 * 1024
"""Bytes of recorded flows: as many as the agent gives, each with names of the greatest length that
occurs."""

_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_AGE: Final = re.compile(r"([1-9][0-9]{0,7})([smhdw])", re.ASCII)

MAX_AGE: Final = 10 * 366 * 86400
"""Seconds: nothing is kept for longer than a year."""

_SIDES: Final = 2


class _Age(click.ParamType[int]):
    name = "age"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        """Return seconds."""
        found = _AGE.fullmatch(str(value))
        if found is None:
            self.fail(
                f"{value!r} is no age: write a number and s, m, h, d or w, as in 6h", param, ctx
            )
        return min(int(found[1]) * _UNITS[found[2]], MAX_AGE)


@click.command()
@click.argument("paths", nargs=-1, required=True, metavar="[OLD] NEW")
@click.option("--running", is_flag=True, help="OLD is what the running agent has in force.")
@click.option("--flows", "live", is_flag=True, help="Replay what the running agent has recorded.")
@click.option(
    "--flows-db",
    "file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Replay what is recorded in this file: an agent's flows.db, or a copy.",
)
@click.option(
    "--since",
    "age",
    type=_Age(),
    default="24h",
    show_default=True,
    help="How old a recorded flow may be: 90m, 6h, 7d.",
)
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
@click.option(
    "-o", "--output", type=click.Choice(["text", "json"]), default="text", show_default=True
)
def diff(
    paths: tuple[str, ...],
    running: bool,  # noqa: FBT001 - click calls by name
    live: bool,  # noqa: FBT001 - click calls by name
    file: Path | None,
    age: int,
    trust: tuple[str, ...],
    run_dir: Path | None,
    settings_file: Path | None,
    output: str,
) -> NoReturn:
    """Say which calls NEW would refuse that OLD lets in, and which the other way round.

    OLD and NEW are files, directories (their *.yaml, *.yml and *.json), or - for standard input;
    each is a whole configuration. Of callers whom no policy tells apart one stands for all; ports
    that no policy names are "other".

    With --flows or --flows-db, recorded calls are judged again by both: these callers would break.

    \b
    Exit codes, without recorded flows:
      0 nothing that OLD lets in would be refused
      1 something would, or there is too much to look at all of it
    With recorded flows they alone decide:
      0 no recorded caller would be refused
      1 one would, or some were not recorded one by one and may be
    2 wrong usage, files with errors, or nothing is recorded; 3 the agent cannot be reached.
    """
    _check_usage(paths, running=running, live=live, file=file, run_dir=run_dir)
    try:
        recording = _recording(live, file, age, run_dir, settings_file)
        old, new = _sides(paths, running, trust, run_dir, settings_file, recording)
    except UnreachableError as error:
        report(error)
        sys.exit(EXIT_UNREACHABLE)
    found = _answer(old, new, recording, "the running agent" if live else str(file))
    if output == "json":
        write_json(found)
    else:
        for line in lines(found, datetime.now(UTC)):
            click.echo(line)
    sys.exit(EXIT_BREAKS if found.breaks else 0)


def _check_usage(
    paths: tuple[str, ...], *, running: bool, live: bool, file: Path | None, run_dir: Path | None
) -> None:
    wanted = 1 if running else _SIDES
    if len(paths) != wanted:
        what = "NEW only, for OLD is what runs" if running else "OLD and NEW (or --running and NEW)"
        raise click.UsageError(f"{len(paths)} paths: name {what}")
    if paths.count("-") > 1:
        raise click.UsageError("standard input can be OLD or NEW, not both")
    if live and file is not None:
        raise click.UsageError("--flows and --flows-db exclude each other")
    if run_dir is not None and not (running or live):
        raise click.UsageError("--run-dir is for --running and --flows")


def _recording(
    live: bool,  # noqa: FBT001 - options of the command
    file: Path | None,
    age: int,
    run_dir: Path | None,
    settings_file: Path | None,
) -> Recording | None:
    """Return the recorded flows that are asked for. Raises UnreachableError, RefusedInputError."""
    if live:
        directory = run_directory(run_dir, settings_file if run_dir is None else None)
        found = get(directory, f"/flows?seconds={age}", Recording, flows.SCHEMA, MAX_ANSWER)
        if found.oldest is None:
            cause = found.problem or "nobody has called since it was started"
            raise RefusedInputError(f"the agent has recorded nothing: {cause}")
        return found
    if file is None:
        return None
    try:
        found = flows.recording(file, "", time.time(), age)
    except flows.StoreError as error:
        raise RefusedInputError(str(error)) from None
    if found.oldest is None:
        raise RefusedInputError(f"{file}: nothing is recorded in it")
    return found


def _sides(
    paths: tuple[str, ...],
    running: bool,  # noqa: FBT001 - options of the command
    trust: tuple[str, ...],
    run_dir: Path | None,
    settings_file: Path | None,
    recording: Recording | None,
) -> tuple[Source, Source]:
    """Return both configurations; what one of them trusts the other does too."""
    trusted = {*trust, *(whatif.domains(recording) if recording is not None else ())}
    if running:
        old = from_agent(run_dir, settings_file if run_dir is None else None)
        trusted.update(old.trusted)
        settings = old.settings if settings_file is None else settings_of(settings_file)
        old = msgspec.structs.replace(old, trusted=tuple(sorted(trusted)))
    else:
        settings = settings_of(settings_file)
        old = of_files(paths[:1], settings, sorted(trusted))
    new = of_files(paths[-1:], settings, sorted(trusted))
    names = (old.name if running else _shown(paths[0]), _shown(paths[-1]))
    return (
        msgspec.structs.replace(old, name=names[0]),
        msgspec.structs.replace(new, name=names[1]),
    )


def _shown(path: str) -> str:
    return "standard input" if path == "-" else path


def _answer(old: Source, new: Source, recording: Recording | None, source: str) -> DiffReport:
    """Compare. Raises RefusedInputError."""
    before, after = old.evaluator(), new.evaluator()
    comparison = whatif.compare(before, after, {old.settings.trust_domain, *old.trusted})
    replay: Replay | None = None
    if recording is not None:
        replay = whatif.replay(before, after, recording, source)
        if recording.problem:
            click.echo(f"note: the recording has gaps: {recording.problem}", err=True)
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
