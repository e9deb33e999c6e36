"""The embedded CA over the years: intermediates, roots and clocks; and what it never shows."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from nodeagent.identity import ProviderError, ProviderReason, Svid
from nodeagent.identity import _certificates as certificates
from support.embedded_ca import (
    DAY,
    NOW,
    SLEEP,
    Time,
    bundle,
    fetch,
    make,
    refusal,
)
from ztunnel import svid as validation
from ztunnel.spiffe import SpiffeId

# --- rotation ------------------------------------------------------------------------------------


def test_the_intermediate_is_replaced_before_its_end(tmp_path: Path) -> None:
    clock = Time()
    ca = make(tmp_path / "ca", clock)
    first = fetch(ca)
    roots = bundle(ca)
    clock.now += 59 * DAY
    assert fetch(ca).chain[1] == first.chain[1]
    clock.now += 2 * DAY
    second = fetch(ca)
    assert second.chain[1] != first.chain[1]
    assert second.not_after == clock.now + 3600
    assert bundle(ca) == roots
    assert validation.validate(second.chain, roots, clock.now).id == SLEEP
    assert validation.validate(first.chain, roots, NOW).id == SLEEP


def test_another_process_uses_the_new_intermediate(tmp_path: Path) -> None:
    clock = Time()
    one, two = make(tmp_path / "ca", clock), make(tmp_path / "ca", clock)
    assert fetch(one).chain[1] == fetch(two).chain[1]
    clock.now += 61 * DAY
    assert fetch(one).chain[1] == fetch(two).chain[1]


def test_a_root_key_kept_elsewhere_is_missed_only_when_due(tmp_path: Path) -> None:
    clock = Time()
    directory = tmp_path / "ca"
    ca = make(directory, clock)
    fetch(ca)
    (directory / "root-key.pem").rename(tmp_path / "safe")
    clock.now += 61 * DAY
    first = fetch(ca)
    clock.now += 28 * DAY + DAY - 1800
    assert fetch(ca).not_after == NOW + certificates.INTERMEDIATE_SECONDS
    clock.now += 1800
    assert "bring the root's key back" in refusal(ca).detail
    (tmp_path / "safe").rename(directory / "root-key.pem")
    assert fetch(ca).chain[1] != first.chain[1]


def test_a_root_key_that_comes_back_is_noticed_at_once(tmp_path: Path) -> None:
    clock = Time()
    directory = tmp_path / "ca"
    ca = make(directory, clock)
    old = fetch(ca)
    (directory / "root-key.pem").rename(tmp_path / "safe")
    clock.now += 61 * DAY
    assert fetch(ca).chain[1] == old.chain[1]
    (tmp_path / "safe").rename(directory / "root-key.pem")
    assert fetch(ca).chain[1] != old.chain[1]


def test_a_root_is_replaced_by_adding_signing_and_removing(tmp_path: Path) -> None:
    directory = tmp_path / "ca"
    ca = make(directory)
    old = fetch(ca)
    fetch(make(tmp_path / "next"))
    new_root = (tmp_path / "next" / "root.pem").read_bytes()
    old_root = (directory / "root.pem").read_bytes()

    (directory / "root.pem").write_bytes(old_root + new_root)
    assert len(bundle(ca)["cluster.local"]) == 2
    both = bundle(ca)

    (tmp_path / "next" / "root-key.pem").replace(directory / "root-key.pem")
    (directory / "intermediate.pem").unlink()
    new = fetch(ca)
    for signed in (old, new):
        assert validation.validate(signed.chain, both, NOW).id == SLEEP

    (directory / "root.pem").write_bytes(new_root)
    only = bundle(ca)
    assert validation.validate(new.chain, only, NOW).id == SLEEP
    with pytest.raises(validation.SvidError):
        validation.validate(old.chain, only, NOW)


def test_a_root_key_without_its_root_signs_nothing(tmp_path: Path) -> None:
    for name in ("one", "two"):
        fetch(make(tmp_path / name))
    (tmp_path / "two" / "root-key.pem").replace(tmp_path / "one" / "root-key.pem")
    assert fetch(make(tmp_path / "one")).id == SLEEP
    (tmp_path / "one" / "intermediate.pem").unlink()
    assert "no root" in refusal(make(tmp_path / "one")).detail


def test_an_expired_root_signs_nothing(tmp_path: Path) -> None:
    clock = Time()
    directory = tmp_path / "ca"
    fetch(make(directory, clock))
    clock.now += certificates.ROOT_SECONDS
    assert "expired" in refusal(make(directory, clock)).detail


def test_a_clock_before_the_ca_is_told_so(tmp_path: Path) -> None:
    clock = Time()
    ca = make(tmp_path / "ca", clock)
    fetch(ca)
    clock.now -= DAY
    error = refusal(ca)
    assert error.reason is ProviderReason.CLOCK
    assert error.retryable
    clock.now += DAY
    assert fetch(ca).id == SLEEP


def test_the_bundle_is_told_again_when_it_changes(tmp_path: Path) -> None:
    directory = tmp_path / "ca"
    fetch(make(tmp_path / "next"))
    added = (tmp_path / "next" / "root.pem").read_bytes()

    async def follow() -> list[int]:
        counts: list[int] = []
        async for bundles in make(directory).bundles():
            counts.append(len(bundles["cluster.local"]))
            if len(counts) == 2:
                break
            with (directory / "root.pem").open("ab") as file:
                file.write(added)
        return counts

    assert asyncio.run(follow()) == [1, 2]


# --- secrets and checks of what comes ------------------------------------------------------------


def test_no_key_is_shown(tmp_path: Path) -> None:
    ca = make(tmp_path / "ca")
    signed = fetch(ca)
    shown = f"{signed!r} {signed} {vars(ca)!r}"
    key = serialization.load_der_private_key(signed.key, password=None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    secret = key.private_numbers().private_value.to_bytes(32, "big")
    for form in (secret.hex(), repr(signed.key)[2:-1], repr(secret)[2:-1], "key=b"):
        assert form not in shown


def test_an_svid_must_fit_together(tmp_path: Path) -> None:
    ca = make(tmp_path / "ca")
    one, two = fetch(ca), fetch(ca)
    other = SpiffeId.workload("cluster.local", "default", "other")
    assert Svid.from_der(SLEEP, one.chain, one.key) == one
    for spiffe_id, chain, key in [
        (other, one.chain, one.key),
        (SLEEP, one.chain, two.key),
        (SLEEP, (), one.key),
        (SLEEP, (b"garbage",), one.key),
        (SLEEP, (one.chain[0], b"garbage"), one.key),
        (SLEEP, one.chain, b"garbage"),
        (SLEEP, one.chain[1:], one.key),
    ]:
        with pytest.raises(ProviderError) as caught:
            Svid.from_der(spiffe_id, chain, key)
        assert caught.value.reason is ProviderReason.BAD_ANSWER
        assert caught.value.__cause__ is None
