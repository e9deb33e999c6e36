"""A pod's BPF maps, programs and link, pinned in a directory of their own.

This module owns the directory `<bpf_dir>/<netns cookie>/` and what is in it. It promises that the
record is there before anything else is, that a program in use stays pinned until its successor is
in place, and that a pin's name says what it was made of: a stopped or killed agent finds all again.
It may not touch the namespace but through the link.

    record               what the pod is, and what its namespace was like before (JSON)
    slots                socket map of the tunnel's listeners
    settings, counters   of the guard, and of all programs
    capture_D, egress_D, ingress_D   programs; D is the digest of object code and addresses
    link                 the capture program's attachment to the namespace
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import struct
from pathlib import Path
from typing import Final

import msgspec

from nodeagent.capture import _libbpf
from nodeagent.capture.actions import EGRESS, INGRESS
from nodeagent.capture.layout import (
    COUNTERS,
    RECORD_SIZE,
    SETTINGS_SIZE,
    SLOTS,
    pack_config,
)

__all__ = ["PodObjects", "Record", "load_code", "load_marker"]

CAPTURE: Final = "capture"

RECORD_VERSION: Final = 1
"""Raised when an older agent would misread the record."""

_ZERO: Final = struct.pack("I", 0)
_DIRECTORY: Final = Path(__file__).parent / "bpf"

_MAPS: Final = {
    "record": (_libbpf.MAP_TYPE_ARRAY, 4, RECORD_SIZE, 1),
    "slots": (_libbpf.MAP_TYPE_SOCKMAP, 4, 8, SLOTS),
    "settings": (_libbpf.MAP_TYPE_ARRAY, 4, SETTINGS_SIZE, 1),
    "counters": (_libbpf.MAP_TYPE_PERCPU_ARRAY, 4, 8, len(COUNTERS)),
}
"""Type, key size, value size, entries: as in bpf/."""


class Record(msgspec.Struct, frozen=True):
    """What must be known of an enrolled pod after a restart."""

    uid: str
    netns_cookie: int
    netns_path: str
    addresses: tuple[str, ...]
    sysctls: dict[str, str]
    clsact: frozenset[str]
    version: int = RECORD_VERSION


@functools.cache
def load_code(name: str) -> bytes:
    """Return a compiled BPF object of bpf/. Raises OSError if the build left it out."""
    return (_DIRECTORY / f"{name}.bpf.o").read_bytes()


def _digest(addresses: tuple[str, ...]) -> str:
    parts = load_code("capture"), load_code("guard"), pack_config(addresses)
    return hashlib.sha256(b"".join(parts)).hexdigest()[:12]


def load_marker() -> int:
    """Load the iterator program that marks older connections. Returns its descriptor."""
    loaded = _libbpf.Object(load_code("older"), "older")
    try:
        loaded.load()
        return loaded.program("mark_older")
    finally:
        loaded.close()


class PodObjects:
    """The pinned objects of one pod. Nothing is created before `create`."""

    def __init__(self, bpf_dir: Path, cookie: int) -> None:
        self.directory = bpf_dir / f"{cookie:x}"
        self._fds: dict[str, int] = {}

    def __repr__(self) -> str:
        return f"PodObjects({str(self.directory)!r})"

    # --- pins ---

    def _open(self, name: str) -> int | None:
        fd = self._fds.get(name)
        if fd is None:
            with contextlib.suppress(FileNotFoundError):
                fd = self._fds[name] = _libbpf.get_pinned(str(self.directory / name))
        return fd

    def _pin(self, name: str, fd: int) -> None:
        path = self.directory / name
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        _libbpf.pin(fd, str(path))
        self._forget(name)
        self._fds[name] = fd

    def _forget(self, name: str) -> None:
        fd = self._fds.pop(name, None)
        if fd is not None:
            os.close(fd)

    def _map(self, name: str) -> int:
        fd = self._open(name)
        # A map of another shape is an older version's: its programs will be replaced as well.
        if fd is not None and _libbpf.map_info(fd) != _MAPS[name]:
            fd = None
        if fd is None:
            kind, key, value, entries = _MAPS[name]
            fd = _libbpf.create_map(kind, name, key, value, entries)
            self._pin(name, fd)
        return fd

    def _readable(self, name: str) -> int | None:
        """Return the map if it is there in the shape that this version reads."""
        fd = self._open(name)
        return fd if fd is not None and _libbpf.map_info(fd) == _MAPS[name] else None

    def exists(self) -> bool:
        """Whether the pod's record is there, and so perhaps anything else of it."""
        return (self.directory / "record").exists()

    # --- record ---

    def create(self, record: Record) -> None:
        """Write the record, then make what maps are missing. Raises OSError, ValueError."""
        data = msgspec.json.encode(record)
        if len(data) >= RECORD_SIZE:
            raise ValueError(f"record of {len(data)} bytes exceeds {RECORD_SIZE - 1}")
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self._open("record") is None:
            # Filled before it is pinned: a record that is there is whole.
            fd = _libbpf.create_map(_libbpf.MAP_TYPE_ARRAY, "record", 4, RECORD_SIZE, 1)
            try:
                _libbpf.update_map(fd, _ZERO, data.ljust(RECORD_SIZE, b"\0"))
                self._pin("record", fd)
            except BaseException:
                if self._fds.get("record") != fd:
                    os.close(fd)
                raise
        else:
            _libbpf.update_map(self._map("record"), _ZERO, data.ljust(RECORD_SIZE, b"\0"))
        for name in ("slots", "settings", "counters"):
            self._map(name)

    def record(self) -> Record | None:
        """Return the record; None if there is none or it cannot be read."""
        fd = self._open("record")
        if fd is None or _libbpf.map_info(fd) != _MAPS["record"]:
            return None
        data = _libbpf.read_map(fd, _ZERO, RECORD_SIZE).rstrip(b"\0")
        try:
            record = msgspec.json.decode(data, type=Record)
        except msgspec.DecodeError:
            return None
        return record if record.version == RECORD_VERSION else None

    # --- maps ---

    def fill_slot(self, slot: int, sock: int) -> None:
        _libbpf.update_map(self._map("slots"), struct.pack("I", slot), struct.pack("Q", sock))

    def slots(self) -> tuple[int, ...]:
        """Return the cookies of the sockets in the slots, 0 for an empty slot."""
        fd = self._open("slots")
        return tuple(self._slot(fd, slot) if fd is not None else 0 for slot in range(SLOTS))

    @staticmethod
    def _slot(fd: int, slot: int) -> int:
        try:
            value = _libbpf.read_map(fd, struct.pack("I", slot), 8)
        except FileNotFoundError:
            return 0
        number: int = struct.unpack("Q", value)[0]
        return number

    def write_settings(self, value: bytes) -> None:
        _libbpf.update_map(self._map("settings"), _ZERO, value)

    def settings(self) -> bytes:
        fd = self._readable("settings")
        return b"" if fd is None else _libbpf.read_map(fd, _ZERO, SETTINGS_SIZE)

    def counters(self) -> dict[str, int]:
        fd = self._readable("counters")
        if fd is None:
            return dict.fromkeys(COUNTERS, 0)
        cpus = _libbpf.possible_cpus()
        return {
            name: sum(
                struct.unpack(f"{cpus}Q", _libbpf.read_map(fd, struct.pack("I", index), 8 * cpus))
            )
            for index, name in enumerate(COUNTERS)
        }

    # --- programs ---

    def program_ids(self, addresses: tuple[str, ...]) -> tuple[int, dict[str, int]]:
        """Return the ids of the pinned programs for `addresses`: capture, and by direction."""
        digest = _digest(addresses)
        ids = {name: self._program_id(f"{name}_{digest}") for name in (CAPTURE, EGRESS, INGRESS)}
        return ids.pop(CAPTURE), ids

    def _program_id(self, name: str) -> int:
        fd = self._open(name)
        return 0 if fd is None else _libbpf.program_id(fd)

    def guard(self, direction: str, addresses: tuple[str, ...]) -> int:
        """Return the guard program, loaded and pinned if need be; the descriptor stays ours."""
        digest = _digest(addresses)
        programs = {EGRESS: "guard_egress", INGRESS: "guard_ingress"}
        # Both or none: one that is loaded anew would no longer be the one that is attached.
        if any(self._open(f"{name}_{digest}") is None for name in programs):
            self._load("guard", addresses, ("settings", "counters"), programs)
        return self._fds[f"{direction}_{digest}"]

    def _load(
        self,
        code: str,
        addresses: tuple[str, ...],
        maps: tuple[str, ...],
        programs: dict[str, str],
    ) -> None:
        digest = _digest(addresses)
        loaded = _libbpf.Object(load_code(code), code)
        try:
            loaded.set_constant("config", pack_config(addresses))
            for name in maps:
                loaded.reuse_map(name, self._map(name))
            loaded.load()
            for pin, program in programs.items():
                fd = loaded.program(program)
                try:
                    self._pin(f"{pin}_{digest}", fd)
                except BaseException:
                    os.close(fd)
                    raise
        finally:
            loaded.close()

    def prune(self, addresses: tuple[str, ...]) -> None:
        """Unpin the programs of other addresses or object code; call when none is attached."""
        digest = _digest(addresses)
        for path in self.directory.iterdir():
            name, _, theirs = path.name.partition("_")
            if name in (CAPTURE, EGRESS, INGRESS) and theirs != digest:
                path.unlink()
                self._forget(path.name)

    # --- link ---

    def attach(self, netns: int, addresses: tuple[str, ...]) -> None:
        """Attach the capture program, or put it in the place of the attached one, at once."""
        name = f"{CAPTURE}_{_digest(addresses)}"
        program = self._open(name)
        if program is None:
            self._load("capture", addresses, ("slots", "counters"), {CAPTURE: CAPTURE})
            program = self._fds[name]
        link = self._open("link")
        if link is not None and _libbpf.link_info(link)[1]:
            _libbpf.update_link(link, program)
            return
        link = _libbpf.link_netns(program, netns)
        try:
            self._pin("link", link)
        except BaseException:
            os.close(link)
            raise

    def link(self) -> int:
        """Return the id of the attached capture program, 0 if none is attached."""
        fd = self._open("link")
        if fd is None:
            return 0
        program, netns = _libbpf.link_info(fd)
        return program if netns else 0

    def detach(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            (self.directory / "link").unlink()
        self._forget("link")

    # --- end ---

    def remove(self) -> None:
        """Unpin everything, the record last, and close."""
        if self.directory.is_dir():
            for path in sorted(self.directory.iterdir(), key=lambda path: path.name == "record"):
                path.unlink()
            self.close()
            self.directory.rmdir()
        self.close()

    def close(self) -> None:
        """Close descriptors; pins stay."""
        for name in list(self._fds):
            self._forget(name)
