"""tcpdump in one of a lab's namespaces.

This module owns one running capture. It promises that the capture runs before `start` returns, that
`stop` reports what the kernel dropped, and that the process ends. It may not interpret packets.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Final, Self

from nodeagent.lab import pcap, processes
from nodeagent.lab.launch import Place
from nodeagent.lab.store import LabError

__all__ = ["Sniffer", "tool"]

START_SECONDS: Final = 10.0
STOP_SECONDS: Final = 10.0
SYSTEM_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
"""Debian keeps tcpdump where the PATH of ordinary users does not lead."""


def tool(name: str) -> str:
    """Return the path of a program of the system. Raises LabError."""
    found = shutil.which(name) or shutil.which(name, path=SYSTEM_PATH)
    if found is None:
        raise LabError(f"{name} is not installed; install it: apt-get install {name}")
    return found


class Sniffer:
    """Captures TCP on one interface of one namespace into a file."""

    def __init__(self, space: Path, interface: str, file: Path) -> None:
        self._space = space
        self._interface = interface
        self._file = file
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        """Start, and wait until packets are captured. Raises LabError."""
        # Written to standard output: with a file's name tcpdump changes its user, and AppArmor
        # decides which names it may use.
        command = [tool("tcpdump"), "-i", self._interface, "-n", "-U", "--immediate-mode"]
        command += ["-Z", "root", "-s", "0", "-w", "-", "tcp"]
        with self._file.open("wb") as output:
            self._process = subprocess.Popen(
                processes.launch_argv(Place(str(self._space)), command),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.PIPE,
            )
        said = self._read_until(b"listening on", START_SECONDS)
        if b"listening on" not in said:
            self._kill()
            raise LabError(f"tcpdump did not start: {said.decode(errors='replace').strip()}")
        return self

    def __exit__(self, *_: object) -> None:
        self._kill()

    def _read_until(self, wanted: bytes, seconds: float) -> bytes:
        """Return what tcpdump says until it says `wanted`, ends, or the time is over."""
        process = self._process
        if process is None or process.stderr is None:
            return b""
        said = b""
        deadline = time.monotonic() + seconds
        while wanted not in said and (left := deadline - time.monotonic()) > 0:
            if select.select([process.stderr], [], [], left)[0]:
                chunk = os.read(process.stderr.fileno(), 4096)
                if not chunk:
                    break
                said += chunk
        return said

    def look(self) -> pcap.Capture:
        """Return what has been captured so far."""
        raw = self._file.read_bytes()
        return pcap.read(raw) if len(raw) >= pcap.HEADER_BYTES else pcap.Capture(0, (), raw)

    def stop(self) -> tuple[pcap.Capture, int]:
        """End the capture; return it, and how many packets the kernel dropped (-1: unknown)."""
        dropped = -1
        if self._process is not None:
            self._process.send_signal(signal.SIGINT)
            said = self._read_until(b"dropped by kernel", STOP_SECONDS)
            if found := re.search(rb"(\d+) packets? dropped by kernel", said):
                dropped = int(found.group(1))
            self._kill()
        return self.look(), dropped

    def _kill(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            process.wait()
            if process.stderr is not None:
                process.stderr.close()
