"""The files source as the agent relies on it: silence never means "nothing is configured"."""

from __future__ import annotations

import asyncio
from pathlib import Path

from nodeagent.sources import FilesSource

WORKLOAD = """
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {name: a, namespace: default, annotations: {nodeagent.io/netns: a}}
spec: {address: 10.0.0.1}
"""


def test_a_directory_that_appears_late_is_never_seen_empty(tmp_path: Path) -> None:
    async def main() -> None:
        directory = tmp_path / "mesh.d"
        states = FilesSource(directory, "node-1").states()
        async with asyncio.timeout(20):
            first = await anext(states)
            assert first.problems
            made = tmp_path / "made"
            made.mkdir()
            (made / "a.yaml").write_text(WORKLOAD)
            made.rename(directory)
            second = await anext(states)
            assert len(second.documents) == 1
            await states.aclose()

    asyncio.run(main())
