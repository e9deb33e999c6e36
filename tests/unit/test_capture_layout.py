"""The Python and the C side of the layout are two copies of one agreement: compare them."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import pytest

from nodeagent.capture import layout
from nodeagent.capture.model import Enforcement

HEADER_DIRECTORY = Path(__file__).parents[2] / "bpf" / "include"
HEADER = (HEADER_DIRECTORY / "nodeagent.h").read_text(encoding="ascii")


@pytest.mark.parametrize(
    "name",
    [
        "MARK_TUNNEL",
        "MARK_DELIVERY",
        "MARK_OLDER",
        "HBONE_PORT",
        "MAX_ADDRESSES",
        "MAX_EXCEPTIONS",
        "MAX_PODS",
    ],
)
def test_numbers_are_the_headers(name: str) -> None:
    found = re.search(rf"^#define {name} +(\w+)", HEADER, re.MULTILINE)
    assert found
    assert getattr(layout, name) == int(found[1], 0)


def test_counters_are_the_headers_in_order() -> None:
    assert tuple(re.findall(r"X\([A-Z_]+, ([a-z_]+)\)", HEADER)) == layout.COUNTERS


def test_slots_are_in_the_order_of_the_ports() -> None:
    named = re.search(r"enum slot \{(.*?)\}", HEADER, re.DOTALL)
    assert named
    order = re.findall(r"SLOT_(\w+) = (\d)", named[1])
    ports = {"OUTBOUND": 15001, "INBOUND": 15006, "HBONE": 15008}
    assert [ports[name] for name, _ in order] == list(layout.PORTS)
    assert [int(number) for _, number in order] == list(range(layout.SLOTS))


def test_sizes_are_those_that_the_header_asserts() -> None:
    assert len(layout.pack_config([])) == 4 + 16 * layout.MAX_ADDRESSES
    packed = layout.pack_settings(strict_default=True, exceptions=())
    assert len(packed) == layout.SETTINGS_SIZE == 8 + 2 * layout.MAX_EXCEPTIONS


def test_a_pod_is_the_headers_struct() -> None:
    body = layout.pack_settings(strict_default=True, exceptions={80}) + layout.pack_config(["::1"])
    packed = layout.pack_pod(0x1234, body)
    assert len(packed) == layout.POD_SIZE
    assert f"sizeof(struct pod) == {layout.POD_SIZE}," in HEADER
    assert layout.unpack_pod(packed) == (0x1234, body)
    assert layout.slot_key(7, 2) == struct.pack("II", 7, 2)
    assert len(layout.pod_key(7)) == layout.PODS_KEY


def instruction(operation: int, registers: int, value: int) -> bytes:
    return struct.pack("=BBhi", operation, registers, 0, value)


def test_only_the_placeholder_becomes_the_number() -> None:
    placeholder = layout.POD_PLACEHOLDER
    program = [
        instruction(0x18, 0x06, placeholder) + instruction(0, 0, 0),
        # A map by its descriptor, and a comparison with the same bits: neither is the placeholder.
        instruction(0x18, 0x11, placeholder) + instruction(0, 0, 0),
        instruction(0x55, 0x01, placeholder),
    ]
    right = instruction(0x18, 0x06, 77) + instruction(0, 0, 0)
    assert layout.with_number(b"".join(program), 77) == right + b"".join(program[1:])


def test_a_program_without_a_place_for_the_number_is_refused() -> None:
    with pytest.raises(ValueError, match="no place"):
        layout.with_number(instruction(0x95, 0, 0), 1)


def test_the_placeholder_is_the_programs() -> None:
    source = (HEADER_DIRECTORY.parent / "capture.bpf.c").read_text(encoding="ascii")
    assert f"#define POD_PLACEHOLDER {layout.POD_PLACEHOLDER:#x}\n" in source


def test_addresses_are_mapped() -> None:
    assert layout.mapped("10.1.2.3") == b"\0" * 10 + b"\xff\xff\x0a\x01\x02\x03"
    assert layout.mapped("fd00::1") == b"\xfd" + b"\0" * 14 + b"\x01"


def test_too_many_addresses_are_an_error() -> None:
    with pytest.raises(ValueError, match="17 addresses"):
        layout.pack_config([f"10.0.0.{i}" for i in range(17)])


def test_exceptions_are_the_ports_of_the_other_mode() -> None:
    default, count, *ports = struct.unpack(
        f"II{layout.MAX_EXCEPTIONS}H",
        layout.pack_settings(strict_default=False, exceptions={443, 80}),
    )
    assert (default, count, ports[:3]) == (0, 2, [80, 443, 0])


def test_more_exceptions_than_fit_make_every_port_strict() -> None:
    packed = layout.pack_settings(strict_default=False, exceptions=range(1, 18))
    assert struct.unpack_from("II", packed) == (1, 0)


def test_enforcement_prefers_strict() -> None:
    both = Enforcement(
        strict_default=True,
        strict_ports=frozenset({80}),
        permissive_ports=frozenset({80, 90}),
    )
    assert both.is_strict(80)
    assert not both.is_strict(90)
    assert both.is_strict(100)
    assert both.exceptions() == {90}
    some = Enforcement(strict_default=False, strict_ports=frozenset({80}))
    assert some.any_strict
    assert some.exceptions() == {80}
    assert not Enforcement(strict_default=False).any_strict
