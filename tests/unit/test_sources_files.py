"""The watched directory: what an edit, a mistake, a link or a restart does."""

from __future__ import annotations

import asyncio
import os
import resource
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nodeagent.sources import FilesSource, _directory
from nodeagent.sources import files as files_module
from support.resources import peer, workload
from support.watched import (
    Reader,
    chmod,
    move,
    names,
    problems,
    put,
    run,
    source,
)


def test_sources_first_state_holds_all_files(folder: Path) -> None:
    put(folder / "b.yml", peer("n/b"))
    put(folder / "a.yaml", peer("n/a1"), peer("n/a2"))
    put(folder / "c.json", peer("n/c"))
    for ignored in ("d.txt", ".e.yaml", "f.yaml~", "g.yaml.swp"):
        put(folder / ignored, "not: [yaml")

    async def body(reader: Reader) -> None:
        state = await reader.until(lambda _: True)
        assert names(state) == ["a1", "a2", "b", "c"]
        assert (state.problems, state.version) == ((), 1)
        assert state.documents[0].origin.file == str(folder / "a.yaml")

    run(source(folder), body)


def test_sources_edit_add_and_remove_are_live(folder: Path) -> None:
    put(folder / "a.yaml", peer("n/a"))

    async def body(reader: Reader) -> None:
        await reader.names("a")
        put(folder / "b.yaml", peer("n/b"))
        await reader.names("a", "b")
        (folder / "a.yaml").write_text(peer("n/a2"))
        await reader.names("a2", "b")
        (folder / "b.yaml").unlink()
        await reader.names("a2")
        (folder / "a.yaml").rename(folder / "z.yaml")
        state = await reader.names("a2")
        await reader.until(lambda state: state.documents[0].origin.file.endswith("z.yaml"))
        assert [each.version for each in reader.seen] == sorted(
            {each.version for each in reader.seen}
        )
        assert state.problems == ()

    run(source(folder), body)


