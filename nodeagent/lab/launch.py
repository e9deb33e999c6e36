"""Enters one of the lab's network namespaces and becomes another program there.

This module owns the system calls that the lab needs and Python 3.11 lacks, and the small launcher
that every process of a lab starts as. It promises that what it starts sees the wanted network,
names and capabilities from its first instruction, and that a process whose starter died before
recording it never runs. It uses the standard library alone, for it also runs as a bare script
(`python -I -S launch.py JSON PROGRAM …`), and it may not create or remove anything of the lab.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import sys
from typing import Final, NamedTuple, NoReturn

CLONE_NEWNS: Final = 0x00020000
CLONE_NEWUTS: Final = 0x04000000
CLONE_NEWNET: Final = 0x40000000
MS_BIND: Final = 4096
MS_REC: Final = 16384
MS_SLAVE: Final = 1 << 19
MNT_DETACH: Final = 2

PR_CAPBSET_DROP: Final = 24
PR_SET_NO_NEW_PRIVS: Final = 38
CAP_DAC_READ_SEARCH: Final = 2
"""Kept by programs without capabilities: the interpreter may lie in a home directory of 0700."""
CAPABILITY_VERSION_3: Final = 0x20080522
"""_LINUX_CAPABILITY_VERSION_3 of linux/capability.h: two words of 32 bits a set."""
MOST_CAPABILITIES: Final = 64

HOSTS: Final = "/etc/hosts"
HIDDEN_FILESYSTEMS: Final = frozenset({"nsfs", "bpf"})
"""Taken out of a pod's mounts: its copy of a mounted namespace would keep that namespace alive
after its lab is gone, and a pod has no business with pinned BPF objects."""

EXIT_CANNOT_RUN: Final = 126
EXIT_NOT_FOUND: Final = 127
EXIT_ABANDONED: Final = 125
"""The starter died before it recorded this process."""

_libc = ctypes.CDLL(None, use_errno=True)


class Place(NamedTuple):
    """Where a program runs. `net` is a namespace's path; `hosts` a file shown as /etc/hosts.

    Without `capabilities` the program keeps its user but no capability except reading files, as
    a pod under a strict runtime would; `gate` is a descriptor from which one byte must come first.
    """

    net: str
    hosts: str = ""
    hostname: str = ""
    capabilities: bool = True
    gate: int = -1


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def setns(descriptor: int, kind: int) -> None:
    """Move the calling thread into a namespace (setns(2))."""
    _check(_libc.setns(descriptor, kind), "setns")


def unshare(flags: int) -> None:
    """Give the calling thread namespaces of its own (unshare(2))."""
    _check(_libc.unshare(flags), "unshare")


def mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    """Mount (mount(2)). Raises OSError."""
    encoded = [os.fsencode(text) for text in (source, target, kind, data)]
    result = _libc.mount(*encoded[:3], ctypes.c_ulong(flags), encoded[3])
    _check(result, f"mount {target}")


def unmount(target: str, flags: int = MNT_DETACH) -> None:
    """Unmount (umount2(2)), by default detached: at once, whoever still uses it."""
    _check(_libc.umount2(os.fsencode(target), flags), f"umount {target}")


def mounts() -> list[tuple[str, str]]:
    """Return (mount point, file system type) of every mount seen here, oldest first."""
    found: list[tuple[str, str]] = []
    with open("/proc/thread-self/mountinfo", "rb") as table:  # noqa: PTH123 - a light script
        for line in table:
            before, _, after = line.partition(b" - ")
            # proc(5): space, tab, newline and backslash are written in octal.
            point = before.split(b" ")[4].decode("unicode_escape").encode("latin-1")
            found.append((os.fsdecode(point), os.fsdecode(after.split(b" ")[0])))
    return found


def _own_names(place: Place) -> None:
    """A mount and host name namespace in which /etc/hosts is the pod's."""
    unshare(CLONE_NEWNS | CLONE_NEWUTS)
    mount("none", "/", "", MS_REC | MS_SLAVE)
    if place.hosts:
        mount(place.hosts, HOSTS, "", MS_BIND)
    for point, kind in reversed(mounts()):
        if kind in HIDDEN_FILESYSTEMS:
            try:
                unmount(point)
            except OSError as error:
                # Gone meanwhile: whoever removes a namespace of theirs removes its copy here too.
                if error.errno not in (errno.ENOENT, errno.EINVAL):
                    raise
    if place.hostname:
        name = place.hostname.encode()
        _check(_libc.sethostname(name, ctypes.c_size_t(len(name))), "sethostname")


def _drop_capabilities() -> None:
    _check(_libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl PR_SET_NO_NEW_PRIVS")
    for capability in range(MOST_CAPABILITIES):
        if capability != CAP_DAC_READ_SEARCH:
            # EINVAL ends it: this kernel knows no capability of that number.
            if _libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) != 0:
                break
    kept = 1 << CAP_DAC_READ_SEARCH
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0)
    sets = (ctypes.c_uint32 * 6)(kept, kept, 0, 0, 0, 0)
    _check(_libc.capset(header, sets), "capset")


def launch_script() -> str:
    """Return the path of this module, to be run as a script."""
    return os.path.abspath(__file__)  # noqa: PTH100 - a light script


def enter(place: Place) -> None:
    """Put the calling, single-threaded process there. Raises OSError."""
    descriptor = os.open(place.net, os.O_RDONLY | os.O_CLOEXEC)
    setns(descriptor, CLONE_NEWNET)
    os.close(descriptor)
    if place.hosts or place.hostname:
        _own_names(place)
    if not place.capabilities:
        _drop_capabilities()


def become(place: Place, argv: list[str]) -> NoReturn:
    """Enter `place` and become `argv`. Ends the process with 126 or 127 when that fails."""
    try:
        enter(place)
    except OSError as error:
        sys.stderr.write(f"cannot enter {place.net}: {error.strerror}\n")
        raise SystemExit(EXIT_CANNOT_RUN) from None
    try:
        os.execvp(argv[0], argv)  # noqa: S606 - the purpose of this module
    except FileNotFoundError:
        sys.stderr.write(f"{argv[0]}: command not found\n")
        raise SystemExit(EXIT_NOT_FOUND) from None
    except OSError as error:
        sys.stderr.write(f"{argv[0]}: {error.strerror}\n")
        raise SystemExit(EXIT_CANNOT_RUN) from None


def main() -> NoReturn:
    place = Place(**json.loads(sys.argv[1]))
    if place.gate >= 0:
        permitted = os.read(place.gate, 1)
        os.close(place.gate)
        if not permitted:
            raise SystemExit(EXIT_ABANDONED)
    become(place, sys.argv[2:])


if __name__ == "__main__":
    main()
