"""The TLS contexts of HBONE, seen by real handshakes over memory, and the function table."""

from __future__ import annotations

import base64
import functools
import logging
import time
from collections.abc import Callable

import pytest
from cryptography.hazmat.bindings._rust import _openssl
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, x25519
from OpenSSL import SSL

from support.certificates import Identity, authority, workload
from ztunnel import tls

CLIENT = "spiffe://cluster.local/ns/default/sa/sleep"
SERVER = "spiffe://cluster.local/ns/default/sa/httpbin"
Adjust = Callable[[SSL.Context], None]
LIB, FFI = _openssl.lib, _openssl.ffi
BEGIN, END = time.time() - 3600, time.time() + 3600


@functools.cache
def root() -> Identity:
    return authority(not_before=BEGIN, not_after=END)


@functools.cache
def intermediate() -> Identity:
    return authority(issuer=root(), not_before=BEGIN, not_after=END)


def svid(uri: str, issuer: Identity | None = None, not_after: float = END) -> Identity:
    return workload(issuer or intermediate(), uri, not_before=BEGIN, not_after=not_after)


def contexts(
    identity: Identity, *, roots: tuple[Identity, ...] | None = None, alone: bool = False
) -> tls.Contexts:
    chain = [identity.der] if alone else [identity.der, intermediate().der]
    trusted = (root(),) if roots is None else roots
    return tls.build(chain, identity.key_der, [each.der for each in trusted])


def choose_h2(connection: SSL.Connection, offered: list[bytes]) -> bytes:
    assert offered == [b"h2"]
    return b"h2"


def server_side(made: tls.Contexts) -> SSL.Connection:
    if made.server._alpn_select_callback is None:
        made.server.set_alpn_select_callback(choose_h2)
    connection = SSL.Connection(made.server, None)
    connection.set_accept_state()
    return connection


def client_side(made: tls.Contexts) -> SSL.Connection:
    connection = SSL.Connection(made.client, None)
    connection.set_connect_state()
    return connection


def pump(source: SSL.Connection, sink: SSL.Connection) -> bytes:
    """Carry what `source` has to say to `sink`; return it."""
    carried = b""
    while True:
        try:
            data = source.bio_read(65536)
        except SSL.WantReadError:
            return carried
        carried += data
        sink.bio_write(data)


def step(connection: SSL.Connection) -> bool:
    try:
        connection.do_handshake()
    except SSL.WantReadError:
        return False
    return True


def handshake(client: SSL.Connection, server: SSL.Connection) -> list[bytes]:
    """Complete the handshake; return the flights of the client. Raises what either side raises."""
    flights: list[bytes] = []
    done = [False, False]
    while not all(done):
        done[0] = step(client)
        flight = pump(client, server)
        if flight:
            flights.append(flight)
        done[1] = step(server)
        if not pump(server, client) and not flight and not all(done):
            pytest.fail("the handshake has stopped")
    # In TLS 1.3 the client learns only now that the server refused it.
    with pytest.raises(SSL.WantReadError):
        client.recv(1)
    return flights


def connect(client: tls.Contexts, server: tls.Contexts) -> tuple[SSL.Connection, SSL.Connection]:
    ends = client_side(client), server_side(server)
    handshake(*ends)
    return ends


def test_both_sides_prove_themselves_with_tls_1_3_h2_and_the_hybrid_group() -> None:
    client_id, server_id = svid(CLIENT), svid(SERVER)
    client, server = connect(contexts(client_id), contexts(server_id))
    for end, peer in ((client, server_id), (server, client_id)):
        assert end.get_protocol_version_name() == "TLSv1.3"
        assert end.get_cipher_name() == "TLS_AES_128_GCM_SHA256"
        assert end.get_group_name() == "X25519MLKEM768"
        assert end.get_alpn_proto_negotiated() == b"h2"
        assert end.get_peer_certificate(as_cryptography=True) == peer.certificate
        chain = end.get_peer_cert_chain(as_cryptography=True)
        assert chain is not None
        assert intermediate().certificate in chain
        assert root().certificate not in chain
    client.send(b"ping")
    pump(client, server)
    assert server.recv(16) == b"ping"


