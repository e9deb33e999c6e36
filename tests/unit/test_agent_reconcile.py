"""The decisions about pods: steps, tightening before loosening, retries."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodeagent import reconcile
from nodeagent.capture.model import CaptureReason, Enforcement
from nodeagent.reconcile import Enrolled, Step, Wanted
from ztunnel import protocol

OPEN = Enforcement(strict_default=False)
A = ("10.0.0.1",)


def wanted(addresses: tuple[str, ...] = A) -> Wanted:
    return Wanted("default/a", "a", "spiffe://x/ns/default/sa/a", addresses, OPEN)


def enrolled(cookie: int = 7, addresses: tuple[str, ...] = A) -> Enrolled:
    return Enrolled("default/a@7", cookie, addresses)


@pytest.mark.parametrize(
    "want,have,cookie,step",
    [
        (None, None, None, Step.FINISH),
        (None, None, 7, Step.FINISH),
        (None, enrolled(), 7, Step.REMOVE),
        (wanted(), None, None, Step.WAIT),
        (wanted(), None, 7, Step.ENROL),
        (wanted(), enrolled(), 7, Step.AUDIT),
        (wanted(), enrolled(), None, Step.REMOVE),
        (wanted(), enrolled(), 8, Step.REMOVE),
        # In place: removing first would open the pod for a moment.
        (wanted(("10.0.0.2",)), enrolled(), 7, Step.ENROL),
    ],
)
def test_steps(want: Wanted | None, have: Enrolled | None, cookie: int | None, step: Step) -> None:
    assert reconcile.decide(want, have, cookie) is step


def policy(mode: protocol.Mode, **ports: protocol.Mode) -> protocol.WorkloadPolicy:
    numbered = {int(name[1:]): value for name, value in ports.items()}
    return protocol.WorkloadPolicy("default/a", mode, "x", numbered)


STRICT, PERMISSIVE, DISABLE = (
    protocol.Mode.STRICT,
    protocol.Mode.PERMISSIVE,
    protocol.Mode.DISABLE,
)


@pytest.mark.parametrize("default,port", list(itertools.product(protocol.Mode, protocol.Mode)))
def test_enforcement_is_that_of_the_policy(default: protocol.Mode, port: protocol.Mode) -> None:
    found = reconcile.enforcement_of(policy(default, p80=port))
    assert found.is_strict(80) == (port is STRICT)
    assert found.is_strict(81) == (default is STRICT)


def test_a_missing_policy_closes() -> None:
    assert reconcile.enforcement_of(None).is_strict(80)


def test_enforcement_has_one_spelling_for_one_meaning() -> None:
    assert reconcile.enforcement_of(policy(STRICT, p80=STRICT)) == reconcile.enforcement_of(
        policy(STRICT)
    )
    assert reconcile.enforcement_of(policy(PERMISSIVE, p80=DISABLE)) == OPEN


PORTS = range(1, 6)
ports = st.frozensets(st.sampled_from(PORTS))
enforcements = st.builds(
    Enforcement, strict_default=st.booleans(), strict_ports=ports, permissive_ports=ports
)


@given(enforcements, enforcements)
def test_between_two_states_everything_is_closed_that_either_closes(
    old: Enforcement, new: Enforcement
) -> None:
    between = reconcile.together(old, new)
    for port in (*PORTS, 9):
        assert between.is_strict(port) == (old.is_strict(port) or new.is_strict(port))


def test_wanted_pods_need_a_workload() -> None:
    workload = protocol.Workload(
        "default/a",
        "a",
        "default",
        "a",
        "x",
        "spiffe://x/ns/default/sa/a",
        A,
        protocol.DataPlane.HBONE,
    )
    pods = reconcile.wanted_pods({"default/a": "a", "default/b": "b"}, {"default/a": workload}, {})
    assert set(pods) == {"default/a"}
    assert pods["default/a"].enforcement.is_strict(80)


def test_workload_of_a_pod() -> None:
    assert reconcile.workload_of("ns/a@1f") == "ns/a"


def test_retries_back_off_and_stay_bounded() -> None:
    delays = [reconcile.retry_seconds(n, CaptureReason.KERNEL) for n in range(1, 100)]
    assert delays == sorted(delays)
    assert delays[0] == reconcile.FIRST_RETRY_SECONDS
    assert delays[-1] == reconcile.MAX_RETRY_SECONDS
    waits = [reconcile.retry_seconds(n, CaptureReason.ADDRESS_MISSING) for n in range(1, 100)]
    assert waits[-1] == reconcile.MAX_WAIT_SECONDS
