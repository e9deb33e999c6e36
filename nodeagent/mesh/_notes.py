"""Warnings of the mesh: one line each, with the place of the document that is concerned.

This module owns their form. It promises a stable order. It may not decide what deserves one.
"""

from __future__ import annotations

from nodeagent.api import ConfigWarning, Document

__all__ = ["Notes", "name"]


def name(document: Document) -> str:
    """Return how a warning names `document`: kind, uid and place."""
    return f"{type(document).__name__} {document.uid} ({document.origin})"


class Notes:
    """Collects warnings."""

    def __init__(self) -> None:
        self._found: set[ConfigWarning] = set()

    def add(self, document: Document, field: str, reason: str) -> None:
        origin = document.origin
        text = f"{type(document).__name__} {document.uid}: {reason}"
        self._found.add(ConfigWarning(origin.file, origin.line, origin.column, field, text))

    def twice(self, document: Document, holder: Document) -> None:
        """Say that `document` has the uid of `holder`, which is older."""
        reason = f"has no effect: it is also in {holder.origin}; remove one"
        self.add(document, "metadata.name", reason)

    def found(self) -> tuple[ConfigWarning, ...]:
        return tuple(sorted(self._found))
