"""The record of a lab: what exists, written before it is made.

This module owns a lab's directory, its lock and `state.json` in it. It promises that the record on
disk is whole at any moment, covers everything that may exist, and is changed by one process at a
time; and that removing the directory is the last step of removing a lab. It may not make or remove
anything else.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec

from nodeagent.lab.checks import lab_name
from nodeagent.lab.model import LabPlan, Layout
from nodeagent.lab.processes import ProcessRecord

__all__ = ["LabError", "NoSuchLabError", "State", "Store"]

LOCK_SECONDS: Final = 30.0
"""How long a command waits for another one that changes the same lab."""
LOCK_STEP_SECONDS: Final = 0.05

STATE_VERSION: Final = 1


class LabError(Exception):
    """Something of a lab failed; the message says what, where and what to do."""


class NoSuchLabError(LabError):
    """There is no lab of this name."""


class State(msgspec.Struct, kw_only=True):
    """`processes` maps a name ("node-1/ztunnel", "default/age/age") to the process of that name.

    `complete` is false until the lab has been built: what was left by a builder that died.
    """

    version: int = STATE_VERSION
    plan: LabPlan
    created: float
    daemons: bool
    complete: bool = False
    processes: dict[str, ProcessRecord] = {}


class Store:
    """One lab's directory below `base`."""

    def __init__(self, base: Path, name: str) -> None:
        try:
            self.name = lab_name(name)
        except ValueError as error:
            raise LabError(str(error)) from None
        # As the mount table names it: what is mounted below is found by its path.
        self.base = base.resolve()
        self.layout = Layout(self.base / name)
        self.owned = False
        """True from the moment that `create` has made the directory."""

    @staticmethod
    def names(base: Path) -> list[str]:
        """Return the names of all labs below `base`, whole or not. Raises LabError."""
        try:
            return sorted(entry.name for entry in base.iterdir() if entry.is_dir())
        except FileNotFoundError:
            return []
        except PermissionError:
            raise LabError(f"{base}: permission denied: labs are root's") from None

    def create(self, state: State) -> None:
        """Make the directory with its record. Raises LabError when there is one already."""
        directory = self.layout.directory
        while True:
            self.base.mkdir(mode=0o700, parents=True, exist_ok=True)
            _check_private(self.base)
            try:
                directory.mkdir(mode=0o700)
                self.owned = True
            except FileNotFoundError:
                continue  # the last other lab has just gone, and its base with it
            except FileExistsError:
                raise LabError(
                    f"there is a lab {self.name} already; remove it first: "
                    f"nodeagent lab down {self.name}"
                ) from None
            break
        self.save(state)

    def load(self) -> State:
        """Return the record. Raises NoSuchLabError, LabError when it cannot be read."""
        try:
            data = self.layout.state.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            if self.layout.directory.is_dir():
                raise LabError(
                    f"lab {self.name} was never finished, its builder died; "
                    f"remove it: nodeagent lab down {self.name}"
                ) from None
            raise NoSuchLabError(
                f"there is no lab {self.name}; nodeagent lab status shows those that are up"
            ) from None
        except PermissionError:
            raise LabError(f"{self.layout.state}: permission denied: labs are root's") from None
        try:
            state = msgspec.json.decode(data, type=State)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise LabError(
                f"{self.layout.state} was written by another version ({error}); "
                f"remove the lab: nodeagent lab down {self.name}"
            ) from None
        return state

    def save(self, state: State) -> None:
        """Replace the record as a whole."""
        path = self.layout.state
        fresh = path.with_suffix(".new")
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(fresh, flags, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(msgspec.json.encode(state))
        fresh.replace(path)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep every other process from changing this lab. Raises NoSuchLabError, LabError."""
        directory = self.layout.directory
        try:
            descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise NoSuchLabError(f"there is no lab {self.name}") from None
        try:
            self._wait_for_lock(descriptor)
            if not directory.exists() or directory.stat().st_ino != os.fstat(descriptor).st_ino:
                raise NoSuchLabError(f"lab {self.name} was removed by another process")
            yield
        finally:
            os.close(descriptor)

    def _wait_for_lock(self, descriptor: int) -> None:
        deadline = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise LabError(
                        f"lab {self.name} is being changed by another process; try again later"
                    ) from None
                time.sleep(LOCK_STEP_SECONDS)
            else:
                return

    def destroy(self) -> None:
        """Remove the directory, which holds no mounts any more, and the base with its last lab."""
        shutil.rmtree(self.layout.directory)
        with contextlib.suppress(OSError):
            self.base.rmdir()


def _check_private(path: Path) -> None:
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode):
        raise LabError(f"{path} is no directory: remove it")
    if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o077:
        raise LabError(f"{path} must be yours alone: chown it to you and chmod 0700")
