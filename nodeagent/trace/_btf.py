"""Where fields lie in the running kernel's structures, by its BTF.

This module owns reading BTF (Linux, Documentation/bpf/btf.rst). It promises that a structure or a
field that is not there is an error with its name, and that damaged bytes are one too. Pure.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from typing import Final

__all__ = ["BtfError", "offsets"]

_HEADER: Final = struct.Struct("=HBBIIIII")
_TYPE: Final = struct.Struct("=III")
_MEMBER: Final = struct.Struct("=III")
_MAGIC: Final = 0xEB9F

_STRUCT, _UNION = 4, 5
_THROUGH: Final = frozenset({8, 9, 10, 11, 18})
"""typedef, volatile, const, restrict, type tag: the same bytes under another name."""

_EXTRA: Final[Mapping[int, tuple[int, int]]] = {
    1: (4, 0),
    3: (12, 0),
    4: (0, 12),
    5: (0, 12),
    6: (0, 8),
    13: (0, 8),
    14: (4, 0),
    15: (0, 12),
    17: (4, 0),
    19: (0, 12),
}
"""Bytes behind a type by its kind: always, and for each of its members. Others have none."""

_LAST_KIND: Final = 19
_BITS: Final = 8

_Member = tuple[str, int, int]
"""Name, type, offset in bits."""


class BtfError(Exception):
    """The kernel's BTF does not say where a field lies."""


def offsets(data: bytes, paths: Iterable[str]) -> dict[str, int]:
    """Return the offset in bytes of each path, "structure.member.member". Raises BtfError."""
    wanted = list(paths)
    try:
        types = _Types(data, {path.partition(".")[0] for path in wanted})
        return {path: types.offset(path) for path in wanted}
    except (struct.error, ValueError, IndexError, RecursionError):
        raise BtfError("the kernel's BTF is cut short or damaged") from None


class _Types:
    """The places of all types; members are read when they are asked for."""

    def __init__(self, data: bytes, names: set[str]) -> None:
        magic, _, _, header, type_at, type_bytes, text_at, _ = _HEADER.unpack_from(data)
        if magic != _MAGIC:
            raise BtfError("no BTF of this machine's byte order")
        self._data = data
        self._text = header + text_at
        self._places = [0]
        """Of each type; number 0 is void."""
        self._named: dict[str, int] = {}
        at, end = header + type_at, header + type_at + type_bytes
        while at < end:
            name, info, _ = _TYPE.unpack_from(data, at)
            kind, members = info >> 24 & 0x1F, info & 0xFFFF
            if kind > _LAST_KIND:
                raise BtfError(f"the kernel's BTF has types of a kind {kind}, unknown here")
            if kind == _STRUCT:
                spelled = self._string(name)
                if spelled in names:
                    self._named[spelled] = len(self._places)
            self._places.append(at)
            always, each = _EXTRA.get(kind, (0, 0))
            at += _TYPE.size + always + each * members

    def _string(self, offset: int) -> str:
        start = self._text + offset
        return self._data[start : self._data.index(b"\0", start)].decode("ascii", "replace")

    def offset(self, path: str) -> int:
        first, *rest = path.split(".")
        number = self._named.get(first)
        if number is None:
            raise BtfError(f"the kernel has no struct {first}")
        bits = 0
        for name in rest:
            found = self._find(number, name)
            if found is None:
                raise BtfError(f"the kernel's struct {first} has no {'.'.join(rest)}")
            bits += found[0]
            number = found[1]
        return bits // _BITS

    def _find(self, number: int, wanted: str) -> tuple[int, int] | None:
        """Return offset in bits and type of a member, also one of a structure without a name."""
        for name, kind, bits in self._members(number):
            if name == wanted:
                return bits, kind
            inner = None if name else self._find(kind, wanted)
            if inner is not None:
                return bits + inner[0], inner[1]
        return None

    def _members(self, number: int) -> list[_Member]:
        at = self._places[number]
        _, info, of = _TYPE.unpack_from(self._data, at)
        kind = info >> 24 & 0x1F
        if kind in _THROUGH:
            return self._members(of)
        if kind not in (_STRUCT, _UNION):
            return []
        found: list[_Member] = []
        for index in range(info & 0xFFFF):
            name, inner, place = _MEMBER.unpack_from(
                self._data, at + _TYPE.size + index * _MEMBER.size
            )
            # With the flag the upper byte is a bit field's width.
            bits = place & 0xFFFFFF if info >> 31 else place
            found.append((self._string(name), inner, bits))
        return found
