from __future__ import annotations

import msgspec
import pytest

from support.mesh_state import (
    SETTINGS,
    authorization,
    bundle,
    identity,
    ip,
    local,
    pod,
    policy,
    ports,
    principals,
    source,
    state,
    workload,
)
from ztunnel.authorize import Client, Request, Verdict, authorize
from ztunnel.protocol import (
    Action,
    Attribute,
    Authorization,
    Condition,
    Mode,
    Resource,
    WorkloadPolicy,
)
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
    assert not verdict.allow
    assert verdict.reason is Reason.SELF_CALL
    assert not verdict.origin


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
@pytest.mark.parametrize("caller", ["10.1.0.1", "192.0.2.1"])
def test_the_nodes_own_plaintext_passes_strict_only_by_the_setting(
    allowed: bool, caller: str
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
        found, Request(local(found, "pod-httpbin"), None, ip(caller), ip("10.2.0.1"), 8080)
    )
    assert verdict.allow is (allowed and caller == "192.0.2.1")
    if verdict.allow:
        assert verdict.origin == "settings (node_plaintext)"


# --- authorization ---

SLEEP = principals(str(CALLER).removeprefix("spiffe://"))
PERMISSIVE = policy(HTTPBIN.uid, Mode.PERMISSIVE)


def nobody(name: str = "default/nobody", *, dry_run: bool = False) -> Authorization:
    return authorization(name, Action.ALLOW, dry_run=dry_run)


@pytest.mark.parametrize(
    "policies, who, allow, origin",
    [
        ((authorization("default/a", Action.DENY, source(SLEEP)),), CALLER, False, "default/a"),
        ((authorization("default/a", Action.DENY, source(SLEEP)),), None, True, "istio-system"),
        ((authorization("default/a", Action.ALLOW, source(SLEEP)),), CALLER, True, "default/a"),
        ((authorization("default/a", Action.ALLOW, source(SLEEP)),), None, False, "default deny"),
        ((authorization("default/a", Action.ALLOW, source()),), None, True, "default/a"),
        ((nobody(),), CALLER, False, "default deny"),
        ((nobody("elsewhere/nobody"),), CALLER, True, "istio-system"),
        # DENY comes first whatever its name.
        (
            (
                authorization("default/a", Action.ALLOW, source()),
                authorization("default/b", Action.DENY, source(ports(8080))),
            ),
            CALLER,
            False,
            "default/b",
        ),
        ((authorization("default/a", Action.AUDIT, source()),), None, True, "istio-system"),
        ((nobody("default/a", dry_run=True),), CALLER, True, "istio-system"),
    ],
)
def test_an_authorization_decides_who_may_call(
    policies: tuple[Authorization, ...], who: SpiffeId | None, allow: bool, origin: str
) -> None:
    verdict = ask(who, PERMISSIVE, *policies)
    assert verdict.allow is allow
    assert verdict.reason is (Reason.CLOSED if allow else Reason.POLICY_DENIED)
    assert verdict.origin.startswith(origin)
    assert verdict.mode is Mode.PERMISSIVE


def test_an_allow_opens_nothing_that_strict_closes() -> None:
    verdict = ask(None, policy(HTTPBIN.uid, Mode.STRICT), authorization("default/a", Action.ALLOW))
    assert verdict.reason is Reason.STRICT_PLAINTEXT
    assert verdict.origin == "istio-system/default"


def test_without_a_mode_no_authorization_lets_anybody_in() -> None:
    verdict = ask(CALLER, authorization("default/a", Action.ALLOW, source()))
    assert verdict.reason is Reason.POLICY_MISSING


def test_the_verdict_says_what_kind_of_caller_it_was() -> None:
    only_sleep = authorization("default/a", Action.ALLOW, source(SLEEP))
    other = SpiffeId.parse(identity("other"))
    assert ask(None, PERMISSIVE).client is Client.WITHOUT_IDENTITY
    assert ask(None, PERMISSIVE, only_sleep).client is Client.WITHOUT_IDENTITY
    assert ask(other, PERMISSIVE, only_sleep).client is Client.NOT_ALLOWED
    assert ask(STRANGER, PERMISSIVE).client is Client.NOT_ALLOWED
    assert ask(CALLER, PERMISSIVE, only_sleep).client is Client.ALLOWED


def test_an_audit_is_recorded_with_either_verdict() -> None:
    # Who calls without an identity of that namespace: how plaintext callers are found.
    audit = authorization(
        "default/audit",
        Action.AUDIT,
        source(Condition(Attribute.NAMESPACE, (), ("default",)), unread=("to[0].methods",)),
    )
    for policies in ((), (nobody(),)):
        verdict = ask(None, PERMISSIVE, audit, *policies)
        (match,) = verdict.audits
        assert match.origin.startswith("default/audit rules[0]")
        assert match.unread == ("to[0].methods",)
        assert not ask(CALLER, PERMISSIVE, audit, *policies).audits


def test_a_dry_run_is_told_beside_the_verdict() -> None:
    tried = authorization("default/tried", Action.DENY, source(SLEEP), dry_run=True)
    verdict = ask(CALLER, PERMISSIVE, tried)
    assert verdict.allow
    assert verdict.dry_run is not None
    assert not verdict.dry_run.allow
    assert verdict.dry_run.origin.startswith("default/tried rules[0]")
    assert ask(None, PERMISSIVE, tried).dry_run is not None
    assert ask(CALLER, PERMISSIVE).dry_run is None


def test_the_nodes_own_plaintext_is_judged_by_authorizations_like_any_other() -> None:
    settings = msgspec.structs.replace(SETTINGS, node_addresses=("10.1.0.1",), node_plaintext=True)

    def probe(*policies: Authorization) -> Verdict:
        found = msgspec.structs.replace(
            state(
                HTTPBIN,
                pod("pod-httpbin", HTTPBIN.uid, *HTTPBIN.addresses),
                policy(HTTPBIN.uid, Mode.STRICT),
                *policies,
            ),
            settings=settings,
        )
        request = Request(local(found, "pod-httpbin"), None, ip("10.1.0.1"), ip("10.2.0.1"), 8080)
        return authorize(found, request)

    probes = Condition(Attribute.SOURCE_IP, ("10.1.0.1",))
    assert probe().allow
    assert not probe(nobody()).allow
    assert probe(nobody(), authorization("default/probes", Action.ALLOW, source(probes))).allow
