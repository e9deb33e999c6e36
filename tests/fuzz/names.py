"""Fuzzer of what names somebody or some place: SPIFFE IDs, addresses, CONNECT authorities' parts.

Invariant: a text is read exactly when a second grammar takes it as well (one written here for
SPIFFE IDs, the C library's for addresses); what has been read spells itself in one way, and that
spelling is read as the same; and everything else is refused by ValueError, with one printable line.

Input: a text in UTF-8, tried as each of them.
"""

from __future__ import annotations

import re
import socket
import sys
from typing import Final

if __name__ == "__main__":
    import atheris

    with atheris.instrument_imports(include=["ztunnel", "nodeagent.api"]):
        from nodeagent.api import values
        from ztunnel import address, spiffe
else:
    from nodeagent.api import values
    from ztunnel import address, spiffe

MOST_BYTES: Final = 4096
"""Of one input: the longest SPIFFE ID has 2048."""

SPIFFE_ID: Final = re.compile(
    r"spiffe://[a-z0-9._-]{1,255}(?:/(?!\.\.?(?:/|\Z))[A-Za-z0-9._-]+)*", re.ASCII
)
LONGEST_ID: Final = 2048
IPV4_MAPPED: Final = bytes(10) + b"\xff\xff"


def refusal(error: ValueError) -> None:
    text = str(error)
    assert text
    assert text.isprintable()


def check_identity(text: str) -> None:
    known = len(text) <= LONGEST_ID and SPIFFE_ID.fullmatch(text) is not None
    found = None
    try:
        found = spiffe.SpiffeId.parse(text)
    except spiffe.SpiffeIdError as error:
        refusal(error)
    assert known is (found is not None)
    if found is None:
        return
    assert str(found) == text
    assert spiffe.SpiffeId(found.trust_domain, found.path) == found
    assert (found.namespace is None) == (found.service_account is None)
    if found.namespace is not None and found.service_account is not None:
        made = spiffe.SpiffeId.workload(found.trust_domain, found.namespace, found.service_account)
        assert made == found


def in_libc(text: str) -> bytes | None:
    """Return the 16 bytes of an address as the C library reads it."""
    # It reads up to a NUL, which is not in its grammar but in C's.
    if not text.isascii() or "\0" in text:
        return None
    try:
        if ":" in text:
            return socket.inet_pton(socket.AF_INET6, text)
        return IPV4_MAPPED + socket.inet_pton(socket.AF_INET, text)
    except OSError:
        return None


def check_address(text: str) -> None:
    expected = in_libc(text)
    try:
        packed = address.pack(text)
    except ValueError as error:
        refusal(error)
        assert expected is None
        packed = None
    if packed is not None:
        assert packed == expected
        assert address.pack(address.text(packed)) == packed
    # A workload's address is one that can be dialled: never this host's own, however it is spelt.
    try:
        canonical = values.address(text)
    except ValueError as error:
        refusal(error)
        return
    assert packed is not None
    assert address.text(packed) == canonical
    assert not address.is_local_only(packed)


def test_one_input(data: bytes) -> None:
    """Try one input. An AssertionError is a finding, and so is any other exception."""
    text = data[:MOST_BYTES].decode("utf-8", "replace")
    check_identity(text)
    check_identity(f"spiffe://{text}")
    check_address(text)


def main() -> None:
    atheris.Setup(sys.argv, test_one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
