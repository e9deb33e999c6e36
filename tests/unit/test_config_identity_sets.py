"""IdentitySet and the annotation of callers as written: what is read, refused, warned about."""

from __future__ import annotations

import json

import pytest

from nodeagent.api import IdentitySet, WorkloadEntry, callers, load
from support.resources import docs, identities, read, refuse, workload

WEB = "cluster.local/ns/shop/sa/web"


def fields(text: str) -> list[str]:
    return [error.field for error in refuse(text)]


def warned(text: str) -> list[str]:
    loaded = load(docs(text), "f", "n1")
    assert not loaded.errors
    return [warning.reason for warning in loaded.warnings]


# --- identity sets ------------------------------------------------------------------------------


def test_identity_set_is_read() -> None:
    members = [f"spiffe://{WEB}", "other.example/*", "*/sa/prometheus", "set:more", "set:b/c"]
    (document,) = read(identities("shop/partners", *members))
    assert isinstance(document, IdentitySet)
    assert document.spec.identities == (WEB, *members[1:])
    assert [mark.refers for mark in document.marks] == ["shop/more", "b/c"]
    assert document.marks[0].field == "spec.identities[3]"


def test_identity_set_star_beside_a_name_says_what_else_it_matches() -> None:
    """Whoever a set lets in by accident is let in by every policy that refers to it."""
    (warning,) = warned(
        identities("shop/partners", "cluster.local/ns/prod*", "other.example/*", "*")
    )
    assert "'cluster.local/ns/prod-evil'" in warning
    called = {"nodeagent.io/callers": "cluster.local/ns/prod*, set:partners, */sa/web"}
    (warning,) = warned(workload("shop/w", "10.0.0.1", netns="w", annotations=called))
    assert "'cluster.local/ns/prod-evil'" in warning


@pytest.mark.parametrize(
    "member",
    ["a*b", "spiffe://", "spiffe://set:x", "spiffe://Cluster.local/x", "set:", "x", "set:a/b/c",
     "spiffe://spiffe://a/b", "set:partners", "set:shop/partners", "http://a/b"],
)  # fmt: skip
def test_identity_set_of_impossible_members_is_refused(member: str) -> None:
    (error,) = refuse(identities("shop/partners", "a/b", member))
    assert error.field == "spec.identities[1]"


def test_identity_set_must_have_members_each_once() -> None:
    assert fields(identities("shop/partners")) == ["spec.identities"]
    assert fields(identities("shop/partners", "a/b", "spiffe://a/b")) == ["spec.identities[1]"]
    document = json.loads(identities("shop/partners", "a/b"))
    document["apiVersion"] = "nodeagent.io/v1"
    assert "known: nodeagent.io/v1alpha1" in refuse(json.dumps(document))[0].reason


# --- annotation of callers ----------------------------------------------------------------------


def test_callers_are_read_with_their_place() -> None:
    text = workload(
        "shop/web", "10.0.0.1", netns="web",
        annotations={"nodeagent.io/callers": f"{WEB}, set:partners,other/*"},
    )  # fmt: skip
    (document,) = read(text)
    assert isinstance(document, WorkloadEntry)
    assert callers(document) == (WEB, "set:partners", "other/*")
    assert [mark.refers for mark in document.marks] == ["", "shop/partners"]
    assert document.marks[0].field == "metadata.annotations['nodeagent.io/callers']"
    assert warned(text) == []


@pytest.mark.parametrize("value", ["", ",", WEB + ",", "a*b", f"{WEB},{WEB}", f"spiffe://{WEB}"])
def test_callers_that_name_nobody_are_refused(value: str) -> None:
    text = workload("shop/web", "10.0.0.1", annotations={"nodeagent.io/callers": value})
    assert fields(text) == ["metadata.annotations['nodeagent.io/callers']"]


def test_callers_of_a_workload_outside_the_mesh_have_no_effect() -> None:
    text = workload("shop/web", "10.0.0.1", annotations={"nodeagent.io/callers": WEB})
    assert "outside the mesh" in warned(text)[0]
