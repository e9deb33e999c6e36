"""The last good version of each file, kept across restarts.

This module owns one file in the state directory. It promises that a restart of the agent does not
take back a policy whose file has meanwhile been broken; that the file is replaced as a whole or not
at all, also when the disk is full; and that neither a link nor somebody else's file in its place is
followed or believed. It may not decide what is in force.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import msgspec

from nodeagent.sources._directory import opener

__all__ = ["LastGood"]

_FORMAT: Final = 1

_MAX_BYTES: Final = 2 * 1024 * 1024 * 1024
"""More than MAX_FILES files of one MiB; a larger file is not ours."""


class _Stored(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`files` are the bytes of files by name, of the watched directory `directory`."""

    format: int
    directory: str
    files: dict[str, bytes]


class LastGood:
    """Keeps the files in force of the watched directory `directory` in the file `path`."""

    def __init__(self, path: Path, directory: Path) -> None:
        self.path = path
        self._directory = str(directory)

    def load(self) -> dict[str, bytes]:
        """Return the files that were in force, by name; none if nothing is stored.

        Raises OSError if what is stored cannot be believed.
        """
        try:
            with open(self.path, "rb", opener=opener) as stream:
                found = os.fstat(stream.fileno())
                _check_ours(found)
                data = stream.read()
        except FileNotFoundError:
            return {}
        try:
            stored = msgspec.msgpack.decode(data, type=_Stored)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise OSError("is damaged: remove it") from error
        if stored.format != _FORMAT or stored.directory != self._directory:
            return {}
        return {name: data for name, data in stored.files.items() if "/" not in name}

    def save(self, files: Mapping[str, bytes]) -> None:
        """Store the files in force. Raises OSError; what was stored before is then unharmed."""
        data = msgspec.msgpack.encode(_Stored(_FORMAT, self._directory, dict(files)))
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder = os.open(
            self.path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW
        )
        name = f"{self.path.name}.new"
        try:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name, dir_fd=folder)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
            fd = os.open(name, flags, 0o600, dir_fd=folder)
            try:
                with os.fdopen(fd, "wb") as stream:
                    stream.write(data)
                    stream.flush()
                    os.fsync(fd)
                os.rename(name, self.path.name, src_dir_fd=folder, dst_dir_fd=folder)
            except OSError:
                with contextlib.suppress(OSError):
                    os.unlink(name, dir_fd=folder)
                raise
            os.fsync(folder)
        finally:
            os.close(folder)


def _check_ours(found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode) or found.st_size > _MAX_BYTES:
        raise OSError("is not a file of this program: remove it")
    if found.st_uid != os.geteuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise OSError("others may have written it: remove it")
