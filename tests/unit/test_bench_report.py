"""A run for people: table and picture."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree as ET

import msgspec
import pytest

from meshbench.figures import Metric, figures, unmeasured
from meshbench.model import Run, Sample, decode
from meshbench.report import number, picture, table, verdict

RUNS = Path(__file__).parents[2] / "bench" / "runs"
SVG = "{http://www.w3.org/2000/svg}"
METRICS = [
    Metric(name="bulk <1>", unit="Gbit/s", scenario="s", key="rate", better="higher", target=1.5),
    Metric(name="stalls", unit="%", scenario="s", key="zero", better="lower"),
]


MISSED = Metric(
    name="memory", unit="MB", scenario="s", key="rate", better="lower", target=20.0, absolute=True
)
FAILED = Metric(name="latency", unit="µs", scenario="s", key="none", better="lower", target=0.5)


def run(metrics: list[Metric] | None = None) -> Run:
    metrics = METRICS if metrics is None else metrics
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
    found = figures(samples, metrics)
    return Run(
        started="2026-01-02T03:04:05Z",
        seconds=60.0,
        rounds=2,
        host={},
        method={},
        notes=[],
        figures=found,
        unmeasured=unmeasured(found, metrics, ["s"]),
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
    lines = table(run([*METRICS, MISSED]).figures).splitlines()
    assert len(lines) == 5
    head = ["figure", "unit", "direct", "relay", "bound", "envoy", "ours", "ratio", "target"]
    assert lines[0].split() == head
    assert "21.0 (14.0 … 28.0)" in lines[2]
    assert "2.00 (2.00 … 2.00) × envoy" in lines[2]
    assert "≥ 1.50 × envoy  met" in lines[2]
    assert lines[3].rstrip().endswith("–")
    assert "≤ 20.0 MB  MISSED" in lines[4]
    assert (
        len({line.index(unit) for line, unit in zip(lines[2:], ("Gbit/s", "%", "MB"), strict=True)})
        == 1
    )


def test_the_last_word_counts_targets_and_names_those_not_reached() -> None:
    assert verdict(run()) == "targets: 1 of 1 met"
    assert verdict(run([*METRICS, MISSED, FAILED])) == (
        "targets: 1 of 3 met. missed: memory (21.0, target ≤ 20.0 MB). not measured: latency"
    )


def test_picture_is_well_formed_and_shows_every_bar() -> None:
    root = ET.fromstring(picture(run([*METRICS, MISSED])))  # noqa: S314 - our own text
    texts = [element.text for element in root.iter(f"{SVG}text")]
    assert "bulk <1> ▲" in texts
    assert "stalls ▼" in texts
    assert "✓ met: 2.00" in texts
    assert "✗ missed: 21.0" in texts
    assert "target ≤ 20.0 MB" in texts
    # The background, a legend of five, and three subjects of three figures.
    bars = list(root.iter(f"{SVG}rect"))
    assert len(bars) == 1 + 5 + 9
    # Each is as long as its value: 45, 10.5 and 21 for no mesh, Envoy and ours.
    direct, envoy, ours = (float(bar.get("width", "0")) for bar in bars[6:9])
    assert direct / ours == pytest.approx(45 / 21, rel=0.01)
    assert ours / envoy == pytest.approx(2, rel=0.01)


def test_the_mark_of_a_target_stands_where_the_value_would_have_to_be() -> None:
    root = ET.fromstring(picture(run()))  # noqa: S314 - our own text
    (mark,) = (line for line in root.iter(f"{SVG}line") if line.get("class") == "t")
    bars = list(root.iter(f"{SVG}rect"))[6:9]
    envoy, start = (float(bars[1].get(key, "0")) for key in ("width", "x"))
    assert float(mark.get("x1", "0")) == pytest.approx(start + 1.5 * envoy, abs=0.2)


def test_a_run_survives_json() -> None:
    made = run()
    assert decode(msgspec.json.encode(made)) == made


@pytest.mark.parametrize("path", sorted(RUNS.glob("*.json")), ids=lambda path: path.stem)
def test_every_kept_run_is_read_and_shown(path: Path) -> None:
    kept = decode(path.read_bytes())
    assert kept.started.replace(":", "") == path.stem
    assert len(table(kept.figures).splitlines()) == len(kept.figures) + 2
    ET.fromstring(picture(kept))  # noqa: S314 - our own text
    assert verdict(kept)
