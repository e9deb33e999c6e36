"""The embedded CA: what it signs, its files, and what happens when they are wrong."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import stat
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from nodeagent.identity import ProviderReason
from nodeagent.identity import _certificates as certificates
from nodeagent.identity import _vault as vault_module
from nodeagent.identity._vault import Vault
from support.embedded_ca import (
    DAY,
    FILES,
    NOW,
    SLEEP,
    Time,
    bundle,
    contents,
    fetch,
    make,
    refusal,
    start_together,
)
from ztunnel import svid as validation
from ztunnel.spiffe import SpiffeId, SpiffeIdError

# --- certificates --------------------------------------------------------------------------------


def test_what_it_signs_is_accepted_by_the_tunnel(tmp_path: Path) -> None:
    ca = make(tmp_path / "ca")
    signed = fetch(ca)
    peer = validation.validate(signed.chain, bundle(ca), NOW)
    assert peer.id == SLEEP
    assert peer.not_after == signed.not_after == NOW + 3600
    assert len(signed.chain) == 2, "leaf and intermediate, without the root"
    assert validation.unusable_roots(bundle(ca)["cluster.local"]) == ()


def test_the_leaf_has_the_profile_of_an_x509_svid(tmp_path: Path) -> None:
    signed = fetch(make(tmp_path / "ca"))
    leaf, issuer = (x509.load_der_x509_certificate(der) for der in signed.chain)
    find = leaf.extensions.get_extension_for_class
    assert leaf.subject.rdns == []
    names = find(x509.SubjectAlternativeName)
    assert names.critical
    assert list(names.value) == [x509.UniformResourceIdentifier(str(SLEEP))]
    usage = find(x509.KeyUsage)
    assert usage.critical
    assert usage.value.digital_signature
    assert not usage.value.key_encipherment, "RFC 8813 forbids it for EC keys"
    assert not usage.value.key_cert_sign
    assert set(find(x509.ExtendedKeyUsage).value) == {
        ExtendedKeyUsageOID.SERVER_AUTH,
        ExtendedKeyUsageOID.CLIENT_AUTH,
    }
    constraints = find(x509.BasicConstraints)
    assert constraints.critical
    assert not constraints.value.ca
    assert (
        find(x509.AuthorityKeyIdentifier).value.key_identifier
        == issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value.digest
    )
    key = leaf.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    assert isinstance(key.curve, ec.SECP256R1)
    assert isinstance(leaf.signature_hash_algorithm, hashes.SHA256)
    assert leaf.not_valid_before_utc.timestamp() == NOW - certificates.BACKDATE_SECONDS


def test_every_svid_has_its_own_key_and_serial_number(tmp_path: Path) -> None:
    ca = make(tmp_path / "ca")
    signed = [fetch(ca) for _ in range(5)]
    assert len({each.key for each in signed}) == 5
    serials = {x509.load_der_x509_certificate(each.chain[0]).serial_number for each in signed}
    assert len(serials) == 5
    assert all(serial.bit_length() > 64 for serial in serials)


def test_a_long_trust_domain_works(tmp_path: Path) -> None:
    domain = "a" * 63 + "." + "b" * 190
    ca = make(tmp_path / "ca", trust_domain=domain)
    signed = fetch(ca, SpiffeId.workload(domain, "n", "s"))
    assert validation.validate(signed.chain, bundle(ca), NOW).id.trust_domain == domain


def test_a_leaf_never_outlives_its_issuer(tmp_path: Path) -> None:
    ca = make(tmp_path / "ca", ttl=400 * DAY)
    assert fetch(ca).not_after == NOW + certificates.INTERMEDIATE_SECONDS


# --- whom it signs for ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "spiffe://cluster.local/ns/default/sa/other",
        "spiffe://cluster.local",
        "spiffe://cluster.local.evil/ns/default/sa/sleep",
        "spiffe://foreign.example/ns/default/sa/sleep",
    ],
)
def test_only_identities_of_this_node_are_signed(tmp_path: Path, text: str) -> None:
    ca = make(tmp_path / "ca", permitted=lambda each: each.path == SLEEP.path)
    error = refusal(ca, SpiffeId.parse(text))
    assert error.reason is ProviderReason.DENIED
    assert not error.retryable
    assert fetch(ca).id == SLEEP


@pytest.mark.parametrize("domain", ["", "Cluster.local", "a/b", "a\n"])
def test_a_bad_trust_domain_is_refused(tmp_path: Path, domain: str) -> None:
    with pytest.raises(SpiffeIdError):
        make(tmp_path, trust_domain=domain)


def test_a_lifetime_must_be_positive(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="ttl_seconds"):
        make(tmp_path, ttl=0)


# --- files ---------------------------------------------------------------------------------------


def test_the_files_are_private(tmp_path: Path) -> None:
    directory = tmp_path / "state" / "ca"
    previous = os.umask(0)
    try:
        fetch(make(directory))
    finally:
        os.umask(previous)
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert {each.name for each in directory.iterdir()} == {*FILES, "lock"}
    assert {stat.S_IMODE(each.stat().st_mode) for each in directory.iterdir()} == {0o600}


def test_nothing_is_made_before_the_first_question(tmp_path: Path) -> None:
    make(tmp_path / "ca")
    assert not (tmp_path / "ca").exists()


def test_a_restart_goes_on_with_the_same_ca(tmp_path: Path) -> None:
    first = bundle(make(tmp_path / "ca"))
    before = contents(tmp_path / "ca")
    assert bundle(make(tmp_path / "ca")) == first
    assert contents(tmp_path / "ca") == before


def test_several_processes_that_start_at_once_make_one_ca(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(4), context.Queue()
    arguments = (str(tmp_path / "ca"), barrier, results)
    processes = [context.Process(target=start_together, args=arguments) for _ in range(4)]
    for process in processes:
        process.start()
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(timeout=60)
    assert len({bundles["cluster.local"] for bundles, _ in found}) == 1
    for _, chain in found:
        assert validation.validate(chain, found[0][0], NOW).id == SLEEP


@pytest.mark.parametrize("lost", [{"intermediate.pem"}, {"root.pem", "intermediate.pem"}])
def test_a_start_that_was_cut_short_is_completed(tmp_path: Path, lost: set[str]) -> None:
    directory = tmp_path / "ca"
    fetch(make(directory))
    key = (directory / "root-key.pem").read_bytes()
    for name in lost:
        (directory / name).unlink()
    (directory / ".new-0123456789abcdef").write_bytes(b"half")
    ca = make(directory)
    assert validation.validate(fetch(ca).chain, bundle(ca), NOW).id == SLEEP
    assert (directory / "root-key.pem").read_bytes() == key
    assert {each.name for each in directory.iterdir()} == {*FILES, "lock"}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("part", [0, 0.01, 0.5, 0.9])
def test_a_truncated_file_is_an_error_and_nothing_changes(
    tmp_path: Path, name: str, part: float
) -> None:
    directory = tmp_path / "ca"
    fetch(make(directory))
    file = directory / name
    content = file.read_bytes()
    file.write_bytes(content[: int(part * len(content))])
    if name == "root-key.pem":
        # The root's key is read only when an intermediate is due.
        (directory / "intermediate.pem").unlink()
    before = contents(directory)
    error = refusal(make(directory))
    assert error.reason is ProviderReason.MISCONFIGURED
    assert not error.retryable
    assert name in error.detail
    assert "damaged" in error.detail
    assert contents(directory) == before
    file.write_bytes(content)
    assert fetch(make(directory)).id == SLEEP


@pytest.mark.parametrize("name", ["root.pem", "intermediate.pem"])
def test_garbage_in_a_file_is_an_error(tmp_path: Path, name: str) -> None:
    directory = tmp_path / "ca"
    fetch(make(directory))
    (directory / name).write_bytes(os.urandom(3000))
    assert name in refusal(make(directory)).detail
    (directory / name).write_bytes(bytes(vault_module.MAX_FILE_BYTES + 1))
    assert "larger" in refusal(make(directory)).detail


def test_a_lost_root_is_an_error_while_its_ca_is_in_use(tmp_path: Path) -> None:
    directory = tmp_path / "ca"
    ca = make(directory)
    fetch(ca)
    content = (directory / "root.pem").read_bytes()
    (directory / "root.pem").unlink()
    for asked in (ca, make(directory)):
        assert "restore" in refusal(asked).detail
    for name in ("root-key.pem", "intermediate.pem"):
        (directory / name).unlink()
    assert "restore" in refusal(ca).detail, "the running agent still trusts the old root"
    (directory / "root.pem").write_bytes(content)
    (directory / "root.pem").chmod(0o600)
    assert "root-key.pem" in refusal(make(directory)).detail


def test_an_intermediate_of_another_root_is_an_error(tmp_path: Path) -> None:
    for name in ("one", "two"):
        fetch(make(tmp_path / name))
    (tmp_path / "two" / "root.pem").replace(tmp_path / "one" / "root.pem")
    assert "signed by no root" in refusal(make(tmp_path / "one")).detail


def test_a_key_of_another_certificate_is_an_error(tmp_path: Path) -> None:
    for name in ("one", "two"):
        fetch(make(tmp_path / name))
    one, two = ((tmp_path / name / "intermediate.pem") for name in ("one", "two"))
    marker = b"-----BEGIN CERTIFICATE"
    key = two.read_bytes().partition(marker)[0]
    one.write_bytes(key + marker + one.read_bytes().partition(marker)[2])
    assert "another key" in refusal(make(tmp_path / "one")).detail


def test_another_trust_domain_is_an_error(tmp_path: Path) -> None:
    fetch(make(tmp_path / "ca"))
    other = make(tmp_path / "ca", trust_domain="other.example")
    error = refusal(other, SpiffeId.workload("other.example", "default", "sleep"))
    assert error.reason is ProviderReason.MISCONFIGURED
    assert "cluster.local" in error.detail
    assert "other.example" in error.detail


@pytest.mark.parametrize("name", [*FILES, "lock", "."])
@pytest.mark.parametrize("mode", [0o640, 0o604, 0o666])
def test_a_file_that_others_can_read_is_refused(tmp_path: Path, name: str, mode: int) -> None:
    directory = tmp_path / "ca"
    fetch(make(directory))
    if name == "root-key.pem":
        (directory / "intermediate.pem").unlink()
    (directory / name).chmod(mode | 0o100 if name == "." else mode)
    error = refusal(make(directory))
    assert error.reason is ProviderReason.MISCONFIGURED
    assert f"{mode | 0o100 if name == '.' else mode:04o}" in error.detail


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
@pytest.mark.parametrize("name", ["root.pem", "."])
def test_a_file_of_somebody_else_is_refused(tmp_path: Path, name: str) -> None:
    directory = tmp_path / "ca"
    fetch(make(directory))
    os.chown(directory / name, 12345, 12345)
    assert "uid 12345" in refusal(make(directory)).detail


@pytest.mark.parametrize("name", [*FILES, "lock"])
def test_a_symbolic_link_is_not_followed(tmp_path: Path, name: str) -> None:
    directory = tmp_path / "ca"
    fetch(make(directory))
    elsewhere = tmp_path / "elsewhere"
    (directory / name).rename(elsewhere)
    (directory / name).symlink_to(elsewhere)
    if name == "root-key.pem":
        (directory / "intermediate.pem").unlink()
    assert "symbolic link" in refusal(make(directory)).detail


def test_a_linked_directory_is_refused(tmp_path: Path) -> None:
    fetch(make(tmp_path / "real"))
    (tmp_path / "ca").symlink_to(tmp_path / "real")
    assert "symbolic link" in refusal(make(tmp_path / "ca")).detail
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    assert "symbolic link" in refusal(make(tmp_path / "dangling")).detail
    assert not (tmp_path / "nowhere").exists()


def test_what_is_no_regular_file_is_refused(tmp_path: Path) -> None:
    directory = tmp_path / "ca"
    fetch(make(directory))
    (directory / "root.pem").unlink()
    os.mkfifo(directory / "root.pem", 0o600)
    assert "regular file" in refusal(make(directory)).detail
    (tmp_path / "file").write_bytes(b"")
    assert refusal(make(tmp_path / "file")).reason is ProviderReason.STORAGE


def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Time()
    directory = tmp_path / "ca"
    fetch(make(directory, clock))
    before = contents(directory)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    clock.now += 61 * DAY
    monkeypatch.setattr(os, "fsync", full)
    ca = make(directory, clock)
    assert fetch(ca).not_after == clock.now + 3600, "the old intermediate is valid still"
    assert contents(directory) == before
    clock.now += 30 * DAY
    error = refusal(make(directory, clock))
    assert error.reason is ProviderReason.STORAGE
    assert error.retryable
    assert "No space left" in error.detail
    assert contents(directory) == before
    error = refusal(make(tmp_path / "new", clock))
    assert "No space left" in error.detail
    assert contents(tmp_path / "new") == {}
    monkeypatch.undo()
    assert fetch(ca).id == SLEEP
    assert fetch(make(tmp_path / "new", clock)).id == SLEEP


def test_a_lock_that_is_never_released_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "ca"
    fetch(make(directory))
    monkeypatch.setattr(vault_module, "_LOCK_SECONDS", 0.0)
    with (directory / "lock").open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        error = refusal(make(directory))
    assert error.retryable
    assert "held by another process" in error.detail


def test_the_vault_forgets_its_descriptors(tmp_path: Path) -> None:
    ca = make(tmp_path / "ca")
    fetch(ca)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(20):
        fetch(ca)
        (tmp_path / "ca" / "intermediate.pem").unlink()
    (tmp_path / "ca" / "root.pem").chmod(0o644)
    refusal(make(tmp_path / "ca"))
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_vault_replaces_whole_files(tmp_path: Path) -> None:
    with Vault(tmp_path / "ca") as vault, vault.locked():
        vault.replace("x", b"one")
        stamp = vault.stamp("x")
        vault.replace("x", b"two")
        assert vault.read("x") == b"two"
        assert vault.stamp("x") != stamp
        assert vault.read("y") is None
        assert vault.stamp("y") is None
