"""Where the lines of ztunnel's logs come from: files, systemd's journal, standard input.

This module owns the choice of sources by what the agent says of itself, and the reading of lines,
following included. It promises that a line is whole, that memory is bounded by the line, that a
file which is rotated is followed into its successor, and that a log which cannot be read is said
with what to do. It may not know what a line means.
"""

from __future__ import annotations

import contextlib
import heapq
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import IO, Final, NamedTuple

from nodeagent.cli import RefusedInputError
from nodeagent.cli.config_show import settings_in_force
from nodeagent.cli.ending import say
from nodeagent.cli.log_lines import Log, read
from nodeagent.cli.reach import run_directory
from nodeagent.cli.status import fetch

__all__ = ["Source", "find", "merged", "of_files"]

STDOUT: Final = "-"
"""What ztunnel calls its standard output, and this command standard input."""

UNIT: Final = "ztunnel"

MAX_LINE: Final = 256 * 1024
"""Bytes that are taken for one line; what is longer is cut into several, and none of ours."""

POLL_SECONDS: Final = 0.2
"""Between two looks at a followed file: a person does not notice, and nothing is woken often."""


class Source(NamedTuple):
    """A file, or the journal of a unit since `since`. `name` is for people."""

    name: str
    path: Path | None = None
    since: datetime | None = None


def of_files(files: Sequence[Path]) -> list[Source]:
    """Return files as sources. Raises RefusedInputError if one cannot be read."""
    for each in files:
        if str(each) != STDOUT:
            _check(each)
    return [Source("standard input" if str(each) == STDOUT else str(each), each) for each in files]


def find(
    run_dir: Path | None,
    settings_file: Path | None,
    wanted: Collection[Log],
    since: datetime | None,
) -> list[Source]:
    """Return where the logs go, by what the agent says.

    Raises UnreachableError; RefusedInputError if none of them can be read here.
    """
    directory = run_directory(run_dir, settings_file)
    own = fetch(directory).ztunnel.own
    settings = {each.name: each.value for each in settings_in_force(directory).settings}
    access = own.get("access_log") if own is not None else None
    if not isinstance(access, str):
        raise RefusedInputError(
            "ztunnel does not say where its access log goes: it is not connected, or of another "
            "release; name the log with --file"
        )
    sources: list[Source] = []
    stdout = False
    if Log.ACCESS in wanted:
        if access == STDOUT:
            stdout = True
        else:
            sources.append(Source(access, Path(access)))
    if Log.AUDIT in wanted:
        file = str(settings.get("audit.file") or "")
        if settings.get("audit.stdout") is True:
            stdout = True
        elif file and settings.get("audit.form") == "ocsf":
            raise RefusedInputError(
                f"{file} has events of OCSF, which are for a SIEM: read them with jq, or have the "
                "audit log on standard output too (audit.stdout)"
            )
        elif file:
            sources.append(Source(file, Path(file)))
    return _with_journal(sources, since, wanted=stdout)


def _with_journal(sources: list[Source], since: datetime | None, *, wanted: bool) -> list[Source]:
    """Check that what was found can be read, and add the journal if it is `wanted` and there."""
    for source in sources:
        if source.path is not None:
            _check(source.path)
    if wanted and shutil.which("journalctl") is not None:
        return [*sources, Source(f"the journal of {UNIT}", None, since)]
    remedy = (
        "ztunnel writes it to its standard output, and there is no journalctl here: read that "
        "where it goes (kubectl logs …), or start ztunnel with --access-log FILE, or name a file "
        "with --file"
    )
    if wanted and sources:
        say(f"note: without the audit log: {remedy}")
    elif wanted:
        raise RefusedInputError(f"the log is not to be had here: {remedy}")
    elif not sources:
        raise RefusedInputError(
            "the settings write no audit log to a file, nor to standard output: see audit in "
            "nodeagent config -o wide"
        )
    return sources


