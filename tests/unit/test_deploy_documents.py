"""docs/metrics.md names every series with its labels, and nothing that does not exist."""

from __future__ import annotations

import re
from typing import Final

import yaml

from support.expositions import every_series
from support.prometheus import DEPLOY, ROOT
from ztunnel.observe.labels import LABEL_NAMES

TEXT: Final = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
SERIES: Final = re.compile(r"`((?:istio|nodeagent|ztunnel|process)_\w+)`")
PARTS: Final = ("_bucket", "_count", "_sum")
"""What a histogram's name ends in."""


def whole(name: str) -> str:
    return next((name.removesuffix(end) for end in PARTS if name.endswith(end)), name)


def test_every_series_is_documented_and_no_other() -> None:
    assert set(SERIES.findall(TEXT)) == {whole(name) for name in every_series()}


def test_labels_are_as_documented() -> None:
    series = every_series()
    checked = 0
    for line in TEXT.splitlines():
        cells = line.split("|")
        named = SERIES.findall(cells[1]) if len(cells) == 5 else []
        if not named or named[0].startswith("istio_"):
            continue
        documented = set(re.findall(r"`(\w+)`", cells[2]))
        labels: set[str] = set()
        for name in named:
            for part in ("", *PARTS):
                labels |= series.get(name + part, set())
        assert documented == labels - {"le"}, line
        checked += len(named)
    assert checked > 80


def test_istios_labels_are_all_documented() -> None:
    begin, end = TEXT.index("| Label | Values |"), TEXT.index("## Plaintext and verdicts")
    words = set(re.findall(r"`(\w+)`", TEXT[begin:end]))
    for name in (*LABEL_NAMES, "response_flags"):
        assert name in words or name.partition("_")[2] in words, name


def test_every_alert_is_documented() -> None:
    groups = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())["groups"]
    told = re.findall(r"^\| `([A-Z]\w+)` \| (\w+) \|", TEXT, re.MULTILINE)
    assert told == [
        (rule["alert"], rule["labels"]["severity"]) for group in groups for rule in group["rules"]
    ]


def test_every_file_of_deploy_is_documented() -> None:
    found = {str(path.relative_to(ROOT)) for path in DEPLOY.rglob("*") if path.is_file()}
    assert found == set(re.findall(r"^\| `(deploy/[^`]+)` \|", TEXT, re.MULTILINE))
