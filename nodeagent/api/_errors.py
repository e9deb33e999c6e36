"""What can be wrong with a configuration, and where.

This module owns the two records that every reader of configuration reports with. It promises that
each names a file, a line, a column, a field and a reason that says what to do, as values and not
only as text. It may not read files or decide what is an error.
"""

from __future__ import annotations

import msgspec

__all__ = ["ConfigError", "ConfigWarning", "Origin", "quote"]

_QUOTED_CHARACTERS = 80


def quote(text: str) -> str:
    """Return `text` for a message: escaped, so that it can forge no log line, and shortened."""
    if len(text) > _QUOTED_CHARACTERS:
        return f"{text[:_QUOTED_CHARACTERS]!r}… ({len(text)} characters)"
    return repr(text)


def _locate(file: str, line: int, column: int) -> str:
    return f"{file}:{line}:{column}" if line else file


class Origin(msgspec.Struct, frozen=True, order=True, gc=False):
    """Where a document starts. `line` and `column` count from 1."""

    file: str
    line: int
    column: int = 1

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


class ConfigError(Exception):
    """A configuration was refused.

    `line` and `column` count from 1; both are 0 when the whole file is meant. `field` is a path
    like "spec.mtls.mode", empty when no field is meant. `reason` says what is wrong and what to do.
    `others` holds the further errors of the same reading, when only one could be raised.
    """

    def __init__(
        self,
        file: str,
        line: int,
        column: int,
        field: str,
        reason: str,
        others: tuple[ConfigError, ...] = (),
    ) -> None:
        super().__init__(file, line, column, field, reason)
        self.file = file
        self.line = line
        self.column = column
        self.field = field
        self.reason = reason
        self.others = others

    def __str__(self) -> str:
        where = _locate(self.file, self.line, self.column)
        text = f"{where}: {self.field}: {self.reason}" if self.field else f"{where}: {self.reason}"
        return "\n".join([text, *(str(other) for other in self.others)])

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, ConfigError)
            and self.args == other.args
            and self.others == other.others
        )

    def __hash__(self) -> int:
        return hash(self.args)


class ConfigWarning(msgspec.Struct, frozen=True, order=True):
    """Something that is accepted and has no effect, or not the effect that its author may expect.

    The fields are those of `ConfigError`.
    """

    file: str
    line: int
    column: int
    field: str
    reason: str

    def __str__(self) -> str:
        where = _locate(self.file, self.line, self.column)
        return f"{where}: {self.field}: {self.reason}" if self.field else f"{where}: {self.reason}"
