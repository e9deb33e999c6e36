"""What `nodeagent report plaintext` says: lines from a report, as values.

This module owns the words that an operator reads. It promises the verdict in the first line, each
caller that would be refused with what to do about it, and that what is left out is counted. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from typing import Final

from nodeagent.cli.output import Printer
from nodeagent.cli.table import Cell, Column, Tone
from nodeagent.cli.text import NONE, duration, many, moment
from nodeagent.flows import Gap
from nodeagent.observe.plaintext_model import (
    Effect,
    Origin,
    PlaintextCaller,
    PlaintextReport,
    PlaintextWorkload,
    Verdict,
)

__all__ = ["show"]

MOST_CALLERS: Final = 20
"""Of one kind that are shown: a screen or two; `-o wide` shows more."""

MOST_GAPS: Final = 5

ROUNDED: Final = timedelta(seconds=2)
"""By which a question is about more than was asked for: it is asked in whole seconds."""

_TONES: Final = {
    Verdict.SAFE: Tone.GOOD,
    Verdict.NOT_SAFE: Tone.BAD,
    Verdict.NOT_KNOWN: Tone.CAREFUL,
}

_TITLES: Final = {
    Effect.BREAKS: "Would be refused under STRICT:",
    Effect.NOT_KNOWN: "Not known what would become of:",
    Effect.STAYS: "Without identity, and let in under STRICT too:",
    Effect.REFUSED: "Refused without STRICT, too:",
}

_REMEDIES: Final = {
    Origin.POD: "take that workload into the mesh (docs/operations.md), so that it has an identity",
    Origin.NODE: "if these are the kubelet's probes: node_plaintext in the settings lets them pass",
    Origin.OUTSIDE: (
        "give it an identity, or keep that port PERMISSIVE (portLevelMtls of a PeerAuthentication "
        "for the workload)"
    ),
    Origin.UNKNOWN: "look at the access log of ztunnel for who they are",
}


def show(printer: Printer, report: PlaintextReport) -> None:
    """Add the report."""
    printer.text(_summary(report), tone=_TONES[report.verdict])
    printer.text(_recorded(report))
    _gaps(printer, report)
    _table(printer, report)
    if printer.wide:
        _namespaces(printer, report)
    _unknown(printer, report)
    for effect, title in _TITLES.items():
        _callers(printer, report, effect, title)


def _summary(report: PlaintextReport) -> str:
    every = report.workloads
    count = len(every)
    unsafe = sum(each.verdict is Verdict.NOT_SAFE for each in every)
    unknown = sum(each.verdict is Verdict.NOT_KNOWN for each in every)
    of = f"of {many(count, 'workload')} of {report.node}"
    if unsafe:
        rest = f"; not known for {unknown} more" if unknown else ""
        return f"STRICT is NOT SAFE for {unsafe} {of}{rest}"
    if unknown:
        return f"NOT KNOWN whether STRICT is safe, for {unknown} {of}"
    if not every:
        return f"Nothing to switch: no workload is of {report.node}"
    what = f"all {count} workloads" if count > 1 else every[0].workload
    return f"STRICT is SAFE for {what} of {report.node}"


def _recorded(report: PlaintextReport) -> str:
    age = duration((report.time - report.since).total_seconds())
    asked = f"Callers of the last {age}, since {moment(report.since)}"
    if report.problem:
        return f"{asked}; NOT RECORDED now: {report.problem}"
    if report.complete is None:
        return f"{asked}; NOT RECORDED without a gap now"
    if report.complete <= report.since:
        return f"{asked}; recorded without a gap"
    return f"{asked}; recorded without a gap since {moment(report.complete)} only"


def _gaps(printer: Printer, report: PlaintextReport) -> None:
    for gaps, title in ((report.gaps, "Not recorded"), (report.down, "Nobody was let in")):
        shown = gaps[-MOST_GAPS:]
        if len(gaps) > len(shown):
            printer.text(f"{title}: {len(gaps) - len(shown)} earlier times (-o json has them)", 2)
        for gap in shown:
            printer.text(f"{title}: {_gap(gap)}", 2)


def _gap(gap: Gap) -> str:
    length = duration((gap.until - gap.begin).total_seconds())
    return f"{moment(gap.begin)} to {moment(gap.until)} ({length}): {gap.cause}"


def _table(printer: Printer, report: PlaintextReport) -> None:
    if not report.workloads:
        return
    columns = [
        Column("WORKLOAD"),
        Column("MODE", folds=False),
        Column("STRICT", folds=False),
        Column("WITHOUT", right=True, folds=False),
        Column("LAST", right=True, folds=False),
        Column("WITH", right=True, folds=False),
    ]
    if printer.wide:
        columns += [Column("REFUSED", right=True), Column("RECORDED SINCE"), Column("BECAUSE")]
    rows = []
    for each in report.workloads:
        row: list[Cell | str] = [
            each.workload,
            _mode(each),
            Cell(each.verdict.value, _TONES[each.verdict]),
            str(each.without_identity),
            _ago(each.last, report.time),
            str(each.with_identity),
        ]
        if printer.wide:
            row += [str(each.refused), moment(each.since), "; ".join(each.reasons)]
        rows.append(row)
    printer.line()
    printer.table(columns, rows)
    printer.text("WITHOUT, WITH: connections let in without and with an identity; LAST: ago", 0)


def _mode(each: PlaintextWorkload) -> str:
    return (each.mode or NONE) + ("*" if each.port_modes else "")


def _ago(when: datetime | None, now: datetime) -> str:
    return "never" if when is None else duration((now - when).total_seconds())


def _namespaces(printer: Printer, report: PlaintextReport) -> None:
    if not report.namespaces:
        return
    columns = [
        Column("NAMESPACE"),
        Column("STRICT", folds=False),
        Column("SAFE", right=True),
        Column("NOT SAFE", right=True),
        Column("NOT KNOWN", right=True),
    ]
    printer.line()
    printer.table(
        columns,
        [
            [
                each.namespace,
                Cell(each.verdict.value, _TONES[each.verdict]),
                str(each.safe),
                str(each.not_safe),
                str(each.not_known),
            ]
            for each in report.namespaces
        ],
    )


def _unknown(printer: Printer, report: PlaintextReport) -> None:
    """Say why it is not known, workloads with the same reasons together."""
    found: dict[tuple[str, ...], list[PlaintextWorkload]] = {}
    for each in report.workloads:
        if each.verdict is Verdict.NOT_KNOWN:
            found.setdefault(each.reasons, []).append(each)
    if not found:
        return
    printer.line()
    printer.line("Not known, because:")
    for reasons, workloads in found.items():
        names = _names([each.workload for each in workloads], wide=printer.wide)
        printer.text(f"{names}: {'; '.join(reasons)}", 2)
        later = _later(workloads, report)
        if later:
            printer.text(later, 4)


def _later(workloads: Iterable[PlaintextWorkload], report: PlaintextReport) -> str:
    """Return the question that can be answered now."""
    moments = [each.since for each in workloads]
    latest = max((each for each in moments if each is not None), default=None)
    if latest is None or None in moments or latest <= report.since:
        return ""
    asked = latest + ROUNDED
    return f"ask for what is known: --since {moment(asked)}" if asked < report.time else ""


def _names(names: Sequence[str], *, wide: bool) -> str:
    shown = names if wide else names[:MOST_GAPS]
    rest = len(names) - len(shown)
    return ", ".join(shown) + (f" and {rest} more" if rest else "")


def _callers(printer: Printer, report: PlaintextReport, effect: Effect, title: str) -> None:
    found = [
        (each, caller)
        for each in report.workloads
        for caller in each.callers
        if caller.effect is effect
    ]
    if not found:
        return
    heavy = effect in {Effect.BREAKS, Effect.NOT_KNOWN}
    printer.line()
    if not heavy and not printer.wide:
        calls = sum(caller.connections for _, caller in found)
        printer.text(f"{title} {many(len(found), 'caller')}, {many(calls, 'connection')} (-o wide)")
        return
    printer.line(title)
    shown = found if printer.wide else found[:MOST_CALLERS]
    for each, caller in shown:
        _caller(printer, each, caller, report.time)
    left = len(found) - len(shown) + sum(each.left_out for each in report.workloads)
    if left:
        printer.text(f"and {left} more: -o wide, -o json", 2)
    if effect is Effect.BREAKS:
        for kind in Origin:
            if any(caller.kind is kind for _, caller in found):
                printer.text(f"do, {_where(kind)}: {_REMEDIES[kind]}", 2)


def _caller(
    printer: Printer, each: PlaintextWorkload, caller: PlaintextCaller, now: datetime
) -> None:
    who = f"{caller.workload} ({caller.source})" if caller.workload else caller.source
    port = f":{caller.port}" if caller.port else ""
    printer.text(f"{who or 'callers'} ({_where(caller.kind)}) -> {each.workload}{port}", 2)
    calls = many(caller.connections, "connection") if caller.connections else "an open connection"
    by = f" by {caller.policy}" if caller.policy and caller.effect is not Effect.BREAKS else ""
    ago = duration((now - caller.last).total_seconds())
    printer.text(f"{calls}, last seen {ago} ago; {caller.reason}{by}", 4)


def _where(kind: Origin) -> str:
    return {
        Origin.POD: "a pod of the mesh without identity",
        Origin.NODE: "the node itself",
        Origin.OUTSIDE: "outside the mesh",
        Origin.UNKNOWN: "not known one by one",
    }[kind]
