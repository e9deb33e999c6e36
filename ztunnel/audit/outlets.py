"""Which sinks the settings ask for: each with a writer of its own, and what became of its lines.

This module owns the sinks' lives. It promises that giving them a line never waits; that they do not
depend on each other; that a change of the settings begins and ends the sinks that it is about, and
leaves alone all others; and that what a sink lost is counted, and said in a line of its own once it
works again. It may not know why there is a line.
"""

from __future__ import annotations

import os
import socket
from collections import Counter
from collections.abc import Callable
from typing import Final, NamedTuple, Protocol

from ztunnel.audit import forms, journal, sinks, syslog
from ztunnel.audit.forms import LeftOut, Line
from ztunnel.audit.ocsf import ocsf_line
from ztunnel.log_writer import STDOUT, Destination, File, Writer
from ztunnel.settings import AuditForm, AuditSettings, Facility

__all__ = ["Outlets", "Shared"]

QUEUE_LINES: Final = 4096
"""Lines that wait for one sink, about 2 KB each: ten seconds of each kind at the default rate."""

SINK: Final = "sink"
"""The cause in a line that a sink gets of its own, once it works again."""


class Shared(Protocol):
    """A log that is on standard output already: two threads that write there would mix lines."""

    def put(self, text: bytes, count: int, /) -> None:
        """Take `count` lines that are ready; must not block."""


Spell = Callable[[Line], bytes]


class _Plan(NamedTuple):
    """A sink as the settings want it: `made_of` tells whether one that is there is the same."""

    made_of: tuple[object, ...]
    destination: Destination
    spell: Spell


class _Sink(NamedTuple):
    made_of: tuple[object, ...]
    writer: Writer[Line]


class Outlets:
    """`wall` is seconds since the epoch. `stdout` is the form of standard output, None without.

    `shared` is who writes there already, None if nobody does.
    """

    def __init__(
        self, wall: Callable[[], float], stdout: AuditForm | None, shared: Shared | None
    ) -> None:
        self._wall = wall
        self._stdout = stdout
        self._shared = shared
        self._put: Callable[[Line], None] | None = None
        """Into the shared log, if lines are to go there."""
        self._sinks: dict[str, _Sink] = {}
        self._ending: list[tuple[str, Writer[Line]]] = []
        """Sinks that are no longer wanted, and write what waits."""
        self._written: Counter[str] = Counter()
        """By the shared log, and by sinks that are no more."""
        self._lost: Counter[tuple[str, str]] = Counter()

    def __bool__(self) -> bool:
        """True if there is anybody to tell."""
        return bool(self._sinks) or self._put is not None

    def configure(self, settings: AuditSettings, node: str) -> None:
        """Have the sinks of `settings`. What cannot be opened is tried again, and logged."""
        wanted = self._wanted(settings, node)
        for name, sink in list(self._sinks.items()):
            if name not in wanted or wanted[name].made_of != sink.made_of:
                self._end(name)
        for name, plan in wanted.items():
            if name not in self._sinks:
                self._sinks[name] = _Sink(plan.made_of, self._begun(name, plan))
        self._put = None
        if settings.stdout and self._stdout is not None and self._shared is not None:
            shared, spell = self._shared, _lines(self._stdout, node)
            self._put = lambda line: shared.put(spell(line), 1)

    def _wanted(self, settings: AuditSettings, node: str) -> dict[str, _Plan]:
        form, facility = settings.form, settings.facility
        found: dict[str, _Plan] = {}
        there: Destination
        made_of: tuple[object, ...]
        if settings.stdout and self._stdout is not None and self._shared is None:
            found["stdout"] = _Plan((node,), File(STDOUT), _lines(self._stdout, node))
        if settings.file:
            made_of = (node, form, settings.file)
            found["file"] = _Plan(made_of, File(settings.file), _lines(form, node))
        if settings.journal:
            made_of = (settings.journal, facility)
            there = sinks.Datagrams(socket.AF_UNIX, settings.journal)
            found["journal"] = _Plan(made_of, there, lambda line: journal.spell(line, facility))
        if settings.syslog is not None:
            made_of = (node, form, facility, settings.syslog)
            there = sinks.destination(settings.syslog)
            found["syslog"] = _Plan(made_of, there, _messages(form, node, facility))
        return found

    def _begun(self, name: str, plan: _Plan) -> Writer[Line]:
        def notice(lines: int) -> bytes:
            return plan.spell(LeftOut(self._wall(), lines, SINK))

        writer = Writer(
            f"audit {name}", plan.destination, plan.spell, QUEUE_LINES, keeps=True, notice=notice
        )
        writer.start()
        return writer

    def _end(self, name: str) -> None:
        writer = self._sinks.pop(name).writer
        writer.finish()
        ending, self._ending = self._ending, [(name, writer)]
        for gone, old in ending:
            if old.alive:
                self._ending.append((gone, old))
            else:
                self._written[gone] += old.written
                self._lost.update(_lost(gone, old))

    def give(self, line: Line) -> None:
        for sink in self._sinks.values():
            sink.writer.give(line)
        if self._put is not None:
            self._put(line)
            self._written["stdout"] += 1

    def reopen(self) -> None:
        """Open the file anew before the next line: logrotate has moved it away."""
        if "file" in self._sinks:
            self._sinks["file"].writer.reopen()

    def stop(self, seconds: float, clock: Callable[[], float]) -> None:
        """Write what waits, within `seconds` of `clock` together, and close every sink."""
        deadline = clock() + seconds
        for name in list(self._sinks):
            self._end(name)
        for _, writer in self._ending:
            writer.join(max(0.0, deadline - clock()))

    # --- counts -----------------------------------------------------------------------------------

    def _writers(self) -> list[tuple[str, Writer[Line]]]:
        return [(name, sink.writer) for name, sink in self._sinks.items()] + self._ending

    @property
    def written(self) -> Counter[str]:
        """Lines by sink. What the shared log loses, that log counts."""
        found = Counter(self._written)
        for name, writer in self._writers():
            found[name] += writer.written
        return found

    @property
    def lost(self) -> Counter[tuple[str, str]]:
        """Lines by sink and cause."""
        found = Counter(self._lost)
        for name, writer in self._writers():
            found.update(_lost(name, writer))
        return found

    @property
    def problems(self) -> dict[str, str]:
        """What is wrong with each sink now, "" if nothing is."""
        return {
            name: sink.writer.problem if sink.writer.alive else "its thread has ended: see the log"
            for name, sink in self._sinks.items()
        }


def _lost(name: str, writer: Writer[Line]) -> dict[tuple[str, str], int]:
    return {(name, cause.value): lines for cause, lines in writer.lost.items() if lines}


_FORMS: Final[dict[AuditForm, Callable[[Line, str], str]]] = {
    AuditForm.TEXT: forms.text_line,
    AuditForm.JSON: forms.json_line,
    AuditForm.OCSF: ocsf_line,
}


def _text(form: AuditForm, node: str) -> Callable[[Line], str]:
    spell = _FORMS[form]
    return lambda line: spell(line, node)


def _lines(form: AuditForm, node: str) -> Spell:
    text = _text(form, node)
    return lambda line: f"{text(line)}\n".encode("ascii")


def _messages(form: AuditForm, node: str, facility: Facility) -> Spell:
    # In text the message is the sentence: the fields are structured data.
    text = forms.message if form is AuditForm.TEXT else _text(form, node)
    process = os.getpid()
    return lambda line: syslog.spell(line, text(line), facility, node, process)
