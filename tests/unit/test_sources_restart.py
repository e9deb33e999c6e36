"""What the files source keeps across a restart."""

from __future__ import annotations

import asyncio
import os
import stat
from pathlib import Path

import pytest

from nodeagent.sources import FilesSource, LastGood, SourceState
from support.resources import peer, workload
from support.watched import (
    Reader,
    names,
    problems,
    put,
    run,
    source,
)

# --- across a restart --------------------------------------------------------------------------


def first(found: FilesSource) -> SourceState:
    async def main() -> SourceState:
        states = found.states()
        try:
            return await anext(states)
        finally:
            await states.aclose()

    return asyncio.run(main())


def test_sources_restart_keeps_the_last_good_version_of_a_broken_file(folder: Path) -> None:
    put(folder / "a.yaml", peer("n/a", "STRICT"))
    put(folder / "b.yaml", peer("n/b"))
    assert names(first(source(folder, last_good=True))) == ["a", "b"]
    put(folder / "a.yaml", "kind: [")
    (folder / "b.yaml").unlink()
    state = first(source(folder, last_good=True))
    assert names(state) == ["a"]
    assert "a.yaml" in problems(state)


def test_sources_restart_without_the_directory_keeps_everything(folder: Path) -> None:
    put(folder / "a.yaml", peer("n/a", "STRICT"))
    first(source(folder, last_good=True))
    folder.rename(folder.with_name("away"))
    state = first(source(folder, last_good=True))
    assert names(state) == ["a"]
    assert "cannot be read" in problems(state)


def test_sources_restart_remembers_who_was_in_force_first(folder: Path) -> None:
    put(folder / "b.yaml", workload("n/b", "10.0.0.1"))
    first(source(folder, last_good=True))
    put(folder / "a.yaml", workload("n/a", "10.0.0.1"))
    state = first(source(folder, last_good=True))
    assert names(state) == ["b"]
    assert "already taken" in problems(state)


def test_sources_restart_takes_good_changes(folder: Path) -> None:
    put(folder / "a.yaml", peer("n/a", "STRICT"))
    first(source(folder, last_good=True))
    put(folder / "a.yaml", peer("n/a2"))
    assert names(first(source(folder, last_good=True))) == ["a2"]


def stored(folder: Path) -> Path:
    return folder.parent / "state" / "files"


def test_sources_stored_state_is_private(folder: Path) -> None:
    put(folder / "a.yaml", peer("n/a"))
    first(source(folder, last_good=True))
    assert stat.S_IMODE(stored(folder).stat().st_mode) == 0o600
    assert stat.S_IMODE(stored(folder).parent.stat().st_mode) == 0o700
    assert list(stored(folder).parent.iterdir()) == [stored(folder)]


@pytest.mark.parametrize(
    "damage", ["garbage", "writable", "symlink", "fifo", "directory", "deep", "latin"]
)
def test_sources_stored_state_that_others_made_is_not_believed(folder: Path, damage: str) -> None:
    """symlinked_state: a link in its place is neither followed nor written through."""
    put(folder / "a.yaml", peer("n/a", "DISABLE"))
    first(source(folder, last_good=True))
    path = stored(folder)
    good = path.read_bytes()
    put(folder / "a.yaml", "kind: [")
    victim = folder.parent / "victim"
    victim.write_bytes(good)
    path.unlink()
    match damage:
        case "garbage":
            path.write_bytes(b"\x00garbage")
        case "latin":
            path.write_bytes(b"\x81\xa1\xff\x00")
        case "deep":
            path.write_bytes(b"\x91" * 100_000)
        case "writable":
            path.write_bytes(good)
            path.chmod(0o666)
        case "symlink":
            path.symlink_to(victim)
        case "fifo":
            os.mkfifo(path)
        case "directory":
            path.mkdir()
    state = first(source(folder, last_good=True))
    assert names(state) == []
    assert str(path) in problems(state)
    put(folder / "a.yaml", peer("n/a2"))
    first(source(folder, last_good=True))
    assert victim.read_bytes() == good


def test_sources_stored_state_of_another_directory_is_not_used(folder: Path) -> None:
    put(folder / "a.yaml", peer("n/a"))
    first(source(folder, last_good=True))
    other = folder.with_name("other.d")
    other.mkdir()
    put(other / "a.yaml", "kind: [")
    state = first(FilesSource(other, "n1", LastGood(stored(folder), other)))
    assert names(state) == []


def test_sources_disk_full_is_a_problem_and_loses_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(folder / "a.yaml", peer("n/a"))
    first(source(folder, last_good=True))
    before = stored(folder).read_bytes()
    put(folder / "a.yaml", peer("n/a2"))

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)

        async def until_said(reader: Reader) -> None:
            state = await reader.problem("No space left")
            assert names(state) == ["a2"]
            assert stored(folder).read_bytes() == before
            assert list(stored(folder).parent.iterdir()) == [stored(folder)]
            # Room again: it is stored at a later look, and then nothing is wrong.
            patch.undo()
            await reader.until(lambda state: not state.problems)
            assert stored(folder).read_bytes() != before

        run(source(folder, last_good=True), until_said)
