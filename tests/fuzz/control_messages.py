"""Fuzzer of what comes over the seam from nodeagent: frames, descriptors, changes of the state.

Invariant: whatever bytes and descriptors come, in pieces of any size, they end in nothing worse
than the connection's end (ProtocolError, ChannelError) or a refused change (StateError), the same
for every way of cutting them; no descriptor stays open; what is held is bounded; what was decoded
encodes to what decodes to the same; and after every change the indexes are those of a state that
was built from nothing, and decisions by its policies are those that its policies give at once.

Input: frames as on the wire. The count of descriptors in a frame's header decides how many are sent
with it; in a frame longer than the limits, its low bits.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import os
import random
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import structlog

if __name__ == "__main__":
    import atheris

    with atheris.instrument_imports(include=["ztunnel"]):
        from ztunnel import address, control, policy, protocol, state
        from ztunnel.channel import Channel, ChannelError
        from ztunnel.pods import PodSockets
        from ztunnel.spiffe import SpiffeId
else:
    from ztunnel import address, control, policy, protocol, state
    from ztunnel.channel import Channel, ChannelError
    from ztunnel.pods import PodSockets
    from ztunnel.spiffe import SpiffeId

import msgspec

MOST_BYTES: Final = 64 * 1024
"""Of one input: the socket takes them without anybody reading."""

MOST_DESCRIPTORS: Final = 64
"""Of one input, for the same reason."""

structlog.configure(
    wrapper_class=structlog.make_filtering_bound_logger("critical"), cache_logger_on_first_use=False
)


def frames(data: bytes) -> Iterator[bytes]:
    """Cut `data` where a reader would, the last piece as it is."""
    at = 0
    while at < len(data):
        end = len(data)
        if len(data) - at >= protocol.HEADER.size:
            length, _ = protocol.HEADER.unpack_from(data, at)
            end = min(len(data), at + protocol.HEADER.size + length)
        yield data[at:end]
        at = end


# --- the decoder -------------------------------------------------------------------------------


def decode(pieces: Sequence[bytes]) -> tuple[list[protocol.Frame], str]:
    """Return what a decoder makes of them, and its error."""
    decoder = protocol.FrameDecoder()
    made: list[protocol.Frame] = []
    problem = ""
    try:
        for piece in pieces:
            made += decoder.feed(piece)
            held = len(decoder._splitter._buffer)
            assert held <= protocol.MAX_FRAME + protocol.HEADER.size + len(piece)
    except protocol.ProtocolError as error:
        problem = error.reason
    assert problem.isprintable()
    return made, problem


def check_decoder(data: bytes) -> list[protocol.Frame]:
    by_frame, problem = decode(list(frames(data)))
    bytewise, other = decode([data[at : at + 1] for at in range(len(data))])
    assert (bytewise, other) == (by_frame, problem)
    for frame in by_frame:
        again, none = decode([protocol.encode(frame.message, frame.fds)])
        assert not none
        assert again == [frame]
    return by_frame


# --- changes -----------------------------------------------------------------------------------


def index_of(entries: Mapping[str, Any]) -> dict[bytes, set[str]]:
    index: dict[bytes, set[str]] = {}
    for uid, entry in entries.items():
        for spelling in entry.addresses:
            index.setdefault(address.pack(spelling), set()).add(uid)
    return index


def check_state(now: state.State) -> None:
    assert {key: set(uids) for key, uids in now.by_address.items()} == index_of(now.workloads)
    assert {key: set(uids) for key, uids in now.by_vip.items()} == index_of(now.services)
    assert all(len(set(uids)) == len(uids) for uids in now.by_address.values())
    for workload in now.workloads.values():
        assert workload.identity or workload.data_plane is protocol.DataPlane.TCP
    for kind in ("workloads", "services", "policies", "authorizations", "identities", "pods"):
        assert all(entry.uid == uid for uid, entry in getattr(now, kind).items())
    check_decisions(now)


CALLS: Final = tuple(
    policy.facts(
        SpiffeId.parse(f"spiffe://cluster.local/ns/default/sa/{caller}") if caller else None,
        address.pack(source),
        address.pack("10.0.0.1"),
        port,
    )
    for caller in ("", "a", "b")
    for source, port in (("10.0.0.1", 80), ("10.0.0.2", 8080), ("fd00::1", 80))
)


def check_decisions(now: state.State) -> None:
    anew = policy.updated(policy.NOWHERE, {}, now.authorizations, None)
    for workload in ("default/a", "default/b", "other/a"):
        groups, compared = now.scopes.of(workload), anew.of(workload)
        for seen in CALLS if groups or compared else ():
            assert policy.decide(groups, seen) == policy.decide(compared, seen)


def after(now: state.State, change: state.Change) -> state.State:
    """Return the state after the change, or the one before when it is refused."""
    try:
        then = state.apply(now, change)
    except state.StateError:
        check_state(now)
        return now
    check_state(then)
    return then


def check_changes(messages: Sequence[protocol.Message]) -> None:
    now = state.EMPTY
    for message in messages:
        if isinstance(message, protocol.Update):
            change = state.Change(message.version, message.reset, message.upserts, message.removals)
            now = after(now, change)


# --- the conversation --------------------------------------------------------------------------


class Applied:
    """Who puts changes in force: keeps the state, and closes what it is given."""

    def __init__(self) -> None:
        self.state = state.EMPTY

    async def apply(self, change: state.Change, sockets: Mapping[str, PodSockets]) -> str:
        pods = {entry.uid for entry in change.upserts if isinstance(entry, protocol.Pod)}
        assert sockets.keys() == pods
        for each in sockets.values():
            each.close()
        self.state = after(self.state, change)
        return ""

    def held(self) -> Sequence[tuple[protocol.HeldPod, tuple[int, int, int]]]:
        return ()


async def answer(what: str, _args: Mapping[str, str]) -> bytes:
    if what == "stats":
        return b"{}"
    raise KeyError(what)


async def converse(data: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours:
        channel = Channel(theirs)
        try:
            send(ours, data)
            ours.shutdown(socket.SHUT_WR)
            agent = control.Control("", Applied(), answer)
            with contextlib.suppress(
                protocol.ProtocolError, ChannelError, OSError, control.Dismissed
            ):
                await agent._converse(channel)
        finally:
            channel.close()


def send(ours: socket.socket, data: bytes) -> None:
    left = MOST_DESCRIPTORS
    with Path(os.devnull).open("rb") as null:
        for frame in frames(data):
            count = min(frame[4] % 32 if len(frame) > 4 else 0, left)
            left -= count
            rights = array.array("i", [null.fileno()] * count)
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)] if count else []
            ours.sendmsg([frame], ancillary)


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


_loop: Final = asyncio.new_event_loop()


def test_one_input(data: bytes) -> None:
    """Try one input. An AssertionError is a finding, and so is any other exception."""
    data = data[:MOST_BYTES]
    decoded = check_decoder(data)
    check_changes([frame.message for frame in decoded])
    before = open_descriptors()
    _loop.run_until_complete(converse(WELCOME + data))
    assert open_descriptors() == before


WELCOME: Final = protocol.encode(
    protocol.Welcome(
        protocol.PROTOCOL_VERSION, protocol.Settings("node", "cluster", "cluster.local")
    )
)

# --- mutation: of messages, not of bytes -------------------------------------------------------

Plain = dict[Any, Any] | list[Any] | str | int | bytes | bool | None

VALUES: Final[tuple[Any, ...]] = (
    *("", "10.0.0.1", "10.0.0.2", "fd00::1", "::ffff:10.0.0.1", "010.0.0.1", "fe80::1%eth0", "\0"),
    *("default/a", "default/b", "spiffe://cluster.local/ns/default/sa/a", "spiffe://x", "a" * 300),
    *("workload", "service", "pod", "HBONE", "TCP", "STRICT", "DISABLE", "stats"),
    *("*", "a*", "*a", "a*b", "default/*", "10.0.0.0/8", "10.0.0.0/33", "::/0", "080", "80"),
    *("ALLOW", "DENY", "AUDIT", "source.ip", "source.principal", "destination.port"),
    *(0, 1, -1, 80, 65535, 65536, 2**63, 2**64 - 1, True, False, None, b"", b"der", [], {}),
)


def workload(chance: random.Random) -> Plain:
    name = chance.choice("ab")
    return {
        "t": "workload",
        "uid": f"default/{name}",
        "name": name,
        "namespace": "default",
        "service_account": name,
        "trust_domain": "cluster.local",
        "identity": f"spiffe://cluster.local/ns/default/sa/{name}",
        "addresses": [f"10.0.0.{chance.randrange(4)}"],
        "data_plane": chance.choice(("HBONE", "TCP")),
    }


def service(chance: random.Random) -> Plain:
    return {
        "t": "service",
        "uid": f"default/{chance.choice('st')}",
        "hostname": "s.default.svc",
        "namespace": "default",
        "addresses": [f"10.1.0.{chance.randrange(3)}"],
        "ports": [{"t": "service_port", "number": 80, "target": 8080}],
        "endpoints": [
            {"t": "endpoint", "workload": "default/a", "address": "", "ports": {80: 8081}}
        ],
    }


def other(chance: random.Random) -> Plain:
    some: tuple[Plain, ...] = (
        {"t": "workload_policy", "uid": "default/a", "mode": "STRICT", "origin": "default"},
        {
            "t": "credential",
            "uid": "spiffe://cluster.local/ns/default/sa/a",
            "chain": [b"der"],
            "key": b"key",
            "not_before": 0,
            "not_after": 1,
        },
        {"t": "trust_bundle", "uid": "cluster.local", "roots": [b"der"]},
        {
            "t": "pod",
            "uid": chance.choice("pq"),
            "workload": "default/a",
            "addresses": ["10.0.0.1"],
            "netns_cookie": 1,
        },
    )
    return chance.choice(some)


def condition(chance: random.Random) -> Plain:
    attribute, values = chance.choice(
        (
            ("source.principal", ("cluster.local/ns/default/sa/a", "*/sa/b", "cluster*", "*")),
            ("source.namespace", ("default", "def*", "other")),
            ("source.serviceAccount", ("default/a", "*/b")),
            ("source.ip", ("10.0.0.1", "10.0.0.0/30", "::/0", "fd00::/8")),
            ("destination.port", ("80", "8080")),
        )
    )
    chosen = [chance.choice(values) for _ in range(chance.randrange(1, 3))]
    key = chance.choice(("values", "not_values"))
    return {"t": "condition", "attribute": attribute, key: chosen}


def authorization(chance: random.Random) -> Plain:
    def alternatives() -> list[Plain]:
        return [[condition(chance)] for _ in range(chance.randrange(3))]

    name = chance.choice("xyz")
    rules: list[Plain] = [
        {"t": "rule", "origin": name, "sources": alternatives(), "conditions": [condition(chance)]},
        {"t": "rule", "origin": name, "operations": alternatives()},
    ]
    return {
        "t": "authorization",
        "uid": f"AuthorizationPolicy/default/{name}",
        "action": chance.choice(("ALLOW", "DENY", "AUDIT")),
        "rules": rules[: chance.randrange(3)],
        "origin": f"default/{name}",
        "namespace": chance.choice(("", "default")),
        "workloads": chance.choice((None, [], ["default/a"], ["default/a", "default/b"])),
        "dry_run": chance.random() < 0.2,
    }


def removal(chance: random.Random) -> Plain:
    kind = chance.choice(("workload", "service", "pod", "credential", "authorization", "nothing"))
    uid = chance.choice(("default/a", "default/s", "p", "AuthorizationPolicy/default/x"))
    return {"t": "removal", "kind": kind, "uid": uid}


def flow(chance: random.Random) -> Plain:
    return {
        "key": {
            "identity": chance.choice(("", "spiffe://cluster.local/ns/default/sa/a")),
            "source": "10.0.0.1",
            "workload": "default/a",
            "arrival": chance.choice(("hbone", "plaintext", "direct")),
            "destination": "default/b",
            "address": "10.0.0.2",
            "port": chance.choice((0, 80, 65535)),
            "allowed": True,
        },
        **dict.fromkeys(("first", "last", "connections", "open", "received", "sent"), 1),
    }


def message(chance: random.Random) -> Plain:
    makers = (workload, service, authorization, other)
    upserts = [chance.choice(makers)(chance) for _ in range(chance.randrange(4))]
    update: Plain = {
        "t": "update",
        "version": chance.randrange(3),
        "upserts": upserts,
        "removals": [removal(chance) for _ in range(chance.randrange(2))],
        "reset": chance.random() < 0.2,
        "commit": chance.random() < 0.7,
    }
    rare: tuple[Plain, ...] = (
        {"t": "query", "id": 1, "what": "stats"},
        {"t": "refusal", "reason": "no"},
        {"t": "ack", "version": 1},
        {"t": "held_pod", "uid": "p", "netns_cookie": 1},
        {"t": "answer", "id": 1},
        {"t": "flows", "flows": [flow(chance)]},
    )
    return update if chance.random() < 0.8 else chance.choice(rare)


def pods_in(body: Plain) -> int:
    upserts = body.get("upserts") if isinstance(body, dict) else None
    if not isinstance(upserts, list):
        return 0
    return sum(isinstance(entry, dict) and entry.get("t") == "pod" for entry in upserts)


def framed(body: Plain, chance: random.Random) -> bytes:
    packed = msgspec.msgpack.encode(body)
    right = min(control.POD_DESCRIPTORS * pods_in(body), 255)
    count = right if chance.random() < 0.9 else chance.randrange(256)
    return protocol.HEADER.pack(len(packed), count) + packed


def changed(value: Plain, chance: random.Random) -> Plain:
    """Return `value` with one part of it changed."""
    if isinstance(value, dict) and value and chance.random() < 0.9:
        key = chance.choice(list(value))
        if chance.random() < 0.1:
            return {k: v for k, v in value.items() if k != key}
        return {**value, key: changed(value[key], chance)}
    if isinstance(value, list) and value and chance.random() < 0.9:
        at = chance.randrange(len(value))
        if chance.random() < 0.2:
            return [*value[:at], *value[at + 1 :]]
        if chance.random() < 0.2:
            return [*value, value[at]]
        return [*value[:at], changed(value[at], chance), *value[at + 1 :]]
    new: Plain = chance.choice(VALUES)
    return new


def mutate(data: bytes, max_size: int, seed: int) -> bytes:
    """Change one frame, or add, drop, repeat or move one; at times bytes."""
    chance = random.Random(seed)  # noqa: S311 - a fuzzer's chance must be repeatable
    parts = list(frames(data))
    at = chance.randrange(len(parts) + 1)
    how = chance.randrange(8)
    if how == 0 or not parts:
        parts.insert(at, framed(message(chance), chance))
    elif how == 1:
        del parts[at - 1]
    elif how == 2:
        parts.insert(chance.randrange(len(parts)), parts[at - 1])
    elif how == 3:
        mutated: bytes = atheris.Mutate(data, len(data))
        return mutated[:max_size]
    else:
        try:
            body: Plain = msgspec.msgpack.decode(parts[at - 1][protocol.HEADER.size :])
        except (msgspec.DecodeError, ValueError, RecursionError):
            body = message(chance)
        parts[at - 1] = framed(changed(body, chance), chance)
    return b"".join(parts)[:max_size]


def main() -> None:
    atheris.Setup(sys.argv, test_one_input, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
