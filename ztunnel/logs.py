"""The tunnel's own log: one event a line on standard error, text or JSON.

This module owns structlog's configuration. It promises that an event stays one line whatever a
peer put into a value, that values are bounded, and that times are UTC in RFC 3339. It may not
choose what is logged; the access log is not its business.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping, MutableMapping
from typing import Any, Final, TextIO

import structlog

__all__ = ["LEVELS", "setup"]

LEVELS: Final = ("debug", "info", "warning", "error")

MAX_VALUE: Final = 2000
"""Characters of one value, but for a stack trace: a line must not grow with what peers send."""

MAX_TRACE: Final = 20_000

_HEAD: Final = ("timestamp", "level", "event")


def _bound(
    _logger: object, _method: str, event: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    for key, value in event.items():
        limit = MAX_TRACE if key == "exception" else MAX_VALUE
        if isinstance(value, str) and len(value) > limit:
            event[key] = f"{value[:limit]}…"
    return event


def _text(_logger: object, _method: str, event: Mapping[str, Any]) -> str:
    """`time level event key="value" …`; quoting is JSON's, which escapes control characters."""
    head = [str(event.get("timestamp", "")), str(event.get("level", ""))]
    head.append(json.dumps(str(event.get("event", ""))))
    rest = [
        f"{key}={json.dumps(value if isinstance(value, str) else str(value))}"
        for key, value in event.items()
        if key not in _HEAD
    ]
    return " ".join(head + rest)


def setup(level: str, form: str, stream: TextIO | None = None) -> None:
    """Configure logging. `level` is one of LEVELS, `form` is "text" or "json"."""
    renderer: Any = structlog.processors.JSONRenderer(default=str) if form == "json" else _text
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            _bound,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(
            logging.getLevelNamesMapping()[level.upper()]
        ),
        logger_factory=structlog.PrintLoggerFactory(file=stream or sys.stderr),
        cache_logger_on_first_use=False,
    )
    # asyncio speaks by logging, and only when something is wrong.
    logging.basicConfig(
        level=logging.WARNING,
        stream=stream or sys.stderr,
        format="%(levelname)s %(name)s %(message)s",
    )
