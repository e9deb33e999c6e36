"""Addresses, ports and names: one spelling for each, and no way round it."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodeagent.api import values
from support.resources import docs, read, refuse, service, workload


@pytest.mark.parametrize(
    "text, canonical",
    [
        ("10.1.0.2", "10.1.0.2"),
        ("FD00:0:0::0002", "fd00::2"),
        ("fd00:0000:0000:0000:0000:0000:0000:0002", "fd00::2"),
        ("::ffff:10.1.0.2", "10.1.0.2"),
        ("::FFFF:0a01:0002", "10.1.0.2"),
        ("240.240.0.1", "240.240.0.1"),
        ("2001:db8::1", "2001:db8::1"),
    ],
)
def test_config_address_has_one_spelling(text: str, canonical: str) -> None:
    assert values.address(text) == canonical


@pytest.mark.parametrize(
    "text",
    [
        *["127.0.0.1", "127.255.255.254", "::1", "::ffff:127.0.0.1", "::ffff:7f00:1"],
        *["0.0.0.0", "::", "::ffff:0.0.0.0", "0.1.2.3", "::127.0.0.1", "::10.1.0.2"],
        *["224.0.0.1", "ff02::1", "::ffff:224.0.0.1", "255.255.255.255"],
        *["169.254.169.254", "fe80::1", "::ffff:169.254.169.254", "fec0::1"],
    ],
)
def test_config_address_that_is_no_workloads_is_refused(text: str) -> None:
    """`::ffff:127.0.0.1` is not loopback for Python 3.11; connecting to `::` reaches loopback."""
    with pytest.raises(ValueError, match="write the workload's routable address"):
        values.address(text)


@pytest.mark.parametrize(
    "text",
    [
        *["010.1.0.2", "10.01.0.2", "10.1.0.02", "127.1", "10.1.2", "167837698", "0x0a.1.0.2"],
        *["10.1.0.2 ", " 10.1.0.2", "10.1.0.2\n", "10.1.0.2\x00", "10.1.0.2/32", "10.1.0.0/24"],
        *["fe80::1%eth0", "fd00::1%\n", "fd00::1%25eth0", "[fd00::1]", "10.1.0.2:80", "fd00::2::1"],
        *["", "web.shop", "unix:///run/x", "１０.1.0.2", "10.1.0.٢", "1" * 10_000, "0.0.0.255/24"],
    ],
)
def test_config_address_in_another_spelling_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="write"):
        values.address(text)


def test_config_address_leading_zeros_are_named_as_the_reason() -> None:
    (error,) = refuse(docs(workload("a/b", "10.1.0.02")))
    assert error.field == "spec.address"
    assert "leading zeros" in error.reason


def test_config_address_scope_id_with_newline_is_refused_and_escaped() -> None:
    (error,) = refuse(docs(workload("a/b", "fd00::1%x\ny")))
    assert "scope" in error.reason
    assert "\n" not in str(error)


@given(st.ip_addresses(v=6) | st.ip_addresses(v=4))
def test_config_address_is_canonical_or_refused(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address,
) -> None:
    try:
        text = values.address(str(address))
    except ValueError:
        return
    again = ipaddress.ip_address(text)
    assert str(again) == text == values.address(text)
    assert not any((again.is_loopback, again.is_unspecified, again.is_multicast))
    assert getattr(again, "ipv4_mapped", None) is None


def test_config_vip_hostmask_and_network_are_no_single_address() -> None:
    assert values.vip("10.96.0.1/32") == "10.96.0.1"
    assert values.vip("fd00::1/128") == "fd00::1"
    for text in ("10.96.0.0/16", "10.96.0.1/0.0.0.0", "10.96.0.1/255.255.255.255", "fd00::1/64"):
        with pytest.raises(ValueError, match="network"):
            values.vip(text)


@pytest.mark.parametrize("number", [0, -1, 65536, 99999, 2**31, 2**63])
def test_config_port_zero_and_beyond_are_refused(number: int) -> None:
    errors = refuse(docs(workload("a/b", "10.0.0.1", ports={"http": number})))
    assert errors[0].field == "spec.ports.http"
    errors = refuse(docs(service("a/b", ports=[{"number": number, "name": "x"}], endpoints=[])))
    assert errors[0].field == "spec.ports[0].number"


def test_config_port_is_never_a_boolean_or_float() -> None:
    for value in (True, 80.0, 80.5, "80", [80], {"n": 80}):
        assert refuse(docs(workload("a/b", "10.0.0.1", ports={"http": value})))


@pytest.mark.parametrize(
    "name",
    [
        *["", "A", "a_b", "-a", "a-", "a..b", ".a", "a.", "a/b", "../a", "a\n", "a b", "ä", "a%2f"],
        *["a" * 64, ".".join(["a" * 60] * 5), "*", "a*", "[a]", "a?"],
    ],
)
def test_config_name_must_be_a_dns_name(name: str) -> None:
    with pytest.raises(ValueError, match="no DNS name"):
        values.dns_subdomain(name)
    with pytest.raises(ValueError, match="no DNS"):
        values.service_account(name)


@pytest.mark.parametrize("name", ["a.b", "A", "", "a\n", "..", "a" * 64])
def test_config_namespace_must_be_a_dns_label(name: str) -> None:
    with pytest.raises(ValueError, match="no DNS label"):
        values.dns_label(name)


@pytest.mark.parametrize("account", ["..", ".", "a/../b", "admin/sa/root", "a%2Fb", "Admin", "a\n"])
def test_config_service_account_cannot_leave_its_spiffe_segment(account: str) -> None:
    errors = refuse(docs(workload("a/b", "10.0.0.1", serviceAccount=account)))
    assert errors[0].field == "spec.serviceAccount"


@pytest.mark.parametrize(
    "domain", ["", "A.local", "a/b", "a:1", "user@a", "a\n", "a b", "ä", "x" * 256]
)
def test_config_trust_domain_is_spiffes(domain: str) -> None:
    with pytest.raises(ValueError, match="no trust domain"):
        values.trust_domain(domain)


@pytest.mark.parametrize(
    "key", ["", "/a", "a/", "a/b/c", "A_/b", "-a", "a-", "a*", "a b", "a\n", "x" * 64, "é"]
)
def test_config_label_key_syntax(key: str) -> None:
    with pytest.raises(ValueError, match="write"):
        values.label_key(key)


@pytest.mark.parametrize("value", ["-a", "a-", "a*", "*", "a b", "a\n", "a/b", "x" * 64, "(x+)+$"])
def test_config_label_value_syntax(value: str) -> None:
    with pytest.raises(ValueError, match="write"):
        values.label_value(value)


@pytest.mark.parametrize(
    "host", ["10.0.0.1", "::1", "*", "*.", "a.*", "a b", "a\n", "http://a", "a:80", "ä.b"]
)
def test_config_host_is_a_name(host: str) -> None:
    with pytest.raises(ValueError, match=r"write|move"):
        values.host(host)


def test_config_host_is_compared_in_lower_case() -> None:
    assert values.host("Web.Shop") == "web.shop"
    assert values.host("*.Example.com") == "*.example.com"
    errors = refuse(
        docs(service("a/b", hosts=["web.shop", "WEB.shop"], endpoints=[{"address": "10.0.0.1"}]))
    )
    assert [error.field for error in errors] == ["spec.hosts[1]"]


@pytest.mark.parametrize("text", ["", "a//b", "/a", "a/", "a/b/c/d", "a b", "*", "a\n"])
def test_config_locality_syntax(text: str) -> None:
    with pytest.raises(ValueError, match="locality"):
        values.locality(text)


@pytest.mark.parametrize(
    "text",
    [
        *["2026-01-31", "2026-01-31T12:00:00", "2026-13-01T00:00:00Z", "2026-01-31T25:00:00Z", ""],
        *[
            "2026-01-31T12:00:00Z\n",
            "0000-01-01T00:00:00Z",
            "0001-01-01T00:00:00+23:59",
            "２026-01-31T12:00:00Z",
        ],
    ],
)
def test_config_timestamp_needs_date_time_and_zone(text: str) -> None:
    with pytest.raises(ValueError, match="no time"):
        values.timestamp(text)


def test_config_weight_zero_is_not_silently_one() -> None:
    (error,) = refuse(docs(workload("a/b", "10.0.0.1", weight=0)))
    assert "remove it" in error.reason
    assert read(workload("a/b", "10.0.0.1", weight=2**32 - 1))
    assert refuse(docs(workload("a/b", "10.0.0.1", weight=2**32)))
