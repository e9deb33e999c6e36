"""Names and paths of namespaces."""

from __future__ import annotations

from pathlib import Path

import pytest

from nodeagent.pods.netns import NetnsError, NetnsReason, netns_path, open_netns, pod_uid


def test_names_are_under_run_netns() -> None:
    assert netns_path("pod-1") == Path("/run/netns/pod-1")


def test_absolute_paths_stay() -> None:
    assert netns_path("/proc/7/ns/net") == Path("/proc/7/ns/net")


@pytest.mark.parametrize(
    "where",
    ["", ".", "..", "a/b", "../x", "/run/netns/../x", "a b", "a\n", "/x\0y", "é", "x" * 256],
)
def test_what_could_lead_elsewhere_is_refused(where: str) -> None:
    with pytest.raises(NetnsError) as caught:
        netns_path(where)
    assert caught.value.reason is NetnsReason.BAD_NAME


def test_a_missing_namespace_says_so() -> None:
    with pytest.raises(NetnsError, match="does not exist") as caught:
        open_netns("no-such-namespace-here")
    assert caught.value.reason is NetnsReason.MISSING


def test_uids_of_two_namespaces_differ() -> None:
    assert pod_uid("shop/cart", 0x1F) == "shop/cart@1f"
    assert pod_uid("shop/cart", 0x20) != pod_uid("shop/cart", 0x1F)
