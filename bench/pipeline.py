"""From an edit to its effect, stage by stage, in a mesh of 100,000 workloads and 10,000 policies.

This module owns the command `python bench/pipeline.py`. It runs the stages of both daemons one
after the other in one process, without sockets: what is read, built, told and applied is what they
read, build, tell and apply. For edits of each kind it prints the medians: of the CPU of each stage,
which is what an idle machine would take; of the whole by the clock, with the waits for files to
settle; and how long an event loop beside them was kept from its turn. `meshbench.edit` measures the
daemons themselves.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from meshbench import enormous
from nodeagent import mesh, published
from nodeagent.daemon import SWITCH_SECONDS
from nodeagent.mesh import MeshState
from nodeagent.settings import Settings
from nodeagent.sources import FilesSource, LastGood
from ztunnel import protocol
from ztunnel.state import EMPTY, Change, State, apply

EDITS: Final = 7
WHOLE: Final = "all, by the clock"
BEAT_SECONDS: Final = 0.001

HERE: Final = """\
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata:
  name: called
  namespace: default
  annotations: {nodeagent.io/netns: called}
spec: {address: 10.99.0.1}
"""


class Node:
    """What both daemons of a node hold."""

    def __init__(self) -> None:
        self._builder = mesh.Builder(Settings(node="n1"))
        self._mesh = MeshState()
        self._published: published.State = {}
        self._told: published.State | None = None
        self.state: State = EMPTY
        self._version = 0

    async def take(self, documents: tuple[object, ...]) -> dict[str, float]:
        """Put documents in force; return the seconds of each stage."""
        spent: dict[str, float] = {}
        self._version += 1
        with _spent(spent, "build"):
            found = await asyncio.to_thread(self._builder.build, documents)  # type: ignore[arg-type]  # documents they are
        with _spent(spent, "diff"):
            upserts, removals = mesh.diff(self._mesh, found)
        self._mesh = found
        with _spent(spent, "plan"):
            state = published.changed(self._published, upserts, removals)
            self._published = self._published if state is None else state
            keys = published.touched(upserts, removals)
            plan = await asyncio.to_thread(
                published.plan, self._told, self._published, self._version, keys
            )
        with _spent(spent, "wire"):
            parts = await asyncio.to_thread(_over_the_wire, plan)
        with _spent(spent, "apply"):
            change = Change(
                version=self._version,
                reset=self._told is None,
                upserts=tuple(itertools.chain.from_iterable(part.upserts for part in parts)),
                removals=tuple(itertools.chain.from_iterable(part.removals for part in parts)),
            )
            self.state = await asyncio.to_thread(apply, self.state, change)
        self._told = self._published
        return spent


@contextlib.contextmanager
def _spent(into: dict[str, float], stage: str) -> Iterator[None]:
    begun = time.process_time()
    yield
    into[stage] = time.process_time() - begun


def _over_the_wire(plan: published.Change) -> list[protocol.Update]:
    decoder = protocol.FrameDecoder()
    found: list[protocol.Update] = []
    for part in plan.parts:
        for frame in decoder.feed(protocol.encode(part.update)):
            if isinstance(frame.message, protocol.Update):
                found.append(frame.message)
    return found


class Beat:
    """How long an event loop was kept from its turn, at most."""

    def __init__(self) -> None:
        self.worst = 0.0

    async def run(self) -> None:
        while True:
            before = time.perf_counter()
            await asyncio.sleep(BEAT_SECONDS)
            self.worst = max(self.worst, time.perf_counter() - before - BEAT_SECONDS)


def _edits(folder: Path) -> Iterator[tuple[str, Path, str]]:
    """Yield the kind of each edit, the file and its new text."""
    name, _ = enormous.edited(0, 0)
    for revision in range(1, EDITS + 1):
        yield "one policy", folder / name, enormous.edited(0, revision)[1]
    workloads, text = next(iter(enormous.files()))
    for revision in range(1, EDITS + 1):
        yield "one workload's label", folder / workloads, text.replace(
            "version: v1", f"version: r{revision}", 1
        )  # fmt: skip
    sets = folder / "sets.yaml"
    for revision in range(1, EDITS + 1):
        yield "one identity set", sets, (
            "apiVersion: nodeagent.io/v1alpha1\nkind: IdentitySet\n"
            f"metadata: {{name: s}}\nspec: {{identities: [cluster.local/ns/n1/sa/a{revision}]}}\n"
        )  # fmt: skip


async def main() -> None:
    sys.setswitchinterval(SWITCH_SECONDS)
    gc.freeze()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made) / "mesh.d"
        folder.mkdir(mode=0o755)
        (folder / "here.yaml").write_text(HERE)
        for name, text in enormous.files():
            (folder / name).write_text(text)
        clock = time.perf_counter()
        source = FilesSource(folder, "n1", LastGood(Path(made) / "state" / "last-good", folder))
        states = source.states()
        beat = Beat()
        beating = asyncio.create_task(beat.run())
        spent: dict[str, float] = {}
        with _spent(spent, "read"):
            state = await anext(states)
        assert len(state.documents) >= enormous.WORKLOADS + enormous.POLICIES
        assert not state.problems
        node = Node()
        spent |= await node.take(state.documents)
        _row("from nothing", [spent | {WHOLE: time.perf_counter() - clock}], beat)
        for kind, edits in itertools.groupby(_edits(folder), key=lambda edit: edit[0]):
            beat.worst = 0.0
            found = []
            for _, path, text in edits:
                new = path.with_name(f".{path.name}.new")
                new.write_text(text)
                clock = time.perf_counter()
                spent = {}
                with _spent(spent, "read"):
                    new.replace(path)
                    state = await anext(states)
                spent |= await node.take(state.documents)
                found.append(spent | {WHOLE: time.perf_counter() - clock})
            _row(kind, found, beat)
        beating.cancel()
        await states.aclose()
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"\nmost memory of this process, both daemons' in one: {most:,.0f} MiB")


def _row(kind: str, found: list[dict[str, float]], beat: Beat) -> None:
    if kind == "from nothing":
        print(f"| ms | {' | '.join(found[0])} | loop kept waiting |")
        print("|---" * (len(found[0]) + 2) + "|")
    medians = [statistics.median(each[stage] for each in found) for stage in found[0]]
    shown = " | ".join(f"{1e3 * each:,.1f}" for each in (*medians, beat.worst))
    print(f"| {kind} | {shown} |", flush=True)


if __name__ == "__main__":
    asyncio.run(main())
