"""`nodeagent policy`: questions about policy, before and while it is in force.

This module owns the group, and what its commands share: the settings that a question is asked by.
It promises that a question changes nothing. It may not answer one.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from nodeagent.api import ConfigError
from nodeagent.cli import LazyGroup, RefusedInputError
from nodeagent.settings import Settings, load_settings

__all__ = ["policy", "settings_of", "settings_option"]

F = TypeVar("F", bound=Callable[..., Any])


@click.group(
    cls=LazyGroup,
    lazy={
        "check": (
            "nodeagent.cli.policy_check:check",
            "Would the agent take these documents?",
        ),
        "diff": (
            "nodeagent.cli.policy_diff:diff",
            "What would a change break, and for whom?",
        ),
        "explain": (
            "nodeagent.cli.policy_explain:explain",
            "Is this connection allowed, by which rule, and why not?",
        ),
        "test": (
            "nodeagent.cli.policy_test:test",
            "Do policies decide as a table says that they should?",
        ),
    },
)
def policy() -> None:
    """Look at policy before it is in force, and ask what it does.

    Exit codes: 0 yes; 1 no, or a finding; 2 wrong usage, or input that cannot be used; 3 the agent
    cannot be reached.
    """


def settings_option(command: F) -> F:
    """Add `--settings` to a command."""
    option = click.option(
        "--settings",
        "settings_file",
        type=click.Path(dir_okay=False, path_type=Path),
        help="The agent's settings: trust domain, root namespace, node. Default: the defaults.",
    )
    return option(command)


def settings_of(file: Path | None) -> Settings:
    """Return the settings in `file`, the defaults without. Raises RefusedInputError."""
    if file is None:
        return Settings()
    try:
        return load_settings(file)
    except ConfigError as error:
        raise RefusedInputError(str(error)) from None
