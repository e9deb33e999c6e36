"""The published shape of what `nodeagent doctor` finds: values only.

This module owns the types that `-o json` writes. It promises that within one `SCHEMA` fields are
only added, and that a code keeps its meaning for ever. Pure: no sockets, no clocks.
"""

from __future__ import annotations

import enum
from datetime import datetime
from typing import Final

import msgspec

__all__ = ["NODE", "SCHEMA", "Finding", "Hidden", "Report", "Severity"]

SCHEMA: Final = 1

NODE: Final = "node"
"""In `Finding.affects`: everything on this node."""


class Severity(enum.StrEnum):
    """How bad it is. Errors and warnings are findings; a note asks nothing of anybody."""

    ERROR = "error"
    """Traffic or its protection is broken, or will be soon."""
    WARNING = "warning"
    """Nothing is broken yet, or it only makes the next trouble worse."""
    NOTE = "note"
    """Something was not looked at, or is worth knowing."""


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """`affects` are workloads ("namespace/name"), addresses or nodes; NODE is the whole node.

    `remedy` says what to do, `commands` are to be run as they stand. `page` is below the docs.
    """

    code: str
    severity: Severity
    title: str
    text: str
    affects: tuple[str, ...]
    remedy: str
    commands: tuple[str, ...] = ()
    page: str = ""


class Hidden(msgspec.Struct, frozen=True, kw_only=True):
    """A finding that has another one as its cause: it should go with it."""

    cause: str
    finding: Finding


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """`healthy`: no error and no warning. `examined` counts what was looked at, by kind."""

    schema: int
    time: datetime
    node: str
    release: str
    healthy: bool
    verdict: str
    findings: tuple[Finding, ...]
    hidden: tuple[Hidden, ...] = ()
    examined: dict[str, int] = {}
