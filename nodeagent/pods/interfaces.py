"""What a pod's namespace has in the way of devices and addresses.

This module owns reading links and addresses through pyroute2. It promises values only: canonical
addresses, never IPv4-mapped, and only those that are ready for use (IPv6 addresses still in
duplicate detection are not). It may not change anything.
"""

from __future__ import annotations

import asyncio
import functools
import ipaddress
from typing import Final

from pyroute2.netlink.rtnl import RTM_GETADDR, RTM_GETLINK
from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg

from nodeagent.pods.netlink import DUMP, Rtnetlink, Selection, decode, encode
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

_SKIP_STATS: Final = 0x8
"""RTEXT_FILTER_SKIP_STATS: counters are most of what a device has to say."""

MOST_KEPT: Final = 64
"""Links and addresses that are remembered by their bytes: `lo` and its addresses, above all."""

_LINKS: Final = encode(ifinfmsg, RTM_GETLINK, DUMP, {}, [("IFLA_EXT_MASK", _SKIP_STATS)])
_ADDRESSES: Final = encode(ifaddrmsg, RTM_GETADDR, DUMP, {})

_NAME: Final = Selection(ifinfmsg, ("IFLA_IFNAME",))
_ADDRESS: Final = Selection(ifaddrmsg, ("IFA_ADDRESS", "IFA_LOCAL", "IFA_FLAGS"))


class AddressesMissingError(Exception):
    """A workload's addresses are not in its namespace. `missing` names them."""

    def __init__(self, path: str, missing: tuple[str, ...], found: Interfaces) -> None:
        there = ", ".join(address.text for address in found.addresses) or "none"
        super().__init__(
            f"network namespace {path} has not the workload's address {', '.join(missing)} "
            f"(it has: {there}): correct the WorkloadEntry, or configure the namespace"
        )
        self.missing = missing


@functools.lru_cache(MOST_KEPT)
def _link(data: bytes) -> tuple[int, int, str]:
    """Return index, flags and name."""
    link = decode(ifinfmsg, data)
    return link["index"], link["flags"], link.get_attr("IFLA_IFNAME") or ""


@functools.lru_cache(MOST_KEPT)
def _address(data: bytes) -> Address | None:
    """Return the address if it is ready for use and not link-local."""
    found = decode(ifaddrmsg, data)
    flags = found.get_attr("IFA_FLAGS") or found["flags"]
    # IFA_ADDRESS is the peer's on a point-to-point link; IPv6 has no IFA_LOCAL elsewhere.
    text = found.get_attr("IFA_LOCAL") or found.get_attr("IFA_ADDRESS")
    if flags & IFA_F_UNUSABLE or text is None:
        return None
    parsed = ipaddress.ip_address(text)
    if parsed.version == 6 and parsed.is_link_local:  # noqa: PLR2004 - of IP
        return None
    return Address(found["index"], str(parsed))


def collect_interfaces(route: Rtnetlink) -> Interfaces:
    """Read through an open socket that was made inside the namespace. Raises OSError."""
    devices: dict[int, str] = {}
    for data in route.dump(_LINKS):
        index, flags, name = _link(_NAME.of(data))
        if index != LO_INDEX and flags & IFF_UP:
            devices[index] = name
    found = (_address(_ADDRESS.of(data)) for data in route.dump(_ADDRESSES))
    addresses = {each for each in found if each is not None and each.device in devices}
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
