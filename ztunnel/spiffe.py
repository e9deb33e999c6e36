"""SPIFFE IDs: the one grammar by which both daemons read and write the name of a workload.

This module owns the syntax of a SPIFFE ID. It promises that every `SpiffeId` that exists is valid,
that its text is the only spelling of it, and that `parse` and `str` are inverse; so two identities
are equal exactly when their texts are. It may not import a URL parser, which would repair what has
to be refused (tabs, capitals, user names), or know which identities are trusted.

Source: SPIFFE-ID specification, sections 2 (the identity), 2.1 (trust domain), 2.2 (path) and 2.4
(length), in the spelling that is compared byte by byte: scheme and trust domain in lower case.
"""

from __future__ import annotations

import dataclasses
import string
from typing import Final

__all__ = ["MAX_ID_BYTES", "MAX_TRUST_DOMAIN_BYTES", "SpiffeId", "SpiffeIdError"]

MAX_ID_BYTES: Final = 2048
"""SPIFFE-ID 2.4: every implementation supports this length, and none may generate a longer one."""

MAX_TRUST_DOMAIN_BYTES: Final = 255
"""SPIFFE-ID 2.1 and RFC 3986 3.2.2: the length of the host part."""

_SCHEME: Final = "spiffe://"
_TRUST_DOMAIN_CHARACTERS: Final = frozenset(string.ascii_lowercase + string.digits + ".-_")
_PATH_CHARACTERS: Final = frozenset(string.ascii_letters + string.digits + ".-_")
_KUBERNETES_SEGMENTS: Final = 4


class SpiffeIdError(ValueError):
    """A text is no SPIFFE ID. `what` says why, `position` at which character (from 0).

    The message never quotes the text: it comes from a peer, and may hold newlines.
    """

    def __init__(self, what: str, position: int) -> None:
        super().__init__(f"not a SPIFFE ID: {what} (at character {position})")
        self.what = what
        self.position = position


@dataclasses.dataclass(frozen=True, slots=True, order=True)
class SpiffeId:
    """A SPIFFE ID. `path` is empty (a trust domain's own ID) or starts with "/".

    Raises SpiffeIdError from every way of making one. Positions in errors count from the start
    of the whole ID.
    """

    trust_domain: str
    path: str

    def __post_init__(self) -> None:
        _check_trust_domain(self.trust_domain)
        _check_path(self.path, len(_SCHEME) + len(self.trust_domain))
        length = len(_SCHEME) + len(self.trust_domain) + len(self.path)
        if length > MAX_ID_BYTES:
            raise SpiffeIdError(f"{length} bytes exceed the limit of {MAX_ID_BYTES}", MAX_ID_BYTES)

    def __str__(self) -> str:
        return f"{_SCHEME}{self.trust_domain}{self.path}"

    @classmethod
    def parse(cls, text: str) -> SpiffeId:
        """Return the ID that `text` spells, or raise SpiffeIdError."""
        # Before any scan: what is longer is refused without being read.
        if len(text) > MAX_ID_BYTES:
            raise SpiffeIdError(f"longer than the limit of {MAX_ID_BYTES} bytes", MAX_ID_BYTES)
        if not text.startswith(_SCHEME):
            raise SpiffeIdError(f"it must start with {_SCHEME!r}", 0)
        trust_domain, slash, path = text[len(_SCHEME) :].partition("/")
        return cls(trust_domain, slash + path)

    @classmethod
    def workload(cls, trust_domain: str, namespace: str, service_account: str) -> SpiffeId:
        """Return the ID of a Kubernetes service account; each argument is a single segment."""
        start = len(_SCHEME) + len(trust_domain) + len("/ns/")
        _check_segment(namespace, start)
        _check_segment(service_account, start + len(namespace) + len("/sa/"))
        return cls(trust_domain, f"/ns/{namespace}/sa/{service_account}")

    @property
    def namespace(self) -> str | None:
        """The namespace, or None if the path has not the form "/ns/NAMESPACE/sa/ACCOUNT"."""
        names = self._kubernetes_names()
        return None if names is None else names[0]

    @property
    def service_account(self) -> str | None:
        """The service account, or None if the path has not the form "/ns/NAMESPACE/sa/ACCOUNT"."""
        names = self._kubernetes_names()
        return None if names is None else names[1]

    def _kubernetes_names(self) -> tuple[str, str] | None:
        segments = self.path.split("/")[1:]
        if len(segments) != _KUBERNETES_SEGMENTS or segments[0] != "ns" or segments[2] != "sa":
            return None
        return segments[1], segments[3]


def _check_trust_domain(text: str) -> None:
    start = len(_SCHEME)
    if not text:
        raise SpiffeIdError("the trust domain is empty", start)
    for offset, character in enumerate(text):
        if character not in _TRUST_DOMAIN_CHARACTERS:
            raise SpiffeIdError(
                f"the trust domain may not hold {_name(character)}, only a-z, 0-9, '.', '-', '_'",
                start + offset,
            )
    if len(text) > MAX_TRUST_DOMAIN_BYTES:
        raise SpiffeIdError(
            f"the trust domain is longer than {MAX_TRUST_DOMAIN_BYTES} bytes",
            start + MAX_TRUST_DOMAIN_BYTES,
        )


def _check_path(path: str, start: int) -> None:
    if not path:
        return
    if not path.startswith("/"):
        raise SpiffeIdError("the path must start with '/'", start)
    position = start + 1
    for segment in path[1:].split("/"):
        _check_segment(segment, position)
        position += len(segment) + 1


def _check_segment(segment: str, start: int) -> None:
    if not segment:
        raise SpiffeIdError("a path segment is empty", start)
    if segment in {".", ".."}:
        raise SpiffeIdError("a path segment may not be '.' or '..'", start)
    for offset, character in enumerate(segment):
        if character not in _PATH_CHARACTERS:
            raise SpiffeIdError(
                f"the path may not hold {_name(character)}, only a-z, A-Z, 0-9, '.', '-', '_'",
                start + offset,
            )


def _name(character: str) -> str:
    """Return `character` for a message: itself if it is harmless there, else its code point."""
    if character.isascii() and character.isprintable():
        return repr(character)
    return f"U+{ord(character):04X}"
