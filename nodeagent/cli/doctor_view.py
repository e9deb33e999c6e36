"""What `nodeagent doctor` says to people.

This module owns the layout: findings, the worst first, each with its remedy and the commands that
can be copied; what they explain; what was examined; and the verdict as the last line. It promises
that the meaning is in the words. It may not look at the node.
"""

from __future__ import annotations

import itertools
from typing import Final

from nodeagent.cli.output import Printer
from nodeagent.cli.table import Tone
from nodeagent.cli.text import many
from nodeagent.doctor import Finding, Report, Severity

__all__ = ["show"]

_TONES = {Severity.ERROR: Tone.BAD, Severity.WARNING: Tone.CAREFUL, Severity.NOTE: Tone.FAINT}


MOST_SHOWN: Final = 3
"""Findings of one code that are told whole: of a hundred pods most have the same trouble."""


def show(printer: Printer, report: Report) -> None:
    """Say everything; with `-o wide` also what is hidden, and each of many of a kind."""
    for code, of_code in itertools.groupby(report.findings, key=lambda each: each.code):
        found = list(of_code)
        told = found if printer.wide else found[:MOST_SHOWN]
        for finding in told:
            _finding(printer, finding)
            if finding is found[0]:
                _explained(printer, report, code)
            printer.line()
        if len(told) < len(found):
            others = sorted({name for each in found[len(told) :] for name in each.affects})
            printer.text(f"and {len(found) - len(told)} more {code}: {', '.join(others)}")
            printer.line()
    seen = ", ".join(f"{what} {number}" for what, number in report.examined.items())
    printer.text(f"Examined: {seen}.", tone=Tone.FAINT)
    printer.line(report.verdict, Tone.GOOD if report.healthy else Tone.BAD)


def _explained(printer: Printer, report: Report, code: str) -> None:
    explained = [each.finding for each in report.hidden if each.cause == code]
    if not explained:
        return
    codes = ", ".join(sorted({each.code for each in explained}))
    printer.text(f"explains {many(len(explained), 'more finding')}: {codes}", 2)
    if printer.wide:
        for each in explained:
            printer.text(f"{each.code} {each.title}: {each.text}", 4, Tone.FAINT)


def _finding(printer: Printer, finding: Finding) -> None:
    printer.line(
        f"{finding.severity.upper()} {finding.code}: {finding.title}", _TONES[finding.severity]
    )
    printer.text(finding.text, 2)
    printer.text(f"affects: {', '.join(finding.affects)}", 2)
    printer.text(f"do: {finding.remedy}", 2)
    for command in finding.commands:
        # Never folded: it is to be copied.
        printer.line(f"    {command}")
    printer.line(f"  see: {finding.page}", Tone.FAINT)