def test_the_client_hello_says_what_it_should_and_no_more() -> None:
    client = client_side(contexts(svid(CLIENT)))
    assert not step(client)
    extensions = client_hello_extensions(client.bio_read(65536))
    assert 0 not in extensions, "server_name"
    assert 27 not in extensions, "compress_certificate"
    assert 35 not in extensions, "session_ticket"
    assert 41 not in extensions, "pre_shared_key"
    assert 42 not in extensions, "early_data"
    assert 49 not in extensions, "post_handshake_auth"
    assert extensions[16] == b"\0\3\2h2"
    assert extensions[43] == b"\2\3\4", "supported_versions: TLS 1.3 alone"
    assert extensions[10] == bytes.fromhex("0006 11ec 001d 0017"), "groups in order"
    shares = extensions[51][2:]
    assert shares[:2] == bytes.fromhex("11ec")
    length = int.from_bytes(shares[2:4], "big")
    assert shares[4 + length :][:2] == bytes.fromhex("001d")


def client_hello_extensions(record: bytes) -> dict[int, bytes]:
    """Return the extensions of the ClientHello in `record` (RFC 8446 4.1.2)."""
    at = 5 + 4 + 2 + 32
    at += 1 + record[at]
    at += 2 + int.from_bytes(record[at : at + 2], "big")
    at += 1 + record[at]
    end = at + 2 + int.from_bytes(record[at : at + 2], "big")
    at += 2
    found: dict[int, bytes] = {}
    while at < end:
        kind, length = (int.from_bytes(record[at + i : at + i + 2], "big") for i in (0, 2))
        found[kind] = record[at + 4 : at + 4 + length]
        at += 4 + length
    return found


# --- peers that are not ours ---------------------------------------------------------------------


def other_server(identity: Identity, adjust: Adjust) -> SSL.Connection:
    context = SSL.Context(SSL.TLS_SERVER_METHOD)
    return _other(context, identity, adjust, accept=True)


def other_client(identity: Identity | None, adjust: Adjust) -> SSL.Connection:
    context = SSL.Context(SSL.TLS_CLIENT_METHOD)
    context.set_alpn_protos([b"h2"])
    return _other(context, identity, adjust, accept=False)


def _other(
    context: SSL.Context,
    identity: Identity | None,
    adjust: Adjust,
    *,
    accept: bool,
) -> SSL.Connection:
    if identity is not None:
        context.use_certificate(identity.certificate)
        context.add_extra_chain_cert(intermediate().certificate)
        context.use_privatekey(identity.key)
    if accept:
        context.set_alpn_select_callback(choose_h2)
    adjust(context)
    connection = SSL.Connection(context, None)
    if accept:
        connection.set_accept_state()
    else:
        connection.set_connect_state()
    return connection


def groups(names: bytes) -> Adjust:
    return lambda context: LIB.SSL_CTX_set1_curves_list(context._context, names)


def suites(names: bytes) -> Adjust:
    return lambda context: context.set_tls13_ciphersuites(names)


def at_most_tls_1_2(context: SSL.Context) -> None:
    context.set_max_proto_version(SSL.TLS1_2_VERSION)


def unchanged(context: SSL.Context) -> None:
    assert context is not None


@pytest.mark.parametrize(
    "offered, flights, agreed",
    [
        (b"X25519", 2, "x25519"),
        (b"P-256", 3, "secp256r1"),
        (b"X25519MLKEM768", 2, "X25519MLKEM768"),
    ],
)
def test_peers_without_the_hybrid_group_are_served(
    offered: bytes, flights: int, agreed: str
) -> None:
    client, server = (
        client_side(contexts(svid(CLIENT))),
        other_server(svid(SERVER), groups(offered)),
    )
    assert len(handshake(client, server)) == flights
    assert client.get_group_name() == agreed
    client, server = (
        other_client(svid(CLIENT), groups(offered)),
        server_side(contexts(svid(SERVER))),
    )
    handshake(client, server)
    assert server.get_group_name() == agreed


def test_a_peer_that_lists_the_hybrid_group_is_asked_for_its_share() -> None:
    client = other_client(svid(CLIENT), groups(b"*X25519/X25519MLKEM768"))
    server = server_side(contexts(svid(SERVER)))
    assert len(handshake(client, server)) == 3
    assert server.get_group_name() == "X25519MLKEM768"


@pytest.mark.parametrize(
    "offered, agreed",
    [
        (b"TLS_AES_256_GCM_SHA384", "TLS_AES_256_GCM_SHA384"),
        (b"TLS_AES_256_GCM_SHA384:TLS_AES_128_GCM_SHA256", "TLS_AES_128_GCM_SHA256"),
    ],
)
def test_both_suites_of_hbone_are_spoken(offered: bytes, agreed: str) -> None:
    client, server = (
        other_client(svid(CLIENT), suites(offered)),
        server_side(contexts(svid(SERVER))),
    )
    handshake(client, server)
    assert server.get_cipher_name() == agreed


