"""The pods of this node: their sockets, their place in the core, and the certificates they show.

This module owns the descriptors of every captured pod, the private keys and the TLS contexts. It
promises that a change of pods and credentials is staged first, where it may fail and then leaves
everything as it was, and committed after, where it cannot; that a descriptor is closed exactly
once on every path; and that a pod whose identity was withdrawn or replaced never shows the old
certificate again (it is taken out of the core and put in anew, which cuts its connections). It may
not judge connections. Keys and their bytes appear in no message and no repr.

A credential of the core belongs to one pod, so that a pod may be served before its workload or
certificate is known: the core waits for `set_credential`, and nothing has to be taken down.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Final, NamedTuple

from ztunnel import protocol, tls
from ztunnel.state import LocalPod, State

if TYPE_CHECKING:
    from ztunnel.corelike import CoreLike

__all__ = ["Held", "Pair", "PodError", "PodSockets", "Pods", "Stage", "build_pair"]


class PodError(Exception):
    """A change of pods or credentials cannot be made; nothing has changed."""


CLOSED: Final = -1
"""In the place of a listener that has been closed."""


class PodSockets(NamedTuple):
    """Four descriptors, owned by whoever holds this: close it, or pass it on."""

    netns: int
    outbound: int
    inbound: int
    hbone: int

    @property
    def listeners(self) -> tuple[int, int, int]:
        return self.outbound, self.inbound, self.hbone

    def close(self) -> None:
        for descriptor in self:
            if descriptor != CLOSED:
                os.close(descriptor)

    def deafened(self) -> PodSockets:
        """Close the listeners; return what is left."""
        for descriptor in self.listeners:
            os.close(descriptor)
        return PodSockets(self.netns, CLOSED, CLOSED, CLOSED)

    def same_as(self, other: PodSockets) -> bool:
        """True when both hold the same open sockets (not merely equal ones)."""
        return all(
            _inode(ours) == _inode(theirs)
            for ours, theirs in zip(self.listeners, other.listeners, strict=True)
        )


def _inode(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino


class Pair(NamedTuple):
    """The two SSL_CTX of one identity by address. `keep` owns them and must outlive their use."""

    client: int
    server: int
    keep: object


def build_pair(credential: protocol.Credential, roots: tuple[bytes, ...]) -> Pair:
    """Return the contexts of `credential`. Raises tls.TlsError."""
    contexts = tls.build(credential.chain, credential.key, roots)
    return Pair(
        tls.context_pointer(contexts.client), tls.context_pointer(contexts.server), contexts
    )


Builder = Callable[[protocol.Credential, tuple[bytes, ...]], Pair]


class Held:
    """A pod as the core has it. `number` and `credential` are the core's; `added` is monotonic."""

    __slots__ = ("added", "credential", "identity", "number", "pair", "pod", "sockets")

    def __init__(
        self, number: int, credential: int, pod: LocalPod, sockets: PodSockets, added: float
    ) -> None:
        self.number = number
        self.credential = credential
        self.pod = pod
        self.sockets = sockets
        self.added = added
        self.identity = ""
        """Whose certificate it shows; empty while it has none."""
        self.pair: Pair | None = None


class Stage:
    """A change made ready. Exactly one of `Pods.commit` and `Pods.rollback` must follow."""

    def __init__(self) -> None:
        self.pairs: dict[str, Pair] = {}
        self.credentials: dict[str, protocol.Credential] = {}
        self.added: dict[str, Held] = {}
        self.gone: list[Held] = []
        self.rotated: list[tuple[Held, str, Pair]] = []
        self.surplus: list[PodSockets] = []
        """Sockets that came again for a pod that already has them."""

    @property
    def shown(self) -> list[Held]:
        """Pods that are given a certificate, their first or a newer one."""
        first = [held for held in self.added.values() if held.pair is not None]
        return first + [held for held, _, _ in self.rotated]


