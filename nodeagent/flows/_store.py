"""The file of recorded flows: an SQLite database of hourly sums.

This module owns the tables, their bounds and how a broken file is dealt with. It promises that a
message is in the file whole or not at all, and with it that it was heard (`_spans`), that the file
stays below its size (the oldest hours give way), that one workload cannot fill it
(MAX_OF_WORKLOAD), that it is 0600, and that instead of a file which is no good, or has been
removed, a new one is begun. It may not be used by two threads, and leaves reading to `_reading`.

Hourly sums, because what is asked are hours and days, and because an hour that is over can be
dropped at once: its rows lie together.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import stat
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Final

import structlog

from nodeagent.flows import _spans
from nodeagent.flows._errors import StoreError, UnusableError, told
from nodeagent.flows._integrity import damage, of_numbers, of_texts
from nodeagent.settings.flows import Keep
from ztunnel.protocol import Flow, FlowKey, Flows

__all__ = ["BUSY_SECONDS", "CARRIED_BITS", "COLUMNS", "FILE_NAME", "HOUR", "VERSION", "FlowStore"]

FILE_NAME: Final = "flows.db"
BROKEN: Final = ".broken"
"""Behind the name of a file that was put aside; there is one at most."""

HOUR: Final = 3600
"""Seconds of a sum."""

MAX_OF_WORKLOAD: Final = 2000
"""Flows of one workload in one hour, each way, about 500 KB. More, by a scan of ports, are counted
as one, so that they cannot push out what is remembered of others."""

MAX_KNOWN: Final = 20_000
"""Flows whose number in the file is remembered: it saves a look for each report of each."""

MAX_WAL_BYTES: Final = 32 * 1024 * 1024
"""Of the write-ahead log, usually a tenth of it. It grows while somebody reads and does not end."""

FULL: Final = 0.9
"""Part of the file's size from which on the oldest hours give way, before a write finds no room."""

BUSY_SECONDS: Final = 2.0
"""For another process's lock: only a reader that recovers the file after a crash takes one."""

VERSION: Final = 3
CARRIED_BITS: Final = 40
"""Of `carried`, which is read in one number with the hour: to have it of the first row alone."""
_PAGE: Final = 4096
_MEGABYTE: Final = 1024 * 1024

COLUMNS: Final = (
    "identity, source, workload, arrival, destination, address, reason, service, policy,"
    " port, allowed, outbound"
)

_TABLES: Final = f"""
CREATE TABLE flow (
    id INTEGER PRIMARY KEY,
    identity TEXT NOT NULL, source TEXT NOT NULL, workload TEXT NOT NULL, arrival TEXT NOT NULL,
    destination TEXT NOT NULL, address TEXT NOT NULL, reason TEXT NOT NULL,
    service TEXT NOT NULL, policy TEXT NOT NULL,
    port INTEGER NOT NULL, allowed INTEGER NOT NULL, outbound INTEGER NOT NULL,
    mark INTEGER NOT NULL,
    UNIQUE ({COLUMNS})
) STRICT;
CREATE TABLE hourly (
    hour INTEGER NOT NULL, flow INTEGER NOT NULL,
    first INTEGER NOT NULL, last INTEGER NOT NULL,
    connections INTEGER NOT NULL, most_open INTEGER NOT NULL,
    received INTEGER NOT NULL, sent INTEGER NOT NULL, carried INTEGER NOT NULL,
    mark INTEGER NOT NULL,
    PRIMARY KEY (hour, flow)
) STRICT, WITHOUT ROWID;
{_spans.TABLES}
PRAGMA user_version = {VERSION};
"""

_MARKS: Final = ", ".join("?" * len(COLUMNS.split(",")))
_FIND: Final = f"SELECT id FROM flow WHERE ({COLUMNS}) = ({_MARKS})"  # noqa: S608 - our own names
_NEW: Final = f"INSERT INTO flow (mark, {COLUMNS}) VALUES (?, {_MARKS})"  # noqa: S608 - as above
_ADD: Final = f"""
UPDATE hourly SET first = min(first, ?1), last = max(last, ?2), connections = connections + ?3,
    most_open = max(most_open, ?4), received = received + ?5, sent = sent + ?6,
    mark = {of_numbers("hour", "flow", "min(first, ?1)", "max(last, ?2)")}
WHERE hour = ?7 AND flow = ?8
"""  # noqa: S608 - as above
_BEGIN: Final = f"""
INSERT INTO hourly (first, last, connections, most_open, received, sent, carried, hour, flow, mark)
VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, {of_numbers("?8", "?9", "?1", "?2")})
"""  # noqa: S608 - as above
_OWNERS: Final = (
    "SELECT outbound, iif(outbound, workload, destination) AS owner, count(*) FROM hourly"
    " JOIN flow ON flow.id = hourly.flow WHERE hour = ? GROUP BY outbound, owner"
)


