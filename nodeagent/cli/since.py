"""`--since`: how far back a command looks, as an age or as a moment.

This module owns the spelling of both. It promises that a moment without an offset is local time,
and that what has not happened yet is refused. The result is a moment.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any, Final, TypeVar

import click

from nodeagent.cli import clock

__all__ = ["Since", "since_option"]

_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_AGE: Final = re.compile(r"([1-9][0-9]{0,7})([smhdw])", re.ASCII)

MAX_AGE: Final = 10 * 366 * 86400
"""Seconds: nothing is kept for longer than a year."""

F = TypeVar("F", bound=Callable[..., Any])


class Since(click.ParamType[datetime]):
    """An age (90m, 6h, 7d) or a moment (RFC 3339); gives an aware datetime in UTC."""

    name = "since"

    def convert(
        self,
        value: Any,  # noqa: ANN401 - click's signature
        param: click.Parameter | None,
        ctx: click.Context | None,
    ) -> datetime:
        if isinstance(value, datetime):
            return value
        text = str(value)
        now = clock.now()
        found = _AGE.fullmatch(text)
        if found is not None:
            return now - timedelta(seconds=min(int(found[1]) * _UNITS[found[2]], MAX_AGE))
        try:
            moment = datetime.fromisoformat(text).astimezone(UTC)
        except (ValueError, OverflowError, OSError):
            self.fail(
                f"{text!r} is no age and no time: write a number and s, m, h, d or w, as in 6h, "
                "or a time, as in 2026-01-31T08:00:00+01:00",
                param,
                ctx,
            )
        if moment > now:
            self.fail(f"{text} is in the future", param, ctx)
        return moment


def since_option(default: str | None, what: str) -> Callable[[F], F]:
    """Add `--since`, passed as `since`; `what` is looked at if it is no older."""
    return click.option(
        "--since",
        type=Since(),
        default=default,
        metavar="AGE|TIME",
        help=f"{what}: an age (90m, 6h, 7d) or a time (RFC 3339)."
        + (f"  [{default}]" if default else ""),
    )
