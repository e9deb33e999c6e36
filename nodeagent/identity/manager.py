"""Keeps an SVID in hand for every identity of this node, and the bundles of everybody it trusts.

This module owns the life of the node's SVIDs: asking, renewing, giving up, withdrawing. It
promises that an SVID is renewed at about two thirds of its life, that a failure never takes a
valid one away (unless the issuer denies the identity), that an expired one is withdrawn, that at
most a few requests run at once, and that `status` tells all of it in one snapshot. It may not know
who issues, who uses an SVID, or write one to disk.

Everything runs on one event loop. The callbacks are called on it, must not block, and an exception
of theirs ends `run`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import enum
import random
import time
from collections.abc import Callable, Iterable
from typing import Final, Protocol

import structlog

from nodeagent.identity import _schedule as schedule
from nodeagent.identity.provider import Bundles, Provider, ProviderError, ProviderReason, Svid
from ztunnel import protocol
from ztunnel.spiffe import SpiffeId

__all__ = ["Clock", "IdentityManager", "IdentityPhase", "IdentityState", "IdentityStatus"]

_CONCURRENCY: Final = 8
"""Requests at once. Starting a node with hundreds of identities must not flood the issuer; eight
keep two cores busy with an issuer that signs in this process."""

_FETCH_SECONDS: Final = 30.0
"""An issuer that has not answered by then is taken for unavailable."""

_log = structlog.get_logger()


class Clock(Protocol):
    """Time, so that tests can turn it."""

    def wall(self) -> float:
        """Return seconds since the epoch."""
        ...

    def monotonic(self) -> float:
        """Return seconds that never go back."""
        ...

    async def sleep(self, seconds: float) -> None: ...


class SystemClock:
    """The clocks of the machine."""

    def wall(self) -> float:
        return time.time()

    def monotonic(self) -> float:
        # Unlike CLOCK_MONOTONIC it goes on while the machine is suspended, as certificates do.
        return time.clock_gettime(time.CLOCK_BOOTTIME)

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


class IdentityPhase(enum.StrEnum):
    """Where an identity stands. Stable tokens, for status and metrics."""

    PENDING = "pending"
    """No SVID yet, and no failure."""
    VALID = "valid"
    RENEWAL_FAILING = "renewal_failing"
    """The SVID in hand is still valid, and its renewal has failed."""
    UNAVAILABLE = "unavailable"
    """No SVID: expired, denied, or never delivered."""


@dataclasses.dataclass(frozen=True, slots=True)
class IdentityState:
    """One identity. Times are seconds since the epoch, 0 without an SVID.

    `renew_at` is when the next request is planned; `last_reason` a ProviderReason's token.
    `failures` counts since the last success; `failed` all failures and `issued` all SVIDs since the
    start.
    """

    identity: str
    phase: IdentityPhase
    not_before: int
    not_after: int
    renew_at: float
    failures: int
    failed: int
    issued: int
    last_reason: str
    last_error: str


@dataclasses.dataclass(frozen=True, slots=True)
class IdentityStatus:
    """One coherent snapshot. `bundles` is (trust domain, number of roots)."""

    identities: tuple[IdentityState, ...]
    bundles: tuple[tuple[str, int], ...]
    bundle_error: str

    @property
    def ready(self) -> bool:
        """True when there is a bundle, and an SVID for every identity."""
        usable = {IdentityPhase.VALID, IdentityPhase.RENEWAL_FAILING}
        return bool(self.bundles) and all(each.phase in usable for each in self.identities)


@dataclasses.dataclass(slots=True, eq=False)
class _Entry:
    """A wanted identity. Invariant: `timing` is there exactly when `svid` is."""

    id: SpiffeId
    svid: Svid | None = None
    timing: schedule.Timing | None = None
    task: asyncio.Task[None] | None = None
    retry_at: float = 0.0
    """By the monotonic clock; counts only after a failure."""
    failures: int = 0
    failed: int = 0
    issued: int = 0
    last_error: ProviderError | None = None

    def due(self, now: schedule.Now) -> bool:
        if self.task is not None:
            return False
        if self.failures:
            return now.monotonic >= self.retry_at
        return self.timing is None or self.timing.due(now)

    def next_change(self, now: schedule.Now) -> float:
        moments = [schedule.RECHECK_SECONDS]
        if self.timing is not None:
            moments.append(self.timing.next_change(now))
        if self.failures and self.task is None:
            moments.append(self.retry_at - now.monotonic)
        return max(min(moments), 0.0)

    def state(self, now: schedule.Now) -> IdentityState:
        planned = self.timing.renew_wall if self.timing is not None else 0.0
        if self.failures:
            planned = now.wall + max(self.retry_at - now.monotonic, 0.0)
        return IdentityState(
            identity=str(self.id),
            phase=self._phase(),
            not_before=0 if self.svid is None else self.svid.not_before,
            not_after=0 if self.svid is None else self.svid.not_after,
            renew_at=planned,
            failures=self.failures,
            failed=self.failed,
            issued=self.issued,
            last_reason="" if self.last_error is None else self.last_error.reason.value,
            last_error="" if self.last_error is None else self.last_error.detail,
        )

    def _phase(self) -> IdentityPhase:
        if self.svid is not None:
            return IdentityPhase.RENEWAL_FAILING if self.failures else IdentityPhase.VALID
        if self.failures or self.issued:
            return IdentityPhase.UNAVAILABLE
        return IdentityPhase.PENDING


class IdentityManager:
    """See the module. `want` may be called before and while `run` runs."""

    def __init__(
        self,
        provider: Provider,
        *,
        on_credential: Callable[[protocol.Credential], None],
        on_bundle: Callable[[protocol.TrustBundle], None],
        on_removed: Callable[[str], None],
        on_bundle_removed: Callable[[str], None],
        clock: Clock | None = None,
        chance: Callable[[], float] = random.random,
    ) -> None:
        """Prepare to keep SVIDs from `provider`.

        `on_removed` is called with a SPIFFE ID whose credential must no longer be used, and
        `on_bundle_removed` with a trust domain; each only after the matching credential or bundle
        was given. `chance` returns numbers in [0, 1).
        """
        self._provider = provider
        self._on_credential = on_credential
        self._on_bundle = on_bundle
        self._on_removed = on_removed
        self._on_bundle_removed = on_bundle_removed
        self._clock = SystemClock() if clock is None else clock
        self._chance = chance
        self._entries: dict[SpiffeId, _Entry] = {}
        self._bundles: dict[str, tuple[bytes, ...]] = {}
        self._bundle_error = ""
        self._changed = asyncio.Event()
        self._slots = asyncio.Semaphore(_CONCURRENCY)

    def want(self, identities: Iterable[SpiffeId]) -> None:
        """Keep SVIDs for exactly `identities` from now on."""
        wanted = set(identities)
        for gone in self._entries.keys() - wanted:
            entry = self._entries.pop(gone)
            if entry.task is not None:
                entry.task.cancel()
            self._withdraw(entry)
        for new in wanted - self._entries.keys():
            self._entries[new] = _Entry(new)
        self._changed.set()

    def status(self) -> IdentityStatus:
        """Return where every identity and bundle stands now."""
        now = self._now()
        return IdentityStatus(
            identities=tuple(self._entries[each].state(now) for each in sorted(self._entries)),
            bundles=tuple((domain, len(roots)) for domain, roots in sorted(self._bundles.items())),
            bundle_error=self._bundle_error,
        )

    async def run(self) -> None:
        """Work until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._follow_bundles(), name="identity-bundles")
            while True:
                self._changed.clear()
                await self._pause(self._turn(tasks))

    def _turn(self, tasks: asyncio.TaskGroup) -> float:
        """Start what is due, withdraw what has expired; return seconds until the next turn."""
        now = self._now()
        delay = schedule.RECHECK_SECONDS
        # A copy: a callback may want something else.
        for entry in tuple(self._entries.values()):
            if entry.timing is not None and entry.timing.expired(now):
                _log.error("svid_expired", identity=str(entry.id), failures=entry.failures)
                self._withdraw(entry)
            if entry.due(now):
                entry.task = tasks.create_task(self._renew(entry), name=f"identity {entry.id}")
            delay = min(delay, entry.next_change(now))
        return delay

    async def _pause(self, seconds: float) -> None:
        """Wait for `seconds`, or until something has changed."""
        sleeper = asyncio.ensure_future(self._clock.sleep(seconds))
        change = asyncio.ensure_future(self._changed.wait())
        try:
            await asyncio.wait({sleeper, change}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            sleeper.cancel()
            change.cancel()

    async def _renew(self, entry: _Entry) -> None:
        try:
            svid = await self._fetch(entry.id)
            self._accept(entry, svid)
        except ProviderError as error:
            self._fail(entry, error)
        finally:
            entry.task = None
            self._changed.set()

    async def _fetch(self, spiffe_id: SpiffeId) -> Svid:
        async with self._slots:
            try:
                async with asyncio.timeout(_FETCH_SECONDS):
                    svid = await self._provider.fetch(spiffe_id)
            except TimeoutError:
                raise ProviderError(
                    ProviderReason.UNAVAILABLE,
                    f"no answer within {_FETCH_SECONDS:.0f} s",
                    retryable=True,
                ) from None
        if svid.id != spiffe_id:
            raise ProviderError(
                ProviderReason.BAD_ANSWER,
                f"asked for {spiffe_id}, the issuer delivered {svid.id}",
                retryable=True,
            )
        wall = self._clock.wall()
        if not svid.not_before <= wall < svid.not_after:
            raise ProviderError(
                ProviderReason.CLOCK,
                f"the issuer delivered an SVID valid from {svid.not_before} to {svid.not_after}, "
                f"and it is {wall:.0f} here: compare the clocks of both machines",
                retryable=True,
            )
        return svid

    def _accept(self, entry: _Entry, svid: Svid) -> None:
        entry.svid = svid
        entry.timing = schedule.plan(svid.not_before, svid.not_after, self._now(), self._chance())
        entry.failures = 0
        entry.issued += 1
        entry.last_error = None
        _log.info(
            "svid_issued",
            identity=str(svid.id),
            not_after=svid.not_after,
            renew_at=int(entry.timing.renew_wall),
        )
        self._on_credential(
            protocol.Credential(
                uid=str(svid.id),
                chain=svid.chain,
                key=svid.key,
                not_before=svid.not_before,
                not_after=svid.not_after,
            )
        )

    def _fail(self, entry: _Entry, error: ProviderError) -> None:
        entry.failures += 1
        entry.failed += 1
        entry.last_error = error
        delay = schedule.backoff(entry.failures, self._chance(), retryable=error.retryable)
        entry.retry_at = self._clock.monotonic() + delay
        _log.warning(
            "svid_failed",
            identity=str(entry.id),
            reason=error.reason.value,
            error=error.detail,
            failures=entry.failures,
            retry_in=round(delay, 1),
            expires=None if entry.svid is None else entry.svid.not_after,
        )
        if error.reason is ProviderReason.DENIED:
            self._withdraw(entry)

    def _withdraw(self, entry: _Entry) -> None:
        if entry.svid is None:
            return
        entry.svid = None
        entry.timing = None
        self._on_removed(str(entry.id))

    async def _follow_bundles(self) -> None:
        failures = 0
        while True:
            try:
                async for bundles in self._provider.bundles():
                    failures = 0
                    self._take_bundles(bundles)
                error = ProviderError(
                    ProviderReason.UNAVAILABLE, "the issuer ended the subscription", retryable=True
                )
            except ProviderError as caught:
                error = caught
            failures += 1
            self._bundle_error = str(error)
            delay = schedule.backoff(failures, self._chance(), retryable=error.retryable)
            _log.warning(
                "bundles_failed",
                reason=error.reason.value,
                error=error.detail,
                failures=failures,
                retry_in=round(delay, 1),
            )
            await self._clock.sleep(delay)

    def _take_bundles(self, bundles: Bundles) -> None:
        """Pass on what differs: every set is the full set, so what is absent is withdrawn."""
        self._bundle_error = ""
        before, self._bundles = self._bundles, dict(bundles)
        for domain, roots in sorted(self._bundles.items()):
            if before.get(domain) != roots:
                self._on_bundle(protocol.TrustBundle(uid=domain, roots=roots))
        for domain in sorted(before.keys() - self._bundles.keys()):
            self._on_bundle_removed(domain)

    def _now(self) -> schedule.Now:
        return schedule.Now(self._clock.wall(), self._clock.monotonic())
