"""Which processes run, which of them are ours, and who holds which socket.

This module owns reading /proc. It promises that a process that ends meanwhile is no error. It may
not signal or trace anybody.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final

import msgspec

from nodeagent.doctor.facts import Daemon, PortHolder, Stranger

__all__ = [
    "Process",
    "described",
    "holders",
    "listening",
    "processes",
    "socket_holders",
    "strangers",
    "tunnel_of",
]

PROC: Final = Path("/proc")

MOST_ARGUMENTS: Final = 4096
"""Bytes of a command line that are read: the options that are looked for come first."""

LISTEN: Final = "0A"
"""TCP_LISTEN of include/net/tcp_states.h, as /proc/net/tcp has it."""

STOPPED: Final = ("T", "t")
"""States in which a process does nothing until somebody lets it go on."""

STRANGERS: Final[Mapping[str, str]] = {
    "pilot-agent": "Istio's sidecar",
    "install-cni": "Istio's CNI node agent",
    "linkerd2-proxy": "Linkerd's sidecar",
    "linkerd-cni": "Linkerd's CNI node agent",
    "cilium-agent": "Cilium (its own policy and socket programs)",
    "kuma-dp": "Kuma's data plane",
    "consul-dataplane": "Consul's data plane",
    "kmesh-daemon": "Kmesh",
}
"""By the program's name. Each of them redirects connections, or runs programs on sockets."""

OWN_TUNNEL: Final = "ztunnel"
"""Istio's is called so too: one that is not connected to a control socket of ours is a stranger."""


class Process(msgspec.Struct, frozen=True):
    """`name` is its program's, without the directory; text of whoever made it."""

    pid: int
    name: str
    arguments: tuple[str, ...]


def processes() -> tuple[Process, ...]:
    """Return every process, kernel threads left out."""
    found: list[Process] = []
    for entry in PROC.iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            with (entry / "cmdline").open("rb") as file:
                words = file.read(MOST_ARGUMENTS).split(b"\0")
            arguments = tuple(os.fsdecode(word) for word in words if word)
            if arguments:
                found.append(Process(int(entry.name), os.path.basename(arguments[0]), arguments))  # noqa: PTH119 - no path of ours
    return tuple(found)


def described(name: str, pid: int) -> Daemon | None:
    """Return a running process and its descriptors; None if there is none of that number."""
    directory = PROC / str(pid)
    if not pid or not directory.exists():
        return None
    with contextlib.suppress(OSError, ValueError):
        limit = next(
            line.split()[3]
            for line in (directory / "limits").read_text(encoding="ascii").splitlines()
            if line.startswith("Max open files")
        )
        count = sum(1 for _ in os.scandir(directory / "fd"))
        return Daemon(name, pid, count, int(limit), _stopped(directory))
    return Daemon(name, pid)


def _stopped(process: Path) -> bool:
    # Behind the name, which may hold anything (proc_pid_stat(5)).
    state = (process / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2]
    return state.split()[0] in STOPPED


def tunnel_of(control_socket: Path, running: Iterable[Process]) -> int:
    """Return the ztunnel that is connected to `control_socket` by its command line, 0 for none."""
    for process in running:
        if "--control" in process.arguments and str(control_socket) in process.arguments:
            return process.pid
    return 0


def _is_tunnel_of_ours(process: Process) -> bool:
    return "--control" in process.arguments


def strangers(running: Iterable[Process]) -> tuple[Stranger, ...]:
    """Return the processes that look like another mesh's."""
    found: list[Stranger] = []
    for process in running:
        what = STRANGERS.get(process.name, "")
        if process.name == OWN_TUNNEL and not _is_tunnel_of_ours(process):
            what = "Istio's ztunnel"
        if what:
            found.append(Stranger(what, process.pid))
    return tuple(found)


def socket_holders() -> dict[int, tuple[int, str]]:
    """Return process and name of a holder of each socket, by the socket's inode.

    One pass over all descriptors of the node. systemd, which keeps sockets for daemons, is named
    only where nobody else has the socket.
    """
    found: dict[int, tuple[int, str]] = {}
    for entry in PROC.iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            name = (entry / "comm").read_text(encoding="utf-8", errors="replace").strip()
            for inode in _sockets(entry):
                if inode not in found or found[inode][0] == 1:
                    found[inode] = (int(entry.name), name)
    return found


def _sockets(process: Path) -> Iterator[int]:
    for descriptor in os.scandir(process / "fd"):
        with contextlib.suppress(OSError):
            target = os.readlink(descriptor.path)  # noqa: PTH115 - a hundred thousand of them
            if target.startswith("socket:["):
                yield int(target[8:-1])


def listening(ports: Iterable[int]) -> dict[int, list[int]]:
    """Return the inodes of sockets that listen on `ports` in the calling thread's namespace."""
    wanted = set(ports)
    found: dict[int, list[int]] = {}
    for table in ("tcp", "tcp6"):
        with (
            contextlib.suppress(FileNotFoundError),
            open(f"/proc/thread-self/net/{table}", encoding="ascii") as lines,  # noqa: PTH123 - procfs
        ):
            for line in lines:
                fields = line.split()
                if fields[3] != LISTEN:
                    continue
                port = int(fields[1].rpartition(":")[2], 16)
                if port in wanted:
                    found.setdefault(port, []).append(int(fields[9]))
    return found


def holders(
    sockets: Mapping[int, Iterable[int]],
    known: Mapping[int, tuple[int, str]],
    ours: frozenset[int],
) -> tuple[PortHolder, ...]:
    """Return who holds listening sockets. `known`: holders by inode; `ours`: our processes."""
    found: set[PortHolder] = set()
    for port, inodes in sockets.items():
        for inode in inodes:
            pid, name = known.get(inode, (0, ""))
            # What systemd keeps for a daemon that restarts has no other holder; neither has what
            # only the capture's map still refers to.
            found.add(PortHolder(port, pid, name, pid in ours or pid <= 1))
    return tuple(sorted(found, key=lambda each: (each.port, each.pid)))
