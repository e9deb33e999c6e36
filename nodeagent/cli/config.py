"""`nodeagent config`: the group, whose questions are about what is set and what is in force.

This module owns the group. It promises that `nodeagent config` alone, or with options, is
`nodeagent config show`. It may not answer a question.
"""

from __future__ import annotations

import click

from nodeagent.cli import LazyGroup

__all__ = ["config"]

DEFAULT = "show"


class _WithDefault(LazyGroup):
    """A group that takes what begins with no command of its own for its default command."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        known = {*self.list_commands(ctx), *ctx.help_option_names}
        # An option belongs to the default; a word that is no command is a mistake, and said so.
        if not args or (args[0].startswith("-") and args[0] not in known):
            args = [DEFAULT, *args]
        return super().parse_args(ctx, args)


@click.group(
    cls=_WithDefault,
    lazy={
        "check": (
            "nodeagent.cli.config_check:check",
            "Would the daemon start with these settings, and take all?",
        ),
        "diff": (
            "nodeagent.cli.config_diff:diff",
            "What is in force and what is written: the difference.",
        ),
        "show": (
            "nodeagent.cli.config_show:show",
            "Documents and settings in force, and what is not.",
        ),
    },
)
def config() -> None:
    """What is in force: documents, refused ones, and settings.

    Without a command it is `nodeagent config show`.

    \b
    Exit codes: 0 yes; 1 no, or a finding; 2 wrong usage, or input that cannot
    be used; 3 the agent cannot be reached.
    """
