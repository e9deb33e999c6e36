"""One change after another gives what building from nothing gives, from the file to the index."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import pytest

from nodeagent import api, mesh, published
from nodeagent.api import Document
from nodeagent.mesh import Builder, MeshState
from nodeagent.settings import Settings, for_tunnel
from nodeagent.sources import FilesSource
from nodeagent.sources import files as files_module
from support import random_mesh
from support.resources import read
from support.watched import put
from ztunnel import protocol
from ztunnel.policy import Scopes
from ztunnel.state import EMPTY, Change, State, apply

NODE = Settings(
    node="n1", trust_domain="td", root_namespace=random_mesh.ROOT, node_addresses=("192.0.2.1",)
)
FILES = 14
SEQUENCES = 60
STEPS = 12


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Told:
    """A ztunnel's state, told of each change as over the wire."""

    def __init__(self) -> None:
        self.state: State = EMPTY
        self._published: published.State | None = None

    def take(self, upserts: Iterable[protocol.Resource], removals: Iterable[Any]) -> None:
        upserts, removals = tuple(upserts), tuple(removals)
        wanted = published.changed(self._published or {}, upserts, removals)
        if wanted is None:
            return
        keys = published.touched(upserts, removals)
        plan = published.plan(self._published, wanted, self.state.version + 1, keys)
        parts = [part.update for part in plan.parts]
        self.state = apply(
            self.state,
            Change(
                version=self.state.version + 1,
                reset=self._published is None,
                upserts=tuple(itertools.chain.from_iterable(part.upserts for part in parts)),
                removals=tuple(itertools.chain.from_iterable(part.removals for part in parts)),
                settings=for_tunnel(NODE),
            ),
        )
        self._published = wanted


def told(found: MeshState) -> State:
    """Return the state of a ztunnel that starts now."""
    fresh = Told()
    fresh.take(*mesh.diff(None, found))
    return fresh.state


def shape(scopes: Scopes) -> dict[str, dict[Any, dict[str, protocol.Authorization]]]:
    """Return which policies count where; `test_ztunnel_policy_properties` decides by them.

    Whom else a policy selects makes no difference to a group, which may keep it as it was.
    """
    return {
        place: {
            kind: {
                uid: msgspec.structs.replace(policy, workloads=None)
                for uid, policy in index.policies.items()
            }
            for kind, index in group.indexes.items()
        }
        for place, group in scopes.groups.items()
    }


def same(one: State, other: State) -> None:
    assert one.workloads == other.workloads
    assert one.services == other.services
    assert one.policies == other.policies
    assert one.authorizations == other.authorizations
    assert {at: set(uids) for at, uids in one.by_address.items()} == {
        at: set(uids) for at, uids in other.by_address.items()
    }
    assert shape(one.scopes) == shape(other.scopes)


def edited(random: Random, found: dict[int, Document]) -> None:
    """Remove a document, put another in its place, or read it again without a difference."""
    number = random.randrange(FILES)
    match random.randrange(5):
        case 0:
            found.pop(number, None)
        case 1 if number in found:
            kept = found[number]
            found[number] = type(kept)(**{
                name: getattr(kept, name) for name in kept.__struct_fields__
            })  # fmt: skip
        case _:
            (found[number],) = read(random_mesh.document(random), file=f"{number:02}.yaml")


@pytest.mark.parametrize("part", range(4))
def test_a_builder_forgets_and_mixes_up_nothing(part: int) -> None:
    """Documents may fight over everything here: no source stands before the builder."""
    problems = warnings = 0
    for sequence in range(SEQUENCES // 4):
        random = Random(f"{part}/{sequence}")  # noqa: S311 - a test's cases, the same each time
        everywhere = bool(sequence % 2)
        builder = Builder(NODE, everywhere=everywhere)
        found: dict[int, Document] = {}
        before = MeshState()
        pod = Told()
        for _ in range(STEPS):
            for _ in range(random.choice((1, 1, 1, 4))):
                edited(random, found)
            documents = list(found.values())
            random.shuffle(documents)
            built = builder.build(documents)
            fresh = mesh.build(documents, NODE, everywhere=everywhere)
            assert built == fresh
            for name in ("workloads", "services", "policies", "authorizations", "bindings"):
                assert list(getattr(built, name)) == list(getattr(fresh, name))
            pod.take(*mesh.diff(before, built))
            same(pod.state, told(built))
            before = built
            problems += len(built.problems)
            warnings += len(built.warnings)
    # The world is one in which things go wrong.
    assert problems
    assert warnings


def test_what_did_not_change_is_not_made_again() -> None:
    """What makes an increment cheap: the same objects, so that nobody has to compare them."""
    texts = [random_mesh.document(Random(number)) for number in range(40)]  # noqa: S311 - as above
    documents = [
        document
        for number, text in enumerate(texts)
        for document in read(text, file=f"{number:02}.yaml")
    ]
    builder = Builder(NODE)
    one = builder.build(documents)
    (added,) = read(random_mesh.document(Random(7)), file="zz.yaml")  # noqa: S311 - as above
    two = builder.build([*documents, added])
    same_again = builder.build([*documents, added])
    assert same_again.workloads is two.workloads
    for before, after in (
        (one.authorizations, two.authorizations),
        (one.workloads, two.workloads),
    ):
        for uid in before.keys() & after.keys():
            if before[uid] == after[uid]:
                assert before[uid] is after[uid]


def test_what_is_gone_is_let_go() -> None:
    """What a builder remembers does not grow with the edits that it has seen."""
    builder = Builder(NODE)
    for sequence in range(5):
        random = Random(f"gone/{sequence}")  # noqa: S311 - as above
        documents = [
            document
            for number in range(FILES)
            for document in read(random_mesh.document(random), file=f"{number:02}.yaml")
        ]
        held = [sys.getrefcount(document) for document in documents]
        builder.build(documents)
        assert [sys.getrefcount(document) for document in documents] != held
        assert builder.build([]) == MeshState()
        assert [sys.getrefcount(document) for document in documents] == held


def test_edits_of_files_give_what_a_restart_gives(tmp_path: Path) -> None:
    """Files with several documents, some broken, some in conflict, through source and builder."""
    held = 0
    for sequence in range(6):
        random = Random(f"files/{sequence}")  # noqa: S311 - as above
        folder = tmp_path / str(sequence)
        folder.mkdir()
        clock = Clock()
        source = FilesSource(folder, NODE.node, clock=clock)
        builder = Builder(NODE)
        before = MeshState()
        pod = Told()
        for _ in range(8):
            for _ in range(random.randint(1, 2)):
                path = folder / f"{random.randrange(5)}.yaml"
                match random.randrange(6):
                    case 0:
                        path.unlink(missing_ok=True)
                    case 1:
                        put(path, "kind: [")
                    case _:
                        texts = [random_mesh.document(random) for _ in range(random.randint(1, 4))]
                        put(path, *texts)
            source._look()
            clock.now += files_module.SETTLE
            state = source._look()
            held += bool(state.problems)
            fresh = tuple(
                document
                for name, version in source._in_force.files.items()
                for document in api.load(version.data, str(folder / name), NODE.node).documents
            )
            assert state.documents == fresh
            built = builder.build(state.documents)
            assert built == mesh.build(fresh, NODE)
            pod.take(*mesh.diff(before, built))
            same(pod.state, told(built))
            before = built
    assert held
