"""What a line says of a refused certificate: whose, until when, and by which clock."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import pytest
from OpenSSL import SSL

from support.certificates import NOW, authority, workload
from support.fake_core import record
from support.mesh_state import identity, ip
from support.tunnel_rig import HTTPBIN, ROOT, Rig, chain_of, credential
from ztunnel import tls
from ztunnel._core import Failed
from ztunnel.corelike import Kind
from ztunnel.observe import causes
from ztunnel.observe.causes import Refused, facts, moment
from ztunnel.reasons import Reason
from ztunnel.state import Identity

OWN = Identity("spiffe://cluster.local/ns/default/sa/sleep", NOW - 600, NOW + 3000, b"")
PEER = "spiffe://cluster.local/ns/default/sa/httpbin"
ALERT = "ssl/tls alert certificate expired"


def refused(reason: Reason, **fields: Any) -> str:  # noqa: ANN401 - its fields
    values: dict[str, Any] = {
        "detail": "",
        "now": float(NOW),
        "own": OWN,
        "whose": "",
        "ended": None,
    }
    return facts(Refused(reason, **(values | fields)))


def test_an_expired_certificate_has_a_name_and_a_date() -> None:
    said = refused(
        Reason.CERT_EXPIRED, detail="certificate has expired", whose=PEER, ended=NOW - 60.0
    )
    assert said == (
        f"certificate has expired; the mesh expects {PEER} there; the last certificate that was "
        f"taken of it here ended {moment(NOW - 60)}; this node's clock: {moment(NOW)}"
    )


def test_what_is_not_known_is_not_said() -> None:
    assert refused(Reason.CERT_EXPIRED) == f"this node's clock: {moment(NOW)}"
    assert refused(Reason.TLS_FAILED, detail="wrong version number", whose=PEER) == (
        "wrong version number"
    )
    assert refused(Reason.TLS_ALERT, own=None, detail=ALERT) == ALERT
    assert refused(Reason.TLS_TIMEOUT) == ""


def test_a_clock_that_is_behind_the_ca_is_said_with_the_numbers() -> None:
    said = refused(Reason.CERT_NOT_YET_VALID, now=NOW - 900.0)
    assert said == (
        f"this node's clock: {moment(NOW - 900)}; which is at least 300 s behind the CA's"
    )


def test_our_own_expired_certificate_is_named_where_the_peer_refuses_it() -> None:
    said = refused(Reason.TLS_ALERT, detail=ALERT, now=NOW + 3010.0)
    assert f"we showed {OWN.uid}, valid {moment(NOW - 600)} to {moment(NOW + 3000)}" in said
    assert said.endswith("it expired 10 s ago, and its renewal is failing here")


def test_a_peer_that_finds_it_expired_while_it_is_not_has_another_clock() -> None:
    said = refused(Reason.TLS_ALERT, detail=ALERT)
    assert said.endswith(
        f"this node's clock: {moment(NOW)}; the peer's clock is at least 3000 s ahead"
    )
    assert "ahead" not in refused(Reason.TLS_ALERT, detail="ssl/tls alert unknown ca")


def test_openssl_has_these_words_for_the_alert() -> None:
    now = time.time()
    root = authority(not_before=now - 7200, not_after=now + 7200)
    leaf = workload(root, not_before=now - 7200, not_after=now - 3600)
    client = tls.build((leaf.der,), leaf.key_der, (root.der,)).client
    fresh = workload(root, not_before=now - 60, not_after=now + 3600)
    context = tls.build((fresh.der,), fresh.key_der, (root.der,)).server
    context.set_alpn_select_callback(lambda _connection, _offered: b"h2")
    ours, theirs = SSL.Connection(client), SSL.Connection(context)
    ours.set_connect_state()
    theirs.set_accept_state()
    said = ""
    for _ in range(8):
        for side, other in ((ours, theirs), (theirs, ours)):
            try:
                side.do_handshake()
                side.recv(1)
            except SSL.WantReadError:
                pass
            except SSL.Error as error:
                said += f"{side is ours}: {error}\n"
            with contextlib.suppress(SSL.WantReadError):
                other.bio_write(side.bio_read(65536))
    assert "False: [('SSL routines', '', 'certificate verify failed')]" in said
    assert f"{causes._EXPIRED_ALERT}')]" in said.partition("True: ")[2]


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig()
    made.start()
    yield made
    made.close()


def failed(rig: Rig, kind: Kind, reason: Reason, detail: str) -> str:
    number = list(Reason).index(reason)
    rig.core.report(record(Failed, kind, rig.pod, 0, ip("10.2.0.1"), 15008, number, detail))
    rig.tunnel.pump()
    return rig.lines[-1].error


def test_the_line_names_who_should_be_there_and_when_its_last_certificate_ended(rig: Rig) -> None:
    rig.prove(chain_of("httpbin", not_after=NOW + 100))
    rig.prove(chain_of("httpbin", not_after=NOW + 50))
    rig.wall += 200
    said = failed(rig, Kind.PEER_CERTIFICATE, Reason.CERT_EXPIRED, "certificate has expired")
    assert said.startswith("the peer's certificate has expired: its renewal is failing (")
    assert f"the mesh expects {HTTPBIN.identity} there" in said
    assert f"ended {moment(NOW + 100)}; this node's clock: {moment(NOW + 200)})" in said


def test_the_line_has_our_own_certificate_where_the_peer_refuses_it(rig: Rig) -> None:
    said = failed(rig, Kind.SERVER_CERTIFICATE, Reason.TLS_ALERT, ALERT)
    assert f"we showed {credential().uid}, valid {moment(0)} to {moment(NOW + 3600)}" in said
    assert said.endswith("the peer's clock is at least 3600 s ahead)")


def test_a_chain_that_is_judged_here_has_its_own_name_and_date(rig: Rig) -> None:
    leaf = workload(ROOT, identity("httpbin"), not_before=NOW - 100, not_after=NOW - 10)
    assert rig.prove((leaf.der,))[1] is Reason.CERT_EXPIRED
    said = failed(rig, Kind.PEER_CERTIFICATE, Reason.CERT_EXPIRED, "")
    assert f"{HTTPBIN.identity} expired 10 s ago, at " in said
