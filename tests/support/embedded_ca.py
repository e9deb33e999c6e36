"""An embedded CA with a clock that tests move, and what to ask of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest

from nodeagent.identity import Bundles, EmbeddedCa, ProviderError, Svid
from ztunnel.spiffe import SpiffeId

NOW = 1_800_000_000
DAY = 86400
SLEEP = SpiffeId.workload("cluster.local", "default", "sleep")
FILES = ("root.pem", "root-key.pem", "intermediate.pem")


class Time:
    """The wall clock of the CA under test."""

    def __init__(self) -> None:
        self.now = float(NOW)

    def __call__(self) -> float:
        return self.now


def make(
    directory: Path,
    clock: Callable[[], float] | None = None,
    *,
    trust_domain: str = "cluster.local",
    ttl: int = 3600,
    permitted: Callable[[SpiffeId], bool] = lambda _: True,
) -> EmbeddedCa:
    return EmbeddedCa(
        directory,
        trust_domain,
        ttl_seconds=ttl,
        permitted=permitted,
        wall_clock=clock or Time(),
        poll_seconds=0,
    )


def fetch(ca: EmbeddedCa, spiffe_id: SpiffeId = SLEEP) -> Svid:
    return asyncio.run(ca.fetch(spiffe_id))


def bundle(ca: EmbeddedCa) -> Bundles:
    async def first() -> Bundles:
        return await anext(ca.bundles())

    return asyncio.run(first())


def refusal(ca: EmbeddedCa, spiffe_id: SpiffeId = SLEEP) -> ProviderError:
    with pytest.raises(ProviderError) as caught:
        fetch(ca, spiffe_id)
    assert str(caught.value).isprintable()
    assert "PRIVATE" not in str(caught.value)
    return caught.value


def contents(directory: Path) -> dict[str, bytes]:
    return {each.name: each.read_bytes() for each in directory.iterdir() if each.name != "lock"}


def start_together(
    directory: str, barrier: Barrier, results: Queue[tuple[Bundles, tuple[bytes, ...]]]
) -> None:
    barrier.wait()
    ca = make(Path(directory))
    signed = fetch(ca)
    results.put((bundle(ca), signed.chain))
