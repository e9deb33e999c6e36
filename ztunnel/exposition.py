"""The text that Prometheus reads: families of samples, and how they are written.

This module owns the form (Prometheus' text format 0.0.4). It promises that what it writes is valid
whatever the labels hold. It may not count anything, and knows no metric of ours.

The interface is that of prometheus_client's metric families; that package itself is left out of the
daemon because it loads an HTTP server, urllib and the system's libssl: eight megabytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final

__all__ = [
    "CONTENT_TYPE",
    "CounterMetricFamily",
    "GaugeMetricFamily",
    "HistogramMetricFamily",
    "InfoMetricFamily",
    "Metric",
    "escape",
    "generate",
]

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"


def escape(value: str) -> str:
    """Return a label's value with backslash, quote and newline escaped."""
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


def _number(value: float) -> str:
    if isinstance(value, float):
        if math.isinf(value):
            return "+Inf" if value > 0 else "-Inf"
        if math.isnan(value):
            return "NaN"
    return repr(value)


class Metric:
    """One family: a name with its suffix, a type, a help text and the samples."""

    kind = "untyped"
    suffix = ""

    def __init__(
        self,
        name: str,
        documentation: str,
        value: float | None = None,
        labels: Sequence[str] = (),
    ) -> None:
        """`value` is that of the only sample of a family without labels."""
        self.name = name
        self.documentation = documentation
        self._labels = tuple(labels)
        self._samples: list[str] = []
        if value is not None:
            self._sample("", {}, value)

    def add_metric(self, labels: Sequence[str], value: float) -> None:
        """Add the sample whose labels have these values, in the order of their names."""
        self._sample("", dict(zip(self._labels, labels, strict=True)), value)

    def _sample(self, suffix: str, labels: Mapping[str, str], value: float) -> None:
        pairs = ",".join(f'{name}="{escape(text)}"' for name, text in labels.items())
        where = f"{{{pairs}}}" if pairs else ""
        self._samples.append(f"{self.name}{self.suffix}{suffix}{where} {_number(value)}\n")

    def lines(self) -> Iterator[str]:
        """Yield the family as it is read."""
        full = self.name + self.suffix
        text = self.documentation.replace("\\", r"\\").replace("\n", r"\n")
        yield f"# HELP {full} {text}\n# TYPE {full} {self.kind}\n"
        yield from self._samples


class CounterMetricFamily(Metric):
    """Named without `_total`, which is added."""

    kind = "counter"
    suffix = "_total"


class GaugeMetricFamily(Metric):
    kind = "gauge"


class InfoMetricFamily(Metric):
    """Named without `_info`, which is added; its sample's value is always 1."""

    kind = "gauge"
    suffix = "_info"

    def __init__(self, name: str, documentation: str, value: Mapping[str, str]) -> None:
        super().__init__(name, documentation)
        self._sample("", value, 1)


class HistogramMetricFamily(Metric):
    kind = "histogram"

    def add_metric(  # type: ignore[override]
        self, labels: Sequence[str], buckets: Sequence[tuple[str, float]], sum_value: float
    ) -> None:
        """Add a histogram: upper bounds, the last `+Inf`, with the counts up to each."""
        found = dict(zip(self._labels, labels, strict=True))
        for bound, count in buckets:
            self._sample("_bucket", found | {"le": bound}, count)
        self._sample("_count", found, buckets[-1][1])
        self._sample("_sum", found, sum_value)


def generate(metrics: Iterable[Metric]) -> str:
    """Return the text of all families."""
    return "".join(line for metric in metrics for line in metric.lines())
