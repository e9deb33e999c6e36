"""The admin surface over real sockets: what it answers, to whom, and what it refuses."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import typing
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path

import aiohttp
import msgspec
import pytest
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as openmetrics_families,
)
from prometheus_client.parser import text_string_to_metric_families

from nodeagent.admin import Metrics, Status, bounded, server
from nodeagent.admin.configuration import CONFIGURATION_SCHEMA, Configuration, Documents
from nodeagent.admin.model import (
    SCHEMA,
    CertificateReport,
    ConfigReport,
    PodReport,
    PodState,
    Problem,
    RecordingReport,
    ZtunnelReport,
)
from nodeagent.api import Document
from support import conformance
from support.expositions import ACCEPTED, nodeagent_text
from support.prometheus import check_metrics
from support.resources import identities, read, service
from ztunnel import protocol

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
ID = "spiffe://cluster.local/ns/default/sa/a"
SECRET = b"the private key"


def picture(missing: tuple[str, ...] = ()) -> Status:
    certificate = CertificateReport(
        identity=ID,
        not_before=NOW,
        not_after=NOW + timedelta(seconds=60),
        renewals=2,
        failures=1,
        failed=5,
    )
    return Status(
        schema=SCHEMA,
        time=NOW,
        version="1",
        node="n",
        cluster="c",
        trust_domain="cluster.local",
        pid=1,
        started=NOW,
        ready=not missing,
        missing=missing,
        ztunnel=ZtunnelReport(connected=True, wanted_version=3, acknowledged_version=3),
        config=ConfigReport(
            source="files /etc/x",
            loaded=True,
            documents=4,
            problems=(Problem(file="a.yaml", line=3, column=1, field="spec", reason="bad"),),
        ),
        pods=(
            PodReport(
                workload="default/a",
                identity=ID,
                netns="a",
                state=PodState.ENROLLED,
                since=NOW,
                mode="STRICT",
                drops={"unmarked": 7},
                certificate=certificate,
            ),
        ),
        certificates=(certificate,),
        recording=RecordingReport(recorded=5, lost=2, bytes=4096, problem="no room"),
    )


class FakeBackend:
    def __init__(self) -> None:
        self.lacking: tuple[str, ...] = ()
        self.reason = ""
        self.documents: Configuration | None = None
        self._metrics = Metrics("1")

    async def status(self) -> Status:
        return picture(self.lacking)

    async def missing(self) -> tuple[str, ...]:
        return self.lacking

    def stuck(self) -> str:
        return self.reason

    async def metrics(self, *, openmetrics: bool) -> bytes:
        return self._metrics.render(picture(self.lacking), openmetrics=openmetrics)

    def resources(self) -> tuple[protocol.Resource, ...]:
        return (
            protocol.Credential(ID, (b"leaf",), SECRET, 1, 2),
            protocol.TrustBundle("cluster.local", (b"root",)),
            protocol.WorkloadPolicy(
                "default/a", protocol.Mode.STRICT, "x", {80: protocol.Mode.DISABLE}
            ),
        )

    def configuration(self) -> Configuration | None:
        return self.documents

    async def flows(self, age: int) -> bytes:
        return json.dumps({"age": age}).encode()


class Site:
    def __init__(self, port: int, path: Path, backend: FakeBackend) -> None:
        self.base = f"http://127.0.0.1:{port}"
        self.port = port
        self.path = path
        self.backend = backend

    async def get(
        self,
        path: str,
        *,
        unix: bool = False,
        method: str = "GET",
        host: str | None = None,
        accept: str = "*/*",
    ) -> tuple[int, str]:
        headers = {"Accept": accept} | ({"Host": host} if host is not None else {})
        connector = aiohttp.UnixConnector(str(self.path)) if unix else aiohttp.TCPConnector()
        async with (
            aiohttp.ClientSession(connector=connector) as session,
            session.request(method, self.base + path, headers=headers) as response,
        ):
            return response.status, await response.text()


async def looked(age: int) -> bytes:
    return json.dumps({"looked": age}).encode()


async def paged() -> bytes:
    return b'{"schema": 1}'


async def relayed(query: str) -> server.Relayed:
    return server.Relayed(404, "text/plain; charset=utf-8", f"asked: {query}\n")


async def answered(query: Mapping[str, str]) -> bytes:
    if "silent" in query:
        raise server.NoAnswerError("ztunnel is not connected")
    if "wrong" in query:
        raise ValueError("wrong: not understood")
    return json.dumps(dict(query)).encode()


def run(test: Callable[[Site], Awaitable[None]], tmp_path: Path) -> None:
    async def main() -> None:
        backend = FakeBackend()
        admin = server.AdminServer(
            backend,
            {"/window": server.Window("a window", looked)},
            {"/page": server.Page("a page", paged)},
            {"/stats": server.Relay("statistics", relayed)},
            {"/question": server.Question("a question", answered)},
        )
        tcp = socket.create_server(("127.0.0.1", 0))
        local = socket.socket(socket.AF_UNIX)
        local.bind(str(tmp_path / "a.sock"))
        await admin.serve(tcp)
        await admin.serve(local)
        try:
            async with asyncio.timeout(20):
                await test(Site(tcp.getsockname()[1], tmp_path / "a.sock", backend))
        finally:
            await admin.close()

    asyncio.run(main())


def test_status_round_trips(tmp_path: Path) -> None:
    async def test(site: Site) -> None:
        for unix in (False, True):
            code, body = await site.get("/status", unix=unix)
            assert code == 200
            assert msgspec.json.decode(body, type=Status) == picture()

    run(test, tmp_path)


@pytest.mark.parametrize("query,age", [("", 3600), ("?seconds=0", 0), ("?seconds=21600", 21600)])
def test_flows_are_asked_for_by_age(tmp_path: Path, query: str, age: int) -> None:
    async def test(site: Site) -> None:
        code, body = await site.get(f"/flows{query}", unix=True)
        assert (code, json.loads(body)) == (200, {"age": age})

    run(test, tmp_path)


def test_a_window_is_asked_for_by_age(tmp_path: Path) -> None:
    async def test(site: Site) -> None:
        code, body = await site.get("/window?seconds=60", unix=True)
        assert (code, json.loads(body)) == (200, {"looked": 60})
        assert (await site.get("/window?seconds=-1", unix=True))[0] == 400
        assert "/window          a window; ?seconds=3600" in (await site.get("/", unix=True))[1]

    run(test, tmp_path)


def test_a_page_asks_for_nothing(tmp_path: Path) -> None:
    async def test(site: Site) -> None:
        code, body = await site.get("/page", unix=True)
        assert (code, json.loads(body)) == (200, {"schema": 1})
        assert "/page            a page\n" in (await site.get("/", unix=True))[1]

    run(test, tmp_path)


def test_ztunnels_statistics_are_handed_on_with_their_status(tmp_path: Path) -> None:
    async def test(site: Site) -> None:
        found = await site.get("/stats?workload=a/b&filter=%5Etls&usedonly")
        assert found == (404, "asked: workload=a/b&filter=%5Etls&usedonly\n")

    run(test, tmp_path)


@pytest.mark.parametrize(
    "query,code,body",
    [
        ("", 200, "{}"),
        ("?pod=default/a&limit=3", 200, '{"pod": "default/a", "limit": "3"}'),
        ("?pod=a&pod=b", 400, "a parameter is there twice\n"),
        ("?wrong=1", 400, "wrong: not understood\n"),
        ("?silent=1", 503, "ztunnel is not connected\n"),
    ],
)
def test_a_question_is_asked_with_its_parameters(
    tmp_path: Path, query: str, code: int, body: str
) -> None:
    async def test(site: Site) -> None:
        assert await site.get(f"/question{query}", unix=True) == (code, body)

    run(test, tmp_path)


@pytest.mark.parametrize("age", ["", "-1", "1e9", "6h", "9" * 11, "٣"])
def test_an_age_that_is_no_number_is_refused(tmp_path: Path, age: str) -> None:
    async def test(site: Site) -> None:
        code, body = await site.get(f"/flows?seconds={age}", unix=True)
        assert (code, body) == (400, "seconds: write a whole number, as in ?seconds=3600\n")

    run(test, tmp_path)


def test_health(tmp_path: Path) -> None:
    async def test(site: Site) -> None:
        assert await site.get("/healthz/ready") == (200, "ready\n")
        assert await site.get("/healthz/live") == (200, "alive\n")
        site.backend.lacking = ("ztunnel is not connected", "pod default/a: Failed")
        site.backend.reason = "worker threads do not answer"
        code, body = await site.get("/healthz/ready")
        assert code == 503
        assert "not ready: pod default/a: Failed\n" in body
        assert await site.get("/healthz/live") == (503, "stuck: worker threads do not answer\n")

    run(test, tmp_path)


def test_metrics(tmp_path: Path) -> None:
    async def test(site: Site) -> None:
        code, body = await site.get("/metrics")
        assert code == 200
        series = {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in text_string_to_metric_families(body)
            for sample in family.samples
        }
        workload = ("workload", "default/a")
        assert series["nodeagent_ready", ()] == 1
        assert series["nodeagent_pods", (("state", "Enrolled"),)] == 1
        assert series["nodeagent_pods", (("state", "Failed"),)] == 0
        assert series["nodeagent_config_problems", ()] == 1
        assert series["nodeagent_flows_recorded_total", ()] == 5
        assert series["nodeagent_flows_lost_total", ()] == 2
        assert series["nodeagent_flows_bytes", ()] == 4096
        assert series["nodeagent_flows_failing", ()] == 1
        assert series["nodeagent_ztunnel_in_sync", ()] == 1
        dropped = "nodeagent_capture_dropped_total"
        assert series[dropped, (("reason", "unmarked"), workload)] == 7
        identity = (("spiffe_id", ID),)
        assert series["nodeagent_svid_not_before_timestamp_seconds", identity] == NOW.timestamp()
        assert series["nodeagent_svid_expiry_timestamp_seconds", identity] == NOW.timestamp() + 60
        assert series["nodeagent_svid_renewals_total", identity] == 2
        assert series["nodeagent_svid_renewal_failures_total", identity] == 5
        assert series["nodeagent_svid_renewal_failing", identity] == 1
        named = (("spiffe_id", ID), workload)
        expiry = "nodeagent_workload_svid_expiry_timestamp_seconds"
        assert series[expiry, named] == NOW.timestamp() + 60
        assert series["nodeagent_pod_state", (("state", "Enrolled"), workload)] == 1
        assert series["nodeagent_workload_mtls_mode", (("mode", "STRICT"), workload)] == 1
        assert series["process_open_fds", ()] > 0

    run(test, tmp_path)


def test_promtool_has_nothing_to_say() -> None:
    check_metrics(nodeagent_text())


def test_openmetrics_is_given_to_who_asks_for_it(tmp_path: Path) -> None:
    async def test(site: Site) -> None:
        code, body = await site.get(
            "/metrics", accept="application/openmetrics-text;version=1.0.0,text/plain;q=0.5"
        )
        assert code == 200
        assert body.endswith("# EOF\n")
        names = {
            sample.name
            for family in openmetrics_families(body)  # type: ignore[no-untyped-call]  # theirs
            for sample in family.samples
        }
        assert {"nodeagent_svid_renewals_total", "nodeagent_build_info"} <= names
        for accept, openmetrics in ACCEPTED.items():
            _, body = await site.get("/metrics", accept=accept)
            assert body.endswith("# EOF\n") == openmetrics, accept

    run(test, tmp_path)


def test_config_dump_holds_no_key(tmp_path: Path) -> None:
    async def test(site: Site) -> None:
        code, body = await site.get("/config_dump", unix=True)
        assert code == 200
        assert SECRET.decode() not in body
        dump = json.loads(body)["resources"]
        assert set(dump) == {"credential", "trust_bundle", "workload_policy"}
        assert dump["workload_policy"][0]["port_modes"] == {"80": "DISABLE"}
        assert len(dump["credential"][0]["chain_sha256"][0]) == 64

    run(test, tmp_path)


def configuration() -> Configuration:
    """Every document of the conformance table, and of other kinds, as the daemon serves them."""
    further = read(
        service("shop/pay", endpoints=[{"address": "10.0.0.1"}]), identities("shop/s", "td/x")
    )
    documents = [*conformance.workloads(), *further]
    for found in conformance.scenarios().values():
        for scenario in found:
            documents += conformance.load_policies(scenario).documents
    return Configuration(
        schema=CONFIGURATION_SCHEMA,
        source="/etc/x",
        pending="",
        problems=(),
        node="n",
        cluster="c",
        trust_domain="td",
        root_namespace="istio-system",
        locality="",
        node_addresses=("192.0.2.1",),
        node_plaintext=True,
        trusted=("td",),
        documents=Documents.of(documents),
    )


def test_the_documents_in_force_come_back_as_they_are(tmp_path: Path) -> None:
    async def test(site: Site) -> None:
        assert (await site.get("/configuration", unix=True))[0] == 503
        site.backend.documents = configuration()
        code, body = await site.get("/configuration", unix=True)
        assert code == 200
        found = msgspec.json.decode(body, type=Configuration)
        assert found == site.backend.documents
        kinds = {type(document) for document in found.documents.all()}
        assert kinds == set(typing.get_args(Document))
        assert all(document.origin.line for document in found.documents.all())

    run(test, tmp_path)


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example:15000", "", "localhost@x"]
)
def test_foreign_host_header_is_refused_on_loopback_only(tmp_path: Path, host: str) -> None:
    async def test(site: Site) -> None:
        code, _ = await site.get("/metrics", host=host)
        assert code in {400, 421}
        code, _ = await site.get("/metrics", host=host or "x", unix=True)
        assert code == 200

    run(test, tmp_path)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost:15000", "[::1]", "[::1]:15000"])
def test_own_host_headers_are_taken(tmp_path: Path, host: str) -> None:
    async def test(site: Site) -> None:
        assert (await site.get("/metrics", host=host))[0] == 200

    run(test, tmp_path)


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
def test_nothing_can_be_changed(tmp_path: Path, method: str) -> None:
    async def test(site: Site) -> None:
        assert (await site.get("/status", method=method))[0] == 405

    run(test, tmp_path)


def test_other_users_get_no_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "socket_owner", lambda *_: 65534)

    async def test(site: Site) -> None:
        assert (await site.get("/status"))[0] == 403
        assert (await site.get("/config_dump"))[0] == 403
        assert (await site.get("/configuration"))[0] == 403
        assert (await site.get("/flows"))[0] == 403
        assert (await site.get("/page"))[0] == 403
        assert (await site.get("/window"))[0] == 403
        assert (await site.get("/question"))[0] == 403
        assert (await site.get("/metrics"))[0] == 200
        assert (await site.get("/status", unix=True))[0] == 200

    run(test, tmp_path)


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_owner_of_a_connection_is_found(address: str) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with (
        socket.create_server((address, 0), family=family) as listening,
        socket.create_connection(listening.getsockname()[:2]) as client,
        listening.accept()[0] as accepted,
    ):
        owner = server.socket_owner(accepted.getpeername(), accepted.getsockname())
        assert owner == os.geteuid()
        assert client.fileno() >= 0
    assert server.socket_owner((address, 1), (address, 1)) is None


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"GET / HTTP/1.1\r\nX: " + b"a" * 9000, id="long header"),
        pytest.param(b"\0" * 100, id="zeros"),
        pytest.param(b"nonsense\r\n\r\n", id="words"),
    ],
)
def test_malformed_requests_end_the_connection(tmp_path: Path, data: bytes) -> None:
    async def test(site: Site) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", site.port)
        writer.write(data)
        answer = await reader.read()
        writer.close()
        await writer.wait_closed()
        assert answer == b"" or b" 400 " in answer.splitlines()[0]

    run(test, tmp_path)


def test_silent_connections_are_ended_and_limited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounded, "CONNECTION_SECONDS", 0.2)
    monkeypatch.setattr(bounded, "MAX_CONNECTIONS", 2)

    async def ended(site: Site) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", site.port)
        try:
            assert await reader.read() == b""
        except ConnectionResetError:
            pass
        finally:
            writer.close()

    async def test(site: Site) -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(5):
                group.create_task(ended(site))
        assert (await site.get("/healthz/live"))[0] == 200

    run(test, tmp_path)
