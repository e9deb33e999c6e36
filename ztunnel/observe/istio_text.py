"""Istio's standard TCP series as text, fast.

This module owns how these series are spelled. It promises Istio's names, labels and label values
exactly (Istio's dashboards and Kiali read them), values escaped as both formats have it, and that
labels are spelled once in the life of a label set. It may not count anything.

The library is for a few thousand samples: it sorts and escapes the labels of each. Here there are
fifty thousand, of 28 labels, and a kilobyte, each; copying that kilobyte is all that is left.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

from ztunnel import reasons
from ztunnel.observe.labels import LABEL_NAMES, MUTUAL_TLS, SOURCE, Labels
from ztunnel.reasons import FLAGS, NO_FLAG, Reason

if TYPE_CHECKING:
    from ztunnel.observe.series import Counters, Series
    from ztunnel.observe.traces import Exemplar

__all__ = ["Rows", "portions"]

LINES: Final = 512
"""Of one portion, half a megabyte: between two of them other threads get their turn."""

MAX_SPELLED: Final = 4000
"""Label sets that have failed connections only, whose text is kept: a kilobyte each, as many as
`events` counts. They are rare; after a scan of addresses they are that many."""

_REASONS: Final = tuple(Reason)
_TAIL: Final = {flag: f'{flag}"}} %d'.encode() for flag in FLAGS}
"""What follows the labels, for each response flag."""
_NOTHING_MORE: Final = (b"\n",)
_REPORTER: Final = LABEL_NAMES.index("reporter")
_SECURITY: Final = LABEL_NAMES.index("connection_security_policy")


class _Family(NamedTuple):
    name: str
    help: str


_OPENED: Final = _Family("istio_tcp_connections_opened", "TCP connections opened.")
_CLOSED: Final = _Family("istio_tcp_connections_closed", "TCP connections closed.")
_RECEIVED: Final = _Family("istio_tcp_received_bytes", "Bytes received from clients (request).")
_SENT: Final = _Family("istio_tcp_sent_bytes", "Bytes sent to clients (response).")
_FAILED: Final = _Family(
    "istio_tcp_connections_failed", "TCP connections that failed, by response flag."
)


class Rows:
    """A copy of the numbers of all label sets, by column: no object for each."""

    __slots__ = ("closed", "failed", "failing", "opened", "received", "sent", "series")

    def __init__(self) -> None:
        self.series: list[Series] = []
        self.opened: list[int] = []
        self.closed: list[int] = []
        self.received: list[int] = []
        self.sent: list[int] = []
        self.failed: dict[tuple[Labels, str], int] = {}
        """By labels and response flag."""
        self.failing: dict[Labels, Series] = {}
        """Whose labels are in `failed`; those that failed before a decision may have none."""

    def __len__(self) -> int:
        return len(self.series)

    def add(self, series: Series, counters: Counters) -> None:
        self.series.append(series)
        self.opened.append(counters.opened)
        self.closed.append(counters.closed)
        self.received.append(counters.received)
        self.sent.append(counters.sent)
        if not any(counters.failed):
            return
        labels = series.labels
        self.failing[labels] = series
        hbone = labels[_REPORTER] == SOURCE and labels[_SECURITY] == MUTUAL_TLS
        for number, count in enumerate(counters.failed):
            flag = reasons.flag(_REASONS[number], hbone=hbone)
            if count and flag != NO_FLAG:
                self.fail(labels, flag, count)

    def fail(self, labels: Labels, flag: str, count: int) -> None:
        self.failed[labels, flag] = self.failed.get((labels, flag), 0) + count


def portions(
    rows: Rows, *, openmetrics: bool, exemplars: Mapping[Labels, Exemplar] | None = None
) -> Iterator[bytes]:
    """Yield the text, portion by portion. `exemplars` are shown where OpenMetrics has room."""
    texts: list[bytes] = []
    for series in rows.series:
        if not series.text:
            series.text = _spell(series.labels)
        texts.append(series.text)
    flags = [NO_FLAG] * len(texts)
    for family, values in (
        (_OPENED, rows.opened),
        (_CLOSED, rows.closed),
        (_RECEIVED, rows.received),
        (_SENT, rows.sent),
    ):
        ends: Sequence[bytes] = _NOTHING_MORE * len(texts)
        if family is _CLOSED and openmetrics and exemplars:
            # The last connection that was traced, among those that have ended.
            ends = [_end(exemplars.get(series.labels)) for series in rows.series]
        yield from _family(family, texts, flags, values, ends, openmetrics=openmetrics)
    failed: list[bytes] = []
    for labels, _ in rows.failed:
        failing = rows.failing.get(labels)
        failed.append(failing.text if failing else _spell_again(labels))
    flags = [flag for _, flag in rows.failed]
    counts = list(rows.failed.values())
    ends = _NOTHING_MORE * len(failed)
    yield from _family(_FAILED, failed, flags, counts, ends, openmetrics=openmetrics)


def _end(exemplar: Exemplar | None) -> bytes:
    if exemplar is None:
        return b"\n"
    # OpenMetrics 1.0, "Exemplars": labels, a value, and when that was.
    return f' # {{trace_id="{exemplar.trace}"}} 1 {exemplar.time:.3f}\n'.encode()


def _family(
    family: _Family,
    texts: Sequence[bytes],
    flags: Sequence[str],
    values: Sequence[int],
    ends: Sequence[bytes],
    *,
    openmetrics: bool,
) -> Iterator[bytes]:
    name = f"{family.name}_total"
    # OpenMetrics names the family, the older format its samples.
    named = family.name if openmetrics else name
    yield f"# HELP {named} {family.help}\n# TYPE {named} counter\n".encode()
    begin = name.encode()
    for start in range(0, len(texts), LINES):
        part = slice(start, start + LINES)
        pieces: list[bytes] = []
        columns = zip(texts[part], flags[part], values[part], ends[part], strict=True)
        for text, flag, value, end in columns:
            pieces += (begin, text, _TAIL[flag] % value, end)
        yield b"".join(pieces)


def _spell(labels: Labels) -> bytes:
    """Return the labels as both formats have them, up to the value of `response_flags`."""
    pairs = [f'{name}="{_escape(value)}"' for name, value in zip(LABEL_NAMES, labels, strict=True)]
    return f'{{{",".join(pairs)},response_flags="'.encode("utf-8", "replace")


_spell_again = functools.lru_cache(maxsize=MAX_SPELLED)(_spell)


def _escape(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
