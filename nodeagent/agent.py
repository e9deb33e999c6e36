"""The agent: joins configuration, namespaces, capture, identities and ztunnel.

This module owns the flow between the parts, which `build` makes. It promises that what closes is in
force in the kernel before ztunnel hears of a change and what opens only after ztunnel has it in
force; that nothing is taken out of the mesh because something could not be read; that one pod's
trouble stays its own; and that ending the daemon leaves every pod captured. Decisions are in
`reconcile`, `mesh` and `policy`; effects on a pod in `podkeeper`.

Theory of operation: four loops, each of which waits for one thing only. Source states become a
mesh; its difference goes to ztunnel and its bindings to the watcher and the keepers. The watcher's
namespaces go to the keepers, one task each. SVIDs and bundles go to ztunnel as they come. A tick
loosens what may be open by now and asks ztunnel how it is.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Final, Protocol

import msgspec
import structlog

from nodeagent import mesh, reconcile, status
from nodeagent.admin import Configuration, Metrics, Status
from nodeagent.admin.model import PodState
from nodeagent.api import Document
from nodeagent.capture import Capture, Enrolment, Listeners
from nodeagent.channel import close_all
from nodeagent.control import ControlServer, QueryError
from nodeagent.descriptors import KeptDescriptors
from nodeagent.flows import Recorder
from nodeagent.identity import IdentityManager, Provider
from nodeagent.observe.captured import captured, taken_over
from nodeagent.observe.graph import Place
from nodeagent.podkeeper import PodKeeper, PodView
from nodeagent.pods import Appeared, Change, NetnsHandle, Unusable
from nodeagent.progress import Progress
from nodeagent.settings import Settings, for_tunnel
from nodeagent.sources import Source, SourceState
from nodeagent.status import Facts, Now, OwnStatus
from ztunnel import protocol
from ztunnel.spiffe import SpiffeId, SpiffeIdError

__all__ = ["Agent", "Parts"]

TIGHTEN_SECONDS: Final = 2.0
"""For the pods' guards to close what a change closes, before ztunnel is told all the same: it
judges every connection by itself, and one stuck pod must not hold up a policy for the others."""

SNAPSHOT_SECONDS: Final = 20.0
"""For the pods and certificates that a ztunnel holds to be found again, before it is told a state
that lacks them. Longer than a cold start with hundreds of pods; a policy change waits meanwhile."""

TICK_SECONDS: Final = 5.0
TAKEN_OVER: Final = timedelta(seconds=60)
"""From the start, for what an earlier run has captured to be taken over from a running ztunnel: it
is captured all the time, and fails to be enrolled for some seconds of it."""

OWN_STATUS_SECONDS: Final = 1.0
"""Age at which ztunnel's word on itself is asked for anew."""

log = structlog.get_logger()


class Watcher(Protocol):
    """Who says which namespaces exist (`pods.PodWatcher`)."""

    def set_bindings(self, bindings: Mapping[str, str]) -> None: ...

    def changes(self) -> AsyncIterator[Change]: ...


class Parts(msgspec.Struct, frozen=True):
    """What an agent is made of. `provider` is told how to ask what is bound to this node."""

    source: Source
    source_name: str
    capture: Capture
    watcher: Watcher
    provider: Callable[[Callable[[SpiffeId], bool]], Provider]
    kept: KeptDescriptors
    flows: Recorder
    version: str


