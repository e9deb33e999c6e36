"""Traces: from the end of a connection that the core has sampled to a span, and on its way.

This module owns what a span is made of, and the queue between the event loop and who receives it.
It promises that giving a span never waits, that the queue is bounded and what is lost is counted by
cause, and that nothing of OpenTelemetry is loaded while traces are off. It may not know how a span
is spelled (`otlp`), nor decide what is sampled: the core does that when a connection begins.
"""

from __future__ import annotations

import secrets
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec

from ztunnel.log_writer import Cause, Writer
from ztunnel.observe import labels
from ztunnel.observe.access_log import Line
from ztunnel.observe.labels import Labels
from ztunnel.settings import Receiver, TraceSettings

if TYPE_CHECKING:
    from ztunnel._core import Ended
    from ztunnel.corelike import CoreLike
    from ztunnel.observe.otlp import Collector
    from ztunnel.settings import Settings

__all__ = ["Exemplar", "Node", "Span", "Tracer"]

MAX_QUEUED: Final = 2048
"""Spans that wait for the receiver, about 2 KB each: what OpenTelemetry's own processors keep."""

MAX_EXEMPLARS: Final = 1024
"""Label sets whose last trace is remembered."""

_PARTS: Final = 2**32
_MICROSECONDS: Final = 1_000_000
_SPAN_BYTES: Final = 8


class Node(NamedTuple):
    """Whose spans they are."""

    name: str
    cluster: str


class Span(msgspec.Struct, frozen=True):
    """One half of a connection: what goes out of a pod, or what comes into one (`server`).

    Ids are those of W3C Trace Context; `parent` is empty for the first of a trace. `opened` is when
    bytes could flow, in seconds since the epoch, None for a connection that never stood.
    """

    trace: bytes
    id: bytes
    parent: bytes
    server: bool
    opened: float | None
    line: Line


class Exemplar(NamedTuple):
    """The last traced connection of a label set: how long it was, and when it ended; seconds."""

    trace: str
    duration: float
    time: float


class Tracer:
    """Makes spans and hands them on. `core` is told which connections to sample."""

    def __init__(self, core: CoreLike) -> None:
        self._core = core
        self._settings = TraceSettings()
        self._node: Node | None = None
        self._writer: Writer[Span] | None = None
        self._receiver: _Later | None = None
        self._taken = 0
        self._refused = 0
        self._lost = dict.fromkeys(Cause, 0)
        """What writers before this one had counted."""
        self.exemplars: OrderedDict[Labels, Exemplar] = OrderedDict()
        """Bounded, and empty while traces are off."""

    @property
    def exported(self) -> int:
        """Spans that a receiver has taken."""
        return self._taken + (self._receiver.taken if self._receiver is not None else 0)

    @property
    def refused(self) -> int:
        """Spans that a receiver has refused for good."""
        return self._refused + (self._receiver.refused if self._receiver is not None else 0)

    @property
    def lost(self) -> dict[Cause, int]:
        """Spans that were not, by cause."""
        now = self._writer.lost if self._writer is not None else {}
        return {cause: count + now.get(cause, 0) for cause, count in self._lost.items()}

    @property
    def problem(self) -> str:
        """What is wrong with the receiver, "" if nothing is known to be."""
        return self._writer.problem if self._writer is not None else ""

    def configure(self, settings: Settings) -> None:
        """Trace as the settings say from now on. What waits for another receiver is still sent."""
        wanted, node = settings.traces, Node(settings.node, settings.cluster)
        where = wanted.endpoint, wanted.ca_file, node
        if where != (self._settings.endpoint, self._settings.ca_file, self._node):
            self._end()
            if wanted.endpoint is not None:
                self._begin(_Later(wanted.endpoint, wanted.ca_file, node))
        self._settings, self._node = wanted, node
        parts = _PARTS // wanted.sample_one_in if wanted.sample_one_in else 0
        self._core.set_tracing(wanted.endpoint is not None, parts)

    def _begin(self, receiver: _Later) -> None:
        self._receiver = receiver
        self._writer = Writer("traces", receiver, receiver.spell, MAX_QUEUED, keeps=True)
        self._writer.start()

    def _end(self) -> None:
        self.exemplars.clear()
        writer, self._writer = self._writer, None
        receiver, self._receiver = self._receiver, None
        if writer is not None and receiver is not None:
            # Counted as far as it has come: it may be a moment before it has sent the rest.
            self._taken += receiver.taken
            self._refused += receiver.refused
            for cause, count in writer.lost.items():
                self._lost[cause] += count
            writer.finish()

    def stop(self, seconds: float) -> None:
        """Send what waits, within so many seconds."""
        if self._writer is not None:
            self._writer.finish()
            self._writer.join(seconds)

    def ended(self, event: Ended, lines: Sequence[Line]) -> list[Line]:
        """Take a traced connection in, whose `lines` are these; return them with its trace.

        A hand-over has two: what went out, and its child, which came in.
        """
        trace = event.trace_id.hex()
        parent = event.parent_id if any(event.parent_id) else b""
        span = event.span_id
        said = []
        for line in lines:
            self._give(event, line, span, parent)
            said.append(msgspec.structs.replace(line, trace=trace))
            span, parent = secrets.token_bytes(_SPAN_BYTES), span
        return said

    def _give(self, event: Ended, line: Line, span: bytes, parent: bytes) -> None:
        if self._writer is None:
            return  # switched off while it lasted
        opened = None
        if event.opened_us:
            opened = line.start + (event.opened_us - event.started_us) / _MICROSECONDS
        server = labels.value(line.labels, "reporter") == labels.DESTINATION
        self._writer.give(Span(event.trace_id, span, parent, server, opened, line))
        duration = event.duration_us / _MICROSECONDS
        self.exemplars[line.labels] = Exemplar(
            event.trace_id.hex(), duration, line.start + duration
        )
        self.exemplars.move_to_end(line.labels)
        if len(self.exemplars) > MAX_EXEMPLARS:
            self.exemplars.popitem(last=False)


class _Later:
    """The receiver, whose protocol is loaded when the writer's thread first opens it."""

    def __init__(self, endpoint: Receiver, ca_file: str, node: Node) -> None:
        self._endpoint = endpoint
        self._ca_file = ca_file
        self._node = node
        self._made: Collector | None = None

    @property
    def taken(self) -> int:
        return self._made.taken if self._made is not None else 0

    @property
    def refused(self) -> int:
        return self._made.refused if self._made is not None else 0

    def open(self) -> None:
        from ztunnel.observe import otlp  # noqa: PLC0415 - seven megabytes, for those alone who trace

        if self._made is None:
            self._made = otlp.Collector(self._endpoint, self._ca_file, self._node)
        self._made.open()

    def spell(self, span: Span) -> bytes:
        from ztunnel.observe import otlp  # noqa: PLC0415 - as above

        return otlp.encode(span)

    def send(self, messages: Sequence[bytes], /) -> int:
        assert self._made is not None  # noqa: S101 - opened before
        return self._made.send(messages)

    def close(self) -> None:
        if self._made is not None:
            self._made.close()
