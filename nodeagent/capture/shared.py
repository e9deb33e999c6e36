"""The BPF maps and programs that all pods of a node share, pinned in a directory of their own.

This module owns `<bpf_dir>/shared/` and the pods' numbers. It promises that a number belongs to one
namespace at a time, whoever dies when; that a program is never taken for one that reads other maps;
and that the directory goes with its last pod. It may not touch any namespace.

    pods, sockets, counters   by the pods' numbers (bpf/include/pods.h)
    egress_D, ingress_D       the guard; D is the digest of object code and maps

Why shared: loading and verifying them took half of what a pod's enrolment took, and most of its
memory in the kernel. What is left for each pod is one small program, made from bare instructions.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import struct
import threading
from pathlib import Path
from typing import Final

from nodeagent.capture import _libbpf
from nodeagent.capture.actions import EGRESS, INGRESS
from nodeagent.capture.layout import (
    COUNTERS,
    MAX_PODS,
    POD_SIZE,
    PODS_KEY,
    SLOTS,
    SOCKETS_KEY,
    pack_pod,
    pack_settings,
    pod_key,
    slot_key,
    unpack_pod,
    with_number,
)

__all__ = ["NodeObjects", "load_code", "load_marker"]

DIRECTORY: Final = "shared"
"""No hexadecimal number: those are pods' directories."""

_SOURCES: Final = Path(__file__).parent / "bpf"
_COUNTERS_SIZE: Final = 8 * len(COUNTERS)

_MAPS: Final = {
    "pods": (_libbpf.MAP_TYPE_HASH, PODS_KEY, POD_SIZE, MAX_PODS),
    "sockets": (_libbpf.MAP_TYPE_SOCKHASH, SOCKETS_KEY, 8, SLOTS * MAX_PODS),
    "counters": (_libbpf.MAP_TYPE_HASH, PODS_KEY, _COUNTERS_SIZE, MAX_PODS),
}
"""Type, key size, value size, entries: as in bpf/."""

_GUARD: Final = {EGRESS: "guard_egress", INGRESS: "guard_ingress"}

CLOSED: Final = pack_settings(strict_default=True, exceptions=())
"""Of a pod whose settings are still to come."""


@functools.cache
def load_code(name: str) -> bytes:
    """Return a compiled BPF object of bpf/. Raises OSError if the build left it out."""
    return (_SOURCES / f"{name}.bpf.o").read_bytes()


def load_marker() -> int:
    """Load the iterator program that marks older connections. Returns its descriptor."""
    loaded = _libbpf.Object(load_code("older"), "older")
    try:
        loaded.load()
        return loaded.program("mark_older")
    finally:
        loaded.close()


