"""What a line of the access log says of a verdict beyond the policy that decided.

This module owns these words: the AUDIT rules that match, and what a dry run would have done. It
promises that what was not looked at is said to be so, in bounded room. It is pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from ztunnel.policy import DryRun, Match

__all__ = ["dry_run", "matches"]

MAX_UNREAD: Final = 3
"""Fields of one rule that are named as not looked at."""


def dry_run(found: DryRun) -> str:
    outcome = "allowed" if found.allow else "denied"
    by = f" by {found.origin}" if found.origin else ""
    audited = f"; audited by {matches(found.audits)}" if found.audits else ""
    return f"{outcome}{by}{audited}"


def matches(audits: Sequence[Match]) -> str:
    """Return the rules that match, and what of them was not looked at."""
    return "; ".join(audit.origin + _without(audit.unread) for audit in audits)


def _without(unread: Sequence[str]) -> str:
    if not unread:
        return ""
    more = f" and {len(unread) - MAX_UNREAD} more" if len(unread) > MAX_UNREAD else ""
    return f" without {', '.join(unread[:MAX_UNREAD])}{more}"
