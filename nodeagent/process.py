"""What a process with keys and privileges does to itself before anything else.

This module owns the process-wide settings of the daemon: umask, core dumps, descriptors. It
promises that no key of this process reaches a disk or another process by a dump or a debugger, and
that what it creates is its own. It may not know what the daemon does.
"""

from __future__ import annotations

import ctypes
import os
import resource
from typing import Final

__all__ = ["harden"]

PR_SET_DUMPABLE: Final = 4
"""linux/prctl.h. Cleared, it also makes /proc/PID/mem, environ and fd root's alone (prctl(2))."""


def harden() -> None:
    """Apply everything. Raises OSError where the kernel refuses."""
    os.umask(0o077)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"prctl(PR_SET_DUMPABLE): {os.strerror(number)}")
    _limit(resource.RLIMIT_CORE, (0, 0))
    # Four descriptors a pod: the soft limit of 1,024 would end at 250 pods.
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    _limit(resource.RLIMIT_NOFILE, (hard, hard))


def _limit(what: int, limits: tuple[int, int]) -> None:
    # The unit sets the same limits, and its filter may refuse the call itself.
    if resource.getrlimit(what) != limits:
        resource.setrlimit(what, limits)
