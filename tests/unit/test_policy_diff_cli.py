"""`nodeagent policy diff`: what it says, of which input, and the exit code."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner, Result

from nodeagent import api
from nodeagent.admin import Configuration
from nodeagent.admin.configuration import CONFIGURATION_SCHEMA, Documents
from nodeagent.cli import cli
from nodeagent.flows import SCHEMA, FlowStore, Recording, recording
from nodeagent.settings.flows import Keep
from support.admin import Answers, beside
from ztunnel.protocol import Arrival, Flow, FlowKey, Flows

MESH = """\
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {name: web, namespace: shop, annotations: {nodeagent.io/netns: web}}
spec: {address: 10.1.0.2, serviceAccount: web}
---
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {name: pay, namespace: shop, annotations: {nodeagent.io/netns: pay}}
spec: {address: 10.1.0.3, serviceAccount: pay}
"""
STRICT = """\
---
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: default, namespace: shop}
spec: {mtls: {mode: STRICT}}
"""
CLOSED = """\
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: closed, namespace: shop}
spec: {}
"""
PLAIN = FlowKey("", "10.9.9.9", "", Arrival.PLAINTEXT, "shop/pay", "10.1.0.3", 8080, allowed=True)
WEB = FlowKey(
    "spiffe://cluster.local/ns/shop/sa/web",
    "10.1.0.2",
    "shop/web",
    Arrival.HBONE,
    "shop/pay",
    "10.1.0.3",
    8080,
    allowed=True,
)


def diff(*arguments: str, given: str = "") -> Result:
    return CliRunner().invoke(cli, ["policy", "diff", *arguments], input=given)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names of files are short, and so are lines."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def old(tmp_path: Path) -> str:
    return write(tmp_path, "old.yaml", MESH)


@pytest.fixture
def new(tmp_path: Path) -> str:
    return write(tmp_path, "new.yaml", MESH + STRICT)


def write(folder: Path, name: str, text: str) -> str:
    (folder / name).write_text(text)
    return name


def store(tmp_path: Path, *keys: FlowKey, ago: int = 60, name: str = "flows.db") -> str:
    """Record three connections of each, so many seconds ago."""
    at = int(time.time()) - ago
    kept = FlowStore(tmp_path / name, Keep())
    flows = tuple(Flow(key, at, at, 3, 0, 10, 20) for key in keys)
    kept.add(1, Flows(flows, 1, at, at))
    kept.close()
    return name


# --- without recorded flows ---------------------------------------------------------------------


def test_what_would_be_refused(old: str, new: str) -> None:
    result = diff(old, new)
    assert (result.exit_code, result.stderr) == (1, "")
    assert result.stdout == (
        "WOULD REFUSE 1 kind of calls that are let in now\n"
        "  OLD  old.yaml\n"
        "  NEW  new.yaml\n"
        "\n"
        "Mutual TLS modes that change:\n"
        "  shop/pay, shop/web: PERMISSIVE -> STRICT, by shop/default (new.yaml:11)\n"
        "\n"
        "Calls that would be refused, and are let in now:\n"
        "  shop/pay, shop/web, ports all\n"
        "    from a caller without identity\n"
        "    strict_requires_mtls: shop/default (new.yaml:11); was let in by default\n"
    )


def test_what_would_be_let_in_is_no_finding(old: str, new: str) -> None:
    result = diff(new, old)
    assert result.exit_code == 0
    assert result.stdout.startswith("NOTHING that is let in now would be refused\n")
    assert "Calls that would be let in, and are refused now:" in result.stdout


def test_no_difference(old: str) -> None:
    result = diff(old, "-", given=MESH)
    assert (result.exit_code, result.stdout) == (
        0,
        "NO DIFFERENCE in who is let in\n  OLD  old.yaml\n  NEW  standard input\n",
    )


def test_json_has_a_schema_and_the_same_exit_code(old: str, new: str) -> None:
    for arguments, code in (((old, new), 1), ((new, old), 0), ((old, old), 0)):
        result = diff(*arguments, "-o", "json")
        assert result.exit_code == code
        found = json.loads(result.stdout)
        assert (found["schema"], found["breaks"], found["flows"]) == (1, bool(code), None)


def test_lines_have_80_columns(tmp_path: Path) -> None:
    many = "".join(
        f"---\n{MESH.partition('---')[0].replace('name: web', f'name: web-{n}')}".replace(
            "10.1.0.2", f"10.2.{n // 200}.{n % 200}"
        ).replace("netns: web", f"netns: web-{n}")
        for n in range(300)
    )
    before = write(tmp_path, "b.yaml", MESH + many)
    after = write(tmp_path, "a.yaml", MESH + many + STRICT + CLOSED)
    result = diff(before, after)
    assert result.exit_code == 1
    assert [line for line in result.stdout.splitlines() if len(line) > 80] == []
    assert "and 298 more" in result.stdout


# --- recorded flows -----------------------------------------------------------------------------


def test_recorded_callers_that_would_break(tmp_path: Path, old: str, new: str) -> None:
    result = diff(old, new, "--flows-db", store(tmp_path, PLAIN, WEB))
    assert (result.exit_code, result.stderr) == (1, "")
    assert result.stdout.startswith("WOULD BREAK: 1 recorded caller, 3 connections\n")
    assert "Recorded calls of the last 1d (flows.db): 2 flows, 6 connections\n" in result.stdout
    assert "  nothing older than " in result.stdout
    assert "Would break:\n  10.9.9.9 (plaintext) -> shop/pay:8080\n" in result.stdout
    assert "strict_requires_mtls: shop/default (new.yaml:11); was let in" in " ".join(
        result.stdout.split()
    )


def test_recorded_flows_alone_decide_when_they_are_asked_for(
    tmp_path: Path, old: str, new: str
) -> None:
    result = diff(old, new, "--flows-db", store(tmp_path, WEB))
    assert result.exit_code == 0
    assert result.stdout.startswith("NOTHING BREAKS of what was recorded: 1 flow, 3 connections\n")
    assert "Calls that would be refused, and are let in now:" in result.stdout


def test_what_is_older_than_asked_for_is_left_out(tmp_path: Path, old: str, new: str) -> None:
    file = store(tmp_path, PLAIN, ago=3 * 3600)
    assert diff(old, new, "--flows-db", file, "--since", "6h").exit_code == 1
    result = diff(old, new, "--flows-db", file, "--since", "90m")
    assert result.exit_code == 0
    assert "0 flows, 0 connections" in result.stdout


def test_callers_not_known_one_by_one_may_break(tmp_path: Path, old: str, new: str) -> None:
    result = diff(old, new, "--flows-db", store(tmp_path, WEB, PLAIN.folded()))
    assert result.exit_code == 1
    assert result.stdout.startswith("MAY BREAK: some recorded callers are not known one by one\n")
    assert "  3 connections not recorded one by one: may break\n" in result.stdout


def test_json_of_recorded_flows(tmp_path: Path, old: str, new: str) -> None:
    result = diff(old, new, "--flows-db", store(tmp_path, PLAIN, WEB), "-o", "json")
    assert result.exit_code == 1
    (change,) = json.loads(result.stdout)["flows"]["breaks"]
    assert (change["sources"], change["connections"]) == (["10.9.9.9"], 3)
    assert change["new"] == {
        "allowed": False,
        "reason": "strict_requires_mtls",
        "origin": f"shop/default ({new}:11)",
        "judged": True,
    }


def test_a_trusted_domain_is_one_whose_identities_got_in(tmp_path: Path, old: str) -> None:
    partner = msgspec.structs.replace(
        WEB, identity="spiffe://partner.example/api", source="10.8.8.8", workload=""
    )
    file = store(tmp_path, partner)
    assert diff(old, old, "--flows-db", file).exit_code == 0
    closed = write(tmp_path, "closed.yaml", MESH + CLOSED)
    result = diff(old, closed, "--flows-db", file)
    assert result.exit_code == 1
    assert "spiffe://partner.example/api (10.8.8.8, mutual TLS) -> shop/pay:8080" in result.stdout


# --- input that is no good ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments,said",
    [
        (("OLD",), "1 path: name OLD and NEW"),
        (("OLD", "NEW", "NEW"), "3 paths"),
        (("--running", "OLD", "NEW"), "name NEW only"),
        (("-", "-"), "not both"),
        (("OLD", "NEW", "--flows", "--flows-db", "x"), "exclude each other"),
        (("OLD", "NEW", "--run-dir", "/run"), "--run-dir is for"),
        (("OLD", "NEW", "--since", "6"), "is no age"),
        (("OLD", "NEW", "--since", "0h"), "is no age"),
        (("OLD", "NEW", "--since", "٣h"), "is no age"),
        (("OLD", "NEW", "--since", "1h;ls"), "is no age"),
        (("OLD", "nowhere.yaml"), "nowhere.yaml: cannot be read"),
        (("OLD", "EMPTY"), "holds no file"),
        (("OLD", "NEW", "--flows-db", "nowhere.db"), "nowhere.db: no such file"),
        (("OLD", "NEW", "--flows-db", "OLD"), "old.yaml: is damaged"),
        (("OLD", "NEW", "--settings", "nowhere"), "nowhere: cannot be read"),
    ],
)
def test_wrong_usage(
    tmp_path: Path, old: str, new: str, arguments: tuple[str, ...], said: str
) -> None:
    (tmp_path / "empty").mkdir()
    names = {"OLD": old, "NEW": new, "EMPTY": str(tmp_path / "empty")}
    result = diff(*(names.get(each, each) for each in arguments))
    assert (result.exit_code, result.stdout) == (2, "")
    assert said in result.stderr


@pytest.mark.parametrize(
    "text,said",
    [
        ("a: [", "not YAML"),
        (MESH.replace("spec: {address: 10.1.0.3", "spec: {adress: 10.1.0.3"), "unknown field"),
        (MESH + "---\n" + MESH, "already taken"),
        ("#" * (2 << 20), "split the file"),
        ("\x00", "not allowed"),
    ],
)
@pytest.mark.parametrize("side", [0, 1])
def test_a_configuration_with_errors_is_not_compared(
    old: str, text: str, said: str, side: int
) -> None:
    arguments = [old, old]
    arguments[side] = "-"
    result = diff(*arguments, given=text)
    assert (result.exit_code, result.stdout) == (2, "")
    assert said in result.stderr


def test_a_part_of_a_configuration_is_not_taken_for_all_of_it(old: str, tmp_path: Path) -> None:
    for name, text in (("part.yaml", STRICT), ("empty.yaml", "# nothing\n")):
        result = diff(old, write(tmp_path, name, text))
        assert (result.exit_code, result.stdout) == (2, "")
        assert f"{name} has none of OLD's 2 workloads" in result.stderr
        assert "--add" in result.stderr


def test_an_empty_configuration_is_one(tmp_path: Path) -> None:
    empty = write(tmp_path, "empty.yaml", "# nothing\n")
    assert diff(empty, empty).exit_code == 0


def test_a_part_can_be_added_and_replaces_what_has_its_name(tmp_path: Path, old: str) -> None:
    part = write(tmp_path, "part.yaml", STRICT)
    result = diff(old, part, "--add")
    assert result.exit_code == 1
    assert "  NEW  OLD with part.yaml\n" in result.stdout
    assert "shop/pay, shop/web: PERMISSIVE -> STRICT, by shop/default (part.yaml:" in result.stdout
    # The same name again: replaced, and not one that is older.
    taken_back = write(tmp_path, "back.yaml", STRICT.replace("STRICT", "PERMISSIVE"))
    whole = write(tmp_path, "whole.yaml", MESH + STRICT)
    result = diff(whole, taken_back, "--add")
    assert result.exit_code == 0
    assert "STRICT -> PERMISSIVE, by shop/default (back.yaml:" in result.stdout


def test_a_workload_that_goes_is_said(tmp_path: Path, old: str) -> None:
    one = write(tmp_path, "one.yaml", MESH.partition("---")[0])
    result = diff(old, one, "--flows-db", store(tmp_path, WEB))
    assert result.exit_code == 0
    assert "Workloads that go, and are judged by nobody then: shop/pay\n" in result.stdout
    assert "  1 flow to workloads that NEW has not, where nobody will judge\n" in result.stdout


def test_what_the_agent_would_refuse_cannot_be_added(tmp_path: Path, old: str) -> None:
    thief = MESH.partition("---")[0].replace("name: web", "name: thief")
    result = diff(old, write(tmp_path, "thief.yaml", thief), "--add")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "thief.yaml:" in result.stderr
    assert "already taken" in result.stderr


def test_a_recording_that_holds_nothing_proves_nothing(tmp_path: Path, old: str, new: str) -> None:
    result = diff(old, new, "--flows-db", store(tmp_path))
    assert (result.exit_code, result.stdout) == (2, "")
    assert "nothing is recorded in it" in result.stderr


def test_a_reference_that_leads_nowhere_is_said_and_judged_closed(tmp_path: Path, old: str) -> None:
    callers = CLOSED.replace(
        "spec: {}", "spec: {rules: [{from: [{source: {principals: [set:none]}}]}]}"
    )
    result = diff(old, write(tmp_path, "n.yaml", MESH + callers))
    assert result.exit_code == 1
    assert "closed until it is mended" in result.stderr


# --- the running agent --------------------------------------------------------------------------


DIFF = ("policy", "diff")


def configuration() -> Configuration:
    return Configuration(
        schema=CONFIGURATION_SCHEMA,
        source="/etc/nodeagent/mesh.d",
        pending="",
        problems=(),
        node="n1",
        cluster="c",
        trust_domain="cluster.local",
        root_namespace="istio-system",
        locality="",
        node_addresses=(),
        node_plaintext=False,
        trusted=("cluster.local",),
        documents=Documents.of(api.load(MESH.encode(), "mesh.yaml", "n1").documents),
    )


def recorded(tmp_path: Path, *keys: FlowKey, **changes: Any) -> Recording:  # noqa: ANN401 - fields of it
    found = recording(tmp_path / store(tmp_path, *keys, name="r.db"), "n1", time.time(), 3600)
    return msgspec.structs.replace(found, **changes)


def test_what_runs_is_compared_and_what_it_has_recorded_replayed(tmp_path: Path, new: str) -> None:
    answers = Answers(configuration=configuration(), flows=recorded(tmp_path, PLAIN, WEB))
    result = beside(tmp_path, answers, *DIFF, "--running", new, "--flows", "--since", "6h")
    assert (result.exit_code, result.stderr) == (1, "")
    assert result.stdout.startswith(
        "WOULD BREAK: 1 recorded caller, 3 connections\n  OLD  in force on n1\n  NEW  new.yaml\n"
    )
    assert answers.ages == [6 * 3600]


def test_an_agent_that_has_recorded_nothing_proves_nothing(tmp_path: Path, new: str) -> None:
    nothing = Recording(
        schema=SCHEMA,
        node="n1",
        time=recorded(tmp_path, WEB).time,
        since=recorded(tmp_path, WEB).time,
        oldest=None,
        flows=(),
        problem="flows.retention_hours is 0",
    )
    answers = Answers(configuration=configuration(), flows=nothing)
    result = beside(tmp_path, answers, *DIFF, "--running", new, "--flows")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "has recorded nothing: flows.retention_hours is 0" in result.stderr


def test_gaps_of_the_recording_are_said(tmp_path: Path, new: str) -> None:
    answers = Answers(
        configuration=configuration(), flows=recorded(tmp_path, WEB, problem="no room")
    )
    result = beside(tmp_path, answers, *DIFF, "--running", new, "--flows")
    assert result.exit_code == 0
    assert "note: the recording has gaps: no room" in result.stderr


def test_of_more_than_fits_an_answer_nothing_is_promised(tmp_path: Path, new: str) -> None:
    answers = Answers(configuration=configuration(), flows=recorded(tmp_path, WEB, truncated=True))
    result = beside(tmp_path, answers, *DIFF, "--running", new, "--flows")
    assert result.exit_code == 1
    assert "there are more; the last seen were looked at: ask for less time" in result.stdout


@pytest.mark.parametrize("arguments", [("--running", "NEW"), ("NEW", "NEW", "--flows")])
def test_without_an_agent(tmp_path: Path, new: str, arguments: tuple[str, ...]) -> None:
    named = (new if each == "NEW" else each for each in arguments)
    result = diff(*named, "--run-dir", str(tmp_path / "nowhere"))
    assert (result.exit_code, result.stdout) == (3, "")
    assert "nodeagent does not run here" in result.stderr


def test_gaps_of_the_recording_are_noted(tmp_path: Path, old: str, new: str) -> None:
    at = int(time.time())
    kept = FlowStore(tmp_path / "flows.db", Keep())
    kept.add(1, Flows((Flow(WEB, at, at, 3, 0, 10, 20),), 1, at - 300, at - 200))
    # The second message was lost.
    kept.add(1, Flows((), 3, at - 300, at))
    kept.close()
    result = diff(new, old, "--flows-db", "flows.db")
    assert result.exit_code == 0
    assert "note: the recording has 1 gap in this time" in result.stderr
    assert "who called then is not known" in result.stderr
