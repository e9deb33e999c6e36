"""Our two sides of port 15008 as the wire shows them: TLS asked by OpenSSL's own tool,
HTTP/2 by frames.

One version of TLS, one protocol above it, mutual authentication in every handshake, the hybrid key
exchange, and HBONE's limits of HTTP/2.
"""

from __future__ import annotations

import contextlib
import re
import select
import socket
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from cryptography.hazmat.bindings._rust import _openssl

from support import application
from support.envoy import issue
from support.hbone import ACK, Client, Gone, Kind, Server, Shown, StreamReset, Tls
from support.interop import Interop, spiffe
from support.netns import DEADLINE, wait_until

HBONE_PORT: Final = 15008
MIB: Final = 1024 * 1024

ENABLE_PUSH, MAX_CONCURRENT_STREAMS, INITIAL_WINDOW_SIZE, MAX_FRAME_SIZE = 2, 3, 4, 5
DEFAULT_WINDOW: Final = 65535
"""RFC 9113, 6.9.2: what a connection's window begins with."""
FIRST_WINDOW: Final = MIB // 4
"""A stream's own; it grows while its reader is quick (docs/architecture.md)."""
MOST_STREAMS: Final = 200

PROBE: Final = spiffe("probe")


# --- TLS, asked by openssl s_client --------------------------------------------------------------


@pytest.fixture
def credential(mesh: Interop, tmp_path: Path) -> list[str]:
    """The options by which s_client shows an SVID of the lab's CA."""
    chain, key = issue(mesh.lab, PROBE).write(tmp_path)
    return ["-cert", str(chain), "-cert_chain", str(chain), "-key", str(key)]


def s_client(mesh: Interop, *options: str, alpn: str = "h2") -> subprocess.CompletedProcess[str]:
    """Run s_client towards our server; it verifies the chain, and ends after the handshake."""
    argv = [
        *("openssl", "s_client", "-connect", f"{mesh.address('ours')}:{HBONE_PORT}"),
        *("-CAfile", str(mesh.lab.layout.ca / "root.pem"), "-verify_return_error"),
        *(["-alpn", alpn] if alpn else []),
        *options,
    ]
    # What follows the handshake is no text.
    return mesh.lab.run("probe", argv, input="", errors="replace", timeout=DEADLINE)


def test_openssl_verifies_us_and_gets_tls_1_3_with_h2(mesh: Interop, credential: list[str]) -> None:
    done = s_client(mesh, *credential, "-groups", "X25519")
    assert done.returncode == 0, done.stderr
    assert "Verify return code: 0 (ok)" in done.stdout
    assert "New, TLSv1.3, Cipher is TLS_AES_128_GCM_SHA256" in done.stdout
    assert "Server Temp Key: X25519," in done.stdout, "a peer without ML-KEM is served, too"
    assert "ALPN protocol: h2" in done.stdout
    # There is no other renegotiation: TLS 1.3 has none (RFC 8446, 4.1.2).
    assert "Secure Renegotiation IS NOT supported" in done.stdout
    assert "Compression: NONE" in done.stdout


@pytest.mark.parametrize(
    "options,alpn,alert,reason",
    [
        (["-tls1_2"], "h2", "protocol version", "tls_failed"),
        ([], "http/1.1", "no application protocol", "tls_wrong_alpn"),
        ([], "h2c", "no application protocol", "tls_wrong_alpn"),
        (
            ["-ciphersuites", "TLS_CHACHA20_POLY1305_SHA256"],
            "h2",
            "handshake failure",
            "tls_failed",
        ),
        (["-groups", "P-384"], "h2", "handshake failure", "tls_failed"),
    ],
    ids=["TLS 1.2", "HTTP/1.1", "h2c", "ChaCha", "P-384"],
)
def test_openssl_is_refused(
    mesh: Interop, credential: list[str], options: list[str], alpn: str, alert: str, reason: str
) -> None:
    done = s_client(mesh, *credential, *options, alpn=alpn)
    assert done.returncode == 1
    assert re.search(rf"alert {alert}:", done.stderr), done.stderr
    assert mesh.logged(direction="inbound", reason=reason)["error"]


def test_openssl_without_a_certificate_is_refused(mesh: Interop) -> None:
    done = s_client(mesh, "-ign_eof")
    assert "alert certificate required:" in done.stderr, done.stderr
    mesh.logged(direction="inbound", reason="certificate_missing")


