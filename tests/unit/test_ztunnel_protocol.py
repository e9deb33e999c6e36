from __future__ import annotations

import msgspec
import pytest

from ztunnel.protocol import (
    HEADER,
    PROTOCOL_VERSION,
    Action,
    Attribute,
    Authorization,
    Condition,
    FrameDecoder,
    ProtocolError,
    Rule,
    Update,
    encode,
)

POLICY = Authorization(
    "AuthorizationPolicy/shop/who-may-pay",
    Action.DENY,
    (
        Rule("shop/who-may-pay rules[0] (shop.yaml:3)"),
        Rule(
            "shop/who-may-pay rules[1] (shop.yaml:3)",
            sources=(
                (
                    Condition(Attribute.PRINCIPAL, ("cluster.local/ns/shop/sa/*",)),
                    Condition(Attribute.SOURCE_IP, not_values=("10.0.0.0/8", "fd00::1")),
                ),
                (Condition(Attribute.SERVICE_ACCOUNT, ("shop/till",)),),
            ),
            operations=((Condition(Attribute.DESTINATION_PORT, ("8080", "9090")),),),
            conditions=(
                Condition(Attribute.NAMESPACE, ("*",), ("*-test",)),
                Condition(Attribute.DESTINATION_IP, ("fd00::/8",)),
            ),
            unread=("rules[1].to[0].operation.methods",),
        ),
    ),
    "shop/who-may-pay (shop.yaml:3)",
    "shop",
    ("shop/pay-1", "shop/pay-2"),
    dry_run=True,
)


@pytest.mark.parametrize(
    "policy",
    [
        POLICY,
        Authorization("AuthorizationPolicy/istio-system/none", Action.ALLOW, (), "x"),
        # No workload of this node is selected, and no selector: two different things.
        msgspec.structs.replace(POLICY, workloads=()),
        msgspec.structs.replace(POLICY, workloads=None),
    ],
)
def test_an_authorization_comes_out_as_it_went_in(policy: Authorization) -> None:
    sent = Update(7, (policy,))
    (frame,) = FrameDecoder().feed(encode(sent))
    assert frame.message == sent


def test_peers_of_the_release_before_are_told_apart() -> None:
    assert PROTOCOL_VERSION == 5


@pytest.mark.parametrize(
    "field, value",
    [
        ("action", "CUSTOM"),
        ("action", "allow"),
        ("rules", None),
        ("rules", [{"t": "rule", "origin": "x", "unknown": 1}]),
        (
            "rules",
            [{"t": "rule", "origin": "x", "conditions": [{"t": "condition", "attribute": "ip"}]}],
        ),
        ("workloads", "shop/pay"),
        ("dry_run", "false"),
        ("verdict", "ALLOW"),
    ],
)
def test_what_is_no_authorization_ends_the_conversation(field: str, value: object) -> None:
    document = msgspec.to_builtins(Update(1, (POLICY,)))
    document["upserts"][0][field] = value
    body = msgspec.msgpack.encode(document)
    with pytest.raises(ProtocolError, match="malformed"):
        FrameDecoder().feed(HEADER.pack(len(body), 0) + body)
