"""Properties of compiled policies: what cannot be read or resolved never lets anybody in."""

from __future__ import annotations

import random
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from nodeagent import mesh
from support.compiled import (
    DB,
    FAR,
    NODE,
    ROOT,
    WEB,
    A,
    B,
    compiled,
    matches,
    policy,
    sources,
)
from support.resources import authorization, identities, read
from ztunnel.protocol import Action

VALUES = st.sampled_from([A, B, "*", "td/ns/shop/*", "*/sa/a", "set:s", "set:t", "set:no"])
LISTS = st.lists(VALUES, min_size=1, max_size=3, unique=True)
SOURCES = st.fixed_dictionaries(
    {},
    optional={
        "principals": LISTS,
        "notPrincipals": LISTS,
        "namespaces": st.just(["shop"]),
        "requestPrincipals": st.just(["x"]),
        "ipBlocks": st.just(["10.9.0.0/16"]),
    },
).filter(bool)
OPERATIONS = st.fixed_dictionaries(
    {}, optional={"ports": st.just(["80"]), "notPorts": st.just(["81"]), "methods": st.just(["G"])}
).filter(bool)
RULES = st.fixed_dictionaries(
    {},
    optional={
        "from": st.lists(st.builds(lambda each: {"source": each}, SOURCES), min_size=1, max_size=2),
        "to": st.lists(
            st.builds(lambda each: {"operation": each}, OPERATIONS), min_size=1, max_size=2
        ),
        "when": st.lists(
            st.builds(lambda found: {"key": "source.principal", "values": found}, LISTS),
            min_size=1,
            max_size=1,
        ),
    },
)
SETS = {"s": identities("shop/s", A, "set:t"), "t": identities("shop/t", B)}
CALLERS = ["", A, B, "td/ns/x/sa/a", "other/ns/shop/sa/b"]


@settings(max_examples=150, deadline=None)
@given(
    st.lists(RULES, min_size=1, max_size=3),
    st.sampled_from(list(Action)),
    st.sets(st.sampled_from(sorted(SETS))),
)
def test_property_missing_sets_never_open(
    rules: list[dict[str, Any]], action: Action, present: set[str]
) -> None:
    """Of the sets, whichever are missing: an ALLOW matches no more, a DENY or AUDIT no less."""
    text = policy(*rules, action=action.value)
    whole = compiled(text, *SETS.values())
    part = compiled(text, *(SETS[name] for name in sorted(present)))
    for caller in CALLERS:
        for port in (80, 81):
            more, less = matches(whole, caller, port), matches(part, caller, port)
            if action is not Action.ALLOW:
                more, less = less, more
            assert more >= less


@settings(max_examples=100, deadline=None)
@given(st.lists(RULES, min_size=1, max_size=3), st.sampled_from([Action.ALLOW, Action.DENY]))
def test_property_layer_7_never_opens(rules: list[dict[str, Any]], action: Action) -> None:
    """With layer-7 fields an ALLOW matches no more than without, a DENY no less."""

    def bare(each: dict[str, Any]) -> dict[str, Any]:
        inner = {
            key: {k: v for k, v in part.items() if k not in {"methods", "requestPrincipals"}}
            for key, part in each.items()
        }
        return inner if all(inner.values()) else {}

    without = []
    for rule in rules:
        kept = {key: [bare(each) for each in rule[key]] for key in ("from", "to") if key in rule}
        kept = {key: found for key, found in kept.items() if all(found)}
        without.append(kept | ({"when": rule["when"]} if "when" in rule else {}))
    told = compiled(policy(*rules, action=action.value), *SETS.values())
    plain = compiled(policy(*without, action=action.value), *SETS.values())
    for caller in CALLERS:
        if action is Action.ALLOW:
            assert matches(told, caller) <= matches(plain, caller)
        else:
            assert matches(told, caller) >= matches(plain, caller)


@settings(max_examples=30, deadline=None)
@given(st.randoms(use_true_random=False))
def test_property_order_of_documents_never_matters(shuffle: random.Random) -> None:
    texts = [
        WEB, DB, FAR, *SETS.values(), policy(sources({"principals": ["set:s", "set:no"]})),
        authorization(f"{ROOT}/q", "DENY", [{"when": [{"key": "source.principal",
                                                       "values": ["set:shop/u"]}]}]),
        identities("shop/u", "set:v"), identities("shop/v", "set:u"),
    ]  # fmt: skip
    documents = list(read(*texts))
    expected = mesh.build(documents, NODE)
    shuffle.shuffle(documents)
    assert mesh.build(documents, NODE) == expected