def _check(path: Path) -> None:
    try:
        with path.open("rb"):
            pass
    except OSError as error:
        raise RefusedInputError(f"{path} cannot be read: {error.strerror or error}") from None


# --- reading ------------------------------------------------------------------------------------


def merged(sources: Sequence[Source], *, follow: bool) -> Iterator[str]:
    """Yield the lines of all sources by their times; with `follow` as they come, for ever."""
    with contextlib.ExitStack() as stack:
        readers = [_Reader(each, stack, follow=follow) for each in sources]
        yield from _by_time([reader.until_end() for reader in readers])
        while follow and any(reader.goes_on for reader in readers):
            came = False
            for line in _by_time([reader.until_end() for reader in readers]):
                came = True
                yield line
            if not came:
                time.sleep(POLL_SECONDS)


def _by_time(streams: Sequence[Iterator[str]]) -> Iterator[str]:
    if len(streams) == 1:
        yield from streams[0]
        return
    for _, _, line in heapq.merge(*(_timed(each, at) for at, each in enumerate(streams))):
        yield line


def _timed(lines: Iterator[str], place: int) -> Iterator[tuple[float, int, str]]:
    """Yield each line with its time; one without has that of the line before."""
    latest = 0.0
    for line in lines:
        entry = read(line)
        if entry is not None:
            # Lines are in the order of ends, not of beginnings: it must not go back.
            latest = max(latest, entry.time.timestamp())
        yield latest, place, line


class _Reader:
    """Reads one source as far as it goes now, as often as it is asked."""

    def __init__(self, source: Source, stack: contextlib.ExitStack, *, follow: bool) -> None:
        self._path = source.path
        self._left = b""
        self.goes_on = follow
        if source.path is None:
            self._stream: IO[bytes] = _journal(source.since, stack, follow=follow)
        elif str(source.path) == STDOUT:
            self._stream = sys.stdin.buffer
            # It is read to its end once, which is when whoever writes it has ended.
            self.goes_on = False
        else:
            self._stream = source.path.open("rb")
            stack.callback(self.close)

    def close(self) -> None:
        self._stream.close()

    def until_end(self) -> Iterator[str]:
        """Yield whole lines; without `goes_on` also the last one that has no line feed."""
        while True:
            piece = self._stream.readline(MAX_LINE)
            if piece:
                self._left += piece
                if not piece.endswith(b"\n") and len(self._left) < MAX_LINE:
                    continue
            elif self._successor():
                continue
            elif not self._left or self.goes_on:
                return
            line, self._left = self._left, b""
            yield line.decode("utf-8", "replace")

    def _successor(self) -> bool:
        """Go to what has taken the file's place, if something has; its end has been read."""
        if not self.goes_on or self._path is None:
            return False
        try:
            there = self._path.stat()
        except OSError:
            # Renamed, and the new one is not there yet.
            return False
        ours = os.fstat(self._stream.fileno())
        if (there.st_dev, there.st_ino) != (ours.st_dev, ours.st_ino):
            fresh = self._path.open("rb")
            self._stream.close()
            self._stream = fresh
            return True
        if there.st_size < self._stream.tell():
            # Truncated in its place.
            self._stream.seek(0)
            return True
        return False


def _journal(since: datetime | None, stack: contextlib.ExitStack, *, follow: bool) -> IO[bytes]:
    """Start journalctl; what is read of it is there already, if it is followed."""
    command = ["journalctl", "--unit", UNIT, "--output", "cat", "--no-pager", "--quiet"]
    if since is not None:
        command.append(f"--since=@{since.timestamp():.6f}")
    if follow:
        command += ["--follow", "--lines=all"]
    process = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE))
    stack.callback(process.kill)
    assert process.stdout is not None  # noqa: S101 - asked for above
    # Of a reader that does not block, readline gives what there is, and nothing when there is none.
    os.set_blocking(process.stdout.fileno(), not follow)
    return process.stdout
