from __future__ import annotations

import pytest

from ztunnel import address


@pytest.mark.parametrize(
    "spelling, canonical",
    [
        ("10.0.0.1", "10.0.0.1"),
        ("::ffff:10.0.0.1", "10.0.0.1"),
        ("2001:DB8::0:1", "2001:db8::1"),
        ("::1", "::1"),
    ],
)
def test_each_address_has_one_form(spelling: str, canonical: str) -> None:
    packed = address.pack(spelling)
    assert len(packed) == 16
    assert address.text(packed) == canonical
    assert address.pack(canonical) == packed


@pytest.mark.parametrize(
    "spelling",
    [
        "fe80::1%eth0",
        "10.0.0.01",
        "127.1",
        "host",
        "",
        "1.2.3.4/8",
        "1.2.3.256",
        "1.2.3.+4",
        "1.2.3.٤",
        "1.2.3",
        "1.2.3.4.5",
        " 1.2.3.4",
        "1.2.3.4\n",
    ],
)
def test_what_is_no_plain_address_is_refused(spelling: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        address.pack(spelling)


@pytest.mark.parametrize(
    "spelling",
    [
        "127.0.0.1",
        "127.255.1.2",
        "::1",
        "::ffff:127.0.0.1",
        "0.0.0.0",
        "::",
        "::ffff:0.0.0.0",
        "0.1.2.3",
        "::127.0.0.1",
    ],
)
def test_what_means_this_host_is_local_in_every_spelling(spelling: str) -> None:
    assert address.is_local_only(address.pack(spelling))


@pytest.mark.parametrize("spelling", ["10.0.0.1", "::ffff:10.0.0.1", "fd00::1", "169.254.169.254"])
def test_other_addresses_are_not_local(spelling: str) -> None:
    assert not address.is_local_only(address.pack(spelling))


def test_no_address_is_local_and_has_no_text() -> None:
    assert address.is_local_only(address.ANY)
    assert address.text(address.ANY) == ""


def test_authority_has_brackets_for_ipv6_only() -> None:
    assert address.authority(address.pack("10.0.0.1"), 80) == "10.0.0.1:80"
    assert address.authority(address.pack("fd00::1"), 80) == "[fd00::1]:80"
