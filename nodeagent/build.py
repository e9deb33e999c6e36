"""Builds the agent of concrete parts, and ends them.

This module owns the choice of what an agent is made of: it alone names the parts' classes. It
promises that nothing works before the agent runs, and that what is taken out of the mesh by hand
(`Built.uninstall`) is taken out by the same parts that put it in. It may not decide anything else.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Final

import msgspec

from nodeagent.agent import Agent, Parts
from nodeagent.capture import Capture, CaptureError, SkLookupCapture
from nodeagent.descriptors import KeptDescriptors
from nodeagent.flows import FILE_NAME, Recorder
from nodeagent.identity import EmbeddedCa, Provider
from nodeagent.pods import NamespaceThreads, PodWatcher
from nodeagent.sdnotify import ServiceManager, StoredDescriptor
from nodeagent.settings import Settings
from nodeagent.sources import FilesSource, LastGood
from ztunnel.spiffe import SpiffeId

__all__ = ["Built", "Removed", "build"]

LAST_GOOD_FILE: Final = "last-good"

FLOWS_SECONDS: Final = 3.0
"""For the last recorded flows to be written at the end: milliseconds, unless the disk hangs."""


class Removed(msgspec.Struct, frozen=True):
    """A pod that was taken out of the mesh, or `error` says why not."""

    uid: str
    netns: str
    error: str


class Built(msgspec.Struct, frozen=True):
    """An agent of concrete parts, and what ends with it."""

    agent: Agent
    capture: Capture
    threads: NamespaceThreads
    kept: KeptDescriptors
    flows: Recorder

    async def probe(self) -> None:
        """Return once a worker thread has answered."""
        await self.threads.run_home(int)

    async def uninstall(self, *, really: bool) -> AsyncIterator[Removed]:
        """Remove every capture of this node, or only name them. The agent must not run."""
        try:
            found = await self.capture.recover()
        except CaptureError as error:
            yield Removed("", "", str(error))
            return
        for pod in found:
            error_text = ""
            if really:
                try:
                    await self.capture.remove(pod.uid)
                except CaptureError as error:
                    error_text = str(error)
            yield Removed(pod.uid, pod.netns_path, error_text)

    async def close(self) -> None:
        """Close descriptors and threads; pods stay captured."""
        self.flows.stop(FLOWS_SECONDS)
        await self.capture.close()
        self.kept.close()
        self.threads.close()


def build(
    settings: Settings,
    version: str,
    manager: ServiceManager,
    stored: Iterable[StoredDescriptor],
) -> Built:
    """Make the agent of `settings`. Must be called on the thread, and in the network namespace,
    that the daemon's own sockets are to be in. Raises OSError.
    """
    threads = NamespaceThreads()
    capture = SkLookupCapture(settings.bpf_dir, threads)
    kept = KeptDescriptors(manager, stored)
    flows = Recorder(settings.state_dir / FILE_NAME, settings.flows, time.time, time.monotonic)
    last_good = LastGood(settings.state_dir / LAST_GOOD_FILE, settings.config_dir)

    def provider(is_bound: Callable[[SpiffeId], bool]) -> Provider:
        return EmbeddedCa(
            settings.ca_dir,
            settings.trust_domain,
            ttl_seconds=settings.svid_ttl_seconds,
            permitted=is_bound,
        )

    parts = Parts(
        source=FilesSource(settings.config_dir, settings.node, last_good),
        source_name=str(settings.config_dir),
        capture=capture,
        watcher=PodWatcher(threads),
        provider=provider,
        kept=kept,
        flows=flows,
        version=version,
    )
    return Built(Agent(settings, parts), capture, threads, kept, flows)
