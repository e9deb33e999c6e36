"""What else is known when a certificate was refused: whose, until when, and by which clock.

This module owns these words, which stand behind the reason in the access log's `error`. It promises
that each fact is this node's own: what the mesh's state says, what a certificate that was verified
here said, and this node's clock. It is pure.

A refused certificate itself is seldom at hand: TLS ends before it is shown to us. So the side whose
certificate was refused knows its dates exactly, and the side that refused it knows whose it should
have been, and when the last one that it took ended.
"""

from __future__ import annotations

import time
from typing import Final

import msgspec

from ztunnel.reasons import Reason
from ztunnel.state import Identity

__all__ = ["Refused", "facts", "moment"]

OF_TIME: Final = frozenset({Reason.CERT_EXPIRED, Reason.CERT_NOT_YET_VALID})

_EXPIRED_ALERT: Final = "alert certificate expired"
"""OpenSSL's words for the alert by which a peer says so (RFC 8446, 6.2)."""


class Refused(msgspec.Struct, frozen=True):
    """A handshake that failed. Times are seconds since the epoch.

    `own` is the certificate that we showed, None without one; `whose` the identity that the mesh
    expects at the peer's address, "" if it expects none; `ended` when the last certificate that
    was taken of it here ended, None if none has.
    """

    reason: Reason
    detail: str
    now: float
    own: Identity | None
    whose: str
    ended: float | None


def moment(seconds: float) -> str:
    """RFC 3339 in UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def facts(refused: Refused) -> str:
    """Return `detail` and all that is known beside it; "" if nothing is."""
    known = [refused.detail] if refused.detail else []
    if refused.reason in OF_TIME:
        known += _theirs(refused)
    elif refused.reason is Reason.TLS_ALERT:
        known += _ours(refused)
    return "; ".join(known)


def _theirs(refused: Refused) -> list[str]:
    found: list[str] = []
    if refused.whose:
        found.append(f"the mesh expects {refused.whose} there")
    if refused.reason is Reason.CERT_EXPIRED and refused.ended is not None:
        found.append(
            f"the last certificate that was taken of it here ended {moment(refused.ended)}"
        )
    found.append(f"this node's clock: {moment(refused.now)}")
    own = refused.own
    if own is not None and refused.now < own.not_before:
        behind = own.not_before - refused.now
        found.append(f"which is at least {behind:.0f} s behind the CA's")
    return found


def _ours(refused: Refused) -> list[str]:
    own = refused.own
    if own is None:
        return []
    now = refused.now
    left = own.not_after - now
    shown = f"we showed {own.uid}, valid {moment(own.not_before)} to {moment(own.not_after)}"
    if left <= 0:
        return [f"{shown}: it expired {-left:.0f} s ago, and its renewal is failing here"]
    found = [shown, f"this node's clock: {moment(now)}"]
    if _EXPIRED_ALERT in refused.detail:
        found.append(f"the peer's clock is at least {left:.0f} s ahead")
    return found
