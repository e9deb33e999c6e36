"""What both daemons' `/metrics` say when everything that they can say has happened.

Owns one picture of `ztunnel` and one status of `nodeagent` with a sample of every metric: what is
true of these texts (names, promtool, documents, dashboards, rules) is true of the product's.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from prometheus_client.parser import text_string_to_metric_families

from nodeagent.admin import Metrics, Status
from nodeagent.admin.model import (
    SCHEMA,
    CertificateReport,
    ConfigReport,
    PodReport,
    PodState,
    RecordingReport,
    ZtunnelReport,
)
from nodeagent.observe.asdex_metrics import AsdexSeries
from nodeagent.observe.asdex_model import AsdexReport, AsdexWorkload
from support.certificates import NOW
from support.fake_core import BOUNDS_US, REASONS, FakeCore, record
from support.mesh_state import identity, service, workload
from ztunnel._core import PodCounters, Stats
from ztunnel.audit import Counts
from ztunnel.authorize import Client
from ztunnel.observe import labels
from ztunnel.observe.counted import ByPolicy, Judged, Plaintext
from ztunnel.observe.istio_text import Rows
from ztunnel.observe.labels import Labels
from ztunnel.observe.series import Counters, Series
from ztunnel.observe.stats import Picture, render
from ztunnel.observe.stats_families import OWN_HELP
from ztunnel.reasons import Reason

ACCEPTED = {
    # Prometheus 2 and 3; told to prefer text; told to take nothing else.
    "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,"
    "text/plain;version=0.0.4;q=0.5,*/*;q=0.1": True,
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,"
    "text/plain;version=0.0.4;q=0.3,*/*;q=0.2": True,
    "text/plain;version=0.0.4;q=0.6,application/openmetrics-text;version=1.0.0;q=0.5": False,
    "text/plain;version=0.0.4;q=0.3,*/*;q=0.2": False,
    "application/openmetrics-text;q=0, text/plain": False,
    "application/openmetrics-text;q=0.000": False,
    "application/openmetrics-text, text/plain": True,
    "APPLICATION/OpenMetrics-Text ; Q=0.1": True,
    "application/openmetrics-text;q=nonsense": True,
    "application/openmetrics-text;q=": True,
    "application/openmetrics-textual": False,
}
"""Accept headers, and whether OpenMetrics is the answer (RFC 9110, 12.5.1)."""

RULE = "default/httpbin rules[0]"
SLEEP = workload("sleep", "10.1.0.1", locality="eu/eu-1/a")
HTTPBIN = workload("httpbin", "10.2.0.1")
MUTUAL = labels.make(
    labels.SOURCE,
    labels.MUTUAL_TLS,
    SLEEP,
    HTTPBIN,
    service("web", ("10.96.0.1",), ()),
    source_principal=identity("sleep"),
    destination_principal=identity("httpbin"),
)
PLAIN = labels.make(labels.DESTINATION, labels.PLAINTEXT, None, HTTPBIN, None)


def by_reason(**counts: int) -> tuple[int, ...]:
    return tuple(counts.get(reason.name, 0) for reason in REASONS)


IDLE_POD = record(PodCounters, 0, 0, 0, 0, 0, 0, by_reason())
POD = record(PodCounters, 4, 7, 1, 5, 2, 65536, by_reason(POD_DIALS=3, POD_CONNECTIONS=9))


def rows(*found: tuple[Labels, Counters]) -> Rows:
    made = Rows()
    for number, (labelled, counters) in enumerate(found, start=1):
        made.add(Series(number, labelled), counters)
    return made


def ztunnel_text(picture: Picture, accept: str = "") -> str:
    _, portions = render(picture, accept)
    return b"".join(portions).decode()


def picture(core: FakeCore) -> Picture:
    """Return a picture in which every metric has a sample."""
    shown = rows(
        (
            MUTUAL,
            Counters(
                7,
                6,
                by_reason(CONNECT_TIMEOUT=2, CONNECT_REFUSED=1, SERVER_RESET=4),
                100,
                200,
            ),
        ),
        (PLAIN, Counters(3, 3, by_reason(STRICT_PLAINTEXT=5), 10, 20)),
    )
    shown.fail(PLAIN, "DENY", 1)
    shown.fail(PLAIN, "CONNECT", 2)
    return Picture(
        rows=shown,
        pods=[("default/web", POD), ("default/idle", IDLE_POD)],
        core=_with_failures(core.stats()),
        now_us=2_500_000,
        bounds_us=BOUNDS_US,
        deadlines=("connect", "idle"),
        handshake_failures={("client", Reason.CERT_EXPIRED): 3},
        failed={Reason.POLICY_CHANGED: 4},
        certificates={identity("sleep"): (NOW - 60, NOW)},
        judged={
            Judged(Client.ALLOWED, allow=True, audited=False, would=True): 4,
            Judged(Client.ALLOWED, allow=True, audited=True, would=False): 2,
            Judged(Client.WITHOUT_IDENTITY, allow=False, audited=True, would=False): 1,
        },
        by_policy={
            ByPolicy(RULE, "", allow=False): 5,
            ByPolicy("", "policy_missing", allow=False): 1,
            ByPolicy("", "", allow=True): 2,
            ByPolicy("other", "", allow=True): 3,
        },
        plaintext={
            Plaintext("", "default/httpbin", allow=True): 8,
            Plaintext("default/legacy", "default/httpbin", allow=False): 9,
            Plaintext("other", "other", allow=True): 10,
        },
        overflowed={"istio_tcp_connections": 11},
        expired={"istio_tcp_connections": 12},
        own=dict.fromkeys(OWN_HELP, 4),
        audit=Counts(
            {"file": 7}, {("all", "rate"): 3, ("file", "slow"): 2}, {"file": "", "journal": "gone"}
        ),
    )


def _with_failures(stats: Stats) -> Stats:
    values = list(stats)
    values[Stats.__match_args__.index("handshake_failures")] = by_reason(TLS_FAILED=2)
    return record(Stats, *values)


def nodeagent_text(*, openmetrics: bool = False) -> str:
    metrics = Metrics("1")
    metrics.repairs.labels("default/a", "rules").inc()
    metrics.enrol_failures.labels("default/a").inc()
    metrics.change_seconds.observe(0.1)
    metrics.drained(2)
    series = AsdexSeries()
    series.show(asdex())
    metrics.registry.register(series)
    return metrics.render(status(), openmetrics=openmetrics).decode()


def asdex() -> AsdexReport:
    moment = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    workload = AsdexWorkload(
        workload="default/a", namespace="default", score=0.5, points=100, connections=2
    )
    return AsdexReport(
        schema=1,
        node="n",
        time=moment,
        since=moment,
        complete=True,
        score=0.5,
        points=100,
        connections=2,
        namespaces=(),
        workloads=(workload,),
    )


def status() -> Status:
    begin = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    certificate = CertificateReport(
        identity=identity("a"),
        not_before=begin,
        not_after=begin + timedelta(hours=1),
        renewals=2,
        failures=1,
        failed=5,
    )
    pod = PodReport(
        workload="default/a",
        identity=identity("a"),
        netns="a",
        state=PodState.ENROLLED,
        since=begin,
        mode="STRICT",
        drops={"unmarked": 7},
        certificate=certificate,
    )
    return Status(
        schema=SCHEMA,
        time=begin,
        version="1",
        node="n",
        cluster="c",
        trust_domain="cluster.local",
        pid=1,
        started=begin,
        ready=True,
        missing=(),
        ztunnel=ZtunnelReport(connected=True, wanted_version=3, acknowledged_version=3),
        config=ConfigReport(source="files", loaded=True, documents=4),
        pods=(pod,),
        certificates=(certificate,),
        recording=RecordingReport(recorded=5, lost=2, bytes=4096, problem="no room"),
    )


def described(text: str) -> dict[str, set[str]]:
    """Return the names of a text's series with the names of their labels."""
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def every_series() -> dict[str, set[str]]:
    """Return the names of all series of both daemons with the names of their labels."""
    core = FakeCore()
    try:
        found = described(ztunnel_text(picture(core)))
    finally:
        core.close()
    for name, labels_of in described(nodeagent_text()).items():
        found.setdefault(name, set()).update(labels_of)
    return found
