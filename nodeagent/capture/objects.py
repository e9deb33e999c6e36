"""A pod's own BPF objects, pinned in a directory of their own, and its place in the shared ones.

This module owns the directory `<bpf_dir>/<netns cookie>/` and what is in it. It promises that the
directory is there before the pod has a number in the shared maps, and the record before anything
else; that a program in use stays pinned until its successor is in place; and that a pin's name says
what it was made of: a stopped or killed agent finds all again. It may not touch the namespace but
through the link.

    record       what the pod is, and what its namespace was like before (JSON)
    capture_D    the capture program; D is the digest of object code, shared maps and number
    link         its attachment to the namespace

Agents before had `slots`, `settings`, `counters`, `egress_D` and `ingress_D` there as well, for
each pod. They are read as long as the pod has no number, and removed once nothing uses them.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
from pathlib import Path
from typing import Final

import msgspec

from nodeagent.capture import _libbpf
from nodeagent.capture.layout import (
    COUNTERS,
    RECORD_SIZE,
    SETTINGS_SIZE,
    SLOTS,
)
from nodeagent.capture.shared import NodeObjects

__all__ = ["PodObjects", "Record"]

CAPTURE: Final = "capture"
RECORD: Final = "record"
LINK: Final = "link"

RECORD_VERSION: Final = 1
"""Raised when an older agent would misread the record."""

_ZERO: Final = struct.pack("I", 0)

_RECORD_SHAPE: Final = (_libbpf.MAP_TYPE_ARRAY, 4, RECORD_SIZE, 1)
_OLD_SHAPES: Final = {
    "slots": (_libbpf.MAP_TYPE_SOCKMAP, 4, 8, SLOTS),
    "settings": (_libbpf.MAP_TYPE_ARRAY, 4, SETTINGS_SIZE, 1),
}
"""Type, key size, value size, entries."""


class Record(msgspec.Struct, frozen=True):
    """What must be known of an enrolled pod after a restart."""

    uid: str
    netns_cookie: int
    netns_path: str
    addresses: tuple[str, ...]
    sysctls: dict[str, str]
    clsact: frozenset[str]
    version: int = RECORD_VERSION
    number: int = 0
    """Its number in the shared maps; 0 if an agent wrote it that knew none."""


class PodObjects:
    """The pinned objects of one pod. Nothing is created before `create`."""

    def __init__(self, bpf_dir: Path, cookie: int, node: NodeObjects) -> None:
        self.directory = bpf_dir / f"{cookie:x}"
        self._cookie = cookie
        self._node = node
        self._fds: dict[str, int] = {}
        self._record: Record | None = None

    def __repr__(self) -> str:
        return f"PodObjects({str(self.directory)!r})"

    # --- pins ---

    def _open(self, name: str) -> int | None:
        fd = self._fds.get(name)
        if fd is None:
            with contextlib.suppress(FileNotFoundError):
                fd = self._fds[name] = _libbpf.get_pinned(f"{self.directory}/{name}")
        return fd

    def _pin(self, name: str, fd: int) -> None:
        path = self.directory / name
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        _libbpf.pin(fd, str(path))
        self._forget(name)
        self._fds[name] = fd

    def _keep(self, name: str, fd: int) -> None:
        """Pin a descriptor, or close it."""
        try:
            self._pin(name, fd)
        except BaseException:
            os.close(fd)
            raise

    def _forget(self, name: str) -> None:
        fd = self._fds.pop(name, None)
        if fd is not None:
            os.close(fd)

    def _old(self, name: str) -> int | None:
        """Return a map of an agent before, if this pod has it still."""
        fd = self._open(name)
        return fd if fd is not None and _libbpf.map_info(fd) == _OLD_SHAPES[name] else None

    def exists(self) -> bool:
        """Whether the pod's record is there, and so perhaps anything else of it."""
        return (self.directory / RECORD).exists()

    # --- record ---

    def create(self, record: Record) -> None:
        """Write the record, with a number of the pod's own. Raises OSError, ValueError."""
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        number = self.number() or self._node.claim(self._cookie)
        record = msgspec.structs.replace(record, number=number)
        data = msgspec.json.encode(record)
        if len(data) >= RECORD_SIZE:
            raise ValueError(f"record of {len(data)} bytes exceeds {RECORD_SIZE - 1}")
        data = data.ljust(RECORD_SIZE, b"\0")
        self._record = record
        known = self._open(RECORD)
        if known is not None and _libbpf.map_info(known) == _RECORD_SHAPE:
            _libbpf.update_map(known, _ZERO, data)
            return
        # Filled before it is pinned: a record that is there is whole.
        fd = _libbpf.create_map(_libbpf.MAP_TYPE_ARRAY, RECORD, 4, RECORD_SIZE, 1)
        try:
            _libbpf.update_map(fd, _ZERO, data)
        except BaseException:
            os.close(fd)
            raise
        self._keep(RECORD, fd)

    def record(self) -> Record | None:
        """Return the record; None if there is none or it cannot be read."""
        if self._record is not None:
            return self._record
        fd = self._open(RECORD)
        if fd is None or _libbpf.map_info(fd) != _RECORD_SHAPE:
            return None
        data = _libbpf.read_map(fd, _ZERO, RECORD_SIZE).rstrip(b"\0")
        try:
            record = msgspec.json.decode(data, type=Record)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return None
        self._record = record if record.version == RECORD_VERSION else None
        return self._record

    def number(self) -> int:
        """Return the pod's number in the shared maps, 0 if it has none."""
        record = self.record()
        if record is None or not self._node.owns(record.number, self._cookie):
            return 0
        return record.number

    def _numbered(self) -> int:
        number = self.number()
        if not number:
            raise OSError(f"{self.directory}: the pod has no number in the shared maps")
        return number

    # --- maps ---

    def fill_slot(self, slot: int, sock: int) -> None:
        self._node.fill(self._numbered(), slot, sock)

    def slots(self) -> tuple[int, ...]:
        """Return the cookies of the sockets in the slots, 0 for an empty slot."""
        number = self.number()
        return self._node.slots(number) if number else (0,) * SLOTS

    def held(self) -> tuple[bool, ...]:
        """Say of each slot whether it has a socket, in whatever agent's map."""
        number = self.number()
        if number:
            return tuple(map(bool, self._node.slots(number)))
        fd = self._old("slots")
        return tuple(fd is not None and self._has(fd, slot) for slot in range(SLOTS))

    @staticmethod
    def _has(fd: int, slot: int) -> bool:
        try:
            _libbpf.read_map(fd, struct.pack("I", slot), 8)
        except FileNotFoundError:
            return False
        return True

    def write_settings(self, body: bytes) -> None:
        """Put settings and addresses in force (`pack_settings`, then `pack_config`)."""
        number = self.number()
        if number:
            self._node.write(number, self._cookie, body)
        fd = self._old("settings")
        if fd is not None:
            _libbpf.update_map(fd, _ZERO, body[:SETTINGS_SIZE])

    def settings(self) -> bytes:
        """Return what `write_settings` wrote, only the settings if an agent before wrote them."""
        number = self.number()
        if number:
            return self._node.read(number)
        fd = self._old("settings")
        return b"" if fd is None else _libbpf.read_map(fd, _ZERO, SETTINGS_SIZE)

    def counters(self) -> dict[str, int]:
        number = self.number()
        return self._node.counters(number) if number else dict.fromkeys(COUNTERS, 0)

    # --- programs ---

    def _pinned(self) -> str:
        """Return the name under which the right capture program would be pinned."""
        made_of = f"{self._node.digest()} {self._numbered()}"
        return f"{CAPTURE}_{hashlib.sha256(made_of.encode()).hexdigest()[:12]}"

    def program_ids(self) -> tuple[int, dict[str, int]]:
        """Return the ids of the pinned capture program and of the guard's, by direction."""
        fd = self._open(self._pinned()) if self.number() else None
        return 0 if fd is None else _libbpf.program_id(fd), self._node.guard_ids()

    def guard(self, direction: str) -> tuple[int, int]:
        """Return the guard program, loaded if need be, and what tells it that the pod is this."""
        return self._node.guard(direction), self._numbered()

    def prune(self) -> None:
        """Unpin what other versions left; call when none of it is attached."""
        keep = {RECORD, LINK, self._pinned()}
        for name in os.listdir(self.directory):  # noqa: PTH208 - a thousand times less to make
            if name not in keep:
                (self.directory / name).unlink()
                self._forget(name)

    # --- link ---

    def attach(self, netns: int) -> None:
        """Attach the capture program, or put it in the place of the attached one, at once."""
        name = self._pinned()
        program = self._open(name)
        if program is None:
            program = self._node.capture(self._numbered())
            self._keep(name, program)
        link = self._open(LINK)
        if link is not None and _libbpf.link_info(link)[1]:
            _libbpf.update_link(link, program)
            return
        self._keep(LINK, _libbpf.link_netns(program, netns))

    def link(self) -> int:
        """Return the id of the attached capture program, 0 if none is attached."""
        fd = self._open(LINK)
        if fd is None:
            return 0
        program, netns = _libbpf.link_info(fd)
        return program if netns else 0

    def detach(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            (self.directory / LINK).unlink()
        self._forget(LINK)

    # --- end ---

    def remove(self) -> None:
        """Unpin everything, the record last, give the number back, and close."""
        record = self.record()
        if self.directory.is_dir():
            for path in self.directory.iterdir():
                if path.name != RECORD:
                    path.unlink()
            if record is not None:
                self._node.release(record.number, self._cookie)
            (self.directory / RECORD).unlink(missing_ok=True)
            self.close()
            self.directory.rmdir()
        self._record = None
        self.close()
        self._node.remove_unused()

    def close(self) -> None:
        """Close descriptors; pins stay."""
        for name in list(self._fds):
            self._forget(name)
