"""The life of the node's SVIDs, on a clock that the test turns, with an issuer that it breaks."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from typing import Any

import pytest

from nodeagent.identity import (
    Bundles,
    IdentityManager,
    IdentityPhase,
    IdentityState,
    ProviderError,
    ProviderReason,
    Svid,
)
from ztunnel import protocol
from ztunnel.spiffe import SpiffeId

START = 1_800_000_000.0
SLEEP = SpiffeId.workload("cluster.local", "default", "sleep")
HTTPBIN = SpiffeId.workload("cluster.local", "default", "httpbin")


class TurnedClock:
    """A clock that moves only when a test says so."""

    def __init__(self) -> None:
        self.elapsed = 0.0
        self.offset = START
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []
        self._count = 0

    def wall(self) -> float:
        return self.offset + self.elapsed

    def monotonic(self) -> float:
        return self.elapsed

    async def sleep(self, seconds: float) -> None:
        future = asyncio.get_running_loop().create_future()
        self._count += 1
        heapq.heappush(self._sleepers, (self.elapsed + seconds, self._count, future))
        await future

    async def advance(self, seconds: float) -> None:
        """Let `seconds` pass, waking everybody at the right moment."""
        await settle()
        end = self.elapsed + seconds
        while self._sleepers and self._sleepers[0][0] <= end:
            moment, _, future = heapq.heappop(self._sleepers)
            if future.done():
                continue
            self.elapsed = max(self.elapsed, moment)
            future.set_result(None)
            await settle()
        self.elapsed = end


async def settle() -> None:
    """Let every task run until it waits for something outside."""
    for _ in range(50):
        await asyncio.sleep(0)


class Issuer:
    """A provider whose answers a test chooses."""

    def __init__(self, clock: TurnedClock) -> None:
        self.clock = clock
        self.error: ProviderError | None = None
        self.ttl = 3600
        self.asked: list[tuple[float, SpiffeId]] = []
        self.gate: asyncio.Event | None = None
        self.running = 0
        self.most_running = 0
        self.answer: Callable[[SpiffeId], Svid] = self.svid
        self.bundle_sets: asyncio.Queue[Bundles | ProviderError | None] = asyncio.Queue()

    def svid(self, spiffe_id: SpiffeId) -> Svid:
        now = int(self.clock.wall())
        return Svid(spiffe_id, (b"leaf", b"intermediate"), b"SECRET", now - 300, now + self.ttl)

    async def fetch(self, spiffe_id: SpiffeId) -> Svid:
        self.asked.append((self.clock.monotonic(), spiffe_id))
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            if self.gate is not None:
                await self.gate.wait()
            await asyncio.sleep(0)
        finally:
            self.running -= 1
        if self.error is not None:
            raise self.error
        return self.answer(spiffe_id)

    async def bundles(self) -> AsyncIterator[Bundles]:
        while True:
            item = await self.bundle_sets.get()
            if item is None:
                return
            if isinstance(item, ProviderError):
                raise item
            yield item


class World:
    """A running manager and what it said."""

    def __init__(self) -> None:
        self.clock = TurnedClock()
        self.issuer = Issuer(self.clock)
        self.said: list[tuple[str, str]] = []
        self.credentials: list[protocol.Credential] = []
        self.manager = IdentityManager(
            self.issuer,
            on_credential=self._credential,
            on_bundle=lambda bundle: self.said.append(("bundle", bundle.uid)),
            on_removed=lambda uid: self.said.append(("removed", uid)),
            on_bundle_removed=lambda uid: self.said.append(("bundle removed", uid)),
            clock=self.clock,
            chance=lambda: 0.5,
        )

    def _credential(self, credential: protocol.Credential) -> None:
        self.credentials.append(credential)
        self.said.append(("credential", credential.uid))

    def state(self, spiffe_id: SpiffeId = SLEEP) -> IdentityState:
        found = [
            each for each in self.manager.status().identities if each.identity == str(spiffe_id)
        ]
        assert len(found) == 1
        return found[0]

    def heard(self) -> list[tuple[str, str]]:
        """Return what was said since the last call."""
        said, self.said = self.said, []
        return said


def run(scenario: Callable[[World], Coroutine[Any, Any, None]]) -> None:
    async def play() -> None:
        world = World()
        task = asyncio.create_task(world.manager.run())
        try:
            await scenario(world)
            assert not task.done() or task.exception() is None
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    asyncio.run(play())


def unavailable() -> ProviderError:
    return ProviderError(ProviderReason.UNAVAILABLE, "nobody answers", retryable=True)


def denied() -> ProviderError:
    return ProviderError(ProviderReason.DENIED, "not yours", retryable=False)


CREDENTIAL = ("credential", str(SLEEP))
REMOVED = ("removed", str(SLEEP))


def test_a_wanted_identity_gets_a_credential_at_once() -> None:
    async def scenario(world: World) -> None:
        world.manager.want([SLEEP])
        assert world.state().phase is IdentityPhase.PENDING
        await world.clock.advance(0)
        assert world.heard() == [CREDENTIAL]
        credential = world.credentials[0]
        assert credential.chain == (b"leaf", b"intermediate")
        assert credential.key == b"SECRET"
        assert credential.not_after == START + 3600
        state = world.state()
        assert state.phase is IdentityPhase.VALID
        assert (state.failures, state.issued, state.last_error) == (0, 1, "")
        assert START < state.renew_at < START + 3600

    run(scenario)


def test_it_is_renewed_at_about_two_thirds_again_and_again() -> None:
    async def scenario(world: World) -> None:
        world.manager.want([SLEEP])
        await world.clock.advance(3 * 3600)
        moments = [moment for moment, _ in world.issuer.asked]
        # 0.65 of 3900 s, of which 300 s lie before the issue.
        assert moments == pytest.approx([0, 2235, 4470, 6705, 8940], abs=2)
        assert world.heard() == [CREDENTIAL] * 5

    run(scenario)


def test_a_failed_renewal_keeps_the_old_one_until_it_expires() -> None:
    async def scenario(world: World) -> None:
        world.manager.want([SLEEP])
        await world.clock.advance(0)
        world.heard()
        world.issuer.error = unavailable()
        await world.clock.advance(3599)
        state = world.state()
        assert world.heard() == []
        assert state.phase is IdentityPhase.RENEWAL_FAILING
        assert state.failures == state.failed > 10
        assert state.not_after == START + 3600
        assert (state.last_reason, state.last_error) == ("unavailable", "nobody answers")
        assert world.manager.status().bundles == ()
        await world.clock.advance(2)
        assert world.heard() == [REMOVED]
        assert world.state().phase is IdentityPhase.UNAVAILABLE
        assert world.state().not_after == 0
        world.issuer.error = None
        await world.clock.advance(60)
        assert world.heard() == [CREDENTIAL]
        assert world.state().phase is IdentityPhase.VALID
        assert world.state().failures == 0
        # It is a counter: it does not go back.
        assert world.state().failed >= state.failed

    run(scenario)


def test_failures_back_off_exponentially() -> None:
    async def scenario(world: World) -> None:
        world.issuer.error = unavailable()
        world.manager.want([SLEEP])
        await world.clock.advance(400)
        moments = [moment for moment, _ in world.issuer.asked]
        gaps = [later - sooner for sooner, later in itertools.pairwise(moments)]
        assert gaps[:6] == pytest.approx([0.75, 1.5, 3, 6, 12, 24])
        assert gaps[6:] == pytest.approx([45] * len(gaps[6:]))
        assert len(gaps) >= 12
        assert world.state().phase is IdentityPhase.UNAVAILABLE

    run(scenario)


def test_what_is_not_retryable_is_asked_for_slowly_from_the_start() -> None:
    async def scenario(world: World) -> None:
        world.issuer.error = ProviderError(ProviderReason.MISCONFIGURED, "x", retryable=False)
        world.manager.want([SLEEP])
        await world.clock.advance(100)
        assert [moment for moment, _ in world.issuer.asked] == [0, 45, 90]

    run(scenario)


def test_a_denied_identity_is_withdrawn_at_once() -> None:
    async def scenario(world: World) -> None:
        world.manager.want([SLEEP])
        await world.clock.advance(10)
        world.issuer.error = denied()
        await world.clock.advance(2400)
        assert world.heard() == [CREDENTIAL, REMOVED]
        assert world.state().phase is IdentityPhase.UNAVAILABLE
        assert world.state().last_reason == "denied"

    run(scenario)


def test_identities_fail_and_back_off_one_by_one() -> None:
    async def scenario(world: World) -> None:
        def answer(spiffe_id: SpiffeId) -> Svid:
            if spiffe_id == HTTPBIN:
                raise unavailable()
            return world.issuer.svid(spiffe_id)

        world.issuer.answer = answer
        world.manager.want([SLEEP, HTTPBIN])
        await world.clock.advance(30)
        assert world.heard() == [CREDENTIAL]
        assert world.state(SLEEP).phase is IdentityPhase.VALID
        assert world.state(HTTPBIN).phase is IdentityPhase.UNAVAILABLE
        assert not world.manager.status().ready

    run(scenario)


def test_an_identity_no_longer_wanted_is_removed_and_never_renewed() -> None:
    async def scenario(world: World) -> None:
        world.manager.want([SLEEP, HTTPBIN])
        await world.clock.advance(1)
        world.heard()
        world.manager.want([HTTPBIN])
        assert world.heard() == [REMOVED]
        asked = len(world.issuer.asked)
        await world.clock.advance(3000)
        assert {each for _, each in world.issuer.asked[asked:]} == {HTTPBIN}
        world.manager.want([SLEEP, HTTPBIN])
        await world.clock.advance(1)
        assert CREDENTIAL in world.heard()

    run(scenario)


def test_an_answer_for_an_identity_no_longer_wanted_is_dropped() -> None:
    async def scenario(world: World) -> None:
        world.issuer.gate = asyncio.Event()
        world.manager.want([SLEEP])
        await world.clock.advance(1)
        assert world.issuer.running == 1
        world.manager.want([])
        world.issuer.gate.set()
        await world.clock.advance(1)
        assert world.heard() == []
        assert world.issuer.running == 0
        assert world.manager.status().identities == ()

    run(scenario)


def test_requests_at_once_are_bounded() -> None:
    async def scenario(world: World) -> None:
        names: Iterable[SpiffeId] = [
            SpiffeId.workload("cluster.local", "default", f"app-{n}") for n in range(100)
        ]
        world.manager.want(names)
        await world.clock.advance(1)
        assert world.issuer.most_running == 8
        assert len(world.heard()) == 100
        assert world.manager.status().ready is False, "no bundle yet"

    run(scenario)


def test_a_wall_clock_that_jumps_forward_is_noticed_within_a_minute() -> None:
    async def scenario(world: World) -> None:
        world.manager.want([SLEEP])
        await world.clock.advance(1)
        world.clock.offset += 3000
        await world.clock.advance(61)
        assert len(world.issuer.asked) == 2
        world.clock.offset += 10**6
        world.issuer.error = unavailable()
        world.heard()
        await world.clock.advance(61)
        assert world.heard() == [REMOVED]

    run(scenario)


def test_a_wall_clock_that_jumps_back_does_not_stretch_a_life() -> None:
    async def scenario(world: World) -> None:
        world.manager.want([SLEEP])
        await world.clock.advance(1)
        world.clock.offset -= 250
        world.issuer.error = unavailable()
        await world.clock.advance(3598)
        assert world.heard() == [CREDENTIAL]
        await world.clock.advance(2)
        assert world.heard() == [REMOVED]

    run(scenario)


def test_a_wall_clock_before_the_beginning_asks_for_another_once() -> None:
    async def scenario(world: World) -> None:
        world.manager.want([SLEEP])
        await world.clock.advance(1)
        world.clock.offset -= 10**6
        await world.clock.advance(600)
        assert len(world.issuer.asked) == 2
        assert world.state().phase is IdentityPhase.VALID

    run(scenario)


@pytest.mark.parametrize("shift", [3600 * 24, -3600 * 24])
def test_an_svid_that_is_not_valid_now_is_a_failure(shift: int) -> None:
    async def scenario(world: World) -> None:
        def answer(spiffe_id: SpiffeId) -> Svid:
            right = world.issuer.svid(spiffe_id)
            return Svid(
                right.id, right.chain, right.key, right.not_before + shift, right.not_after + shift
            )

        world.issuer.answer = answer
        world.manager.want([SLEEP])
        await world.clock.advance(20)
        assert world.heard() == []
        assert world.state().last_reason == "clock"
        assert 4 <= world.state().failures <= 6

    run(scenario)


def test_an_svid_of_another_identity_is_a_failure() -> None:
    async def scenario(world: World) -> None:
        world.issuer.answer = lambda _: world.issuer.svid(HTTPBIN)
        world.manager.want([SLEEP])
        await world.clock.advance(1)
        assert world.heard() == []
        assert world.state().last_reason == "bad_answer"

    run(scenario)


def test_tiny_lifetimes_do_not_flood_the_issuer() -> None:
    async def scenario(world: World) -> None:
        world.issuer.ttl = 1
        world.manager.want([SLEEP])
        await world.clock.advance(30)
        assert len(world.issuer.asked) <= 31

    run(scenario)


# --- bundles -----------------------------------------------------------------------------------


def test_bundles_are_passed_on_when_they_differ_and_withdrawn_when_absent() -> None:
    async def scenario(world: World) -> None:
        world.manager.want([SLEEP])
        world.issuer.bundle_sets.put_nowait({"a": (b"1",), "b": (b"2",)})
        await world.clock.advance(1)
        assert ("bundle", "a") in world.heard()
        assert world.manager.status().ready
        assert world.manager.status().bundles == (("a", 1), ("b", 1))
        world.issuer.bundle_sets.put_nowait({"a": (b"1",), "b": (b"2", b"3")})
        await world.clock.advance(1)
        assert world.heard() == [("bundle", "b")]
        world.issuer.bundle_sets.put_nowait({"b": (b"2", b"3")})
        await world.clock.advance(1)
        assert world.heard() == [("bundle removed", "a")]

    run(scenario)


def test_a_broken_subscription_keeps_the_bundles_and_is_taken_up_again() -> None:
    async def scenario(world: World) -> None:
        queue = world.issuer.bundle_sets
        queue.put_nowait({"a": (b"1",)})
        await world.clock.advance(1)
        world.heard()
        for trouble in (unavailable(), None):
            queue.put_nowait(trouble)
            await settle()
            status = world.manager.status()
            assert status.bundle_error
            assert status.bundles == (("a", 1),)
            queue.put_nowait({"a": (b"1",)})
            await world.clock.advance(60)
            assert world.manager.status().bundle_error == ""
        assert world.heard() == []

    run(scenario)


def test_nothing_that_is_shown_holds_a_key() -> None:
    async def scenario(world: World) -> None:
        world.manager.want([SLEEP])
        await world.clock.advance(1)
        shown = f"{world.manager.status()!r} {world.credentials!r} {world.issuer.svid(SLEEP)!r}"
        shown += repr(vars(world.manager))
        assert "SECRET" not in shown

    run(scenario)


def test_an_exception_of_a_callback_ends_the_run() -> None:
    async def scenario() -> None:
        clock = TurnedClock()

        def explode(_: object) -> None:
            raise ZeroDivisionError

        manager = IdentityManager(
            Issuer(clock),
            on_credential=explode,
            on_bundle=explode,
            on_removed=explode,
            on_bundle_removed=explode,
            clock=clock,
        )
        manager.want([SLEEP])
        with pytest.raises(ExceptionGroup):
            await manager.run()

    asyncio.run(scenario())