class NodeObjects:
    """Made when the first pod needs it; every method may be called from any thread.

    All but `__init__` raise OSError.
    """

    def __init__(self, bpf_dir: Path) -> None:
        self._bpf_dir = bpf_dir
        self.directory = bpf_dir / DIRECTORY
        self._lock = threading.RLock()
        self._fds: dict[str, int] = {}
        self._code: tuple[_libbpf.Object, bytes] | None = None
        self._digest = ""
        self._next = 1

    def __repr__(self) -> str:
        return f"NodeObjects({str(self.directory)!r})"

    # --- pins ---

    def _pin(self, name: str, fd: int) -> None:
        path = self.directory / name
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        _libbpf.pin(fd, str(path))
        self._fds[name] = fd

    def _find(self, name: str) -> int | None:
        fd = self._fds.get(name)
        if fd is None:
            with contextlib.suppress(FileNotFoundError):
                fd = _libbpf.get_pinned(str(self.directory / name))
                if name in _MAPS and _libbpf.map_info(fd) != _MAPS[name]:
                    # Another version's: its programs keep it, and are replaced with it.
                    os.close(fd)
                    return None
                self._fds[name] = fd
        return fd

    def _map(self, name: str) -> int:
        fd = self._find(name)
        if fd is None:
            kind, key, value, entries = _MAPS[name]
            fd = _libbpf.create_map(kind, name, key, value, entries)
            self._keep(name, fd)
        return fd

    def _keep(self, name: str, fd: int) -> None:
        """Pin a descriptor, or close it."""
        try:
            self._pin(name, fd)
        except BaseException:
            os.close(fd)
            raise

    def _open(self) -> None:
        """Find or make the maps. With the lock held."""
        if len(self._fds) >= len(_MAPS):
            return
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name in _MAPS:
            self._map(name)

    def _is_there(self) -> bool:
        """Whether all maps are, opened now. With the lock held."""
        return len(self._fds) >= len(_MAPS) or all(self._find(name) is not None for name in _MAPS)

    # --- programs ---

    def digest(self) -> str:
        """Return what programs must have been made of to be right: code and maps; empty if there
        is none that they could read.
        """
        with self._lock:
            if not self._digest and self._is_there():
                parts = [load_code("capture"), load_code("guard")]
                parts += [struct.pack("I", _libbpf.map_id(self._fds[name])) for name in _MAPS]
                self._digest = hashlib.sha256(b"".join(parts)).hexdigest()[:12]
            return self._digest

    def guard_ids(self) -> dict[str, int]:
        """Return the ids of the guard's programs by direction, 0 for one that is not loaded."""
        with self._lock:
            digest = self.digest()
            found = {name: self._find(f"{name}_{digest}") if digest else None for name in _GUARD}
            return {name: 0 if fd is None else _libbpf.program_id(fd) for name, fd in found.items()}

    def guard(self, direction: str) -> int:
        """Return the guard's program, loaded if need be. The descriptor stays ours."""
        with self._lock:
            self._open()
            names = {name: f"{name}_{self.digest()}" for name in _GUARD}
            # Both or none: one that is loaded anew would no longer be the one that is attached.
            if any(self._find(pin) is None for pin in names.values()):
                loaded = self._load("guard", ("pods", "counters"))
                try:
                    for name, pin in names.items():
                        self._keep(pin, loaded.program(_GUARD[name]))
                finally:
                    loaded.close()
                self._prune(frozenset(names.values()))
            return self._fds[names[direction]]

    def capture(self, number: int) -> int:
        """Load the capture program of a pod. Returns its descriptor, the caller's to close."""
        with self._lock:
            self._open()
            if self._code is None:
                loaded = self._load("capture", tuple(_MAPS))
                # Open from now on: the instructions name its descriptors of the maps.
                self._code = loaded, loaded.instructions("capture")
            code = self._code[1]
        return _libbpf.load_sk_lookup("capture", with_number(code, number))

    def _load(self, code: str, maps: tuple[str, ...]) -> _libbpf.Object:
        loaded = _libbpf.Object(load_code(code), code)
        try:
            for name in maps:
                loaded.reuse_map(name, self._map(name))
            loaded.load()
        except BaseException:
            loaded.close()
            raise
        return loaded

    def _prune(self, keep: frozenset[str]) -> None:
        """Unpin the guards of other versions: the filters that still run them hold them."""
        for path in self.directory.iterdir():
            if path.name not in keep and path.name not in _MAPS:
                path.unlink()

    # --- pods ---

    def claim(self, cookie: int) -> int:
        """Return a number for a namespace, which is closed until `write` says otherwise."""
        with self._lock:
            self._open()
            entry = pack_pod(cookie, CLOSED)
            for step in range(MAX_PODS):
                number = (self._next + step - 1) % MAX_PODS + 1
                try:
                    _libbpf.update_map(self._fds["pods"], pod_key(number), entry, True)
                except FileExistsError:
                    continue
                self._next = number + 1
                _libbpf.update_map(self._fds["counters"], pod_key(number), bytes(_COUNTERS_SIZE))
                return number
        raise OSError(f"more than {MAX_PODS} pods on one node")

    def owns(self, number: int, cookie: int) -> bool:
        """Whether the number is that namespace's."""
        return number > 0 and self._entry(number)[0] == cookie

    def read(self, number: int) -> bytes:
        """Return a pod's settings and addresses, empty if it has none."""
        return self._entry(number)[1]

    def _entry(self, number: int) -> tuple[int, bytes]:
        with self._lock:
            if not self._is_there():
                return 0, b""
        try:
            return unpack_pod(_libbpf.read_map(self._fds["pods"], pod_key(number), POD_SIZE))
        except FileNotFoundError:
            return 0, b""

    def write(self, number: int, cookie: int, body: bytes) -> None:
        """Put a pod's settings and addresses in force, all at once."""
        _libbpf.update_map(self._fds["pods"], pod_key(number), pack_pod(cookie, body))

    def fill(self, number: int, slot: int, sock: int) -> None:
        """Give a pod's slot a listening socket (a descriptor)."""
        _libbpf.update_map(self._fds["sockets"], slot_key(number, slot), struct.pack("Q", sock))

    def slots(self, number: int) -> tuple[int, ...]:
        """Return the cookies of the sockets in a pod's slots, 0 for an empty one."""
        return tuple(self._slot(number, slot) for slot in range(SLOTS))

    def _slot(self, number: int, slot: int) -> int:
        try:
            value = _libbpf.read_map(self._fds["sockets"], slot_key(number, slot), 8)
        except FileNotFoundError:
            return 0
        cookie: int = struct.unpack("Q", value)[0]
        return cookie

    def counters(self, number: int) -> dict[str, int]:
        """Return a pod's counters, zero for a number that nobody has."""
        try:
            value = _libbpf.read_map(self._fds["counters"], pod_key(number), _COUNTERS_SIZE)
        except FileNotFoundError:
            value = bytes(_COUNTERS_SIZE)
        return dict(zip(COUNTERS, struct.unpack(f"{len(COUNTERS)}Q", value), strict=True))

    def release(self, number: int, cookie: int) -> None:
        """Give a number back, if it is that namespace's. What still runs for it is closed."""
        if not self.owns(number, cookie):
            return
        for slot in range(SLOTS):
            self._delete("sockets", slot_key(number, slot))
        self._delete("counters", pod_key(number))
        # Last: until here nobody else can claim it.
        self._delete("pods", pod_key(number))

    def _delete(self, name: str, key: bytes) -> None:
        with contextlib.suppress(FileNotFoundError):
            _libbpf.delete_map(self._fds[name], key)

    def tidy(self) -> None:
        """Release what belongs to no pod any more, and remove everything if no pod is left.

        A pod has a directory from before it claims its number until it has given it back.
        """
        with self._lock:
            if not self.directory.is_dir():
                return
            if self._is_there():
                key = _libbpf.next_key(self._fds["pods"], None, PODS_KEY)
                while key is not None:
                    number = struct.unpack("I", key)[0]
                    key = _libbpf.next_key(self._fds["pods"], key, PODS_KEY)
                    cookie = self._entry(number)[0]
                    if not (self._bpf_dir / f"{cookie:x}").exists():
                        self.release(number, cookie)
            self.remove_unused()

    def remove_unused(self) -> None:
        """Remove everything if there is no pod."""
        with self._lock:
            if not self.directory.is_dir() or any(
                path != self.directory for path in self._bpf_dir.iterdir()
            ):
                return
            self.close()
            for path in self.directory.iterdir():
                path.unlink()
            self.directory.rmdir()

    def close(self) -> None:
        """Close descriptors; pins stay."""
        with self._lock:
            if self._code is not None:
                self._code[0].close()
                self._code = None
            for fd in self._fds.values():
                os.close(fd)
            self._fds.clear()
            self._digest = ""
