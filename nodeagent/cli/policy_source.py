"""By which configuration a question is answered: files, or what the running agent has in force.

This module owns the options for that and the way from them to the evaluator. It promises that a
question is never answered by a configuration that has errors, and that whatever else may make an
answer differ from what happens on the node is said on standard error. It may not answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

import msgspec

from nodeagent import offline
from nodeagent.admin.configuration import CONFIGURATION_SCHEMA, Configuration
from nodeagent.api import Document, values
from nodeagent.cli import RefusedInputError
from nodeagent.cli.ending import say
from nodeagent.cli.policy import settings_of
from nodeagent.cli.reach import get, run_directory
from nodeagent.cli.text import many
from nodeagent.offline import Offline
from nodeagent.settings import Settings

__all__ = ["Source", "from_agent", "from_files", "of_files"]

MAX_ANSWER: Final = 512 * 1024 * 1024
"""Bytes of the agent's documents: about half a million workloads."""

_SHOWN: Final = 10
"""Errors or problems that are repeated; the rest is counted."""


class Source(msgspec.Struct, frozen=True):
    """Documents to be asked, and `name` for people. `notes` are what must not be overlooked.

    `warnings` are those of reading the documents, `shows` is the command that shows all.
    """

    name: str
    documents: tuple[Document, ...]
    settings: Settings
    trusted: tuple[str, ...]
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    shows: str = "nodeagent policy check"

    def evaluator(self) -> Offline:
        """Return the evaluator, and say the notes on standard error. Raises RefusedInputError."""
        try:
            found = Offline.of(self.documents, self.settings, self.trusted)
        except offline.UnusableError as error:
            raise RefusedInputError(f"{self.name}: ztunnel would refuse this: {error}") from None
        _say("note", self.notes)
        _say("closed until it is mended", map(str, found.mesh.problems))
        if not found.workloads:
            _say("note", ["no WorkloadEntry here: name the files that hold them too"])
        count = len(self.warnings) + len(found.mesh.warnings)
        if count:
            text = f"{many(count, 'warning')}: {self.shows} shows what has no effect"
            _say("note", [text])
        return found


def from_files(names: Sequence[str], settings_file: Path | None, trusted: Iterable[str]) -> Source:
    """Return the configuration of files and directories. Raises RefusedInputError."""
    return of_files(names, settings_of(settings_file), trusted)


def of_files(names: Sequence[str], settings: Settings, trusted: Iterable[str]) -> Source:
    """Return the configuration of files and directories. Raises RefusedInputError."""
    try:
        domains = tuple(map(values.trust_domain, trusted))
    except ValueError as error:
        raise RefusedInputError(str(error)) from None
    try:
        found = offline.read(names, settings.node)
    except offline.NoFilesError as error:
        raise RefusedInputError(str(error)) from None
    if found.errors:
        _say("error", map(str, found.errors))
        raise RefusedInputError(
            f"{many(len(found.errors), 'error')} in these files: nothing can be decided by them; "
            "correct them (nodeagent policy check shows all)"
        )
    return Source(
        name=many(found.files, "file"),
        documents=found.documents,
        settings=settings,
        trusted=domains,
        warnings=found.warnings,
    )


def from_agent(run_dir: Path | None, settings_file: Path | None) -> Source:
    """Return the running agent's configuration. Raises UnreachableError."""
    directory = run_directory(run_dir, settings_file)
    found = get(directory, "/configuration", Configuration, CONFIGURATION_SCHEMA, MAX_ANSWER)
    notes = [found.pending] if found.pending else []
    if found.trust_domain not in found.trusted:
        domain = found.trust_domain
        notes.append(f"no roots of {domain} are held yet: its identities are refused until then")
    notes += [f"refused, a last good version is in force: {each}" for each in found.problems]
    return Source(
        name=f"in force on {found.node}",
        documents=found.documents.all(),
        settings=found.settings(),
        trusted=found.trusted,
        notes=tuple(notes),
        shows="nodeagent status",
    )


def _say(kind: str, lines: Iterable[str]) -> None:
    every = list(lines)
    for line in every[:_SHOWN]:
        say(f"{kind}: {line}")
    if len(every) > _SHOWN:
        say(f"{kind}: and {len(every) - _SHOWN} more")
