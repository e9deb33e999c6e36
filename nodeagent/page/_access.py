"""Who may see the page from elsewhere: a token, over TLS.

This module owns the token's file, the comparison and the limit on guessing. It promises that a
token is compared in constant time, that its file is nobody else's to read, that no answer or log
holds it, and that whoever guesses is slowed down without shutting out anybody at another address.
Deciding is pure: the time comes in as a value.
"""

from __future__ import annotations

import base64
import binascii
import enum
import hmac
import os
import ssl
import stat
from collections import OrderedDict
from pathlib import Path
from typing import Final

__all__ = ["AccessError", "Gate", "Verdict", "read_token", "tls_context"]

MIN_TOKEN_BYTES: Final = 32
"""Of the token: too many to guess. `openssl rand -hex 32` writes 64."""

MAX_TOKEN_BYTES: Final = 1024
"""Of the token's file; a header of the admin listener has at most 4096 bytes."""

MAX_FAILURES: Final = 10
"""Wrong tokens from one address within FAILURE_SECONDS: a person mistypes fewer."""

FAILURE_SECONDS: Final = 60.0

MAX_ADDRESSES: Final = 1024
"""Whose failures are remembered. Beyond, the oldest is forgotten: the token's length protects, and
the limit keeps logs and the loop quiet."""


class AccessError(Exception):
    """The page cannot be shown beyond loopback as asked. Says what is wrong and what to do."""


class Verdict(enum.Enum):
    ADMITTED = enum.auto()
    UNKNOWN = enum.auto()
    """No token, or a wrong one."""
    SLOWED = enum.auto()
    """Too many wrong ones lately; not even looked at."""


class Gate:
    """Compares tokens. Never shows its own."""

    def __init__(self, token: bytes) -> None:
        self._token = token
        self._failures: OrderedDict[str, tuple[float, int]] = OrderedDict()
        """By address: when counting began, and how many since."""

    def __repr__(self) -> str:
        return "Gate()"

    def judge(self, address: str, authorization: str, now: float) -> Verdict:
        """Return whether the header `Authorization` (RFC 7617, Basic) from `address` admits.

        The user's name is not looked at: the password is the token. `now` is in monotonic seconds.
        """
        began, count = self._failures.get(address, (now, 0))
        if now - began >= FAILURE_SECONDS:
            began, count = now, 0
        if count >= MAX_FAILURES:
            return Verdict.SLOWED
        password = _password(authorization)
        if password is not None and hmac.compare_digest(password, self._token):
            self._failures.pop(address, None)
            return Verdict.ADMITTED
        # A browser's first request has no token: that is no guess.
        if authorization:
            self._failures[address] = (began, count + 1)
            self._failures.move_to_end(address)
            while len(self._failures) > MAX_ADDRESSES:
                self._failures.popitem(last=False)
        return Verdict.UNKNOWN


def _password(authorization: str) -> bytes | None:
    scheme, _, encoded = authorization.partition(" ")
    if scheme.lower() != "basic":
        return None
    try:
        pair = base64.b64decode(encoded.strip(), validate=True)
    except (binascii.Error, ValueError):
        return None
    _, colon, password = pair.partition(b":")
    return password if colon else None


def read_token(path: Path) -> bytes:
    """Return the token in `path`, without the line's end. Raises AccessError."""
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        with open(path, "rb", opener=lambda name, _: os.open(name, flags)) as stream:
            found = os.fstat(stream.fileno())
            data = stream.read(MAX_TOKEN_BYTES + 1)
    except OSError as error:
        remedy = f"write one: (umask 077; openssl rand -hex 32 > {path})"
        raise AccessError(f"page.token_file {path}: {error.strerror}; {remedy}") from error
    if not stat.S_ISREG(found.st_mode):
        raise AccessError(f"page.token_file {path}: is not a regular file")
    if found.st_mode & (stat.S_IRWXG | stat.S_IRWXO) or found.st_uid not in {0, os.geteuid()}:
        remedy = f"run chmod 0600 and chown root on {path}"
        raise AccessError(f"page.token_file {path}: others may read or write it; {remedy}")
    token = data.strip()
    if not len(token) >= MIN_TOKEN_BYTES or len(data) > MAX_TOKEN_BYTES:
        reason = f"must hold {MIN_TOKEN_BYTES} to {MAX_TOKEN_BYTES} bytes"
        raise AccessError(
            f"page.token_file {path}: {reason}; openssl rand -hex 32 writes a good one"
        )
    return token


def tls_context(certificate: Path, key: Path) -> ssl.SSLContext:
    """Return the server's side of TLS 1.2 or later. Raises AccessError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(certificate, key)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or getattr(error, "reason", None) or error
        raise AccessError(
            f"page.certificate_file {certificate}, page.key_file {key}: {reason}; "
            "write a PEM certificate chain and its unencrypted key"
        ) from error
    return context
