from __future__ import annotations

import msgspec
import pytest

from support.mesh_state import SETTINGS, bundle, identity, ip, local, pod, policy, state, workload
from ztunnel.authorize import Request, Verdict, authorize
from ztunnel.protocol import Mode, Resource, WorkloadPolicy
from ztunnel.reasons import Reason
from ztunnel.spiffe import SpiffeId
from ztunnel.state import OWN_PORTS

HTTPBIN = workload("httpbin", "10.2.0.1", "fd00:2::1")
CALLER = SpiffeId.parse(identity("sleep"))
STRANGER = SpiffeId.parse("spiffe://elsewhere.test/ns/default/sa/sleep")


def ask(
    who: SpiffeId | None,
    *resources: Resource,
    port: int = 8080,
    destination: str = "10.2.0.1",
) -> Verdict:
    found = state(
        HTTPBIN, pod("pod-httpbin", HTTPBIN.uid, *HTTPBIN.addresses), bundle(b"root"), *resources
    )
    request = Request(local(found, "pod-httpbin"), who, ip("10.1.0.1"), ip(destination), port)
    return authorize(found, request)


@pytest.mark.parametrize(
    "mode, who, allow",
    [
        (Mode.STRICT, None, False),
        (Mode.STRICT, CALLER, True),
        (Mode.PERMISSIVE, None, True),
        (Mode.PERMISSIVE, CALLER, True),
        (Mode.DISABLE, None, True),
        # Callers elsewhere do not know the mode, and a proof does no harm.
        (Mode.DISABLE, CALLER, True),
    ],
)
def test_the_mode_decides_who_needs_an_identity(
    mode: Mode, who: SpiffeId | None, allow: bool
) -> None:
    verdict = ask(who, policy(HTTPBIN.uid, mode))
    assert verdict.allow is allow
    assert verdict.mode is mode
    assert verdict.origin == "istio-system/default"
    if not allow:
        assert verdict.reason is Reason.STRICT_PLAINTEXT


def test_a_port_has_its_own_mode_and_origin() -> None:
    mixed = policy(HTTPBIN.uid, Mode.STRICT, p9090=Mode.PERMISSIVE)
    assert not ask(None, mixed).allow
    verdict = ask(None, mixed, port=9090)
    assert verdict.allow
    assert verdict.origin == "default/httpbin-ports"


@pytest.mark.parametrize("who", [None, CALLER])
def test_without_a_policy_nobody_is_let_in(who: SpiffeId | None) -> None:
    others: tuple[WorkloadPolicy, ...] = (policy("default/another"),)
    verdict = ask(who, *others)
    assert not verdict.allow
    assert verdict.reason is Reason.POLICY_MISSING


@pytest.mark.parametrize("port", [*sorted(OWN_PORTS), 0])
@pytest.mark.parametrize("who", [None, CALLER])
def test_the_tunnels_own_ports_are_never_delivered(who: SpiffeId | None, port: int) -> None:
    verdict = ask(who, policy(HTTPBIN.uid, Mode.DISABLE), port=port)
    assert verdict == Verdict(allow=False, reason=Reason.SELF_CALL)


@pytest.mark.parametrize(
    "destination",
    ["127.0.0.1", "::1", "::ffff:127.0.0.1", "10.2.0.2", "169.254.169.254", "0.0.0.0"],
)
def test_only_the_pods_own_addresses_are_delivered(destination: str) -> None:
    verdict = ask(CALLER, policy(HTTPBIN.uid), destination=destination)
    assert verdict.reason is Reason.AUTHORITY_MISMATCH


@pytest.mark.parametrize("destination", ["10.2.0.1", "::ffff:10.2.0.1", "fd00:2::1"])
def test_each_of_them_is(destination: str) -> None:
    assert ask(CALLER, policy(HTTPBIN.uid), destination=destination).allow


def test_a_trust_domain_that_is_trusted_no_more_is_refused_even_when_permissive() -> None:
    verdict = ask(STRANGER, policy(HTTPBIN.uid, Mode.PERMISSIVE))
    assert verdict.reason is Reason.TRUST_DOMAIN


@pytest.mark.parametrize("allowed", [False, True])
@pytest.mark.parametrize("source", ["10.1.0.1", "192.0.2.1"])
def test_the_nodes_own_plaintext_passes_strict_only_by_the_setting(
    allowed: bool, source: str
) -> None:
    found = state(
        HTTPBIN,
        pod("pod-httpbin", HTTPBIN.uid, *HTTPBIN.addresses),
        policy(HTTPBIN.uid, Mode.STRICT),
    )
    settings = msgspec.structs.replace(
        SETTINGS, node_addresses=("192.0.2.1",), node_plaintext=allowed
    )
    found = msgspec.structs.replace(found, settings=settings)
    verdict = authorize(
        found, Request(local(found, "pod-httpbin"), None, ip(source), ip("10.2.0.1"), 8080)
    )
    assert verdict.allow is (allowed and source == "192.0.2.1")
    if verdict.allow:
        assert verdict.origin == "settings (node_plaintext)"
