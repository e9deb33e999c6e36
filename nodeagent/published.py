"""What ztunnel is told, as values: the whole state, the difference of two, and its frames.

This module owns the order and the size of a change on the wire. It promises that the parts of a
change, applied to the old state, give the new one; that no part comes near the frame limit; and
that equal states make no parts. Pure: no sockets, no clocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

import msgspec

from ztunnel import protocol

__all__ = ["Change", "Key", "Part", "State", "changed", "key_of", "plan", "touched"]

PART_BYTES: Final = 256 * 1024
"""Encoded resources of one part: the kernel's default socket buffer holds about as much, so a slow
reader is noticed part by part."""

MAX_RESOURCE: Final = protocol.MAX_FRAME - 64 * 1024
"""Encoded bytes of one resource; the rest of a frame is its envelope."""

_ORDER: Final = (
    protocol.TrustBundle,
    protocol.Credential,
    protocol.Workload,
    protocol.Service,
    protocol.Authorization,
    protocol.WorkloadPolicy,
    protocol.Pod,
)

Key = tuple[str, str]
"""Kind (the tag on the wire) and uid."""

State = Mapping[Key, protocol.Resource]

_RANK: Final[dict[type, int]] = {kind: rank for rank, kind in enumerate(_ORDER)}
_TAGS: Final[dict[type, str]] = {kind: str(kind.__struct_config__.tag) for kind in _ORDER}
_encoder = msgspec.msgpack.Encoder()


class Part(msgspec.Struct, frozen=True):
    """One frame of a change; `pod` is the uid whose descriptors go with it, if any."""

    update: protocol.Update
    pod: str = ""


class Change(msgspec.Struct, frozen=True):
    """The parts in order, and the resources that are too large to be sent at all."""

    parts: tuple[Part, ...]
    oversized: tuple[Key, ...] = ()


def key_of(resource: protocol.Resource) -> Key:
    return (_TAGS[type(resource)], resource.uid)


def changed(
    state: State, upserts: Iterable[protocol.Resource], removals: Iterable[protocol.Removal]
) -> dict[Key, protocol.Resource] | None:
    """Return `state` with the changes applied, or None if they change nothing."""
    fresh = dict(state)
    different = False
    for removal in removals:
        different |= fresh.pop((removal.kind, removal.uid), None) is not None
    for resource in upserts:
        key = key_of(resource)
        if _differs(fresh.get(key), resource):
            fresh[key] = resource
            different = True
    return fresh if different else None


def touched(upserts: Iterable[protocol.Resource], removals: Iterable[protocol.Removal]) -> set[Key]:
    """Return the keys in which `changed` can make a difference."""
    return {*map(key_of, upserts), *((removal.kind, removal.uid) for removal in removals)}


def plan(
    old: State | None, new: State, version: int, differ: Iterable[Key] | None = None
) -> Change:
    """Return the frames that turn `old` into `new`; `old` None means a reset.

    With `differ`, the states differ in these keys at most, and are not compared in others.
    A pod travels alone, with its descriptors. The last part carries `commit` and no pod, so that a
    pod that went away while the change was being sent can be left out.
    """
    oversized: list[Key] = []
    parts: list[Part] = []
    batch: list[protocol.Resource] = []
    size = 0
    base: State = {} if old is None else old
    if old is None or differ is None:
        # In the order of `new`, nearly that of the frames: sorting finds out in one pass.
        differ = (*new, *(base.keys() - new.keys()))
    gone = sorted(key for key in differ if key in base and key not in new)
    removals = tuple(protocol.Removal(kind, uid) for kind, uid in gone)
    if old is None:
        parts.append(Part(protocol.Update(version, reset=True, commit=False)))
    for chunk in _split(removals):
        parts.append(Part(protocol.Update(version, removals=chunk, commit=False)))
    wanted = [
        (key, value)
        for key in differ
        if (value := new.get(key)) is not None
        # Most are the very same, and a call for each of them takes longer than the comparison.
        and (known := base.get(key)) is not value
        and _differs(known, value)
    ]
    for key, resource in sorted(wanted, key=lambda item: (_RANK[type(item[1])], item[0])):
        length = len(_encoder.encode(resource))
        if length > MAX_RESOURCE:
            oversized.append(key)
            continue
        if isinstance(resource, protocol.Pod):
            parts.append(
                Part(protocol.Update(version, upserts=(resource,), commit=False), resource.uid)
            )
            continue
        if batch and size + length > PART_BYTES:
            parts.append(Part(protocol.Update(version, upserts=tuple(batch), commit=False)))
            batch, size = [], 0
        batch.append(resource)
        size += length
    if batch:
        # Before the pods: a reader that looks at parts as they come finds a pod's credential first.
        at = next((index for index, part in enumerate(parts) if part.pod), len(parts))
        parts.insert(at, Part(protocol.Update(version, upserts=tuple(batch), commit=False)))
    if not parts:
        return Change((), tuple(oversized))
    last = parts[-1]
    if last.pod:
        parts.append(Part(protocol.Update(version, commit=True)))
    else:
        parts[-1] = Part(msgspec.structs.replace(last.update, commit=True))
    return Change(tuple(parts), tuple(oversized))


def _differs(old: protocol.Resource | None, new: protocol.Resource) -> bool:
    # A pod that is put again equals itself, but its descriptors have changed.
    return old is not new and (isinstance(new, protocol.Pod) or old != new)


def _split(removals: tuple[protocol.Removal, ...]) -> Iterable[tuple[protocol.Removal, ...]]:
    batch: list[protocol.Removal] = []
    size = 0
    for removal in removals:
        length = len(_encoder.encode(removal))
        if batch and size + length > PART_BYTES:
            yield tuple(batch)
            batch, size = [], 0
        batch.append(removal)
        size += length
    if batch:
        yield tuple(batch)
