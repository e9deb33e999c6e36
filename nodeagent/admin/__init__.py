"""What an operator and a monitoring system see of `nodeagent`: status, metrics, health.

`model` holds the published types, `metrics` the Prometheus series, `server` the HTTP listeners.
"""

from nodeagent.admin.metrics import Metrics
from nodeagent.admin.model import SCHEMA, Status
from nodeagent.admin.server import AdminServer, Backend

__all__ = ["SCHEMA", "AdminServer", "Backend", "Metrics", "Status"]
