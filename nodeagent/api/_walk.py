"""Tree to typed values: one walker, driven by the types of msgspec structs.

This module owns the step from marked nodes to structs. It promises that every unknown field, wrong
type and refused value is reported with its place, all of them and not only the first, and that a
value which was not wholly right is never built. It may not know any resource: what a field accepts
is said by its type and by the `Annotated` markers `Check`, `Unused`, `IGNORED` and `NULLABLE`.

msgspec's own decoding is not used: it stops at the first error and does not know lines.
"""

from __future__ import annotations

import enum
import functools
import types
import typing
from collections.abc import Callable
from typing import Any, Final, TypeVar, cast

import msgspec

from nodeagent.api._errors import ConfigError, ConfigWarning, quote
from nodeagent.api._scalars import is_null, read_boolean, read_integer, read_string
from nodeagent.api._tree import Broken, Mapping, Node, Scalar, Sequence, join

__all__ = [
    "IGNORED",
    "NULLABLE",
    "Check",
    "Field",
    "Unused",
    "Walker",
    "fields_of",
    "unwrap",
]

T = TypeVar("T")


class Check:
    """A marker: `function` returns what to keep of the value, or raises ValueError(reason)."""

    __slots__ = ("function",)

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.function = function


class Unused:
    """A marker: the field is legal and has no effect here; setting it warns with `reason`."""

    __slots__ = ("reason",)

    def __init__(self, reason: str) -> None:
        self.reason = reason


class _Marker(enum.Enum):
    IGNORED = enum.auto()
    NULLABLE = enum.auto()


IGNORED: Final = _Marker.IGNORED
"""A marker: whatever the field holds is left unread (a server's bookkeeping, such as `status`)."""

NULLABLE: Final = _Marker.NULLABLE
"""A marker: the field may be null, which means that it is absent."""


class _Bad:
    """Returned for a value whose error has been reported."""


_BAD: Final = _Bad()


class Field(typing.NamedTuple):
    """A field of a struct: its attribute, its type with markers, and whether it must be there."""

    name: str
    kind: object
    required: bool


