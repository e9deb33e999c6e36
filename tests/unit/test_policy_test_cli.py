"""`nodeagent policy test`: tables of expected verdicts, and what is said of them."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from click.testing import CliRunner, Result

from nodeagent.cli import cli

MESH = """\
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {name: web, namespace: shop, annotations: {nodeagent.io/netns: web}}
spec: {address: 10.1.0.2, serviceAccount: web}
---
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {name: pay, namespace: shop, annotations: {nodeagent.io/netns: "other:pay"}}
spec: {address: 10.1.0.3, serviceAccount: pay}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: callers, namespace: shop}
spec:
  rules:
  - from: [{source: {principals: ["cluster.local/ns/shop/sa/web", "other.example/*"]}}]
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: watch, namespace: shop}
spec:
  action: AUDIT
  rules:
  - to: [{operation: {ports: ["8080"]}}]
---
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: default, namespace: shop}
spec: {mtls: {mode: STRICT}}
"""
GOOD = """\
trusts: [other.example]
tests:
- name: the web shop may pay
  from: shop/web
  to: shop/pay:8080
  expect: allow
  by: shop/callers
  mtls: STRICT
  audit: [shop/watch]
- from: spiffe://cluster.local/ns/shop/sa/till
  to: shop/pay:80
  expect: deny
  by: default deny
  audit: []
