"""Which version of each file is in force: new ones where possible, the last good ones elsewhere.

This module owns the step from "what the files hold now" to "what is in force". It promises that
the documents in force never conflict; that what was in force first stays, whatever the order of the
files; that a refused file changes nothing for others; and that only files which differ are looked
at. It is pure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import msgspec

from nodeagent.api import ConfigError, ConfigWarning, Document, claims, conflict

__all__ = ["FileVersion", "InForce", "admit"]


class FileVersion(msgspec.Struct, frozen=True):
    """A version of a file without errors, and the bytes that it was read from."""

    documents: tuple[Document, ...]
    warnings: tuple[ConfigWarning, ...]
    data: bytes


_Holder = tuple[str, Document]
"""The file that a claim is made in, and the document."""

_Claims = dict[str, tuple[Document, str]]


class InForce(msgspec.Struct, frozen=True):
    """Versions by file, in order, and who holds each claim. Only `admit` makes one."""

    files: dict[str, FileVersion] = {}
    holders: dict[str, _Holder] = {}


def admit(
    in_force: InForce, wanted: Mapping[str, FileVersion], node: str
) -> tuple[InForce, list[ConfigError]]:
    """Return what is in force next, and an error for each claim that was refused.

    `wanted` holds only files without errors of their own, and each version is free of conflicts in
    itself. A file that is missing in `wanted` is removed. `node` is this node's name.
    """
    # What stays as it is keeps its claims, so it is refused nothing, and refuses others by them.
    differ = {file for file in wanted if in_force.files.get(file) is not wanted[file]}
    differ |= in_force.files.keys() - wanted.keys()
    before = {
        file: _claims(in_force.files[file], node) for file in differ if file in in_force.files
    }
    after = {file: _claims(wanted[file], node) for file in differ if file in wanted}

    def unmoved(claim: str) -> _Holder | None:
        holder = in_force.holders.get(claim)
        return None if holder is None or holder[0] in differ else holder

    chosen = _settled(before, after, unmoved)
    holders = _moved(in_force.holders, before.values(), chosen)
    # A version that was refused for the sake of one that was refused as well may stand after all.
    refused = sorted(file for file in after if chosen.get(file) is not after[file])
    errors: dict[str, list[ConfigError]] = {}
    left: list[str] = []
    while refused != left:
        left, refused = refused, []
        for file in left:
            errors[file] = _conflicts(file, after[file], holders)
            if errors[file]:
                refused.append(file)
                continue
            holders = _moved(holders, [chosen.pop(file, {})], {file: after[file]})
            chosen[file] = after[file]
    files = {
        file: in_force.files[file] if file in refused else wanted[file]
        for file in sorted(wanted)
        if file in chosen or file not in differ
    }
    return InForce(files, holders), [error for file in refused for error in errors[file]]


def _settled(
    before: Mapping[str, _Claims],
    after: Mapping[str, _Claims],
    unmoved: Callable[[str], _Holder | None],
) -> dict[str, _Claims]:
    """Return the claims of each file in question, of one of its versions, without a conflict.

    A refused file goes back to its version in force, which takes back claims that it would have
    released; that may refuse another file. Each round refuses one more, so the rounds end.
    """
    chosen = dict(after)
    while True:
        refused = _refused(chosen, before, unmoved)
        if not refused:
            return chosen
        for file in refused:
            if file in before and chosen[file] is not before[file]:
                chosen[file] = before[file]
            else:
                del chosen[file]


def _claims(version: FileVersion, node: str) -> _Claims:
    return {
        claim: (document, field)
        for document in version.documents
        for claim, field in claims(document, node).items()
    }


def _refused(
    chosen: Mapping[str, _Claims],
    before: Mapping[str, _Claims],
    unmoved: Callable[[str], _Holder | None],
) -> set[str]:
    """Return the files that claim what another file holds.

    A claim that a file has in force and still makes is its own before all others; further claims go
    to the file whose name sorts first. `unmoved` says who holds a claim in a file that is not in
    question.
    """
    holders: dict[str, _Holder] = {}
    for file, made in chosen.items():
        for claim in made.keys() & before.get(file, {}).keys():
            holders[claim] = (file, made[claim][0])
    refused: set[str] = set()
    for file in sorted(chosen):
        found = (holders.get(claim) or unmoved(claim) for claim in chosen[file])
        if any(holder is not None and holder[0] != file for holder in found):
            refused.add(file)
            continue
        holders.update({claim: (file, made[0]) for claim, made in chosen[file].items()})
    return refused


def _conflicts(file: str, made: _Claims, holders: Mapping[str, _Holder]) -> list[ConfigError]:
    """Return an error for each claim of a file that another file holds."""
    return [
        conflict(document, holder[1], claim, field)
        for claim, (document, field) in made.items()
        if (holder := holders.get(claim)) is not None and holder[0] != file
    ]


def _moved(
    holders: Mapping[str, _Holder], released: Iterable[_Claims], chosen: Mapping[str, _Claims]
) -> dict[str, _Holder]:
    """Return the holders of all claims once those that are `released` have gone."""
    result = dict(holders)
    for gone in released:
        for claim in gone:
            result.pop(claim, None)
    for file, made in chosen.items():
        result.update({claim: (file, document) for claim, (document, _) in made.items()})
    return result
