"""`nodeagent report`: what has been recorded of this node's workloads, put together.

This module owns the group, and how its commands pick workloads and reach the agent. It promises
that a name which stands for nothing here is refused, and never an answer of yes. It may not know
what is reported.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from datetime import datetime
from typing import Any, TypeVar

import click

from nodeagent.cli import LazyGroup, RefusedInputError, clock, completion
from nodeagent.cli.text import printable

__all__ = ["age", "named", "picking_options", "report"]

F = TypeVar("F", bound=Callable[..., Any])


@click.group(
    cls=LazyGroup,
    lazy={
        "asdex": (
            "nodeagent.cli.report_asdex:asdex",
            "How well are workloads protected, and what costs points?",
        ),
        "plaintext": (
            "nodeagent.cli.report_plaintext:plaintext",
            "Who calls without an identity, and is STRICT safe?",
        ),
    },
)
def report() -> None:
    """Report what has been recorded: is STRICT safe, and how well are workloads protected?

    Of one node, the one that the command runs on: ask each.
    """


def picking_options(command: F) -> F:
    """Add WORKLOAD... and `--namespace`, passed as `names` and `namespaces`."""
    workloads = click.argument(
        "names", nargs=-1, metavar="[NAMESPACE/NAME...]", shell_complete=completion.workloads
    )
    namespace = click.option(
        "-n",
        "--namespace",
        "namespaces",
        multiple=True,
        metavar="NAMESPACE",
        help="Only workloads of this namespace. May be repeated.",
    )
    return workloads(namespace(command))


def age(since: datetime) -> int:
    """Return whole seconds since a moment, no fewer."""
    return max(1, math.ceil((clock.now() - since).total_seconds()))


def named(known: Iterable[str], names: Collection[str], namespaces: Collection[str]) -> set[str]:
    """Return those of the `known` workloads that are asked for. Raises RefusedInputError."""
    every = set(known)
    for name in names:
        if name not in every:
            raise RefusedInputError(
                f"{printable(name)} is no workload of this node: nodeagent status lists them, "
                "and each node knows its own"
            )
    here = {uid.partition("/")[0] for uid in every}
    for namespace in namespaces:
        if namespace not in here:
            raise RefusedInputError(
                f"no workload of namespace {printable(namespace)} is of this node: nodeagent "
                "status lists them, and each node knows its own"
            )
    if not names and not namespaces:
        return every
    return {uid for uid in every if uid in names or uid.partition("/")[0] in namespaces}
