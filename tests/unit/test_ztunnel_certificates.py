from __future__ import annotations

from collections.abc import Iterator

import pytest

from support.certificates import NOW
from support.certificates import workload as leaf
from support.mesh_state import bundle, identity, workload
from support.tunnel_rig import (
    FOREIGN_ROOT,
    MESH,
    OTHER_ROOT,
    POD,
    ROOT,
    Rig,
    chain_of,
    credential,
    server_shows,
)
from ztunnel.protocol import (
    Removal,
    TrustBundle,
)
from ztunnel.reasons import Reason


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig()
    yield made
    made.close()


# --- certificates --------------------------------------------------------------------------------


def test_a_rotation_sets_the_new_contexts_and_touches_nothing_else(rig: Rig) -> None:
    rig.start()
    number = rig.pod
    before = dict(rig.core.credentials)
    assert rig.apply(credential(serial=b"2")) == ""
    assert rig.pod == number
    assert rig.core.credentials.keys() == before.keys()
    assert rig.core.credentials != before
    assert not rig.core.killed


def test_contexts_are_built_once_for_the_same_credential(rig: Rig) -> None:
    rig.start()
    assert rig.apply(*MESH, POD, reset=True) == ""
    assert len(rig.built) == 1


def test_new_roots_build_the_contexts_anew(rig: Rig) -> None:
    rig.start()
    rig.apply(bundle(ROOT.der, OTHER_ROOT.der))
    assert len(rig.built) == 2


@pytest.mark.parametrize("how", ["withdrawn", "replaced"])
def test_an_identity_taken_away_is_never_shown_again(rig: Rig, how: str) -> None:
    rig.start()
    number = rig.pod
    if how == "withdrawn":
        rig.apply(removals=(Removal("credential", identity("sleep")),))
    else:
        rig.apply(workload("sleep", "10.1.0.1", account="other"), credential("other"))
    assert rig.pod != number
    assert number not in rig.core.pods
    held = rig.tunnel.pods.get(POD.uid)
    assert held is not None
    assert held.identity == ("" if how == "withdrawn" else identity("other"))