def test_sources_edit_is_found_without_any_event(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lost event (a link swapped below, a full queue) costs the time to the next look."""

    async def silence(self: FilesSource) -> AsyncIterator[None]:
        while True:
            await asyncio.sleep(0.01)
            yield

    monkeypatch.setattr(FilesSource, "_events", silence)

    async def body(reader: Reader) -> None:
        await reader.names()
        put(folder / "a.yaml", peer("n/a"))
        await reader.names("a")

    run(source(folder), body)


def test_sources_watch_that_cannot_be_made_still_finds_edits(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: FilesSource) -> AsyncIterator[None]:
        raise RuntimeError("no watches left")

    monkeypatch.setattr(FilesSource, "_events", broken)

    async def body(reader: Reader) -> None:
        await reader.names()
        put(folder / "a.yaml", peer("n/a"))
        await reader.names("a")

    run(source(folder), body)


def test_sources_bad_file_leaves_its_last_good_version_and_others_alone(folder: Path) -> None:
    put(folder / "a.yaml", peer("n/a", "STRICT"))
    put(folder / "b.yaml", peer("n/b"))

    async def body(reader: Reader) -> None:
        await reader.names("a", "b")
        put(folder / "a.yaml", peer("n/new"), peer("n/a", "STRCT"))
        state = await reader.problem("spec.mtls.mode")
        assert names(state) == ["a", "b"]
        assert str(folder / "a.yaml") in problems(state)
        put(folder / "b.yaml", peer("n/b2"))
        state = await reader.names("a", "b2")
        assert state.problems
        put(folder / "a.yaml", peer("n/a", "PERMISSIVE"))
        await reader.until(lambda state: not state.problems)

    run(source(folder), body)


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_sources_emptied_file_is_not_a_removal(folder: Path, text: str) -> None:
    """A crash or a full disk empties files; only deleting the file removes its documents."""
    put(folder / "a.yaml", peer("n/a", "STRICT"))

    async def body(reader: Reader) -> None:
        await reader.names("a")
        put(folder / "a.yaml", text)
        state = await reader.problem("is empty")
        assert names(state) == ["a"]
        put(folder / "a.yaml", "# nothing for now\n")
        await reader.names()

    run(source(folder), body)


def test_sources_new_bad_file_changes_nothing_for_others(folder: Path) -> None:
    put(folder / "a.yaml", peer("n/a", "STRICT"))
    put(folder / "b.yaml", "kind: [")

    async def body(reader: Reader) -> None:
        state = await reader.problem("b.yaml")
        assert names(state) == ["a"]

    run(source(folder), body)


def test_sources_conflict_between_files_first_in_force_stays(folder: Path) -> None:
    put(folder / "b.yaml", workload("n/b", "10.0.0.1", netns="x"))

    async def body(reader: Reader) -> None:
        await reader.names("b")
        put(folder / "a.yaml", workload("n/a", "10.0.0.1"))
        state = await reader.problem("already taken")
        assert names(state) == ["b"]
        assert str(folder / "a.yaml") in problems(state)
        assert f"{folder / 'b.yaml'}:1" in problems(state)
        (folder / "b.yaml").unlink()
        state = await reader.names("a")
        await reader.until(lambda state: not state.problems)

    run(source(folder), body)


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_sources_half_written_file_is_not_read(folder: Path) -> None:
    """Half a file of policies may well be valid: it must not take the other half out of force."""
    policies = [peer(f"n/p{i}", "STRICT") for i in range(4)]
    path = folder / "a.yaml"
    put(path, *policies)
    clock = Clock()
    found = FilesSource(folder, "n1", clock=clock)
    found._look()
    for end in range(1, len(policies) + 1):
        # Truncated and written piece by piece: each stop on the way is a valid file.
        path.write_text("\n---\n".join([*policies[:end], peer(f"n/q{end}")]))
        clock.now += files_module.SETTLE * 0.9
        assert names(found._look()) == ["p0", "p1", "p2", "p3"]
    clock.now += files_module.SETTLE
    assert names(found._look()) == ["p0", "p1", "p2", "p3", "q4"]


def test_sources_file_that_is_gone_for_a_moment_stays_in_force(folder: Path) -> None:
    """Some editors move the old file away before they write the new one."""
    put(folder / "a.yaml", peer("n/a"))
    clock = Clock()
    found = FilesSource(folder, "n1", clock=clock)
    found._look()
    (folder / "a.yaml").rename(folder / "a.yaml~")
    assert names(found._look()) == ["a"]
    put(folder / "a.yaml", peer("n/a2"))
    assert names(found._look()) == ["a"]
    clock.now += files_module.SETTLE
    assert names(found._look()) == ["a2"]


def test_sources_file_that_never_keeps_still_is_reported(folder: Path) -> None:
    put(folder / "a.yaml", peer("n/a"))
    clock = Clock()
    found = FilesSource(folder, "n1", clock=clock)
    found._look()
    state = found._look()
    for step in range(100):
        os.utime(folder / "a.yaml", (step, step))
        clock.now += files_module.SETTLE * 0.9
        state = found._look()
    assert names(state) == ["a"]
    assert "keeps changing" in problems(state)
    clock.now += 2 * files_module.SETTLE
    assert found._look().problems == ()


def test_sources_file_that_changes_while_it_is_read_is_read_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(folder / "a.yaml", peer("n/a"))
    clock = Clock()
    found = FilesSource(folder, "n1", clock=clock)
    with monkeypatch.context() as patch:
        patch.setattr(files_module, "read_file", lambda *_: None)
        state = found._look()
    assert (names(state), state.problems) == ([], ())
    clock.now += files_module.SETTLE
    assert names(found._look()) == ["a"]


def config_map(folder: Path, generation: int, *texts: str) -> None:
    """Write a generation as the kubelet does: a new directory, then one rename of `..data`."""
    data = folder / f"..2026_{generation}"
    data.mkdir()
    (data / "mesh.yaml").write_text("\n---\n".join(texts))
    link = folder / "..data_tmp"
    link.symlink_to(data.name)
    link.rename(folder / "..data")
    if not (folder / "mesh.yaml").is_symlink():
        (folder / "mesh.yaml").symlink_to("..data/mesh.yaml")


def test_sources_config_map_mount_works_and_its_swap_is_live(folder: Path) -> None:
    config_map(folder, 1, peer("n/one"))

    async def body(reader: Reader) -> None:
        state = await reader.names("one")
        assert state.problems == ()
        config_map(folder, 2, peer("n/two"))
        await reader.names("two")

    run(source(folder), body)


def test_sources_directory_behind_a_link_may_be_swapped(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        put(tmp_path / name / "a.yaml", peer(f"n/{name}"))
    link = tmp_path / "mesh.d"
    link.symlink_to("one")

    async def body(reader: Reader) -> None:
        await reader.names("one")
        (tmp_path / "new").symlink_to("two")
        (tmp_path / "new").rename(link)
        await reader.names("two")
        put(tmp_path / "two" / "a.yaml", peer("n/three"))
        await reader.names("three")

    run(source(link), body)


def test_sources_symlink_out_of_the_directory_is_refused(folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.yaml"
    put(outside, peer("n/outside"))
    (folder / "a.yaml").symlink_to(outside)
    (folder / "b.yaml").symlink_to("../mesh.d-other/x.yaml")
    (tmp_path / "mesh.d-other").mkdir()
    put(tmp_path / "mesh.d-other" / "x.yaml", peer("n/sibling"))
    (folder / "c.yaml").symlink_to("nowhere")
    (folder / "d.yaml").symlink_to("d.yaml")

    async def body(reader: Reader) -> None:
        state = await reader.until(lambda _: True)
        assert names(state) == []
        assert problems(state).count("leaves the directory") == 2
        assert len(state.problems) == 4

    run(source(folder), body)


def test_sources_good_file_turned_into_a_link_keeps_its_last_good(folder: Path) -> None:
    put(folder / "a.yaml", peer("n/a"))

    async def body(reader: Reader) -> None:
        await reader.names("a")
        (folder / "a.yaml").unlink()
        (folder / "a.yaml").symlink_to("/etc/passwd")
        state = await reader.problem("leaves the directory")
        assert names(state) == ["a"]

    run(source(folder), body)


def test_sources_only_regular_files_are_read(folder: Path) -> None:
    os.mkfifo(folder / "a.yaml")
    (folder / "b.yaml").mkdir()
    (folder / "c.yaml").symlink_to("b.yaml")
    put(folder / "d.yaml", peer("n/d"))

    async def body(reader: Reader) -> None:
        state = await reader.names("d")
        assert problems(state).count("not a regular file") == 3

    run(source(folder), body)


@pytest.mark.parametrize("name", [b"a\nERROR b.yaml", b"a\x1b[2J.yaml", b"\xff.yaml"])
def test_sources_file_name_cannot_forge_a_log_line(folder: Path, name: bytes) -> None:
    with open(os.fsencode(folder) + b"/" + name, "w") as stream:  # noqa: PTH123 - no text
        stream.write(peer("n/a"))
    state = source(folder, last_good=True)._look()
    assert names(state) == []
    assert "rename it" in problems(state)
    assert problems(state).isprintable()


def test_sources_file_swapped_for_a_fifo_while_it_is_opened_does_not_block(folder: Path) -> None:
    os.mkfifo(folder / "a.yaml")
    with pytest.raises(OSError, match="regular"):
        _directory.read_file(folder, "a.yaml")


def test_sources_what_anybody_may_write_is_refused(folder: Path) -> None:
    put(folder / "a.yaml", peer("n/a"))
    put(folder / "b.yaml", peer("n/b"))
    (folder / "a.yaml").chmod(0o666)

    async def body(reader: Reader) -> None:
        state = await reader.names("b")
        assert "can be written by anybody" in problems(state)
        chmod(folder, 0o777)
        put(folder / "c.yaml", peer("n/c"))
        state = await reader.until(lambda state: f"{folder}: " in problems(state))
        assert names(state) == ["b"]
        chmod(folder, 0o755)
        await reader.names("b", "c")

    run(source(folder), body)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_sources_foreign_file_is_refused(folder: Path) -> None:
    put(folder / "a.yaml", peer("n/a"))
    os.chown(folder / "a.yaml", 65534, 65534)

    async def body(reader: Reader) -> None:
        state = await reader.until(lambda _: True)
        assert names(state) == []
        assert "belongs to user 65534" in problems(state)

    run(source(folder), body)


def test_sources_missing_directory_is_a_problem_and_what_was_good_stays(folder: Path) -> None:
    put(folder / "a.yaml", peer("n/a"))

    async def body(reader: Reader) -> None:
        await reader.names("a")
        gone = folder.with_name("gone")
        move(folder, gone)
        state = await reader.problem("cannot be read")
        assert names(state) == ["a"]
        move(gone, folder)
        state = await reader.until(lambda state: not state.problems)
        put(folder / "b.yaml", peer("n/b"))
        await reader.names("a", "b")

    run(source(folder), body)


def test_sources_directory_may_appear_later(tmp_path: Path) -> None:
    folder = tmp_path / "later"

    async def body(reader: Reader) -> None:
        state = await reader.until(lambda _: True)
        assert "cannot be read" in problems(state)
        folder.mkdir()
        put(folder / "a.yaml", peer("n/a"))
        state = await reader.names("a")
        assert state.problems == ()

    run(source(folder), body)


def test_sources_too_many_or_too_large_files_change_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(folder / "a.yaml", peer("n/a"))
    monkeypatch.setattr(_directory, "MAX_FILES", 2)

    async def body(reader: Reader) -> None:
        await reader.names("a")
        (folder / "b.yaml").write_bytes(b"#" * (1024 * 1024 + 1))
        state = await reader.problem("larger than the limit")
        put(folder / "c.yaml", peer("n/c"))
        state = await reader.problem("more than 2 files")
        assert names(state) == ["a"]

    run(source(folder), body)


def test_sources_fd_limit_costs_no_state(folder: Path) -> None:
    """Without descriptors nothing can be read: what is in force stays, and reading resumes."""
    put(folder / "a.yaml", peer("n/a"))
    reader = source(folder)
    first = reader._look()
    assert names(first) == ["a"]
    put(folder / "a.yaml", peer("n/a2"))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        during = reader._look()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert names(during) == ["a"]
    assert "Too many open files" in problems(during)
    clock = iter(range(100))
    reader._clock = lambda: float(next(clock))
    states = [reader._look() for _ in range(3)]
    assert names(states[-1]) == ["a2"]
    assert states[-1].problems == ()


def test_sources_states_that_are_equal_are_not_repeated(folder: Path) -> None:
    put(folder / "a.yaml", peer("n/a"))
    reader = source(folder)
    assert reader._look() is reader._look()
