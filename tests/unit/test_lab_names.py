"""Which pod somebody means."""

from __future__ import annotations

import pytest

from nodeagent.lab import UnknownPodError, load_exercise
from nodeagent.lab import plan as planning
from nodeagent.lab.names import find_pod

PLAN = planning.make(load_exercise("istioinaction"))


@pytest.mark.parametrize(
    "text,namespace,uid",
    [
        ("httpbin", "", "default/httpbin"),
        ("default/sleep", "", "default/sleep"),
        ("sleep", "istioinaction", "istioinaction/sleep"),
        ("deploy/sleep", "default", "default/sleep"),
        ("deploy/web-api", "", "istioinaction/web-api"),
        ("rec", "", "istioinaction/recommendation"),
        ("istioinaction/pur", "", "istioinaction/purchase-history"),
    ],
)
def test_a_pod_is_found(text: str, namespace: str, uid: str) -> None:
    assert find_pod(PLAN, text, namespace).uid == uid


@pytest.mark.parametrize(
    "text,namespace,said",
    [
        ("sleep", "", "default/sleep"),
        ("nothing", "", "istioinaction/web-api"),
        ("", "", "istioinaction/web-api"),
        ("default/web-api", "", "no pod"),
        ("default/sleep", "istioinaction", "istioinaction is asked for"),
        ("web-api/", "", "no pod"),
    ],
)
def test_what_is_unclear_is_answered_with_the_pods(text: str, namespace: str, said: str) -> None:
    with pytest.raises(UnknownPodError, match=said):
        find_pod(PLAN, text, namespace)
