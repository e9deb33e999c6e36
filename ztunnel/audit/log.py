"""The audit log: which judgements have a line, and how many lines there may be.

This module owns that choice. It promises that whoever is refused, cut or not believed has a line
for each connection, within the limit; that an AUDIT rule that matches has one for each connection
too; that who is let in has one as the settings say; and that what the limit leaves out is counted,
and said in a line. It never waits, and may not judge.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Final, NamedTuple

from ztunnel.audit.entry import Event, of_handshake, of_verdict
from ztunnel.audit.forms import LeftOut, Severity, severity_of
from ztunnel.audit.limit import Bucket
from ztunnel.audit.outlets import Outlets, Shared
from ztunnel.authorize import Verdict
from ztunnel.observe import labels
from ztunnel.observe.access_log import Line as Ended
from ztunnel.reasons import Reason
from ztunnel.settings import AuditForm, AuditSettings, Authorized

__all__ = ["AuditLog", "Counts"]

LEFT_OUT_SECONDS: Final = 10.0
"""Between lines that say how many were left out: as often as the access log says so."""

MAX_CALLERS: Final = 8192
"""Callers that are remembered, about 1 KB each; of more, some are named again earlier."""

CALLER_SECONDS: Final = 3600.0
"""After which a caller that is judged anew is named again: files are rotated, and collectors begin
in the middle."""

RATE: Final = "rate"
"""The cause of what the limit leaves out, before any sink."""

EVERY_SINK: Final = "all"

UNTRUSTED: Final = frozenset(
    {
        Reason.CERT_MISSING,
        Reason.CERT_EXPIRED,
        Reason.CERT_NOT_YET_VALID,
        Reason.CERT_UNTRUSTED,
        Reason.CERT_INVALID,
        Reason.TRUST_DOMAIN,
    }
)
"""Failures of a handshake in which a caller did not prove an identity; all others are faults."""

_KINDS: Final = {
    Severity.WARNING: "UNAUTHORIZED",
    Severity.NOTICE: "audited AUTHORIZED",
    Severity.INFO: "AUTHORIZED",
}
"""Kinds of lines that have a limit each, so that none crowds out another."""


class Counts(NamedTuple):
    """Lines by sink, those left out by sink and cause; and what is wrong with each sink, or ""."""

    written: dict[str, int]
    left_out: dict[tuple[str, str], int]
    problems: dict[str, str]


class AuditLog:
    """`clock` is monotonic, `wall` since the epoch. Silent until `configure`.

    `stdout` and `shared` are those of `Outlets`.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        wall: Callable[[], float],
        stdout: AuditForm | None = None,
        shared: Shared | None = None,
    ) -> None:
        self._clock = clock
        self._wall = wall
        self._outlets = Outlets(wall, stdout, shared)
        self._authorized = Authorized.NONE
        self._buckets = {kind: Bucket(clock()) for kind in _KINDS}
        self._said = dict.fromkeys(_KINDS, 0)
        self._said_at = clock()
        self._callers: OrderedDict[tuple[object, ...], float] = OrderedDict()

    def configure(self, settings: AuditSettings, node: str) -> None:
        self._authorized = settings.authorized
        for bucket in self._buckets.values():
            bucket.limit(settings.lines_per_second)
        self._outlets.configure(settings, node)

    def reopen(self) -> None:
        """Open the file anew before the next line: logrotate has moved it away."""
        self._outlets.reopen()

    def stop(self, seconds: float) -> None:
        """Write what waits, within `seconds`, and close every sink."""
        self._outlets.stop(seconds, self._clock)

    # --- what has a line --------------------------------------------------------------------------

    def every_end(self, verdict: Verdict) -> bool:
        """Return whether each connection that `verdict` lets in has a line at its end."""
        if not self._outlets:
            return False
        return bool(verdict.audits) or self._authorized is Authorized.CONNECTIONS

    def begun(self, verdict: Verdict, source: bytes, line: Ended) -> None:
        """Somebody at the address `source` was judged anew, and let in.

        `line` has no port of the source, no bytes and no duration.
        """
        if not self._outlets or (self._authorized is Authorized.NONE and not verdict.audits):
            return
        now = self._clock()
        caller = (
            source,
            labels.value(line.labels, "source_principal"),
            line.destination,
            line.hbone_destination,
            verdict.origin,
            verdict.audits,
        )
        named = self._callers.get(caller)
        if named is not None and now - named < CALLER_SECONDS:
            return
        if not self._buckets[severity_of(verdict)].admit(source, now):
            return
        self._callers[caller] = now
        self._callers.move_to_end(caller)
        while len(self._callers) > MAX_CALLERS:
            self._callers.popitem(last=False)
        self._outlets.give(of_verdict(self._wall(), Event.CALLER, verdict, line))

    def ended(self, verdict: Verdict, source: bytes, line: Callable[[], Ended]) -> None:
        """A connection from the address `source` has ended: at once if it was refused."""
        if not self._outlets or (verdict.allow and not self.every_end(verdict)):
            return
        if self._buckets[severity_of(verdict)].admit(source, self._clock()):
            self._outlets.give(of_verdict(self._wall(), Event.CONNECTION, verdict, line()))

    def failed(self, reason: Reason, source: bytes, line: Callable[[], Ended]) -> None:
        """A handshake of a caller at the address `source` has failed."""
        if not self._outlets or reason not in UNTRUSTED:
            return
        if self._buckets[Severity.WARNING].admit(source, self._clock()):
            self._outlets.give(of_handshake(self._wall(), line()))

    def tick(self, *, last: bool = False) -> None:
        """Say what was left out; call about every second, and once at the end."""
        now = self._clock()
        if not last and now - self._said_at < LEFT_OUT_SECONDS:
            return
        self._said_at = now
        for kind, what in _KINDS.items():
            total = self._buckets[kind].left_out
            lines, self._said[kind] = total - self._said[kind], total
            if lines:
                self._outlets.give(LeftOut(self._wall(), lines, RATE, what))

    def counts(self) -> Counts:
        left_out = self._outlets.lost
        left_out[EVERY_SINK, RATE] = sum(bucket.left_out for bucket in self._buckets.values())
        return Counts(dict(self._outlets.written), dict(left_out), self._outlets.problems)
