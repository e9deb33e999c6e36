"""What Prometheus reads: Istio's standard TCP series, and the tunnel's own.

This module owns a scrape: the copy of all counters, and its text. It promises that neither holds
up the event loop, however many series there are: the loop turns between portions of the copy, and
the text is made on a thread, portion by portion, so that it is never there as a whole. It may not
count anything itself, nor name anything (`istio_text`, `stats_families`).
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Final

import msgspec
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.exposition import generate_latest as encode_text
from prometheus_client.openmetrics.exposition import CONTENT_TYPE_LATEST as OPENMETRICS
from prometheus_client.openmetrics.exposition import generate_latest as encode_openmetrics
from prometheus_client.process_collector import ProcessCollector

from ztunnel.audit import Counts
from ztunnel.observe import istio_text
from ztunnel.observe.counted import ByPolicy, Judged, Plaintext
from ztunnel.observe.istio_text import Rows
from ztunnel.observe.labels import Labels
from ztunnel.observe.stats_families import Collector
from ztunnel.observe.traces import Exemplar
from ztunnel.reasons import Reason
from ztunnel.same_node import is_direct

if TYPE_CHECKING:
    from ztunnel._core import PodCounters, Stats
    from ztunnel.control import ControlStatus
    from ztunnel.corelike import CoreLike
    from ztunnel.observe.access_log import AccessLog
    from ztunnel.tunnel import Tunnel

__all__ = ["Picture", "render", "take"]

PORTION: Final = 128
"""Label sets or pods read before the loop turns: half a millisecond."""

MAX_ACCEPT: Final = 1024
"""Characters of an Accept header that are looked at; Prometheus sends some 200."""
_QUALITY: Final = re.compile(r"[01](?:\.[0-9]{0,3})?")


class Picture(msgspec.Struct, frozen=True, kw_only=True):
    """A copy of all counters. Times are seconds since the epoch, but for `now_us`.

    Those of one label set or pod are of one moment; the whole is of some milliseconds.
    """

    rows: Rows
    pods: list[tuple[str, PodCounters]]
    """By workload: each is in one pod of this node."""
    core: Stats
    now_us: int
    """By the core's clock."""
    bounds_us: tuple[int, ...]
    deadlines: tuple[str, ...]
    handshake_failures: dict[tuple[str, Reason], int]
    failed: dict[Reason, int]
    certificates: dict[str, tuple[int, int]]
    """By identity: begin and end."""
    judged: dict[Judged, int]
    by_policy: dict[ByPolicy, int]
    plaintext: dict[Plaintext, int]
    overflowed: dict[str, int]
    """By metric: what was counted with others, for want of room."""
    expired: dict[str, int]
    """By metric: label sets that are no longer there, for what they named is gone."""
    own: dict[str, float]
    """Plain numbers by metric name without prefix; a name that ends in `_total` is a counter."""
    exemplars: dict[Labels, Exemplar] = {}
    """The last traced connection of a label set."""
    audit: Counts = Counts({}, {}, {})


