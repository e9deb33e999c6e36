"""Devices and addresses of a pod, as values.

This module owns the types. It promises that they compare equal when they mean the same. It may not
read them from anywhere.
"""

from __future__ import annotations

from typing import Final

import msgspec

__all__ = ["LO_INDEX", "Address", "Device", "Interfaces"]

LO_INDEX: Final = 1
"""Index of `lo` in every namespace: LOOPBACK_IFINDEX of the kernel."""


class Device(msgspec.Struct, frozen=True, order=True):
    """A network device that is up."""

    index: int
    name: str


class Address(msgspec.Struct, frozen=True, order=True):
    """An address that is ready for use. `text` is canonical; link-local ones are left out."""

    device: int
    text: str


class Interfaces(msgspec.Struct, frozen=True):
    """Devices that are up, `lo` left out, and the addresses on them."""

    devices: tuple[Device, ...]
    addresses: tuple[Address, ...]

    def missing(self, wanted: tuple[str, ...]) -> tuple[str, ...]:
        """Return those of `wanted` that no device carries."""
        there = {address.text for address in self.addresses}
        return tuple(text for text in wanted if text not in there)
