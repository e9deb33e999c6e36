"""Istio's documented semantics, case by case: the table in the YAML files beside this one.

Each file is a topic, each entry policies with the place in Istio's documentation or sources that
says what they mean, each case a connection and what must become of it.
"""

from __future__ import annotations

from typing import Final

import pytest

from support.conformance import (
    Case,
    DryRun,
    Scenario,
    by,
    client,
    decide,
    load_policies,
    scenarios,
    sources,
    unplaced,
)
from ztunnel.protocol import Mode

LEAST: Final = 500
"""Cases: a table that is not found, or lost half of its topics, must not pass."""

CASES = [
    pytest.param(scenario, case, id=f"{topic}: {scenario.title} #{number}")
    for topic, found in scenarios().items()
    for scenario in found
    for number, case in enumerate(scenario.cases, 1)
]
WARNED = [
    pytest.param(scenario, id=f"{topic}: {scenario.title}")
    for topic, found in scenarios().items()
    for scenario in found
    if scenario.warns
]
REFUSED = [
    pytest.param(scenario, id=f"{topic}: {scenario.title}")
    for topic, found in scenarios().items()
    for scenario in found
    if scenario.refused is not None
]


@pytest.mark.parametrize("scenario, case", CASES)
def test_conformance(scenario: Scenario, case: Case) -> None:
    verdict = decide(scenario, case)
    assert verdict.allow is case.allow, verdict
    assert verdict.client is client(scenario, case)
    if case.mode:
        assert verdict.mode is Mode(case.mode)
    if case.by:
        assert by(verdict.origin, scenario, allow=verdict.allow) == case.by
    if case.level:
        assert unplaced(verdict.origin, scenario) == case.level
    assert [unplaced(match.origin, scenario) for match in verdict.audits] == list(case.audit)
    assert sorted(each for match in verdict.audits for each in match.unread) == list(case.unread)
    would = verdict.dry_run
    if would is not None:
        assert case.dry_run == DryRun(
            allow=would.allow, by=by(would.origin, scenario, allow=would.allow)
        )
    assert (would is None) == (case.dry_run is None)
    assert decide(scenario, case, backwards=True) == verdict, "the order of documents matters"


@pytest.mark.parametrize("scenario", WARNED)
def test_conformance_warned(scenario: Scenario) -> None:
    """What is accepted, and has not the effect that its author may expect, is warned of."""
    warned = {warning.field for warning in load_policies(scenario).warnings}
    assert warned >= set(scenario.warns)


@pytest.mark.parametrize("scenario", REFUSED)
def test_conformance_refused(scenario: Scenario) -> None:
    """What Istio's webhook refuses is refused here, at the field that is to be mended."""
    assert scenario.refused is not None
    errors = load_policies(scenario).errors
    assert scenario.refused.field in {error.field for error in errors}, errors
    assert scenario.refused.says in str(errors)


def test_conformance_table_is_whole() -> None:
    """Enough cases, each with a place to look it up, no two with one name."""
    known = sources()
    assert len(CASES) >= LEAST
    for topic, found in scenarios().items():
        titles = [scenario.title for scenario in found]
        assert len(set(titles)) == len(titles), topic
        for scenario in found:
            key, _, section = scenario.cites.partition(", ")
            assert key in known, f"{topic}: {scenario.title}: {scenario.cites}"
            assert section, f"{topic}: {scenario.title}"
            assert (scenario.refused is None) == bool(scenario.cases), scenario.title
            assert all(case.mode or case.by for case in scenario.cases), scenario.title
    assert all(address.startswith("https://") for address in known.values())
