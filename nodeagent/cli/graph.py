"""`nodeagent graph`: who talks to whom at which port, and was it mutual TLS?

This module owns the command, its filters and its exit code. It promises that `--fail-on` fails
also when not all of the time was recorded, or nobody was seen by a name that is asked for: what was
not seen is not known to be fine. The words are those of `graph_view`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Final, NoReturn

import click
import msgspec

from nodeagent.cli import clock, completion
from nodeagent.cli import graph_view as view
from nodeagent.cli.ending import ExitCode
from nodeagent.cli.output import (
    Answer,
    Printer,
    Watch,
    answer,
    output_option,
    watch_options,
)
from nodeagent.cli.reach import agent_options, get, run_directory
from nodeagent.cli.since import since_option
from nodeagent.observe.graph_model import SCHEMA, Edge, Graph, Kind, Padlock

__all__ = ["graph"]

MAX_ANSWER: Final = 64 * 1024 * 1024
"""Bytes: as many edges as the agent gives, with names of the greatest length that occurs."""

_PADLOCKS: Final = {"all": Padlock.ALL, "some": Padlock.SOME, "none": Padlock.NONE}
_PADLOCKS["no-data"] = Padlock.NO_DATA

_FINDINGS: Final = ("plaintext", "unencrypted", "refused", "failed")


class _Filter(msgspec.Struct, frozen=True):
    """What is shown: edges for which all that is given holds."""

    namespace: str
    names: tuple[str, ...]
    padlocks: tuple[str, ...]

    def __call__(self, edge: Edge) -> bool:
        ends = (edge.source, edge.destination)
        return (
            (not self.namespace or any(end.startswith(f"{self.namespace}/") for end in ends))
            and (not self.names or any(_matches(end, self.names) for end in ends))
            and (not self.padlocks or edge.padlock in {_PADLOCKS[each] for each in self.padlocks})
        )


def _matches(end: str, patterns: Sequence[str]) -> bool:
    """A `*` is for anything; every other sign is itself."""
    return any(
        re.fullmatch(".*".join(map(re.escape, pattern.split("*"))), end, re.DOTALL)
        for pattern in patterns
    )


@click.command()
@click.argument("names", nargs=-1, metavar="[NAME...]", shell_complete=completion.workloads)
@since_option("1h", "What was seen since then")
@click.option(
    "-n", "--namespace", default="", metavar="NAME", help="Only to or from this namespace."
)
@click.option(
    "--padlock",
    "padlocks",
    type=click.Choice(list(_PADLOCKS)),
    multiple=True,
    metavar="STATE",
    help=f"Only edges in this state: {', '.join(_PADLOCKS)}. May be repeated.",
)
@click.option(
    "--fail-on",
    "fail_on",
    type=click.Choice(_FINDINGS),
    multiple=True,
    metavar="WHAT",
    help=f"Exit with 1 if an edge shown has {', '.join(_FINDINGS[:-1])} or {_FINDINGS[-1]} "
    "connections, if not all of the time was recorded, or if a NAME is nobody's. May be repeated.",
)
@agent_options
@output_option(("table", "wide"), "dot")
@watch_options
def graph(
    names: tuple[str, ...],
    since: datetime,
    namespace: str,
    padlocks: tuple[str, ...],
    fail_on: tuple[str, ...],
    run_dir: Path | None,
    settings_file: Path | None,
    output: str,
    watch: Watch,
) -> NoReturn:
    """Show who talked to whom at which port, and how, as this node saw it.

    A padlock is taken from connections that were carried, never from configuration: all of them
    were mutual TLS, some, none, or there is no data. A connection that was open in the time asked
    for counts, whenever it began. NAME is NAMESPACE/NAME of either end, "outside" or "node"; it may
    have * in it.

    \b
      nodeagent graph --since 10m -n shop
      nodeagent graph --padlock none --padlock some
      nodeagent graph -o dot | dot -Tsvg > graph.svg

    Plaintext of --fail-on is that to workloads: what an application sends out of the mesh it may
    well have encrypted itself. Unencrypted is the same with direct connections, which keep to this
    node and have identities, but no encryption.

    \b
    Exit codes: 0 it is shown; 1 what --fail-on asks for was found; 2 wrong usage;
    3 the agent cannot be reached.
    """
    if output == "dot" and watch.on:
        raise click.UsageError("-o dot is one picture: leave out --watch")
    directory = run_directory(run_dir, settings_file)
    wanted = _Filter(namespace, names, padlocks)
    # Once: while somebody watches, the window moves on with him.
    age = max(1, round((clock.now() - since).total_seconds()))

    def look() -> Answer:
        seen = get(directory, f"/graph?seconds={age}", Graph, SCHEMA, MAX_ANSWER)
        shown = _filtered(seen, wanted)
        nobody = _nobody(seen, wanted)

        def show(printer: Printer) -> None:
            if output == "dot":
                view.dot(printer, shown)
            else:
                left_out = len(seen.edges) - len(shown.edges)
                view.people(printer, shown, left_out=left_out, nobody=nobody)

        return Answer(shown, show, _code(shown, fail_on, nobody))

    answer(look, output, watch)


def _filtered(seen: Graph, wanted: _Filter) -> Graph:
    edges = tuple(filter(wanted, seen.edges))
    if wanted == _Filter("", (), ()):
        return seen
    ends = {end for edge in edges for end in (edge.source, edge.destination)}
    vertices = tuple(vertex for vertex in seen.vertices if vertex.id in ends)
    return msgspec.structs.replace(seen, edges=edges, vertices=vertices)


def _nobody(seen: Graph, wanted: _Filter) -> tuple[str, ...]:
    """Return what is asked for by a name that nobody has: mistyped, or of another node."""
    there = {vertex.id for vertex in seen.vertices} | set(Kind)
    names = [each for each in wanted.names if not any(_matches(end, (each,)) for end in there)]
    if wanted.namespace and not any(end.startswith(f"{wanted.namespace}/") for end in there):
        names.append(wanted.namespace)
    return tuple(names)


def _code(shown: Graph, fail_on: Sequence[str], nobody: Sequence[str]) -> ExitCode:
    if not fail_on:
        return ExitCode.FINE
    outside = {vertex.id for vertex in shown.vertices if vertex.kind in {Kind.OUTSIDE, Kind.NODE}}
    known = shown.complete and not shown.truncated
    found = any(_has(edge, what, outside) for edge in shown.edges for what in fail_on)
    return ExitCode.FINDING if found or nobody or not known else ExitCode.FINE


def _has(edge: Edge, what: str, outside: set[str]) -> bool:
    within = edge.destination not in outside
    match what:
        case "plaintext":
            return within and edge.connections.plaintext > 0
        case "unencrypted":
            return within and edge.connections.total > edge.connections.mutual_tls
        case "refused":
            return edge.refused > 0
        case _:
            return edge.failed > 0
