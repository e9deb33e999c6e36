"""Fuzzer of the configuration: YAML, its schema, and what becomes of the documents.

Invariant: whatever bytes a file holds, the loader answers with documents, errors and warnings, each
error and warning one printable line with a place within the file, and twice the same; and whatever
documents it took, the mesh builds from them, and ztunnel applies, frame by frame: nothing that the
loader lets through is refused behind it.

Input: a file of the configuration. It stands beside a workload of this node, so that policies for
namespace foo concern somebody.
"""

from __future__ import annotations

import functools
import random
import re
import sys
from pathlib import Path
from typing import Final

if __name__ == "__main__":
    import atheris

    with atheris.instrument_imports(include=["nodeagent", "ztunnel"]):
        from nodeagent import api, mesh, published
        from nodeagent.settings import Settings, for_tunnel
        from ztunnel import protocol, state
else:
    from nodeagent import api, mesh, published
    from nodeagent.settings import Settings, for_tunnel
    from ztunnel import protocol, state

MOST_BYTES: Final = 16 * 1024
CORPUS: Final = Path(__file__).parent / "corpus" / "documents"
SETTINGS: Final = Settings(node="node-1", node_addresses=("192.0.2.1",))

WORKLOAD: Final = b"""
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata:
  name: fuzzed
  namespace: foo
  labels: {app: httpbin, version: v1}
  annotations: {nodeagent.io/netns: fuzzed}
spec: {address: 10.250.0.1}
"""


@functools.cache
def workload() -> tuple[api.Document, ...]:
    loaded = api.load(WORKLOAD, "workload.yaml", SETTINGS.node)
    assert not loaded.errors
    return loaded.documents


def check_loaded(loaded: api.Loaded, data: bytes) -> None:
    lines = data.count(b"\n") + data.count(b"\r") + 2
    problems: list[api.ConfigError | api.ConfigWarning] = [*loaded.errors, *loaded.warnings]
    for found in problems:
        assert found.reason
        assert str(found).isprintable()
        assert 0 <= found.line <= lines
        assert found.column >= 0


def check_applied(documents: tuple[api.Document, ...]) -> None:
    built = mesh.build((*workload(), *documents), SETTINGS)
    for warning in built.warnings:
        assert warning.isprintable()
    resources, _ = mesh.diff(None, built)
    plan = published.plan(None, {published.key_of(each): each for each in resources}, 1)
    decoder = protocol.FrameDecoder()
    upserts: list[protocol.Resource] = []
    for part in plan.parts:
        (frame,) = decoder.feed(protocol.encode(part.update))
        assert isinstance(frame.message, protocol.Update)
        upserts += frame.message.upserts
    change = state.Change(1, True, tuple(upserts), (), for_tunnel(SETTINGS))
    applied = state.apply(state.EMPTY, change)
    assert applied.workloads == built.workloads
    assert applied.policies.keys() == built.policies.keys()


def test_one_input(data: bytes) -> None:
    """Try one input. An AssertionError is a finding, and so is any other exception."""
    data = data[:MOST_BYTES]
    loaded = api.load(data, "fuzzed.yaml", SETTINGS.node)
    assert api.load(data, "fuzzed.yaml", SETTINGS.node) == loaded
    check_loaded(loaded, data)
    check_applied(loaded.documents)


# --- mutation: of words, not of bytes ----------------------------------------------------------

_TOKEN: Final = re.compile(rb"[A-Za-z0-9_./*-]+|\s+|[^A-Za-z0-9_\s]")

WORDS: Final = (
    *(
        b"*",
        b"a*b",
        b"**",
        b"cluster.local/*",
        b"*/sa/sleep",
        b"spiffe://a/b",
        b"set:a",
        b"set:a/b",
    ),
    *(b"0.0.0.0/0", b"::/0", b"::ffff:10.0.0.0/104", b"10.0.0.1/33", b"010.0.0.1", b"fe80::1%a"),
    *(
        b"0",
        b"65535",
        b"65536",
        b"-1",
        b"1e3",
        b"0x1F",
        b"22:22",
        b"null",
        b"~",
        b"yes",
        b"{}",
        b"[]",
    ),
    *(
        b"&a",
        b"*a",
        b"<<",
        b"!!str",
        b"---",
        b"...",
        b"'",
        b'"',
        b"|",
        b">",
        b"#",
        b"?",
        b"\t",
        b"\0",
    ),
    *(
        b"\xe2\x80\xa8",
        b"\xef\xbb\xbf",
        b"\xff",
        b"\\u0000",
        b"\\n",
        b"\n",
        b"  ",
        b": ",
        b"- ",
        b",",
    ),
    *(b"rules", b"from", b"source", b"to", b"operation", b"when", b"key", b"values", b"notValues"),
    *(b"principals", b"notPrincipals", b"namespaces", b"serviceAccounts", b"ipBlocks", b"ports"),
    *(b"ALLOW", b"DENY", b"AUDIT", b"CUSTOM", b"STRICT", b"source.ip", b"destination.port"),
)


@functools.cache
def seeds() -> tuple[bytes, ...]:
    return tuple(path.read_bytes() for path in sorted(CORPUS.iterdir()))


def mutate(data: bytes, max_size: int, seed: int) -> bytes:
    """Change, double, move or drop some words, or bytes."""
    chance = random.Random(seed)  # noqa: S311 - a fuzzer's chance must be repeatable
    if chance.random() < 0.2:
        return bytes(atheris.Mutate(data, max_size))
    tokens = _TOKEN.findall(data) or _TOKEN.findall(chance.choice(seeds()))
    for _ in range(chance.randrange(1, 4)):
        at = chance.randrange(len(tokens) + 1)
        match chance.randrange(5):
            case 0:
                tokens[at : at + 1] = [chance.choice(WORDS)]
            case 1:
                tokens.insert(at, chance.choice(WORDS))
            case 2 if len(tokens) > 1:
                del tokens[at - 1 : at + chance.randrange(3)]
            case 3:
                piece = _TOKEN.findall(chance.choice(seeds()))
                start = chance.randrange(len(piece))
                tokens[at:at] = piece[start : start + chance.randrange(1, 30)]
            case _:
                tokens[at:at] = tokens[at : at + chance.randrange(1, 30)]
    return b"".join(tokens)[:max_size]


def main() -> None:
    atheris.Setup(sys.argv, test_one_input, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
