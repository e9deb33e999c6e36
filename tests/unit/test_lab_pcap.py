"""Reading captures: streams put together in order, and TLS records accounted for."""

from __future__ import annotations

import ipaddress
import struct

import pytest

from nodeagent.lab import pcap

A, B = "10.0.0.1", "10.0.0.2"
SYN, ACK = 0x02, 0x10


def tcp(
    sequence: int, payload: bytes, flags: int = ACK, ports: tuple[int, int] = (40000, 80)
) -> bytes:
    return struct.pack("!HHIIBBHHH", *ports, sequence, 0, 5 << 4, flags, 1000, 0, 0) + payload


def ipv4(segment: bytes, source: str = A, destination: str = B) -> bytes:
    header = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(segment), 0, 0, 64, 6, 0)
    ends = ipaddress.ip_address(source).packed + ipaddress.ip_address(destination).packed
    return b"\0" * 12 + b"\x08\x00" + header + ends + segment


def ipv6(segment: bytes, source: str = "fd00::1", destination: str = "fd00::2") -> bytes:
    header = struct.pack("!IHBB", 6 << 28, len(segment), 6, 64)
    ends = ipaddress.ip_address(source).packed + ipaddress.ip_address(destination).packed
    return b"\0" * 12 + b"\x86\xdd" + header + ends + segment


def file(*frames: bytes, order: str = "<", link: int = 1) -> bytes:
    head = struct.pack(f"{order}IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 262144, link)
    records = [struct.pack(f"{order}IIII", 0, 0, len(one), len(one)) + one for one in frames]
    return head + b"".join(records)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("packet", [ipv4, ipv6])
def test_pieces_are_joined_in_order_whatever_the_order_of_arrival(
    order: str, packet: object
) -> None:
    wrap = ipv4 if packet is ipv4 else ipv6
    first = 2**32 - 3  # the sequence number wraps inside the stream
    pieces = [
        tcp(first, b"", SYN),
        tcp((first + 1 + 4) % 2**32, b"5678"),
        tcp(first + 1, b"1234"),
        tcp(first + 1, b"12"),  # a retransmission with less
        tcp((first + 1 + 6) % 2**32, b"789"),  # one that overlaps
    ]
    (stream,) = pcap.read(file(*map(wrap, pieces), order=order)).streams
    assert (stream.data, stream.missing) == (b"123456789", 0)
    assert (stream.source_port, stream.destination_port) == (40000, 80)


def test_a_gap_is_said() -> None:
    frames = [ipv4(tcp(1, b"", SYN)), ipv4(tcp(2, b"ab")), ipv4(tcp(10, b"xyz"))]
    (stream,) = pcap.read(file(*frames)).streams
    assert (stream.data, stream.missing) == (b"ab", 3)


def test_other_packets_and_streams_without_a_beginning_are_counted_only() -> None:
    udp = ipv4(tcp(1, b"x", SYN)).replace(b"\x40\x06", b"\x40\x11")
    capture = pcap.read(file(udp, b"\0" * 60, ipv4(tcp(5, b"late"))))
    assert capture.packets == 3
    assert capture.streams == ()


def test_padding_behind_the_packet_is_no_data() -> None:
    frame = ipv4(tcp(2, b"ab")) + b"\0" * 6
    (stream,) = pcap.read(file(ipv4(tcp(1, b"", SYN)), frame)).streams
    assert stream.data == b"ab"


def test_a_cut_last_packet_is_left_out() -> None:
    whole = file(ipv4(tcp(1, b"", SYN)), ipv4(tcp(2, b"ab")))
    for length in range(len(whole)):
        if length < 24:
            with pytest.raises(pcap.CaptureError):
                pcap.read(whole[:length])
        else:
            assert pcap.read(whole[:length]).packets <= 1


@pytest.mark.parametrize("raw", [b"", b"x" * 40, file(link=113)])
def test_what_is_no_ethernet_capture_is_refused(raw: bytes) -> None:
    with pytest.raises(pcap.CaptureError):
        pcap.read(raw)


def record(kind: int, size: int, version: int = 0x0303) -> bytes:
    return struct.pack("!BHH", kind, version, size) + b"z" * size


def test_tls_records_are_counted_and_all_bytes_accounted() -> None:
    data = record(22, 300, 0x0301) + record(20, 1) + record(23, 16640) + record(23, 5)
    walk = pcap.walk_tls(data)
    assert walk.records == {"handshake": 1, "change_cipher_spec": 1, "application_data": 2}
    assert walk.accounted == len(data)


def test_a_record_still_on_its_way_is_accounted_but_not_counted() -> None:
    data = record(23, 100)
    assert pcap.walk_tls(data[:50]) == pcap.Walk({}, 50)


@pytest.mark.parametrize(
    "foreign",
    [b"GET / HTTP/1.1\r\n", record(24, 5), record(23, 16641), record(23, 5, 0x0304)],
)
def test_the_walk_stops_at_what_is_no_record(foreign: bytes) -> None:
    good = record(22, 10)
    assert pcap.walk_tls(good + foreign).accounted == len(good)
