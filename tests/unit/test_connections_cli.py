"""`nodeagent connections`: pages of several ztunnels put together, rates, tables, forms."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from click.testing import CliRunner, Result

from nodeagent.cli import cli
from nodeagent.cli import connections as command
from nodeagent.cli.connections_view import Measured
from nodeagent.cli.reach import UnreachableError
from nodeagent.connections import SCHEMA, Asked, Carried, Connections
from nodeagent.control import QueryError
from ztunnel.protocol import (
    Connection,
    ConnectionFilter,
    ConnectionPage,
    Direction,
    Security,
)

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def connection(number: int, **changes: Any) -> Measured:  # noqa: ANN401 - its fields
    base = Measured(
        id=f"7.{number}",
        pod="shop/far",
        direction=Direction.INBOUND,
        state="open",
        security=Security.MUTUAL_TLS,
        source="10.0.0.1:40000",
        source_workload="shop/client",
        source_identity="spiffe://cluster.local/ns/shop/sa/client",
        destination="10.0.1.1:8080",
        destination_workload="shop/far",
        destination_identity="spiffe://cluster.local/ns/shop/sa/far",
        service="far.shop.svc.cluster.local",
        hbone="10.0.1.1:15008",
        tls_version="TLSv1.3",
        cipher="TLS_AES_128_GCM_SHA256",
        key_exchange="X25519MLKEM768",
        policy="shop/allow-client",
        rule="shop/allow-client rules[0] (mesh.d/a.yaml:3)",
        started=NOW - timedelta(seconds=number),
        moved=None,
        received=1000,
        sent=2_000_000,
    )
    return msgspec.structs.replace(base, **changes)


# --- pages ------------------------------------------------------------------------------------


class Ztunnel:
    """Answers as ztunnel does, two connections a page."""

    def __init__(self, *numbers: int, missed: int = 0, fails: bool = False) -> None:
        self.numbers = numbers
        self.missed = missed
        self.fails = fails
        self.asked: list[dict[str, str]] = []

    async def query(self, what: str, args: dict[str, str], seconds: float) -> bytes:
        assert (what, seconds) == ("connections", 3.0)
        self.asked.append(args)
        if self.fails:
            raise QueryError("ztunnel disconnected")
        raw = [msgspec.Raw(b'{"id":"%d"}' % number) for number in self.numbers]
        parts = [raw[at : at + 2] for at in range(0, len(raw), 2)] or [[]]
        page = int(args.get("page", "0"))
        return msgspec.json.encode(
            ConnectionPage(
                snapshot=5,
                pages=len(parts),
                time=NOW,
                total=len(raw),
                missed=self.missed,
                connections=parts[page],
            )
        )


def ids(found: Connections[msgspec.Raw]) -> list[int]:
    return [int(json.loads(bytes(each))["id"]) for each in found.connections]


def taken(ztunnels: list[Ztunnel], **wanted: Any) -> Connections[msgspec.Raw]:  # noqa: ANN401 - the filter's fields
    there: list[Asked] = list(ztunnels)
    return asyncio.run(Carried("n", lambda: there).take(ConnectionFilter(**wanted)))


def test_all_pages_of_every_ztunnel_are_asked_for() -> None:
    serving, draining = Ztunnel(1, 2, 3, 4, 5, missed=1), Ztunnel(6)
    found = taken([serving, draining], pod="shop/far")
    assert ids(found) == [1, 2, 3, 4, 5, 6]
    assert (found.total, found.missed, found.node) == (6, 1, "n")
    assert serving.asked == [
        {"pod": "shop/far", "limit": "0"},
        {"snapshot": "5", "page": "1"},
        {"snapshot": "5", "page": "2"},
    ]


def test_a_limit_holds_for_all_of_them_together() -> None:
    found = taken([Ztunnel(1, 2), Ztunnel(3, 4)], limit=3)
    assert (ids(found), found.total) == ([1, 2, 3], 4)


def test_one_that_ended_meanwhile_is_left_out_and_one_that_fails_is_not() -> None:
    serving, gone = Ztunnel(1), Ztunnel(2, fails=True)
    there: Iterator[list[Asked]] = iter([[serving, gone], [serving], [serving]])
    found = asyncio.run(Carried("n", lambda: next(there)).take(ConnectionFilter()))
    assert ids(found) == [1]
    with pytest.raises(QueryError, match="disconnected"):
        taken([serving, gone])


# --- the command ------------------------------------------------------------------------------


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[Connections[Measured]]:
    """What the agent answers, one after the other, the last one for ever; and no waiting."""
    answers: list[Connections[Measured]] = []

    def get(_directory: Path, resource: str, *_: object) -> Connections[Measured]:
        asked.append(resource)
        if not answers:
            raise UnreachableError("nodeagent does not run here", "start it")
        return answers.pop(0) if len(answers) > 1 else answers[0]

    asked.clear()
    monkeypatch.setattr(command, "get", get)
    monkeypatch.setattr("nodeagent.cli.connections.time.sleep", lambda _: None)
    return answers


asked: list[str] = []


def answer(*found: Measured, after: float = 0, total: int = 0, missed: int = 0) -> Any:  # noqa: ANN401 - a generic struct
    return Connections[Measured](
        schema=SCHEMA,
        time=NOW + timedelta(seconds=after),
        node="node-1",
        total=total or len(found),
        missed=missed,
        connections=list(found),
    )


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["connections", *arguments])


def test_the_table_has_80_columns_and_says_everything_that_matters(
    looks: list[Connections[Measured]],
) -> None:
    looks.append(answer(connection(1), connection(2)))
    looks.append(
        answer(
            connection(1, received=2000),
            connection(2, security=Security.PLAINTEXT, source_workload="", source_identity=""),
            connection(
                3, direction=Direction.OUTBOUND, state="connecting", policy="", key_exchange=""
            ),
            after=2,
        )
    )
    result = run()
    assert result.exit_code == 0
    assert result.stdout == TABLE
    assert max(map(len, result.stdout.splitlines())) <= 80


TABLE = """\
node-1: 3 connections: 2 mTLS, 1 plaintext

