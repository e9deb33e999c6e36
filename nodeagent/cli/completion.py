"""`nodeagent completion`: the script by which a shell completes this command; and what completes.

This module owns the command, and the names that are completed by asking the agent. It promises that
completing never writes an error into somebody's command line, and waits for nobody: without an
agent there are no names.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import click
from click.shell_completion import get_completion_class

from nodeagent.cli.output import write_text
from nodeagent.cli.reach import UnreachableError, run_directory
from nodeagent.cli.status import fetch

__all__ = ["completion", "either", "identities", "workloads"]

SHELLS: Final = ("bash", "zsh", "fish")

_PROGRAM: Final = "nodeagent"
_VARIABLE: Final = "_NODEAGENT_COMPLETE"
"""What click takes for the wish to complete, by the program's name."""


@click.command()
@click.argument("shell", type=click.Choice(SHELLS))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the script that makes SHELL complete commands, options and workloads.

    \b
    bash  nodeagent completion bash > /etc/bash_completion.d/nodeagent
    zsh   nodeagent completion zsh > "${fpath[1]}/_nodeagent"
    fish  nodeagent completion fish > ~/.config/fish/completions/nodeagent.fish

    `make install` does this for all users. Begin a new shell afterwards.

    \b
    Exit codes: 0 here it is; 2 no such shell.
    """
    found = get_completion_class(shell)
    assert found is not None  # noqa: S101 - click has all of SHELLS
    write_text(found(ctx.find_root().command, {}, _PROGRAM, _VARIABLE).source())


def workloads(ctx: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
    """Return the workloads of this node that begin so; none if nobody knows."""
    return _found(ctx, incomplete, "workload")


def identities(ctx: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
    """Return the identities of this node that begin so; none if nobody knows."""
    return _found(ctx, incomplete, "identity")


def either(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """Return the workloads and identities of this node that begin so; none if nobody knows."""
    return [*workloads(ctx, parameter, incomplete), *identities(ctx, parameter, incomplete)]


def _found(ctx: click.Context, incomplete: str, field: str) -> list[str]:
    run_dir, settings = ctx.params.get("run_dir"), ctx.params.get("settings_file")
    try:
        directory = run_directory(run_dir and Path(run_dir), settings and Path(settings))
        pods = fetch(directory).pods
    except (UnreachableError, click.UsageError):
        return []
    return sorted(
        {str(getattr(pod, field)) for pod in pods if getattr(pod, field).startswith(incomplete)}
    )