def test_a_client_that_names_no_protocol_gets_none(mesh: Interop, credential: list[str]) -> None:
    done = s_client(mesh, *credential, "-ign_eof", alpn="")
    assert "No ALPN negotiated" in done.stdout
    assert "PRI" not in done.stdout
    mesh.logged(direction="inbound", reason="tls_wrong_alpn")


# --- by frames -----------------------------------------------------------------------------------


def shown(mesh: Interop) -> Shown:
    return Shown(leaf=mesh.leaf(PROBE), chain=[mesh.issuer().certificate])


def limits(side: Client | Server) -> tuple[dict[int, int], int]:
    """Return the other side's SETTINGS, and the connection's window that it grants."""
    settings: dict[int, int] | None = None
    window = DEFAULT_WINDOW
    while settings is None or window == DEFAULT_WINDOW:
        frame = side.step()
        if frame.kind == Kind.SETTINGS and not frame.flags & ACK:
            settings = dict(struct.iter_unpack("!HI", frame.payload))
        elif frame.kind == Kind.WINDOW_UPDATE and frame.stream == 0:
            window += int.from_bytes(frame.payload)
    return settings, window


@pytest.fixture
def asking(mesh: Interop) -> Client:
    return Client(mesh.call("probe", "ours", HBONE_PORT), shown(mesh).context())


@pytest.fixture
def serving(mesh: Interop) -> Iterator[Server]:
    """What our client says to a server, which answers nothing."""
    listener = mesh.listen("probe", HBONE_PORT)
    kept: list[socket.socket] = []

    def dialled() -> bool:
        # Who calls while the pool backs off from the server before this one is reset at once.
        with contextlib.suppress(ConnectionError):
            kept.append(mesh.call("ours", "probe", application.HTTP_PORT))
            return listener in select.select([listener, kept[-1]], [], [], DEADLINE)[0]
        return False

    # The connections are kept open: they are what our client dials for.
    wait_until(dialled, "our client dials")
    yield Server(mesh.accept(listener), shown(mesh).context(server=True))
    listener.close()


def test_our_server_grants_the_windows_of_hbone(asking: Client) -> None:
    settings, window = limits(asking)
    assert settings[INITIAL_WINDOW_SIZE] == FIRST_WINDOW
    assert settings[MAX_FRAME_SIZE] == MIB
    assert settings[MAX_CONCURRENT_STREAMS] == MOST_STREAMS
    assert window == 16 * MIB


def test_our_client_grants_the_windows_of_hbone(serving: Server) -> None:
    settings, window = limits(serving)
    assert settings[INITIAL_WINDOW_SIZE] == FIRST_WINDOW
    assert settings[MAX_FRAME_SIZE] == MIB
    assert settings[ENABLE_PUSH] == 0
    assert window == 16 * MIB


@pytest.mark.parametrize("side", ["asking", "serving"])
def test_both_our_sides_agree_on_the_hybrid_key_exchange(
    request: pytest.FixtureRequest, side: str
) -> None:
    peer: Client | Server = request.getfixturevalue(side)
    tls = peer.tls._tls
    assert tls.get_protocol_version_name() == "TLSv1.3"
    assert tls.get_group_name() == "X25519MLKEM768"
    assert tls.get_alpn_proto_negotiated() == b"h2"
    # As a server the test would be told a name.
    assert tls.get_servername() is None


def test_no_session_is_resumed(mesh: Interop) -> None:
    context = shown(mesh).context()
    first = Client(mesh.call("probe", "ours", HBONE_PORT), context)
    # Tickets, if any, come before the frames.
    limits(first)
    session = first.tls._tls.get_session()
    assert session is not None
    first.close()
    second = Tls(mesh.call("probe", "ours", HBONE_PORT), context)
    second._tls.set_session(session)
    second.handshake()
    assert not _openssl.lib.SSL_session_reused(second._tls._ssl)


def test_two_hundred_streams_are_served_and_no_more(mesh: Interop, asking: Client) -> None:
    echo = f"{mesh.address('ours')}:{application.ECHO_PORT}"
    streams = [asking.connect(echo) for _ in range(MOST_STREAMS)]
    assert {asking.status(stream) for stream in streams} == {200}
    with pytest.raises((StreamReset, Gone)):
        asking.status(asking.connect(echo))
