"""Debian's own Prometheus and promtool, unpacked by `make peers` and never installed.

Owns where they are and how they are run. Its paths are below the repository's `build`.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[2]
PROGRAMS: Final = ROOT / "build" / "peers" / "prometheus" / "usr" / "bin"
DEPLOY: Final = ROOT / "deploy"

_SECONDS: Final = 60
"""For one run of promtool: it takes a fraction of one."""


def program(name: str) -> Path:
    """Return where `prometheus` or `promtool` is; say how to get it otherwise."""
    found = PROGRAMS / name
    assert found.exists(), f"{found.relative_to(ROOT)} is missing: make peers"
    return found


def promtool(*arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
    """Run promtool with `text` on its standard input."""
    return subprocess.run(
        [program("promtool"), *arguments],
        input=text,
        capture_output=True,
        text=True,
        check=False,
        timeout=_SECONDS,
    )


def check_metrics(text: str) -> None:
    """Assert that promtool finds nothing to say about an exposition."""
    found = promtool("check", "metrics", text=text)
    assert (found.returncode, found.stdout, found.stderr) == (0, "", "")
