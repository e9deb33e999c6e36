"""What an Envoy is told whose certificate or request is wrong, and what our side says of it."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from support.certificates import authority
from support.e2e import peer_authentication
from support.envoy import Credential, Envoy, issue
from support.interop import Interop, spiffe
from support.netns import wait_until

STRANGER = spiffe("stranger")


def foreign_root(mesh: Interop, identity: str = STRANGER) -> Credential:
    now = time.time()
    root = authority(
        identity.split("/")[2], subject="foreign", not_before=now - 60, not_after=now + 3600
    )
    return Credential.of(mesh.leaf(identity, root))


def expired(mesh: Interop) -> Credential:
    issuer = mesh.issuer()
    leaf = mesh.leaf(STRANGER, not_before=time.time() - 7200, not_after=time.time() - 3600)
    return Credential.of(leaf, issuer.certificate)


def other_domain(mesh: Interop) -> Credential:
    """Signed by our CA, which may not sign for that domain."""
    leaf = mesh.leaf(spiffe("stranger", "elsewhere.example"))
    return Credential.of(leaf, mesh.issuer().certificate)


def other_identity(mesh: Interop) -> Credential:
    return issue(mesh.lab, spiffe("somebody-else"))


Make = Callable[[Interop], Credential]
WRONG: list[tuple[Make, str]] = [
    (foreign_root, "certificate_untrusted"),
    (
        lambda mesh: foreign_root(mesh, spiffe("stranger", "elsewhere.example")),
        "certificate_untrusted",
    ),
    (expired, "certificate_expired"),
    (other_domain, "trust_domain_mismatch"),
]
NAMES = ["foreign root", "foreign domain and root", "expired", "foreign domain, our root"]


@pytest.mark.parametrize("make,reason", WRONG, ids=NAMES)
def test_we_refuse_a_client_with_a_wrong_certificate(
    mesh: Interop, make: Make, reason: str
) -> None:
    with mesh.envoy("stranger", make(mesh)) as stranger:
        done = mesh.curl("stranger", "--data", "x", mesh.url("ours"))
        assert done.returncode in {52, 56}, done.stderr
        line = mesh.logged(direction="inbound", reason=reason)
        assert line["src.workload"] == "stranger"
        assert line["error"]
        assert "src.identity" not in line
        assert stranger.count("cluster.hbone.upstream_rq_200") == 0


def refused(mesh: Interop, client: str, server: str, seen: Callable[[], float]) -> None:
    """Call until the peer has been dialled; each call is refused.

    After a dial that failed, as in the case before, our tunnel dials nobody for a moment and
    refuses at once: the reset may be there before curl has looked at what came of its connect(),
    which it then calls a failure to connect (7).
    """

    def once() -> bool:
        done = mesh.curl(client, "--data", "secret", mesh.url(server))
        assert (done.returncode in {7, 52, 56}, done.stdout) == (True, ""), done.stderr
        return seen() > 0

    wait_until(once, f"{server} is dialled")


@pytest.mark.parametrize(
    "make,reason",
    [*WRONG, (other_identity, "identity_mismatch")],
    ids=[*NAMES, "another workload's"],
)
def test_we_refuse_a_server_with_a_wrong_certificate(
    mesh: Interop, make: Make, reason: str
) -> None:
    with mesh.envoy("stranger", make(mesh)) as stranger:
        refused(
            mesh,
            "ours",
            "stranger",
            lambda: stranger.count("listener.inbound.downstream_cx_total"),
        )
        line = mesh.logged(direction="outbound", reason=reason)
        assert line["dst.workload"] == "stranger"
        assert line["error"]
        # Not one request has reached it.
        assert stranger.count("http.inbound.downstream_rq_total") == 0


@pytest.mark.parametrize("side", ["client", "server"])
def test_envoy_refuses_us_when_it_expects_another(mesh: Interop, side: str) -> None:
    """Envoy's own verification is in force: it is what makes the traffic tests mean something."""
    own = issue(mesh.lab, STRANGER)
    callers = {"client": ("ours", "stranger"), "server": ("stranger", "ours")}
    client, server = callers[side]
    with mesh.envoy("stranger", own, **{side: spiffe("somebody-else")}) as stranger:
        prefix = "listener.inbound" if side == "client" else "cluster.hbone"
        refused(mesh, client, server, lambda: stranger.count(f"{prefix}.ssl.fail_verify_san"))
    direction = "outbound" if client == "ours" else "inbound"
    mesh.logged(direction=direction, level="error", reason="tls_alert")


def test_strict_takes_envoys_mutual_tls_and_no_plaintext(mesh: Interop, envoy: Envoy) -> None:
    mesh.apply(peer_authentication("STRICT", name="strict", namespace="interop"))
    mesh.until(
        lambda: mesh.curl("probe", "--data", "x", mesh.url("ours")).returncode == 56,
        "plaintext is refused",
    )
    mesh.logged(direction="inbound", reason="strict_requires_mtls")
    for client, server in (("envoy", "ours"), ("ours", "envoy")):
        done = mesh.curl(client, "--data", "sent", mesh.url(server))
        assert (done.returncode, done.stdout) == (0, "sent"), done.stderr
    mesh.logged(direction="inbound", src_identity=spiffe("envoy"), reason="closed")


def test_another_pods_address_is_a_bad_request(mesh: Interop, envoy: Envoy) -> None:
    assert mesh.connect_status("envoy", "other", 8080) == 400
    line = mesh.logged(direction="inbound", reason="authority_mismatch")
    assert line["src.identity"] == spiffe("envoy")
    assert mesh.connect_status("envoy", "ours", 8080) == 200


def test_a_failed_handshake_is_counted(mesh: Interop) -> None:
    def count() -> float:
        return mesh.counted("ztunnel_tls_handshake_failures_total", reason="certificate_expired")

    before = count()
    with mesh.envoy("stranger", expired(mesh)):
        mesh.curl("stranger", "--data", "x", mesh.url("ours"))
    mesh.until(lambda: count() > before, "the refused handshake is counted")
