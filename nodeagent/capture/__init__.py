"""Capture: every TCP connection of a pod passes the tunnel, or does not pass.

This package owns what is put into a pod's network namespace: the capture program, the guard at its
devices, routing rules, sysctls and the tunnel's listening sockets. It promises complete removal,
undo on failure, and to stay closed where mutual TLS is due and something is missing. It may not
judge a connection: the tunnel does. The steps and their order are in docs/capture.md.
"""

from nodeagent.capture.model import (
    Capture,
    CaptureError,
    CaptureReason,
    Deviation,
    Enforcement,
    Enrolment,
    Finding,
    Listeners,
    PodSpec,
    Recovered,
    Repair,
)
from nodeagent.capture.sk_lookup import SkLookupCapture

__all__ = [
    "Capture",
    "CaptureError",
    "CaptureReason",
    "Deviation",
    "Enforcement",
    "Enrolment",
    "Finding",
    "Listeners",
    "PodSpec",
    "Recovered",
    "Repair",
    "SkLookupCapture",
]
