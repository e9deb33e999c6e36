"""The audit log: who was let in or kept out, by which policy, for people and for a SIEM.

`log` chooses which judgements have a line, `limit` how many lines there may be, `entry` is what is
said of one. `forms`, `syslog` and `journal` are how it is spelled, `sinks` the sockets that it goes
to, and `outlets` which of them there are. Nothing here judges, or waits on the event loop.
"""

from ztunnel.audit.log import AuditLog, Counts

__all__ = ["AuditLog", "Counts"]
