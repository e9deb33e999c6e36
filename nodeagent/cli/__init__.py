"""The command `nodeagent`.

This package owns the command line. It promises that data goes to standard output and everything
else to standard error, that exit codes mean the same everywhere, and that a command loads nothing
but what it needs. It may not decide anything about the mesh.

Exit codes: 0 it worked, or the answer is yes; 1 it failed, or the answer is no; 2 the command was
used wrongly, or its answer cannot be written; 3 the agent cannot be reached; 130 and 141, as a
shell says it: interrupted, and nobody reads the answer to its end. `lab exec` passes on its
program's code.
"""

from __future__ import annotations

import importlib
from typing import Final

import click

from nodeagent.cli.ending import ended_well

__all__ = ["EXIT_USAGE", "LazyGroup", "RefusedInputError", "cli"]

EXIT_USAGE: Final = 2

CONTEXT: Final = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


class RefusedInputError(click.ClickException):
    """A file that the command was given is wrong; the message says where and why."""

    exit_code = EXIT_USAGE


class LazyGroup(click.Group):
    """A group whose commands are loaded when they are used: name to "module:attribute".

    Each module stands for one command. The help of the group loads them all.
    """

    def __init__(self, *args: object, lazy: dict[str, str] | None = None, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]  # click's own, as they came
        self._lazy = dict(lazy or {})

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *self._lazy})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        home = self._lazy.get(cmd_name)
        if home is None:
            return super().get_command(ctx, cmd_name)
        module, _, attribute = home.partition(":")
        command: object = getattr(importlib.import_module(module), attribute)
        if not isinstance(command, click.Command):
            raise TypeError(f"{home} is no click command")
        return command


class _Root(LazyGroup):
    """The command itself."""

    def invoke(self, ctx: click.Context) -> object:
        with ended_well():
            return super().invoke(ctx)


def _version(ctx: click.Context, _param: click.Parameter, value: bool) -> None:  # noqa: FBT001 - click's signature
    if value:
        # Loaded only here: it reads the metadata of the installed package.
        from importlib.metadata import PackageNotFoundError, version  # noqa: PLC0415 - see above

        try:
            found = version("nodeagent")
        except PackageNotFoundError:
            found = "not installed: run from source"
        click.echo(f"nodeagent {found}")
        ctx.exit()


@click.group(
    cls=_Root,
    context_settings=CONTEXT,
    lazy={
        "certs": "nodeagent.cli.certs:certs",
        "config": "nodeagent.cli.config:config",
        "connections": "nodeagent.cli.connections:connections",
        "doctor": "nodeagent.cli.doctor:doctor",
        "graph": "nodeagent.cli.graph:graph",
        "lab": "nodeagent.cli.lab:lab",
        "logs": "nodeagent.cli.logs:logs",
        "policy": "nodeagent.cli.policy:policy",
        "report": "nodeagent.cli.report:report",
        "run": "nodeagent.cli.run:run",
        "status": "nodeagent.cli.status:status",
        "uninstall": "nodeagent.cli.run:uninstall",
        "workloads": "nodeagent.cli.workloads:workloads",
    },
)
@click.option(
    "--version",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_version,
    help="Show the version and exit.",
)
def cli() -> None:
    """Mutual TLS for every workload of this node.

    \b
    nodeagent status                        healthy? what to do?
    nodeagent doctor                        what is wrong, why, and what to do
    nodeagent workloads                     what is enrolled? did config arrive?
    nodeagent config                        what is in force, and what is not
    nodeagent certs                         valid until when? renewed?
    nodeagent connections                   what is open, and how protected
    nodeagent graph                         who talks to whom, and is it mTLS?
    nodeagent logs --refused                who was kept out?
    nodeagent policy check FILE...          would these be in force?
    nodeagent policy diff OLD NEW           what would this change break?
    nodeagent policy explain SRC DST:PORT   allowed? by which rule? why not?
    nodeagent report plaintext              is STRICT safe? who would break?
    nodeagent lab demo                      see it work, on this machine alone
    nodeagent run                           the daemon

    \b
    Exit codes: 0 it worked; 1 it failed, or the answer is no; 2 wrong usage;
    3 the agent cannot be reached.
    """
