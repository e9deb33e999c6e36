"""`nodeagent trace`: the pods' connections as the kernel sees them, for a while.

This module owns the command: how long it looks, how much it says, and its exit code. It promises to
end by itself, to write one line an event as it comes, and to count what it leaves out.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, NoReturn

import click
import msgspec

from nodeagent.admin.model import PodReport
from nodeagent.cli import trace_view
from nodeagent.cli.ending import ExitCode, say
from nodeagent.cli.reach import agent_options, get, run_directory
from nodeagent.cli.status import fetch
from nodeagent.cli.text import many
from nodeagent.pods import NetnsError, open_netns
from nodeagent.trace import Directory, Event, MissingError, Program, TracedPod, decode

__all__ = ["trace"]

DEFAULT_SECONDS: Final = 30
LONGEST_SECONDS: Final = 3600
"""Each connection of the pods costs a microsecond more meanwhile; nobody should forget it."""

MOST_EVENTS: Final = 10_000
"""Lines of one run: more than anybody reads. It ends there, and says so."""

MOST_A_SECOND: Final = 500
"""Lines of one second: a terminal that scrolls faster is of no use. The rest is counted."""

POLL_SECONDS: Final = 0.2

STATE_SCHEMA: Final = 1
MAX_STATE: Final = 512 * 1024 * 1024
"""Bytes of the state that ztunnel holds: 100,000 workloads fit."""

KINDS: Final = ("connection", "retransmit", "bypass")


class _State(msgspec.Struct):
    """`/config_dump`, by kind of resource."""

    schema: int
    resources: dict[str, list[dict[str, Any]]]


class _CannotBeginError(click.ClickException):
    exit_code = ExitCode.FINDING


@click.command()
@click.argument("pods", nargs=-1, metavar="[POD]...")
@agent_options
@click.option(
    "--seconds",
    type=click.IntRange(1, LONGEST_SECONDS),
    default=DEFAULT_SECONDS,
    metavar="N",
    help=f"How long to look.  [{DEFAULT_SECONDS}]",
)
@click.option(
    "--event",
    "kinds",
    type=click.Choice(KINDS),
    multiple=True,
    metavar="KIND",
    help=f"Only these: {', '.join(KINDS)}; may be repeated.  [all]",
)
@click.option("--tunnel", is_flag=True, help="Also the ends of connections that are ztunnel's.")
@click.option(
    "-o",
    "--output",
    type=click.Choice(["text", "json"]),
    default="text",
    metavar="FORM",
    help="Form of each line: text, json.  [text]",
)
def trace(
    pods: Sequence[str],
    run_dir: Path | None,
    settings_file: Path | None,
    seconds: int,
    kinds: Sequence[str],
    *,
    tunnel: bool,
    output: str,
) -> NoReturn:
    """Watch the pods' connections in the kernel: ends, retransmits, bypasses.

    One line for each connection that begins and ends meanwhile, for each packet
    sent again, and for each flow that leaves a captured pod around the tunnel.
    POD is a workload, NAMESPACE/NAME or NAME; without any, all of this node.

    Compiles a small program by bcc (Debian: python3-bpfcc and the kernel's
    headers), which is gone when the command ends.

    \b
    Exit codes: 0 nothing went around the tunnel; 1 something did, or it cannot
    begin; 2 wrong usage; 3 the agent cannot be reached.
    """
    directory = run_directory(run_dir, settings_file)
    wanted = _chosen(fetch(directory).pods, pods)
    state = get(directory, "/config_dump", _State, STATE_SCHEMA, MAX_STATE)
    traced = [found for each in wanted if (found := _traced(each)) is not None]
    if not traced:
        raise click.UsageError("no pod of this node can be looked at")
    lines = _Lines(Directory(traced, state.resources), kinds or KINDS, output, tunnel=tunnel)
    with _interruptions() as interrupted:
        try:
            program = Program([each.netns for each in traced], lines.take)
        except MissingError as error:
            raise _CannotBeginError(f"{error}\n  do: {error.remedy}") from None
        try:
            say(f"looking at {many(len(traced), 'pod')} for {seconds} s; Ctrl-C ends")
            lines.follow(program, seconds, interrupted)
        finally:
            program.close()
    sys.exit(ExitCode.FINDING if lines.counts["bypass"] else ExitCode.FINE)


@contextlib.contextmanager
def _interruptions() -> Iterator[Callable[[], bool]]:
    """Yield whether Ctrl-C was pressed since. As an exception it would be lost in what the compiler
    and the ring call back, or leave them half done.
    """
    pressed: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: pressed.append(number))
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)


def _chosen(found: Sequence[PodReport], names: Sequence[str]) -> list[PodReport]:
    if not names:
        return list(found)
    chosen: list[PodReport] = []
    for name in names:
        matching = [pod for pod in found if name in (pod.workload, pod.workload.partition("/")[2])]
        if len(matching) != 1:
            which = ", ".join(pod.workload for pod in matching or found) or "there are none"
            raise click.BadParameter(
                f"{name!r} is {'no pod of this node' if not matching else 'several'}: {which}",
                param_hint="POD",
            )
        chosen += matching
    return chosen


def _traced(pod: PodReport) -> TracedPod | None:
    try:
        netns = open_netns(pod.netns)
    except NetnsError as error:
        say(f"{pod.workload} is left out: {error}")
        return None
    try:
        return TracedPod(pod.workload, pod.identity, netns.inode, pod.addresses)
    finally:
        netns.close()


class _Lines:
    """Writes events, and counts them."""

    def __init__(
        self, directory: Directory, kinds: Sequence[str], output: str, *, tunnel: bool
    ) -> None:
        self._directory = directory
        self._kinds = frozenset(kinds)
        self._output = output
        self._tunnel = tunnel
        self._second = 0
        self._in_second = 0
        self._left_out = 0
        self.counts: Counter[str] = Counter()

    def take(self, data: bytes) -> None:
        event = decode(data, self._directory, datetime.now(UTC), time.monotonic())
        if event is None or event.event not in self._kinds:
            return
        if event.event == "connection" and event.role == "tunnel" and not self._tunnel:
            return
        self.counts[event.event] += 1
        second = int(time.monotonic())
        if second != self._second:
            self._second, self._in_second = second, 0
        self._in_second += 1
        if self._in_second > MOST_A_SECOND or self.counts.total() > MOST_EVENTS:
            self._left_out += 1
            return
        click.echo(self._spelled(event))

    def _spelled(self, event: Event) -> str:
        if self._output == "json":
            return msgspec.json.encode(event).decode()
        return trace_view.line(event)

    def follow(self, program: Program, seconds: float, interrupted: Callable[[], bool]) -> None:
        """Take events until the time, or the room, is over."""
        began = time.monotonic()
        while (left := began + seconds - time.monotonic()) > 0 and not interrupted():
            program.wait(min(left, POLL_SECONDS))
            if self.counts.total() >= MOST_EVENTS:
                break
        said = trace_view.summary(
            self.counts, time.monotonic() - began, self._left_out, program.lost()
        )
        say(said)
