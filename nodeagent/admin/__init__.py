"""What an operator and a monitoring system see of `nodeagent`: status, metrics, health.

`model` and `configuration` hold the published types, `metrics` the Prometheus series, `server` the
HTTP listeners.
"""

from nodeagent.admin.configuration import Configuration
from nodeagent.admin.metrics import Metrics
from nodeagent.admin.model import SCHEMA, Status
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
