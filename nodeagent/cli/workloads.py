"""`nodeagent workloads`: what is enrolled, by whose word, and did the configuration arrive?

This module owns the command, and the words and columns of its answer. It promises that `Enrolled`
means captured and found so by the last audit, and never that it could be; and that a workload which
was asked for by name and is not bound to this node is a finding.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Final, NoReturn

import click
import msgspec

from nodeagent.admin.model import PodReport, PodState, Status
from nodeagent.cli import clock, completion
from nodeagent.cli.ending import ExitCode
from nodeagent.cli.output import Answer, Printer, Watch, answer, output_option, watch_options
from nodeagent.cli.reach import agent_options, run_directory
from nodeagent.cli.status import fetch
from nodeagent.cli.status_view import certificate_left, mode, pending, short_identity
from nodeagent.cli.table import Cell, Column, Tone
from nodeagent.cli.text import duration, many, moment

__all__ = ["workloads"]

SCHEMA: Final = 1
"""Of the document: fields are only added."""

_COLUMNS: Final = (
    Column("WORKLOAD"),
    Column("STATE", folds=False),
    Column("MODE", folds=False),
    Column("SET-BY"),
    Column("IDENTITY"),
    Column("CERT", folds=False),
    Column("CONNS", right=True, folds=False),
)
_WIDE_COLUMNS: Final = (
    *(Column(heading) for heading in ("AGE", "NETNS", "ADDRESSES", "CERT-UNTIL", "AUTHORIZATION")),
    Column("REPAIRED", right=True),
    Column("DROPPED", right=True),
)


class _Workload(msgspec.Struct, frozen=True, kw_only=True):
    """`connections` are open now; None: ztunnel does not say."""

    pod: PodReport
    connections: int | None


@click.command()
@click.argument("names", nargs=-1, metavar="[WORKLOAD...]", shell_complete=completion.workloads)
@agent_options
@output_option()
@watch_options
def workloads(
    names: tuple[str, ...],
    run_dir: Path | None,
    settings_file: Path | None,
    output: str,
    watch: Watch,
) -> NoReturn:
    """Show this node's workloads: enrolled or not, mTLS mode and who set it.

    WORKLOAD is NAMESPACE/NAME, or NAMESPACE/ for all of one; without, all that are bound to this
    node are shown. Enrolled means captured, and found so by the last audit.

    \b
    Exit codes: 0 all of them are enrolled and the configuration is in force;
    1 one is not, or it is not; 2 wrong usage; 3 the agent cannot be reached.
    """
    directory = run_directory(run_dir, settings_file)
    answer(lambda: _answer(fetch(directory), names, clock.now()), output, watch)


def _answer(status: Status, names: Sequence[str], now: datetime) -> Answer:
    shown = [each for each in _workloads(status) if _is_named(each.pod.workload, names)]
    missing = [
        name for name in names if not any(_is_named(each.pod.workload, [name]) for each in shown)
    ]
    waits = pending(status)
    enrolled = sum(each.pod.state is PodState.ENROLLED for each in shown)
    fine = enrolled == len(shown) and not missing and not waits

    def show(printer: Printer) -> None:
        verdict = f"{enrolled} of {many(len(shown), 'workload')} enrolled; "
        verdict += "configuration NOT in force" if waits else "configuration in force"
        printer.line(f"{status.node}: {verdict}", Tone.GOOD if fine else Tone.BAD)
        if waits:
            printer.text(f"why: {waits}", 2)
        for name in missing:
            printer.text(f"{name}: no such workload is bound to this node", 2)
        if shown:
            printer.line()
            wide = printer.wide
            columns = _COLUMNS + (_WIDE_COLUMNS if wide else ())
            printer.table(columns, (_row(each, status, now, wide=wide) for each in shown))
        if any(each.pod.port_modes for each in shown):
            printer.line("* some ports have another mode: -o json shows them")
        for each in shown:
            if each.pod.error or each.pod.deviations:
                said = "; ".join(filter(None, (each.pod.error, *each.pod.deviations)))
                printer.text(f"{each.pod.workload}: {said}", 2)

    return Answer(
        _document(status, shown, missing, waits),
        show,
        ExitCode.FINE if fine else ExitCode.FINDING,
    )


def _document(
    status: Status, shown: Iterable[_Workload], missing: Sequence[str], waits: str
) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "time": msgspec.to_builtins(status.time),
        "node": status.node,
        "configuration": {
            "source": status.config.source,
            "documents": status.config.documents,
            "problems": len(status.config.problems),
            "in_force": not waits,
            "pending": waits,
        },
        "workloads": [
            {**msgspec.to_builtins(each.pod, str_keys=True), "connections": each.connections}
            for each in shown
        ],
        "not_bound": list(missing),
    }


def _workloads(status: Status) -> list[_Workload]:
    counts: dict[str, int] = {}
    own = status.ztunnel.own or {}
    pods = own.get("pods")
    # By ztunnel's own schema, of whatever release it is.
    for each in pods if isinstance(pods, list) else []:
        if isinstance(each, dict) and isinstance(each.get("connections"), int):
            counts[str(each.get("workload"))] = each["connections"]
    return [
        _Workload(pod=pod, connections=counts.get(pod.workload))
        for pod in sorted(status.pods, key=lambda pod: pod.workload)
    ]


def _is_named(workload: str, names: Sequence[str]) -> bool:
    if not names:
        return True
    return any(
        workload.startswith(name) if name.endswith("/") else workload == name for name in names
    )


def _row(each: _Workload, status: Status, now: datetime, *, wide: bool) -> list[Cell | str]:
    pod = each.pod
    good = pod.state is PodState.ENROLLED
    origin = pod.mode_origin
    cells: list[Cell | str] = [
        pod.workload,
        Cell(pod.state.value, Tone.GOOD if good else Tone.BAD),
        mode(pod),
        origin if wide else origin.partition(" (")[0],
        pod.identity if wide else _account(pod, status.trust_domain),
        certificate_left(pod.certificate, now),
        "" if each.connections is None else str(each.connections),
    ]
    if wide:
        cells += [
            duration((now - pod.since).total_seconds()),
            pod.netns,
            ",".join(pod.addresses),
            moment(pod.certificate.not_after if pod.certificate else None),
            ", ".join(policy.policy for policy in pod.authorizations),
            str(pod.repaired),
            str(sum(pod.drops.values())),
        ]
    return cells


def _account(pod: PodReport, trust_domain: str) -> str:
    """Return the identity without what the workload's own name says, such as "sa/web"."""
    namespace = pod.workload.partition("/")[0]
    return short_identity(pod.identity, trust_domain).removeprefix(f"ns/{namespace}/")