async def take(
    tunnel: Tunnel,
    core: CoreLike,
    control: ControlStatus,
    access_log: AccessLog,
    clock: Callable[[], float],
    bounds_us: tuple[int, ...],
    deadlines: tuple[str, ...],
) -> Picture:
    """Copy every counter, in portions. `clock` is the core's, in seconds. One at a time."""
    rows = Rows()
    for number, series in enumerate(tunnel.series, start=1):
        counters = tunnel.series.read(series)
        if counters is not None:
            rows.add(series, counters)
        if number % PORTION == 0:
            await asyncio.sleep(0)
    for (labels, flag), count in tunnel.events.early.items():
        rows.fail(labels, flag, count)
    pods: list[tuple[str, PodCounters]] = []
    for number, held in enumerate(list(tunnel.pods), start=1):
        # It may have gone meanwhile.
        if tunnel.pods.by_number(held.number) is not None:
            pods.append((held.pod.workload, core.read_pod(held.number)))
        if number % PORTION == 0:
            await asyncio.sleep(0)
    state = tunnel.state
    counted = tunnel.counted
    early = tunnel.events.early
    return Picture(
        rows=rows,
        pods=pods,
        core=core.stats(),
        now_us=int(clock() * 1_000_000),
        bounds_us=bounds_us,
        deadlines=deadlines,
        handshake_failures=dict(tunnel.events.handshake_failures),
        failed=dict(tunnel.events.failed),
        judged=dict(counted.judged),
        by_policy=dict(counted.by_policy.items()),
        plaintext=dict(counted.plaintext.items()),
        certificates={
            uid: (identity.not_before, identity.not_after)
            for uid, identity in state.identities.items()
        },
        exemplars=dict(tunnel.traces.exemplars),
        audit=tunnel.audit.counts(),
        overflowed={
            "istio_tcp_connections": tunnel.series.overflowed,
            "istio_tcp_connections_failed": early.overflowed,
            "ztunnel_policy_verdicts": counted.by_policy.overflowed,
            "ztunnel_plaintext_connections": counted.plaintext.overflowed,
        },
        expired={
            "istio_tcp_connections": tunnel.series.expired,
            "istio_tcp_connections_failed": early.expired,
            "ztunnel_policy_verdicts": counted.by_policy.expired,
            "ztunnel_plaintext_connections": counted.plaintext.expired,
        },
        own={
            "pods": len(tunnel.pods),
            "workloads": len(state.workloads),
            "services": len(state.services),
            "authorizations": len(state.authorizations),
            "decisions": len(tunnel.decisions),
            "peers": len(tunnel.peers),
            "series": len(tunnel.series),
            "flows": len(tunnel.flows),
            "identities": len(tunnel.identities),
            "waiting_decisions": tunnel.waiting,
            "control_connected": float(control.connected),
            "same_node_direct": float(is_direct(state)),
            "control_version": control.version,
            "flows_folded_total": tunnel.flows.folded,
            "series_evicted_total": tunnel.series.evicted,
            "connections_cut_total": tunnel.recheck.cut,
            "waits_expired_total": tunnel.waited_too_long,
            "internal_errors_total": tunnel.internal_errors,
            "capture_probes_total": tunnel.events.probes,
            "access_log_lines_total": access_log.written,
            "access_log_left_out_total": tunnel.events.failure_lines.left_out,
            "access_log_dropped_total": access_log.dropped,
            "traces_exported_total": tunnel.traces.exported,
            "traces_dropped_total": sum(tunnel.traces.lost.values()) + tunnel.traces.refused,
        },
    )


def render(picture: Picture, accept: str) -> tuple[str, Iterator[bytes]]:
    """Return the media type that fits an Accept header best, and the text, portion by portion.

    The portions may be made on any thread.
    """
    openmetrics = _takes_openmetrics(accept)
    encode = encode_openmetrics if openmetrics else encode_text

    def made() -> Iterator[bytes]:
        yield from istio_text.portions(
            picture.rows, openmetrics=openmetrics, exemplars=picture.exemplars
        )
        registry = CollectorRegistry(auto_describe=False)
        registry.register(Collector(picture))
        ProcessCollector(registry=registry)
        yield encode(registry)

    return OPENMETRICS if openmetrics else CONTENT_TYPE_PLAIN_0_0_4, made()


def _takes_openmetrics(accept: str) -> bool:
    """Who takes it gets it, unless text is preferred (RFC 9110, 12.5.1: quality values).

    The library's own choice fails where a version is no number.
    """
    quality = {"application/openmetrics-text": 0.0, "text/plain": 0.0}
    for each in accept[:MAX_ACCEPT].split(","):
        kind, *parameters = (part.strip().lower() for part in each.split(";"))
        if kind in quality:
            quality[kind] = max(quality[kind], _quality(parameters))
    return 0 < quality["application/openmetrics-text"] >= quality["text/plain"]


def _quality(parameters: Iterable[str]) -> float:
    said = next((each[2:] for each in parameters if each.startswith("q=")), "1")
    return float(said) if _QUALITY.fullmatch(said) else 1.0
