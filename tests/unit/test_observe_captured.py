"""Which workloads nobody calls unseen: by the states of their pods."""

from __future__ import annotations

import pytest

from nodeagent.admin.model import PodState
from nodeagent.capture.model import OlderCaller
from nodeagent.observe import captured as asked
from nodeagent.observe.captured import ENROLLING_SECONDS, taken_over
from nodeagent.podkeeper import PodView
from nodeagent.reconcile import Enrolled

NOW = 100.0


def captured(before: dict[str, str], views: dict[str, PodView], now: float = NOW) -> dict[str, str]:
    return asked.captured(before, views, now)


def view(state: PodState, uid: str = "", older: tuple[OlderCaller, ...] | None = ()) -> PodView:
    enrolled = Enrolled(uid, 1, ()) if uid else None
    return PodView(None, state, NOW, enrolled, "", (), 0, {}, older)


@pytest.mark.parametrize("state", [PodState.ENROLLED, PodState.DEGRADED])
def test_who_is_captured_is_in_it_by_its_pod(state: PodState) -> None:
    assert captured({}, {"a/b": view(state, "a/b@1")}) == {"a/b": "a/b@1"}
    assert captured({"a/b": "a/b@1"}, {"a/b": view(state, "a/b@2")}) == {"a/b": "a/b@2"}


@pytest.mark.parametrize("state", [PodState.WAITING, PodState.ENROLLING])
def test_between_two_pods_a_workload_stays_and_none_comes(state: PodState) -> None:
    assert captured({"a/b": "a/b@1"}, {"a/b": view(state)}) == {"a/b": "a/b@1"}
    assert captured({}, {"a/b": view(state)}) == {}


def test_a_pod_that_takes_long_to_be_captured_is_called_unseen() -> None:
    found = {"a/b": view(PodState.ENROLLING)}
    before = {"a/b": "a/b@1"}
    assert captured(before, found, NOW + ENROLLING_SECONDS) == before
    assert captured(before, found, NOW + ENROLLING_SECONDS + 1) == {}
    # Without a pod nobody calls, however long.
    assert captured(before, {"a/b": view(PodState.WAITING)}, NOW + 9999) == before


@pytest.mark.parametrize("state", [PodState.FAILED, PodState.REMOVING])
def test_who_may_be_open_is_not_in_it(state: PodState) -> None:
    assert captured({"a/b": "a/b@1"}, {"a/b": view(state)}) == {}
    assert captured({"a/b": "a/b@1"}, {"a/b": view(state, "a/b@1")}) == {}


@pytest.mark.parametrize("older", [None, (OlderCaller("10.0.0.9", 80, 1),)])
def test_while_somebody_unseen_may_be_connected_it_is_not_in_it(
    older: tuple[OlderCaller, ...] | None,
) -> None:
    found = {"a/b": view(PodState.ENROLLED, "a/b@1", older)}
    assert captured({}, found) == captured({"a/b": "a/b@1"}, found) == {}


def test_who_is_bound_no_more_is_not_in_it() -> None:
    assert captured({"a/b": "a/b@1"}, {}) == {}


def test_what_an_earlier_run_captured_is_taken_over_when_it_is_no_longer_in_between() -> None:
    found = {"a/b": view(PodState.FAILED), "a/c": view(PodState.ENROLLED, "a/c@1")}
    assert not taken_over({"a/b"}, found)
    assert taken_over({"a/c"}, found)
    assert taken_over({"a/gone"}, found)
    assert taken_over({"a/b"}, {"a/b": view(PodState.WAITING)})
