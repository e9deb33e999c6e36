"""Making findings: title, severity and page by the code.

This module owns nothing but that. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable

from nodeagent.doctor.codes import CODES, page
from nodeagent.doctor.model import NODE, Finding

__all__ = ["finding"]


def finding(
    code: str,
    text: str,
    remedy: str,
    *commands: str,
    affects: Iterable[str] = (NODE,),
) -> Finding:
    known = CODES[code]
    return Finding(
        code=code,
        severity=known.severity,
        title=known.title,
        text=text,
        affects=tuple(affects),
        remedy=remedy,
        commands=commands,
        page=page(code),
    )
