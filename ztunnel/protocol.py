"""The seam between the two daemons: what `nodeagent` tells `ztunnel`, and what it hears back.

This module owns the message types, their encoding and the limits of the unix socket that joins the
daemons; the settings that a message carries are of `ztunnel.settings`. It promises that both sides,
at whatever version, either understand each other exactly or say so and part: messages are strict,
versioned and bounded. It may not open sockets, read clocks or know what either side does with a
message.

One conversation
----------------
`nodeagent` listens on a unix stream socket (0600, in a 0700 directory, same uid only); `ztunnel`
connects, again and again with backoff, for as long as it lives.

1. ztunnel sends `Hello`: its version and the pods that it already holds. One frame per held pod
   (`HeldPod`) follows, each with that pod's three listening sockets, so that a restarted
   `nodeagent` adopts the sockets instead of opening new ones.
2. nodeagent answers `Welcome`, or `Refusal` and closes.
3. nodeagent sends the whole state as `Update` frames, the first with `reset` set and the last with
   `commit` set. ztunnel applies nothing before `commit`, then all of it at once, drops what a reset
   did not name, and answers `Ack`. Later changes are `Update`s without `reset`.
4. Either side may send `Query` at any time after `Welcome`; the other answers with `Answer`.
5. ztunnel sends `Flows`, what it has counted of calls, every few seconds; nothing answers. They
   are numbered, so that nodeagent knows from when to when it has heard everything.

Two ztunnels
------------
An upgrade is two of them for a while. The one that was started last serves new connections, once it
has put the whole state in force; then nodeagent asks the other to `drain`. A ztunnel that drains
has closed its listening sockets, is told every change as before, so that it cuts what is no longer
allowed, and ends when it carries nothing any more. When it comes back to a restarted nodeagent it
says so (`Hello.draining`). A `Refusal` after `Welcome` tells one to end at once.

Framing: 4 bytes big-endian length of the body, 1 byte count of descriptors, then the body:
one MessagePack object with its type in the field `t`. Descriptors travel as SCM_RIGHTS with the
first byte of their frame's header.
"""

from __future__ import annotations

import enum
from typing import Final

import msgspec

from ztunnel import framing
from ztunnel.connection_messages import (
    Connection,
    ConnectionFilter,
    ConnectionPage,
    Direction,
    Security,
)
from ztunnel.flow_messages import Arrival, Flow, FlowKey, Flows
from ztunnel.framing import HEADER, MAX_FDS, MAX_FRAME, ProtocolError
from ztunnel.settings import (
    AuditForm,
    AuditSettings,
    Authorized,
    Deadlines,
    Facility,
    Limits,
    Receiver,
    SameNode,
    Settings,
    Syslog,
    TraceSettings,
    Transport,
)

__all__ = [
    "HEADER",
    "MAX_FDS",
    "MAX_FRAME",
    "PROBE_ADDRESSES",
    "PROBE_PORT",
    "PROTOCOL_VERSION",
    "Ack",
    "Action",
    "Answer",
    "Arrival",
    "Attribute",
    "AuditForm",
    "AuditSettings",
    "Authorization",
    "Authorized",
    "Condition",
    "Connection",
    "ConnectionFilter",
    "ConnectionPage",
    "Credential",
    "DataPlane",
    "Deadlines",
    "Direction",
    "Endpoint",
    "Facility",
    "Flow",
    "FlowKey",
    "Flows",
    "Frame",
    "FrameDecoder",
    "HeldPod",
    "Hello",
    "Limits",
    "Message",
    "Mode",
    "Pod",
    "ProtocolError",
    "Query",
    "Receiver",
    "Refusal",
    "Removal",
    "Resource",
    "Rule",
    "SameNode",
    "Security",
    "Service",
    "ServicePort",
    "Settings",
    "Syslog",
    "TraceSettings",
    "Transport",
    "TrustBundle",
    "Update",
    "Welcome",
    "Workload",
    "WorkloadPolicy",
    "encode",
]

PROTOCOL_VERSION: Final = 5
"""Raised when a message changes in a way that an older peer would misread."""


PROBE_ADDRESSES: Final = ("192.0.0.8", "100:0:0:1::1")
PROBE_PORT: Final = 15001
"""What a probe of a pod's capture calls from inside the pod: the tunnel resets it and counts it as
nothing else. Addresses that are no destination anywhere (the dummy addresses of RFC 7600 and RFC
9780, in IANA's registries of special-purpose addresses), so that nobody else can answer."""


