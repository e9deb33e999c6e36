"""Real connections: through a pod's capture, and to port 15008 without opening a connection there.

This module owns the two probes. It promises that neither is counted or logged as a connection
anywhere: the one calls what ztunnel knows as a probe (`ztunnel.protocol.PROBE_ADDRESSES`), the
other sends a SYN alone, whose answer the kernel resets, so that no program there hears of it. Each
ends within a named time. Everything runs in the calling thread's network namespace.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import select
import socket
import struct
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

from nodeagent.doctor.facts import Outcome, Probe, ProbeOutcome
from ztunnel.protocol import PROBE_ADDRESSES, PROBE_PORT

__all__ = ["half_open", "through_tunnel"]

T = TypeVar("T")

CONNECT_SECONDS: Final = 2.5
"""For the pod's own kernel to take a probe: microseconds. A dropped SYN is sent again after one
second, which an overloaded node may need."""

ANSWER_SECONDS: Final = 3.0
"""For ztunnel to refuse it: a decision of its own, behind those that wait."""

SYN_SECONDS: Final = 2.5
"""For all ports to answer: across continents it takes a tenth of that."""
SYN_AGAIN_SECONDS: Final = 1.0
"""As TCP itself (RFC 6298, 2): one packet may be lost."""

_V4: Final = 4
_IPV6_CHECKSUM: Final = 7
_TCP_CHECKSUM_OFFSET: Final = 16
"""linux/in6.h: the kernel fills in the checksum of raw IPv6 packets, at this offset."""

_SYN, _RST, _ACK = 0x02, 0x04, 0x10
_TCP: Final = struct.Struct("!HHIIBBHHH")
_WINDOW: Final = 1024
_ENOUGH: Final = 4096
"""Bytes of one packet that are read: its headers."""


def through_tunnel(versions: Iterable[int]) -> tuple[Probe, ...]:
    """Connect to where only the tunnel answers, by versions of IP that the pod has addresses of."""
    return tuple(_together(_through_tunnel, versions))


def _together(function: Callable[[int], T], versions: Iterable[int]) -> list[T]:
    """Call for each version at once: what takes long is waiting. A thread is born in the namespace
    of the one that makes it.
    """
    with ThreadPoolExecutor(thread_name_prefix="probe") as pool:
        return list(pool.map(function, versions))


def _through_tunnel(version: int) -> Probe:
    family = socket.AF_INET if version == _V4 else socket.AF_INET6
    address = next(each for each in PROBE_ADDRESSES if (":" in each) is (version != _V4))
    try:
        sock = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        return Probe(version, ProbeOutcome.FAILED, os.strerror(error.errno or 0))
    with sock:
        sock.settimeout(CONNECT_SECONDS)
        try:
            sock.connect((address, PROBE_PORT))
        except ConnectionResetError:
            # Before we have seen that it stood: a refusal of the SYN would be ECONNREFUSED.
            return Probe(version, ProbeOutcome.ANSWERED)
        except TimeoutError:
            return Probe(version, ProbeOutcome.NOT_TAKEN, "nobody answered the SYN")
        except OSError as error:
            return Probe(version, ProbeOutcome.NOT_TAKEN, os.strerror(error.errno or 0))
        sock.settimeout(ANSWER_SECONDS)
        try:
            said = sock.recv(1)
        except ConnectionResetError:
            return Probe(version, ProbeOutcome.ANSWERED)
        except TimeoutError:
            return Probe(version, ProbeOutcome.SILENT, f"nothing within {ANSWER_SECONDS:g} s")
        except OSError as error:
            return Probe(version, ProbeOutcome.STRANGE, os.strerror(error.errno or 0))
    return Probe(version, ProbeOutcome.STRANGE, "it sent bytes" if said else "it closed in order")


def half_open(addresses: Iterable[str], port: int, mark: int = 0) -> dict[str, Outcome]:
    """Return what `port` of each address says to a SYN. Raises OSError without CAP_NET_RAW.

    `mark` is the packets' (SO_MARK): the tunnel's own passes a pod's capture.
    """
    by_version: dict[int, set[str]] = {}
    for each in addresses:
        by_version.setdefault(ipaddress.ip_address(each).version, set()).add(each)
    outcomes: dict[str, Outcome] = {}
    for found in _together(lambda one: _Scan(one, port, mark).run(by_version[one]), by_version):
        outcomes |= found
    return outcomes


class _Scan:
    """One family's SYNs and their answers."""

    def __init__(self, version: int, port: int, mark: int) -> None:
        self._family = socket.AF_INET if version == _V4 else socket.AF_INET6
        self._port = port
        self._mark = mark

    def run(self, addresses: set[str]) -> dict[str, Outcome]:
        with (
            socket.socket(self._family, socket.SOCK_RAW, socket.IPPROTO_TCP) as raw,
            # Holds the source port: no connection of anybody's gets it meanwhile.
            socket.socket(self._family, socket.SOCK_STREAM) as reserved,
        ):
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, self._mark)
            if self._family == socket.AF_INET6:
                raw.setsockopt(socket.IPPROTO_IPV6, _IPV6_CHECKSUM, _TCP_CHECKSUM_OFFSET)
            reserved.bind(("", 0))
            own = int(reserved.getsockname()[1])
            return self._exchange(raw, own, addresses)

    def _exchange(self, raw: socket.socket, own: int, addresses: set[str]) -> dict[str, Outcome]:
        outcomes: dict[str, Outcome] = {}
        end = time.monotonic() + SYN_SECONDS
        again = time.monotonic() + SYN_AGAIN_SECONDS
        self._send(raw, own, addresses, outcomes)
        while (now := time.monotonic()) < end and len(outcomes) < len(addresses):
            if now >= again:
                again = end
                self._send(raw, own, addresses - outcomes.keys(), outcomes)
            if select.select([raw], [], [], max(0.0, min(end, again) - now))[0]:
                self._take(raw, own, addresses, outcomes)
        return outcomes | dict.fromkeys(addresses - outcomes.keys(), Outcome.SILENT)

    def _send(
        self, raw: socket.socket, own: int, addresses: set[str], outcomes: dict[str, Outcome]
    ) -> None:
        for address in addresses:
            try:
                raw.sendto(self._segment(own, address), (address, 0))
            except OSError as error:
                if error.errno in (errno.EPERM, errno.EACCES):
                    # A packet filter on the way out.
                    outcomes[address] = Outcome.SILENT
                else:
                    outcomes[address] = Outcome.UNREACHABLE

    def _segment(self, own: int, address: str) -> bytes:
        sequence = int.from_bytes(os.urandom(4), "big")
        fields = (own, self._port, sequence, 0, 5 << 4, _SYN, _WINDOW)
        if self._family == socket.AF_INET6:
            return _TCP.pack(*fields, 0, 0)
        ends = (ipaddress.ip_address(end) for end in (self._source(address), address))
        pseudo = b"".join(end.packed for end in ends)
        pseudo += struct.pack("!BBH", 0, socket.IPPROTO_TCP, _TCP.size)
        return _TCP.pack(*fields, _checksum(pseudo + _TCP.pack(*fields, 0, 0)), 0)

    def _source(self, address: str) -> str:
        """Return the address that the kernel gives packets to there: it is in the checksum."""
        with socket.socket(self._family, socket.SOCK_DGRAM) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, self._mark)
            sock.connect((address, self._port))
            return str(sock.getsockname()[0])

    def _take(
        self, raw: socket.socket, own: int, addresses: set[str], outcomes: dict[str, Outcome]
    ) -> None:
        packet, (source, *_) = raw.recvfrom(_ENOUGH)
        # A raw socket of IPv4 gets the IP header too (raw(7)), one of IPv6 does not.
        start = (packet[0] & 0x0F) * 4 if self._family == socket.AF_INET and packet else 0
        if len(packet) < start + _TCP.size or source not in addresses:
            return
        from_port, to_port, _, _, _, flags, _, _, _ = _TCP.unpack_from(packet, start)
        if (from_port, to_port) != (self._port, own):
            return
        if flags & _RST:
            outcomes[source] = Outcome.REFUSED
        elif flags & _SYN and flags & _ACK:
            outcomes[source] = Outcome.ANSWERED


def _checksum(data: bytes) -> int:
    """RFC 1071; `data` has an even length."""
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