FROM         TO             HOW              POLICY           BYTES    RATE  AGE
shop/client  shop/far:8080  in, mTLS,        shop/allow-      2.0MB  500B/s   3s
                            X25519MLKEM768   client
10.0.0.1     shop/far:8080  in, plaintext,   shop/allow-      2.0MB    0B/s   4s
                            X25519MLKEM768   client
shop/client  shop/far:8080  out, mTLS,       <none>           2.0MB  <none>   5s
                            connecting
"""


def test_rates_are_over_the_time_between_the_looks(looks: list[Connections[Measured]]) -> None:
    looks.append(answer(connection(1)))
    looks.append(answer(connection(1, received=2000, sent=2_000_500), connection(2), after=2))
    document = json.loads(run("-o", "json").stdout)
    first, second = document["connections"]
    assert (first["received_per_second"], first["sent_per_second"]) == (500, 250)
    assert (second["received_per_second"], second["sent_per_second"]) == (None, None)
    assert (document["schema"], document["total"]) == (1, 2)


def test_one_look_has_no_rates(looks: list[Connections[Measured]]) -> None:
    looks.append(answer(connection(1)))
    document = yaml.safe_load(run("-o", "yaml", "--interval", "0").stdout)
    assert document["connections"][0]["sent_per_second"] is None
    assert len(asked) == 1


def test_json_is_what_the_agent_says_and_a_rate(looks: list[Connections[Measured]]) -> None:
    looks.append(answer(connection(1)))
    (found,) = json.loads(run("-o", "json").stdout)["connections"]
    assert found.keys() - {field.name for field in msgspec.structs.fields(Connection)} == {
        "received_per_second",
        "sent_per_second",
    }


def test_filters_go_to_the_agent(looks: list[Connections[Measured]]) -> None:
    looks.append(answer())
    result = run(
        *("--pod", "shop/far", "--direction", "inbound", "--security", "plaintext"),
        *("--identity", "sa/a b", "--limit", "7", "--interval", "0"),
    )
    assert (result.exit_code, result.stdout) == (0, "node-1: 0 connections\n")
    assert asked == [
        "/connections?pod=shop%2Ffar&direction=inbound&security=plaintext&identity=sa%2Fa+b&limit=7"
    ]


@pytest.mark.parametrize("order, first", [("age", "7.1"), ("rate", "7.3"), ("bytes", "7.2")])
def test_orders_and_a_limit_behind_them(
    looks: list[Connections[Measured]], order: str, first: str
) -> None:
    before = [connection(1), connection(2, sent=10**9), connection(3)]
    looks.append(answer(*before))
    looks.append(answer(*before[:2], connection(3, sent=3_000_000), after=1))
    result = run("--sort", order, "--limit", "1", "-o", "json")
    found = json.loads(result.stdout)
    assert [each["id"] for each in found["connections"]] == [first]
    assert ("limit=0" in asked[0]) is (order != "age")


def test_what_is_left_out_is_said(looks: list[Connections[Measured]]) -> None:
    looks.append(answer(connection(1), total=3, missed=4))
    said = run().stdout
    assert said.startswith("node-1: 3 connections, 1 shown: 1 mTLS\n4 more found no room")
    assert said.endswith("and 2 more: --limit 0 shows all\n")


def test_wide_has_everything_in_one_line_each(looks: list[Connections[Measured]]) -> None:
    looks.append(answer(connection(1), connection(2)))
    lines = run("-o", "wide").stdout.splitlines()
    assert len(lines) == 5
    for value in msgspec.to_builtins(connection(1)).values():
        assert value is None or str(value) in lines[3] or str(value).startswith("2026")


@pytest.mark.parametrize("form", ["table", "wide", "json", "yaml"])
def test_without_an_agent_the_exit_code_is_3(looks: list[Connections[Measured]], form: str) -> None:
    result = run("-o", form)
    assert (result.exit_code, result.stdout) == (3, "")
    assert "does not run here" in result.stderr


@pytest.mark.parametrize("wrong", [["--direction", "up"], ["--limit", "-1"], ["--interval", "61"]])
def test_wrong_usage_is_2(looks: list[Connections[Measured]], wrong: list[str]) -> None:
    assert run(*wrong).exit_code == 2
    assert asked == []


def test_a_hostile_name_cannot_steer_the_terminal(looks: list[Connections[Measured]]) -> None:
    looks.append(answer(connection(1, source_workload="shop/\x1b[2Jx", policy="a\nb")))
    for form in ("table", "wide"):
        said = run("-o", form).stdout
        assert "\x1b" not in said
        assert "a\nb" not in said
