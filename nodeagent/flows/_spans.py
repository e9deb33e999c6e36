"""From when to when everything was heard: two tables beside the flows.

This module owns their rows. It promises that a span covers a moment only if every message of its
process about that moment is in the file: the span ends where one is missing, and with the
transaction that a message is written in it is lost or kept with it; that it covers nothing that has
not come yet, also where the clock was ahead. A workload is watched from when
its capture was in force, as far as it is known not to have been out of force since. It may not
begin or end transactions.

A message that comes after one that was lost tells nothing of the time between: a new span begins at
its end.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Collection, Mapping
from typing import Final

from nodeagent.flows._coverage import LATE_SECONDS
from nodeagent.flows._integrity import of_numbers, of_texts
from ztunnel.protocol import Flows

__all__ = ["MAX_SPANS", "TABLES", "forget", "heard", "retain", "watch"]

MAX_SPANS: Final = 2000
"""Kept at most. Each is a start of ztunnel or a failure of the disk, which is tried again twice a
minute; where they do not fit, the oldest count as not recorded."""

TABLES: Final = """
CREATE TABLE span (
    id INTEGER PRIMARY KEY,
    process INTEGER NOT NULL, number INTEGER NOT NULL,
    begin INTEGER NOT NULL, until INTEGER NOT NULL, ended INTEGER NOT NULL, mark INTEGER NOT NULL
) STRICT;
CREATE TABLE watched (
    workload TEXT NOT NULL PRIMARY KEY, pod TEXT NOT NULL, begin INTEGER NOT NULL,
    mark INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
"""

_BEGIN: Final = f"""
INSERT INTO span (process, number, begin, until, ended, mark)
VALUES (?1, ?2, ?3, ?4, ?5, {of_numbers("?1", "?2", "?3", "?4", "?5")})
"""  # noqa: S608 - our own names
_GOES_ON: Final = f"""
UPDATE span SET number = ?1, until = ?2, ended = ?3,
    mark = {of_numbers("process", "?1", "begin", "?2", "?3")}
WHERE id = ?4
"""  # noqa: S608 - as above
_SHORTEN: Final = f"""
UPDATE span SET until = max(begin, ?1),
    mark = {of_numbers("process", "number", "begin", "max(begin, ?1)", "ended")}
WHERE until > ?2
"""  # noqa: S608 - as above
_FORGET: Final = f"""
UPDATE span SET begin = ?1, mark = {of_numbers("process", "number", "?1", "until", "ended")}
WHERE begin < ?1
"""  # noqa: S608 - as above
_WATCH: Final = "INSERT OR REPLACE INTO watched (workload, pod, begin, mark) VALUES (?, ?, ?, ?)"


def heard(connection: sqlite3.Connection, process: int, message: Flows) -> None:
    """Note that `message` has come, behind those that came before it."""
    _not_yet(connection, message.until)
    found = connection.execute(
        "SELECT id, number, until FROM span WHERE process = ? ORDER BY id DESC LIMIT 1", (process,)
    ).fetchone()
    if found is not None and found[1] + 1 == message.number:
        until = found[2] if message.more else max(found[2], message.until)
        connection.execute(_GOES_ON, (message.number, until, int(message.last), found[0]))
        return
    # `until` is a whole second that was over: what was told then begins in the next one.
    begin = message.since if message.number == 1 else message.until + 1
    until = begin if message.more else max(begin, message.until)
    connection.execute(_BEGIN, (process, message.number, begin, until, int(message.last)))
    connection.execute(
        "DELETE FROM span WHERE id <= (SELECT max(id) FROM span) - ?",
        (MAX_SPANS,),
    )


def _not_yet(connection: sqlite3.Connection, now: int) -> None:
    """Take back what was said of times that have not come: the clock has been put back.

    Else the file would cover them, whoever crashes meanwhile, or know nothing until they come. A
    tunnel that is late by LATE_SECONDS at most is no clock.
    """
    far = now + LATE_SECONDS
    connection.execute("DELETE FROM span WHERE begin > ?", (far,))
    connection.execute(_SHORTEN, (now, far))
    ahead = connection.execute("SELECT workload, pod FROM watched WHERE begin > ?", (far,))
    for workload, pod in ahead.fetchall():
        _note(connection, workload, pod, now)


def retain(connection: sqlite3.Connection, pods: Collection[str]) -> None:
    """Forget who was watched, but for workloads with one of these pods."""
    for workload, pod in connection.execute("SELECT workload, pod FROM watched").fetchall():
        if pod not in pods:
            connection.execute("DELETE FROM watched WHERE workload = ?", (workload,))


def watch(
    connection: sqlite3.Connection,
    pods: Mapping[str, str],
    going_on: Collection[str] | None,
    now: int,
) -> None:
    """Note who is watched at `now`, seconds since the epoch: workloads, and the pod of each.

    Those of them that are `going_on` have been all the time; None: those whose pod is the same.
    """
    rows = connection.execute("SELECT workload, pod, begin FROM watched").fetchall()
    known = {workload: (pod, begin) for workload, pod, begin in rows}
    for workload in known.keys() - pods.keys():
        connection.execute("DELETE FROM watched WHERE workload = ?", (workload,))
    for workload, pod in pods.items():
        before, begin = known.get(workload, ("", now))
        same = before == pod if going_on is None else workload in going_on
        if workload not in known or not same:
            _note(connection, workload, pod, now)
        elif before != pod:
            _note(connection, workload, pod, begin)


def _note(connection: sqlite3.Connection, workload: str, pod: str, begin: int) -> None:
    row = (workload, pod, begin)
    connection.execute(_WATCH, (*row, of_texts(row)))


def forget(connection: sqlite3.Connection, moment: int) -> None:
    """Nothing from before `moment` is kept any more."""
    connection.execute(_FORGET, (moment,))
    connection.execute("DELETE FROM span WHERE until < ?", (moment,))
