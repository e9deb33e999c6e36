"""The manager with the embedded CA on the machine's own clocks, and the tunnel that uses both."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from nodeagent.identity import EmbeddedCa, IdentityManager, IdentityPhase
from ztunnel import protocol, svid, tls
from ztunnel.spiffe import SpiffeId

SLEEP = SpiffeId.workload("cluster.local", "default", "sleep")
HTTPBIN = SpiffeId.workload("cluster.local", "default", "httpbin")
STRANGER = SpiffeId.workload("cluster.local", "default", "stranger")


def test_credentials_reach_the_tunnel_and_prove_the_identities(tmp_path: Path) -> None:
    credentials: dict[str, protocol.Credential] = {}
    bundles: dict[str, tuple[bytes, ...]] = {}
    bound = {SLEEP, HTTPBIN}

    async def play() -> None:
        ready = asyncio.Event()

        def heard() -> None:
            if len(credentials) == 2 and bundles:
                ready.set()

        def on_credential(credential: protocol.Credential) -> None:
            credentials[credential.uid] = credential
            heard()

        def on_bundle(bundle: protocol.TrustBundle) -> None:
            bundles[bundle.uid] = bundle.roots
            heard()

        manager = IdentityManager(
            EmbeddedCa(
                tmp_path / "ca",
                "cluster.local",
                ttl_seconds=3600,
                permitted=bound.__contains__,
            ),
            on_credential=on_credential,
            on_bundle=on_bundle,
            on_removed=credentials.__delitem__,
            on_bundle_removed=bundles.__delitem__,
        )
        manager.want([SLEEP, HTTPBIN, STRANGER])
        running = asyncio.create_task(manager.run())
        async with asyncio.timeout(30):
            await ready.wait()
        phases = {each.identity: each.phase for each in manager.status().identities}
        assert phases[str(SLEEP)] is IdentityPhase.VALID
        assert phases[str(STRANGER)] is not IdentityPhase.VALID
        manager.want([HTTPBIN])
        assert list(credentials) == [str(HTTPBIN)]
        assert manager.status().ready
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    asyncio.run(play())
    credential = credentials[str(HTTPBIN)]
    assert svid.validate(credential.chain, bundles, time.time()).id == HTTPBIN
    tls.build(credential.chain, credential.key, bundles["cluster.local"])
