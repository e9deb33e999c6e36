"""What every source yields.

This module owns the interface between sources and the agent. It promises one coherent value at a
time. It may not know any kind of source.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Protocol

import msgspec

from nodeagent.api import ConfigError, ConfigWarning, Document

__all__ = ["Source", "SourceState"]


class SourceState(msgspec.Struct, frozen=True):
    """The documents in force, and what keeps others from being in force.

    `version` grows with each change, of documents, problems or warnings. `warnings` are of the
    documents in force.
    """

    documents: tuple[Document, ...]
    problems: tuple[ConfigError, ...]
    warnings: tuple[ConfigWarning, ...]
    version: int


class Source(Protocol):
    """A source of documents."""

    def states(self) -> AsyncIterator[SourceState]:
        """Yield the state now, then each later one. Ends only by cancellation or `aclose`.

        A slow reader misses states in between, never the last one.
        """
        ...
