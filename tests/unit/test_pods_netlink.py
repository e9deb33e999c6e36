"""Messages that are filled in instead of encoded, and looked at before they are decoded."""

from __future__ import annotations

import socket
import struct

import pytest
from pyroute2.netlink.rtnl import RTM_NEWADDR, RTM_NEWTFILTER
from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg
from pyroute2.netlink.rtnl.tcmsg import tcmsg

from nodeagent.capture import netlink_write
from nodeagent.capture.actions import AddFilter, AddRoute, Route
from nodeagent.pods.netlink import ACK, Selection, Template, decode, encode
from nodeagent.pods.values import Device

CHOSEN = Selection(ifaddrmsg, ("IFA_LOCAL", "IFA_FLAGS"))

ADDRESS = encode(
    ifaddrmsg,
    RTM_NEWADDR,
    0,
    {"family": socket.AF_INET, "prefixlen": 24, "index": 7},
    [("IFA_ADDRESS", "10.0.0.1"), ("IFA_LOCAL", "10.0.0.2"), ("IFA_FLAGS", 0x80)],
)


def test_what_is_chosen_is_all_that_is_decoded() -> None:
    message = decode(ifaddrmsg, CHOSEN.of(ADDRESS))
    assert dict(message["attrs"]) == {"IFA_LOCAL": "10.0.0.2", "IFA_FLAGS": 0x80}
    assert (message["index"], message["prefixlen"]) == (7, 24)


def test_what_is_left_out_makes_no_difference() -> None:
    other = ADDRESS.replace(socket.inet_aton("10.0.0.1"), socket.inet_aton("10.9.9.9"))
    assert other != ADDRESS
    assert CHOSEN.of(other) == CHOSEN.of(ADDRESS)


def test_a_message_without_attributes_stays_as_it_is() -> None:
    bare = encode(ifaddrmsg, RTM_NEWADDR, 0, {"family": socket.AF_INET, "index": 3})
    assert CHOSEN.of(bare) == bare


def test_an_attribute_shorter_than_its_head_is_refused() -> None:
    with pytest.raises(OSError, match="malformed"):
        CHOSEN.of(ADDRESS + struct.pack("=HH", 3, 1))


def test_an_attribute_that_nobody_knows_cannot_be_chosen() -> None:
    with pytest.raises(ValueError, match="IFA_NOTHING"):
        Selection(ifaddrmsg, ("IFA_NOTHING",))


def test_holes_must_be_there_once() -> None:
    with pytest.raises(ValueError, match="once"):
        Template(b"abcabc", b"abc")
    with pytest.raises(ValueError, match="once"):
        Template(b"abc", b"x")


def test_values_must_fit() -> None:
    template = Template(b"..AA..BBBB", b"AA", b"BBBB")
    assert template.fill(b"12", b"3456") == b"..12..3456"
    with pytest.raises(ValueError, match="hole"):
        template.fill(b"1", b"3456")
    with pytest.raises(ValueError, match="argument"):
        template.fill(b"12")


@pytest.mark.parametrize("direction", ["ingress", "egress"])
def test_the_guard_that_is_filled_in_is_the_one_that_pyroute2_encodes(direction: str) -> None:
    filled = netlink_write.encode(AddFilter(Device(9, "eth0"), direction), (33, 4000))
    message = decode(tcmsg, filled)
    options = message.get_attr("TCA_OPTIONS")
    assert message["header"]["type"] == RTM_NEWTFILTER
    assert message["header"]["flags"] & ACK
    assert message["index"] == 9
    assert message.get_attr("TCA_KIND") == "bpf"
    assert options.get_attr("TCA_BPF_CLASSID") == 4000
    assert options.get_attr("TCA_BPF_FD") == 33
    # Each place is filled anew.
    again = netlink_write.encode(AddFilter(Device(9, "eth0"), direction), (33, 4000))
    other = netlink_write.encode(AddFilter(Device(8, "eth0"), direction), (34, 4001))
    assert again == filled != other


@pytest.mark.parametrize("source", ["10.1.2.3", "fd00::12"])
def test_the_route_that_is_filled_in_is_the_one_that_pyroute2_encodes(source: str) -> None:
    family = socket.AF_INET6 if ":" in source else socket.AF_INET
    route = Route(int(family), source)
    assert netlink_write.encode(AddRoute(route), None) == netlink_write._add_route(route)
