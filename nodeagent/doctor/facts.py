"""What was found on the node, before anybody judges it: values only.

This module owns the types between looking (`gather`) and judging (`judge`). It promises that they
hold what was seen and no opinion on it. Names of programs and texts of other programs are as they
were read: whoever prints them escapes them. Pure: no sockets, no clocks.
"""

from __future__ import annotations

import enum
from datetime import datetime
from typing import Final

import msgspec

from nodeagent.admin.model import Status

__all__ = [
    "TUNNEL_PORTS",
    "Agent",
    "Authority",
    "CaCertificate",
    "Clock",
    "Daemon",
    "Disk",
    "Drop",
    "Facts",
    "Feature",
    "Loose",
    "Network",
    "Outcome",
    "Peer",
    "PodLook",
    "PortHolder",
    "Probe",
    "ProbeOutcome",
    "SocketProgram",
    "Stranger",
    "TunnelCounts",
    "Unexamined",
]


TUNNEL_PORTS: Final = (15020, 15021)
"""Of this node: ztunnel's metrics and readiness, as its unit has them."""


class Feature(msgspec.Struct, frozen=True):
    """One feature of the kernel. `needed_for` is empty when nothing goes without it."""

    name: str
    present: bool
    detail: str
    needed_for: str = ""


class Agent(msgspec.Struct, frozen=True):
    """What nodeagent says of the node; without, why it says nothing, and what to do."""

    status: Status | None = None
    cause: str = ""
    remedy: str = ""


class Daemon(msgspec.Struct, frozen=True):
    """A running process of ours; 0 descriptors: not known. `stopped`: by a signal or a debugger."""

    name: str
    pid: int
    descriptors: int = 0
    descriptors_most: int = 0
    stopped: bool = False


class PortHolder(msgspec.Struct, frozen=True):
    """Who listens on a port; `pid` 0: nobody who could be found. `ours`: one of the daemons, or
    systemd for them.
    """

    port: int
    pid: int
    name: str
    ours: bool


class ProbeOutcome(enum.StrEnum):
    """What became of a connection from inside a pod to where only the tunnel answers."""

    ANSWERED = "answered"
    SILENT = "silent"
    """Taken, but nobody said anything."""
    NOT_TAKEN = "not taken"
    """Nobody took it: it left the pod, or was dropped."""
    STRANGE = "strange"
    """Somebody answered, but not as the tunnel does."""
    FAILED = "failed"
    """It could not be tried."""


class Probe(msgspec.Struct, frozen=True):
    """`version` of IP."""

    version: int
    outcome: ProbeOutcome
    detail: str = ""


class Outcome(enum.StrEnum):
    """What a port said to a SYN."""

    ANSWERED = "answered"
    REFUSED = "refused"
    SILENT = "silent"
    UNREACHABLE = "unreachable"


class Drop(msgspec.Struct, frozen=True):
    """A rule of a packet filter that drops port 15008, and the command that takes it out."""

    rule: str
    command: str


class SocketProgram(msgspec.Struct, frozen=True):
    """A BPF program of type sk_lookup; `name` is as whoever loaded it calls it."""

    number: int
    name: str


class PodLook(msgspec.Struct, frozen=True, kw_only=True):
    """What was seen of one pod. `problem`: why nothing could be seen inside it."""

    workload: str
    netns: str
    problem: str = ""
    gone: bool = False
    """There is no such namespace."""
    probes: tuple[Probe, ...] = ()
    hbone: dict[str, Outcome] = {}
    """Port 15008 as the node sees it, by the pod's address."""
    holders: tuple[PortHolder, ...] = ()
    drops: tuple[Drop, ...] = ()
    foreign: tuple[str, ...] = ()
    """What others have put here that turns connections: rules and redirects, in words."""
    unguarded: tuple[str, ...] = ()
    """Devices of a captured pod where nothing drops what goes around the tunnel."""
    unseen: tuple[str, ...] = ()
    """Which of its packet filters could not be read, and why."""
    rules_before: tuple[str, ...] = ()
    """Routing rules of others that come before the capture's, in words."""
    programs: tuple[SocketProgram, ...] = ()
    """Other people's programs that choose sockets here."""


class Peer(msgspec.Struct, frozen=True):
    """Port 15008 of a pod of another node, as a pod of this one sees it."""

    workload: str
    node: str
    address: str
    seen_from: str
    outcome: Outcome


class Network(msgspec.Struct, frozen=True):
    """The node's. `forwards`: by version of IP; `tracked`: connections that conntrack has, of
    `tracked_most`, 0 where the kernel has none.
    """

    forwards: dict[int, bool] = {}
    tracked: int = 0
    tracked_most: int = 0


class Clock(msgspec.Struct, frozen=True):
    """adjtimex(2). `synchronised` None: the kernel was not asked. `error` in seconds, at most."""

    synchronised: bool | None = None
    error: float = 0.0


class CaCertificate(msgspec.Struct, frozen=True):
    """A certificate of the embedded CA: a root or an intermediate, of a file."""

    kind: str
    file: str
    not_before: datetime
    not_after: datetime


class Authority(msgspec.Struct, frozen=True):
    """The embedded CA's directory. `made`: there is a CA in it."""

    directory: str
    made: bool = False
    certificates: tuple[CaCertificate, ...] = ()
    root_key: bool = True
    problem: str = ""


class Loose(msgspec.Struct, frozen=True):
    """A file, directory or socket that others may reach; `command` closes it."""

    path: str
    problem: str
    command: str


class Disk(msgspec.Struct, frozen=True):
    """Room below `path`: bytes and inodes. `inodes` 0: the file system does not count them."""

    path: str
    free: int
    size: int
    free_inodes: int
    inodes: int


class Stranger(msgspec.Struct, frozen=True):
    """A process that looks like another mesh's agent."""

    what: str
    pid: int


class TunnelCounts(msgspec.Struct, frozen=True, kw_only=True):
    """What ztunnel's metrics say, since it began. `expiries`: by identity, since the epoch."""

    release: str = ""
    handshake_failures: dict[str, int] = {}
    blocked: int = 0
    """Connections to port 15008 that timed out."""
    descriptors: int = 0
    descriptors_most: int = 0
    expiries: dict[str, float] = {}


class Unexamined(msgspec.Struct, frozen=True):
    """What could not be looked at, why, and the command that would help ("" if none would)."""

    what: str
    why: str
    command: str = ""


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """Everything. What could not be read is empty, and named in `unexamined`."""

    now: datetime
    node: str
    release: str
    protocol_version: int
    settings_file: str = ""
    settings_problem: str = ""
    trust_domain: str = ""
    features: tuple[Feature, ...] = ()
    policy_routing: str = ""
    """Why there is none; empty when there is."""
    agent: Agent = Agent()
    nodeagent: Daemon | None = None
    ztunnel: Daemon | None = None
    counts: TunnelCounts | None = None
    tunnel_silent: bool = False
    """ztunnel runs, takes a connection to its metrics, and says nothing."""
    control_socket: str = ""
    """The file by which ztunnel finds the agent, if it is gone."""
    node_ports: tuple[PortHolder, ...] = ()
    network: Network = Network()
    node_drops: tuple[Drop, ...] = ()
    pods: tuple[PodLook, ...] = ()
    peers: tuple[Peer, ...] = ()
    clock: Clock = Clock()
    authority: Authority | None = None
    loose: tuple[Loose, ...] = ()
    disks: tuple[Disk, ...] = ()
    strangers: tuple[Stranger, ...] = ()
    unexamined: tuple[Unexamined, ...] = ()
