"""What a peer's chain must be: every rule of the X509-SVID specification, and every known trap."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, ObjectIdentifier
from hypothesis import given
from hypothesis import strategies as st

from support.certificates import NOW, Identity, Key, Usage, authority, issue, workload
from ztunnel import svid
from ztunnel.svid import SvidError, SvidReason, VerifiedPeer, validate

ID = "spiffe://cluster.local/ns/default/sa/sleep"


@functools.cache
def root() -> Identity:
    return authority()


@functools.cache
def foreign() -> Identity:
    return authority("foreign.example")


@functools.cache
def intermediate() -> Identity:
    return authority(issuer=root())


def weak_rsa() -> Key:
    return rsa.generate_private_key(65537, 1024)  # noqa: S505 - its weakness is the test


def check(
    chain: Sequence[Identity | bytes], now: float = NOW, **bundles: Sequence[Identity]
) -> VerifiedPeer:
    """Validate `chain` against the bundles of cluster.local and foreign.example."""
    held: dict[str, tuple[bytes, ...]] = {
        "cluster.local": (root().der,),
        "foreign.example": (foreign().der,),
    }
    for domain, roots in bundles.items():
        held[domain.replace("_", ".")] = tuple(each.der for each in roots)
    return validate([each if isinstance(each, bytes) else each.der for each in chain], held, now)


def refusal(
    chain: Sequence[Identity | bytes], now: float = NOW, **bundles: Sequence[Identity]
) -> SvidReason:
    with pytest.raises(SvidError) as caught:
        check(chain, now, **bundles)
    assert str(caught.value).isprintable()
    return caught.value.reason


def test_a_correct_svid_is_accepted() -> None:
    leaf = workload(intermediate())
    peer = check([leaf, intermediate()])
    assert str(peer.id) == ID
    assert (peer.id.namespace, peer.id.service_account) == ("default", "sleep")
    assert peer.not_after == NOW + 3600
    assert peer.serial == leaf.certificate.serial_number
    assert peer.fingerprint == leaf.certificate.fingerprint(hashes.SHA256()).hex()
    assert peer.subject == ""


def test_signed_by_the_root_itself_is_accepted() -> None:
    assert str(check([workload(root())]).id) == ID


def test_the_root_may_be_sent_too() -> None:
    assert str(check([workload(intermediate()), intermediate(), root()]).id) == ID


def test_intermediates_may_come_in_any_order() -> None:
    lower = authority(issuer=intermediate(), subject="lower")
    assert str(check([workload(lower), intermediate(), lower]).id) == ID


def test_other_kinds_of_names_beside_the_id_are_allowed() -> None:
    assert str(check([workload(root(), dns=["sleep.default.svc"])]).id) == ID


def test_a_subject_is_reported_cut_and_printable() -> None:
    peer = check([workload(root(), subject="a\nb" + "c" * 50)])
    assert peer.subject.isprintable()
    assert peer.subject.startswith("CN=a")
    long = check([workload(root(), subject="\0" * 60)])
    assert len(long.subject) <= 256


def test_the_end_of_the_path_is_the_end_of_the_identity() -> None:
    short = authority(issuer=root(), subject="short", not_after=NOW + 100)
    assert check([workload(short), short]).not_after == NOW + 100


def test_a_2048_byte_id_is_accepted() -> None:
    longest = "spiffe://cluster.local/" + "a" * (2048 - len("spiffe://cluster.local/"))
    assert str(check([workload(root(), longest)]).id) == longest


@pytest.mark.parametrize(
    "make",
    [
        lambda: ec.generate_private_key(ec.SECP384R1()),
        lambda: rsa.generate_private_key(65537, 2048),
        ed25519.Ed25519PrivateKey.generate,
    ],
)
def test_other_strong_keys_are_accepted(make: Callable[[], Any]) -> None:
    signer = authority(issuer=root(), key=make(), subject="other")
    assert str(check([workload(signer, key=make()), signer]).id) == ID


# --- names -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "uris",
    [
        (),
        (ID, "spiffe://cluster.local/ns/default/sa/admin"),
        (ID, ID),
        (ID, "https://example.com/"),
        ("https://cluster.local/ns/default/sa/sleep",),
        ("spiffe://cluster.local",),
        ("spiffe://cluster.local/",),
        ("SPIFFE://cluster.local/ns/a/sa/b",),
        ("spiffe://Cluster.local/ns/a/sa/b",),
        (ID + "\0",),
        (ID + "\0.example.com",),
        (ID + "\n",),
        ("spiffe://cluster.local\0.evil/ns/a/sa/b",),
        (ID + "?admin",),
        (ID + "/../admin",),
        ("spiffe://user@cluster.local/ns/a/sa/b",),
        ("spiffe://cluster.local/" + "a" * 2048,),
        ("",),
    ],
)
def test_a_leaf_without_exactly_one_spiffe_id_is_refused(uris: tuple[str, ...]) -> None:
    leaf = workload(root(), uris=uris, dns=["x"])
    assert refusal([leaf]) is SvidReason.BAD_IDENTITY


def test_an_unreadable_name_is_refused() -> None:
    latin = bytes.fromhex("300b8609") + b"spiffe://\xe9"[:9]
    raw = x509.UnrecognizedExtension(ObjectIdentifier("2.5.29.17"), latin)
    leaf = workload(root(), uris=(), extra=[(raw, True)])
    assert refusal([leaf]) in {SvidReason.MALFORMED, SvidReason.BAD_IDENTITY}


def test_an_unknown_trust_domain_is_refused_and_named() -> None:
    with pytest.raises(SvidError, match=r"cluster\.local\.evil") as caught:
        check([workload(root(), "spiffe://cluster.local.evil/ns/a/sa/b")])
    assert caught.value.reason is SvidReason.UNTRUSTED_DOMAIN


def test_a_foreign_root_cannot_sign_our_identities() -> None:
    assert refusal([workload(foreign())]) is SvidReason.UNKNOWN_ISSUER
    between = authority("foreign.example", issuer=foreign())
    assert refusal([workload(between), between, foreign()]) is SvidReason.UNKNOWN_ISSUER


def test_our_root_cannot_sign_foreign_identities() -> None:
    leaf = workload(root(), "spiffe://foreign.example/ns/a/sa/b")
    assert refusal([leaf]) is SvidReason.UNKNOWN_ISSUER
    assert (
        check([workload(foreign(), "spiffe://foreign.example/ns/a/sa/b")]).id.path == "/ns/a/sa/b"
    )


def test_a_root_of_the_same_name_with_another_key_is_refused() -> None:
    assert refusal([workload(authority())]) in {SvidReason.UNKNOWN_ISSUER, SvidReason.BAD_SIGNATURE}


def test_an_empty_bundle_trusts_nothing() -> None:
    assert refusal([workload(root())], cluster_local=()) is SvidReason.UNKNOWN_ISSUER


def test_a_peer_cannot_bring_its_own_root() -> None:
    own = authority(subject="own root")
    assert refusal([workload(own), own]) is SvidReason.UNKNOWN_ISSUER


# --- leaf --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"is_ca": True},
        {"is_ca": True, "usage": Usage(digital_signature=True, key_cert_sign=True)},
        {"usage": None},
        {"usage": Usage(digital_signature=True, critical=False)},
        {"usage": Usage()},
        {"usage": Usage(crl_sign=True)},
        {"usage": Usage(digital_signature=True, key_cert_sign=True)},
        {"usage": Usage(digital_signature=True, crl_sign=True)},
        {"purposes": [ExtendedKeyUsageOID.SERVER_AUTH]},
        {"purposes": [ExtendedKeyUsageOID.CLIENT_AUTH]},
        {"purposes": [ExtendedKeyUsageOID.CODE_SIGNING]},
        {"purposes": [ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE]},
        {"names_critical": False},
    ],
)
def test_a_leaf_that_may_not_authenticate_is_refused(wrong: dict[str, Any]) -> None:
    assert refusal([workload(root(), **wrong)]) is SvidReason.BAD_LEAF


@pytest.mark.parametrize(
    "right",
    [
        {"purposes": None},
        {"is_ca": None},
        {"names_critical": False, "subject": "sleep"},
    ],
)
def test_what_the_specification_leaves_open_is_accepted(right: dict[str, Any]) -> None:
    assert str(check([workload(root(), **right)]).id) == ID


def test_a_signing_certificate_cannot_authenticate() -> None:
    signer = authority(issuer=root(), uris=[ID], usage=Usage(key_cert_sign=True))
    assert refusal([signer]) is SvidReason.BAD_LEAF


def test_a_trusted_leaf_is_no_anchor_of_itself() -> None:
    own = workload(None, subject="self")
    assert refusal([own], cluster_local=[own]) is SvidReason.UNKNOWN_ISSUER
    leaf = workload(root())
    assert refusal([leaf], cluster_local=[leaf]) is SvidReason.UNKNOWN_ISSUER


# --- time --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "now, reason",
    [
        (NOW - 61, SvidReason.NOT_YET_VALID),
        (NOW - 60.5, SvidReason.NOT_YET_VALID),
        (NOW - 60, None),
        (NOW + 3600, None),
        (NOW + 3600.9, None),
        (NOW + 3601, SvidReason.EXPIRED),
        (NOW + 10**8, SvidReason.EXPIRED),
        (0, SvidReason.NOT_YET_VALID),
    ],
)
def test_validity_is_that_of_rfc_5280(now: float, reason: SvidReason | None) -> None:
    leaf = workload(root())
    if reason is None:
        assert str(check([leaf], now).id) == ID
    else:
        assert refusal([leaf], now=now) is reason


@pytest.mark.parametrize(
    "times, reason",
    [
        ({"not_after": NOW - 5}, SvidReason.EXPIRED),
        ({"not_before": NOW + 5}, SvidReason.NOT_YET_VALID),
    ],
)
def test_the_validity_of_issuers_counts(times: dict[str, Any], reason: SvidReason) -> None:
    between = authority(issuer=root(), **times)
    assert refusal([workload(between), between]) is reason
    top = authority(subject="another root", **times)
    assert refusal([workload(top)], cluster_local=[top]) is reason


# --- issuers -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"is_ca": False},
        {"is_ca": None},
        {"usage": None},
        {"usage": Usage(digital_signature=True)},
        {"usage": Usage(crl_sign=True)},
        {"usage": Usage(key_cert_sign=True, critical=False)},
        {"uris": ["spiffe://cluster.local/ns/a/sa/b"]},
        {"uris": ["spiffe://cluster.local/"]},
        {"uris": ["SPIFFE://cluster.local"]},
        {"uris": ["spiffe://cluster.local", "spiffe://cluster.local"]},
        {"purposes": [ExtendedKeyUsageOID.SERVER_AUTH]},
        {"purposes": [ExtendedKeyUsageOID.CODE_SIGNING]},
    ],
)
def test_an_intermediate_that_may_not_sign_is_refused(wrong: dict[str, Any]) -> None:
    between = authority(issuer=root(), **wrong)
    assert refusal([workload(between), between]) in {
        SvidReason.BAD_ISSUER,
        SvidReason.UNKNOWN_ISSUER,
    }


@pytest.mark.parametrize(
    "right",
    [
        {"uris": []},
        {"uris": ["https://ca.example/"]},
        {"purposes": [ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE]},
        {"path_length": 0},
    ],
)
def test_other_intermediates_are_accepted(right: dict[str, Any]) -> None:
    between = authority(issuer=root(), **right)
    assert str(check([workload(between), between]).id) == ID


def test_a_workload_cannot_sign_for_others() -> None:
    sleep = workload(root(), subject="sleep")
    forged = workload(sleep, "spiffe://cluster.local/ns/kube-system/sa/admin")
    assert refusal([forged, sleep]) in {SvidReason.BAD_ISSUER, SvidReason.UNKNOWN_ISSUER}


@pytest.mark.parametrize(
    "wrong",
    [
        {"is_ca": False},
        {"usage": None},
        {"usage": Usage(digital_signature=True)},
        {"uris": ["spiffe://cluster.local/ns/a/sa/b"]},
        {"key": weak_rsa()},
    ],
)
def test_a_root_that_may_not_sign_is_no_anchor(wrong: dict[str, Any]) -> None:
    top = authority(subject="odd root", **wrong)
    assert refusal([workload(top)], cluster_local=[top]) is SvidReason.UNKNOWN_ISSUER
    assert len(svid.unusable_roots([root().der, top.der, b"garbage"])) == 2


def test_a_bad_root_does_not_spoil_the_good_ones() -> None:
    bundles = {"cluster.local": (b"garbage", b"", b"\0" * (1 << 20), root().der)}
    assert str(validate([workload(root()).der], bundles, NOW).id) == ID


def test_the_path_length_is_obeyed() -> None:
    narrow = authority(issuer=root(), path_length=0, subject="narrow")
    below = authority(issuer=narrow, subject="below")
    assert str(check([workload(narrow), narrow]).id) == ID
    assert refusal([workload(below), below, narrow]) is SvidReason.BAD_PATH


def test_name_constraints_are_obeyed() -> None:
    only = x509.NameConstraints([x509.UniformResourceIdentifier("other.example")], None)
    between = authority(issuer=root(), subject="constrained", uris=[], extra=[(only, True)])
    assert refusal([workload(between), between]) is SvidReason.BAD_PATH


def test_an_unknown_critical_extension_is_refused() -> None:
    unknown = x509.UnrecognizedExtension(ObjectIdentifier("1.3.6.1.4.1.55555.1"), b"\5\0")
    assert refusal([workload(root(), extra=[(unknown, True)])]) is SvidReason.BAD_PATH
    assert str(check([workload(root(), extra=[(unknown, False)])]).id) == ID
    between = authority(issuer=root(), subject="odd", extra=[(unknown, True)])
    assert refusal([workload(between), between]) is SvidReason.BAD_PATH


def test_a_missing_intermediate_is_an_unknown_issuer() -> None:
    assert refusal([workload(intermediate())]) is SvidReason.UNKNOWN_ISSUER


def test_a_bundle_may_hold_an_intermediate() -> None:
    leaf = workload(intermediate())
    assert str(check([leaf], cluster_local=[intermediate()]).id) == ID
    assert refusal([workload(root())], cluster_local=[intermediate()]) is SvidReason.UNKNOWN_ISSUER


def test_old_and_new_root_are_both_trusted_while_both_are_held() -> None:
    old, new = authority(), authority()
    for signer in (old, new):
        assert str(check([workload(signer)], cluster_local=[old, new]).id) == ID
    assert refusal([workload(old)], cluster_local=[new]) in {
        SvidReason.UNKNOWN_ISSUER,
        SvidReason.BAD_SIGNATURE,
    }


# --- keys and signatures -----------------------------------------------------------------------


def test_weak_keys_are_refused() -> None:
    weak: list[Key] = [weak_rsa(), ec.generate_private_key(ec.SECP256K1())]
    for key in weak:
        assert refusal([workload(root(), key=key)]) is SvidReason.WEAK_ALGORITHM
        between = authority(issuer=root(), key=key, subject="weak")
        assert refusal([workload(between), between]) in {
            SvidReason.WEAK_ALGORITHM,
            SvidReason.BAD_PATH,
        }


def test_weak_signatures_are_refused() -> None:
    leaf = workload(root(), digest=hashes.SHA224())
    assert refusal([leaf]) is SvidReason.WEAK_ALGORITHM
    between = authority(issuer=root(), digest=hashes.SHA224())
    assert refusal([workload(between), between]) is SvidReason.WEAK_ALGORITHM


def test_a_changed_signature_is_refused() -> None:
    der = workload(root()).der
    assert refusal([der[:-1] + bytes([der[-1] ^ 1])]) is SvidReason.BAD_SIGNATURE


@given(st.integers(min_value=0), st.integers(min_value=0, max_value=7))
def test_no_changed_bit_is_accepted(position: int, bit: int) -> None:
    der = bytearray(_leaf().der)
    der[position % len(der)] ^= 1 << bit
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert isinstance(refusal([bytes(der)]), SvidReason)


@functools.cache
def _leaf() -> Identity:
    return workload(root())


# --- size and garbage --------------------------------------------------------------------------


def test_no_certificate_is_refused() -> None:
    assert refusal([]) is SvidReason.MALFORMED


@pytest.mark.parametrize("length", [9, 1000])
def test_a_long_chain_is_refused_before_it_is_parsed(length: int) -> None:
    assert refusal([b"garbage"] * length) is SvidReason.TOO_LARGE


def test_a_chain_as_long_as_the_limit_is_accepted() -> None:
    signers = [root()]
    for depth in range(svid.MAX_CHAIN_LENGTH - 1):
        signers.append(authority(issuer=signers[-1], subject=f"level {depth}"))
    chain = [workload(signers[-1]), *reversed(signers[1:])]
    assert len(chain) == svid.MAX_CHAIN_LENGTH
    assert str(check(chain).id) == ID


def test_an_oversized_certificate_is_refused() -> None:
    assert refusal([bytes(svid.MAX_CERTIFICATE_BYTES + 1)]) is SvidReason.TOO_LARGE
    padding = x509.UnrecognizedExtension(ObjectIdentifier("1.3.6.1.4.1.55555.2"), bytes(20_000))
    assert refusal([workload(root(), extra=[(padding, False)])]) is SvidReason.TOO_LARGE
    assert refusal([bytes(16_000)] * 4) is SvidReason.TOO_LARGE


@given(st.lists(st.binary(max_size=200), max_size=4))
def test_garbage_is_malformed(chain: list[bytes]) -> None:
    assert refusal(chain) is SvidReason.MALFORMED


@given(st.integers(min_value=0, max_value=10_000))
def test_a_truncated_certificate_is_malformed(length: int) -> None:
    der = _leaf().der
    assert refusal([der[: length % len(der)]]) is SvidReason.MALFORMED


def test_bytes_after_the_certificate_are_malformed() -> None:
    assert refusal([workload(root()).der + b"\0"]) is SvidReason.MALFORMED


def test_garbage_behind_a_good_leaf_is_malformed() -> None:
    assert refusal([workload(root()), b"garbage"]) is SvidReason.MALFORMED


def test_a_self_signed_leaf_is_refused() -> None:
    assert refusal([workload(None, subject="self")]) is SvidReason.UNKNOWN_ISSUER


def test_a_loop_of_issuers_ends() -> None:
    keys = [ec.generate_private_key(ec.SECP256R1()) for _ in range(2)]
    first = authority(subject="a", key=keys[0])
    second = authority(issuer=first, subject="b", key=keys[1])
    looped = issue(
        second,
        subject="a",
        is_ca=True,
        usage=Usage(key_cert_sign=True),
        key=keys[0],
    )
    leaf = workload(second)
    assert refusal([leaf, second, looped]) is SvidReason.UNKNOWN_ISSUER
