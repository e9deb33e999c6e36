"""What the core lists, joined with what is behind its numbers; and the pages of the answer."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest

from support.certificates import NOW
from support.fake_core import carried
from support.mesh_state import authorization, identity, ip, policy, source
from support.tunnel_rig import SLEEP, Rig, chain_of, server_shows
from ztunnel._core import Listed
from ztunnel.connection_messages import (
    Connection,
    ConnectionFilter,
    ConnectionPage,
    Direction,
    Security,
)
from ztunnel.corelike import Kind
from ztunnel.observe import connections
from ztunnel.observe.listing import Listing
from ztunnel.protocol import Action, Mode

STATES = ("deciding", "waiting", "connecting", "open")


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig()
    yield made
    made.close()


def listed(rig: Rig, kind: Kind, decision: int, **fields: Any) -> Listed:  # noqa: ANN401 - the record's
    values: dict[str, Any] = {
        "number": 64,
        "kind": kind,
        "pod": rig.pod,
        "decision": decision,
        "source": ip("10.1.0.1"),
        "destination": ip("10.2.0.1"),
        "started_us": int(rig.now * 1e6) - 3_000_000,
    }
    return carried(**(values | fields))


def joined(rig: Rig, one: Listed) -> Connection:
    joiner = connections.Joiner(rig.tunnel, 99, STATES, rig.wall - rig.now)
    return joiner.join(one)


def test_a_tunnel_has_both_identities_and_what_its_handshake_agreed_on(rig: Rig) -> None:
    rig.start()
    decision = rig.core.answers[rig.outbound("10.2.0.1")]
    number, _ = server_shows(rig, chain_of("httpbin"))
    found = joined(
        rig,
        listed(
            rig,
            Kind.OUTBOUND,
            decision,
            identity=number,
            upstream=ip("10.2.0.1"),
            upstream_port=15008,
            moved_us=int(rig.now * 1e6) - 1_000_000,
            tls_version="TLSv1.3",
            cipher="TLS_AES_128_GCM_SHA256",
            group="X25519MLKEM768",
        ),
    )
    assert found == Connection(
        id="99.64",
        pod=SLEEP.uid,
        direction=Direction.OUTBOUND,
        state="open",
        security=Security.MUTUAL_TLS,
        source="10.1.0.1:4000",
        source_workload="default/sleep",
        source_identity=identity("sleep"),
        destination="10.2.0.1:8080",
        destination_workload="default/httpbin",
        destination_identity=identity("httpbin"),
        service="",
        hbone="10.2.0.1:15008",
        tls_version="TLSv1.3",
        cipher="TLS_AES_128_GCM_SHA256",
        key_exchange="X25519MLKEM768",
        policy="",
        rule="",
        started=datetime.fromtimestamp(NOW - 3, UTC),
        moved=datetime.fromtimestamp(NOW - 1, UTC),
        received=10,
        sent=20,
    )


def test_what_comes_in_names_the_policy_that_let_it_in(rig: Rig) -> None:
    rig.start(authorization("default/all", Action.ALLOW, source()))
    number, _ = rig.prove(chain_of("someone-else"))
    decision = rig.core.answers[rig.inbound("10.2.0.1", number)]
    found = joined(
        rig,
        listed(
            rig,
            Kind.INBOUND_HBONE,
            decision,
            identity=number,
            source=ip("10.2.0.1"),
            destination=ip("10.1.0.1"),
        ),
    )
    assert (found.direction, found.security) == (Direction.INBOUND, Security.MUTUAL_TLS)
    # By its proof: the address is another workload's.
    assert (found.source_workload, found.source_identity) == ("", identity("someone-else"))
    assert found.policy == "default/all"
    assert found.rule == "default/all rules[0] (policy.yaml:1)"
    assert (found.destination, found.hbone) == ("10.1.0.1:8080", "10.1.0.1:15008")


def test_plaintext_has_no_identity_and_says_who_let_it_in(rig: Rig) -> None:
    rig.start()
    decision = rig.core.answers[rig.inbound("10.3.0.1")]
    one = listed(
        rig,
        Kind.INBOUND_PLAINTEXT,
        decision,
        source=ip("10.3.0.1"),
        destination=ip("10.1.0.1"),
        upstream=ip("10.1.0.1"),
        upstream_port=8080,
    )
    found = joined(rig, one)
    assert (found.security, found.source_identity) == (Security.PLAINTEXT, "")
    assert (found.source_workload, found.destination_workload) == ("default/legacy", SLEEP.uid)
    assert (found.policy, found.hbone) == ("istio-system/default", "")


@pytest.mark.parametrize(
    "way, security", [("10.3.0.1", Security.PLAINTEXT), ("1.2.3.4", Security.PASSTHROUGH)]
)
def test_what_goes_out_without_a_tunnel_says_so(rig: Rig, way: str, security: Security) -> None:
    rig.start()
    decision = rig.core.answers[rig.outbound(way)]
    one = listed(
        rig,
        Kind.OUTBOUND,
        decision,
        destination=ip(way),
        upstream=ip(way),
        upstream_port=8080,
    )
    found = joined(rig, one)
    assert (found.security, found.policy, found.destination) == (security, "", f"{way}:8080")


def test_what_waits_for_its_decision_is_told_by_its_addresses(rig: Rig) -> None:
    rig.start()
    found = joined(rig, listed(rig, Kind.OUTBOUND, 0, state=0))
    assert (found.state, found.security) == ("deciding", Security.UNDECIDED)
    assert (found.source_workload, found.destination_workload) == (SLEEP.uid, "default/httpbin")
    assert (found.source_identity, found.destination_identity) == ("", "")


def test_a_decision_or_pod_that_has_gone_meanwhile_is_no_error(rig: Rig) -> None:
    rig.start()
    found = joined(rig, listed(rig, Kind.INBOUND_HBONE, 4711, pod=4712, identity=4713))
    assert (found.pod, found.security, found.source_identity) == ("", Security.UNDECIDED, "")


# --- filters ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wanted, admitted",
    [
        ({}, True),
        ({"pod": SLEEP.uid}, True),
        ({"pod": "default/sle"}, False),
        ({"direction": "outbound"}, True),
        ({"direction": "inbound"}, False),
        ({"security": "mutual_tls"}, True),
        ({"security": "plaintext"}, False),
        ({"identity": identity("httpbin")}, True),
        ({"identity": "sa/httpbin"}, True),
        ({"identity": "sa/sleep", "direction": "outbound"}, True),
        ({"identity": "httpbin"}, True),
        ({"identity": "bin"}, False),
    ],
)
def test_filters(rig: Rig, wanted: dict[str, str], admitted: bool) -> None:
    rig.start()
    decision = rig.core.answers[rig.outbound("10.2.0.1")]
    found = joined(rig, listed(rig, Kind.OUTBOUND, decision))
    assert ConnectionFilter.read(wanted).admits(found) is admitted
    assert ConnectionFilter.read(ConnectionFilter.read(wanted).written()).admits(found) is admitted


@pytest.mark.parametrize(
    "wrong",
    [
        {"colour": "red"},
        {"limit": "-1"},
        {"limit": "many"},
        {"direction": "up"},
        {"security": "mtls"},
        {"identity": "a" * 3000},
    ],
)
def test_what_is_not_understood_is_refused(wrong: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"\S"):
        ConnectionFilter.read(wrong)


# --- pages ------------------------------------------------------------------------------------


def taken(rig: Rig, args: dict[str, str]) -> tuple[list[ConnectionPage], list[Connection]]:
    """Ask as nodeagent does, page after page."""

    async def ask() -> list[ConnectionPage]:
        listing = Listing(rig.core, rig.tunnel, STATES, lambda: rig.now, lambda: rig.wall)
        pages = [msgspec.json.decode(await listing.answer(args), type=ConnectionPage)]
        while len(pages) < pages[0].pages:
            where = {"snapshot": str(pages[0].snapshot), "page": str(len(pages))}
            pages.append(msgspec.json.decode(await listing.answer(where), type=ConnectionPage))
        with pytest.raises(KeyError):
            await listing.answer({"snapshot": str(pages[0].snapshot), "page": "1"})
        return pages

    pages = asyncio.run(ask())
    raw = [each for page in pages for each in page.connections]
    return pages, [msgspec.json.decode(each, type=Connection) for each in raw]


def carry(rig: Rig, count: int) -> None:
    rig.start()
    decision = rig.core.answers[rig.outbound("10.2.0.1")]
    rig.core.carried = [
        listed(rig, Kind.OUTBOUND, decision, number=number, started_us=number * 1_000_000)
        for number in range(1, count + 1)
    ]


def test_nothing_is_one_empty_page(rig: Rig) -> None:
    pages, found = taken(rig, {})
    assert (len(pages), pages[0].total, pages[0].missed, found) == (1, 0, 0, [])


def test_many_come_in_pages_the_newest_first_and_each_once(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "PAGE_BYTES", 100_000)
    carry(rig, 1000)
    rig.core.missed = 3
    pages, found = taken(rig, {})
    assert len(pages) > 3
    assert all(len(msgspec.json.encode(page.connections)) <= 100_000 for page in pages)
    assert {(page.total, page.missed) for page in pages} == {(1000, 3)}
    assert [each.id for each in found] == [
        f"{found[0].id.split('.')[0]}.{n}" for n in range(1000, 0, -1)
    ]


def test_a_limit_cuts_and_the_total_tells(rig: Rig) -> None:
    carry(rig, 20)
    pages, found = taken(rig, {"limit": "2"})
    assert [each.id.split(".")[1] for each in found] == ["20", "19"]
    assert pages[0].total == 20


def test_what_an_asker_left_behind_is_not_another_ones(rig: Rig) -> None:
    carry(rig, 300)
    rig.core.list_connections()
    rig.core.carried, left = [], rig.core.carried
    rig.core.carried = left[:50]
    # The first listing has 50 left; the next begins with none.
    pages, found = taken(rig, {})
    assert (len(pages), found) == (1, [])


@pytest.mark.parametrize(
    "args", [{"colour": "red"}, {"snapshot": "1"}, {"snapshot": "0", "page": "0"}]
)
def test_a_question_that_is_no_question_is_refused(rig: Rig, args: dict[str, str]) -> None:
    async def ask() -> None:
        listing = Listing(rig.core, rig.tunnel, STATES, lambda: rig.now, lambda: rig.wall)
        await listing.answer(args)

    with pytest.raises(KeyError):
        asyncio.run(ask())


def test_a_core_that_says_nothing_keeps_nobody_waiting(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ztunnel.observe.listing.CORE_SECONDS", 0.05)
    monkeypatch.setattr(rig.core, "listed", lambda _most: ([], False, 0))

    async def ask() -> None:
        listing = Listing(rig.core, rig.tunnel, STATES, lambda: rig.now, lambda: rig.wall)
        await listing.answer({})

    with pytest.raises(TimeoutError):
        asyncio.run(ask())


def test_strict_is_named_by_its_policy(rig: Rig) -> None:
    rig.start()
    strict = msgspec.structs.replace(policy(SLEEP.uid, Mode.STRICT), origin="default/strict (a:1)")
    rig.apply(strict)
    number, _ = rig.prove(chain_of("httpbin"))
    decision = rig.core.answers[rig.inbound("10.2.0.1", number)]
    found = joined(rig, listed(rig, Kind.INBOUND_HBONE, decision, identity=number))
    assert (found.policy, found.rule) == ("default/strict", "default/strict (a:1)")
