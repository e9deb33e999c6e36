"""`nodeagent policy explain`: what it says, and with which exit code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from nodeagent.cli import cli
from nodeagent.cli.text import WIDTH
from support.shop import CALLERS, DENY, MESH, STRICT

WEB = "spiffe://cluster.local/ns/shop/sa/web"


def explain(*arguments: str, given: str = "") -> Result:
    return CliRunner().invoke(cli, ["policy", "explain", *arguments], input=given)


def told(*arguments: str, given: str) -> dict[str, Any]:
    result = explain(*arguments, "-o", "json", given=given)
    assert result.stdout, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    assert found["schema"] == 1
    assert result.exit_code == (0 if found["allowed"] else 1)
    return found


def test_a_default_deny_names_its_policies_and_the_nearest_rule() -> None:
    result = explain("shop/web", "shop/pay:8080", "-", given=MESH + STRICT + CALLERS)
    assert result.exit_code == 1
    assert (
        result.stdout
        == """\
shop/web -> shop/pay:8080: REFUSED
  by       default deny, no rule of the ALLOW policy for it matches
           - shop/callers (standard input:40)
  caller   spiffe://cluster.local/ns/shop/sa/web from 10.1.0.2, HBONE
  to       shop/pay at 10.1.0.3:8080, shop/pay at [fd00::3]:8080
  class    identity_not_allowed: with identity, but not an allowed one
  mTLS     STRICT, set for the namespace by shop/default (standard input:35)
  config   1 file

ALLOW, 1 policy, the nearest rule first:
  shop/callers rules[1] (standard input:48): 1 condition short
    to destination.port: wants 443 or 8443; is 8080
  shop/callers rules[0] (standard input:46): 2 conditions short
    from source.principal: wants cluster.local/ns/shop/sa/till; is
      cluster.local/ns/shop/sa/web
    to destination.port: wants 443; is 8080

Without its identity (plaintext): REFUSED: strict_requires_mtls, shop/default
  (standard input:35): plaintext refused: PeerAuthentication says STRICT; is the
  client in the mesh?
