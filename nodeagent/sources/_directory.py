"""Reading a directory of files that somebody else writes.

This module owns the system calls of the `files` source. It promises to read only regular files
inside the directory, which only root and this process's user may write; never to block on a FIFO
or follow a link out of the directory, also when names are swapped while it looks; and to report
everything else as an error that names the path. It may not keep anything between calls.

The links of a Kubernetes ConfigMap mount (`x.yaml` to `..data/x.yaml`, `..data` to a directory
beside it) stay inside, so they work. Its directory is open to all and mounted read-only: a
read-only mount counts as writable by nobody.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Final

import msgspec

from nodeagent.api import ConfigError

__all__ = [
    "MAX_FILES",
    "Listing",
    "Signature",
    "list_directory",
    "opener",
    "read_file",
    "unreadable",
]

MAX_FILES: Final = 1_000
"""Files of the directory; each may have one MiB, and all are looked at twice a second."""

MAX_READ: Final = 1024 * 1024 + 1
"""Bytes read of one file: one more than the reader of documents accepts, so that it says so."""

SUFFIXES: Final = (".yaml", ".yml", ".json")


class Signature(msgspec.Struct, frozen=True):
    """What changes when a file does. `path` is where its links lead."""

    path: str
    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int
    mode: int


class Listing(msgspec.Struct, frozen=True):
    """The files that count, by name, and the names that are no such file.

    `identity` is the directory's device and inode, or None with `failure`: then nothing is known
    of the files.
    """

    files: dict[str, Signature]
    errors: dict[str, ConfigError]
    identity: tuple[int, int] | None = None
    failure: ConfigError | None = None


class _RefusedError(Exception):
    """A path is not one that may be read; the text says why."""


def _error(path: Path, reason: str) -> ConfigError:
    return ConfigError(str(path), 0, 0, "", reason)


def list_directory(directory: Path) -> Listing:
    """Return the files of `directory`. Never raises."""
    try:
        root = _resolve(directory)
        found = root.stat()
        _check_directory(root, found)
        names = _names(root)
    except _RefusedError as refused:
        return Listing({}, {}, failure=_error(directory, str(refused)))
    except OSError as error:
        return Listing({}, {}, failure=_error(directory, unreadable(error)))
    files: dict[str, Signature] = {}
    errors: dict[str, ConfigError] = {}
    for name in names:
        if not name.isprintable():
            # Control characters would forge lines in logs, and bytes that are no text break them.
            errors[name] = _error(directory / ascii(name), "has a name that is no text: rename it")
            continue
        try:
            files[name] = _signature(root, name)
        except _RefusedError as refused:
            errors[name] = _error(directory / name, str(refused))
        except OSError as error:
            errors[name] = _error(directory / name, unreadable(error))
    return Listing(files, errors, identity=(found.st_dev, found.st_ino))


def read_file(directory: Path, name: str) -> tuple[bytes, Signature] | None:
    """Return the bytes of a file and its signature, or None if it changed while it was read.

    Raises OSError if it cannot be read, or is not what `list_directory` would accept.
    """
    root = _resolve(directory)
    try:
        _check_directory(root, root.stat())
        signature = _signature(root, name)
        with open(signature.path, "rb", opener=opener) as stream:
            fd = stream.fileno()
            # A directory on the way may have become a link since it was resolved: ask the kernel
            # where this descriptor really is.
            path = Path(f"/proc/self/fd/{fd}").readlink()
            _check_inside(root, path)
            before = os.fstat(fd)
            _check_file(path, before)
            data = stream.read(MAX_READ)
            after = os.fstat(fd)
    except _RefusedError as refused:
        raise OSError(str(refused)) from None
    known = {signature, _make_signature(path, before), _make_signature(path, after)}
    return (data, signature) if len(known) == 1 else None


def opener(path: str, flags: int) -> int:
    """Open for `open`: follow no link in the last place, and wait for nobody."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY)


def unreadable(error: OSError) -> str:
    """Return the reason that an error says of a file."""
    return f"cannot be read: {error.strerror or error}"


def _resolve(path: Path) -> Path:
    # Path.resolve raises RuntimeError for a loop of links; this raises OSError like the rest.
    return Path(os.path.realpath(path, strict=True))


def _names(root: Path) -> list[str]:
    names = sorted(
        entry.name
        for entry in root.iterdir()
        if entry.name.endswith(SUFFIXES) and not entry.name.startswith(".")
    )
    if len(names) > MAX_FILES:
        raise _RefusedError(f"holds more than {MAX_FILES} files: join some")
    return names


def _signature(root: Path, name: str) -> Signature:
    """Return the signature of a file of `root`, which is resolved and checked."""
    path = root / name
    found = path.lstat()
    if stat.S_ISLNK(found.st_mode):
        path = _resolve(path)
        _check_inside(root, path)
        found = path.lstat()
        _check_owner(path.parent, path.parent.stat())
    _check_file(path, found)
    return _make_signature(path, found)


def _make_signature(path: Path, found: os.stat_result) -> Signature:
    return Signature(
        path=str(path),
        device=found.st_dev,
        inode=found.st_ino,
        size=found.st_size,
        mtime_ns=found.st_mtime_ns,
        ctime_ns=found.st_ctime_ns,
        mode=found.st_mode,
    )


def _check_inside(root: Path, path: Path) -> None:
    if root not in path.parents:
        raise _RefusedError("is a link that leaves the directory: put the file itself here")


def _check_file(path: Path, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise _RefusedError("is not a regular file: remove it, or rename it without the suffix")
    _check_owner(path, found)


def _check_directory(path: Path, found: os.stat_result) -> None:
    if not stat.S_ISDIR(found.st_mode):
        raise _RefusedError("is no directory")
    _check_owner(path, found)


def _check_owner(path: Path, found: os.stat_result) -> None:
    reason = ""
    if found.st_mode & stat.S_IWOTH:
        reason = f"{path} can be written by anybody: run chmod o-w on it"
    elif found.st_uid not in {0, os.geteuid()}:
        reason = (
            f"{path} belongs to user {found.st_uid}: make it root's, who alone may write policy"
        )
    # Asked for last: of a thousand good files nobody needs to know.
    if reason and not os.statvfs(path).f_flag & os.ST_RDONLY:
        raise _RefusedError(reason)
