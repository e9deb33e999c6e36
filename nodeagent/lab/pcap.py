"""What a packet capture shows: TCP streams, and the TLS records in them.

This module owns reading capture files (the classic format that `tcpdump -w` writes) and walking TLS
records. It promises to say how much of a stream it could account for, so that "only TLS" is never
claimed of bytes that nobody looked at. It is pure: bytes in, values out.

Sources: the libpcap file format (pcap-savefile(5)), RFC 791, RFC 8200, RFC 9293, RFC 8446 5.1.
"""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

__all__ = ["Capture", "CaptureError", "Stream", "Walk", "read", "walk_tls"]

MAGIC_MICROSECONDS: Final = 0xA1B2C3D4
MAGIC_NANOSECONDS: Final = 0xA1B23C4D
HEADER_BYTES: Final = 24
RECORD_BYTES: Final = 16
ETHERNET: Final = 1

ETHER_IPV4: Final = 0x0800
ETHER_IPV6: Final = 0x86DD
ETHER_BYTES: Final = 14
IPV6_BYTES: Final = 40
TCP: Final = 6
FLAG_SYN: Final = 0x02

TLS_HEADER: Final = struct.Struct("!BHH")
TLS_TYPES: Final = {20: "change_cipher_spec", 21: "alert", 22: "handshake", 23: "application_data"}
TLS_VERSIONS: Final = frozenset({0x0301, 0x0303})
"""legacy_record_version: 0x0303, and 0x0301 on a first ClientHello (RFC 8446, 5.1)."""
MAX_TLS_RECORD: Final = 2**14 + 256


class CaptureError(ValueError):
    """The bytes are no capture file that this module reads."""


class Stream(NamedTuple):
    """One direction of a TCP connection. `data` are its bytes in order, from the first one on.

    `missing` counts bytes after `data` that arrived beyond a gap, which the capture does not hold.
    """

    source: str
    source_port: int
    destination: str
    destination_port: int
    data: bytes
    missing: int


class Capture(NamedTuple):
    """`streams` are those whose beginning (SYN) was captured; `raw` is the whole file."""

    packets: int
    streams: tuple[Stream, ...]
    raw: bytes


class Walk(NamedTuple):
    """TLS records of a stream by type, and how many bytes of it were in records.

    `accounted` counts the beginning of a record whose end had not come yet, too.
    """

    records: dict[str, int]
    accounted: int


Key = tuple[bytes, int, bytes, int]


class _Segment(NamedTuple):
    key: Key
    sequence: int
    syn: bool
    payload: bytes


class _Flow:
    """The pieces of one direction, by their distance from the first byte."""

    def __init__(self, first: int) -> None:
        self._first = first
        self._pieces: dict[int, bytes] = {}

    def add(self, sequence: int, payload: bytes) -> None:
        offset = (sequence - self._first) % 2**32
        if len(payload) > len(self._pieces.get(offset, b"")):
            self._pieces[offset] = payload

    def join(self) -> tuple[bytes, int]:
        data = bytearray()
        missing = 0
        for offset, payload in sorted(self._pieces.items()):
            if offset > len(data):
                missing += len(payload)
            else:
                data += payload[len(data) - offset :]
        return bytes(data), missing


def read(raw: bytes) -> Capture:
    """Return what a capture file holds. Raises CaptureError; a cut last packet is left out."""
    if len(raw) < HEADER_BYTES:
        raise CaptureError(f"{len(raw)} bytes are no capture file")
    order = next(
        (
            sign
            for sign in "<>"
            if struct.unpack_from(f"{sign}I", raw)[0] in {MAGIC_MICROSECONDS, MAGIC_NANOSECONDS}
        ),
        None,
    )
    if order is None:
        raise CaptureError("no capture file of the classic format")
    link_type = struct.unpack_from(f"{order}I", raw, 20)[0] & 0xFFFF
    if link_type != ETHERNET:
        raise CaptureError(f"link type {link_type} is not Ethernet")
    packets = 0
    flows: dict[Key, _Flow] = {}
    for frame in _frames(raw, order):
        packets += 1
        segment = _segment(frame)
        if segment is None:
            continue
        if segment.syn:
            flows.setdefault(segment.key, _Flow(segment.sequence + 1))
        flow = flows.get(segment.key)
        if flow is not None and segment.payload:
            flow.add(segment.sequence, segment.payload)
    streams = tuple(_stream(key, flow) for key, flow in flows.items())
    return Capture(packets, streams, raw)


def _stream(key: Key, flow: _Flow) -> Stream:
    source, source_port, destination, destination_port = key
    texts = [str(ipaddress.ip_address(address)) for address in (source, destination)]
    return Stream(texts[0], source_port, texts[1], destination_port, *flow.join())


def _frames(raw: bytes, order: str) -> Iterator[bytes]:
    position = HEADER_BYTES
    while position + RECORD_BYTES <= len(raw):
        captured = struct.unpack_from(f"{order}I", raw, position + 8)[0]
        start = position + RECORD_BYTES
        if start + captured > len(raw):
            return
        yield raw[start : start + captured]
        position = start + captured


def _segment(frame: bytes) -> _Segment | None:
    """Return the TCP segment in an Ethernet frame, if there is one."""
    if len(frame) < ETHER_BYTES:
        return None
    kind = int.from_bytes(frame[12:14])
    packet = frame[ETHER_BYTES:]
    if kind == ETHER_IPV4 and len(packet) >= 20 and packet[9] == TCP:  # noqa: PLR2004 - RFC 791
        start, total = (packet[0] & 0x0F) * 4, int.from_bytes(packet[2:4])
        source, destination = packet[12:16], packet[16:20]
    elif kind == ETHER_IPV6 and len(packet) >= IPV6_BYTES and packet[6] == TCP:
        start, total = IPV6_BYTES, IPV6_BYTES + int.from_bytes(packet[4:6])
        source, destination = packet[8:24], packet[24:40]
    else:
        return None
    # A length of 0 means that the kernel will segment a larger packet: the frame is the packet.
    segment = packet[start : total if total > start else None]
    if len(segment) < 20:  # noqa: PLR2004 - RFC 9293, 3.1
        return None
    ports = struct.unpack_from("!HHI", segment)
    key = (source, ports[0], destination, ports[1])
    payload = segment[(segment[12] >> 4) * 4 :]
    return _Segment(key, ports[2], bool(segment[13] & FLAG_SYN), payload)


def walk_tls(data: bytes) -> Walk:
    """Walk the TLS records at the beginning of `data`; stops at the first byte that is in none."""
    records: dict[str, int] = {}
    position = 0
    while position + TLS_HEADER.size <= len(data):
        kind, version, length = TLS_HEADER.unpack_from(data, position)
        if kind not in TLS_TYPES or version not in TLS_VERSIONS or length > MAX_TLS_RECORD:
            return Walk(records, position)
        end = position + TLS_HEADER.size + length
        if end > len(data):
            break
        records[TLS_TYPES[kind]] = records.get(TLS_TYPES[kind], 0) + 1
        position = end
    return Walk(records, len(data))
