"""Reading the file of recorded flows: beside whoever writes it, or of a copy.

This module owns how rows become values. It promises that nothing is changed, that an answer is
bounded, and that a file in which there is what no flow is, is refused and not believed. It may not
write.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, NamedTuple
from urllib.parse import quote

from nodeagent.api import values
from nodeagent.flows._coverage import Hole, Span, covered
from nodeagent.flows._errors import DamagedError, StoreError, UnusableError, told
from nodeagent.flows._integrity import damage
from nodeagent.flows._model import SCHEMA, Gap, Recorded, Recording
from nodeagent.flows._store import BUSY_SECONDS, CARRIED_BITS, COLUMNS, HOUR, VERSION

__all__ = ["read", "recording"]

MAX_READ: Final = 50_000
"""Flows of one answer, the last seen first: about 17 MB of JSON."""

_MOST_SECONDS: Final = 1 << 40
"""A number of seconds behind which no time is meant."""

_READ: Final = f"""
SELECT {COLUMNS}, min(first), max(last) AS seen, sum(connections), max(most_open),
    sum(received), sum(sent), min(hour << {CARRIED_BITS} | carried) & (1 << {CARRIED_BITS}) - 1
FROM hourly JOIN flow ON flow.id = hourly.flow
WHERE hour >= ? AND last >= ? AND outbound <= ?
GROUP BY flow.id ORDER BY seen DESC, flow.id LIMIT ?
"""  # noqa: S608 - as above


class _Content(NamedTuple):
    """What is read at one moment."""

    flows: list[Recorded]
    oldest: float | None
    spans: list[Span]
    watched: dict[str, datetime]


def recording(
    path: Path,
    node: str,
    now: float,
    age: int,
    *,
    outbound: bool = False,
    asked: float | None = None,
) -> Recording:
    """Return what was seen in the last `age` seconds, as it is published. Raises StoreError.

    `now` is seconds since the epoch. With `outbound`, what the workloads of the node called is in
    it, too. `asked` is when ztunnel was asked to tell everything: if that is not in the file by
    now, it is not known who calls now.
    """
    since = max(0.0, now - age)
    found = _content(path, since, MAX_READ, outbound=outbound)
    expected = None if asked is None else int(asked)
    known = covered(found.spans, int(since), int(now), expected)
    return Recording(
        schema=SCHEMA,
        node=node,
        time=datetime.fromtimestamp(now, UTC),
        since=datetime.fromtimestamp(since, UTC),
        oldest=None if found.oldest is None else datetime.fromtimestamp(found.oldest, UTC),
        flows=tuple(found.flows[:MAX_READ]),
        truncated=len(found.flows) > MAX_READ,
        complete=None if known.since is None else datetime.fromtimestamp(known.since, UTC),
        gaps=tuple(map(_gap, known.gaps)),
        down=tuple(map(_gap, known.down)),
        watched=found.watched,
    )


def read(
    path: Path, since: float, most: int = MAX_READ, *, outbound: bool = False
) -> tuple[list[Recorded], float | None]:
    """Return the flows last seen at `since` or later, and the oldest hour that is kept.

    Times are seconds since the epoch. One flow more than `most` shows that there are more.
    Raises StoreError. Nothing is changed: the file may be somebody else's, or a copy.
    """
    found = _content(path, since, most, outbound=outbound)
    return found.flows, found.oldest


def _content(path: Path, since: float, most: int, *, outbound: bool) -> _Content:
    if not path.is_file():
        raise StoreError(f"{path}: no such file: nothing has been recorded there")
    since = min(max(since, 0), _MOST_SECONDS)
    try:
        with told(path), contextlib.closing(_reader(path)) as connection:
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            if version != VERSION:
                raise StoreError(
                    f"{path}: no recording of this release (form {version}); of a copy, "
                    f"{path.name}-wal is a part"
                )
            # One picture of all tables.
            connection.execute("BEGIN")
            _check(connection)
            asked = (int(since) // HOUR, int(since), outbound, most + 1)
            rows = connection.execute(_READ, asked).fetchall()
            oldest = connection.execute("SELECT min(hour) FROM hourly").fetchone()[0]
            spans = connection.execute("SELECT process, begin, until, ended FROM span").fetchall()
            watched = connection.execute("SELECT workload, begin FROM watched").fetchall()
            return _Content(
                flows=[_recorded(row) for row in rows],
                oldest=None if oldest is None else _moment(oldest * HOUR).timestamp(),
                spans=[_span(row) for row in spans],
                watched={_text(workload): _moment(_int(begin)) for workload, begin in watched},
            )
    except UnusableError as error:
        raise DamagedError(f"{path}: {error}") from None
    except (ValueError, OverflowError):
        raise DamagedError(f"{path}: is damaged: it holds what no flow is") from None


def _check(connection: sqlite3.Connection) -> None:
    """Refuse what is not as it was written: a caller that is no longer in it would be missed."""
    if wrong := damage(connection, COLUMNS, HOUR):
        raise UnusableError(f"is damaged: {wrong}")


def _span(row: tuple[object, ...]) -> Span:
    process, begin, until, ended = map(_int, row)
    _moment(begin), _moment(until)
    return Span(process, begin, until, bool(ended))


def _gap(hole: Hole) -> Gap:
    begin, until = datetime.fromtimestamp(hole.begin, UTC), datetime.fromtimestamp(hole.until, UTC)
    return Gap(begin=begin, until=until, cause=hole.cause)


def _reader(path: Path) -> sqlite3.Connection:
    # Without its log there is nobody who writes, and then nothing need be made beside the file.
    alone = "" if Path(f"{path}-wal").exists() else "&immutable=1"
    name = f"file:{quote(os.path.realpath(path))}?mode=ro{alone}"
    return sqlite3.connect(name, timeout=BUSY_SECONDS, isolation_level=None, uri=True)


def _recorded(row: tuple[object, ...]) -> Recorded:
    """Return a row. Raises ValueError or OverflowError if it is none that was written here."""
    texts, numbers = map(_text, row[:9]), map(_int, row[9:])
    identity, source, workload, arrival, destination, address, reason, service, policy = texts
    port, allowed, outbound, first, last, connections, most_open, received, sent, carried = numbers
    return Recorded(
        identity=identity,
        source=source,
        workload=workload,
        arrival=arrival,
        destination=destination,
        address=address,
        port=values.port(port) if port else 0,
        allowed=bool(allowed),
        reason=reason,
        first=_moment(first),
        last=_moment(last),
        connections=connections,
        most_open=most_open,
        received=received,
        sent=sent,
        carried=carried,
        outbound=bool(outbound),
        service=service,
        policy=policy,
    )


def _moment(seconds: int) -> datetime:
    try:
        return datetime.fromtimestamp(seconds, UTC)
    except OSError as error:
        raise OverflowError from error


def _int(value: object) -> int:
    if not isinstance(value, int):
        raise ValueError(value)  # noqa: TRY004 - of a file, not of a caller
    return value


def _text(value: object) -> str:
    # Whatever else is in a name would have its way with a terminal.
    if not isinstance(value, str) or not value.isprintable():
        raise ValueError(value)
    return value