@functools.cache
def fields_of(cls: type[msgspec.Struct]) -> dict[str, Field]:
    """Return the fields of a struct, by the names that authors write."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {
        info.encode_name: Field(info.name, hints[info.name], info.required)
        for info in msgspec.structs.fields(cls)
    }


class Walker:
    """Walks the documents of one file, and collects what is wrong with them."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.errors: list[ConfigError] = []
        self.warnings: list[ConfigWarning] = []

    def error(self, node: Node, path: str, reason: str) -> None:
        self.errors.append(ConfigError(self.file, node.line, node.column, path, reason))

    def warn(self, node: Node, path: str, reason: str) -> None:
        self.warnings.append(ConfigWarning(self.file, node.line, node.column, path, reason))

    def read(self, node: Node, kind: type[T], path: str) -> T | None:
        """Return `node` as a `kind`, or None after reporting every error in it."""
        value = self._value(node, kind, path)
        return None if isinstance(value, _Bad) else cast("T", value)

    def _value(self, node: Node, kind: object, path: str) -> object:
        base, markers = unwrap(kind)
        if isinstance(node, Broken):
            return _BAD
        if IGNORED in markers:
            return None
        if isinstance(node, Scalar) and is_null(node):
            if NULLABLE in markers:
                return None
            self.error(node, path, "is empty: give it a value, or delete the line")
            return _BAD
        value = self._typed(node, base, path)
        for marker in markers:
            if isinstance(value, _Bad):
                break
            if isinstance(marker, Unused):
                self.warn(node, path, marker.reason)
            elif isinstance(marker, Check):
                value = self._attempt(node, path, marker.function, value)
        return value

    def _attempt(
        self, node: Node, path: str, function: Callable[[Any], Any], value: object
    ) -> object:
        try:
            return function(value)
        except ValueError as error:
            self.error(node, path, str(error))
            return _BAD

    def _typed(self, node: Node, base: object, path: str) -> object:
        origin = typing.get_origin(base)
        if origin is dict:
            return self._dictionary(node, typing.get_args(base), path)
        if origin is tuple:
            return self._tuple(node, typing.get_args(base)[0], path)
        if not isinstance(base, type):
            raise TypeError(f"{path}: the walker knows no type {base!r}")
        if issubclass(base, msgspec.Struct):
            return self._struct(node, base, path)
        if not isinstance(node, Scalar):
            self.error(node, path, f"must be {_describe(base)}, not {_name(node)}")
            return _BAD
        if issubclass(base, enum.Enum):
            return self._attempt(node, path, functools.partial(_member, base), node)
        reader: Callable[[Scalar], object] = read_string
        if base is int:
            reader = read_integer
        elif base is bool:
            reader = read_boolean
        return self._attempt(node, path, reader, node)

    def _struct(self, node: Node, cls: type[msgspec.Struct], path: str) -> object:
        if not isinstance(node, Mapping):
            self.error(node, path, f"must be a mapping, not {_name(node)}")
            return _BAD
        fields = fields_of(cls)
        values: dict[str, object] = {}
        good = True
        for text, (key, child) in node.entries.items():
            below = join(path, text)
            field = fields.get(text)
            if field is None:
                self.error(key, below, f"unknown field; known here: {', '.join(sorted(fields))}")
                good = False
                continue
            value = self._value(child, field.kind, below)
            if isinstance(value, _Bad):
                good = False
            elif value is not None:
                values[field.name] = value
        for text, field in fields.items():
            if field.required and text not in node.entries:
                self.error(node, join(path, text), "is missing: add it")
                good = False
        return cls(**values) if good else _BAD

    def _dictionary(self, node: Node, kinds: tuple[object, ...], path: str) -> object:
        if not isinstance(node, Mapping):
            self.error(node, path, f"must be a mapping, not {_name(node)}")
            return _BAD
        key_kind, value_kind = kinds
        result: dict[object, object] = {}
        good = True
        for text, (key, child) in node.entries.items():
            below = join(path, text)
            name = self._key(key, key_kind, below)
            value = self._value(child, value_kind, below)
            if isinstance(name, _Bad) or isinstance(value, _Bad):
                good = False
            else:
                result[name] = value
        return result if good else _BAD

    def _key(self, key: Scalar, kind: object, path: str) -> object:
        base, _ = unwrap(kind)
        if base is int:
            # JSON and the Kubernetes API can only write such a key as text: both are the number.
            key = Scalar(key.line, key.column, key.text, plain=True)
        return self._value(key, kind, path)

    def _tuple(self, node: Node, kind: object, path: str) -> object:
        if not isinstance(node, Sequence):
            self.error(node, path, f"must be a list, not {_name(node)}")
            return _BAD
        values = [self._value(item, kind, join(path, i)) for i, item in enumerate(node.items)]
        return _BAD if any(isinstance(value, _Bad) for value in values) else tuple(values)


def unwrap(kind: object) -> tuple[object, tuple[object, ...]]:
    """Return the type below `Annotated` and `| None`, and the markers from the inside out."""
    markers: tuple[object, ...] = ()
    while True:
        origin = typing.get_origin(kind)
        if origin is typing.Annotated:
            kind, *found = typing.get_args(kind)
            markers = (*found, *markers)
        elif origin is types.UnionType or origin is typing.Union:
            (kind,) = (arg for arg in typing.get_args(kind) if arg is not types.NoneType)
        else:
            return kind, markers


def _member(cls: type[enum.Enum], scalar: Scalar) -> enum.Enum:
    for member in cls:
        if member.value == scalar.text:
            return member
    known = ", ".join(str(member.value) for member in cls)
    raise ValueError(f"{quote(scalar.text)} is unknown; write one of {known}")


def _describe(base: type) -> str:
    return {int: "a number", bool: "true or false"}.get(base, "text")


def _name(node: Node) -> str:
    if isinstance(node, Mapping):
        return "a mapping"
    return "a list" if isinstance(node, Sequence) else "a single value"
