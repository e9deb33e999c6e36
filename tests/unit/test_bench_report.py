"""A run for people: table and picture."""

from __future__ import annotations

from xml.etree import ElementTree as ET

import msgspec
import pytest

from meshbench.figures import Metric, figures
from meshbench.model import Run, Sample
from meshbench.report import number, picture, table

SVG = "{http://www.w3.org/2000/svg}"
METRICS = [
    Metric(name="bulk <1>", unit="Gbit/s", scenario="s", key="rate", better="higher", target=1.5),
    Metric(name="stalls", unit="%", scenario="s", key="zero", better="lower"),
]


def run() -> Run:
    samples = [
        Sample(
            round=turn,
            subject=subject,
            scenario="s",
            values={"rate": rate * turn, "zero": 0.0},
            busy=0.0,
        )
        for turn in (1, 2)
        for subject, rate in (("direct", 30.0), ("ours", 14.0), ("envoy", 7.0))
    ]
    return Run(
        started="2026-01-02T03:04:05Z",
        seconds=60.0,
        rounds=2,
        host={},
        method={},
        notes=[],
        figures=figures(samples, METRICS),
        samples=samples,
    )


@pytest.mark.parametrize(
    "value, text",
    [
        (0.0, "0"),
        (0.1234, "0.123"),
        (1.234, "1.23"),
        (12.34, "12.3"),
        (123.4, "123"),
        (12345.6, "12,346"),
        (-12.34, "-12.3"),
    ],
)
def test_numbers(value: float, text: str) -> None:
    assert number(value) == text


def test_table_is_aligned_and_complete() -> None:
    lines = table(run().figures).splitlines()
    assert len(lines) == 4
    head = ["figure", "unit", "direct", "relay", "envoy", "ours", "ratio", "target"]
    assert lines[0].split() == head
    assert "21.0 (14.0 … 28.0)" in lines[2]
    assert "2.00 (2.00 … 2.00) × envoy" in lines[2]
    assert "1.50 met" in lines[2]
    assert lines[3].rstrip().endswith("–")
    assert len({line.index("Gbit/s") for line in lines if "Gbit/s" in line}) == 1


def test_picture_is_well_formed_and_shows_every_bar() -> None:
    root = ET.fromstring(picture(run()))  # noqa: S314 - our own text
    texts = [element.text for element in root.iter(f"{SVG}text")]
    assert "bulk <1> ▲" in texts
    assert "stalls ▼" in texts
    # The background, a legend of four, and three subjects of two figures.
    assert len(list(root.iter(f"{SVG}rect"))) == 1 + 4 + 6
    widths = [float(element.get("width", "0")) for element in list(root.iter(f"{SVG}rect"))[5:8]]
    assert widths == sorted(widths, reverse=True) or widths[0] == max(widths)


def test_a_run_survives_json() -> None:
    made = run()
    assert msgspec.json.decode(msgspec.json.encode(made), type=Run) == made
