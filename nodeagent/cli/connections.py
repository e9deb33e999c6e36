"""`nodeagent connections`: what is open now, between whom, how it is protected, and who let it in.

This module owns the command, the two looks that make a rate, and the order and number of rows. It
promises that a rate is measured over the time between the looks at the same connection, and is left
out for one that only one of them saw. The words are those of `connections_view`.
"""

from __future__ import annotations

import time
from datetime import datetime
from pathlib import Path
from typing import Final, NoReturn
from urllib.parse import urlencode

import click
import msgspec

from nodeagent.cli import completion
from nodeagent.cli import connections_view as view
from nodeagent.cli.connections_view import Measured
from nodeagent.cli.output import Answer, Watch, answer, output_option, watch_options
from nodeagent.cli.reach import agent_options, get, run_directory
from nodeagent.connections import SCHEMA, Connections
from ztunnel.protocol import ConnectionFilter, Direction, Security

__all__ = ["connections"]

MAX_ANSWER: Final = 256 * 1024 * 1024
"""Bytes: a core lists 131,072 connections, of which each takes up to 2 KB here."""

INTERVAL_SECONDS: Final = 1.0
"""Between the two looks: short for a person, and long for a rate."""

LONGEST_SECONDS: Final = 60.0

_ORDERS: Final = ("age", "rate", "bytes")


@click.command()
@click.option(
    "--pod",
    metavar="NAMESPACE/NAME",
    shell_complete=completion.workloads,
    help="Only this workload of the node.",
)
@click.option(
    "--direction", type=click.Choice([each.value for each in Direction]), help="Only one direction."
)
@click.option(
    "--security",
    type=click.Choice([each.value for each in Security]),
    metavar="KIND",
    help=f"Only those that travel so: {', '.join(each.value for each in Security)}.",
)
@click.option(
    "--identity",
    metavar="ID",
    help="Only those of which either side has this identity, whole or from a slash on: "
    "ns/default/sa/sleep.",
)
@click.option(
    "--sort",
    "order",
    type=click.Choice(_ORDERS),
    default="age",
    help="What comes first: the newest, the quickest, or what has carried most.  [age]",
)
@click.option(
    "--limit",
    type=click.IntRange(0),
    default=0,
    metavar="NUMBER",
    help="Show so many at most; 0 is all.  [0]",
)
@click.option(
    "--interval",
    type=click.FloatRange(0, LONGEST_SECONDS),
    default=INTERVAL_SECONDS,
    metavar="SECONDS",
    help="Time between the two looks that make a rate; 0 is one look and no rates. With --watch, "
    f"--every is that time.  [{INTERVAL_SECONDS:g}]",
)
@agent_options
@output_option()
@watch_options
def connections(
    pod: str | None,
    direction: str | None,
    security: str | None,
    identity: str | None,
    order: str,
    limit: int,
    interval: float,
    run_dir: Path | None,
    settings_file: Path | None,
    output: str,
    watch: Watch,
) -> NoReturn:
    """Show the connections that this node carries now.

    One between two pods of this node is there twice: as what goes out of one and as what comes into
    the other. TO is the workload and port that is called; POLICY is who let it in, at the called
    side.

    \b
    Exit codes: 0 they are shown, however many; 2 wrong usage; 3 the agent cannot
    be reached, or cannot ask ztunnel.
    """
    wanted = ConnectionFilter(
        pod=pod,
        direction=Direction(direction) if direction is not None else None,
        security=Security(security) if security is not None else None,
        identity=identity,
        # In any other order those that are cut off are known only here.
        limit=limit if order == "age" else 0,
    )
    looker = _Looker(run_directory(run_dir, settings_file), wanted)

    def look() -> Answer:
        found = looker.look(0.0 if watch.on else interval)
        shown = _cut(found, order, limit)
        return Answer(shown, lambda printer: view.show(printer, shown))

    answer(look, output, watch)


class _Looker:
    """Looks, and remembers what the last look saw."""

    def __init__(self, directory: Path, wanted: ConnectionFilter) -> None:
        self._directory = directory
        self._resource = "/connections"
        if parameters := wanted.written():
            self._resource += f"?{urlencode(parameters)}"
        self._last: Connections[Measured] | None = None

    def look(self, interval: float) -> Connections[Measured]:
        """Return what is there, with rates since the last look, or over `interval` if not 0."""
        if interval:
            self._last = self._ask()
            time.sleep(interval)
        found = self._ask()
        last, self._last = self._last, found
        return found if last is None else _measured(last, found)

    def _ask(self) -> Connections[Measured]:
        return get(self._directory, self._resource, Connections[Measured], SCHEMA, MAX_ANSWER)


def _measured(before: Connections[Measured], now: Connections[Measured]) -> Connections[Measured]:
    seconds = (now.time - before.time).total_seconds()
    if seconds <= 0:
        return now
    known = {each.id: each for each in before.connections}
    measured = [_rated(known.get(each.id), each, seconds) for each in now.connections]
    return msgspec.structs.replace(now, connections=measured)


def _rated(before: Measured | None, now: Measured, seconds: float) -> Measured:
    if before is None:
        return now
    return msgspec.structs.replace(
        now,
        received_per_second=(now.received - before.received) / seconds,
        sent_per_second=(now.sent - before.sent) / seconds,
    )


def _cut(found: Connections[Measured], order: str, limit: int) -> Connections[Measured]:
    def newest(each: Measured) -> datetime:
        return each.started

    def rate(each: Measured) -> float:
        return (each.received_per_second or 0.0) + (each.sent_per_second or 0.0)

    def carried(each: Measured) -> int:
        return each.received + each.sent

    keys = {"age": newest, "rate": rate, "bytes": carried}
    ordered = sorted(found.connections, key=keys[order], reverse=True)  # type: ignore[arg-type]  # each by itself is comparable
    return msgspec.structs.replace(found, connections=ordered[:limit] if limit else ordered)
