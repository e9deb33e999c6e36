"""What is answered without an agent is what the agent's tunnel decides."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodeagent import mesh, offline
from nodeagent.api import ConfigError
from nodeagent.offline import Caller, ModeInForce, Offline, QuestionError, Target
from nodeagent.policy import Level
from nodeagent.settings import Settings, for_tunnel
from support import conformance
from support.resources import authorization, peer, read, service, workload
from ztunnel import address, state
from ztunnel.authorize import Request, authorize
from ztunnel.policy import DEFAULT_DENY
from ztunnel.protocol import Mode, Pod, TrustBundle
from ztunnel.reasons import Reason
from ztunnel.spiffe import SpiffeId

NODE = Settings(node="n1", trust_domain="td")
WEB = workload("shop/web", "10.1.0.2", netns="web", labels={"app": "web"}, serviceAccount="web")
FAR = workload("shop/far", "10.1.0.4", netns="n2:far", labels={"app": "far"})
OUT = workload("shop/out", "10.1.0.9")
A = SpiffeId.parse("spiffe://td/ns/shop/sa/a")
SOURCE = address.pack("10.1.0.7")


def of(*texts: str, settings: Settings = NODE) -> Offline:
    return Offline.of(read(WEB, FAR, OUT, *texts), settings)


MESH = of(service("shop/pay", endpoints=[{"address": "10.1.0.2"}]))


@pytest.mark.parametrize(
    "scenario",
    [
        pytest.param(scenario, id=f"{topic}: {scenario.title}")
        for topic, found in conformance.scenarios().items()
        for scenario in found
        if scenario.cases
    ],
)
def test_it_agrees_with_the_tunnel_on_the_whole_conformance_table(
    scenario: conformance.Scenario,
) -> None:
    documents = (*conformance.workloads(), *conformance.load_policies(scenario).documents)
    evaluator = Offline.of(documents, conformance.settings(scenario), scenario.trusts)
    for case in scenario.cases:
        request = conformance.request(scenario, case)
        found = evaluator.judge(
            case.to, request.port, request.identity, request.source, request.destination
        )
        verdict = conformance.decide(scenario, case)
        assert found == verdict
        who = Caller("it", request.identity, (request.source,))
        target = Target(case.to, request.destination, request.port)
        (answer,) = offline.explain(evaluator, who, [target])
        assert answer.allowed is verdict.allow
        assert bool(answer.default_deny) is verdict.origin.startswith(DEFAULT_DENY)
        # Of the rules one has decided, or what decided is none of them.
        decided = [rule.rule.text for rule in answer.rules if rule.decided]
        by = answer.by.text if answer.by is not None else ""
        assert decided == ([by] if " rules[" in by else [])
        assert [audit.rule.text for audit in answer.audits] == [
            match.origin for match in verdict.audits
        ]


DENY_FAR = authorization(
    "shop/far",
    "DENY",
    [{"from": [{"source": {"principals": ["td/ns/shop/sa/a"]}}]}],
    selector={"app": "far"},
)


def test_a_workload_of_another_node_is_judged_as_its_own_node_does() -> None:
    documents = read(WEB, FAR, OUT, DENY_FAR, peer("shop/default", "STRICT"))
    there = Settings(node="n2", trust_domain="td")
    resources, _ = mesh.diff(None, mesh.build(documents, there))
    pod = Pod("far", "shop/far", ("10.1.0.4",), 1)
    told = state.apply(
        state.EMPTY,
        state.Change(1, True, (*resources, TrustBundle("td", ()), pod), (), for_tunnel(there)),
    )
    evaluator = Offline.of(documents, NODE)
    for identity in (None, A):
        request = Request(told.pods["far"], identity, SOURCE, address.pack("10.1.0.4"), 80)
        verdict = authorize(told, request)
        assert not verdict.allow
        assert evaluator.judge("shop/far", 80, identity, SOURCE) == verdict


def test_nobody_judges_who_calls_a_workload_outside_the_mesh() -> None:
    evaluator = of(peer("istio-system/default", "STRICT"))
    assert evaluator.judge("shop/out", 80, None, SOURCE) is None
    assert evaluator.judge("shop/nowhere", 80, None, SOURCE) is None
    assert [evaluator.judged(uid) for uid in ("shop/web", "shop/out", "shop/nowhere")] == [
        True, False, False,
    ]  # fmt: skip


def test_an_identity_of_a_trust_domain_without_roots_is_refused() -> None:
    stranger = SpiffeId.parse("spiffe://other/ns/shop/sa/a")
    refused = of().judge("shop/web", 80, stranger, SOURCE)
    assert refused is not None
    assert refused.reason is Reason.TRUST_DOMAIN
    trusted = Offline.of(read(WEB), NODE, ["other"]).judge("shop/web", 80, stranger, SOURCE)
    assert trusted is not None
    assert trusted.allow


@pytest.mark.parametrize(
    "policies, port, expected",
    [
        ([], 80, ModeInForce(Mode.PERMISSIVE, Level.DEFAULT, "default")),
        (
            [peer("istio-system/default", "STRICT")],
            80,
            ModeInForce(Mode.STRICT, Level.MESH, "istio-system/default (mesh.yaml:7)"),
        ),
        (
            [peer("istio-system/default", "STRICT"), peer("shop/default", "DISABLE")],
            80,
            ModeInForce(Mode.DISABLE, Level.NAMESPACE, "shop/default (mesh.yaml:9)"),
        ),
        (
            [peer("shop/web", "STRICT", selector={"app": "web"}, ports={90: "DISABLE"})],
            80,
            ModeInForce(Mode.STRICT, Level.WORKLOAD, "shop/web (mesh.yaml:7)"),
        ),
        (
            [peer("shop/web", "STRICT", selector={"app": "web"}, ports={90: "DISABLE"})],
            90,
            ModeInForce(Mode.DISABLE, Level.PORT, "shop/web (mesh.yaml:7)"),
        ),
    ],
)
def test_the_mode_and_the_level_that_it_comes_from(
    policies: list[str], port: int, expected: ModeInForce
) -> None:
    evaluator = of(*policies)
    assert evaluator.mode("shop/web", port) == expected
    assert evaluator.mode("shop/out", port) is None


def test_disable_takes_the_identity_of_who_knows_the_mode() -> None:
    beside = workload("shop/beside", "10.1.0.5", netns="beside")
    known = of(beside, peer("shop/far", "DISABLE", selector={"app": "far"}), DENY_FAR)
    (far,) = offline.targets(known, "shop/far", 80)
    (near,) = offline.targets(known, "shop/beside", 80)
    caller = offline.caller(known, "shop/web")
    (answer,) = offline.explain(known, caller, [far])
    assert (answer.identity, answer.way, answer.client) == ("", "plaintext", "without_identity")
    (answer,) = offline.explain(known, caller, [near])
    assert (answer.identity, answer.way) == ("spiffe://td/ns/shop/sa/web", "hbone")
    # A client of HBONE that does not know the mode proves its identity all the same.
    (answer,) = offline.explain(known, offline.caller(known, str(A)), [far])
    assert (answer.identity, answer.allowed) == (str(A), False)


def test_the_trace_is_that_of_the_verdict() -> None:
    evaluator = of(DENY_FAR)
    found = evaluator.trace("shop/far", 80, A, SOURCE)
    verdict = evaluator.judge("shop/far", 80, A, SOURCE)
    assert verdict is not None
    assert found.decision.origin == verdict.origin
    assert [rule.decided for rule in found.rules] == [True]
    assert not evaluator.trace("shop/web", 80, A, SOURCE).policies


def test_a_workload_that_lost_its_address_cannot_be_called() -> None:
    # The node's own address is no workload's.
    settings = Settings(node="n1", trust_domain="td", node_addresses=("10.1.0.2",))
    evaluator = of(settings=settings)
    found = evaluator.judge("shop/web", 80, A, SOURCE)
    assert found is not None
    assert found.reason is Reason.AUTHORITY_MISMATCH


@given(st.text() | st.sampled_from(["shop/web", "10.1.0.2", "plaintext", "spiffe://td/x"]))
def test_any_text_is_a_caller_or_an_error_that_says_so(text: str) -> None:
    try:
        found = offline.caller(MESH, text)
    except QuestionError:
        return
    assert found.identity is None or found.identity.trust_domain


NAMES = st.text() | st.sampled_from(["shop/web", "10.1.0.2", "[fd00::1]", "pay.shop"])


@given(NAMES, st.text() | st.integers().map(str))
def test_any_text_is_a_destination_or_an_error_that_says_so(name: str, port: str) -> None:
    try:
        found, number = offline.split_port(f"{name}:{port}")
        targets = offline.targets(MESH, found, number)
    except QuestionError:
        return
    assert targets
    assert all(0 < target.port < 65536 for target in targets)


@given(st.binary() | st.text().map(str.encode))
def test_any_bytes_are_a_table_or_an_error_with_its_file(data: bytes) -> None:
    with pytest.raises(ConfigError, match=r"tests\.yaml"):
        offline.read_table(data, "tests.yaml")


def test_a_directory_without_documents_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(offline.NoFilesError, match="holds no file"):
        offline.read([str(tmp_path)], "n1")