@pytest.mark.parametrize(
    "adjust", [suites(b"TLS_CHACHA20_POLY1305_SHA256"), at_most_tls_1_2, groups(b"P-384")]
)
def test_other_parameters_are_refused(adjust: Adjust) -> None:
    with pytest.raises(SSL.Error):
        handshake(other_client(svid(CLIENT), adjust), server_side(contexts(svid(SERVER))))
    with pytest.raises(SSL.Error):
        handshake(client_side(contexts(svid(CLIENT))), other_server(svid(SERVER), adjust))


def test_a_client_without_certificate_is_refused() -> None:
    with pytest.raises(SSL.Error, match="peer did not return a certificate"):
        handshake(other_client(None, unchanged), server_side(contexts(svid(SERVER))))


def test_a_foreign_certificate_is_refused_by_either_side() -> None:
    other = authority(subject="other", not_before=BEGIN, not_after=END)
    stranger = contexts(svid(CLIENT, other), alone=True)
    ours = contexts(svid(SERVER))
    with pytest.raises(SSL.Error, match="certificate verify failed"):
        connect(stranger, ours)
    with pytest.raises(SSL.Error, match="certificate verify failed"):
        connect(ours, stranger)


def test_an_expired_certificate_is_refused_by_either_side() -> None:
    expired = contexts(svid(CLIENT, not_after=time.time() - 1))
    ours = contexts(svid(SERVER))
    for ends in ((expired, ours), (ours, expired)):
        with pytest.raises(SSL.Error, match="certificate verify failed"):
            connect(*ends)


def test_without_roots_nobody_is_trusted() -> None:
    with pytest.raises(SSL.Error, match="certificate verify failed"):
        connect(contexts(svid(CLIENT)), contexts(svid(SERVER), roots=()))


def test_an_intermediate_in_the_bundle_is_an_anchor() -> None:
    trusting = contexts(svid(SERVER), roots=(intermediate(),))
    connect(contexts(svid(CLIENT)), trusting)


def test_two_domains_roots_are_both_gates() -> None:
    other = authority("other.example", not_before=BEGIN, not_after=END)
    client = svid("spiffe://other.example/ns/a/sa/b", other)
    made = tls.build([client.der], client.key_der, [root().der, other.der])
    connect(made, contexts(svid(SERVER), roots=(root(), other)))


def test_an_unusable_root_is_left_out() -> None:
    identity = svid(SERVER)
    made = tls.build(
        [identity.der, intermediate().der], identity.key_der, [b"garbage", identity.der, root().der]
    )
    connect(contexts(svid(CLIENT)), made)


# --- resumption ----------------------------------------------------------------------------------


def keep_sessions(context: SSL.Context) -> None:
    context.set_session_cache_mode(SSL.SESS_CACHE_BOTH)


def reused(connection: SSL.Connection) -> bool:
    return bool(LIB.SSL_session_reused(connection._ssl))


def test_our_server_never_resumes() -> None:
    made = contexts(svid(SERVER))
    identity = svid(CLIENT)
    first = other_client(identity, keep_sessions)
    handshake(first, server_side(made))
    session = first.get_session()
    assert session is not None
    second = SSL.Connection(first.get_context(), None)
    second.set_connect_state()
    second.set_session(session)
    server = server_side(made)
    handshake(second, server)
    assert not reused(second)
    assert not reused(server)
    assert server.get_peer_certificate(as_cryptography=True) == identity.certificate


def test_a_ticket_of_another_server_does_not_disturb() -> None:
    identity = svid(CLIENT)
    first = other_client(identity, keep_sessions)
    handshake(first, other_server(svid(SERVER), unchanged))
    session = first.get_session()
    assert session is not None
    second = SSL.Connection(first.get_context(), None)
    second.set_connect_state()
    second.set_session(session)
    server = server_side(contexts(svid(SERVER)))
    handshake(second, server)
    assert not reused(server)


def test_our_client_offers_no_session() -> None:
    made = contexts(svid(CLIENT))
    handshake(client_side(made), other_server(svid(SERVER), unchanged))
    again = client_side(made)
    assert not step(again)
    assert 41 not in client_hello_extensions(again.bio_read(65536))


# --- settings that a handshake does not show -----------------------------------------------------


def test_options_and_modes() -> None:
    made = contexts(svid(CLIENT))
    for context in (made.client, made.server):
        options = LIB.SSL_CTX_get_options(context._context)
        assert options & tls._OPTIONS == tls._OPTIONS
        assert not options & SSL.OP_IGNORE_UNEXPECTED_EOF
        modes = LIB.SSL_CTX_set_mode(context._context, 0)
        assert modes & LIB.SSL_MODE_RELEASE_BUFFERS
        assert not modes & LIB.SSL_MODE_AUTO_RETRY
        assert context.get_session_cache_mode() == SSL.SESS_CACHE_OFF
        assert context.get_verify_mode() == SSL.VERIFY_PEER | SSL.VERIFY_FAIL_IF_NO_PEER_CERT
        assert context.get_verify_depth() == 7


