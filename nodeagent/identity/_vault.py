"""Files that hold keys: a directory which only its owner can enter, and what is in it.

This module owns how the embedded CA's files are opened, read, replaced and locked. It promises
that a file is whole or absent whatever happens in between (power, full disk, kill), that nothing
is followed through a symbolic link, and that wrong owners and modes are refused and never put
right silently: somebody may have read the key. It may not know what the files mean.

Every access goes through the directory's descriptor, so a directory that is exchanged meanwhile
changes nothing. Several processes may share the directory; whoever writes holds the lock.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Self

from nodeagent.identity.provider import ProviderError, ProviderReason

__all__ = ["MAX_FILE_BYTES", "Vault"]

MAX_FILE_BYTES: Final = 256 * 1024
"""A file larger than this is none of ours; a bundle of a hundred roots is below it."""

_LOCK: Final = "lock"
_LOCK_SECONDS: Final = 10.0
"""Making a CA takes milliseconds. Who waits longer waits for a process that is stopped."""
_LOCK_POLL_SECONDS: Final = 0.02
_TEMPORARY: Final = ".new-"
_FILE_MODE: Final = 0o600
_DIRECTORY_MODE: Final = 0o700
_OTHERS: Final = 0o077

Stamp = tuple[int, int, int]
"""What changes whenever a file is replaced: inode, size, modification time in nanoseconds."""


class Vault:
    """A private directory, open. All methods block and raise ProviderError; none keeps content."""

    def __init__(self, path: Path) -> None:
        """Open the directory at `path`, which is made (0700) if it is absent."""
        self.path = path
        with self._explained("open the CA directory"):
            path.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileExistsError):
                os.mkdir(path, _DIRECTORY_MODE)  # noqa: PTH102 - Path.mkdir follows a link
            self._directory = os.open(
                path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
            )
        try:
            self._check(self._directory, "the CA directory", _DIRECTORY_MODE)
        except ProviderError:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        os.close(self._directory)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the directory's lock, which ends with the process at the latest."""
        with self._explained("lock"):
            lock = os.open(
                _LOCK,
                os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC,
                _FILE_MODE,
                dir_fd=self._directory,
            )
        try:
            self._check(lock, _LOCK, _FILE_MODE)
            self._wait_for(lock)
            self._remove_leftovers()
            yield
        finally:
            os.close(lock)

    def stamp(self, name: str) -> Stamp | None:
        """Return what changes when `name` is replaced; None if it is absent."""
        with self._explained(f"look at {name}"):
            try:
                found = os.stat(name, dir_fd=self._directory, follow_symlinks=False)
            except FileNotFoundError:
                return None
        return found.st_ino, found.st_size, found.st_mtime_ns

    def read(self, name: str) -> bytes | None:
        """Return what is in `name`; None if it is absent."""
        with self._explained(f"read {name}"):
            try:
                # Non-blocking: a FIFO in the place of the file must not hold us.
                file = os.open(
                    name,
                    os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK,
                    dir_fd=self._directory,
                )
            except FileNotFoundError:
                return None
        try:
            self._check(file, name, _FILE_MODE)
            with self._explained(f"read {name}"), os.fdopen(file, "rb", closefd=False) as stream:
                content = stream.read(MAX_FILE_BYTES + 1)
        finally:
            os.close(file)
        if len(content) > MAX_FILE_BYTES:
            raise self._wrong(name, f"is larger than {MAX_FILE_BYTES} bytes")
        return content

    def replace(self, name: str, content: bytes) -> None:
        """Put `content` into `name`, durably. On any error the old file is as it was."""
        temporary = f"{_TEMPORARY}{secrets.token_hex(8)}"
        with self._explained(f"write {name}"):
            file = os.open(
                temporary,
                os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC,
                _FILE_MODE,
                dir_fd=self._directory,
            )
            try:
                with os.fdopen(file, "wb") as stream:
                    # The umask can only have taken bits away; the owner needs both.
                    os.fchmod(file, _FILE_MODE)
                    stream.write(content)
                    stream.flush()
                    os.fsync(file)
                os.rename(temporary, name, src_dir_fd=self._directory, dst_dir_fd=self._directory)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(temporary, dir_fd=self._directory)
                raise
            os.fsync(self._directory)

    def _wait_for(self, lock: int) -> None:
        deadline = time.monotonic() + _LOCK_SECONDS
        while True:
            with self._explained("lock"):
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    pass
                else:
                    return
            if time.monotonic() > deadline:
                raise ProviderError(
                    ProviderReason.STORAGE,
                    f"{self.path / _LOCK} is held by another process for more than "
                    f"{_LOCK_SECONDS:.0f} s; `fuser` on it says which",
                    retryable=True,
                )
            time.sleep(_LOCK_POLL_SECONDS)

    def _remove_leftovers(self) -> None:
        """Remove what a killed writer left: nobody else writes while the lock is held."""
        with self._explained("list the CA directory"):
            for name in os.listdir(self._directory):  # noqa: PTH208 - a descriptor, no path
                if name.startswith(_TEMPORARY):
                    os.unlink(name, dir_fd=self._directory)

    def _check(self, file: int, name: str, mode: int) -> None:
        found = os.fstat(file)
        if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
            raise self._wrong(name, "is no regular file")
        if found.st_uid != os.geteuid():
            raise self._wrong(name, f"belongs to uid {found.st_uid}, and not to {os.geteuid()}")
        if found.st_mode & _OTHERS:
            raise self._wrong(
                name,
                f"has mode {stat.S_IMODE(found.st_mode):04o}: others may have read it; "
                f"if that is harmless, set {mode:04o}, else remove the CA and start anew",
            )

    def _wrong(self, name: str, what: str) -> ProviderError:
        return ProviderError(
            ProviderReason.MISCONFIGURED, f"{self.path}: {name} {what}", retryable=False
        )

    @contextlib.contextmanager
    def _explained(self, action: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            hint = ""
            if error.errno == errno.ELOOP:
                hint = " (a symbolic link is not followed)"
            elif error.errno == errno.ENOTDIR:
                hint = " (it must be a directory, and no symbolic link to one)"
            raise ProviderError(
                ProviderReason.STORAGE,
                f"{self.path}: cannot {action}: {os.strerror(error.errno or 0)}{hint}",
                retryable=True,
            ) from error
