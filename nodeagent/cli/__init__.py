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
from typing import Any, Final

import click
from click.exceptions import NoSuchCommand
from click.shell_completion import CompletionItem

from nodeagent.cli import bash
from nodeagent.cli.ending import ended_well

__all__ = ["EXIT_USAGE", "SHORT", "LazyGroup", "RefusedInputError", "cli"]

EXIT_USAGE: Final = 2

SHORT: Final = 65
"""Columns of what a group says of a command."""

CONTEXT: Final = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


class RefusedInputError(click.ClickException):
    """A file that the command was given is wrong; the message says where and why."""

    exit_code = EXIT_USAGE


class LazyGroup(click.Group):
    """A group whose commands are loaded when they are used.

    `lazy` is the name of each, where it is ("module:attribute"), and what the group's help and a
    shell say of it, which load none of them.
    """

    def __init__(
        self, *args: object, lazy: dict[str, tuple[str, str]] | None = None, **kwargs: object
    ) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]  # click's own, as they came
        self._lazy = dict(lazy or {})

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *self._lazy})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self._lazy:
            return super().get_command(ctx, cmd_name)
        home, _ = self._lazy[cmd_name]
        module, _, attribute = home.partition(":")
        command: object = getattr(importlib.import_module(module), attribute)
        if not isinstance(command, click.Command):
            raise TypeError(f"{home} is no click command")
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except NoSuchCommand as error:
            # click itself knows those alone that are loaded, and suggests from them.
            known = self.list_commands(ctx)
            raise NoSuchCommand(error.command_name, possibilities=known, ctx=ctx) from None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, self.short(ctx, name)) for name in self.list_commands(ctx)])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        names = [
            CompletionItem(name, help=self.short(ctx, name))
            for name in self.list_commands(ctx)
            if name.startswith(incomplete)
        ]
        # The group's own options: those of a command, of which a group is one.
        return names + click.Command.shell_complete(self, ctx, incomplete)

    def short(self, ctx: click.Context, name: str) -> str:
        """Return what the group says of one of its commands."""
        if name in self._lazy:
            return self._lazy[name][1]
        command = self.get_command(ctx, name)
        return command.get_short_help_str(SHORT) if command is not None else ""


class _Root(LazyGroup):
    """The command itself."""

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:  # noqa: ANN401 - click's signature
        # Its own --help and --version are answered here.
        with ended_well():
            return super().make_context(*args, **kwargs)

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


bash.register()


@click.group(
    cls=_Root,
    context_settings=CONTEXT,
    lazy={
        "certs": (
            "nodeagent.cli.certs:certs",
            "Certificates: time left, renewal, issuers and roots.",
        ),
        "completion": (
            "nodeagent.cli.completion:completion",
            "The script by which a shell completes this command.",
        ),
        "config": (
            "nodeagent.cli.config:config",
            "What is in force: documents and settings, and what is not.",
        ),
        "connections": (
            "nodeagent.cli.connections:connections",
            "What is open now, between whom, and how protected.",
        ),
        "doctor": (
            "nodeagent.cli.doctor:doctor",
            "Examine this node: what is wrong, why, and what mends it.",
        ),
        "graph": (
            "nodeagent.cli.graph:graph",
            "Who talked to whom, and was it mutual TLS?",
        ),
        "lab": (
            "nodeagent.cli.lab:lab",
            "Nodes and pods on this machine alone, to try the mesh.",
        ),
        "logs": (
            "nodeagent.cli.logs:logs",
            "Lines of the access log and the audit log.",
        ),
        "policy": (
            "nodeagent.cli.policy:policy",
            "Policy: check, explain, test, and what a change breaks.",
        ),
        "report": (
            "nodeagent.cli.report:report",
            "Is STRICT safe? How well are workloads protected?",
        ),
        "run": (
            "nodeagent.cli.run:run",
            "Run the daemon.",
        ),
        "status": (
            "nodeagent.cli.status:status",
            "Is this node healthy, and what to do?",
        ),
        "trace": (
            "nodeagent.cli.trace:trace",
            "Connections as the kernel sees them, and what bypasses.",
        ),
        "uninstall": (
            "nodeagent.cli.run:uninstall",
            "Take every pod of this node out of the mesh.",
        ),
        "workloads": (
            "nodeagent.cli.workloads:workloads",
            "What is enrolled, in which mode, and who set it.",
        ),
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
    nodeagent trace                         connections as the kernel sees them
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
