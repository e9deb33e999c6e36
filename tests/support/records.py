"""Records of TLS 1.3 made by hand, from a connection's own secret: no library sends these at will.

Owns the sealing of one direction of a connection (RFC 8446, 5.2 and 7.2). It promises nothing of
what is sealed: right or wrong, it is sent as told.
"""

from __future__ import annotations

import struct
from typing import Final

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand
from OpenSSL import SSL

from support.hbone import Tls

__all__ = ["ALERT", "APPLICATION_DATA", "HANDSHAKE", "Records", "Secrets"]

ALERT: Final = 21
HANDSHAKE: Final = 22
APPLICATION_DATA: Final = 23

TICKETS: Final = 2
"""Records that OpenSSL sends as a server after a handshake (SSL_CTX_set_num_tickets)."""


class Secrets:
    """What a context's key log has said."""

    def __init__(self, context: SSL.Context) -> None:
        self._found: dict[bytes, bytes] = {}
        context.set_keylog_callback(self._keep)

    def _keep(self, _: SSL.Connection, line: bytes) -> None:
        label, _random, secret = line.split()
        self._found[label] = bytes.fromhex(secret.decode())

    def client(self, tls: Tls) -> Records:
        """Return the client's direction; it must have sent nothing since the handshake."""
        assert tls._tls.get_cipher_name() == "TLS_AES_128_GCM_SHA256"
        return Records(self._found[b"CLIENT_TRAFFIC_SECRET_0"])

    def server(self, tls: Tls) -> Records:
        """Return the server's direction; it must have sent nothing since its tickets."""
        assert tls._tls.get_cipher_name() == "TLS_AES_128_GCM_SHA256"
        return Records(self._found[b"SERVER_TRAFFIC_SECRET_0"], TICKETS)


class Records:
    """The records that one side sends next."""

    def __init__(self, secret: bytes, number: int = 0) -> None:
        self._secret = secret
        self._number = number

    def _expand(self, label: bytes, length: int) -> bytes:
        label = b"tls13 " + label
        info = struct.pack("!HB", length, len(label)) + label + b"\0"
        return HKDFExpand(hashes.SHA256(), length, info).derive(self._secret)

    def seal(self, kind: int, payload: bytes) -> bytes:
        """Return the next record, of this inner type."""
        key, nonce = self._expand(b"key", 16), int.from_bytes(self._expand(b"iv", 12))
        plain = payload + bytes([kind])
        header = struct.pack("!BHH", APPLICATION_DATA, 0x303, len(plain) + 16)
        sealed = AESGCM(key).encrypt((nonce ^ self._number).to_bytes(12), plain, header)
        self._number += 1
        return header + sealed

    def key_update(self) -> bytes:
        """Return a KeyUpdate that asks for one in return (section 4.6.3), and use the new keys."""
        record = self.seal(HANDSHAKE, bytes([24, 0, 0, 1, 1]))
        self._secret, self._number = self._expand(b"traffic upd", 32), 0
        return record
