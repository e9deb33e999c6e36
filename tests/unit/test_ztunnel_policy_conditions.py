"""Patterns of AuthorizationPolicy, by Istio's reference (Source, Operation, Condition)."""

from __future__ import annotations

import pytest

from support.mesh_state import ip
from ztunnel.policy.conditions import Facts, facts, read
from ztunnel.protocol import Attribute, Condition
from ztunnel.spiffe import SpiffeId

A = Attribute


def seen(
    identity: str | None = "spiffe://cluster.local/ns/shop/sa/till",
    source: str = "10.1.0.1",
    destination: str = "10.2.0.1",
    port: int = 8080,
) -> Facts:
    parsed = SpiffeId.parse(identity) if identity is not None else None
    return facts(parsed, ip(source), ip(destination), port)


def holds(condition: Condition, what: Facts) -> bool:
    return read((condition,)).holds(what)


@pytest.mark.parametrize(
    "attribute, pattern, expected",
    [
        (A.PRINCIPAL, "cluster.local/ns/shop/sa/till", True),
        (A.PRINCIPAL, "cluster.local/ns/shop/sa/til", False),
        (A.PRINCIPAL, "cluster.local/ns/shop/sa/till2", False),
        (A.PRINCIPAL, "cluster.local/ns/shop/sa/TILL", False),
        (A.PRINCIPAL, "cluster.local/ns/shop/*", True),
        (A.PRINCIPAL, "cluster.local/ns/sho*", True),
        (A.PRINCIPAL, "cluster.local/ns/shops*", False),
        (A.PRINCIPAL, "*/sa/till", True),
        (A.PRINCIPAL, "*/ns/shop/sa/till", True),
        (A.PRINCIPAL, "*/sa/il", False),
        (A.PRINCIPAL, "*", True),
        # Characters that other pattern languages honour stand for themselves.
        (A.PRINCIPAL, "cluster.local/ns/shop/sa/til?", False),
        (A.PRINCIPAL, "cluster.local/ns/shop/sa/[t]ill", False),
        (A.PRINCIPAL, "cluster.local/ns/shop/sa/t.*", False),
        (A.PRINCIPAL, "clusterxlocal/ns/shop/sa/till", False),
        # A pattern longer than the value, and one as long.
        (A.PRINCIPAL, "cluster.local/ns/shop/sa/till-and-more*", False),
        (A.PRINCIPAL, "cluster.local/ns/shop/sa/till*", True),
        (A.PRINCIPAL, "*cluster.local/ns/shop/sa/till", True),
        (A.PRINCIPAL, "*xcluster.local/ns/shop/sa/till", False),
        (A.NAMESPACE, "shop", True),
        (A.NAMESPACE, "sh*", True),
        (A.NAMESPACE, "*op", True),
        (A.NAMESPACE, "*", True),
        (A.NAMESPACE, "shop-test", False),
        (A.SERVICE_ACCOUNT, "shop/till", True),
        (A.SERVICE_ACCOUNT, "other/till", False),
        (A.SERVICE_ACCOUNT, "*/till", True),
        (A.SERVICE_ACCOUNT, "shop/*", True),
        (A.SOURCE_IP, "10.1.0.1", True),
        (A.SOURCE_IP, "10.1.0.2", False),
        (A.SOURCE_IP, "10.1.0.0/16", True),
        (A.SOURCE_IP, "10.1.0.0/31", True),
        (A.SOURCE_IP, "10.1.0.2/31", False),
        (A.SOURCE_IP, "10.1.255.255/16", True),
        (A.SOURCE_IP, "0.0.0.0/0", True),
        (A.SOURCE_IP, "::ffff:10.1.0.1", True),
        (A.SOURCE_IP, "::ffff:10.1.0.0/112", True),
        (A.SOURCE_IP, "::ffff:0:0/96", True),
        (A.SOURCE_IP, "::/0", False),
        (A.SOURCE_IP, "::/80", False),
        (A.SOURCE_IP, "::8000:0:0/81", False),
        (A.SOURCE_IP, "fd00::/8", False),
        (A.DESTINATION_IP, "10.2.0.1", True),
        (A.DESTINATION_IP, "10.1.0.1", False),
        (A.DESTINATION_PORT, "8080", True),
        (A.DESTINATION_PORT, "808", False),
        (A.DESTINATION_PORT, "65535", False),
    ],
)
def test_a_pattern_matches_what_it_says(attribute: Attribute, pattern: str, expected: bool) -> None:
    assert holds(Condition(attribute, (pattern,)), seen()) is expected
    # The negative is exactly the opposite.
    assert holds(Condition(attribute, not_values=(pattern,)), seen()) is not expected


