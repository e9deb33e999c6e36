"""The frames of a change: applied to the old state they give the new one, in bounded parts."""

from __future__ import annotations

import pytest

from nodeagent import published
from ztunnel import protocol


def bundle(uid: str, size: int = 10) -> protocol.TrustBundle:
    return protocol.TrustBundle(uid, (b"x" * size,))


def pod(uid: str) -> protocol.Pod:
    return protocol.Pod(uid, "default/a", ("10.0.0.1",), 7)


def state(*resources: protocol.Resource) -> dict[published.Key, protocol.Resource]:
    return {published.key_of(resource): resource for resource in resources}


def applied(old: published.State | None, change: published.Change) -> published.State:
    result: dict[published.Key, protocol.Resource] = dict(old or {})
    for part in change.parts:
        for removal in part.update.removals:
            result.pop((removal.kind, removal.uid), None)
        result.update(state(*part.update.upserts))
    return result


CASES = [
    pytest.param(None, state(), id="empty reset"),
    pytest.param(None, state(bundle("a"), pod("p")), id="reset"),
    pytest.param(state(bundle("a")), state(bundle("a")), id="nothing"),
    pytest.param(state(bundle("a")), state(), id="removal only"),
    pytest.param(state(pod("p"), bundle("a")), state(pod("q"), bundle("a", 20)), id="mixed"),
    pytest.param(
        None, state(*(bundle(f"d{i}", 100_000) for i in range(9)), pod("p"), pod("q")), id="large"
    ),
]


@pytest.mark.parametrize("old,new", CASES)
def test_parts_give_the_new_state(old: published.State | None, new: published.State) -> None:
    change = published.plan(old, new, 5)
    assert applied(old, change) == new
    assert all(part.update.version == 5 for part in change.parts)
    commits = [part.update.commit for part in change.parts]
    assert commits == [False] * (len(commits) - 1) + [True] * bool(commits)
    resets = [part.update.reset for part in change.parts]
    assert resets == (
        [True] + [False] * (len(resets) - 1) if old is None else [False] * len(resets)
    )


@pytest.mark.parametrize("old,new", CASES)
def test_keys_that_may_differ_are_all_that_is_looked_at(
    old: published.State | None, new: published.State
) -> None:
    upserts = tuple(new.values())
    removals = tuple(protocol.Removal(*key) for key in (old or {}) if key not in new)
    keys = published.touched(upserts, removals)
    assert published.plan(old, new, 5, keys) == published.plan(old, new, 5)
    # What is not named is taken for the same; a reset names everything.
    assert published.plan(old, new, 5, ()).parts == (
        published.plan(None, new, 5).parts if old is None else ()
    )


@pytest.mark.parametrize("old,new", CASES)
def test_parts_are_bounded_and_pods_travel_alone(
    old: published.State | None, new: published.State
) -> None:
    for part in published.plan(old, new, 5).parts:
        assert len(protocol.encode(part.update)) < 2 * published.PART_BYTES
        pods = [r for r in part.update.upserts if isinstance(r, protocol.Pod)]
        assert [p.uid for p in pods] == ([part.pod] if part.pod else [])
        assert not pods or (len(part.update.upserts) == 1 and not part.update.commit)


def test_credentials_come_before_pods() -> None:
    credential = protocol.Credential("spiffe://a/ns/b/sa/c", (b"c",), b"k", 0, 1)
    change = published.plan(None, state(pod("p"), credential), 1)
    order = [type(r).__name__ for part in change.parts for r in part.update.upserts]
    assert order == ["Credential", "Pod"]


def test_a_resource_beyond_the_frame_limit_is_left_out_and_named() -> None:
    change = published.plan(None, state(bundle("big", protocol.MAX_FRAME), bundle("small")), 1)
    assert change.oversized == (("trust_bundle", "big"),)
    assert applied(None, change) == state(bundle("small"))


def test_changed_says_when_nothing_changes() -> None:
    old = state(bundle("a"))
    assert published.changed(old, (bundle("a"),), ()) is None
    assert published.changed(old, (), (protocol.Removal("trust_bundle", "b"),)) is None
    assert published.changed(old, (), (protocol.Removal("trust_bundle", "a"),)) == {}
