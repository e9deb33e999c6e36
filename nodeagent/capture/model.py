"""What the capture is asked for and what it answers: values only.

This module owns the types of the capture interface. It promises that they hold no behaviour beyond
questions about themselves. It may not touch the kernel.
"""

from __future__ import annotations

import enum
from typing import NamedTuple, Protocol

import msgspec

from nodeagent.pods import NetnsHandle

__all__ = [
    "Capture",
    "CaptureError",
    "CaptureReason",
    "Deviation",
    "Enforcement",
    "Enrolment",
    "Finding",
    "Listeners",
    "OlderCaller",
    "PodSpec",
    "Recovered",
    "Repair",
]


class CaptureReason(enum.StrEnum):
    """Why the capture could not do what it was asked for: stable tokens for logs and metrics."""

    ADDRESS_MISSING = "address_missing"
    BAD_REQUEST = "bad_request"
    CONFLICT = "conflict"
    KERNEL = "kernel"
    LISTENERS_HELD = "listeners_held"
    NAMESPACE_GONE = "namespace_gone"
    NOT_ENROLLED = "not_enrolled"
    PORT_TAKEN = "port_taken"


class CaptureError(Exception):
    """The capture of one pod failed. Unless the text says otherwise the pod is as it was before."""

    def __init__(self, uid: str, reason: CaptureReason, detail: str) -> None:
        super().__init__(f"pod {uid}: {detail}")
        self.uid = uid
        self.reason = reason
        self.detail = detail


class Enforcement(msgspec.Struct, frozen=True):
    """Which local ports of a pod accept mutual TLS only (PeerAuthentication STRICT).

    A port in neither set has the default mode; in both, it is strict.
    """

    strict_default: bool
    strict_ports: frozenset[int] = frozenset()
    permissive_ports: frozenset[int] = frozenset()

    def is_strict(self, port: int) -> bool:
        """Whether plaintext is refused on `port`."""
        if port in self.strict_ports:
            return True
        return self.strict_default and port not in self.permissive_ports

    @property
    def any_strict(self) -> bool:
        """Whether plaintext is refused on any port."""
        return self.strict_default or bool(self.strict_ports)

    def exceptions(self) -> frozenset[int]:
        """Return the ports whose mode is not the default."""
        if self.strict_default:
            return self.permissive_ports - self.strict_ports
        return self.strict_ports


class PodSpec(msgspec.Struct, frozen=True):
    """A pod to capture.

    `uid` is `nodeagent.pods.pod_uid`'s. `netns` stays the caller's. `addresses` are the workload's,
    canonical; further addresses of the namespace are captured with them.
    """

    uid: str
    netns: NetnsHandle
    addresses: tuple[str, ...]
    enforcement: Enforcement


class Listeners(NamedTuple):
    """Descriptors of a pod's listening sockets, in the order of their ports and of protocol.Pod."""

    outbound: int
    inbound: int
    hbone: int


class Deviation(msgspec.Struct, frozen=True):
    """Something in the pod is not as enrolment left it. `kind` is a stable token."""

    kind: str
    detail: str


class Enrolment(msgspec.Struct, frozen=True):
    """A captured pod: what the tunnel needs to serve it.

    The descriptors belong to the capture until `remove`: duplicate them (SCM_RIGHTS does).
    """

    uid: str
    netns_cookie: int
    netns: int
    listeners: Listeners
    remaining: tuple[Deviation, ...] = ()
    """What an audit would report now: what others have put there and the capture leaves alone."""


class Repair(msgspec.Struct, frozen=True):
    """What was put right; `enrolment` is set if listeners are new and the tunnel must be told."""

    repaired: tuple[Deviation, ...]
    enrolment: Enrolment | None = None


class OlderCaller(msgspec.Struct, frozen=True):
    """Connections to one port of a pod, from one address, that were there before its capture."""

    source: str
    port: int
    connections: int


class Recovered(msgspec.Struct, frozen=True):
    """A pod that an earlier run enrolled. `alive` is false if its namespace cannot be found."""

    uid: str
    netns_cookie: int
    netns_path: str
    alive: bool
    listening: bool
    """Whether some process (the tunnel) still holds all three listening sockets."""


class Finding(msgspec.Struct, frozen=True):
    """One kernel feature. `needed_for` is empty when the capture cannot do without it."""

    name: str
    present: bool
    detail: str
    needed_for: str = ""


class Capture(Protocol):
    """Turns a pod's TCP to the tunnel. All methods may be called from one event loop at once;
    calls about one pod run one after the other. All but `probe` raise CaptureError.
    """

    async def enrol(self, spec: PodSpec, adopt: Listeners | None = None) -> Enrolment:
        """Capture a pod, or complete and adopt what an earlier run left. Idempotent.

        `adopt` are descriptors of the pod's listening sockets from a running tunnel, duplicated
        here; the caller keeps its own.
        """

    async def remove(self, uid: str) -> None:
        """Leave the namespace as it was found, and close what was opened for it. Idempotent."""

    async def set_enforcement(self, uid: str, enforcement: Enforcement) -> int:
        """Put modes in force now. Returns how many older connections were cut."""

    async def audit(self, uid: str) -> list[Deviation]:
        """Compare the kernel with what enrolment set up. Empty is healthy."""

    async def repair(self, uid: str) -> Repair:
        """Audit and put right."""

    async def recover(self) -> list[Recovered]:
        """Find the pods of an earlier run; from then on they can be audited, judged and removed."""

    async def older(self, uid: str) -> tuple[OlderCaller, ...]:
        """Return who is connected to the pod since before its capture (`older.callers`).

        Costs nothing once there is no such connection.
        """

    async def counters(self, uid: str) -> dict[str, int]:
        """Return the pod's counters since its enrolment (see `layout.COUNTERS`)."""

    async def probe(self) -> list[Finding]:
        """Try each kernel feature that this capture needs."""

    async def close(self) -> None:
        """Close descriptors and threads. Captured pods stay captured."""
