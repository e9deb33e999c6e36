"""Traces: from the core's report to a span at a receiver, and what becomes of all others."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator

import msgspec
import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Status

from support.certificates import NOW
from support.mesh_state import SETTINGS, identity, ip
from support.netns import wait_until
from support.otlp import Receiver, receiver
from support.tunnel_rig import UNAUDITED, Rig, chain_of, ended
from ztunnel import protocol
from ztunnel.corelike import Kind
from ztunnel.log_writer import Cause
from ztunnel.observe import traces
from ztunnel.observe.access_log import Line, json_line, text_line
from ztunnel.reasons import Reason
from ztunnel.settings import TraceSettings

TRACE, SPAN, PARENT = bytes(range(16)), b"span-id-", b"parent--"


@pytest.fixture
def collector() -> Iterator[Receiver]:
    with receiver(socket.create_server(("127.0.0.1", 0))) as made:
        yield made


def settings(port: int, sample_one_in: int = 4, path: str = "") -> protocol.Settings:
    endpoint = protocol.Receiver("127.0.0.1", port, path)
    return msgspec.structs.replace(
        UNAUDITED, traces=TraceSettings(endpoint=endpoint, sample_one_in=sample_one_in)
    )


@pytest.fixture
def rig(collector: Receiver) -> Iterator[Rig]:
    made = Rig(settings(collector.port))
    made.start()
    yield made
    made.close()
    made.tunnel.traces.stop(5)


def traced(
    rig: Rig, decision: int, kind: Kind, reason: Reason = Reason.CLOSED, parent: bytes = bytes(8)
) -> Line:
    """End a connection that the core has sampled; it stood after half a second."""
    return ended(
        rig,
        decision,
        kind,
        reason,
        trace_id=TRACE,
        span_id=SPAN,
        parent_id=parent,
        opened_us=int(rig.now * 1e6) - 1_500_000,
        upstream=ip("10.2.0.1"),
        upstream_port=15008,
    )


def spans(collector: Receiver, count: int) -> None:
    wait_until(lambda: len(collector.spans) >= count, f"{count} spans")


def test_the_core_is_told_what_to_sample(rig: Rig) -> None:
    assert rig.core.tracing == (True, 2**30)
    rig.settings = UNAUDITED
    rig.start()
    assert rig.core.tracing[0] is False


def test_a_span_says_what_the_line_says(rig: Rig, collector: Receiver) -> None:
    line = traced(rig, rig.core.answers[rig.outbound("10.2.0.1")], Kind.OUTBOUND)
    spans(collector, 1)
    (span,) = collector.spans
    assert (span.trace, span.id, span.parent) == (TRACE.hex(), SPAN.hex(), "")
    assert not span.server
    assert span.message.name == "tcp outbound default/httpbin"
    assert span.message.start_time_unix_nano == (NOW - 2) * 10**9
    assert span.message.end_time_unix_nano == (NOW - 2) * 10**9 + 1_500_000_000
    (opened,) = span.message.events
    assert (opened.name, opened.time_unix_nano) == ("open", (NOW - 2) * 10**9 + 500_000_000)
    assert span.message.status.code == Status.STATUS_CODE_UNSET
    assert span.attributes == {
        "network.transport": "tcp",
        "network.type": "ipv4",
        "server.address": "10.2.0.1",
        "server.port": 8080,
        "client.address": "10.1.0.1",
        "client.port": 4000,
        "source.address": "10.1.0.1",
        "source.port": 4000,
        "destination.address": "10.2.0.1",
        "destination.port": 8080,
        "ztunnel.direction": "outbound",
        "ztunnel.connection_security_policy": "mutual_tls",
        "ztunnel.source.workload": "default/sleep",
        "ztunnel.source.identity": identity("sleep"),
        "ztunnel.destination.workload": "default/httpbin",
        "ztunnel.destination.identity": identity("httpbin"),
        "ztunnel.hbone.address": "10.2.0.1:15008",
        "ztunnel.reason": "closed",
        "ztunnel.bytes_received": 10,
        "ztunnel.bytes_sent": 20,
    }
    assert span.resource.items() >= {
        ("service.name", "ztunnel"),
        ("host.name", SETTINGS.node),
        ("k8s.cluster.name", SETTINGS.cluster),
    }
    assert line.trace == TRACE.hex()
    ((path, headers),) = collector.requests
    assert (path, headers["Content-Type"]) == ("/v1/traces", "application/x-protobuf")


def test_what_comes_in_is_its_peers_child(rig: Rig, collector: Receiver) -> None:
    number, _ = rig.prove(chain_of("httpbin"))
    decision = rig.core.answers[rig.inbound("10.2.0.1", number)]
    traced(rig, decision, Kind.INBOUND_HBONE, parent=PARENT)
    spans(collector, 1)
    (span,) = collector.spans
    assert span.server
    assert span.parent == PARENT.hex()
    # The peer's span is another process' (opentelemetry.proto.trace.v1.SpanFlags).
    assert span.message.flags == 0x301
    assert span.attributes["ztunnel.source.identity"] == identity("httpbin")


def test_a_failure_is_an_error_with_its_cause(rig: Rig, collector: Receiver) -> None:
    decision = rig.core.answers[rig.outbound("10.2.0.1")]
    traced(rig, decision, Kind.OUTBOUND, Reason.CONNECT_TIMEOUT)
    spans(collector, 1)
    (span,) = collector.spans
    assert span.message.status.code == Status.STATUS_CODE_ERROR
    assert "15008" in span.message.status.message
    assert span.attributes["error.type"] == "connect_timeout"


def test_a_failure_whose_line_is_left_out_has_a_span(rig: Rig, collector: Receiver) -> None:
    decision = rig.core.answers[rig.outbound("10.2.0.1")]
    rig.tunnel.events.failure_lines.most = 1
    for _ in range(3):
        traced(rig, decision, Kind.OUTBOUND, Reason.CONNECT_TIMEOUT)
    spans(collector, 3)
    assert len(rig.lines) == 1


def test_what_is_not_sampled_has_no_span(rig: Rig, collector: Receiver) -> None:
    decision = rig.core.answers[rig.outbound("10.2.0.1")]
    assert ended(rig, decision, Kind.OUTBOUND, Reason.CLOSED).trace == ""
    traced(rig, decision, Kind.OUTBOUND)
    spans(collector, 1)
    assert len(collector.spans) == 1


def test_the_last_trace_of_a_label_set_is_an_exemplar(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    decision = rig.core.answers[rig.outbound("10.2.0.1")]
    line = traced(rig, decision, Kind.OUTBOUND)
    assert rig.tunnel.traces.exemplars == {
        line.labels: traces.Exemplar(TRACE.hex(), 1.5, NOW - 0.5)
    }
    monkeypatch.setattr(traces, "MAX_EXEMPLARS", 1)
    other = traced(rig, rig.core.answers[rig.outbound("1.2.3.4")], Kind.OUTBOUND)
    assert list(rig.tunnel.traces.exemplars) == [other.labels]
    rig.settings = UNAUDITED
    rig.start()
    assert not rig.tunnel.traces.exemplars


def test_a_line_has_its_trace_at_the_end_in_both_forms(rig: Rig) -> None:
    line = traced(rig, rig.core.answers[rig.outbound("10.2.0.1")], Kind.OUTBOUND)
    bare = msgspec.structs.replace(line, trace="")
    said = json.loads(json_line(line))
    assert said.pop("trace_id") == TRACE.hex()
    assert said == json.loads(json_line(bare))
    assert text_line(line) == f'{text_line(bare)} trace_id="{TRACE.hex()}"'


# --- receivers that are not as they should be ----------------------------------------------------


def test_what_a_receiver_cannot_take_now_comes_again(rig: Rig, collector: Receiver) -> None:
    collector.statuses = [503, 429]
    traced(rig, rig.core.answers[rig.outbound("10.2.0.1")], Kind.OUTBOUND)
    spans(collector, 1)
    assert len(collector.requests) == 3
    wait_until(lambda: rig.tunnel.traces.exported == 1, "it is counted")
    assert sum(rig.tunnel.traces.lost.values()) == 0


def test_what_a_receiver_refuses_for_good_does_not_and_is_counted_as_lost(
    rig: Rig, collector: Receiver
) -> None:
    collector.statuses = [400]
    decision = rig.core.answers[rig.outbound("10.2.0.1")]
    traced(rig, decision, Kind.OUTBOUND)
    wait_until(lambda: len(collector.requests) == 1, "it was asked")
    traced(rig, decision, Kind.OUTBOUND)
    spans(collector, 1)
    assert len(collector.requests) == 2
    wait_until(lambda: rig.tunnel.traces.exported == 1, "it is counted")
    assert rig.tunnel.traces.refused == 1
    rig.settings = UNAUDITED
    rig.start()
    assert (rig.tunnel.traces.exported, rig.tunnel.traces.refused) == (1, 1)


def test_a_part_that_is_refused_is_no_reason_to_send_it_again(
    rig: Rig, collector: Receiver
) -> None:
    collector.rejects = 1
    traced(rig, rig.core.answers[rig.outbound("10.2.0.1")], Kind.OUTBOUND)
    wait_until(lambda: rig.tunnel.traces.refused == 1, "it is counted")
    assert len(collector.requests) == 1
    assert rig.tunnel.traces.exported == 0


def test_a_receiver_that_hangs_up_gets_it_when_it_is_back(rig: Rig, collector: Receiver) -> None:
    collector.silent.set()
    traced(rig, rig.core.answers[rig.outbound("10.2.0.1")], Kind.OUTBOUND)
    wait_until(lambda: rig.tunnel.traces.problem, "it is known")
    assert "127.0.0.1" in rig.tunnel.traces.problem
    collector.silent.clear()
    spans(collector, 1)
    wait_until(lambda: not rig.tunnel.traces.problem, "it is known")


def test_spans_beyond_the_queue_are_counted_and_nothing_waits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(traces, "MAX_QUEUED", 10)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        closed = taken.getsockname()[1]
    rig = Rig(settings(closed))
    rig.start()
    decision = rig.core.answers[rig.outbound("10.2.0.1")]
    # Once the writer has taken a batch, which it keeps, ten more have room.
    for _ in range(2000):
        traced(rig, decision, Kind.OUTBOUND)
    lost = rig.tunnel.traces.lost
    assert sum(lost.values()) > 0
    assert lost[Cause.TOO_LONG] == 0
    rig.close()
    rig.tunnel.traces.stop(5)
    assert sum(rig.tunnel.traces.lost.values()) == 2000


def test_another_receiver_gets_what_comes_from_then_on(rig: Rig, collector: Receiver) -> None:
    decision = rig.core.answers[rig.outbound("10.2.0.1")]
    traced(rig, decision, Kind.OUTBOUND)
    spans(collector, 1)
    with receiver(socket.create_server(("127.0.0.1", 0))) as other:
        rig.settings = settings(other.port, path="/prefix")
        rig.start()
        decision = rig.core.answers[rig.outbound("10.2.0.1")]
        traced(rig, decision, Kind.OUTBOUND)
        spans(other, 1)
        assert [path for path, _ in other.requests] == ["/prefix/v1/traces"]
        assert len(collector.spans) == 1
        assert rig.tunnel.traces.exported >= 1
        # The same again is no reason to begin anew.
        writer = rig.tunnel.traces._writer
        rig.start()
        assert rig.tunnel.traces._writer is writer
        rig.tunnel.traces.stop(5)


def test_nothing_of_opentelemetry_is_loaded_while_traces_are_off() -> None:
    program = (
        "import sys, ztunnel.daemon\n"
        "found = [name for name in sys.modules if name.startswith(('opentelemetry', 'google'))]\n"
        "assert not [name for name in found if 'proto' in name or 'tele' in name], found\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
