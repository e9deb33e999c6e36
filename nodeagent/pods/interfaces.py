"""What a pod's namespace has in the way of devices and addresses.

This module owns reading links and addresses. It promises values only: canonical
addresses, never IPv4-mapped, and only those that are ready for use (IPv6 addresses still in
duplicate detection are not). It may not change anything.
"""

from __future__ import annotations

import asyncio
import ipaddress
import struct
from typing import Final

from nodeagent.pods.netlink import Rtnetlink, attributes, number
from nodeagent.pods.netns import NetnsHandle
from nodeagent.pods.threads import NamespaceThreads
from nodeagent.pods.values import LO_INDEX, Address, Device, Interfaces

__all__ = [
    "AddressesMissingError",
    "collect_interfaces",
    "read_interfaces",
    "wait_for_addresses",
]

ADDRESS_WAIT: Final = 10.0
"""Seconds in which a new pod's addresses should be ready. Duplicate detection takes two at most,
and whoever made the namespace configures it in well under one."""

ADDRESS_POLL: Final = 0.05
"""Seconds between two looks: unnoticed beside what a pod needs to start."""

IFF_UP: Final = 0x1
IFA_F_UNUSABLE: Final = 0x40 | 0x08
"""linux/if_addr.h: IFA_F_TENTATIVE, IFA_F_DADFAILED."""

_RTM_GETLINK: Final = 18
_RTM_GETADDR: Final = 22
_IFLA_IFNAME: Final = 3
_IFLA_EXT_MASK: Final = 29
_IFA_ADDRESS: Final = 1
_IFA_LOCAL: Final = 2
_IFA_FLAGS: Final = 8
"""linux/rtnetlink.h, if_link.h and if_addr.h."""

_SKIP_STATS: Final = 0x8
"""RTEXT_FILTER_SKIP_STATS: counters are most of what a device has to say."""

_LINK: Final = struct.Struct("=BxHiII")
"""struct ifinfomsg: family, type, index, flags, change."""

_ADDRESS: Final = struct.Struct("=BBBBI")
"""struct ifaddrmsg: family, prefix length, flags, scope, index."""

_NUMBER: Final = struct.Struct("=I")


class AddressesMissingError(Exception):
    """A workload's addresses are not in its namespace. `missing` names them."""

    def __init__(self, path: str, missing: tuple[str, ...], found: Interfaces) -> None:
        there = ", ".join(address.text for address in found.addresses) or "none"
        super().__init__(
            f"network namespace {path} has not the workload's address {', '.join(missing)} "
            f"(it has: {there}): correct the WorkloadEntry, or configure the namespace"
        )
        self.missing = missing


def collect_interfaces(route: Rtnetlink) -> Interfaces:
    """Read through an open socket that was made inside the namespace. Raises OSError."""
    devices: dict[int, str] = {}
    wanted = _LINK.pack(0, 0, 0, 0, 0) + number(_IFLA_EXT_MASK, _SKIP_STATS)
    for body in route.dump(_RTM_GETLINK, wanted):
        _, _, index, flags, _ = _LINK.unpack_from(body)
        if index != LO_INDEX and flags & IFF_UP:
            name = attributes(body, _LINK.size).get(_IFLA_IFNAME, b"")
            devices[index] = name.rstrip(b"\0").decode("utf-8", "replace")
    addresses: set[Address] = set()
    for body in route.dump(_RTM_GETADDR, _ADDRESS.pack(0, 0, 0, 0, 0)):
        _, _, flags, _, index = _ADDRESS.unpack_from(body)
        found = attributes(body, _ADDRESS.size)
        if _IFA_FLAGS in found:
            flags = _NUMBER.unpack_from(found[_IFA_FLAGS])[0]
        # IFA_ADDRESS is the peer's on a point-to-point link; IPv6 has no IFA_LOCAL elsewhere.
        packed = found.get(_IFA_LOCAL) or found.get(_IFA_ADDRESS)
        if flags & IFA_F_UNUSABLE or index not in devices or packed is None:
            continue
        parsed = ipaddress.ip_address(packed)
        if not (parsed.version == 6 and parsed.is_link_local):  # noqa: PLR2004
            addresses.add(Address(index, str(parsed)))
    return Interfaces(
        tuple(sorted(Device(index, name) for index, name in devices.items())),
        tuple(sorted(addresses)),
    )


def _read() -> Interfaces:
    with Rtnetlink() as route:
        return collect_interfaces(route)


async def read_interfaces(threads: NamespaceThreads, netns: NetnsHandle) -> Interfaces:
    """Return what is in the namespace now. Raises OSError."""
    return await threads.run(netns.fd, _read)


async def wait_for_addresses(
    threads: NamespaceThreads,
    netns: NetnsHandle,
    wanted: tuple[str, ...],
    seconds: float = ADDRESS_WAIT,
) -> Interfaces:
    """Return once all addresses are ready. Raises AddressesMissingError after `seconds`."""
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds
    while True:
        found = await read_interfaces(threads, netns)
        missing = found.missing(wanted)
        if not missing:
            return found
        if loop.time() >= end:
            raise AddressesMissingError(str(netns.path), missing, found)
        await asyncio.sleep(ADDRESS_POLL)
