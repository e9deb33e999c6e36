"""Fuzzer of the identities that peers' certificates claim.

Invariant: whatever chain comes, `validate` returns an identity or raises SvidError with one
printable line; and an identity that it returns is the one URI name of the leaf, spelled as the
SPIFFE grammar wants it, in a leaf that is valid now, is no CA and may sign but not certify, with a
signature by a key of its own trust domain's bundle. That is read from the DER a second time, here.

Input: certificates, each a byte and two bytes of length before it. The byte says who signs: 0
nobody (it is a certificate as it is), else what follows is the part that is signed, and this
fuzzer signs it: mutation would otherwise only ever break signatures.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import functools
import random
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Final

if __name__ == "__main__":
    import atheris

    with atheris.instrument_imports(include=["ztunnel"]):
        from ztunnel import spiffe, svid
else:
    from ztunnel import spiffe, svid

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from support.certificates import NOW, Identity, authority, workload

MOST_BYTES: Final = 32 * 1024
SPIFFE_ID: Final = re.compile(
    r"spiffe://([a-z0-9._-]{1,255})((?:/(?!\.\.?(?:/|$))[A-Za-z0-9._-]+)+)"
)


# --- who signs ---------------------------------------------------------------------------------


def key(number: int) -> ec.EllipticCurvePrivateKey:
    return ec.derive_private_key(number, ec.SECP256R1())


@functools.cache
def signers() -> tuple[Identity, Identity, Identity]:
    """Return a root, an intermediate below it, and the root of another trust domain."""
    root = authority(key=key(11))
    return root, authority(issuer=root, key=key(12)), authority("foreign.example", key=key(13))


@functools.cache
def bundles() -> dict[str, tuple[bytes, ...]]:
    root, _, foreign = signers()
    return {"cluster.local": (root.der,), "foreign.example": (foreign.der,)}


# --- DER, as much as is needed -----------------------------------------------------------------

_LONG: Final = 0x80


def tlv(data: bytes, at: int = 0) -> tuple[int, int, int]:
    """Return the tag, where the content begins and where it ends. Raises ValueError, IndexError."""
    tag, length = data[at], data[at + 1]
    begin = at + 2
    if length & _LONG:
        count = length & 0x7F
        if not 1 <= count <= 3:
            raise ValueError("length")
        length = int.from_bytes(data[begin : begin + count], "big")
        begin += count
    if begin + length > len(data):
        raise ValueError("beyond the end")
    return tag, begin, begin + length


def wrap(tag: int, content: bytes) -> bytes:
    if len(content) < _LONG:
        return bytes((tag, len(content))) + content
    size = len(content).to_bytes((len(content).bit_length() + 7) // 8, "big")
    return bytes((tag, _LONG | len(size))) + size + content


def children(data: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    """Yield tag, content and the whole of each element in `data`."""
    at = 0
    while at < len(data):
        tag, begin, end = tlv(data, at)
        yield tag, data[begin:end], data[at:end]
        at = end


@dataclasses.dataclass
class Node:
    """An element: `parts` when it is made of others, else `content`."""

    tag: int
    content: bytes = b""
    parts: list[Node] | None = None

    def inside(self) -> bytes:
        parts = self.parts
        return self.content if parts is None else b"".join(part.der() for part in parts)

    def der(self) -> bytes:
        return wrap(self.tag, self.inside())

    def all(self) -> Iterator[Node]:
        yield self
        for part in self.parts or ():
            yield from part.all()


_CONSTRUCTED: Final = 0x20
_OCTETS: Final = 4
_DEEPEST: Final = 12


def tree(data: bytes, depth: int = 0) -> list[Node]:
    """Return the elements of `data`. Octet strings are looked into: extensions are in them."""
    nodes: list[Node] = []
    for tag, content, _ in children(data):
        node = Node(tag, content)
        if depth < _DEEPEST and content and (tag & _CONSTRUCTED or tag == _OCTETS):
            try:
                node.parts = tree(content, depth + 1)
            except (ValueError, IndexError):
                node.parts = None
        nodes.append(node)
    return nodes


# --- the chain ---------------------------------------------------------------------------------

_ECDSA_SHA256: Final = bytes.fromhex("300a06082a8648ce3d040302")


@functools.lru_cache(maxsize=4096)
def signed(tbs: bytes, signer: int) -> bytes:
    private = signers()[signer % 3].key
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    signature = private.sign(tbs, ec.ECDSA(hashes.SHA256()))
    return wrap(0x30, tbs + _ECDSA_SHA256 + wrap(3, b"\0" + signature))


def entries(data: bytes) -> list[tuple[int, bytes]]:
    """Return who signs and what, for each certificate of the input."""
    found: list[tuple[int, bytes]] = []
    at = 0
    while len(data) - at >= 3:
        size = int.from_bytes(data[at + 1 : at + 3], "big")
        found.append((data[at] % 4, data[at + 3 : at + 3 + size]))
        at += 3 + size
    return found


def packed(parts: Sequence[tuple[int, bytes]]) -> bytes:
    return b"".join(
        bytes((signer,)) + len(der).to_bytes(2, "big") + der
        for signer, der in parts
        if len(der) < 65536
    )


def seeds() -> list[bytes]:
    """Return inputs that are correct: signed by the root, by the intermediate, by the foreigner."""
    root, middle, foreign = signers()
    below = workload(middle, key=key(21)).certificate.tbs_certificate_bytes
    direct = workload(root, key=key(22), subject="a").certificate.tbs_certificate_bytes
    other = workload(
        foreign, "spiffe://foreign.example/ns/a/sa/b", key=key(23)
    ).certificate.tbs_certificate_bytes
    return [
        packed([(2, below), (1, middle.certificate.tbs_certificate_bytes)]),
        packed([(1, direct)]),
        packed([(3, other)]),
        packed([(0, workload(root, key=key(24)).der), (0, middle.der), (0, root.der)]),
    ]


# --- the second reading ------------------------------------------------------------------------


def extensions(certificate: bytes) -> dict[str, tuple[bool, bytes]]:
    """Return what the certificate holds by object identifier (hexadecimal): critical, and value."""
    ((_, whole, _),) = children(certificate)
    (_, tbs, _), *_ = children(whole)
    found: dict[str, tuple[bool, bytes]] = {}
    for tag, content, _ in children(tbs):
        if tag != 0xA3:
            continue
        ((_, listed, _),) = children(content)
        for _, extension, _ in children(listed):
            parts = list(children(extension))
            critical = len(parts) == 3 and parts[1][1] != b"\0"
            name = parts[0][1].hex()
            assert name not in found
            found[name] = (critical, parts[-1][1])
    return found


_SAN, _USAGE, _CONSTRAINTS = "551d11", "551d0f", "551d13"


def check_leaf(leaf: bytes) -> str:
    """Return the one URI of a leaf that may be one."""
    held = extensions(leaf)
    ((_, names, _),) = children(held[_SAN][1])
    uris = [content for tag, content, _ in children(names) if tag == 0x86]
    assert len(uris) == 1
    critical, usage = held[_USAGE]
    ((_, bits, _),) = children(usage)
    assert critical
    assert bits[1] & 0x80, "digitalSignature"
    assert not bits[1] & 0x06, "keyCertSign, cRLSign"
    if _CONSTRAINTS in held:
        ((_, constraints, _),) = children(held[_CONSTRAINTS][1])
        assert not any(tag == 1 and content != b"\0" for tag, content, _ in children(constraints))
    return uris[0].decode("ascii")


def signed_by(certificate: x509.Certificate, by: x509.Certificate) -> bool:
    """By the key alone: which spellings of a name are the same is not to be decided twice.

    OpenSSL compares issuer and subject without case (RFC 5280 7.1, RFC 4518).
    """
    try:
        digest = certificate.signature_hash_algorithm
        signer = by.public_key()
        # All that signs here has such a key (`signers`).
        if not isinstance(signer, ec.EllipticCurvePublicKey) or digest is None:
            return False
        signer.verify(certificate.signature, certificate.tbs_certificate_bytes, ec.ECDSA(digest))
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        return False
    return True


def check_accepted(peer: svid.VerifiedPeer, chain: Sequence[bytes]) -> None:
    uri = check_leaf(chain[0])
    matched = SPIFFE_ID.fullmatch(uri)
    assert matched
    assert str(peer.id) == uri
    assert len(uri) <= spiffe.MAX_ID_BYTES
    root, _, foreign = signers()
    anchor = {"cluster.local": root, "foreign.example": foreign}[matched[1]]
    assert peer.id.trust_domain == matched[1]
    leaf = x509.load_der_x509_certificate(chain[0])
    now = dt.datetime.fromtimestamp(NOW, tz=dt.UTC)
    assert leaf.not_valid_before_utc <= now
    assert now < leaf.not_valid_after_utc + dt.timedelta(seconds=1)
    assert peer.not_after <= leaf.not_valid_after_utc.timestamp()
    assert peer.subject.isprintable()
    # Whoever signed the leaf leads to the anchor of its own domain, link by link.
    others = [x509.load_der_x509_certificate(der) for der in chain[1:]]
    reached, grew = {leaf}, True
    while grew and not any(signed_by(each, anchor.certificate) for each in reached):
        above = {
            upper
            for upper in others
            for lower in reached
            if upper not in reached and signed_by(lower, upper)
        }
        grew = bool(above)
        reached |= above
    assert any(signed_by(each, anchor.certificate) for each in reached)


def test_one_input(data: bytes) -> None:
    """Try one input. An AssertionError is a finding, and so is any other exception."""
    chain = [
        der if not signer else signed(der, signer - 1) for signer, der in entries(data[:MOST_BYTES])
    ]
    problem = ""
    try:
        peer = svid.validate(chain, bundles(), NOW)
    except svid.SvidError as error:
        problem = str(error)
    else:
        check_accepted(peer, chain)
    assert problem.isprintable()
    assert len(problem) < 1000
    for _, der in entries(data[:MOST_BYTES])[:1]:
        check_text(der[:300].decode("latin-1"))


def check_text(text: str) -> None:
    """Any text is the ID that it spells, or none."""
    for spelled in (text, f"spiffe://cluster.local/{text}", f"spiffe://{text}/a"):
        matched = SPIFFE_ID.fullmatch(spelled)
        problem = ""
        try:
            identity = spiffe.SpiffeId.parse(spelled)
        except spiffe.SpiffeIdError as error:
            problem = str(error)
        else:
            assert str(identity) == spelled
            assert bool(matched) == bool(identity.path)
        assert problem.isprintable()
        assert not (matched and problem)


# --- mutation: of elements, not of bytes -------------------------------------------------------

CONTENTS: Final = (
    *(
        b"",
        b"\0",
        b"\xff",
        b"\x05\xa0",
        b"\x03\x07\x80",
        b"\x02\x01\x06",
        b"spiffe://cluster.local",
    ),
    *(b"spiffe://cluster.local/a", b"spiffe://foreign.example/a", b"spiffe://CLUSTER.local/a"),
    *(b"spiffe://cluster.local/a\0b", b"spiffe://cluster.local/..", b"https://cluster.local/a"),
    *(b"spiffe://cluster.local/" + b"a" * 3000, b"500101000000Z", b"20500101000000Z"),
    *(bytes.fromhex(name) for name in (_SAN, _USAGE, _CONSTRAINTS, "551d25", "551d1e", "551d24")),
    *(bytes.fromhex(name) for name in ("2b06010505070301", "2b06010505070302", "551d2500")),
)
TAGS: Final = (1, 2, 3, 4, 5, 6, 12, 19, 22, 23, 24, 0x30, 0x31, 0x80, 0x82, 0x86, 0x87, 0xA0, 0xA3)


def mutated_der(der: bytes, chance: random.Random) -> bytes:
    try:
        roots = tree(der)
    except (ValueError, IndexError):
        broken: bytes = atheris.Mutate(der, len(der) + 8)
        return broken
    top = Node(0, parts=roots)
    nodes = list(top.all())[1:]
    if not nodes:
        return der
    at = chance.choice(nodes)
    holders = [node for node in (top, *nodes) if node.parts]
    holder = chance.choice(holders)
    parts = holder.parts or []
    match chance.randrange(7):
        case 0:
            at.tag = chance.choice(TAGS)
        case 1:
            parts.pop(chance.randrange(len(parts)))
        case 2:
            twin = chance.choice(parts)
            parts.insert(chance.randrange(len(parts) + 1), Node(twin.tag, twin.inside()))
        case 3:
            parts.insert(chance.randrange(len(parts) + 1), Node(at.tag, at.inside()))
        case 4 if at.parts is None and at.content:
            at.content = atheris.Mutate(at.content, len(at.content) + 4)
        case 5:
            at.parts, at.content = None, chance.choice(CONTENTS)
        case _:
            chance.shuffle(parts)
    return b"".join(node.der() for node in roots)


def mutate(data: bytes, max_size: int, seed: int) -> bytes:
    """Change one certificate, who signs it, or their order."""
    chance = random.Random(seed)  # noqa: S311 - a fuzzer's chance must be repeatable
    parts = entries(data) or entries(chance.choice(seeds()))
    at = chance.randrange(len(parts))
    signer, der = parts[at]
    match chance.randrange(10):
        case 0:
            parts[at] = (chance.randrange(4), der)
        case 1:
            parts.insert(at, chance.choice(parts))
        case 2:
            parts.pop(at)
        case 3:
            parts += entries(chance.choice(seeds()))
        case _:
            parts[at] = (signer, mutated_der(der, chance))
    return packed(parts)[:max_size]


def main() -> None:
    atheris.Setup(sys.argv, test_one_input, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
