"""Rules of an ALLOW that callers without an identity meet: what their author is told."""

from __future__ import annotations

from typing import Any

import pytest

from nodeagent.api import load
from support.resources import authorization, docs

WEB = "cluster.local/ns/shop/sa/web"


def policy(rules: list[Any], action: str = "ALLOW") -> str:
    return authorization("shop/p", action, rules)


def warned(text: str) -> list[str]:
    loaded = load(docs(text), "f", "n1")
    assert not loaded.errors, [str(error) for error in loaded.errors]
    return [f"{warning.field}: {warning.reason}" for warning in loaded.warnings]


@pytest.mark.parametrize(
    "key,value",
    [("source.principal", WEB), ("source.namespace", "a"), ("source.serviceAccount", "a/b")],
)
def test_authorization_conditions_that_say_only_who_is_not_meant_let_plaintext_in(
    key: str, value: str
) -> None:
    (warning,) = warned(policy([{"when": [{"key": key, "notValues": [value]}]}]))
    assert warning.startswith("spec.rules[0].when[0].notValues: ")
    assert "plaintext" in warning
    excluded = {"key": key, "notValues": [value]}
    rule = {"when": [excluded]}
    assert warned(policy([rule], "DENY")) == warned(policy([rule], "AUDIT")) == []
    asked = {"when": [excluded, {"key": "source.principal", "values": ["*"]}]}
    named = {"source": {"principals": ["*"]}}
    assert warned(policy([asked])) == warned(policy([{"from": [named], **rule}])) == []
    # One source that asks for no identity is enough.
    either = {"from": [named, {"source": {"ipBlocks": ["10.0.0.1"]}}], **rule}
    assert len(warned(policy([either]))) == 1
