"""Attacks on what is read as configuration: nesting, and selectors that reach too far."""

from __future__ import annotations

import pytest

from nodeagent import api, mesh
from nodeagent.settings import Settings
from support.resources import authorization, docs, peer, read, workload
from ztunnel import protocol
from ztunnel.protocol import FrameDecoder, Mode, ProtocolError

DEEP = 500_000

NESTED = {
    "lists": b"\x91" * DEEP + b"\xc0",
    "maps": b"\x81\xa1a" * DEEP + b"\xc0",
    # What stands before the tag has to be skipped to find it.
    "before the tag": b"\x82\xa1a" + b"\x91" * DEEP + b"\xc0" + b"\xa1t\xa5hello",
    "inside a field": b"\x83\xa1t\xa5query\xa2id\x01\xa4args" + b"\x91" * DEEP + b"\xc0",
}


@pytest.mark.parametrize("why", NESTED)
def test_a_deeply_nested_message_ends_the_conversation(why: str) -> None:
    body = NESTED[why]
    with pytest.raises(ProtocolError, match="malformed message"):
        FrameDecoder().feed(protocol.HEADER.pack(len(body), 0) + body)


ESCAPES = [
    {"k8s:io.kubernetes.pod.namespace": "shop"},
    {"io.kubernetes.pod.namespace": "shop"},
    {"namespace": "shop"},
    {"kubernetes.io/metadata.name": "shop"},
]


@pytest.mark.parametrize("labels", ESCAPES, ids=lambda labels: next(iter(labels)))
def test_no_label_leads_out_of_a_namespace(labels: dict[str, str]) -> None:
    target = workload("shop/web", "10.0.0.1", netns="web", labels={"app": "web"})
    texts = [
        peer("evil/p", "DISABLE", selector=labels),
        authorization("evil/a", "ALLOW", [{}], selector=labels),
    ]
    for text in texts:
        loaded = api.load(docs(text), "f", "n1")
        if loaded.errors:
            # No key of a label at all: refused where it is written.
            assert "matchLabels" in loaded.errors[0].field
            continue
        state = mesh.build([*read(target), *loaded.documents], Settings(node="n1"))
        assert state.policies["shop/web"].mode is Mode.PERMISSIVE
        assert not state.authorizations