def test_no_python_runs_in_a_handshake() -> None:
    made = contexts(svid(CLIENT))
    for context in (made.client, made.server):
        assert context._verify_callback is None
        assert context._alpn_select_callback is None
        assert context._info_callback is None
        assert context._keylog_callback is None
        assert context._tlsext_servername_callback is None


def test_a_cut_connection_is_an_error_and_no_clean_end() -> None:
    client, _ = connect(contexts(svid(CLIENT)), contexts(svid(SERVER)))
    client.bio_shutdown()
    with pytest.raises(SSL.Error):
        client.recv(1)


# --- bad input -----------------------------------------------------------------------------------


def test_what_cannot_be_a_credential_is_refused_without_showing_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    good, other = svid(CLIENT), svid(SERVER)
    encrypted = good.key.private_bytes(
        serialization.Encoding.DER,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"x"),
    )
    unusable = x25519.X25519PrivateKey.generate().private_bytes(
        serialization.Encoding.DER,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    for chain, key, words in [
        ([], good.key_der, "no certificate"),
        ([b"garbage"], good.key_der, "no DER"),
        ([good.der] * 9, good.key_der, "limit"),
        ([good.der], other.key_der, "refuses"),
        ([good.der], good.key_der[:-3], "PKCS#8"),
        ([good.der], b"", "PKCS#8"),
        ([good.der], encrypted, "PKCS#8"),
        ([good.der], unusable, "neither"),
    ]:
        with pytest.raises(tls.TlsError, match=words) as caught:
            tls.build(chain, key, [])
        assert caught.value.__cause__ is None
        assert_no_secret(repr(caught.value) + str(caught.value), [good, other])
    assert_no_secret(caplog.text, [good, other])


def test_nothing_made_here_shows_the_key() -> None:
    identity = svid(CLIENT)
    made = contexts(identity)
    assert_no_secret(f"{made!r} {made} {made.client!r} {made.server!r}", [identity])


def assert_no_secret(text: str, identities: list[Identity]) -> None:
    """Fail if `text` holds 8 bytes or more of a key in any usual spelling."""
    for identity in identities:
        assert isinstance(identity.key, ec.EllipticCurvePrivateKey)
        secret = identity.key.private_numbers().private_value.to_bytes(32, "big")
        for start in range(0, 25, 8):
            part = secret[start : start + 8]
            spellings = [part.hex(), repr(part)[2:-1], base64.b64encode(part[:6]).decode()]
            assert not any(spelling in text for spelling in spellings)


# --- function table ------------------------------------------------------------------------------

VERSION = {"OpenSSL_version_num": "unsigned long(*)()"}


def test_the_table_holds_addresses_that_can_be_called() -> None:
    table = tls.function_table({**VERSION, "SSL_read": "int(*)(SSL *, void *, int)"})
    assert set(table) == {"OpenSSL_version_num", "SSL_read"}
    assert all(address > 0 for address in table.values())
    call = FFI.cast("unsigned long(*)()", table["OpenSSL_version_num"])
    assert call() == LIB.OpenSSL_version_num()


def test_every_difference_is_named_with_both_declarations() -> None:
    with pytest.raises(tls.TlsError) as caught:
        tls.function_table(
            {
                **VERSION,
                "SSL_read": "long(*)(SSL *, void *, int)",
                "SSL_no_such": "int(*)(SSL *)",
                "SSL_ERROR_SSL": "int(*)(SSL *)",
            }
        )
    message = str(caught.value)
    assert "SSL_read: expected 'long(*)(SSL *, void *, int)'" in message
    assert "found 'int(*)(SSL *, void *, int)'" in message
    assert "SSL_no_such: expected 'int(*)(SSL *)', found nothing" in message
    assert "SSL_ERROR_SSL" in message
    assert "OpenSSL_version_num" not in message
    assert "OpenSSL 4" in message


def test_a_context_pointer_is_the_address_of_the_context() -> None:
    made = contexts(svid(CLIENT))
    pointer = tls.context_pointer(made.server)
    assert pointer == int(FFI.cast("uintptr_t", made.server._context)) > 0
    ssl = LIB.SSL_new(FFI.cast("SSL_CTX *", pointer))
    assert ssl != FFI.NULL
    LIB.SSL_free(ssl)
    assert tls.context_pointer(made.client) != pointer
