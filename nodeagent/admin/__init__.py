"""What an operator and a monitoring system see of `nodeagent`: status, metrics, health.

`model` and `configuration` hold the published types, `metrics` the Prometheus series, `server` the
HTTP listeners. The last two are loaded when they are asked for: a command needs the types alone,
and should not wait half a second for an HTTP server.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from nodeagent.admin.configuration import Configuration
from nodeagent.admin.model import SCHEMA, Status

if TYPE_CHECKING:
    from nodeagent.admin.metrics import Metrics
    from nodeagent.admin.server import (
        AdminServer,
        Backend,
        NoAnswerError,
        Page,
        Question,
        Relay,
        Relayed,
        Window,
    )

__all__ = [
    "SCHEMA",
    "AdminServer",
    "Backend",
    "Configuration",
    "Metrics",
    "NoAnswerError",
    "Page",
    "Question",
    "Relay",
    "Relayed",
    "Status",
    "Window",
]


def __getattr__(name: str) -> Any:  # noqa: ANN401 - of whatever type it is (PEP 562)
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = "metrics" if name == "Metrics" else "server"
    return getattr(importlib.import_module(f"{__name__}.{home}"), name)
