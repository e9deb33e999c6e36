"""Files, directories and standard input as one configuration.

This module owns the reading of what a person names on a command line. It promises that each file is
judged by the agent's own loader, and all of them together for conflicts, as the agent would; that
every error names its file; and that no file is read further than the loader's limit. It may not say
what the documents mean.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec

from nodeagent import api
from nodeagent.api import ConfigError, Document

__all__ = ["STDIN", "Documents", "NoFilesError", "read", "read_file"]

STDIN: Final = "-"

SUFFIXES: Final = (".yaml", ".yml", ".json")
"""Of the files of a directory, as the agent reads its own."""

MOST_BYTES: Final = 1024 * 1024 + 1
"""Bytes read of one file: one more than the reader of documents accepts, so that it says so."""


_EMPTY_STDIN: Final = "is empty: did what writes it fail?"
_LARGE_STDIN: Final = (
    f"more than {MOST_BYTES - 1} bytes: give it in parts (of kubectl, one namespace at a time), or "
    "split the file and name its parts"
)


class NoFilesError(Exception):
    """What is named is not there, or cannot be read: a mistake, and no empty configuration."""


class Documents(msgspec.Struct, frozen=True):
    """What so many `files` hold together. With any error they are no configuration."""

    files: int
    documents: tuple[Document, ...]
    errors: tuple[ConfigError, ...]
    warnings: tuple[str, ...]


def read(names: Sequence[str], node: str, *, may_be_empty: bool = False) -> Documents:
    """Return what the files hold: paths, directories, or STDIN. `node` is the node's name.

    A directory without files is an answer if it `may_be_empty`, as the one is that an agent watches
    whose mesh is still to be written; else it is taken for a mistake. Raises NoFilesError.
    """
    files = _expand(names, may_be_empty=may_be_empty)
    documents: list[Document] = []
    errors: dict[ConfigError, None] = {}
    warnings: dict[str, None] = {}
    for name in files:
        try:
            shown, data = read_file(name)
        except ConfigError as error:
            errors[error] = None
            continue
        trouble = _of_stdin(data) if name == STDIN else ""
        if trouble:
            errors[ConfigError(shown, 0, 0, "", trouble)] = None
            continue
        loaded = api.load_file(data, shown, node)
        documents += loaded.documents
        errors.update(dict.fromkeys(loaded.errors))
        warnings.update(dict.fromkeys(map(str, loaded.warnings)))
    errors.update(dict.fromkeys(api.own_conflicts(documents, node)))
    return Documents(len(files), tuple(documents), tuple(errors), tuple(warnings))


def _expand(names: Sequence[str], *, may_be_empty: bool) -> list[str]:
    """Return the files that are meant, each once."""
    found: dict[str, None] = {}
    for name in names:
        if not name:
            raise NoFilesError("'' names no file")
        path = Path(name)
        if name == STDIN or not path.is_dir():
            _check_there(name)
            found[name] = None
            continue
        try:
            entries = sorted(path.iterdir())
        except OSError as error:
            raise NoFilesError(f"{name} cannot be read: {error.strerror or error}") from None
        inside = [
            str(entry)
            for entry in entries
            if entry.suffix in SUFFIXES and not entry.name.startswith(".")
        ]
        if not inside and not may_be_empty:
            raise NoFilesError(
                f"{name} holds no file that ends in {', '.join(SUFFIXES)}: name one that does"
            )
        found.update(dict.fromkeys(inside))
    return list(found)


def _check_there(name: str) -> None:
    """Raise NoFilesError if nothing can be read under `name`. Reads nothing: a pipe gives once."""
    if name == STDIN or not name.isprintable():
        return
    try:
        Path(name).stat()
    except OSError as error:
        raise NoFilesError(f"{name}: cannot be read: {error.strerror or error}") from None
    if not os.access(name, os.R_OK):
        raise NoFilesError(f"{name}: cannot be read: {os.strerror(errno.EACCES)}")


def _of_stdin(data: bytes) -> str:
    """Return what is wrong with all of standard input, in words that fit it."""
    if not data.strip():
        return _EMPTY_STDIN
    return _LARGE_STDIN if len(data) >= MOST_BYTES else ""


def read_file(name: str) -> tuple[str, bytes]:
    """Return what a file or STDIN is called in messages, and what it holds, MOST_BYTES at most.

    Raises ConfigError.
    """
    if name == STDIN:
        return "standard input", sys.stdin.buffer.read(MOST_BYTES)
    if not name.isprintable():
        # As the agent refuses it in its own directory: such a name breaks lines and JSON.
        raise ConfigError(ascii(name), 0, 0, "", "has a name that is no text: rename it")
    try:
        with Path(name).open("rb") as stream:
            return name, stream.read(MOST_BYTES)
    except OSError as error:
        reason = f"cannot be read: {error.strerror or error}"
        raise ConfigError(name, 0, 0, "", reason) from None
