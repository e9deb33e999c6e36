"""What a node is to say to its page: values of our making.

This module owns pictures, from a small mesh in which everything occurs once to one of hundreds of
workloads, and a name as a hostile peer would choose it. It promises that a picture may be changed
between two looks.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import msgspec

from nodeagent.admin import Status
from nodeagent.admin.model import (
    SCHEMA,
    AuthorizationReport,
    CertificateReport,
    ConfigReport,
    PodReport,
    PodState,
    ZtunnelReport,
)
from nodeagent.connections import SCHEMA as CONNECTIONS_SCHEMA
from nodeagent.connections import Connections
from nodeagent.observe import asdex_model, plaintext_model
from nodeagent.observe import graph_model as model
from ztunnel.protocol import Connection, ConnectionFilter, Direction, Security

__all__ = ["HOSTILE", "NOW", "Picture", "connection", "edge", "many", "pod", "sentences", "vertex"]

NOW: Final = datetime(2026, 11, 21, 21, 0, 0, tzinfo=UTC)

HOSTILE: Final = "evil/<img src=x onerror=document.title='owned'>\u202egnp.exe\u0007\u2066"
"""Markup, an override of direction, a bell."""

TRUST_DOMAIN: Final = "cluster.local"


def identity(uid: str) -> str:
    namespace, _, name = uid.partition("/")
    return f"spiffe://{TRUST_DOMAIN}/ns/{namespace}/sa/{name}"


def vertex(
    uid: str,
    *,
    kind: model.Kind = model.Kind.WORKLOAD,
    local: bool = True,
    mode: str = "STRICT",
    asdex: float | None = None,
) -> model.Vertex:
    namespace, _, name = uid.rpartition("/") if kind is model.Kind.WORKLOAD else ("", "", uid)
    workload = kind is model.Kind.WORKLOAD
    return model.Vertex(
        id=uid,
        kind=kind,
        name=name,
        namespace=namespace,
        identities=(identity(uid),) if workload else (),
        local=local and workload,
        mode=mode if local and workload else "",
        state=PodState.ENROLLED.value if local and workload else "",
        asdex=asdex,
    )


def edge(
    source: str,
    destination: str,
    port: int = 8080,
    *,
    mutual_tls: int = 0,
    direct: int = 0,
    plaintext: int = 0,
    refused: int = 0,
    failed: int = 0,
    reasons: Mapping[str, int] | None = None,
    policies: tuple[str, ...] = (),
) -> model.Edge:
    carried = mutual_tls + direct + plaintext
    known = mutual_tls + direct > 0
    lock = model.Padlock.NO_DATA
    if carried:
        lock = model.Padlock.SOME if mutual_tls else model.Padlock.NONE
        lock = model.Padlock.ALL if mutual_tls == carried else lock
    return model.Edge(
        source=source,
        destination=destination,
        port=port,
        service=destination.rpartition("/")[2] + ".default.svc",
        connections=model.Connections(mutual_tls=mutual_tls, direct=direct, plaintext=plaintext),
        refused=refused,
        failed=failed,
        reasons=dict(reasons or {}),
        padlock=lock,
        protected_share=mutual_tls / carried if carried else None,
        bytes_sent=carried * 700,
        bytes_received=carried * 5200,
        policies=policies,
        source_identity=identity(source) if known else "",
        destination_identity=identity(destination) if known else "",
        first=NOW - timedelta(minutes=4),
        last=NOW - timedelta(seconds=3),
        reporter=model.Reporter.DESTINATION,
    )


def connection(number: int, caller: str, callee: str, **changes: Any) -> Connection:  # noqa: ANN401 - its fields
    """Return one of mutual TLS into `callee`, as many seconds old as its number says."""
    base = Connection(
        id=f"7.{number}",
        pod=callee,
        direction=Direction.INBOUND,
        state="open",
        security=Security.MUTUAL_TLS,
        source=f"10.0.0.1:{40000 + number}",
        source_workload=caller,
        source_identity=identity(caller),
        destination="10.0.1.1:8080",
        destination_workload=callee,
        destination_identity=identity(callee),
        service=f"{callee.rpartition('/')[2]}.default.svc",
        hbone="10.0.1.1:15008",
        tls_version="TLSv1.3",
        cipher="TLS_AES_128_GCM_SHA256",
        key_exchange="X25519MLKEM768",
        policy="sentences/callers",
        rule="sentences/callers rules[0] (policies.yaml:3)",
        started=NOW - timedelta(seconds=number),
        moved=NOW - timedelta(seconds=1),
        received=4096,
        sent=2_000_000,
    )
    return msgspec.structs.replace(base, **changes)


def pod(
    uid: str, *, mode: str = "STRICT", state: PodState = PodState.ENROLLED, left: float = 2400
) -> PodReport:
    certificate = CertificateReport(
        identity=identity(uid),
        not_before=NOW - timedelta(seconds=1200),
        not_after=NOW + timedelta(seconds=left),
        renewals=3,
    )
    return PodReport(
        workload=uid,
        identity=identity(uid),
        netns=uid.rpartition("/")[2],
        state=state,
        since=NOW - timedelta(hours=5),
        addresses=("10.0.0.9",),
        mode=mode,
        mode_origin="/etc/nodeagent/mesh.d/peers.yaml:3",
        certificate=certificate,
        error="" if state is PodState.ENROLLED else "network namespace does not exist",
        authorizations=(
            AuthorizationReport(
                policy=f"AuthorizationPolicy/{uid}", action="ALLOW", origin="policies.yaml:1"
            ),
        ),
    )


def report(*workloads: plaintext_model.PlaintextWorkload) -> plaintext_model.PlaintextReport:
    return plaintext_model.PlaintextReport(
        schema=plaintext_model.SCHEMA,
        node="worker-1",
        time=NOW,
        since=NOW - timedelta(days=7),
        complete=NOW - timedelta(days=9),
        verdict=plaintext_model.worst(each.verdict for each in workloads),
        namespaces=(),
        workloads=workloads,
    )


def strictness(
    uid: str,
    verdict: plaintext_model.Verdict,
    *callers: plaintext_model.PlaintextCaller,
    mode: str = "PERMISSIVE",
    reasons: tuple[str, ...] = (),
) -> plaintext_model.PlaintextWorkload:
    return plaintext_model.PlaintextWorkload(
        workload=uid,
        namespace=uid.partition("/")[0],
        state=PodState.ENROLLED.value,
        mode=mode,
        mode_origin="peers.yaml:3",
        port_modes=(),
        verdict=verdict,
        reasons=reasons,
        since=NOW - timedelta(days=9),
        without_identity=sum(each.connections for each in callers),
        with_identity=640,
        refused=0,
        last=max((each.last for each in callers), default=None),
        callers=callers,
    )


def caller(
    kind: plaintext_model.Origin, source: str, connections: int, effect: plaintext_model.Effect
) -> plaintext_model.PlaintextCaller:
    workload = source if "/" in source else ""
    return plaintext_model.PlaintextCaller(
        kind=kind,
        workload=workload,
        source="10.0.0.7" if workload else source,
        port=8080,
        connections=connections,
        first=NOW - timedelta(days=3),
        last=NOW - timedelta(hours=2),
        effect=effect,
        reason="STRICT asks for mutual TLS",
        policy="PeerAuthentication sentences/default (peers.yaml:3)",
    )


class Picture:
    """What the node is to say: `pods`, `vertices` and `edges` may be changed at any time."""

    def __init__(self) -> None:
        self.pods: list[PodReport] = []
        self.vertices: list[model.Vertex] = []
        self.edges: list[model.Edge] = []
        self.missing: tuple[str, ...] = ()
        self.complete = True
        self.plaintext = report()
        self.losses: tuple[asdex_model.Loss, ...] = ()
        self.asked: list[int] = []
        """Windows in seconds, as the page has asked for them."""
        self.connections: list[Connection] = []
        self.missed = 0
        self.now = NOW
        """When the connections were looked at."""
        self.mute = ""
        """Why there is no answer to who asks for them."""
        self.queries: list[dict[str, str]] = []
        """What was asked of the connections."""

    def graph(self, seconds: int) -> model.Graph:
        return model.Graph(
            schema=model.SCHEMA,
            time=NOW,
            node="worker-1",
            window_seconds=seconds,
            complete=self.complete,
            vertices=tuple(self.vertices),
            edges=tuple(self.edges),
        )

    def open(self, wanted: ConnectionFilter) -> Connections[Connection]:
        found = [each for each in self.connections if wanted.admits(each)]
        return Connections(
            schema=CONNECTIONS_SCHEMA,
            time=self.now,
            node="worker-1",
            total=len(found),
            missed=self.missed,
            connections=found[: wanted.limit] if wanted.limit else found,
        )

    def asdex(self) -> asdex_model.AsdexReport:
        scores = [each for each in self.vertices if each.asdex is not None]
        return asdex_model.AsdexReport(
            schema=asdex_model.SCHEMA,
            node="worker-1",
            time=NOW,
            since=NOW - timedelta(hours=1),
            complete=True,
            score=0.71 if scores else None,
            points=71,
            connections=1,
            namespaces=(),
            workloads=tuple(
                asdex_model.AsdexWorkload(
                    workload=each.id,
                    namespace=each.namespace,
                    score=each.asdex,
                    points=0,
                    connections=60,
                    losses=() if each.asdex == 1 else self.losses,
                )
                for each in scores
            ),
        )

    def status(self) -> Status:
        return Status(
            schema=SCHEMA,
            time=NOW,
            version="1",
            node="worker-1",
            cluster="c",
            trust_domain=TRUST_DOMAIN,
            pid=1,
            started=NOW - timedelta(days=2),
            ready=not self.missing,
            missing=self.missing,
            ztunnel=ZtunnelReport(connected=True),
            config=ConfigReport(source="files", loaded=True),
            pods=tuple(self.pods),
        )


def sentences(picture: Picture) -> None:
    """Draw a small mesh in which everything occurs once."""
    picture.vertices = [
        vertex("outside", kind=model.Kind.OUTSIDE),
        vertex("node", kind=model.Kind.NODE),
        vertex("sentences/frontend", asdex=0.94),
        vertex("sentences/age", asdex=1.0),
        vertex("sentences/name-v1", mode="PERMISSIVE", asdex=0.41),
        vertex("sentences/name-v2", asdex=1.0),
        vertex("ingress/gateway", local=False),
        vertex("data/postgres", local=False),
        vertex("monitoring/prometheus", mode="PERMISSIVE"),
    ]
    allow = ("AuthorizationPolicy/sentences/callers",)
    picture.edges = [
        edge("outside", "sentences/name-v1", plaintext=31),
        edge("ingress/gateway", "sentences/frontend", mutual_tls=250, plaintext=1),
        edge("sentences/frontend", "sentences/age", mutual_tls=125, policies=allow),
        edge("sentences/frontend", "sentences/name-v1", direct=60),
        edge("sentences/frontend", "sentences/name-v2", mutual_tls=65, policies=allow),
        edge(
            "outside",
            "sentences/age",
            refused=12,
            reasons={"strict_requires_mtls": 12},
        ),
        edge("sentences/age", "data/postgres", 5432, mutual_tls=9, failed=2,
             reasons={"connect_timeout": 2}),
        edge("node", "sentences/frontend", 8081, plaintext=30),
        edge("monitoring/prometheus", "sentences/frontend", 9090, mutual_tls=20),
        edge("monitoring/prometheus", "sentences/age", 9090, mutual_tls=20),
    ]  # fmt: skip
    breaks, stays = plaintext_model.Effect.BREAKS, plaintext_model.Effect.STAYS
    picture.losses = (
        asdex_model.Loss(
            check=asdex_model.Check.POLICY,
            cost=0.3,
            connections=60,
            reason="no policy names who may call",
        ),
        asdex_model.Loss(
            check=asdex_model.Check.STRICT,
            cost=0.004,
            connections=5,
            reason="plaintext is let in on this port",
            caller=identity("monitoring/prometheus"),
            policy="PeerAuthentication sentences/default (peers.yaml:3)",
        ),
    )
    picture.plaintext = report(
        strictness(
            "sentences/name-v1",
            plaintext_model.Verdict.NOT_SAFE,
            caller(plaintext_model.Origin.OUTSIDE, "198.51.100.7", 31, breaks),
            caller(plaintext_model.Origin.POD, "legacy/cron", 4, breaks),
            caller(plaintext_model.Origin.NODE, "192.0.2.1", 90, stays),
            reasons=("2 callers would be refused",),
        ),
        strictness("sentences/frontend", plaintext_model.Verdict.SAFE, mode="STRICT"),
        strictness("sentences/age", plaintext_model.Verdict.SAFE, mode="STRICT"),
        strictness("sentences/name-v2", plaintext_model.Verdict.SAFE),
        strictness(
            "monitoring/prometheus",
            plaintext_model.Verdict.NOT_KNOWN,
            reasons=("callers are recorded for 2 of the 7 days only",),
        ),
    )
    picture.pods = [
        pod("sentences/frontend"),
        pod("sentences/age"),
        pod("sentences/name-v1", mode="PERMISSIVE"),
        pod("sentences/name-v2", left=-5),
        pod("monitoring/prometheus", mode="PERMISSIVE"),
        pod("sentences/late", state=PodState.WAITING),
    ]

    picture.connections = [
        connection(3, "sentences/frontend", "sentences/age"),
        connection(
            44,
            "",
            "sentences/name-v1",
            security=Security.PLAINTEXT,
            source="198.51.100.7:51000",
            source_identity="",
            hbone="",
            tls_version="",
            cipher="",
            key_exchange="",
            policy="default:allow",
            rule="",
        ),
        connection(
            310,
            "sentences/age",
            "data/postgres",
            pod="sentences/age",
            direction=Direction.OUTBOUND,
            destination="10.0.9.9:5432",
            service="postgres.data.svc",
            policy="",
            rule="",
        ),
        connection(
            7300,
            "sentences/frontend",
            "sentences/name-v1",
            security=Security.DIRECT,
            hbone="",
            tls_version="",
            cipher="",
            key_exchange="",
            policy="default:allow",
            rule="",
        ),
    ]


def many(picture: Picture, workloads: int, namespaces: int) -> None:
    """Draw a mesh of so many workloads, of which each calls four others."""
    uids = [f"team-{each % namespaces:02}/service-{each:03}" for each in range(workloads)]
    picture.vertices = [vertex(uid, asdex=0.5) for uid in uids]
    picture.pods = [pod(uid) for uid in uids]
    picture.edges = []
    for at, uid in enumerate(uids):
        for step in (1, namespaces, 3 * namespaces, 7 * namespaces + 1):
            kind = (at + step) % 4
            picture.edges.append(
                edge(
                    uid,
                    uids[(at + step) % workloads],
                    mutual_tls=0 if kind == 0 else 40 + at,
                    plaintext=3 if kind in {0, 1} else 0,
                    refused=2 if at % 50 == 0 else 0,
                    reasons={"policy_denied": 2} if at % 50 == 0 else {},
                )
            )
