"""Label sets and their counters: what Istio's series are read from.

This module owns the label sets that have counters in the core. It promises that one label set has
one series, that there is a bounded number of them, that a counter does not jump back while what it
names is in the mesh, and that a series is read whole: its own numbers and those of its flows, there
or gone. It calls nothing of the core but what adds, reads and removes series.
"""

from __future__ import annotations

import itertools
import operator
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final, NamedTuple

from ztunnel.observe import labels as label_sets
from ztunnel.observe.labels import Labels
from ztunnel.observe.tallies import EXPIRY_SECONDS

if TYPE_CHECKING:
    from ztunnel.corelike import CoreLike

__all__ = ["MAX_SERIES", "NOTHING", "Counters", "Series", "SeriesTable"]

MAX_SERIES: Final = 10_000
"""Label sets with counters of their own. Each costs about 3 KB here, 0.5 KB a worker in the core,
and five lines of a scrape, of a kilobyte each. Beyond it the longest unused give way, then all
share one series of unknowns."""


class Counters(NamedTuple):
    """A copy of a series' counters, as the core gives them (`_core.SeriesCounters`)."""

    opened: int = 0
    closed: int = 0
    failed: tuple[int, ...] = ()
    """By reason; empty: none."""
    received: int = 0
    sent: int = 0

    @property
    def open(self) -> int:
        return self.opened - self.closed

    @property
    def carried(self) -> tuple[int, int, int, int]:
        """All but the failures."""
        return self.opened, self.closed, self.received, self.sent

    @property
    def attempts(self) -> int:
        """Connections, whatever became of them."""
        return self.opened + sum(self.failed)

    def plus(self, other: Counters) -> Counters:
        failed = tuple(map(operator.add, self.failed, other.failed))
        return Counters(
            self.opened + other.opened,
            self.closed + other.closed,
            failed or self.failed or other.failed,
            self.received + other.received,
            self.sent + other.sent,
        )


NOTHING: Final = Counters()


class Series:
    """One label set and its counters in the core. `refs` counts the decisions that feed it."""

    __slots__ = ("flows", "idle_since", "labels", "number", "refs", "retired", "text")

    def __init__(self, number: int, labels: Labels) -> None:
        self.number = number
        self.labels = labels
        self.refs = 0
        self.idle_since = 0.0
        """Since when `refs` is 0; monotonic, seconds."""
        self.flows: dict[int, object] = {}
        """The core's numbers of the flows that count for it besides (`flows`)."""
        self.retired = NOTHING
        """What its flows had counted that have gone (`flows`)."""
        self.text = b""
        """Its labels as a scrape has them, kept there (`istio_text`)."""


class SeriesTable:
    """Label sets to series. Unreferenced series stay, so that counters do not jump back, while
    their workloads are in the mesh. `clock` is monotonic, seconds.
    """

    def __init__(
        self,
        core: CoreLike,
        numbers: Iterator[int],
        clock: Callable[[], float],
        limit: int = MAX_SERIES,
    ) -> None:
        self._core = core
        self._numbers = numbers
        self._clock = clock
        self._limit = limit
        self._by_labels: dict[Labels, Series] = {}
        self._idle: OrderedDict[Labels, Series] = OrderedDict()
        self.overflowed = 0
        """Decisions whose label set found no room."""
        self.evicted = 0
        self.expired = 0
        """Label sets whose workloads were gone."""

    def __len__(self) -> int:
        return len(self._by_labels)

    def __iter__(self) -> Iterator[Series]:
        return iter(list(self._by_labels.values()))

    def read(self, series: Series) -> Counters | None:
        """Read all that counts for one label set; None if it is gone.

        In one go: what a flow has counted moves to its label set when the flow ends.
        """
        if self._by_labels.get(series.labels) is not series:
            return None
        read = self._core.read_series
        opened, closed, failed, received, sent = read(series.number)
        for number in series.flows:
            found = read(number)
            opened += found[0]
            closed += found[1]
            if any(found[2]):
                failed = tuple(map(operator.add, failed, found[2]))
            received += found[3]
            sent += found[4]
        counted = Counters(opened, closed, failed, received, sent)
        return counted if series.retired is NOTHING else counted.plus(series.retired)

    def acquire(self, labels: Labels) -> Series:
        series = self._by_labels.get(labels)
        if series is None and len(self._by_labels) >= self._limit and not self._evict():
            self.overflowed += 1
            labels = label_sets.overflow(labels)
            series = self._by_labels.get(labels)
        if series is None:
            series = Series(next(self._numbers), labels)
            self._core.add_series(series.number)
            self._by_labels[labels] = series
        self._idle.pop(labels, None)
        series.refs += 1
        return series

    def release(self, series: Series) -> None:
        series.refs -= 1
        if not series.refs:
            series.idle_since = self._clock()
            self._idle[series.labels] = series

    def expire(self, is_gone: Callable[[Labels], bool]) -> None:
        """Drop the label sets that are gone and that have been idle for EXPIRY_SECONDS."""
        before = self._clock() - EXPIRY_SECONDS
        due = itertools.takewhile(lambda series: series.idle_since < before, self._idle.values())
        for series in [series for series in due if is_gone(series.labels)]:
            del self._idle[series.labels]
            self._remove(series)
            self.expired += 1

    def _evict(self) -> bool:
        if not self._idle:
            return False
        _, series = self._idle.popitem(last=False)
        self._remove(series)
        self.evicted += 1
        return True

    def _remove(self, series: Series) -> None:
        del self._by_labels[series.labels]
        self._core.remove_series(series.number)