class Mode(enum.StrEnum):
    """PeerAuthentication mutual TLS mode in force, never UNSET: inheritance is resolved."""

    DISABLE = "DISABLE"
    PERMISSIVE = "PERMISSIVE"
    STRICT = "STRICT"


class DataPlane(enum.StrEnum):
    """How a workload is reached: HBONE on port 15008, or the application's own bytes."""

    HBONE = "HBONE"
    TCP = "TCP"


class Action(enum.StrEnum):
    """What an AuthorizationPolicy does with what its rules match."""

    ALLOW = "ALLOW"
    DENY = "DENY"
    AUDIT = "AUDIT"


class Attribute(enum.StrEnum):
    """What of a connection a condition looks at, by the `when` keys of AuthorizationPolicy.

    The value of SERVICE_ACCOUNT is "namespace/name".
    """

    PRINCIPAL = "source.principal"
    NAMESPACE = "source.namespace"
    SERVICE_ACCOUNT = "source.serviceAccount"
    SOURCE_IP = "source.ip"
    DESTINATION_IP = "destination.ip"
    DESTINATION_PORT = "destination.port"


class _Base(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="t"):
    pass


# --- resources: the parts of the state ---------------------------------------------------------


class Workload(_Base, frozen=True, gc=False, tag="workload"):
    """One workload of the mesh, on this node or another.

    `uid` is "namespace/name". `addresses` are canonical text (RFC 5952 for IPv6, never
    IPv4-mapped). `identity` is the SPIFFE ID that it must prove, empty for `DataPlane.TCP`.
    `locality` is "region/zone/subzone", empty when unknown. Labels are those that telemetry reads.
    """

    uid: str
    name: str
    namespace: str
    service_account: str
    trust_domain: str
    identity: str
    addresses: tuple[str, ...]
    data_plane: DataPlane
    cluster: str = ""
    node: str = ""
    locality: str = ""
    canonical_service: str = ""
    canonical_revision: str = ""
    app: str = ""
    version: str = ""
    healthy: bool = True


class ServicePort(_Base, frozen=True, gc=False, tag="service_port"):
    """A port of a service and its name; `target` is the default port on the workload."""

    number: int
    target: int
    name: str = ""


class Endpoint(_Base, frozen=True, gc=False, tag="endpoint"):
    """A workload behind a service, with the ports that differ from `ServicePort.target`.

    `ports` maps service port to workload port. `weight` is relative and at least 1.
    An endpoint that is no known workload has an empty `workload` and its own `address`.
    """

    workload: str
    address: str
    weight: int = 1
    ports: dict[int, int] = {}


class Service(_Base, frozen=True, gc=False, tag="service"):
    """Virtual addresses and ports that stand for endpoints. `uid` is "namespace/hostname"."""

    uid: str
    hostname: str
    namespace: str
    addresses: tuple[str, ...]
    ports: tuple[ServicePort, ...]
    endpoints: tuple[Endpoint, ...]


class WorkloadPolicy(_Base, frozen=True, gc=False, tag="workload_policy"):
    """Mutual TLS modes in force for one workload, already resolved.

    Known of every workload of this node, and of others where a mode is DISABLE: callers obey it.

    `origin` and `port_origins` name the PeerAuthentication that decided, "namespace/name" with
    file and line, or "default". `uid` is the workload's.
    """

    uid: str
    mode: Mode
    origin: str
    port_modes: dict[int, Mode] = {}
    port_origins: dict[int, str] = {}


class Condition(_Base, frozen=True, gc=False, tag="condition"):
    """Holds if `values` is empty or one of them matches, and none of `not_values` does.

    Text is written as in AuthorizationPolicy: exact, "prefix*", "*suffix", or "*" for anything but
    empty; principals without "spiffe://". Addresses are single ones or CIDR ("10.0.0.0/8"), ports
    decimal. A caller without identity has an empty principal, namespace and service account.
    """

    attribute: Attribute
    values: tuple[str, ...] = ()
    not_values: tuple[str, ...] = ()


class Rule(_Base, frozen=True, gc=False, tag="rule"):
    """Matches when one of `sources`, one of `operations` and all `conditions` hold.

    A source or operation is a list of conditions that must all hold; without any, any caller or
    destination will do. `origin` is "NAMESPACE/NAME rules[NUMBER] (FILE:LINE)". `unread` names the
    fields of layer 7 that stand in the document and were left out here.
    """

    origin: str
    sources: tuple[tuple[Condition, ...], ...] = ()
    operations: tuple[tuple[Condition, ...], ...] = ()
    conditions: tuple[Condition, ...] = ()
    unread: tuple[str, ...] = ()


