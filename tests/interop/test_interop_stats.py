"""/stats beside a real Envoy's: the same names, the same words, the same answers to what is asked.

Envoy runs on loopback with one listener, called by the name that a sidecar's has, which inspects
what comes and speaks mutual TLS.
"""

from __future__ import annotations

import contextlib
import json
import re
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from support.certificates import authority, workload
from support.envoy import Credential, binary
from support.netns import wait_until
from ztunnel.observe.arrivals import Arrived
from ztunnel.observe.envoy_stats import QueryError, Stat, parse, render, statistics
from ztunnel.protocol import Arrival

LISTENER: Final = "listener.0.0.0.0_15006"

OURS: Final = frozenset(
    {
        # Envoy has it only once there has been such a connection.
        f"{LISTENER}.ssl.versions.TLSv1.3",
        # Of Envoy before 1.25, and of the text that people follow.
        "tls_inspector.connection_closed",
        "tls_inspector.read_error",
    }
)

CONFIG: Final = """
admin: {address: {socket_address: {address: 127.0.0.1, port_value: 0}}}
static_resources:
  listeners:
  - name: inbound
    stat_prefix: 0.0.0.0_15006
    address: {socket_address: {address: 127.0.0.1, port_value: 0}}
    listener_filters:
    - name: tls_inspector
      typed_config:
        "@type": TYPES.filters.listener.tls_inspector.v3.TlsInspector
    filter_chains:
    - filter_chain_match: {transport_protocol: tls}
      transport_socket:
        name: tls
        typed_config:
          "@type": TYPES.transport_sockets.tls.v3.DownstreamTlsContext
          require_client_certificate: true
          common_tls_context:
            tls_certificates:
            - {certificate_chain: {filename: CHAIN}, private_key: {filename: KEY}}
            validation_context: {trusted_ca: {filename: ROOT}}
      filters: &filters
      - name: echo
        typed_config: {"@type": TYPES.filters.network.echo.v3.Echo}
    - filter_chain_match: {transport_protocol: raw_buffer}
      filters: *filters
"""


class Peer:
    """A running Envoy: its admin port, and the port of its listener."""

    def __init__(self, admin: str) -> None:
        self._admin = admin
        found = json.loads(self.get("/listeners?format=json")[1])
        at = found["listener_statuses"][0]["local_address"]["socket_address"]
        self.listener = (str(at["address"]), int(at["port_value"]))

    def get(self, path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://{self._admin}{path}", timeout=20) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def stats(self, query: str = "") -> dict[str, int]:
        lines = self.get(f"/stats?{query}")[1].splitlines()
        pairs = (line.rpartition(": ") for line in lines)
        return {name: int(value) for name, _, value in pairs if value.isdecimal()}


@pytest.fixture(scope="module")
def envoy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Peer]:
    directory: Path = tmp_path_factory.mktemp("envoy")
    now = time.time()
    root = authority(not_before=now - 60, not_after=now + 3600)
    leaf = workload(root, not_before=now - 60, not_after=now + 3600)
    chain, key = Credential.of(leaf).write(directory)
    (directory / "root.pem").write_bytes(Credential.of(root).chain)
    config = directory / "envoy.yaml"
    config.write_text(
        CONFIG.replace("TYPES", "type.googleapis.com/envoy.extensions")
        .replace("CHAIN", str(chain))
        .replace("KEY", str(key))
        .replace("ROOT", str(directory / "root.pem"))
    )
    admin = directory / "admin"
    argv = [str(binary()), "--disable-hot-restart", "--concurrency", "1", "-l", "warn"]
    with (directory / "log").open("wb") as log:
        program = subprocess.Popen(
            [*argv, "--admin-address-path", str(admin), "-c", str(config)], stdout=log, stderr=log
        )
    try:
        wait_until(lambda: admin.exists() and admin.read_text(), "Envoy's admin port is known")
        yield Peer(admin.read_text().strip())
    finally:
        program.kill()
        program.wait()


def ours(arrived: Arrived | None = None) -> dict[str, int]:
    """Return our own of the listener for plaintext, and the inspector's."""
    return {
        stat.name: stat.value
        for stat in statistics(arrived or Arrived(), 0)
        if stat.name.startswith((f"{LISTENER}.", "tls_inspector."))
    }


def test_every_name_is_one_of_envoys(envoy: Peer) -> None:
    assert ours().keys() - envoy.stats().keys() == OURS


def test_names_are_in_its_order(envoy: Peer) -> None:
    shared = [name for name in envoy.stats() if name in ours()]
    assert shared == [name for name in ours() if name not in OURS]


def test_a_connection_in_plaintext_counts_alike(envoy: Peer) -> None:
    before = envoy.stats()
    with socket.create_connection(envoy.listener, timeout=20) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert sock.recv(3) == b"GET"

    def grown() -> dict[str, int]:
        after = envoy.stats()
        return {name: after[name] - before[name] for name in ours() if name not in OURS}

    arrived = Arrived()
    arrived.opened[Arrival.PLAINTEXT] = arrived.closed[Arrival.PLAINTEXT] = 1
    wanted = {name: value for name, value in ours(arrived).items() if name not in OURS}
    with contextlib.suppress(AssertionError):
        wait_until(lambda: grown() == wanted, "the connection's end is counted")
    assert grown() == wanted


QUERIES: Final = [
    "filter=tls_inspector",
    "filter=%5Etls_inspector.*found%24",
    "filter=(tls_(not_)?found%7Cssl.handshake)%24",
    "filter=nothing.of.the.kind",
    "filter=tls_inspector&usedonly",
    "filter=tls_inspector&type=Counters",
    "filter=tls_inspector&type=Gauges",
]


@pytest.mark.parametrize("query", QUERIES)
def test_a_query_is_answered_alike(envoy: Peer, query: str) -> None:
    theirs = envoy.stats()
    mine = [
        Stat(name, theirs[name], gauge="active" in name, used=bool(theirs[name]))
        for name in ours()
        if name not in OURS
    ]

    def known(text: str) -> list[str]:
        return [line for line in text.splitlines() if line.rpartition(": ")[0] in ours()]

    status, text = envoy.get(f"/stats?{query}")
    assert status == 200
    assert render(parse(query), mine).decode().splitlines() == known(text)


def test_json_has_its_shape(envoy: Peer) -> None:
    query = "filter=tls_inspector&format=json"
    theirs: dict[str, Any] = json.loads(envoy.get(f"/stats?{query}")[1])
    # Of lengths and times, which are not counted here.
    theirs["stats"] = [each for each in theirs["stats"] if "histograms" not in each]
    mine = json.loads(render(parse(query), [Stat(*each) for each in envoy.stats().items()]))
    assert mine == theirs


def test_what_is_no_filter_is_refused_with_its_status_and_words(envoy: Peer) -> None:
    status, said = envoy.get("/stats?filter=(")
    assert status == 400
    with pytest.raises(QueryError, match=re.escape(said.rpartition(": ")[2].strip())):
        parse("filter=(")
    assert envoy.get("/stats?format=nothing")[0] == 400
