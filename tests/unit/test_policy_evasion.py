"""A DENY by identity where plaintext is taken: when there is a warning, and when there is none."""

from __future__ import annotations

from typing import Any

import pytest

from nodeagent import mesh
from nodeagent.settings import Settings
from support.resources import authorization, peer, read, workload

A = "cluster.local/ns/shop/sa/a"
WEB = workload("shop/web", "10.0.0.1", netns="web", labels={"app": "web"})
FAR = workload("shop/far", "10.0.0.2", netns="n2:far", labels={"app": "web"})
NAMES = {"from": [{"source": {"principals": [A]}}]}
STRICT = peer("shop/all", "STRICT")


def warned(*texts: str) -> list[str]:
    found = mesh.build(read(WEB, FAR, *texts), Settings(node="n1")).warnings
    return [each for each in found if "by their identity" in each]


def deny(*rules: dict[str, Any], uid: str = "shop/no", **fields: Any) -> str:  # noqa: ANN401 - the builder's
    return authorization(uid, "DENY", list(rules), **fields)


WHEN = {"when": [{"key": "source.namespace", "values": ["test"]}]}


@pytest.mark.parametrize("rule", [NAMES, WHEN, {**NAMES, "to": [{"operation": {"ports": ["1"]}}]}])
@pytest.mark.parametrize("scope", ["istio-system/no", "shop/no"])
def test_a_deny_by_identity_can_be_evaded_in_plaintext(rule: dict[str, Any], scope: str) -> None:
    (warning,) = warned(deny(rule, uid=scope))
    assert f"AuthorizationPolicy {scope} denies callers by their identity" in warning
    # Those of other nodes are for these to say.
    assert "get into shop/web:" in warning
    assert warned(deny(rule, uid=scope), peer("shop/all", "DISABLE")) == [warning]


def test_it_names_the_workloads_that_a_selector_selects() -> None:
    other = workload("shop/other", "10.0.0.3", netns="other", labels={"app": "other"})
    (warning,) = warned(other, deny(NAMES, selector={"app": "other"}))
    assert "get into shop/other:" in warning


SILENT = {
    "strict": (deny(NAMES), STRICT),
    "denied without an identity": (deny(NAMES, {"from": [{"source": {"notPrincipals": ["*"]}}]}),),
    "denied by another policy": (
        deny(NAMES),
        deny({"when": [{"key": "source.namespace", "notValues": ["*"]}]}, uid="istio-system/all"),
    ),
    "denied altogether": (deny(NAMES), deny({}, uid="shop/all")),
    "only identities are let in": (deny(NAMES), authorization("shop/yes", "ALLOW", [NAMES])),
    "nobody is let in": (deny(NAMES), authorization("shop/none", "ALLOW", [])),
    "a dry run": (deny(NAMES, annotations={"istio.io/dry-run": "true"}),),
    "by address": (deny({"from": [{"source": {"ipBlocks": ["10.0.0.9"]}}]}),),
    "whoever is not named": (deny({"from": [{"source": {"notPrincipals": [A]}}]}),),
    "not the pods of this node": (deny(NAMES, selector={"app": "none"}),),
}


@pytest.mark.parametrize("why", SILENT)
def test_where_plaintext_does_not_get_in_there_is_nothing_to_evade(why: str) -> None:
    assert warned(*SILENT[why]) == []


LOUD = {
    "a port that takes plaintext": (
        deny(NAMES),
        peer("shop/web", "STRICT", selector={"app": "web"}, ports={80: "PERMISSIVE"}),
    ),
    "an ALLOW of who has none": (
        deny(NAMES),
        authorization("shop/yes", "ALLOW", [NAMES, {"to": [{"operation": {"ports": ["80"]}}]}]),
    ),
    "an ALLOW of somebody else": (
        deny(NAMES),
        authorization("shop/yes", "ALLOW", [NAMES], selector={"app": "none"}),
    ),
    "denied without an identity on one port": (
        deny(NAMES, {"from": [{"source": {"notPrincipals": ["*"]}}],
                     "to": [{"operation": {"ports": ["80"]}}]}),
    ),
    "a source without an identity": (
        deny(NAMES, {"from": [{"source": {"ipBlocks": ["10.0.0.9"], "notPrincipals": ["*"]}}]}),
    ),
}  # fmt: skip


@pytest.mark.parametrize("why", LOUD)
def test_what_only_seems_to_keep_plaintext_out_is_no_reason_to_be_silent(why: str) -> None:
    assert len(warned(*LOUD[why])) == 1


def test_many_workloads_are_counted() -> None:
    many = [workload(f"shop/w{i}", f"10.0.1.{i}", netns=f"w{i}") for i in range(8)]
    (warning,) = warned(*many, deny(NAMES))
    assert "shop/w0, shop/w1, shop/w2, shop/w3, shop/w4 and 4 more:" in warning