"""
    )


def test_a_deny_rule_decides_and_says_what_it_left_unread() -> None:
    found = told("shop/web", "shop/pay:443", "-", given=MESH + CALLERS + DENY)
    (answer,) = found["answers"]
    assert answer["by"] == {
        "name": "shop/no-web rules[0]",
        "file": "standard input",
        "line": 52,
        "text": "shop/no-web rules[0] (standard input:52)",
    }
    assert (answer["reason"], answer["client"]) == ("policy_denied", "identity_not_allowed")
    decided = [rule for rule in answer["rules"] if rule["decided"]]
    assert [rule["unread"] for rule in decided] == [["methods"]]
    text = explain("shop/web", "shop/pay:443", "-", given=MESH + CALLERS + DENY).stdout
    assert "without methods (not read at layer 4)" in " ".join(text.split())
    assert text.index("\nDENY, 1 policy") < text.index("\nALLOW, 1 policy")


def test_an_allow_rule_decides() -> None:
    result = explain("shop/web", "shop/pay:8443", "-", given=MESH + CALLERS)
    assert result.exit_code == 0
    assert "shop/web -> shop/pay:8443: ALLOWED\n" in result.stdout
    assert "by       ALLOW shop/callers rules[1] (standard input:43)" in result.stdout
    assert "mTLS     PERMISSIVE, no PeerAuthentication sets it" in result.stdout


@pytest.mark.parametrize(
    "source, destination, allowed, way",
    [
        ("shop/web", "shop/pay:80", True, "hbone"),
        ("10.1.0.2", "shop/pay:80", True, "hbone"),
        ("10.1.0.2:40001", "shop/pay:80", True, "hbone"),
        ("[fd00::3]:40001", "shop/web:80", True, "hbone"),
        ("spiffe://cluster.local/ns/shop/sa/web", "shop/pay:80", True, "hbone"),
        ("cluster.local/ns/shop/sa/web", "shop/pay:80", True, "hbone"),
        ("spiffe://cluster.local/ns/far/sa/nobody", "shop/pay:80", True, "hbone"),
        ("spiffe://other.example/ns/shop/sa/web", "shop/pay:80", False, "hbone"),
        ("shop/legacy", "shop/pay:80", False, "plaintext"),
        ("192.0.2.1", "shop/pay:80", False, "plaintext"),
        ("plaintext", "shop/pay:80", False, "plaintext"),
        ("shop/web", "pay.shop.example:80", True, "hbone"),
        ("shop/web", "shop/pay.shop.example:80", True, "hbone"),
        ("shop/web", "10.9.0.1:80", True, "hbone"),
        ("shop/web", "10.1.0.3:80", True, "hbone"),
        ("shop/web", "[fd00::3]:80", True, "hbone"),
        ("shop/web", "shop/legacy:80", True, "plaintext"),
        ("shop/web", "shop/pay:15008", False, "hbone"),
    ],
)
def test_whoever_and_whatever_can_be_named(
    source: str, destination: str, allowed: bool, way: str
) -> None:
    found = told(source, destination, "-", given=MESH + STRICT)
    assert found["allowed"] is allowed
    assert {answer["way"] for answer in found["answers"]} == {way}


def test_a_service_leads_to_its_workloads_on_their_ports() -> None:
    (answer,) = told("shop/web", "10.9.0.1:80", "-", given=MESH)["answers"]
    assert answer["destinations"] == [{"workload": "shop/pay", "address": "10.1.0.3", "port": 8080}]


def test_who_is_outside_the_mesh_is_not_judged() -> None:
    result = explain("shop/web", "shop/legacy:80", "-", given=MESH + STRICT)
    assert result.exit_code == 0
    assert result.stdout.startswith("shop/web -> shop/legacy:80: NOT JUDGED\n")
    assert "annotation nodeagent.io/netns" in " ".join(result.stdout.split())


def test_nobody_judges_what_a_workload_says_to_itself() -> None:
    for caller in ("shop/web", "10.1.0.2", WEB):
        result = explain(caller, "shop/web:80", "-", given=MESH + STRICT)
        assert result.exit_code == 0
        assert "NOT JUDGED\n  by       within its own pod" in result.stdout
        assert "Without its identity" not in result.stdout
    replica = explain(WEB, "shop/web:80", "-", given=replicas(1) + MESH + STRICT)
    assert "ALLOWED" in replica.stdout


def test_the_callers_identity_can_be_taken_away() -> None:
    found = told("--plaintext", "shop/web", "shop/pay:80", "-", given=MESH + STRICT)
    (answer,) = found["answers"]
    assert (answer["reason"], answer["client"]) == ("strict_requires_mtls", "without_identity")
    assert answer["by"]["name"] == "shop/default"
    assert answer["asked_policy"] is False
    assert found["without_identity"] == []


def test_under_disable_there_is_no_identity_to_take_away() -> None:
    given = MESH + STRICT.replace("STRICT", "DISABLE")
    result = explain("shop/web", "shop/pay:80", "-", given=given)
    assert result.exit_code == 0
    assert "caller   no identity from 10.1.0.2, plaintext" in result.stdout
    assert "callers leave their identity out" in " ".join(result.stdout.split())
    assert "Without its identity" not in result.stdout


def test_a_further_trust_domain_can_be_trusted() -> None:
    stranger = "spiffe://other.example/ns/shop/sa/web"
    assert not told(stranger, "shop/pay:80", "-", given=MESH)["allowed"]
    assert told("--trust", "other.example", stranger, "shop/pay:80", "-", given=MESH)["allowed"]


BY_ADDRESS = DENY.replace("namespaces: [shop]", "ipBlocks: [192.0.2.0/24]")


def test_an_address_that_the_answer_depends_on_must_be_given() -> None:
    result = explain("plaintext", "shop/pay:443", "-", given=MESH + BY_ADDRESS)
    assert result.exit_code == 2
    assert "shop/no-web rules[0] (standard input:41)" in result.stderr
    assert "--from-address" in result.stderr
    asked = ("--from-address", "192.0.2.7", "plaintext", "shop/pay:443", "-")
    assert not told(*asked, given=MESH + BY_ADDRESS)["allowed"]


def test_addresses_of_one_workload_that_are_judged_differently_are_told_apart() -> None:
    policy = DENY.replace(
        '  - from: [{source: {namespaces: [shop]}}]\n    to: [{operation: {ports: ["443"], '
        "methods: [GET]}}]\n",
        '  - when: [{key: destination.ip, values: ["fd00::3"]}]\n',
    )
    found = told("shop/web", "shop/pay:80", "-", given=MESH + policy)
    assert [(each["allowed"], each["destinations"][0]["address"]) for each in found["answers"]] == [
        (False, "fd00::3"), (True, "10.1.0.3"),
    ]  # fmt: skip
    text = explain("shop/web", "shop/pay:80", "-", given=MESH + policy)
    assert text.exit_code == 1
    assert text.stdout.count("shop/web -> shop/pay:80: ") == 2


def replicas(count: int) -> str:
    """More workloads of one identity, each with an address of its own."""
    web = MESH.partition("---")[0]
    return "".join(
        web.replace("name: web", f"name: web{number}")
        .replace("netns: web", f"netns: web{number}")
        .replace("10.1.0.2", f"10.2.0.{number + 1}")
        + "---\n"
        for number in range(count)
    )


def test_each_address_of_an_identity_is_judged_where_a_rule_asks_for_it() -> None:
    by_address = BY_ADDRESS.replace("192.0.2.0/24", "10.2.0.1")
    found = told(WEB, "shop/pay:443", "-", given=replicas(3) + MESH + by_address)
    assert [(each["allowed"], each["sources"]) for each in found["answers"]] == [
        (False, ["10.2.0.1"]), (True, ["10.1.0.2", "10.2.0.2", "10.2.0.3"]),
    ]  # fmt: skip
    one = told(WEB, "shop/pay:443", "-", given=replicas(3) + MESH)
    assert [each["sources"] for each in one["answers"]] == [["10.1.0.2"]]
    asked = (WEB, "shop/pay:443", "-")
    many_more = explain(*asked, given=replicas(80) + MESH + by_address)
    assert many_more.exit_code == 2
    assert "has 81: name one with --from-address" in many_more.stderr


def test_of_very_many_answers_the_first_are_told_whole() -> None:
    service = MESH.rpartition("---\n")[2].replace("app: pay", "app: web")
    policies = "".join(
        f"""---
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata:
  name: r{number}
  namespace: shop
  labels: {{app: web}}
  annotations: {{nodeagent.io/netns: r{number}, nodeagent.io/callers: "set:nobody"}}
