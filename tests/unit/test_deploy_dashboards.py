"""The dashboards for Grafana: every query is one that Prometheus takes, of series that exist."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from support.expositions import every_series
from support.prometheus import DEPLOY, promtool

FILES: Final = sorted((DEPLOY / "grafana").glob("*.json"))
VARIABLES: Final = {
    "$__rate_interval": "5m",
    "$__range": "1h",
    "$namespace": ".*",
    "$instance": ".*",
}
ADDED: Final = {"instance", "job"}
"""Labels that Prometheus gives each target."""


def read(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def queries(dashboard: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield each panel's queries with their legends."""
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            yield target["expr"], target["legendFormat"]


def filled(query: str) -> str:
    """Return a query as Grafana sends it."""
    for name, value in VARIABLES.items():
        query = query.replace(name, value)
    assert "$" not in query, query
    return query


def named(query: str) -> set[str]:
    return set(re.findall(r"\b(?:istio|nodeagent|ztunnel|process)_\w+", query))


def test_there_are_dashboards() -> None:
    assert {file.stem for file in FILES} == {"mesh-security", "node-data-path"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.stem))
def test_prometheus_takes_every_query(file: Path, tmp_path: Path) -> None:
    rules = [
        {"record": f"query_{number}", "expr": filled(query)}
        for number, (query, _) in enumerate(queries(read(file)))
    ]
    rules_file = tmp_path / "queries.yml"
    rules_file.write_text(yaml.safe_dump({"groups": [{"name": "all", "rules": rules}]}))
    found = promtool("check", "rules", str(rules_file))
    assert found.returncode == 0, found.stdout + found.stderr
    assert len(rules) >= 15


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.stem))
def test_every_query_is_of_series_and_labels_that_exist(file: Path) -> None:
    series = every_series()
    for query, legend in queries(read(file)):
        assert named(query), query
        assert named(query) <= series.keys(), query
        labels = ADDED.union(*(series[name] for name in named(query)))
        selected = set(re.findall(r"(\w+)(?:=~|!~|!=|=)\"", query))
        grouped = {
            label.strip()
            for group in re.findall(r"by \(([^)]*)\)", query)
            for label in group.split(",")
        }
        shown = set(re.findall(r"{{(\w+)}}", legend))
        assert selected | grouped | shown <= labels, query
        # What is shown must have survived the sum.
        if "sum by" in query:
            assert shown <= grouped, query


def panel(dashboard: str, title: str) -> str:
    """Return the query of a panel, as Grafana sends it."""
    found = read(DEPLOY / "grafana" / f"{dashboard}.json")
    (query,) = (
        target["expr"]
        for each in found["panels"]
        if each["title"] == title
        for target in each["targets"]
    )
    return filled(query)


OPENED: Final = 'istio_tcp_connections_opened_total{{reporter="destination",{}}}'
PLAIN: Final = OPENED.format('connection_security_policy="none"')
MUTUAL: Final = OPENED.format('connection_security_policy="mutual_tls"')
NOT_BEFORE: Final = "nodeagent_workload_svid_not_before_timestamp_seconds"
EXPIRY: Final = "nodeagent_workload_svid_expiry_timestamp_seconds"


@pytest.mark.parametrize(
    "title, series, shown",
    [
        ("Protected share of connections", {PLAIN: "0+1x120"}, 0),
        ("Protected share of connections", {PLAIN: "0+1x120", MUTUAL: "0+3x120"}, 0.75),
        # Nothing happened: no share, rather than a division by nothing.
        ("Protected share of connections", {PLAIN: "5x120"}, None),
        ("Certificates: least time left", {"nodeagent_svid_expiry_timestamp_seconds": "0x120"}, 0),
        ("Certificates: share of life left", {NOT_BEFORE: "0x120", EXPIRY: "0x120"}, 0),
        ("Certificates: share of life left", {NOT_BEFORE: "0x120", EXPIRY: "7200x120"}, 0.5),
    ],
)
def test_what_a_panel_shows(
    title: str, series: dict[str, str], shown: float | None, tmp_path: Path
) -> None:
    expected = [] if shown is None else [{"labels": "{}", "value": shown}]
    asked = {"expr": panel("mesh-security", title), "eval_time": "1h", "exp_samples": expected}
    test = {
        "interval": "30s",
        "input_series": [{"series": key, "values": value} for key, value in series.items()],
        "promql_expr_test": [asked],
    }
    file = tmp_path / "panel_test.yml"
    file.write_text(yaml.safe_dump({"tests": [test]}))
    found = promtool("test", "rules", str(file))
    assert found.returncode == 0, found.stdout + found.stderr


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.stem))
def test_a_dashboard_can_be_imported_as_it_is(file: Path) -> None:
    found = read(file)
    panels = found["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert all(panel["title"] for panel in panels)
    places = [tuple(panel["gridPos"].values()) for panel in panels]
    assert len(set(places)) == len(places)
    assert {each["name"] for each in found["templating"]["list"]} >= {"datasource"}
    for panel in panels:
        assert panel["datasource"]["uid"] == "${datasource}"
    for variable in found["templating"]["list"]:
        if variable["type"] == "query":
            assert named(variable["query"]["query"]) <= every_series().keys()
    assert not re.search(r"https?://", json.dumps(found))