class Agent:
    """One node. `run` works until it is cancelled; everything else may be called meanwhile."""

    def __init__(self, settings: Settings, parts: Parts) -> None:
        self.settings = settings
        self.parts = parts
        self.started = datetime.now(UTC)
        self.loaded = asyncio.Event()
        """Set once a configuration is in force."""
        self.instruments = Metrics(parts.version)
        self.control = ControlServer(
            for_tunnel(settings),
            on_held=self._held,
            before_snapshot=self._before_snapshot,
            on_change=self.progressed,
            on_drained=self.instruments.drained,
            on_flows=parts.flows.put,
            observe_seconds=self.instruments.change_seconds.observe,
            clock=time.monotonic,
            # Grows over restarts even if the clock does not: a reset takes any version.
            first_version=time.time_ns() // 1_000_000,
        )
        self.identities = IdentityManager(
            parts.provider(self._is_bound),
            on_credential=lambda credential: self._publish((credential,)),
            on_bundle=lambda bundle: self._publish((bundle,)),
            on_removed=lambda uid: self._withdraw("credential", uid),
            on_bundle_removed=lambda uid: self._withdraw("trust_bundle", uid),
        )
        self._progress = Progress()
        self._keepers: dict[str, PodKeeper] = {}
        self._strays: dict[str, NetnsHandle] = {}
        self._left: dict[str, list[str]] = {}
        self._tasks: asyncio.TaskGroup | None = None
        self._builder = mesh.Builder(settings)
        self._mesh = mesh.MeshState()
        self._in_force: int | None = None
        """The version with which ztunnel has in force what the keepers want."""
        self._identities: frozenset[SpiffeId] = frozenset()
        self._documents: SourceState | None = None
        self._applied: SourceState | None = None
        self._watched: dict[str, str] | None = None
        self._recovered: frozenset[str] = frozenset()
        self._own = OwnStatus()
        self._own_at = -OWN_STATUS_SECONDS
        self._asking = asyncio.Lock()

    # --- loops -----------------------------------------------------------------------------

    async def recover(self) -> None:
        """Find what an earlier run has enrolled. Call before `run`. Raises CaptureError."""
        for pod in await self.parts.capture.recover():
            self._left.setdefault(reconcile.workload_of(pod.uid), []).append(pod.uid)
            log.info("pod of an earlier run found", pod=pod.uid, listening=pod.listening)
        self._recovered = frozenset(self._left)
        self.parts.flows.resume([uid for found in self._left.values() for uid in found])

    async def run(self, listening: socket.socket) -> None:
        """Work until cancelled. `listening` is the control socket."""
        self.parts.flows.start()
        try:
            async with asyncio.TaskGroup() as tasks:
                self._tasks = tasks
                tasks.create_task(self.control.run(listening), name="control")
                tasks.create_task(self.identities.run(), name="identities")
                tasks.create_task(self._follow_source(), name="source")
                tasks.create_task(self._follow_namespaces(), name="namespaces")
                tasks.create_task(self._tick(), name="tick")
        finally:
            for handle in self._strays.values():
                handle.close()
            self._strays.clear()

    async def settled(self) -> None:
        """Wait until a configuration is in force and every pod has been tried once."""
        await self.loaded.wait()
        for keeper in list(self._keepers.values()):
            await keeper.settled.wait()

    async def _follow_source(self) -> None:
        async for state in self.parts.source.states():
            await self._take(state)

    async def _take(self, state: SourceState) -> None:
        self._documents = state
        if not self.loaded.is_set() and state.problems and not state.documents:
            # Nothing could be read: an empty mesh would take every pod out of it.
            log.error("no configuration yet", source=self.parts.source_name)
            return
        found, upserts, removals = await asyncio.to_thread(self._build, state.documents)
        for warning in set(found.warnings) - set(self._mesh.warnings):
            log.warning("configuration", warning=warning)
        known = set(self._mesh.problems)
        for problem in found.problems:
            if problem not in known:
                log.error("configuration", problem=str(problem))
        wanted = reconcile.wanted_pods(
            {uid: binding.netns for uid, binding in found.bindings.items()},
            found.workloads,
            found.policies,
            found.authorizations.values(),
        )
        # From here to the end ztunnel has an older state in force than what is wanted.
        self._in_force = None
        await self._tighten(wanted)
        self._mesh, self._applied = found, state
        version = self.control.apply(upserts, removals)
        self._want_identities(wanted.values())
        self._want_pods(wanted, complete=not state.problems)
        self._in_force = version
        self.loaded.set()
        self.progressed()

    def _build(
        self, documents: Iterable[Document]
    ) -> tuple[mesh.MeshState, tuple[mesh.Resource, ...], tuple[protocol.Removal, ...]]:
        """On a worker thread: return what `documents` mean, and how that differs from before."""
        found = self._builder.build(documents)
        return found, *mesh.diff(self._mesh, found)

    async def _tighten(self, wanted: dict[str, reconcile.Wanted]) -> None:
        closing = [
            self._spawn(keeper.tighten(wanted[uid].closed))
            for uid, keeper in self._keepers.items()
            if uid in wanted
        ]
        if closing:
            _, late = await asyncio.wait(closing, timeout=TIGHTEN_SECONDS)
            if late:
                log.error("pods do not close in time; ztunnel is told all the same", pods=len(late))

    def _want_identities(self, pods: Iterable[reconcile.Wanted]) -> None:
        identities: set[SpiffeId] = set()
        for pod in pods:
            try:
                identities.add(SpiffeId.parse(pod.identity))
            except SpiffeIdError as error:
                log.warning("identity cannot be used", workload=pod.workload, error=str(error))
        self._identities = frozenset(identities)
        self.identities.want(identities)

    def _want_pods(self, wanted: dict[str, reconcile.Wanted], *, complete: bool) -> None:
        for uid, pod in wanted.items():
            self._keeper(uid).want(pod)
        for uid in self._keepers.keys() - wanted.keys():
            self._keepers[uid].want(None)
        if complete:
            # Only now is "not bound" certain for what an earlier run has left.
            for uid in self._left.keys() - wanted.keys():
                self._keeper(uid).want(None)
            self.parts.kept.retain(lambda pod: reconcile.workload_of(pod) in wanted)
        self.parts.watcher.set_bindings({uid: pod.netns for uid, pod in wanted.items()})

    def _keeper(self, workload: str) -> PodKeeper:
        keeper = self._keepers.get(workload)
        if keeper is None or keeper.finished:
            keeper = PodKeeper(workload, self.parts.capture, self.control, self, time.monotonic)
            keeper.left(tuple(self._left.pop(workload, ())))
            if (stray := self._strays.pop(workload, None)) is not None:
                keeper.appeared(stray)
            self._keepers[workload] = keeper
            _ = self._spawn(self._keep(keeper))
        return keeper

    async def _keep(self, keeper: PodKeeper) -> None:
        await keeper.run()
        if self._keepers.get(keeper.workload) is keeper:
            del self._keepers[keeper.workload]
            self.instruments.forget(keeper.workload)
        self.progressed()

    def _spawn(self, work: Awaitable[None]) -> asyncio.Task[None]:
        assert self._tasks is not None  # noqa: S101 - only run()'s own loops come here
        return self._tasks.create_task(_guarded(work))

    async def _follow_namespaces(self) -> None:
        async for change in self.parts.watcher.changes():
            self._place(change)

    def _place(self, change: Change) -> None:
        keeper = self._keepers.get(change.workload)
        if isinstance(change, Appeared):
            if keeper is None or keeper.finished:
                # The watcher will not report it again, and a keeper may come yet.
                self._strays[change.workload] = change.netns
            else:
                keeper.appeared(change.netns)
            return
        if (stray := self._strays.pop(change.workload, None)) is not None:
            stray.close()
        if keeper is None:
            return
        if isinstance(change, Unusable):
            log.warning("pod: no namespace", workload=change.workload, error=change.error)
            keeper.unusable(change.error, absent=change.absent)
        else:
            keeper.gone()

    async def _tick(self) -> None:
        while True:
            seen = self.progress
            acknowledged = self.control.status.acknowledged_version
            if self._in_force is not None and acknowledged >= self._in_force:
                for keeper in self._keepers.values():
                    keeper.permit()
            self._watch()
            await self._ask()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TICK_SECONDS):
                    await self.progress_after(seen)

    def _watch(self) -> None:
        """Tell the recorder whose callers cannot pass by unseen."""
        keepers = self._keepers.values()
        if not self.loaded.is_set() or not all(keeper.settled.is_set() for keeper in keepers):
            return
        views = self._views()
        late = datetime.now(UTC) - self.started > TAKEN_OVER
        if self._watched is None and not late and not taken_over(self._recovered, views):
            return
        self._watched = captured(self._watched or {}, views, time.monotonic())
        self.parts.flows.watch(self._watched)

    # --- what the parts call back ----------------------------------------------------------

    def progressed(self) -> None:
        """Wake whoever waits for something to become ready."""
        self._progress.made()

    @property
    def progress(self) -> int:
        """Grows with every change of what readiness depends on."""
        return self._progress.count

    async def progress_after(self, seen: int) -> None:
        """Return once `progress` is no longer `seen`."""
        await self._progress.after(seen)

    def _is_bound(self, identity: SpiffeId) -> bool:
        return identity in self._identities

    def _publish(self, resources: tuple[protocol.Resource, ...]) -> None:
        self.control.apply(resources)
        self.progressed()

    def _withdraw(self, kind: str, uid: str) -> None:
        self.control.apply((), (protocol.Removal(kind, uid),))
        self.progressed()

    def _held(self, pod: protocol.HeldPod, fds: tuple[int, int, int]) -> None:
        keeper = self._keepers.get(reconcile.workload_of(pod.uid))
        enrolled = keeper.view.enrolled if keeper is not None else None
        if enrolled is not None and enrolled.uid == pod.uid:
            close_all(fds)
            return
        self.parts.kept.offer(pod.uid, Listeners(*fds))
        if keeper is not None:
            keeper.wake()

    async def _before_snapshot(self, held: frozenset[str]) -> None:
        """Wait until the state names what this ztunnel holds, as far as that is still wanted."""
        await self.loaded.wait()
        try:
            async with asyncio.timeout(SNAPSHOT_SECONDS):
                while not self._names(held):
                    await self.progress_after(self.progress)
        except TimeoutError:
            log.warning("ztunnel is told a state that lacks pods or certificates which it holds")

    def _names(self, held: frozenset[str]) -> bool:
        if not all(keeper.settled.is_set() for keeper in self._keepers.values()):
            return False
        for uid in held:
            keeper = self._keepers.get(reconcile.workload_of(uid))
            wanted = keeper.view.wanted if keeper is not None else None
            if keeper is None or wanted is None or uid in self.control.pods:
                continue
            if keeper.view.state is not PodState.WAITING:
                return False
        identities = {
            view.wanted.identity for view in self._views().values() if view.wanted is not None
        }
        return not held or all(("credential", each) in self.control.state for each in identities)

    # --- Owner of the keepers --------------------------------------------------------------

    def adoptable(self, uid: str) -> Listeners | None:
        return self.parts.kept.listeners(uid)

    def enrolled(self, enrolment: Enrolment) -> None:
        self.parts.kept.keep(enrolment)
        self.progressed()

    def removed(self, uid: str) -> None:
        self.parts.kept.forget(uid)
        self.progressed()

    def pods(self) -> int:
        return len(self._keepers)

    def repaired(self, workload: str, kind: str) -> None:
        self.instruments.repairs.labels(workload, kind).inc()

    def failed(self, workload: str) -> None:
        self.instruments.enrol_failures.labels(workload).inc()

    # --- what others ask -------------------------------------------------------------------

    async def status(self) -> Status:
        await self._ask()
        return self.picture()

    async def missing(self) -> tuple[str, ...]:
        await self._ask()
        return status.missing(self._facts())

    def picture(self) -> Status:
        """Return the status without asking anybody."""
        return status.build(self._facts(), Now(datetime.now(UTC), time.monotonic()))

    def place(self) -> Place:
        """Return whom this node knows."""
        return Place(
            workloads=self._mesh.workloads,
            services=self._mesh.services,
            pods=self.picture().pods,
            node_addresses=frozenset(self.settings.node_addresses),
        )

    def configuration(self) -> Configuration | None:
        """Return what the mesh is made of, as ztunnel was last told; None before the first time."""
        return status.configuration(self._facts(), self._applied, self._in_force)

    def _facts(self) -> Facts:
        return Facts(
            settings=self.settings,
            version=self.parts.version,
            started=self.started,
            loaded=self.loaded.is_set(),
            source=self.parts.source_name,
            documents=self._documents,
            warnings=self._mesh.warnings,
            unresolved=self._mesh.problems,
            unenforced=self._mesh.unenforced,
            policies=self._mesh.policies,
            authorizations=self._mesh.authorizations,
            pods=self._views(),
            identities=self.identities.status(),
            ztunnel=self.control.status,
            own=self._own,
            recorder=self.parts.flows.status if self.parts.flows.enabled else None,
        )

    def _views(self) -> dict[str, PodView]:
        return {uid: keeper.view for uid, keeper in self._keepers.items()}

    async def _ask(self) -> None:
        """Ask ztunnel how it is, unless its last word is fresh."""
        async with self._asking:
            if time.monotonic() - self._own_at < OWN_STATUS_SECONDS:
                return
            try:
                body = json.loads(await self.control.query("status"))
                self._own = OwnStatus(body if isinstance(body, dict) else None)
            except (QueryError, ValueError, RecursionError) as error:
                self._own = OwnStatus(error=str(error))
            await self.control.ask_draining()
            self._own_at = time.monotonic()


async def _guarded(work: Awaitable[None]) -> None:
    """One pod's trouble, even a defect of ours, ends no other's care."""
    try:
        await work
    except Exception:
        log.exception("a pod's task failed")