@pytest.mark.parametrize(
    "pattern, source, expected",
    [
        ("fd00::/8", "fd12::1", True),
        ("fd00::/8", "fe12::1", False),
        ("::/0", "fd12::1", True),
        ("0.0.0.0/0", "fd12::1", False),
        ("0.0.0.0/0", "::1", False),
        ("fd00:0:0::1", "fd00::1", True),
        ("fd00::1/127", "fd00::", True),
    ],
)
def test_networks_hold_addresses_of_their_own_family(
    pattern: str, source: str, expected: bool
) -> None:
    assert holds(Condition(A.SOURCE_IP, (pattern,)), seen(source=source)) is expected


@pytest.mark.parametrize("attribute", [A.PRINCIPAL, A.NAMESPACE, A.SERVICE_ACCOUNT])
@pytest.mark.parametrize("pattern", ["*", "a*", "*/a", "x/a"])
def test_a_caller_without_identity_matches_no_positive_pattern_and_every_negative(
    attribute: Attribute, pattern: str
) -> None:
    plaintext = seen(None)
    assert not holds(Condition(attribute, (pattern,)), plaintext)
    assert holds(Condition(attribute, not_values=(pattern,)), plaintext)


def test_an_identity_of_another_form_has_a_principal_but_no_namespace() -> None:
    other = seen("spiffe://cluster.local/build/runner")
    assert holds(Condition(A.PRINCIPAL, ("cluster.local/build/*",)), other)
    assert not holds(Condition(A.NAMESPACE, ("*",)), other)
    assert not holds(Condition(A.SERVICE_ACCOUNT, ("*",)), other)
    assert holds(Condition(A.NAMESPACE, not_values=("shop",)), other)


def test_values_are_alternatives_and_each_excluded_one_excludes() -> None:
    condition = Condition(A.NAMESPACE, ("a", "sh*"), ("shop-*", "shoe"))
    for namespace, expected in (("shop", True), ("a", True), ("b", False), ("shoe", False)):
        identity = f"spiffe://cluster.local/ns/{namespace}/sa/x"
        assert holds(condition, seen(identity)) is expected


@pytest.mark.parametrize(
    "attribute, pattern",
    [
        (A.PRINCIPAL, ""),
        (A.PRINCIPAL, "**"),
        (A.PRINCIPAL, "*a*"),
        (A.PRINCIPAL, "a*b"),
        (A.PRINCIPAL, "cluster.local/ns/a/sa/b\n"),
        (A.PRINCIPAL, "cluster.local/ns/a/sa/b "),
        (A.PRINCIPAL, "cluster.local/ns/ä/sa/b"),
        (A.PRINCIPAL, "spiffe://cluster.local/ns/a/sa/b"),
        (A.PRINCIPAL, "*spiffe://cluster.local/ns/a/sa/b"),
        (A.PRINCIPAL, "x" * 2049),
        (A.SERVICE_ACCOUNT, "till"),
        (A.SERVICE_ACCOUNT, "a/b/c"),
        (A.SOURCE_IP, ""),
        (A.SOURCE_IP, "*"),
        (A.SOURCE_IP, "10.*"),
        (A.SOURCE_IP, "10.0.0.1/33"),
        (A.SOURCE_IP, "10.0.0.1/"),
        (A.SOURCE_IP, "10.0.0.1/08"),
        (A.SOURCE_IP, "10.0.0.1/+8"),
        (A.SOURCE_IP, "10.0.0.1/8/8"),
        (A.SOURCE_IP, "10.0.0.0/255.0.0.0"),
        (A.SOURCE_IP, "10.0.0.0/0.255.255.255"),
        (A.SOURCE_IP, "010.0.0.1"),
        (A.SOURCE_IP, "127.1"),
        (A.SOURCE_IP, "localhost"),
        (A.SOURCE_IP, "fe80::1%eth0"),
        (A.SOURCE_IP, "fd00::/129"),
        (A.SOURCE_IP, "::ffff:0:0/95"),
        (A.SOURCE_IP, "::ffff:10.0.0.0/8"),
        (A.DESTINATION_IP, "10.0.0.1\n"),
        (A.DESTINATION_PORT, ""),
        (A.DESTINATION_PORT, "0"),
        (A.DESTINATION_PORT, "65536"),
        (A.DESTINATION_PORT, "080"),
        (A.DESTINATION_PORT, "+80"),
        (A.DESTINATION_PORT, "8_0"),
        (A.DESTINATION_PORT, "80\n"),
        (A.DESTINATION_PORT, "８０"),
        (A.DESTINATION_PORT, "80-90"),
        (A.DESTINATION_PORT, "*"),
        (A.DESTINATION_PORT, "http"),
        (A.DESTINATION_PORT, "9" * 5000),
    ],
)
def test_what_is_no_pattern_is_refused_with_a_remedy(attribute: Attribute, pattern: str) -> None:
    for condition in (Condition(attribute, (pattern,)), Condition(attribute, (), (pattern,))):
        with pytest.raises(ValueError, match="is no pattern: ") as refusal:
            read((condition,))
        assert str(refusal.value).isprintable()
        assert len(str(refusal.value)) < 250


def test_a_condition_that_asks_for_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="asks for nothing"):
        read((Condition(A.PRINCIPAL),))
