"""Traffic between our tunnel and Envoy, in both roles, with certificates verified on both sides."""

from __future__ import annotations

import json
import secrets
import socket
import threading
from pathlib import Path

import pytest

from support import application
from support.envoy import Envoy
from support.interop import CLOSED_PORT, Interop, spiffe

pytestmark = pytest.mark.usefixtures("envoy")

BOTH_WAYS = [("envoy", "ours"), ("ours", "envoy")]
LARGE = 32 * 1024 * 1024
MANY = 250
"""Connections open at once: more than the 200 streams that our server takes on one connection."""

ways = pytest.mark.parametrize("client,server", BOTH_WAYS)
families = pytest.mark.parametrize("family", [4, 6])


def direction(client: str) -> str:
    """Where our side, `ours`, stands."""
    return "outbound" if client == "ours" else "inbound"


@families
@ways
def test_a_request_passes_under_both_identities(
    mesh: Interop, envoy: Envoy, client: str, server: str, family: int
) -> None:
    body = secrets.token_hex(2000)
    done = mesh.curl(client, f"-{family}", "--data-binary", body, mesh.url(server))
    assert (done.returncode, done.stdout) == (0, body), done.stderr
    line = mesh.logged(direction=direction(client), src_identity=spiffe(client))
    assert line["dst.identity"] == spiffe(server)
    assert line["connection_security_policy"] == "mutual_tls"
    assert line["reason"] == "closed"


def test_both_sides_have_verified_certificates_in_the_newest_tls(
    mesh: Interop, envoy: Envoy
) -> None:
    for client, server in BOTH_WAYS:
        done = mesh.curl(client, "--data", "x", mesh.url(server))
        assert done.returncode == 0, done.stderr
    stats = envoy.stats()
    for side in ("listener.inbound.ssl", "cluster.hbone.ssl"):
        assert stats[f"{side}.handshake"] > 0
        for what in ("versions.TLSv1.3", "curves.X25519MLKEM768", "ciphers.TLS_AES_128_GCM_SHA256"):
            assert stats[f"{side}.{what}"] == stats[f"{side}.handshake"], what
        failures = {name: stats.get(f"{side}.{name}", 0) for name in FAILURES}
        assert failures == dict.fromkeys(FAILURES, 0)
        assert stats.get(f"{side}.session_reused", 0) == 0


FAILURES = ["fail_verify_no_cert", "fail_verify_error", "fail_verify_san", "connection_error"]


@ways
def test_a_large_body_comes_back_whole(
    mesh: Interop, tmp_path: Path, client: str, server: str
) -> None:
    sent, received = tmp_path / "sent", tmp_path / "received"
    sent.write_bytes(secrets.token_bytes(LARGE))
    done = mesh.curl(
        client, "--data-binary", f"@{sent}", "-o", str(received), "-H", "Expect:", mesh.url(server)
    )
    assert done.returncode == 0, done.stderr
    assert received.read_bytes() == sent.read_bytes()


@ways
def test_large_streams_pass_both_ways_at_once(mesh: Interop, client: str, server: str) -> None:
    data = secrets.token_bytes(LARGE)
    sock = mesh.call(client, server, application.ECHO_PORT)

    def send() -> None:
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)

    sender = threading.Thread(target=send)
    sender.start()
    received = b"".join(iter(lambda: sock.recv(1 << 20), b""))
    sender.join()
    assert received == data


@ways
def test_many_connections_share_few(mesh: Interop, envoy: Envoy, client: str, server: str) -> None:
    name = (
        "listener.inbound.downstream_cx_total"
        if client == "ours"
        else "cluster.hbone.upstream_cx_total"
    )
    before = envoy.stats()[name]
    socks = [mesh.call(client, server, application.ECHO_PORT) for _ in range(MANY)]
    for number, sock in enumerate(socks):
        sock.sendall(number.to_bytes(4))
    # All are open before the first is answered for; in the order opposite to the asking.
    for number, sock in reversed(list(enumerate(socks))):
        assert sock.recv(4, socket.MSG_WAITALL) == number.to_bytes(4)
    assert envoy.stats()[name] - before < MANY // 10


@families
@ways
def test_a_client_that_ends_its_side_is_still_answered(
    mesh: Interop, client: str, server: str, family: int
) -> None:
    data = secrets.token_bytes(100_000)
    sock = mesh.call(client, server, application.DIGEST_PORT, family)
    sock.sendall(data)
    sock.shutdown(socket.SHUT_WR)
    assert b"".join(iter(lambda: sock.recv(4096), b"")) == application.digest(data)


def test_a_server_that_ends_its_side_still_listens(mesh: Interop) -> None:
    data = secrets.token_bytes(LARGE // 8)
    sock = mesh.call("envoy", "ours", application.GREET_PORT)
    assert b"".join(iter(lambda: sock.recv(4096), b"")) == application.GREETING
    sock.sendall(data)
    sock.shutdown(socket.SHUT_WR)
    told = application.digest(data).decode()
    mesh.until(
        lambda: told in mesh.curl("envoy", mesh.url("ours", "received")).stdout,
        "the server has received everything",
    )


def test_the_end_of_envoys_application_is_an_end_and_no_reset(mesh: Interop) -> None:
    # Envoy as a server does not know a half-closed application (TcpUpstream::onUpstreamData): once
    # that has ended, Envoy sends END_STREAM and cuts the other direction by RST_STREAM(NO_ERROR).
    sock = mesh.call("ours", "envoy", application.GREET_PORT)
    assert b"".join(iter(lambda: sock.recv(4096), b"")) == application.GREETING
    assert mesh.logged(direction="outbound")["reason"] == "closed"


@families
@ways
def test_a_server_may_speak_first(mesh: Interop, client: str, server: str, family: int) -> None:
    mail = mesh.directory / "mail"
    mail.write_text("Subject: first light\r\n\r\nhello\r\n")
    done = mesh.curl(
        client,
        f"-{family}",
        "-v",
        *("--mail-from", "a@example.org", "--mail-rcpt", "b@example.org", "-T", str(mail)),
        f"smtp://{server}:{application.SMTP_PORT}",
    )
    assert done.returncode == 0, done.stderr
    assert "220 application" in done.stderr


def test_envoy_learns_that_our_application_refuses(mesh: Interop, envoy: Envoy) -> None:
    assert mesh.connect_status("envoy", "ours", CLOSED_PORT) == 503
    line = mesh.logged(direction="inbound", reason="connect_refused")
    assert line["src.identity"] == spiffe("envoy")
    sock = mesh.call("envoy", "ours", CLOSED_PORT)
    assert sock.recv(1) == b""


def test_we_learn_that_envoys_application_refuses(mesh: Interop) -> None:
    sock = mesh.call("ours", "envoy", CLOSED_PORT)
    with pytest.raises(ConnectionResetError):
        sock.recv(1)
    line = mesh.logged(direction="outbound", reason="unavailable_by_peer")
    assert "503" in json.dumps(line)
