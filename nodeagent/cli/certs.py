"""`nodeagent certs`: who is this node, until when, and does renewal work?

This module owns the command and the layout of its answer. It promises that what has expired or is
about to is an exit code of 1, and no warning beside a 0. What is near, and the words, are those of
`certs_view`.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Final, NoReturn

import click
import msgspec

from nodeagent.admin.certificates import CERTIFICATES_SCHEMA, CertificatesReport
from nodeagent.cli import certs_view as view
from nodeagent.cli import clock, completion
from nodeagent.cli.ending import ExitCode
from nodeagent.cli.output import Answer, Printer, Watch, answer, output_option, watch_options
from nodeagent.cli.reach import agent_options, get, run_directory
from nodeagent.cli.table import Cell, Column, Tone
from nodeagent.cli.text import many

__all__ = ["certs"]

MAX_ANSWER: Final = 64 * 1024 * 1024
"""Bytes: tens of thousands of identities with their chains."""

_TONES: Final = {
    view.State.VALID: Tone.GOOD,
    view.State.PENDING: Tone.CAREFUL,
}


@click.command()
@click.argument(
    "names", nargs=-1, metavar="[IDENTITY|WORKLOAD...]", shell_complete=completion.either
)
@agent_options
@output_option()
@watch_options
def certs(
    names: tuple[str, ...],
    run_dir: Path | None,
    settings_file: Path | None,
    output: str,
    watch: Watch,
) -> NoReturn:
    """Show this node's certificates: time left, renewal, issuers and roots.

    IDENTITY is a SPIFFE ID, WORKLOAD is NAMESPACE/NAME; without, all are shown. Serial numbers,
    names of issuers and both ends of each validity are in -o wide.

    \b
    Near expiry: less than a quarter of its life, and less than 30 days, are
    left. By then each should have been renewed long ago.

    \b
    Exit codes: 0 all are valid; 1 one has expired, is near expiry, is not
    there, or cannot be renewed; 2 wrong usage; 3 the agent cannot be reached.
    """
    directory = run_directory(run_dir, settings_file)

    def look() -> Answer:
        found = get(directory, "/certificates", CertificatesReport, CERTIFICATES_SCHEMA, MAX_ANSWER)
        return _answer(found, names, clock.now())

    answer(look, output, watch)


def _answer(found: CertificatesReport, names: Sequence[str], now: datetime) -> Answer:
    identities = tuple(
        each
        for each in found.identities
        if not names or each.identity in names or not set(names).isdisjoint(each.workloads)
    )
    known = {name for each in identities for name in (each.identity, *each.workloads)}
    missing = [name for name in names if name not in known]
    findings = view.findings(found, identities, now)
    for name in missing:
        findings.append(
            view.Finding(
                "identity-unknown",
                f"{name}: no identity of this node",
                "nodeagent workloads names those that are bound to it",
            )
        )

    def show(printer: Printer) -> None:
        valid = sum(view.state(each, now) is view.State.VALID for each in identities)
        said = f"{found.node}: {valid} of {many(len(identities), 'certificate')} valid"
        if findings:
            said += f", {many(len(findings), 'finding')}"
        printer.line(said, Tone.BAD if findings else Tone.GOOD)
        if identities:
            printer.line()
            _identities(printer, found, identities, now)
        printer.line()
        _issuers(printer, found, identities, now)
        if findings:
            printer.line()
            printer.line("Findings:")
            for finding in findings:
                printer.text(f"{finding.code}: {finding.text}", 2)
                printer.text(f"do: {finding.remedy}", 4)

    document: dict[str, Any] = msgspec.to_builtins(found)
    document["identities"] = [
        {
            **msgspec.to_builtins(each),
            "state": view.state(each, now).value,
            "seconds_left": view.seconds_left(each.not_after, now),
        }
        for each in identities
    ]
    document["findings"] = msgspec.to_builtins(findings)
    return Answer(document, show, ExitCode.FINDING if findings else ExitCode.FINE)


_COLUMNS: Final = (
    Column("IDENTITY"),
    Column("STATE", folds=False),
    Column("LEFT", folds=False),
    Column("RENEWAL", folds=False),
    Column("UNTIL", folds=False),
)
_WIDE_COLUMNS: Final = tuple(map(Column, ("FROM", "SERIAL", "ISSUER", "ERROR", "WORKLOADS")))


def _identities(
    printer: Printer,
    found: CertificatesReport,
    identities: Sequence[view.IdentityReport],
    now: datetime,
) -> None:
    rows: list[list[Cell | str]] = []
    for each in identities:
        state = view.state(each, now)
        row: list[Cell | str] = [
            each.identity if printer.wide else view.short_identity(each, found.trust_domain),
            Cell(state.value, _TONES.get(state, Tone.BAD)),
            view.left(each.not_after, now),
            view.renewal(each, now),
            view.until(each.not_after),
        ]
        if printer.wide:
            leaf = each.chain[0] if each.chain else None
            row += [
                view.until(each.not_before),
                leaf.serial if leaf else "",
                leaf.issuer if leaf else "",
                each.error,
                ",".join(each.workloads),
            ]
        rows.append(row)
    printer.table(_COLUMNS + (_WIDE_COLUMNS if printer.wide else ()), rows)


_ISSUER_COLUMNS: Final = (
    Column("ISSUER"),
    Column("KIND", folds=False),
    Column("STATE", folds=False),
    Column("LEFT", folds=False),
    Column("UNTIL", folds=False),
)
_WIDE_ISSUER_COLUMNS: Final = tuple(
    map(Column, ("FROM", "SERIAL", "SIGNED-BY", "KEY", "SHA256", "TRUST-DOMAIN"))
)


def _issuers(
    printer: Printer,
    found: CertificatesReport,
    identities: Sequence[view.IdentityReport],
    now: datetime,
) -> None:
    rows: list[list[Cell | str]] = []
    for each in view.issuers(found, identities):
        detail = each.certificate
        state = view.issuer_state(detail, now)
        row: list[Cell | str] = [
            detail.subject if printer.wide else view.common_name(detail),
            each.kind,
            Cell(state.value, _TONES.get(state, Tone.BAD)),
            view.left(detail.not_after, now),
            view.until(detail.not_after),
        ]
        if printer.wide:
            row += [
                view.until(detail.not_before),
                detail.serial,
                detail.issuer,
                detail.key,
                detail.sha256,
                each.trust_domain,
            ]
        rows.append(row)
    if rows:
        printer.table(_ISSUER_COLUMNS + (_WIDE_ISSUER_COLUMNS if printer.wide else ()), rows)
    else:
        printer.line("No root of any trust domain is held.")