class Pods:
    """All held pods. `clock` is monotonic, seconds."""

    def __init__(
        self,
        core: CoreLike,
        numbers: Iterator[int],
        clock: Callable[[], float],
        build: Builder = build_pair,
    ) -> None:
        self._core = core
        self._numbers = numbers
        self._clock = clock
        self._build = build
        self._held: dict[str, Held] = {}
        self._by_number: dict[int, Held] = {}
        self._by_address: dict[bytes, Held] | None = None
        self._credentials: dict[str, protocol.Credential] = {}
        self._pairs: dict[str, Pair] = {}
        self._deaf = False

    def __len__(self) -> int:
        return len(self._held)

    def __iter__(self) -> Iterator[Held]:
        return iter(list(self._held.values()))

    def get(self, uid: str) -> Held | None:
        return self._held.get(uid)

    def by_number(self, number: int) -> Held | None:
        return self._by_number.get(number)

    def workload(self, number: int) -> str:
        """Return the uid of a pod's workload, "" if the pod has gone. `number` is the core's."""
        held = self.by_number(number)
        return held.pod.workload if held is not None else ""

    def at(self, packed: bytes) -> Held | None:
        """Return the pod that has this address; the newest, while an address changes hands."""
        if self._by_address is None:
            self._by_address = {
                own: held
                for held in sorted(self._held.values(), key=lambda held: held.number)
                for own in held.pod.addresses
            }
        return self._by_address.get(packed)

    def chain(self, held: Held) -> tuple[bytes, ...]:
        """Return the certificates that `held` shows, DER, leaf first; none while it has none."""
        credential = self._credentials.get(held.identity)
        return credential.chain if credential is not None else ()

    def stage(
        self,
        before: State,
        after: State,
        credentials: Mapping[str, protocol.Credential],
        sockets: Mapping[str, PodSockets],
    ) -> Stage:
        """Build contexts and add new pods to the core. Raises PodError; nothing has changed then.

        `sockets` stay the caller's until commit.
        """
        stage = Stage()
        try:
            self._stage_credentials(stage, before, after, credentials)
            for pod in after.pods.values():
                self._stage_pod(stage, after, pod, sockets.get(pod.uid))
        except (tls.TlsError, OSError, ValueError, LookupError, MemoryError) as error:
            self.rollback(stage)
            raise PodError(f"pods or certificates cannot be set up: {error}") from error
        except PodError:
            self.rollback(stage)
            raise
        stage.gone += [held for uid, held in self._held.items() if uid not in after.pods]
        return stage

    def rollback(self, stage: Stage) -> None:
        for held in stage.added.values():
            self._core.remove_pod(held.number)
            self._core.remove_credential(held.credential)

    def commit(self, stage: Stage) -> list[Held]:
        """Put `stage` in force; return the pods that left. Owns the staged sockets from here."""
        if stage.gone or stage.added:
            self._by_address = None
        for held in stage.gone:
            del self._held[held.pod.uid]
            del self._by_number[held.number]
            self._core.remove_pod(held.number)
            self._core.remove_credential(held.credential)
            if not any(new.sockets is held.sockets for new in stage.added.values()):
                held.sockets.close()
        for held in stage.added.values():
            self._held[held.pod.uid] = held
            self._by_number[held.number] = held
        for held, identity, pair in stage.rotated:
            self._show(held, identity, pair)
        for surplus in stage.surplus:
            surplus.close()
        # Last: the contexts replaced above must live until the core has the new ones.
        self._pairs = stage.pairs
        self._credentials = stage.credentials
        return stage.gone

    @property
    def deaf(self) -> bool:
        return self._deaf

    def deafen(self) -> None:
        """Close every listener: the core drains. From here on pods only leave."""
        if not self._deaf:
            self._deaf = True
            for held in self._held.values():
                held.sockets = held.sockets.deafened()

    def close(self) -> None:
        """Close every descriptor; the core has stopped."""
        for held in self._held.values():
            held.sockets.close()
        self._held.clear()
        self._by_number.clear()
        self._by_address = None

    def _stage_credentials(
        self,
        stage: Stage,
        before: State,
        after: State,
        credentials: Mapping[str, protocol.Credential],
    ) -> None:
        # Sorted: the same roots in another order are the same contexts.
        roots = tuple(sorted({root for bundle in after.bundles.values() for root in bundle}))
        old_roots = tuple(sorted({root for bundle in before.bundles.values() for root in bundle}))
        for uid, identity in after.identities.items():
            known = before.identities.get(uid)
            if known == identity and roots == old_roots and uid in self._pairs:
                stage.pairs[uid] = self._pairs[uid]
                stage.credentials[uid] = self._credentials[uid]
                continue
            credential = credentials.get(uid) or self._credentials[uid]
            stage.pairs[uid] = self._build(credential, roots)
            stage.credentials[uid] = credential

    def _stage_pod(
        self, stage: Stage, after: State, pod: LocalPod, sockets: PodSockets | None
    ) -> None:
        workload = after.workload_of(pod)
        identity = workload.identity if workload is not None else ""
        pair = stage.pairs.get(identity)
        wanted = identity if pair is not None else ""
        held = self._held.get(pod.uid)
        if self._deaf:
            if held is None:
                return
            # It has no listeners to compare.
            sockets = None
        if held is not None and self._keeps(held, pod, wanted, sockets):
            if sockets is not None:
                stage.surplus.append(sockets)
            if pair is not None and pair is not held.pair:
                stage.rotated.append((held, wanted, pair))
            return
        if held is not None and self._deaf:
            stage.gone.append(held)
            return
        if sockets is None:
            if held is None:
                raise PodError(f"pod {pod.uid!r} came without its descriptors")
            sockets = held.sockets
        new = Held(next(self._numbers), next(self._numbers), pod, sockets, self._clock())
        try:
            if pair is not None:
                self._show(new, wanted, pair)
            addresses = tuple(sorted(pod.addresses))
            self._core.add_pod(new.number, *sockets, addresses, new.credential)
        except BaseException:
            with contextlib.suppress(LookupError, OSError):
                self._core.remove_credential(new.credential)
            raise
        stage.added[pod.uid] = new
        if held is not None:
            stage.gone.append(held)

    @staticmethod
    def _keeps(held: Held, pod: LocalPod, wanted: str, sockets: PodSockets | None) -> bool:
        """True when the pod in the core may stay as it is, but for a newer certificate."""
        if held.pod != pod or held.identity not in ("", wanted):
            return False
        return sockets is None or held.sockets.same_as(sockets)

    def _show(self, held: Held, identity: str, pair: Pair) -> None:
        self._core.set_credential(held.credential, pair.client, pair.server)
        held.identity = identity
        held.pair = pair