def test_a_verified_chain_has_one_number_and_is_verified_once(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.start()
    chain = chain_of("httpbin")
    number, reason = rig.prove(chain)
    assert number > 0
    assert reason is Reason.CLOSED
    monkeypatch.setattr("ztunnel.svid.validate", None)
    assert rig.prove(chain) == (number, reason)


@pytest.mark.parametrize(
    "chain, reason",
    [
        ((), Reason.CERT_MISSING),
        ((b"garbage",), Reason.CERT_INVALID),
        (chain_of("x", not_after=NOW - 5), Reason.CERT_EXPIRED),
        (chain_of("x", not_before=NOW + 60), Reason.CERT_NOT_YET_VALID),
        (chain_of("x", OTHER_ROOT), Reason.CERT_UNTRUSTED),
        ((leaf(FOREIGN_ROOT, "spiffe://elsewhere.test/x").der,), Reason.TRUST_DOMAIN),
        (chain_of("x", is_ca=True), Reason.CERT_INVALID),
    ],
    ids=["none", "garbage", "expired", "early", "other root", "foreign domain", "a CA"],
)
def test_a_wrong_certificate_is_refused_with_its_reason(
    rig: Rig, chain: tuple[bytes, ...], reason: Reason
) -> None:
    rig.start()
    assert rig.prove(chain) == (0, reason)


def test_a_server_must_be_the_workload_that_lives_there(rig: Rig) -> None:
    rig.start()
    rig.outbound("10.2.0.1")
    assert server_shows(rig, chain_of("httpbin"))[0] > 0
    assert server_shows(rig, chain_of("sleep")) == (0, Reason.IDENTITY_MISMATCH)


def test_withdrawn_roots_cut_peers_servers_and_decisions(rig: Rig) -> None:
    rig.start()
    rig.outbound("10.2.0.1")
    server_shows(rig, chain_of("httpbin"))
    caller = chain_of("caller")
    number, _ = rig.prove(caller)
    decision = rig.core.answers[rig.inbound("10.9.0.1", number)]
    rig.apply(bundle(OTHER_ROOT.der))
    assert rig.core.killed_identities[number] is Reason.TRUST_WITHDRAWN
    assert set(rig.core.closed_peers) == set(rig.core.peers)
    # The same number proves nothing any more, and the chain is not accepted anew.
    refused = rig.core.answer_to(rig.inbound("10.9.0.1", number))
    assert refused.arguments == (Reason.TRUST_WITHDRAWN,)
    assert rig.prove(caller) == (0, Reason.CERT_UNTRUSTED)
    assert decision in rig.core.decisions


def test_a_trust_domain_withdrawn_cuts_its_connections(rig: Rig) -> None:
    rig.start(TrustBundle("elsewhere.test", (FOREIGN_ROOT.der,)))
    number, _ = rig.prove((leaf(FOREIGN_ROOT, "spiffe://elsewhere.test/ns/a/sa/b").der,))
    decision = rig.core.answers[rig.inbound("10.9.0.1", number)]
    rig.apply(removals=(Removal("trust_bundle", "elsewhere.test"),))
    assert rig.core.killed_identities[number] is Reason.TRUST_WITHDRAWN
    assert rig.core.killed[decision] is Reason.TRUST_WITHDRAWN


def test_added_roots_cut_nothing(rig: Rig) -> None:
    rig.start()
    number, _ = rig.prove(chain_of("caller"))
    rig.inbound("10.9.0.1", number)
    rig.apply(bundle(ROOT.der, OTHER_ROOT.der))
    assert not rig.core.killed_identities
    assert not rig.core.killed
    assert rig.core.answer_to(rig.inbound("10.9.0.1", number)).action == "deliver"


def test_an_expired_identity_opens_nothing_new_but_keeps_what_it_has(rig: Rig) -> None:
    rig.start()
    number, _ = rig.prove(chain_of("caller", not_after=NOW + 100))
    rig.inbound("10.9.0.1", number)
    epoch = rig.core.epoch
    rig.wall += 101
    rig.tunnel.tick()
    # The core's table must ask again.
    assert rig.core.epoch > epoch
    assert not rig.core.killed_identities
    refused = rig.core.answer_to(rig.inbound("10.9.0.1", number))
    assert refused.arguments == (Reason.CERT_EXPIRED,)


def test_after_the_end_of_a_servers_certificate_it_must_show_another(rig: Rig) -> None:
    rig.start()
    decision = rig.core.answers[rig.outbound("10.2.0.1")]
    server_shows(rig, chain_of("httpbin", not_after=NOW + 100))
    (old,) = rig.core.peers
    rig.wall += 101
    rig.tunnel.tick()
    new = rig.core.answer_to(rig.outbound("10.2.0.1")).arguments[0]
    assert new != old
    # Open streams live on, and can still be cut.
    assert not rig.core.closed_peers
    assert not rig.core.killed
    assert old in rig.core.peers
    rig.apply(bundle(OTHER_ROOT.der))
    assert rig.core.closed_peers == {old: Reason.TRUST_WITHDRAWN}
    rig.core.free(decision)
    rig.tunnel.pump()
    assert set(rig.core.peers) == {new}


def test_a_servers_newer_certificate_keeps_its_pool(rig: Rig) -> None:
    rig.start()
    first = rig.core.answer_to(rig.outbound("10.2.0.1")).arguments[0]
    server_shows(rig, chain_of("httpbin", not_after=NOW + 1000))
    rig.wall += 101
    rig.tunnel.tick()
    assert rig.core.answer_to(rig.outbound("10.2.0.1")).arguments[0] == first


def test_an_identity_number_that_is_not_ours_is_refused(rig: Rig) -> None:
    rig.start()
    assert rig.core.answer_to(rig.inbound("10.9.0.1", 424242)).action == "refuse"
