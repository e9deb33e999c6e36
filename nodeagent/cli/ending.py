"""How a command ends that cannot go on to its answer.

This module owns what becomes of an interrupt, and of an answer that cannot be written. It promises
that neither looks like the answer "no", nor is a traceback. It may not know any command.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
from collections.abc import Iterator
from typing import IO, Any, Final

import click

__all__ = ["ended_well"]

EXIT_SIGNAL: Final = 128
"""Added to a signal's number: how a shell reports a program that a signal has ended."""

_OF_WRITING: Final = (errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors that nothing but a write has."""


class _UnwrittenError(click.ClickException):
    exit_code = 2


class _InterruptedError(click.ClickException):
    exit_code = EXIT_SIGNAL + signal.SIGINT

    def show(self, file: IO[Any] | None = None) -> None:
        """Say nothing: who interrupts knows it."""


class _UnreadError(_InterruptedError):
    exit_code = EXIT_SIGNAL + signal.SIGPIPE


@contextlib.contextmanager
def ended_well() -> Iterator[None]:
    """Turn an interrupt and an error of writing into exit codes of their own."""
    try:
        yield
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
