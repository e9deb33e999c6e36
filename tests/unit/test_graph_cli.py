"""What `nodeagent graph` says: rows, words of padlocks, filters, exit codes, and the drawing."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest
import yaml
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from nodeagent.cli import cli
from nodeagent.cli import graph as command
from nodeagent.cli.ending import ExitCode
from nodeagent.cli.graph_view import _quoted, share
from nodeagent.observe.graph import padlock
from nodeagent.observe.graph_model import (
    NODE,
    OUTSIDE,
    SCHEMA,
    Connections,
    Edge,
    Graph,
    Kind,
    Reporter,
    Vertex,
)

NOW = datetime(2026, 3, 4, 5, 6, 7, tzinfo=UTC)
FORMS = ["table", "wide", "json", "yaml", "dot"]


def edge(source: str, destination: str, port: int = 8080, **fields: Any) -> Edge:  # noqa: ANN401 - of an edge
    connections = Connections(**fields.pop("connections", {}))
    defaults: dict[str, Any] = {
        "refused": 0,
        "failed": 0,
        "reasons": {},
        "bytes_sent": 1200,
        "bytes_received": 0,
        "policies": (),
        "first": NOW - timedelta(minutes=9),
        "last": NOW - timedelta(seconds=4),
        "reporter": Reporter.DESTINATION,
    }
    return Edge(
        source=source,
        destination=destination,
        port=port,
        connections=connections,
        padlock=padlock(connections),
        protected_share=connections.mutual_tls / connections.total if connections.total else None,
        **{**defaults, **fields},
    )


EDGES = (
    edge(
        "shop/frontend",
        "shop/sentences",
        connections={"mutual_tls": 996, "plaintext": 4},
        source_identity="spiffe://cluster.local/ns/shop/sa/frontend",
    ),
    edge("shop/sentences", "shop/adjectives", connections={"mutual_tls": 40}),
    edge(
        OUTSIDE,
        "shop/frontend",
        refused=3,
        reasons={"strict_requires_mtls": 3},
        addresses=("203.0.113.7", "203.0.113.8"),
    ),
    edge(NODE, "shop/frontend", 8081, connections={"plaintext": 12}),
    edge("shop/web", "shop/cache", 6379, connections={"direct": 2}, failed=1),
    edge("shop/web", OUTSIDE, 443, connections={"plaintext": 7}, addresses=("198.51.100.1",)),
)


def graph_of(*edges: Edge, **fields: Any) -> Graph:  # noqa: ANN401 - of a graph
    ends = dict.fromkeys(end for each in edges for end in (each.source, each.destination))
    vertices = tuple(
        Vertex(
            id=end,
            kind=Kind(end) if end in {NODE, OUTSIDE} else Kind.WORKLOAD,
            name=end.rpartition("/")[2],
            namespace=end.rpartition("/")[0],
            mode="STRICT" if end == "shop/frontend" else "",
        )
        for end in ends
    )
    base = Graph(
        schema=SCHEMA,
        time=NOW,
        node="node-1",
        window_seconds=3600,
        complete=True,
        vertices=vertices,
        edges=edges,
    )
    return msgspec.structs.replace(base, **fields)


class Asked:
    """Stands for the agent: remembers what it was asked."""

    def __init__(self, answer: Graph) -> None:
        self.answer = answer
        self.resource = ""

    def __call__(self, _directory: object, resource: str, *_: object) -> Graph:
        self.resource = resource
        return self.answer


def invoke(monkeypatch: pytest.MonkeyPatch, answer: Graph, *arguments: str) -> tuple[Result, Asked]:
    agent = Asked(answer)
    monkeypatch.setattr(command, "get", agent)
    return CliRunner().invoke(cli, ["graph", *arguments]), agent


TABLE = """\
6 edges in the last 1h; mutual TLS: 1 all, 1 some, 3 none, 1 no data

