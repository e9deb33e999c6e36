"""Which release of the package runs.

This module owns the one look at the installed package's metadata. It promises the release that was
installed when the process asked first: what an upgrade puts beside a running process is not it.
"""

from __future__ import annotations

import functools
import importlib.metadata

__all__ = ["release"]


@functools.cache
def release() -> str:
    """Return the release, "unknown" where the package is not installed."""
    try:
        return importlib.metadata.version("nodeagent")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
