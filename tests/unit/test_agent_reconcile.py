"""The decisions about pods: steps, tightening before loosening, retries."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodeagent import reconcile
from nodeagent.reconcile import Closed, Enrolled, Step, Wanted
from ztunnel import protocol

OPEN = Closed(default=False)
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
def test_what_is_closed_is_that_of_the_policy(default: protocol.Mode, port: protocol.Mode) -> None:
    found = reconcile.closed_by(policy(default, p80=port))
    assert found.is_strict(80) == (port is STRICT)
    assert found.is_strict(81) == (default is STRICT)


def test_a_missing_policy_closes() -> None:
    assert reconcile.closed_by(None).is_strict(80)


def test_what_is_closed_has_one_spelling_for_one_meaning() -> None:
    assert reconcile.closed_by(policy(STRICT, p80=STRICT)) == reconcile.closed_by(policy(STRICT))
    assert reconcile.closed_by(policy(PERMISSIVE, p80=DISABLE)) == OPEN


PORTS = range(1, 6)
states = st.builds(Closed, default=st.booleans(), ports=st.frozensets(st.sampled_from(PORTS)))


@given(states, states)
def test_between_two_states_everything_is_closed_that_either_closes(
    old: Closed, new: Closed
) -> None:
    between = reconcile.together(old, new)
    for port in (*PORTS, 9):
        assert between.is_strict(port) == (old.is_strict(port) or new.is_strict(port))


WORKLOAD = protocol.Workload(
    "default/a",
    "a",
    "default",
    "a",
    "x",
    "spiffe://x/ns/default/sa/a",
    A,
    protocol.DataPlane.HBONE,
)


def test_wanted_pods_need_a_workload() -> None:
    bindings = {"default/a": "a", "default/b": "b"}
    pods = reconcile.wanted_pods(bindings, {"default/a": WORKLOAD}, {}, ())
    assert set(pods) == {"default/a"}
    assert pods["default/a"].closed.is_strict(80)


ALLOW, DENY, AUDIT = protocol.Action.ALLOW, protocol.Action.DENY, protocol.Action.AUDIT


@pytest.mark.parametrize(
    "action,namespace,workloads,dry_run,closed",
    [
        (ALLOW, "", None, False, True),
        (DENY, "default", None, False, True),
        (DENY, "default", ("default/a",), False, True),
        (DENY, "default", ("default/b",), False, False),
        (ALLOW, "other", None, False, False),
        (ALLOW, "default", None, True, False),
        (AUDIT, "default", None, False, False),
    ],
)
def test_a_pod_whose_callers_are_chosen_is_closed_to_what_nobody_judged(
    action: protocol.Action,
    namespace: str,
    workloads: tuple[str, ...] | None,
    dry_run: bool,
    closed: bool,
) -> None:
    chooses = protocol.Authorization("x", action, (), "x", namespace, workloads, dry_run)
    pods = reconcile.wanted_pods(
        {"default/a": "a"}, {"default/a": WORKLOAD}, {"default/a": policy(PERMISSIVE)}, (chooses,)
    )
    assert pods["default/a"].closed.is_strict(80) == closed


def test_workload_of_a_pod() -> None:
    assert reconcile.workload_of("ns/a@1f") == "ns/a"


def test_retries_back_off_and_stay_bounded() -> None:
    delays = [reconcile.retry_seconds(n, soon=False) for n in range(1, 100)]
    assert delays == sorted(delays)
    assert delays[0] == reconcile.FIRST_RETRY_SECONDS
    assert delays[-1] == reconcile.MAX_RETRY_SECONDS
    waits = [reconcile.retry_seconds(n, soon=True) for n in range(1, 100)]
    assert waits[-1] == reconcile.MAX_WAIT_SECONDS


@pytest.mark.parametrize("pods", [1, 100, 1000])
def test_pods_that_were_enrolled_at_once_are_not_audited_at_once(pods: int) -> None:
    every = reconcile.audit_seconds(pods)
    first = [reconcile.first_audit_seconds(f"default/pod-{index}", pods) for index in range(1000)]
    assert min(first) >= every / 2
    assert max(first) <= every
    # No tenth of the time has twice its share.
    tenths = [int((delay - every / 2) / (every / 2) * 10) for delay in first]
    assert max(tenths.count(tenth) for tenth in range(10)) < 200
