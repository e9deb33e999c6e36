"""The words of `nodeagent connections`: pure.

This module owns what people read of a connection and the columns of both tables. It promises that
how a connection is protected is said in words, and that "mTLS" stands only where the bytes are
encrypted and both sides have proved who they are.
"""

from __future__ import annotations

from collections import Counter
from datetime import datetime
from typing import Final

from nodeagent.cli.output import Printer
from nodeagent.cli.table import Cell, Column, Tone
from nodeagent.cli.text import duration, many, moment, size
from nodeagent.connections import Connections
from ztunnel.protocol import Connection, Direction, Security

__all__ = ["Measured", "show"]


class Measured(Connection, frozen=True, gc=False, kw_only=True):
    """A connection, and bytes per second of both directions; None where they are not known."""

    received_per_second: float | None = None
    sent_per_second: float | None = None


_WORDS: Final = {
    Security.MUTUAL_TLS: "mTLS",
    Security.DIRECT: "same node, not encrypted",
    Security.PLAINTEXT: "plaintext",
    Security.PASSTHROUGH: "outside the mesh",
    Security.UNDECIDED: "undecided",
}

_TONES: Final = {Security.MUTUAL_TLS: Tone.GOOD, Security.PLAINTEXT: Tone.CAREFUL}

_COLUMNS: Final = (
    Column("FROM"),
    Column("TO"),
    Column("HOW"),
    Column("POLICY"),
    Column("BYTES", right=True, folds=False),
    Column("RATE", right=True, folds=False),
    Column("AGE", right=True, folds=False),
)

_WIDE: Final = (
    Column("ID"),
    Column("POD"),
    Column("DIRECTION"),
    Column("STATE"),
    Column("FROM"),
    Column("FROM-IDENTITY"),
    Column("FROM-ADDRESS"),
    Column("TO"),
    Column("TO-IDENTITY"),
    Column("TO-ADDRESS"),
    Column("SERVICE"),
    Column("HBONE-ADDRESS"),
    Column("SECURITY"),
    Column("TLS"),
    Column("CIPHER"),
    Column("KEY-EXCHANGE"),
    Column("POLICY"),
    Column("RULE"),
    Column("RECEIVED", right=True),
    Column("SENT", right=True),
    Column("RECEIVED/S", right=True),
    Column("SENT/S", right=True),
    Column("STARTED"),
    Column("IDLE", right=True),
)


def show(printer: Printer, found: Connections[Measured]) -> None:
    """Print the verdict in numbers, and the table."""
    printer.line(_summary(found))
    if found.missed:
        printer.text(
            f"{found.missed} more found no room in the snapshot: name a pod with --pod",
            tone=Tone.BAD,
        )
    if not found.connections:
        return
    printer.line()
    if printer.wide:
        printer.table(_WIDE, (_wide(each, found.time) for each in found.connections))
    else:
        printer.table(_COLUMNS, (_row(each, found.time) for each in found.connections))
    left = found.total - len(found.connections)
    if left > 0:
        printer.line()
        printer.line(f"and {left} more: --limit 0 shows all")


def _summary(found: Connections[Measured]) -> str:
    kinds = Counter(each.security for each in found.connections)
    parts = [f"{kinds[kind]} {_WORDS[kind]}" for kind in Security if kinds[kind]]
    head = f"{found.node}: {many(found.total, 'connection')}"
    if found.total > len(found.connections):
        head += f", {len(found.connections)} shown"
    return f"{head}: {', '.join(parts)}" if parts else head


def _row(each: Measured, now: datetime) -> tuple[Cell | str, ...]:
    return (
        _end(each.source_workload, each.source_identity, each.source),
        f"{_called(each)}:{each.destination.rpartition(':')[2]}",
        Cell(_how(each), _TONES.get(each.security, Tone.PLAIN)),
        each.policy,
        _short(each.received + each.sent),
        _rate(each),
        duration((now - each.started).total_seconds()),
    )


def _wide(each: Measured, now: datetime) -> tuple[Cell | str, ...]:
    return (
        each.id,
        each.pod,
        each.direction.value,
        each.state,
        each.source_workload,
        each.source_identity,
        each.source,
        each.destination_workload,
        each.destination_identity,
        each.destination,
        each.service,
        each.hbone,
        Cell(each.security.value, _TONES.get(each.security, Tone.PLAIN)),
        each.tls_version,
        each.cipher,
        each.key_exchange,
        each.policy,
        each.rule,
        str(each.received),
        str(each.sent),
        _number(each.received_per_second),
        _number(each.sent_per_second),
        moment(each.started),
        duration((now - each.moved).total_seconds()) if each.moved is not None else "",
    )


def _end(workload: str, identity: str, address: str) -> str:
    """Return who that is: the workload, else the identity, else the address without its port."""
    return workload or identity.removeprefix("spiffe://") or address.rpartition(":")[0]


def _called(each: Measured) -> str:
    return _end(each.destination_workload, each.destination_identity, each.destination)


def _how(each: Measured) -> str:
    words = ["out" if each.direction is Direction.OUTBOUND else "in"]
    if each.security is not Security.UNDECIDED:
        words.append(_WORDS[each.security])
    if each.key_exchange:
        words.append(each.key_exchange)
    if each.state != "open":
        words.append(each.state)
    return ", ".join(words)


def _short(count: float) -> str:
    """Return a size without its space: two columns of it cost a line for each connection."""
    return size(count).replace(" ", "")


def _rate(each: Measured) -> str:
    if each.received_per_second is None or each.sent_per_second is None:
        return ""
    return f"{_short(each.received_per_second + each.sent_per_second)}/s"


def _number(rate: float | None) -> str:
    return "" if rate is None else f"{rate:.0f}"
