"""Structured logs of `nodeagent`.

This module owns structlog's configuration: one event a line on standard error, text or JSON, with
time (UTC, RFC 3339), level and event first. It promises that a line stays one line whatever a peer
or a file put into a value, and that values are bounded. It may not choose what is logged.
"""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Final, TextIO

import structlog

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["LEVELS", "render_text", "setup"]

LEVELS: Final = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}

MAX_VALUE: Final = 2_000
"""Characters of one value: a log line must not grow with what a peer or a document contains."""

_LEADING = ("timestamp", "level", "event")
_PLAIN = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-/:@+,%[]()")


def _clip(
    _logger: object, _method: str, event: structlog.typing.EventDict
) -> structlog.typing.EventDict:
    for key, value in event.items():
        if isinstance(value, str) and len(value) > MAX_VALUE:
            event[key] = value[:MAX_VALUE] + "…"
    return event


def _quote(value: object) -> str:
    text = value if isinstance(value, str) else str(value)
    if text and all(character in _PLAIN for character in text):
        return text
    escaped = "".join(
        character
        if character.isprintable() and character not in '"\\'
        else character.encode("unicode_escape").decode()
        if character not in '"\\'
        else "\\" + character
        for character in text[:MAX_VALUE]
    )
    return f'"{escaped}"'


def render_text(_logger: object, _method: str, event: Mapping[str, object]) -> str:
    """Return `time level event key=value …`, every value on one line and unambiguous."""
    head = [
        str(event[key]) if key != "event" else _quote(event[key])
        for key in _LEADING
        if key in event
    ]
    rest = [f"{key}={_quote(value)}" for key, value in event.items() if key not in _LEADING]
    return " ".join(head + rest)


def setup(level: str, log_format: str, stream: TextIO | None = None) -> None:
    """Configure structlog. `level` is a key of LEVELS, `log_format` is text or json."""
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer(default=str) if log_format == "json" else render_text
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            _clip,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(LEVELS[level]),
        logger_factory=structlog.PrintLoggerFactory(file=stream or sys.stderr),
        cache_logger_on_first_use=False,
    )
    # Libraries that use logging speak only when something is wrong.
    logging.basicConfig(
        level=logging.WARNING,
        stream=stream or sys.stderr,
        format="%(levelname)s %(name)s %(message)s",
    )
