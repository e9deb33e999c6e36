"""Properties of the loader: for any bytes at all it answers, and only with ConfigError."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nodeagent import mesh
from nodeagent.api import ConfigError, load
from nodeagent.settings import Settings
from support.resources import authorization, docs, identities, peer, read, service, workload
from ztunnel.policy import rules

SEEDS = [
    docs(peer("a/b", "STRICT", selector={"app": "web"}, ports={80: "DISABLE"})),
    docs(workload("a/w", "10.0.0.1", netns="n1:w", addresses="fd00::1", labels={"app": "web"})),
    docs(service("a/s", addresses=["10.96.0.1"], workloadSelector={"labels": {"app": "web"}})),
    docs(service("a/s", endpoints=[{"address": "10.0.0.1", "ports": {"http": 1}}])),
    docs(
        authorization(
            "a/p",
            "DENY",
            [
                {
                    "from": [{"source": {"principals": ["td/*", "set:s"], "ipBlocks": ["::1"]}}],
                    "to": [{"operation": {"ports": ["80"], "methods": ["GET"]}}],
                    "when": [{"key": "source.principal", "values": ["set:b/c"]}],
                }
            ],
            selector={"app": "web"},
        )
    ),
    docs(identities("a/s", "td/x", "set:t", "*/sa/y")),
    b"a: &x [1, 2]\nb: *x\n<<: {c: !!str d}\n",
]
WORKLOADS = read(workload("a/w", "10.0.0.2", netns="w", labels={"app": "web"}))
ALPHABET = "{}[]:,-?&*!|>'\"%@`#\n\t \\ax0~.<=\u00e9\u2028\ufeff\x00"


def check(data: bytes) -> None:
    loaded = load(data, "f", "n1")
    for error in loaded.errors:
        assert isinstance(error, ConfigError)
        assert error.reason
        assert error.line >= 0
        assert "\n" not in str(error)
        assert str(error).isprintable()
    # Whatever was read can also be used, here and by the tunnel.
    found = mesh.build((*WORKLOADS, *loaded.documents), Settings(node="n1"))
    for policy in found.authorizations.values():
        rules.check(policy)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300))
def test_config_any_bytes_are_answered(data: bytes) -> None:
    check(data)


@settings(max_examples=500, deadline=None)
@given(st.text(alphabet=ALPHABET, max_size=80))
def test_config_any_yaml_like_text_is_answered(text: str) -> None:
    check(text.encode())


@settings(max_examples=500, deadline=None)
@given(
    st.sampled_from(SEEDS), st.integers(0, 400), st.integers(0, 12), st.text(ALPHABET, max_size=6)
)
def test_config_any_damaged_document_is_answered(seed: bytes, at: int, cut: int, put: str) -> None:
    at %= len(seed)
    check(seed[:at] + put.encode() + seed[at + cut :])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)
PATHS = [
    ("metadata",), ("metadata", "labels"), ("metadata", "annotations"), ("metadata", "name"),
    ("spec",), ("spec", "selector"), ("spec", "mtls"), ("spec", "portLevelMtls"),
    ("spec", "address"),
    ("spec", "ports"), ("spec", "endpoints"), ("spec", "hosts"), ("spec", "workloadSelector"),
    ("kind",), ("apiVersion",), ("spec", "rules"), ("spec", "action"), ("spec", "identities"),
    ("spec", "targetRefs"),
]  # fmt: skip


@settings(max_examples=500, deadline=None)
@given(st.sampled_from(SEEDS[:6]), st.sampled_from(PATHS), JSON)
def test_config_any_value_anywhere_is_answered(
    seed: bytes, path: tuple[str, ...], value: object
) -> None:
    document = json.loads(seed)
    place = document
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    check(json.dumps(document).encode())


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.text(max_size=10), st.text(max_size=10), max_size=4))
def test_config_text_in_quotes_is_never_changed(labels: dict[str, str]) -> None:
    """Read back, quoted text is what was written, or the document is refused."""
    text = peer("a/b").replace('"name"', f'"labels": {json.dumps(labels)}, "name"')
    loaded = load(text.encode(), "f")
    assert loaded.errors or loaded.documents[0].metadata.labels == labels


@pytest.mark.parametrize("seed", range(len(SEEDS) - 1))
def test_config_every_prefix_of_a_document_is_answered(seed: int) -> None:
    """Half a file must not count as a whole one: of these, only the whole has documents."""
    data = SEEDS[seed]
    for end in range(len(data)):
        check(data[:end])
        assert not load(data[:end], "f").documents
