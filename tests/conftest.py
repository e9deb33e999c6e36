"""Rules for every test: what needs privileges, and that CI skips none of it.

This module owns the privileged-skip rule, that SIGINT ends what tests start, and that no generated
example has a deadline: a machine that is busy proves nothing either. Namespaces and daemons for
tests are in tests/support. Without privileges a privileged test is skipped, and with
NODEAGENT_REQUIRE_PRIVILEGED=1 any skip of one, for whatever reason, is a failure: a machine that
cannot run it proves nothing.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Generator
from pathlib import Path
from typing import Final

import hypothesis
import pytest

hypothesis.settings.register_profile("without deadlines", deadline=None)
hypothesis.settings.load_profile("without deadlines")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # So a shell starts what it puts into the background, and every child would inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)

PRIVILEGED_MARKERS: Final = ("netns", "interop")
"""Markers of tests that make network namespaces."""

PRIVILEGED_DIRECTORIES: Final = {"netns": "netns", "faults": "netns", "interop": "interop"}
"""Directories of such tests, and their marker: nobody can forget the marker there."""

REQUIRED_CAPABILITIES: Final = {"CAP_NET_ADMIN": 12, "CAP_SYS_ADMIN": 21}
"""Numbers from linux/capability.h: addresses and rules; making and entering namespaces."""


def missing_privileges() -> list[str]:
    """Return what this process lacks to run privileged tests, in words; empty when nothing."""
    missing = [] if os.geteuid() == 0 else ["uid 0"]
    status = Path("/proc/self/status").read_text(encoding="ascii")
    found = re.search(r"^CapEff:\t([0-9a-f]+)$", status, re.MULTILINE)
    effective = int(found[1], 16) if found else 0
    missing += [name for name, bit in REQUIRED_CAPABILITIES.items() if not effective >> bit & 1]
    return missing


def privileges_required() -> bool:
    """Whether a skipped privileged test is a failure."""
    return os.environ.get("NODEAGENT_REQUIRE_PRIVILEGED") == "1"


def is_privileged(node: pytest.Item | pytest.Collector) -> bool:
    """Whether `node` is a privileged test, or a module of them."""
    if any(node.get_closest_marker(marker) for marker in PRIVILEGED_MARKERS):
        return True
    return isinstance(node, pytest.Collector) and node.path.parent.name in PRIVILEGED_DIRECTORIES


def pytest_itemcollected(item: pytest.Item) -> None:
    if item.path.parent.name in PRIVILEGED_DIRECTORIES:
        item.add_marker(PRIVILEGED_DIRECTORIES[item.path.parent.name])


def pytest_runtest_setup(item: pytest.Item) -> None:
    if not is_privileged(item):
        return
    missing = missing_privileges()
    if missing:
        pytest.skip(f"needs {', '.join(missing)}: run as root outside an unprivileged container")


def fail_skipped(report: pytest.TestReport | pytest.CollectReport) -> None:
    """Turn a report of a skip into one of a failure that quotes the skip's reason."""
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
    report.outcome = "failed"
    report.longrepr = f"{reason} (a skip fails: NODEAGENT_REQUIRE_PRIVILEGED=1)"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    # An expected failure is reported as a skip too, and stays one.
    if report.skipped and not hasattr(report, "wasxfail"):
        if privileges_required() and is_privileged(item):
            fail_skipped(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    if report.skipped and privileges_required() and is_privileged(collector):
        fail_skipped(report)
    return report