class Authorization(_Base, frozen=True, gc=False, tag="authorization"):
    """One policy on who may call. DENY is asked first, then ALLOW; AUDIT changes no verdict.

    `uid` is "kind/namespace/name" of its document, `origin` names that for people. `namespace` is
    where it counts, empty for the whole mesh; `workloads` are the uids of this node's workloads
    there that its selector selects, None without selector. A policy without rules matches nothing:
    its ALLOW lets nobody in. `dry_run`: evaluated and recorded, never enforced.
    """

    uid: str
    action: Action
    rules: tuple[Rule, ...]
    origin: str
    namespace: str = ""
    workloads: tuple[str, ...] | None = None
    dry_run: bool = False


class Credential(_Base, frozen=True, tag="credential"):
    """An X509-SVID of this node's workloads: `uid` is the SPIFFE ID.

    `chain` is DER, leaf first, without the root. `key` is PKCS#8 DER: this message is never logged.
    Times are seconds since the epoch.
    """

    uid: str
    chain: tuple[bytes, ...]
    key: bytes
    not_before: int
    not_after: int

    def __repr__(self) -> str:
        return f"Credential(uid={self.uid!r}, not_after={self.not_after})"


class TrustBundle(_Base, frozen=True, tag="trust_bundle"):
    """The roots (DER) of one trust domain. `uid` is the trust domain."""

    uid: str
    roots: tuple[bytes, ...]


class Pod(_Base, frozen=True, tag="pod"):
    """A pod of this node, captured. `uid` is unique for ever: a re-created pod has another.

    Its frame carries four descriptors: network namespace, and the listening sockets for outbound
    (15001), inbound plaintext (15006) and inbound HBONE (15008).
    """

    uid: str
    workload: str
    addresses: tuple[str, ...]
    netns_cookie: int


Resource = Workload | Service | WorkloadPolicy | Authorization | Credential | TrustBundle | Pod


class Removal(_Base, frozen=True, tag="removal"):
    """`kind` is the tag of a resource type, `uid` its key."""

    kind: str
    uid: str


# --- messages ----------------------------------------------------------------------------------


class Hello(_Base, frozen=True, tag="hello"):
    version: int
    pid: int
    pods: int
    """How many `HeldPod` frames follow."""
    started: int = 0
    """When the process began, nanoseconds of CLOCK_BOOTTIME: tells it from its successor."""
    draining: bool = False


class HeldPod(_Base, frozen=True, tag="held_pod"):
    """A pod that ztunnel already serves; its frame carries the three listening sockets.

    None when it drains: it has closed them.
    """

    uid: str
    netns_cookie: int


class Welcome(_Base, frozen=True, tag="welcome"):
    version: int
    settings: Settings


class Refusal(_Base, frozen=True, tag="refusal"):
    reason: str


class Update(_Base, frozen=True, tag="update"):
    """A part of a change. `version` is the same in all parts and grows from change to change."""

    version: int
    upserts: tuple[Resource, ...] = ()
    removals: tuple[Removal, ...] = ()
    reset: bool = False
    commit: bool = True


class Ack(_Base, frozen=True, tag="ack"):
    """`error` is empty when the change is in force; otherwise the state before it still is."""

    version: int
    error: str = ""


class Query(_Base, frozen=True, tag="query"):
    """`what` is one of the names that the answering side documents; `args` its parameters."""

    id: int
    what: str
    args: dict[str, str] = {}


class Answer(_Base, frozen=True, tag="answer"):
    """`body` is JSON; `error` is empty on success."""

    id: int
    body: bytes = b""
    error: str = ""


Message = Hello | HeldPod | Welcome | Refusal | Update | Ack | Query | Answer | Flows


class Frame(msgspec.Struct, frozen=True):
    """A decoded message and how many descriptors came with it."""

    message: Message
    fds: int


_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


def encode(message: Message, fds: int = 0) -> bytes:
    """Return the frame for `message`. Raises ValueError, our own error, above the limits."""
    return framing.pack(_encoder.encode(message), fds)


class FrameDecoder:
    """Turns bytes as they come into frames. Holds at most one frame (MAX_FRAME) at any time."""

    def __init__(self) -> None:
        self._splitter = framing.Splitter()

    def feed(self, data: bytes) -> list[Frame]:
        """Return the frames that `data` completes. Raises ProtocolError on anything malformed."""
        return [Frame(_decoded(body), fds) for body, fds in self._splitter.feed(data)]


def _decoded(body: bytes) -> Message:
    try:
        return _decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        # A validation error may quote a value, and values may be keys: name the type only.
        raise ProtocolError(f"malformed message ({type(error).__name__})") from None