spec: {{address: 10.3.0.{number}}}
"""
        for number in range(1, 31)
    )
    given = MESH.rpartition("---\n")[0] + "---\n" + service + policies
    result = explain("shop/web", "pay.shop.example:80", "-", given=given)
    assert result.exit_code == 1
    assert result.stdout.count("-> pay.shop.example:80: REFUSED") == 3
    assert "more answers: --all shows them" in result.stdout
    assert len(result.stdout.splitlines()) < 150
    found = told("shop/web", "pay.shop.example:80", "-", given=given)
    assert len(found["answers"]) == 31


def test_dry_runs_and_audits_are_told() -> None:
    tried = CALLERS.replace(
        "namespace: shop}\nspec:\n  selector",
        'namespace: shop, annotations: {istio.io/dry-run: "true"}}\nspec:\n  selector',
    )
    audit = DENY.replace("action: DENY", "action: AUDIT").replace('"443"', '"80"')
    found = told("shop/web", "shop/pay:80", "-", given=MESH + tried + audit)
    (answer,) = found["answers"]
    assert answer["allowed"]
    assert answer["dry_run"]["allowed"] is False
    assert [each["rule"]["name"] for each in answer["audits"]] == ["shop/no-web rules[0]"]
    text = explain("shop/web", "shop/pay:80", "-", given=MESH + tried + audit).stdout
    assert "no ALLOW policy that is enforced is for this workload" in " ".join(text.split())
    assert "audit    marked by shop/no-web rules[0]" in text
    assert "dry run  would be REFUSED by default deny" in text
    assert "2 conditions short (dry run)" in text


def test_rules_that_no_tunnel_is_told_are_not_forgotten() -> None:
    layer7 = CALLERS.replace('["443"]', '["443"], paths: [/pay]')
    (answer,) = told("shop/web", "shop/pay:80", "-", given=MESH + layer7)["answers"]
    assert [each["rule"]["name"] for each in answer["left_out"]] == ["shop/callers rules[0]"]
    text = explain("shop/web", "shop/pay:80", "-", given=MESH + layer7).stdout
    assert "Left out:\n  shop/callers rules[0]" in text
    unresolved = CALLERS.replace("cluster.local/ns/shop/sa/web", "set:friends")
    result = explain("shop/web", "shop/pay:80", "-", given=MESH + unresolved)
    assert "identity set shop/friends does not exist" in " ".join(result.stdout.split())
    assert "closed until it is mended: standard input:43:" in result.stderr


def test_a_policy_without_rules_lets_nobody_in() -> None:
    nobody = CALLERS.partition("spec:")[0] + "spec: {}\n"
    result = explain("shop/web", "shop/pay:80", "-", given=MESH + nobody)
    assert result.exit_code == 1
    assert "shop/callers (standard input:35): has no rule that could match" in result.stdout


def test_a_policy_whose_selector_passes_the_workload_by_is_told() -> None:
    misspelt = CALLERS.replace("app: pay", "app: pya")
    result = explain("shop/web", "shop/pay:80", "-", given=MESH + misspelt)
    assert result.exit_code == 0
    assert (
        "Not for this workload, by their selectors, the nearest first:\n"
        "  ALLOW shop/callers (standard input:35): wants app=pya; is pay\n"
    ) in result.stdout
    (answer,) = told("shop/web", "shop/pay:80", "-", given=MESH + misspelt)["answers"]
    assert answer["passed_over"][0]["lacks"] == [{"label": "app", "wanted": "pya", "seen": "pay"}]


def test_a_configuration_without_workloads_is_said_to_be_one() -> None:
    result = explain("shop/web", "shop/pay:80", "-", given=CALLERS)
    assert result.exit_code == 2
    assert "note: no WorkloadEntry here" in result.stderr


def test_lines_have_eighty_columns_as_far_as_names_allow() -> None:
    for arguments in (("shop/web", "shop/pay:8080"), ("plaintext", "shop/pay:8080")):
        result = explain(*arguments, "-", given=MESH + STRICT + CALLERS + DENY)
        assert max(map(len, result.stdout.splitlines())) <= WIDTH


def many(count: int) -> str:
    rules = "\n".join(
        f"  - from: [{{source: {{principals: [cluster.local/ns/shop/sa/a{number}]}}}}]"
        for number in range(count)
    )
    return CALLERS.partition("  rules:")[0] + f"  rules:\n{rules}\n"


def test_very_many_rules_are_counted_and_not_shown() -> None:
    given = MESH + many(3000)
    result = explain("shop/web", "shop/pay:80", "-", given=given)
    assert result.exit_code == 1
    assert "  and 2995 more, none of them nearer: --all shows them\n" in result.stdout
    assert len(result.stdout.splitlines()) < 40
    everything = explain("--all", "shop/web", "shop/pay:80", "-", given=given)
    assert everything.stdout.count("1 condition short") == 3000


def test_a_long_list_is_cut_short() -> None:
    values = ", ".join(f'"cluster.local/ns/shop/sa/a{number}"' for number in range(2000))
    policy = CALLERS.replace('"cluster.local/ns/shop/sa/web"', values)
    result = explain("shop/web", "shop/pay:443", "-", given=MESH + policy)
    assert "or 1996 more" in " ".join(result.stdout.split())


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("shop/wep", "shop/pay:80"), "did you mean shop/web"),
        (("shop/web", "shop/pya:80"), "did you mean shop/pay"),
        (("web", "shop/pay:80"), "(did you mean shop/web?)"),
        (("wbe", "shop/pay:80"), "(did you mean shop/web?)"),
        (("Shop/Web", "shop/pay:80"), "(did you mean shop/web?)"),
        (("PLAINTEXT", "shop/pay:80"), "(did you mean plaintext?)"),
        (("shop/web", "pay:80"), "(did you mean shop/pay?)"),
        (("shop/web", "shop/PAY:80"), "(did you mean shop/pay?)"),
        (("shop/web", "shop/pay"), "names no port"),
        (("shop/web", "shop/pay:http"), "no port"),
        (("shop/web", "shop/pay:0"), "no port"),
        (("shop/web", "shop/pay:70000"), "no port"),
        (("shop/web", "fd00::3:80"), "[ADDRESS]:PORT"),
        (("shop/web", "192.0.2.9:80"), "outside the mesh"),
        (("shop/web", "10.9.0.1:81"), "it has 80"),
        (("shop/web", "pay.shop.example:81"), "it has 80"),
        (("spiffe://UPPER/x", "shop/pay:80"), "not a SPIFFE ID"),
        (("spiffe://a/b\n", "shop/pay:80"), "not a SPIFFE ID"),
        (("", "shop/pay:80"), "is no workload"),
        (("x" * 10_000, "shop/pay:80"), "is no workload"),
        (("--from-address", "shop/web", "plaintext", "shop/pay:80"), "is no IP address"),
        (("--run-dir", "/x", "shop/web", "shop/pay:80"), "--run-dir"),
        (("--trust", "UPPER", "shop/web", "shop/pay:80"), "is no trust domain"),
    ],
)
def test_a_question_that_cannot_be_asked(arguments: tuple[str, ...], said: str) -> None:
    result = explain(*arguments, "-", given=MESH)
    assert (result.exit_code, result.stdout) == (2, "")
    assert said in result.stderr
    assert len(result.stderr) < 1000


@pytest.mark.parametrize(
    "text, said",
    [
        ("", "standard input: is empty"),
        ("a: [", "standard input:2:1: not YAML"),
        (MESH.replace("spec: {address: 10.1.0.9}", "spec: {adress: 10.1.0.9}"), "unknown field"),
        (MESH + MESH.partition("---")[0].join(("---\n", "")), "already taken"),
        ("a: " + "[" * 40 + "]" * 40, "nested deeper than"),
        ("#" * (2 << 20), "split the file"),
        ("\x00", "not allowed"),
    ],
)
def test_a_configuration_with_errors_decides_nothing(text: str, said: str) -> None:
    result = explain("shop/web", "shop/pay:80", "-", given=text)
    assert (result.exit_code, result.stdout) == (2, "")
    assert said in result.stderr
    assert "policy check" in result.stderr


def test_of_two_that_contradict_each_other_the_one_in_force_is_named() -> None:
    permissive = STRICT.replace("default", "later").replace("STRICT", "PERMISSIVE")
    given = MESH + STRICT + permissive + CALLERS + DENY
    result = explain("shop/web", "shop/pay:443", "-", given=given)
    assert result.exit_code == 1
    assert "by       DENY shop/no-web rules[0]" in result.stdout
    assert "shop/callers rules[1] (standard input:53): matches\n" in result.stdout
    assert "STRICT, set for the namespace by shop/default" in result.stdout
    assert "warnings: nodeagent policy check shows what has no effect" in result.stderr


def test_ten_thousand_policies_in_many_files(tmp_path: Path) -> None:
    (tmp_path / "mesh.yaml").write_text(MESH)
    for number in range(4):
        policies = (
            "{apiVersion: security.istio.io/v1, kind: AuthorizationPolicy, "
            f"metadata: {{name: p{number}-{each}, namespace: shop}}, spec: {{rules: "
            f'[{{from: [{{source: {{principals: ["cluster.local/ns/far/sa/s{each}"]}}}}]}}]}}}}\n'
            for each in range(2500)
        )
        (tmp_path / f"{number}.yaml").write_text("---\n".join(policies))
    result = explain("shop/web", "shop/pay:80", str(tmp_path))
    assert result.exit_code == 1
    assert "no rule of the 10000 ALLOW policies for it matches" in result.stdout
    assert "- and 9992 more\n" in result.stdout
    assert len(result.stdout.splitlines()) < 80


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    missing = explain("shop/web", "shop/pay:80", str(tmp_path / "nowhere.yaml"))
    assert missing.exit_code == 2
    assert "nowhere.yaml: cannot be read" in missing.stderr
    empty = explain("shop/web", "shop/pay:80", str(tmp_path))
    assert empty.exit_code == 2
    assert "holds no file" in empty.stderr


def test_help_says_what_there_is_to_know() -> None:
    result = explain("--help")
    assert result.exit_code == 0
    assert result.stdout == HELP


HELP = """\
Usage: cli policy explain [OPTIONS] SRC DST:PORT [FILE...]

  Say whether SRC may call DST, which rule decides, and how far the others are
  from it.

  SRC  a workload (NAMESPACE/NAME), a SPIFFE ID, an address, or "plaintext"
  DST  a workload, a service (NAMESPACE/HOST or HOST), or an address

  Without FILE the running agent is asked for what it has in force. With FILE
  (files, directories, or - for standard input) only these count; no agent is
  needed.

  A rule is as near as it lacks few conditions; the nearest come first.

  Exit codes: 0 allowed; 1 refused; 2 wrong usage, or files that cannot be used;
  3 the agent cannot be reached.

Options:
  --plaintext             SRC calls without its identity.
  --from-address ADDRESS  The address that SRC calls from.
  --all                   Show every rule, not only the nearest.
  --trust DOMAIN          With FILE: a further trust domain whose roots the node
                          holds. May be repeated.
  --run-dir PATH          Without FILE: the agent's run directory.
                          [/run/nodeagent]
  --settings FILE         The agent's settings: trust domain, root namespace,
                          node. Default: the defaults.
  -o, --output FORM       Form of the answer: text, json, yaml.  [text]
  -h, --help              Show this message and exit.
"""
