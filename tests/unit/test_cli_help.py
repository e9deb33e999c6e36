"""The help of every command: for a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Iterator

import click
import pytest
from click.testing import CliRunner

from nodeagent.cli import cli
from ztunnel.daemon import command as ztunnel

COLUMNS = 80


def commands(command: click.Command, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    yield path
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            below = command.get_command(context, name)
            assert below is not None
            yield from commands(below, (*path, name))


@pytest.mark.parametrize("path", list(commands(cli)), ids=" ".join)
def test_help_fits_the_terminal(path: tuple[str, ...]) -> None:
    fits(cli, path)


def test_help_of_ztunnel_fits_the_terminal() -> None:
    fits(ztunnel, ())


def fits(command: click.Command, path: tuple[str, ...]) -> None:
    result = CliRunner().invoke(command, [*path, "--help"], terminal_width=COLUMNS)
    assert result.exit_code == 0
    assert [line for line in result.stdout.splitlines() if len(line) > COLUMNS] == []