- {from: shop/web, to: "shop/pay:80", expect: deny, plaintext: true, by: shop/default}
- {from: spiffe://other.example/x, to: "10.1.0.3:80", expect: allow, by: "shop/callers rules[0]"}
- {from: 192.0.2.1, to: "shop/pay:80", expect: deny}
"""


@pytest.fixture
def mesh(tmp_path: Path) -> str:
    path = tmp_path / "mesh.yaml"
    path.write_text(MESH)
    return str(path)


def run(mesh: str, table: str, *arguments: str) -> Result:
    command = ["policy", "test", "-", "--config", mesh, *arguments]
    return CliRunner().invoke(cli, command, input=table)


def test_all_as_expected(mesh: str) -> None:
    result = run(mesh, GOOD)
    assert (result.exit_code, result.stdout, result.stderr) == (
        0, "5 tests: 5 as expected, 0 not (1 file)\n", "",
    )  # fmt: skip
    verbose = run(mesh, GOOD, "-v")
    assert verbose.stdout.splitlines()[:2] == [
        "ok: the web shop may pay",
        "ok: spiffe://cluster.local/ns/shop/sa/till -> shop/pay:80",
    ]


BAD = """\
tests:
- name: the web shop may pay
  from: shop/web
  to: shop/pay:8080
  expect: allow
- name: nobody else may
  from: spiffe://cluster.local/ns/shop/sa/web
  to: shop/pay:80
  expect: deny
  by: default deny
  mtls: PERMISSIVE
  audit: [shop/watch]
"""


def test_a_failure_says_what_came_and_which_command_says_more(mesh: str) -> None:
    result = run(mesh, BAD)
    assert result.exit_code == 1
    assert " ".join(result.stdout.split()) == " ".join(
        f"""\
FAILED: nobody else may
  standard input:6: spiffe://cluster.local/ns/shop/sa/web -> shop/pay:80
  expected deny, came allow
  expected to be decided by 'default deny', came shop/callers rules[0] ({mesh}:16)
  expected mTLS PERMISSIVE, came STRICT by shop/default ({mesh}:26)
  expected to be marked by 'shop/watch', which does not
  decided at 10.1.0.3:80 by shop/callers rules[0] ({mesh}:16)
  more: nodeagent policy explain spiffe://cluster.local/ns/shop/sa/web shop/pay:80 {mesh}
2 tests: 1 as expected, 1 not (1 file)
""".split()
    )


def test_the_command_that_says_more_asks_the_same(mesh: str) -> None:
    table = 'tests: [{from: shop/web, to: "shop/pay:80", expect: allow, plaintext: true}]'
    more = run(mesh, table).stdout.partition("more: nodeagent ")[2].splitlines()[0]
    asked = CliRunner().invoke(cli, more.split())
    assert asked.exit_code == 1
    assert "strict_requires_mtls" in asked.stdout


def test_json_and_junit_say_the_same(mesh: str) -> None:
    result = run(mesh, BAD, "-o", "json")
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    counts = {name: found[name] for name in ("schema", "tests", "passed", "failed", "broken")}
    assert counts == {"schema": 1, "tests": 2, "passed": 1, "failed": 1, "broken": 0}
    failed = found["results"][1]
    assert (failed["outcome"], failed["expected"], failed["came"]) == ("failed", "deny", "allow")
    assert (failed["line"], failed["rule"]["line"]) == (6, 16)
    junit = run(mesh, BAD, "-o", "junit")
    assert junit.exit_code == 1
    suite = junit_of(junit)
    assert suite.attrib == {
        "name": "standard input", "tests": "2", "failures": "1", "errors": "0",
    }  # fmt: skip
    assert [case.get("name") for case in suite] == ["the web shop may pay", "nobody else may"]
    failure = suite[1].find("failure")
    assert failure is not None
    assert "expected deny, came allow" in (failure.get("message") or "")


def junit_of(result: Result) -> ET.Element:
    return ET.fromstring(result.stdout)  # noqa: S314 - our own output


def test_a_case_that_names_what_is_not_there_is_broken(mesh: str) -> None:
    table = GOOD + "- {from: shop/wep, to: 'shop/pay:80', expect: deny}\n"
    result = run(mesh, table)
    assert result.exit_code == 2
    assert "  standard input:18:3: tests[5]: 'shop/wep' is no workload" in result.stdout
    assert "did you mean shop/web" in result.stdout
    assert "5 as expected, 0 not, 1 broken" in result.stdout
    junit = run(mesh, table, "-o", "junit")
    assert junit.exit_code == 2
    assert junit_of(junit).get("errors") == "1"


@pytest.mark.parametrize(
    "table, place, said",
    [
        ("", "1:1", "tests: is missing"),
        ("tests: []", "1:8", "add one"),
        ("tests: {}", "1:8", "must be a list"),
        ("test: []", "1:1", "unknown field"),
        ("tests:\n- {from: a/b, to: 'c/d:1'}", "2:3", "expect: is missing"),
        ("tests:\n- {from: a/b, to: 'c/d:1', expect: maybe}", "2:36", "allow, deny"),
        ("tests:\n- {from: a/b, to: c/d, expect: deny}", "2:19", "names no port"),
        ("tests:\n- {from: a/b, to: 'c/d:99999', expect: deny}", "2:19", "no port"),
        ("tests:\n- {from: '', to: 'c/d:1', expect: deny}", "2:10", "1 to"),
        ("tests:\n- {from: a/b, to: 'c/d:1', expect: deny, source: x}", "2:50", "address"),
        ("tests:\n- {from: a/b, to: 'c/d:1', expect: deny, mtls: STRONG}", "2:48", "STRICT"),
        ("tests:\n- {from: a/b, to: 'c/d:1', expect: deny, by: x, bye: y}", "2:49", "unknown"),
        ("trusts: [UPPER]\ntests: []", "1:10", "trust domain"),
        ("tests: &a []", "1:8", "anchor"),
        ("a: [", "2:1", "not YAML"),
        ("tests: []\n---\ntests: []", "3:1", "second document"),
        ("tests: " + "[" * 64 + "]" * 64, "1:39", "nested deeper"),
        ("#" * (2 << 20), "", "split the file"),
    ],
)
def test_a_broken_table_is_refused_with_its_place(
    mesh: str, table: str, place: str, said: str
) -> None:
    for output in ("text", "json", "junit"):
        result = run(mesh, table, "-o", output)
        assert (result.exit_code, result.stdout) == (2, "")
        assert f"standard input:{place}" in result.stderr if place else "standard input: "
        assert said in result.stderr


def test_a_contradiction_fails_whatever_the_policies(mesh: str) -> None:
    both = "\n".join(
        f"- {{from: shop/web, to: 'shop/pay:80', expect: {expect}}}" for expect in ("allow", "deny")
    )
    result = run(mesh, f"tests:\n{both}\n")
    assert result.exit_code == 1
    assert "1 as expected, 1 not" in result.stdout


def test_an_enormous_table(mesh: str) -> None:
    case = '- {from: shop/web, to: "shop/pay:80", expect: allow}\n'
    assert "5000 as expected" in run(mesh, "tests:\n" + case * 5000).stdout
    refused = run(mesh, "tests:\n" + case * 10_001)
    assert refused.exit_code == 2
    assert "more than 10000 items" in refused.stderr


def test_broken_policies_are_not_tested(mesh: str) -> None:
    Path(mesh).write_text(MESH.replace("principals", "principal"))
    result = run(mesh, GOOD)
    assert (result.exit_code, result.stdout) == (2, "")
    assert f"{mesh}:16:" in result.stderr


def test_files_that_cannot_be_read(tmp_path: Path, mesh: str) -> None:
    nowhere = str(tmp_path / "no.yaml")
    table = CliRunner().invoke(cli, ["policy", "test", nowhere, "--config", mesh])
    assert table.exit_code == 2
    assert "no.yaml: cannot be read" in table.stderr
    config = run(nowhere, GOOD)
    assert config.exit_code == 2
    assert "no.yaml: cannot be read" in config.stderr
    twice = run("-", GOOD)
    assert twice.exit_code == 2
    assert "standard input" in twice.stderr


def test_without_a_configuration_the_agent_is_asked(tmp_path: Path) -> None:
    command = ["policy", "test", "-", "--run-dir", str(tmp_path)]
    result = CliRunner().invoke(cli, command, input=GOOD)
    assert (result.exit_code, result.stdout) == (3, "")
    assert "nodeagent does not run here" in result.stderr
    assert "--config" in result.stderr


def test_help_says_what_there_is_to_know() -> None:
    result = CliRunner().invoke(cli, ["policy", "test", "--help"])
    assert result.exit_code == 0
    for word in ("FILE", "--config", "expect: allow", "junit", "Exit codes"):
        assert word in result.stdout