SOURCE          DESTINATION     PORT  PADLOCK       CONNS  REFUSED  FAILED  LAST
shop/web        outside          443  none              7        0       0    4s
                198.51.100.1
shop/sentences  shop/adjective  8080  all              40        0       0    4s
                s
shop/web        shop/cache      6379  none, direct      2        0       1    4s
outside         shop/frontend   8080  no data           0        3       0    4s
203.0.113.7
and others
node            shop/frontend   8081  none             12        0       0    4s
shop/frontend   shop/sentences  8080  some 99.6%     1000        0       0    4s

direct: between two pods of this node; both have proved who they are, and nothing is encrypted
"""


def test_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    result, _ = invoke(monkeypatch, graph_of(*EDGES))
    assert result.exit_code == ExitCode.FINE, result.output
    assert result.stdout == TABLE


def test_the_wide_table_has_the_rest_in_lines_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    result, _ = invoke(monkeypatch, graph_of(*EDGES), "-o", "wide")
    (row,) = [line for line in result.stdout.splitlines() if line.startswith("outside 203.")]
    assert "3 strict_requires_mtls" in row
    (row,) = [line for line in result.stdout.splitlines() if line.startswith("shop/frontend ")]
    assert "spiffe://cluster.local/ns/shop/sa/frontend" in row
    assert "1.2 kB" in row


@pytest.mark.parametrize("form", ["json", "yaml"])
def test_programs_get_the_graph_as_the_agent_has_it(
    monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    answer = graph_of(*EDGES)
    result, _ = invoke(monkeypatch, answer, "-o", form)
    read = json.loads(result.stdout) if form == "json" else yaml.safe_load(result.stdout)
    assert msgspec.convert(read, Graph, strict=False) == answer


def test_the_age_is_what_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    _, agent = invoke(monkeypatch, graph_of())
    assert agent.resource == "/graph?seconds=3600"
    _, agent = invoke(monkeypatch, graph_of(), "--since", "10m")
    assert agent.resource == "/graph?seconds=600"


@pytest.mark.parametrize(
    "arguments,count",
    [
        (["-n", "shop"], 6),
        (["-n", "sho"], 0),
        (["shop/frontend"], 3),
        (["shop/web", "node"], 3),
        (["*/adj*"], 1),
        (["--padlock", "none"], 3),
        (["--padlock", "no-data", "--padlock", "all"], 2),
        (["--padlock", "none", "shop/frontend"], 1),
    ],
)
def test_filters(monkeypatch: pytest.MonkeyPatch, arguments: list[str], count: int) -> None:
    result, _ = invoke(monkeypatch, graph_of(*EDGES), "-o", "json", *arguments)
    shown = msgspec.json.decode(result.stdout, type=Graph)
    assert len(shown.edges) == count
    ends = {end for each in shown.edges for end in (each.source, each.destination)}
    assert {vertex.id for vertex in shown.vertices} == ends
    result, _ = invoke(monkeypatch, graph_of(*EDGES), *arguments)
    if count < len(EDGES):
        assert f"({len(EDGES) - count} more not asked for)" in result.stdout


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "what,names,code",
    [
        ("plaintext", [], 1),
        ("plaintext", ["shop/adjectives"], 0),
        # What leaves the mesh is the application's own.
        ("plaintext", ["shop/web"], 0),
        ("unencrypted", ["shop/web"], 1),
        ("refused", ["shop/web"], 0),
        ("refused", [], 1),
        ("failed", ["shop/cache"], 1),
        ("failed", ["shop/frontend"], 0),
    ],
)
def test_what_to_fail_on(
    monkeypatch: pytest.MonkeyPatch, what: str, names: list[str], code: int, form: str
) -> None:
    result, _ = invoke(monkeypatch, graph_of(*EDGES), "--fail-on", what, "-o", form, *names)
    assert result.exit_code == code, result.output


@pytest.mark.parametrize(
    "names,nobody",
    [
        (["shop/frontent"], "shop/frontent"),
        (["shop/web", "*/nowhere"], "*/nowhere"),
        (["-n", "sho"], "sho"),
        (["node", "shop/web"], ""),
    ],
)
def test_a_name_that_is_nobodys_is_said_and_is_not_fine(
    monkeypatch: pytest.MonkeyPatch, names: list[str], nobody: str
) -> None:
    result, _ = invoke(monkeypatch, graph_of(*EDGES), "--fail-on", "refused", *names)
    assert result.exit_code == (ExitCode.FINDING if nobody else ExitCode.FINE)
    assert (f"{nobody} is no workload of this node" in result.stdout) == bool(nobody)
    result, _ = invoke(monkeypatch, graph_of(*EDGES), *names)
    assert result.exit_code == ExitCode.FINE


def test_nobody_from_outside_is_fine(monkeypatch: pytest.MonkeyPatch) -> None:
    result, _ = invoke(monkeypatch, graph_of(), "--fail-on", "plaintext", "outside", "node")
    assert result.exit_code == ExitCode.FINE
    assert "is no workload" not in result.stdout


@pytest.mark.parametrize(
    "fields", [{"complete": False}, {"truncated": True}, {"complete": False, "problem": "no room"}]
)
def test_what_was_not_recorded_is_not_known_to_be_fine(
    monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any]
) -> None:
    result, _ = invoke(monkeypatch, graph_of(**fields), "--fail-on", "plaintext")
    assert result.exit_code == ExitCode.FINDING
    assert "no room" in result.stdout or "not all" in result.stdout or "left out" in result.stdout
    result, _ = invoke(monkeypatch, graph_of(**fields))
    assert result.exit_code == ExitCode.FINE


@pytest.mark.parametrize(
    "part,whole,text",
    [
        (7, 7, "100%"),
        (996, 1000, "99.6%"),
        (10**9 - 1, 10**9, "99.9%"),
        (1, 2, "50%"),
        (1, 10**9, "<0.1%"),
        (1, 1000, "0.1%"),
        (0, 3, "0%"),
    ],
)
def test_a_share_is_never_rounded_to_all(part: int, whole: int, text: str) -> None:
    assert share(part, whole) == text


@given(st.integers(1, 10**12), st.integers(1, 10**12))
def test_some_is_neither_all_nor_nothing(locked: int, other: int) -> None:
    assert share(locked, locked + other) not in {"100%", "0%"}


def test_an_unfriendly_name_does_nothing_to_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    bad = edge("spiffe://x/\x1b[2J\u202e", "shop/web", connections={"mutual_tls": 1})
    for form in ("table", "wide", "dot"):
        result, _ = invoke(monkeypatch, graph_of(bad), "-o", form)
        assert "\x1b" not in result.stdout
        assert "\u202e" not in result.stdout


# --- the drawing ----------------------------------------------------------------------------------


def test_the_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    result, _ = invoke(monkeypatch, graph_of(*EDGES), "-o", "dot")
    lines = result.stdout.splitlines()
    assert (lines[0], lines[-1]) == ("digraph mesh {", "}")
    assert '    label="shop";' in lines
    assert '    "shop/frontend" [label="frontend (STRICT)"];' in lines
    assert '  "outside" [label="outside"];' in lines
    (line,) = [line for line in lines if '"shop/frontend" -> "shop/sentences"' in line]
    assert 'label="8080: some 99.6%", style=dashed' in line
    (line,) = [line for line in lines if '"outside" -> "shop/frontend"' in line]
    assert 'label="8080: no data, 3 refused", style=dotted' in line


def test_what_is_quoted_ends_where_it_ends() -> None:
    assert _quoted('a"b\\') == '"a\\"b\\\\"'
    # "\N" in a label would be the node's name.
    assert _quoted("\\N") == '"\\\\N"'


def test_one_picture_is_not_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    result, _ = invoke(monkeypatch, graph_of(), "-o", "dot", "--watch")
    assert result.exit_code == ExitCode.USAGE
