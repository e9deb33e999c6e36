"""Which version of each file is in force: new ones where possible, the last good ones elsewhere.

This module owns the step from "what the files hold now" to "what is in force". It promises that
the documents in force never conflict; that what was in force first stays, whatever the order of the
files; and that a refused file changes nothing for others. It is pure.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from nodeagent.api import ConfigError, ConfigWarning, Document, claims, conflict

__all__ = ["FileVersion", "admit"]


class FileVersion(msgspec.Struct, frozen=True):
    """A version of a file without errors, and the bytes that it was read from."""

    documents: tuple[Document, ...]
    warnings: tuple[ConfigWarning, ...]
    data: bytes


_Claims = dict[str, tuple[Document, str]]


def admit(
    in_force: Mapping[str, FileVersion], wanted: Mapping[str, FileVersion], node: str
) -> tuple[dict[str, FileVersion], list[ConfigError]]:
    """Return what is in force next, by file, and an error for each claim that was refused.

    `in_force` and `wanted` hold only files without errors of their own, and each version is free
    of conflicts in itself; the versions in `in_force` are free of conflicts with one another. A
    file that is missing in `wanted` is removed. `node` is this node's name.
    """
    before = {file: _claims(version, node) for file, version in in_force.items()}
    after = {file: _claims(version, node) for file, version in wanted.items()}
    kept: set[str] = set()
    errors: dict[str, list[ConfigError]] = {}
    # A refused file goes back to its version in force, which takes back claims that it would have
    # released; that may refuse another file. Each round refuses one more, so the rounds end.
    while True:
        chosen = {file: before[file] if file in kept else after[file] for file in after}
        refused = _refused(chosen, before)
        if not refused:
            break
        for file, found in refused.items():
            errors.setdefault(file, []).extend(found)
            if file in before and file not in kept:
                kept.add(file)
            else:
                del after[file]
    result = {file: in_force[file] if file in kept else wanted[file] for file in sorted(after)}
    return result, [error for file in sorted(errors) for error in errors[file]]


def _claims(version: FileVersion, node: str) -> _Claims:
    return {
        claim: (document, field)
        for document in version.documents
        for claim, field in claims(document, node).items()
    }


def _refused(
    chosen: Mapping[str, _Claims], before: Mapping[str, _Claims]
) -> dict[str, list[ConfigError]]:
    """Return the errors of files that claim what another file holds.

    A claim that a file has in force and still makes is its own before all others; further claims go
    to the file whose name sorts first.
    """
    holders: dict[str, tuple[str, Document]] = {}
    for file, made in chosen.items():
        for claim in made.keys() & before.get(file, {}).keys():
            holders[claim] = (file, made[claim][0])
    refused: dict[str, list[ConfigError]] = {}
    for file in sorted(chosen):
        found = [
            conflict(document, holders[claim][1], claim, field)
            for claim, (document, field) in chosen[file].items()
            if claim in holders and holders[claim][0] != file
        ]
        if found:
            refused[file] = found
            continue
        holders.update({claim: (file, made[0]) for claim, made in chosen[file].items()})
    return refused
