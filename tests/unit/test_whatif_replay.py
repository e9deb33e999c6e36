"""Recorded flows judged again by a change: who would break, who would be let in, who is unknown."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from nodeagent import whatif
from nodeagent.flows import SCHEMA, Recorded, Recording
from support.whatif import DOMAIN, ONLY_WEB, configuration, entry, mesh, policy, strict, web
from support.whatif import flow as recorded_flow

NOW = datetime(2026, 1, 2, 12, tzinfo=UTC)


def flow(**changes: Any) -> Recorded:  # noqa: ANN401 - fields of a flow
    first, last = NOW - timedelta(hours=2), NOW - timedelta(minutes=1)
    return recorded_flow(first, last, **({"connections": 3} | changes))


PLAIN = {"identity": "", "workload": "", "source": "10.9.9.9", "arrival": "plaintext"}


def recording(*flows: Recorded, **changes: Any) -> Recording:  # noqa: ANN401 - fields of it
    values: dict[str, Any] = {
        "schema": SCHEMA,
        "node": "n1",
        "time": NOW,
        "since": NOW - timedelta(hours=6),
        "oldest": NOW - timedelta(days=1),
        "flows": flows,
    }
    return Recording(**(values | changes))


def replayed(old: list[str], new: list[str], *flows: Recorded, **changes: Any) -> whatif.Replay:  # noqa: ANN401 - as above
    return whatif.replay(
        configuration(*old), configuration(*new), recording(*flows, **changes), "a test"
    )


def test_who_called_in_plaintext_would_break_under_strict() -> None:
    found = replayed(mesh(), [*mesh(), strict()], flow(), flow(**PLAIN, connections=7))
    (change,) = found.breaks
    assert (change.sources, change.destination, change.port) == (("10.9.9.9",), "shop/pay", 8080)
    assert (change.connections, change.new.reason) == (7, "strict_requires_mtls")
    assert change.new.origin.startswith("istio-system/strict (mesh.yaml:")
    assert found.admits == ()
    assert (found.flows, found.connections) == (2, 10)


def test_who_was_refused_and_would_be_let_in() -> None:
    refused = flow(**PLAIN, allowed=False, reason="strict_requires_mtls")
    found = replayed([*mesh(), strict()], mesh(), refused)
    assert [each.sources for each in found.admits] == [("10.9.9.9",)]
    assert found.breaks == ()


def test_many_addresses_of_one_kind_of_caller_are_one_entry() -> None:
    flows = [flow(**PLAIN | {"source": f"10.9.9.{n}"}, most_open=0) for n in range(1, 31)]
    (change,) = replayed(mesh(), [*mesh(), strict()], *flows).breaks
    assert (change.connections, change.source_count, len(change.sources)) == (90, 30, 5)


def test_a_flow_is_judged_from_its_address() -> None:
    deny = policy("[{from: [{source: {ipBlocks: [10.9.9.9]}}]}]", "DENY")
    found = replayed(mesh(), [*mesh(), deny], flow(**PLAIN), flow(**PLAIN | {"source": "10.9.9.8"}))
    assert [each.sources for each in found.breaks] == [("10.9.9.9",)]


def test_callers_not_known_one_by_one_may_break_where_something_changes() -> None:
    folded = {"identity": "", "source": "", "workload": "", "address": "", "port": 0}
    found = replayed(
        mesh(),
        [*mesh(), policy("[]")],
        flow(**folded, connections=5),
        flow(**folded, destination="shop/web", connections=9),
    )
    assert found.unknown == 5
    assert found.breaks == ()


def test_where_identities_change_any_of_them_may_be_one_that_does() -> None:
    folded = flow(identity="", source="", workload="", address="", port=0, connections=5)
    new = mesh(web=entry("shop/web", 2, account="renamed"))
    assert replayed(mesh(), mesh(), folded).unknown == 0
    assert replayed(mesh(), new, folded).unknown == 5


def test_what_cannot_be_judged_again_is_counted_by_why() -> None:
    found = replayed(
        mesh(),
        [*mesh(), strict()],
        flow(destination="other/gone"),
        flow(allowed=False, reason="authority_mismatch"),
        flow(allowed=False, reason="policy_denied"),
    )
    assert (found.elsewhere, found.unjudged, found.otherwise) == (1, 1, 1)


def test_a_caller_who_leaves_the_mesh_would_call_without_identity() -> None:
    out = entry("shop/web", 2, mesh=False)
    found = replayed([*mesh(), strict()], [*mesh(web=out), strict()], flow())
    (change,) = found.breaks
    assert (change.identity, change.new.reason) == (web(), "strict_requires_mtls")


def test_who_called_by_mutual_tls_would_break_under_disable_and_the_other_way_round() -> None:
    kept, clear = (
        [*mesh(), policy(ONLY_WEB)],
        [*mesh(), policy(ONLY_WEB), strict("shop", "DISABLE")],
    )
    (change,) = replayed(kept, clear, flow()).breaks
    assert (change.identity, change.new.reason) == (web(), "policy_denied")
    plain = flow(identity="", arrival="plaintext", allowed=False, reason="policy_denied")
    (change,) = replayed(clear, kept, plain).admits
    assert change.new.allowed
    # Of whom the mesh knows nothing it knows no identity either.
    assert not replayed(clear, kept, flow(**PLAIN, allowed=False, reason="policy_denied")).admits
    # Who proved an identity that is no workload's knows no mode: as another mesh's clients.
    stranger = flow(identity=web("probe", "ops"))
    assert not replayed(kept, clear, stranger).breaks


def test_a_caller_who_gets_another_identity_is_judged_by_it() -> None:
    rules = '[{from: [{source: {principals: ["cluster.local/ns/shop/sa/web"]}}]}]'
    new = [*mesh(web=entry("shop/web", 2, account="renamed")), policy(rules)]
    assert replayed([*mesh(), policy(rules)], new, flow()).breaks
    # Who had shown another identity from there keeps it.
    stays = flow(identity=web("probe", "ops"))
    assert not replayed([*mesh(), policy("[{}]")], new, flow()).admits
    assert replayed([*mesh(), policy("[{}]")], new, stays).breaks


def test_a_called_workload_with_another_address_is_the_same_workload() -> None:
    moved = mesh(pay=entry("shop/pay", 77))
    assert not replayed(mesh(), moved, flow()).breaks


def test_a_called_workload_that_goes_is_judged_by_nobody() -> None:
    refused = flow(**PLAIN, allowed=False, reason="strict_requires_mtls")
    found = replayed([*mesh(), strict()], [*mesh(pay=""), strict()], flow(), refused)
    assert found.breaks == ()
    assert [each.new.judged for each in found.admits] == [False]


def test_what_got_in_says_which_trust_domains_were_trusted() -> None:
    found = whatif.domains(
        recording(
            flow(),
            flow(identity="spiffe://partner.example/a"),
            flow(identity="spiffe://evil.example/a", allowed=False, reason="policy_denied"),
            flow(**PLAIN),
        )
    )
    assert found == {DOMAIN, "partner.example"}
