"""Patterns that would match more, or less, than they say: refused, or taken at their word.

Other systems had `[` and `?` inside names (glob), unescaped dots (regular expressions) and a DENY
that never matched at layer 4.
"""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nodeagent.api import load
from support.mesh_state import bundle, ip, local, pod, policy, state, workload
from ztunnel.authorize import Request, authorize
from ztunnel.protocol import Action, Attribute, Authorization, Condition, Rule
from ztunnel.spiffe import SpiffeId

HTTPBIN = workload("httpbin", "10.2.0.1")
ACCOUNT = st.text("abz.-_", min_size=1, max_size=4).filter(lambda name: set(name) != {"."})


def document(field: str, value: str) -> bytes:
    """Return a policy with one value in one field of its source."""
    spec = {"action": "DENY", "rules": [{"from": [{"source": {field: [value]}}]}]}
    found = {
        "apiVersion": "security.istio.io/v1",
        "kind": "AuthorizationPolicy",
        "metadata": {"name": "p", "namespace": "default"},
        "spec": spec,
    }
    return json.dumps(found).encode()


def matches(attribute: Attribute, pattern: str, identity: SpiffeId) -> bool:
    """Return whether a DENY by this pattern keeps `identity` out."""
    rule = Rule(origin="p rules[0]", sources=((Condition(attribute, (pattern,)),),))
    found = state(
        HTTPBIN,
        pod("pod", HTTPBIN.uid, *HTTPBIN.addresses),
        bundle(b"root", domain="td"),
        policy(HTTPBIN.uid),
        Authorization("AuthorizationPolicy/default/p", Action.DENY, (rule,), "p"),
    )
    request = Request(local(found, "pod"), identity, ip("10.1.0.1"), ip("10.2.0.1"), 80)
    return not authorize(found, request).allow


@pytest.mark.parametrize("field", ["principals", "notPrincipals", "namespaces", "notNamespaces"])
@pytest.mark.parametrize(
    "value",
    [
        *("prod?", "[ab]", "prod[0-9]", "a|b", "(a+)+", "^prod$", "prod.*x", "pro*d", "**", "*a*"),
        *("", " prod", "prod\n", "prod\t", "prod\u2028", "pröd", "ＰＲＯＤ", "prod,test", "a\\b"),
    ],
)
def test_what_other_systems_read_as_a_pattern_is_refused(field: str, value: str) -> None:
    (error, *_) = load(document(field, value), "p.yaml").errors
    assert error.field == f"spec.rules[0].from[0].source.{field}[0]"


@settings(max_examples=300, deadline=None)
@given(ACCOUNT, ACCOUNT)
def test_a_pattern_is_a_start_an_end_or_the_whole_and_nothing_else(name: str, seen: str) -> None:
    identity = SpiffeId.parse(f"spiffe://td/ns/{seen}/sa/{seen}")
    whole = str(identity).removeprefix("spiffe://")
    for attribute, text, pieces in (
        (Attribute.NAMESPACE, seen, (name, f"{name}*", f"*{name}")),
        (Attribute.PRINCIPAL, whole, (f"td/ns/{name}/sa/{name}", f"td/ns/{name}*", f"*/sa/{name}")),
    ):
        exact, start, end = pieces
        assert matches(attribute, exact, identity) is (text == exact)
        assert matches(attribute, start, identity) is text.startswith(start[:-1])
        assert matches(attribute, end, identity) is text.endswith(end[1:])


@pytest.mark.parametrize(
    "pattern, resembling",
    [
        ("cluster.local/ns/prod/sa/web", "clusterxlocal/ns/prod/sa/web"),
        ("cluster.local/*", "cluster.local.evil/ns/prod/sa/web"),
        ("cluster.local/ns/prod/*", "cluster.local/ns/prod-evil/sa/web"),
        ("*/sa/web", "cluster.local/ns/prod/sa/evil-web"),
        ("*/ns/prod/sa/web", "cluster.local/x/ns/prod/sa/web2"),
    ],
)
def test_a_name_that_resembles_is_another(pattern: str, resembling: str) -> None:
    rule = Rule(origin="p rules[0]", sources=((Condition(Attribute.PRINCIPAL, (pattern,)),),))
    caller = SpiffeId.parse(f"spiffe://{resembling}")
    found = state(
        HTTPBIN,
        pod("pod", HTTPBIN.uid, *HTTPBIN.addresses),
        bundle(b"root", domain=caller.trust_domain),
        policy(HTTPBIN.uid),
        Authorization("AuthorizationPolicy/default/p", Action.ALLOW, (rule,), "p"),
    )
    request = Request(local(found, "pod"), caller, ip("10.1.0.1"), ip("10.2.0.1"), 80)
    assert not authorize(found, request).allow