class FlowStore:
    """The file, for whoever writes it. Any method may raise StoreError; nothing is written then."""

    def __init__(self, path: Path, keep: Keep) -> None:
        self.path = path
        self._keep = keep
        self._pages = keep.max_megabytes * _MEGABYTE // _PAGE
        self._connection: sqlite3.Connection | None = None
        self._file = (0, 0)
        """Device and inode of the file that is open."""
        self.files = 0
        """How many have been begun."""
        self._known: dict[FlowKey, int] = {}
        self._hour = -1
        self._of_workload: Counter[tuple[bool, str]] = Counter()

    def close(self) -> None:
        self._forget()
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(sqlite3.Error):
                connection.close()

    def add(self, process: int, message: Flows) -> None:
        """Add what a process has told: all of it, or nothing."""
        self._do(lambda: self._add_all(process, message))

    def retain(self, pods: Collection[str]) -> None:
        """Forget who was captured, but for these pods: of others it is not known any more."""
        self._do(lambda: self._watched(lambda: _spans.retain(self._open, pods)))

    def watch(self, pods: Mapping[str, str], going_on: Collection[str] | None, now: float) -> None:
        """Remember which workloads are captured at `now`: as `_spans.watch`."""
        self._do(lambda: self._watched(lambda: _spans.watch(self._open, pods, going_on, int(now))))

    def prune(self, now: float) -> None:
        """Drop the hours that are over.

        Those of a future stay: it is this clock that is wrong, on a machine that boots without one.
        The file is opened anew for it, which finds what has become of it on the disk since.
        """
        self.close()
        oldest = int(now) // HOUR - self._keep.retention_hours
        self._do(lambda: self._drop(oldest))

    @property
    def bytes(self) -> int:
        """Size of the file and what belongs to it."""
        sizes = (_size(Path(f"{self.path}{suffix}")) for suffix in ("", "-wal", "-shm"))
        return sum(sizes)

    # --- opening --------------------------------------------------------------------------------

    def _do(self, work: Callable[[], None]) -> None:
        """Open the file and do `work`; begin a new file, once, if this one is no good."""
        for attempt in (1, 2):
            try:
                with told(self.path):
                    if self._connection is not None and not self._is_there():
                        self.close()
                    if self._connection is None:
                        self._connection = self._opened()
                    work()
                    return
            except UnusableError as error:
                self.close()
                if attempt == 1:
                    self._put_aside(error)
                else:
                    raise StoreError(f"{self.path} {error}") from None

    def _is_there(self) -> bool:
        """Return whether the file that is open is still the one of this name."""
        try:
            found = self.path.stat()
        except OSError:
            return False
        return (found.st_dev, found.st_ino) == self._file

    @property
    def _open(self) -> sqlite3.Connection:
        assert self._connection is not None  # noqa: S101 - every way here has opened it
        return self._connection

    def _opened(self) -> sqlite3.Connection:
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # The log and the index beside it get the mode of the file.
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        try:
            descriptor = os.open(self.path, flags, 0o600)
        except OSError as error:
            if self.path.is_symlink():
                raise UnusableError("is a link, and none is followed here") from None
            raise StoreError(f"{self.path}: {error.strerror}") from error
        try:
            found = os.fstat(descriptor)
        finally:
            os.close(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
            raise UnusableError("is not a file of this program's user")
        if found.st_mode & 0o077:
            self.path.chmod(0o600)
        self._file = (found.st_dev, found.st_ino)
        connection = sqlite3.connect(self.path, timeout=BUSY_SECONDS, isolation_level=None)
        try:
            self._prepare(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def _prepare(self, connection: sqlite3.Connection) -> None:
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if version not in (0, VERSION):
            raise UnusableError(f"is of another release (form {version}, this one has {VERSION})")
        for pragma in (
            f"page_size = {_PAGE}",
            # What is dropped makes the file smaller.
            "auto_vacuum = INCREMENTAL",
            "journal_mode = WAL",
            # A commit is on the disk when it returns: there is one every few seconds.
            "synchronous = FULL",
            f"max_page_count = {self._pages}",
            f"journal_size_limit = {MAX_WAL_BYTES // 8}",
            "trusted_schema = OFF",
            "temp_store = MEMORY",
        ):
            connection.execute(f"PRAGMA {pragma}")
        if version == 0:
            if connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]:
                raise UnusableError("is a database of something else")
            connection.executescript(f"BEGIN IMMEDIATE;{_TABLES}COMMIT;")
            self.files += 1
        elif found := damage(connection, COLUMNS, HOUR):
            raise UnusableError(f"is damaged: {found}")

    def _put_aside(self, reason: UnusableError) -> None:
        """Move the file away, in the place of the one that was moved before."""
        aside = Path(f"{self.path}{BROKEN}")
        try:
            for suffix in ("-shm", "-wal", ""):
                with contextlib.suppress(FileNotFoundError):
                    Path(f"{self.path}{suffix}").replace(f"{aside}{suffix}")
        except OSError as error:
            raise StoreError(
                f"{self.path} {reason}, and cannot be moved away ({error.strerror}): remove it"
            ) from error
        structlog.get_logger().error(
            "the file of recorded flows cannot be used; a new one is begun",
            reason=f"it {reason}",
            kept=str(aside),
        )

    def _check_log(self) -> None:
        """Refuse to write while somebody's reading keeps the write-ahead log from ending."""
        if _size(Path(f"{self.path}-wal")) <= MAX_WAL_BYTES:
            return
        self._open.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        if _size(Path(f"{self.path}-wal")) > MAX_WAL_BYTES:
            raise StoreError(f"{self.path}: somebody reads it and does not end: end that process")

    # --- writing --------------------------------------------------------------------------------

    def _add_all(self, process: int, message: Flows) -> None:
        self._check_log()
        self._make_room()
        with self._transaction():
            for flow in message.flows:
                self._add(flow)
            _spans.heard(self._open, process, message)

    def _watched(self, work: Callable[[], None]) -> None:
        self._check_log()
        with self._transaction():
            work()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        connection = self._open
        connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            connection.execute("COMMIT")
        except BaseException:
            self._forget()
            with contextlib.suppress(sqlite3.Error):
                connection.execute("ROLLBACK")
            if connection.in_transaction:
                self.close()
            raise

    def _add(self, flow: Flow) -> None:
        hour = flow.last // HOUR
        numbers = (flow.first, flow.last, flow.connections, flow.open, flow.received, flow.sent)
        carried = min(flow.carried, (1 << CARRIED_BITS) - 1)
        key = flow.key
        number = self._number(key)
        if number is not None and self._added(numbers, hour, number):
            return
        self._turn(hour)
        if self._of_workload[key.owner] >= MAX_OF_WORKLOAD:
            key = key.folded()
            number = self._number(key)
            if number is not None and self._added(numbers, hour, number):
                return
        if number is None:
            row = _row(key)
            number = self._open.execute(_NEW, (of_texts(row), *row)).lastrowid
            assert number is not None  # noqa: S101 - an INSERT that did not raise
            self._known[key] = number
        self._open.execute(_BEGIN, (*numbers, carried, hour, number))
        self._of_workload[key.owner] += 1

    def _number(self, key: FlowKey) -> int | None:
        number = self._known.get(key)
        if number is None:
            found = self._open.execute(_FIND, _row(key)).fetchone()
            if found is None:
                return None
            number = int(found[0])
            if len(self._known) >= MAX_KNOWN:
                self._known.clear()
            self._known[key] = number
        return number

    def _added(self, numbers: tuple[int, ...], hour: int, number: int) -> bool:
        return self._open.execute(_ADD, (*numbers, hour, number)).rowcount > 0

    def _turn(self, hour: int) -> None:
        """Count what `hour` has already, unless it is the hour that was last written to."""
        if hour == self._hour:
            return
        self._hour = hour
        found = self._open.execute(_OWNERS, (hour,))
        self._of_workload = Counter({(bool(way), owner): count for way, owner, count in found})

    def _make_room(self) -> None:
        """Drop the oldest hours while the file is nearly full, but never the last one."""
        while self._used() > FULL:
            first, last = self._open.execute("SELECT min(hour), max(hour) FROM hourly").fetchone()
            if first == last:
                return
            self._drop(first + 1)

    def _used(self) -> float:
        pages, free = (
            self._open.execute(f"PRAGMA {name}").fetchone()[0]
            for name in ("page_count", "freelist_count")
        )
        return float((pages - free) / self._pages)

    def _drop(self, oldest: int) -> None:
        """Drop the hours before `oldest`, and that they were recorded."""
        connection = self._open
        with self._transaction():
            gone = connection.execute("DELETE FROM hourly WHERE hour < ?", (oldest,)).rowcount
            if gone:
                connection.execute("DELETE FROM flow WHERE id NOT IN (SELECT flow FROM hourly)")
                self._forget()
            _spans.forget(connection, oldest * HOUR)
        if gone:
            # As a script: it is done in steps without rows, of which `execute` takes one.
            connection.executescript("PRAGMA incremental_vacuum")

    def _forget(self) -> None:
        """Forget what was known of the file's rows: they may be others now."""
        self._known.clear()
        self._hour = -1


def _row(key: FlowKey) -> tuple[str | int, ...]:
    there = (key.destination, key.address, key.reason, key.service, key.policy)
    numbers = (key.port, int(key.allowed), int(key.outbound))
    return (key.identity, key.source, key.workload, key.arrival.value, *there, *numbers)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
