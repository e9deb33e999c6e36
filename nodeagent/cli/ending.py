"""How a command ends: the exit codes, and what becomes of one that cannot go on to its answer.

This module owns the exit codes that a script may rely on, what is said on standard error, and what
becomes of an interrupt, and of an answer that cannot be written. It promises that neither looks
like the answer "no", nor is a traceback; that a character which standard output has no spelling for
is escaped; and that nothing which is said can steer a terminal. It may not know any command.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import io
import os
import signal
import sys
from collections.abc import Iterator
from typing import IO, Any, Final

import click

from nodeagent.cli.text import printable_lines

__all__ = ["ExitCode", "ended_well", "say"]


class ExitCode(enum.IntEnum):
    """What a script may rely on: the same for every command, in every form of the answer."""

    FINE = 0
    """It worked, or the answer is yes, or nothing was found that somebody must see to."""
    FINDING = 1
    """It failed, or the answer is no, or something was found."""
    USAGE = 2
    """The command was used wrongly, or what it was given cannot be read, or nobody can have the
    answer."""
    UNREACHABLE = 3
    """The agent cannot be reached."""


EXIT_SIGNAL: Final = 128
"""Added to a signal's number: how a shell reports a program that a signal has ended."""

_OF_WRITING: Final = (errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors that nothing but a write has."""


class _UnwrittenError(click.ClickException):
    exit_code = ExitCode.USAGE


class _InterruptedError(click.ClickException):
    exit_code = EXIT_SIGNAL + signal.SIGINT

    def show(self, file: IO[Any] | None = None) -> None:
        """Say nothing: who interrupts knows it."""


class _UnreadError(_InterruptedError):
    exit_code = EXIT_SIGNAL + signal.SIGPIPE


def say(text: str) -> None:
    """Say something on standard error, whoever has written it."""
    click.echo(printable_lines(text), err=True)


@contextlib.contextmanager
def ended_well() -> Iterator[None]:
    """Turn an interrupt and an error of writing into exit codes of their own."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        yield
    except click.ClickException as error:
        # Names of files, and what is written in them, are in many.
        said = printable_lines(error.message)
        error.message = said  # type: ignore[misc]  # click only means that nobody changes its sense
        raise
    except KeyboardInterrupt:
        raise _InterruptedError("interrupted") from None
    except OSError as error:
        if error.errno not in _OF_WRITING:
            raise
        _give_up_output()
        if isinstance(error, BrokenPipeError):
            raise _UnreadError("nobody reads the answer") from None
        raise _UnwrittenError(f"the answer cannot be written: {error.strerror}") from None


def _give_up_output() -> None:
    """Have what is left in the buffer go nowhere: it is written once more at the very end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
