"""A tunnel on a core that only remembers, in a mesh of three workloads, with a clock to move.

Owns what the tests of ztunnel's control side share. It uses the product's own state, routing,
policy, certificates' validation and tables; the core and the making of TLS contexts are stood in
for.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any

import msgspec

from support.certificates import NOW, authority
from support.certificates import workload as leaf
from support.fake_core import FakeCore, record
from support.mesh_state import SETTINGS, bundle, change, identity, ip, pod, policy, workload
from ztunnel import tunnel
from ztunnel._core import Ended
from ztunnel.audit import AuditLog
from ztunnel.corelike import Kind
from ztunnel.observe.access_log import Line
from ztunnel.pods import Pair, PodSockets
from ztunnel.protocol import (
    Credential,
    DataPlane,
    Mode,
    Removal,
    Resource,
    Settings,
)
from ztunnel.reasons import Reason
from ztunnel.settings import AuditForm, AuditSettings

SLEEP = workload("sleep", "10.1.0.1")
HTTPBIN = workload("httpbin", "10.2.0.1")
LEGACY = workload("legacy", "10.3.0.1", plane=DataPlane.TCP)
POD = pod("pod-sleep", SLEEP.uid, "10.1.0.1")
ROOT = authority()
OTHER_ROOT = authority()
FOREIGN_ROOT = authority("elsewhere.test")


def credential(account: str = "sleep", serial: bytes = b"1") -> Credential:
    return Credential(identity(account), (b"chain" + serial,), b"key" + serial, 0, NOW + 3600)


MESH: tuple[Resource, ...] = (
    SLEEP,
    HTTPBIN,
    LEGACY,
    policy(SLEEP.uid, Mode.PERMISSIVE),
    credential(),
    bundle(ROOT.der),
)


def sockets() -> PodSockets:
    return PodSockets(*(socket.socket().detach() for _ in range(4)))


def is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


UNAUDITED = msgspec.structs.replace(SETTINGS, audit=AuditSettings(stdout=False))


class Rig:
    """A tunnel on a fake core, with a clock that a test moves. Its audit log is standard output."""

    def __init__(self, settings: Settings = UNAUDITED) -> None:
        self.settings = settings
        self.core = FakeCore()
        self.now = 1000.0
        self.wall = float(NOW)
        self.lines: list[Line] = []
        self.described: list[list[Line]] = []
        """What the core was told to say of connections, in the order of the decisions."""
        self.ready: list[tuple[bytes, int]] = []
        self.audited: list[dict[str, Any]] = []
        """The audit log's lines."""
        self.built: list[str] = []
        self.build_error: Exception | None = None
        self.version = 0
        self.tunnel = tunnel.Tunnel(
            self.core, self, lambda: self.now, lambda: self.wall, self._build, self._audit()
        )

    def _audit(self) -> AuditLog:
        class Audited:
            def put(_, text: bytes, count: int, /) -> None:  # noqa: N805 - `self` is the rig
                assert (text.count(b"\n"), text[-1:]) == (count, b"\n")
                self.audited += map(json.loads, text.splitlines())

        return AuditLog(lambda: self.now, lambda: self.wall, AuditForm.JSON, Audited())

    def write(self, lines: Sequence[Line], /) -> None:
        self.lines += lines

    def form(self, lines: Sequence[Line], /) -> bytes:
        self.described.append(list(lines))
        return b"%d lines" % len(lines)

    def put(self, text: bytes, count: int, /) -> None:
        self.ready.append((text, count))

    def _build(self, credential: Credential, roots: tuple[bytes, ...]) -> Pair:
        if self.build_error is not None:
            raise self.build_error
        self.built.append(credential.uid)
        return Pair(len(self.built) * 10, len(self.built) * 10 + 1, (credential, roots))

    def apply(
        self,
        *resources: Resource,
        removals: tuple[Removal, ...] = (),
        reset: bool = False,
        given: Mapping[str, PodSockets] | None = None,
    ) -> str:
        self.version += 1
        found = change(
            self.version, *resources, removals=removals, reset=reset, settings=self.settings
        )
        if given is None:
            given = {
                each.uid: sockets() for each in resources if each.__struct_config__.tag == "pod"
            }
        return run(self.tunnel.apply(found, given))

    def start(self, *extra: Resource) -> None:
        assert self.apply(*MESH, POD, *extra, reset=True) == ""

    @property
    def pod(self) -> int:
        held = self.tunnel.pods.get(POD.uid)
        assert held is not None
        return held.number

    def outbound(self, destination: str, port: int = 8080) -> int:
        upcall = self.core.ask(Kind.OUTBOUND, self.pod, destination=ip(destination), port=port)
        self.tunnel.pump()
        return upcall

    def inbound(self, source: str, identity_number: int = 0, port: int = 8080) -> int:
        upcall = self.core.ask(
            Kind.INBOUND_HBONE if identity_number else Kind.INBOUND_PLAINTEXT,
            self.pod,
            source=ip(source),
            destination=ip("10.1.0.1"),
            port=port,
            identity=identity_number,
        )
        self.tunnel.pump()
        return upcall

    def prove(self, chain: tuple[bytes, ...]) -> tuple[int, Reason]:
        upcall = self.core.ask(Kind.PEER_CERTIFICATE, self.pod, source=ip("10.2.0.1"), chain=chain)
        self.tunnel.pump()
        return self.core.certificates[upcall]

    def close(self) -> None:
        self.tunnel.stop()
        self.core.close()


def run(work: Coroutine[Any, Any, str]) -> str:
    return asyncio.run(work)


def chain_of(account: str, root: Any = ROOT, **options: Any) -> tuple[bytes, ...]:  # noqa: ANN401 - `leaf`'s
    return (leaf(root, identity(account), **options).der,)


def server_shows(rig: Rig, chain: tuple[bytes, ...]) -> tuple[int, Reason]:
    peer = next(iter(rig.core.peers))
    upcall = rig.core.ask(
        Kind.SERVER_CERTIFICATE,
        rig.pod,
        destination=ip("10.2.0.1"),
        port=15008,
        peer=peer,
        chain=chain,
    )
    rig.tunnel.pump()
    return rig.core.certificates[upcall]


def ended(rig: Rig, decision: int, kind: Kind, reason: Reason, **fields: Any) -> Line:  # noqa: ANN401 - the line's
    values: dict[str, Any] = {
        "kind": kind,
        "pod": rig.pod,
        "decision": decision,
        "identity": 0,
        "source": ip("10.1.0.1"),
        "source_port": 4000,
        "destination": ip("10.2.0.1"),
        "destination_port": 8080,
        "upstream": b"",
        "upstream_port": 0,
        "started_us": int(rig.now * 1e6) - 2_000_000,
        "duration_us": 1_500_000,
        "received": 10,
        "sent": 20,
        "reason": list(Reason).index(reason),
        "trace_id": b"",
        "span_id": b"",
        "parent_id": b"",
        "opened_us": 0,
    }
    rig.core.report(record(Ended, *(values | fields).values()))
    rig.tunnel.pump()
    return rig.lines[-1]
