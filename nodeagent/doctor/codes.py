"""The catalogue: every code that a finding may have, how bad it is, and what would explain it.

This module owns the codes. It promises that a code is never given a new meaning, that each has a
section in docs/doctor.md, and that causes form no circle. It is pure data.

The thousands: 1 kernel, 2 daemons, 3 pods, 4 certificates and clocks, 5 network, 6 configuration,
7 files and disks, 9 this command itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import msgspec

from nodeagent.doctor.model import Severity

__all__ = ["CODES", "PAGE", "Code", "page"]

PAGE: Final = "docs/doctor.md"

_ERROR: Final = Severity.ERROR
_WARNING: Final = Severity.WARNING


class Code(msgspec.Struct, frozen=True):
    """`hidden_by`: findings that bring this one about, where they concern the same pods."""

    title: str
    severity: Severity
    hidden_by: tuple[str, ...] = ()


CODES: Final[Mapping[str, Code]] = {
    "NA1001": Code("The kernel lacks what the capture needs", _ERROR),
    "NA1002": Code("The kernel lacks something that makes an enrolment gentle", _WARNING),
    "NA1003": Code("The kernel has no policy routing", _ERROR),
    "NA2001": Code("nodeagent does not answer", _ERROR, ("NA5001", "NA6001", "NA7004")),
    "NA2002": Code("ztunnel is not there", _ERROR, ("NA5001",)),
    "NA2003": Code(
        "ztunnel is not ready", _ERROR, ("NA2002", "NA2005", "NA4001", "NA4003", "NA4004", "NA4005")
    ),
    "NA2004": Code("Parts of different releases run", _WARNING),
    "NA2005": Code("ztunnel does not have the newest state", _ERROR, ("NA2002", "NA2004")),
    "NA2006": Code("A daemon is short of file descriptors", _WARNING),
    "NA2007": Code("The socket by which ztunnel finds nodeagent is gone", _WARNING, ("NA2001",)),
    "NA3001": Code(
        "A pod is not captured", _ERROR, ("NA1001", "NA1003", "NA3005", "NA3006", "NA3003")
    ),
    "NA3002": Code("A pod's capture is damaged", _ERROR, ("NA1001", "NA3005", "NA3006")),
    "NA3003": Code("A pod's network namespace cannot be found", _ERROR),
    "NA3004": Code(
        "A pod's connections do not reach the tunnel",
        _ERROR,
        ("NA1001", "NA1003", "NA2002", "NA3001", "NA3002", "NA3003", "NA3005", "NA3006"),
    ),
    "NA3005": Code("A program in the pod holds a port of the tunnel", _ERROR),
    "NA3006": Code("Somebody else captures the pod's connections", _ERROR),
    "NA3007": Code(
        "The tunnel takes a pod's connections and does not answer", _ERROR, ("NA2002", "NA2003")
    ),
    "NA3008": Code(
        "Port 15008 of a pod cannot be reached",
        _ERROR,
        ("NA2002", "NA3001", "NA3002", "NA3003", "NA3005", "NA5003"),
    ),
    "NA3009": Code("Routing rules of others come before the capture's", _WARNING, ("NA3006",)),
    "NA4001": Code(
        "A workload's certificate has ended or is about to", _ERROR, ("NA4003", "NA4004", "NA4005")
    ),
    "NA4002": Code(
        "A workload's certificate is not renewed",
        _ERROR,
        ("NA4001", "NA4003", "NA4004", "NA4005", "NA7001"),
    ),
    "NA4003": Code("A certificate of the CA has ended or is about to", _ERROR, ("NA4004",)),
    "NA4004": Code("The CA's files cannot be used", _ERROR, ("NA6001", "NA7004")),
    "NA4005": Code("The clock and the certificates disagree", _ERROR),
    "NA4006": Code("Nothing keeps the clock right", _WARNING, ("NA4005",)),
    "NA5001": Code("Another program has a port of the agent on this node", _ERROR),
    "NA5002": Code(
        "Port 15008 of another node's pods does not answer", _ERROR, ("NA5003", "NA5007", "NA5008")
    ),
    "NA5003": Code("A packet filter drops port 15008", _ERROR),
    "NA5004": Code("Nobody listens on port 15008 of another node's pods", _ERROR),
    "NA5005": Code("Another mesh's agent runs on this node", _WARNING, ("NA3006",)),
    "NA5006": Code(
        "Connections to port 15008 have timed out", _WARNING, ("NA5002", "NA5003", "NA5004")
    ),
    "NA5007": Code("This node does not forward packets", _ERROR),
    "NA5008": Code("Connection tracking has no room, or nearly", _ERROR),
    "NA6001": Code("The settings cannot be used", _ERROR),
    "NA6002": Code("Documents of the mesh are refused", _ERROR),
    "NA6003": Code("Documents in force refer to what does not exist", _ERROR),
    "NA6004": Code("No configuration is in force", _ERROR, ("NA6002", "NA7004")),
    "NA6005": Code("Policies are not enforced as they are written", _WARNING),
    "NA7001": Code("A disk is full, or nearly", _ERROR),
    "NA7002": Code("Who calls is not recorded", _WARNING, ("NA7001",)),
    "NA7003": Code("The audit log loses lines", _ERROR, ("NA7001",)),
    "NA7004": Code("Secret files or sockets are open to others", _ERROR),
    "NA9001": Code("Something could not be examined", Severity.NOTE),
}


def page(code: str) -> str:
    """Return where a code is explained."""
    return f"{PAGE}#{code.lower()}"
