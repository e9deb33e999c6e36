"""The grammar of SPIFFE IDs: what is accepted, what is refused, and that nothing is repaired."""

from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ztunnel.spiffe import MAX_ID_BYTES, MAX_TRUST_DOMAIN_BYTES, SpiffeId, SpiffeIdError

TRUST_DOMAIN = string.ascii_lowercase + string.digits + ".-_"
SEGMENT = string.ascii_letters + string.digits + ".-_"

trust_domains = st.text(TRUST_DOMAIN, min_size=1, max_size=MAX_TRUST_DOMAIN_BYTES)
segments = st.text(SEGMENT, min_size=1, max_size=40).filter(lambda text: text not in {".", ".."})
paths = st.lists(segments, max_size=8).map(lambda parts: "".join(f"/{part}" for part in parts))


def attempt(text: str) -> tuple[SpiffeIdError | None, SpiffeId | None]:
    """Return the error or the identity that parsing `text` gives."""
    try:
        return None, SpiffeId.parse(text)
    except SpiffeIdError as error:
        return error, None


@given(trust_domains, paths)
def test_every_id_of_the_grammar_round_trips(trust_domain: str, path: str) -> None:
    text = f"spiffe://{trust_domain}{path}"
    identity = SpiffeId.parse(text)
    assert (identity.trust_domain, identity.path, str(identity)) == (trust_domain, path, text)
    assert identity == SpiffeId(trust_domain, path)


@given(st.text())
def test_any_text_is_refused_or_is_its_own_spelling(text: str) -> None:
    for candidate in (text, f"spiffe://{text}", f"spiffe://cluster.local/{text}"):
        refused, identity = attempt(candidate)
        if identity is not None:
            assert str(identity) == candidate
            assert set(identity.trust_domain) <= set(TRUST_DOMAIN)
            assert set(identity.path) <= set(SEGMENT + "/")
        if refused is not None:
            assert 0 <= refused.position <= len(candidate)
            assert str(refused).isprintable()
            assert str(refused).isascii()


@given(trust_domains, segments, segments)
def test_the_kubernetes_form_round_trips(domain: str, namespace: str, account: str) -> None:
    identity = SpiffeId.workload(domain, namespace, account)
    assert SpiffeId.parse(str(identity)) == identity
    assert (identity.namespace, identity.service_account) == (namespace, account)


@pytest.mark.parametrize(
    "text, position",
    [
        ("", 0),
        ("spiffe:/cluster.local/a", 0),
        ("https://cluster.local/a", 0),
        ("SPIFFE://cluster.local/a", 0),
        (" spiffe://cluster.local/a", 0),
        ("\0spiffe://cluster.local/a", 0),
        ("spi\tffe://cluster.local/a", 0),
        ("spiffe://", 9),
        ("spiffe:///ns/a", 9),
        ("spiffe://Cluster.local/a", 9),
        ("spiffe://user@cluster.local/a", 13),
        ("spiffe://cluster.local:443/a", 22),
        ("spiffe://cluster.local?x=1", 22),
        ("spiffe://cluster.local#x", 22),
        ("spiffe://cluster.local\n", 22),
        ("spiffe://cluster%2elocal/a", 16),
        ("spiffe://clüster.local/a", 11),
        ("spiffe://[::1]/a", 9),
        ("spiffe://cluster.local/", 23),
        ("spiffe://cluster.local//a", 23),
        ("spiffe://cluster.local/a/", 25),
        ("spiffe://cluster.local/a//b", 25),
        ("spiffe://cluster.local/./a", 23),
        ("spiffe://cluster.local/../a", 23),
        ("spiffe://cluster.local/a/..", 25),
        ("spiffe://cluster.local/a?b", 24),
        ("spiffe://cluster.local/a#b", 24),
        ("spiffe://cluster.local/a%2fb", 24),
        ("spiffe://cluster.local/a\n", 24),
        ("spiffe://cluster.local/a\0", 24),
        ("spiffe://cluster.local/a\0.example.com", 24),
        ("spiffe://cluster.local/a b", 24),
        ("spiffe://cluster.local/a*", 24),
        ("spiffe://cluster.local/é", 23),
        ("spiffe://cluster.local/１", 23),
        ("spiffe://" + "a" * 256 + "/x", 9 + 255),
        ("spiffe://a/" + "b" * 2048, MAX_ID_BYTES),
    ],
)
def test_what_is_no_spiffe_id_is_refused_at_its_place(text: str, position: int) -> None:
    with pytest.raises(SpiffeIdError) as caught:
        SpiffeId.parse(text)
    assert caught.value.position == position
    assert "\n" not in str(caught.value)
    assert "\0" not in str(caught.value)


def test_the_longest_id_is_accepted_and_one_byte_more_is_not() -> None:
    longest = "spiffe://a/" + "b" * (MAX_ID_BYTES - len("spiffe://a/"))
    assert str(SpiffeId.parse(longest)) == longest
    with pytest.raises(SpiffeIdError):
        SpiffeId.parse(longest + "b")
    with pytest.raises(SpiffeIdError):
        SpiffeId("a", "/" + "b" * MAX_ID_BYTES)


@pytest.mark.parametrize(
    "namespace, account",
    [("a/sa/admin", "b"), ("", "b"), ("a", ""), ("..", "b"), ("a", "b/c"), ("a", "b\n")],
)
def test_a_name_cannot_add_segments(namespace: str, account: str) -> None:
    with pytest.raises(SpiffeIdError):
        SpiffeId.workload("cluster.local", namespace, account)


@pytest.mark.parametrize(
    "path", ["", "/ns/a", "/ns/a/sa", "/ns/a/sa/b/c", "/NS/a/sa/b", "/x/ns/a/sa/b", "/ns/a/xx/b"]
)
def test_other_forms_have_no_kubernetes_names(path: str) -> None:
    identity = SpiffeId("cluster.local", path)
    assert identity.namespace is None
    assert identity.service_account is None


def test_a_path_without_slash_is_refused() -> None:
    with pytest.raises(SpiffeIdError):
        SpiffeId("cluster.local", "ns/a")


def test_identities_are_values() -> None:
    first = SpiffeId.parse("spiffe://cluster.local/ns/a/sa/b")
    assert {first, SpiffeId.workload("cluster.local", "a", "b")} == {first}
    with pytest.raises(AttributeError):
        first.path = "/ns/a/sa/admin"  # type: ignore[misc]  # that nothing may do this is the test
