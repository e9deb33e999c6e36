"""Which version of each file is in force when files fight over the same thing."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from nodeagent.api import claims
from nodeagent.sources._admit import FileVersion, admit
from support.resources import peer, read, workload


def version(file: str, *texts: str) -> FileVersion:
    return FileVersion(read(*texts, file=file), (), "".join(texts).encode())


def files(**texts: str | list[str]) -> dict[str, FileVersion]:
    return {
        name: version(name, *([found] if isinstance(found, str) else found))
        for name, found in texts.items()
    }


def test_sources_without_conflict_all_is_taken() -> None:
    wanted = files(a=peer("n/a"), b=peer("n/b"))
    assert admit({}, wanted, "n1") == (wanted, [])
    assert admit(wanted, {}, "n1") == ({}, [])


def test_sources_conflict_names_both_places() -> None:
    wanted = files(a=peer("n/x", "STRICT"), b=[peer("n/y"), peer("n/x", "DISABLE")])
    result, errors = admit({}, wanted, "n1")
    assert set(result) == {"a"}
    (error,) = errors
    assert (error.file, error.line) == ("b", 3)
    assert "PeerAuthentication n/x" in error.reason
    assert "a:1" in error.reason


def test_sources_conflict_what_was_in_force_first_stays() -> None:
    """Also when the newcomer's file sorts first, and the holder's file changes at the same time."""
    before = files(b=peer("n/x", "STRICT"))
    for holder in (peer("n/x", "STRICT"), peer("n/x", "PERMISSIVE")):
        wanted = files(a=peer("n/x", "DISABLE"), b=holder)
        result, errors = admit(before, wanted, "n1")
        assert result == {"b": wanted["b"]}
        assert [error.file for error in errors] == ["a"]


def test_sources_conflict_over_address_or_namespace_keeps_the_first_identity() -> None:
    before = files(b=workload("shop/web", "10.0.0.1", netns="web"))
    for newcomer in (
        workload("evil/web", "10.0.0.1"),
        workload("evil/web", "10.0.0.2", addresses="::ffff:10.0.0.1"),
        workload("evil/web", "10.0.0.2", netns="n1:/run/netns/web"),
    ):
        result, errors = admit(before, {**before, **files(a=newcomer)}, "n1")
        assert result == before
        assert [error.file for error in errors] == ["a"]
        assert "shop/web" in errors[0].reason


def test_sources_document_may_move_between_files() -> None:
    before = files(a=peer("n/x", "STRICT"), b=peer("n/y"))
    for wanted in (
        files(a=peer("n/z"), b=[peer("n/y"), peer("n/x", "STRICT")]),
        files(b=[peer("n/y"), peer("n/x", "STRICT")]),
        files(a=peer("n/y"), b=peer("n/x")),
    ):
        assert admit(before, wanted, "n1") == (wanted, [])


def test_sources_refused_file_keeps_its_version_and_takes_back_what_it_released() -> None:
    before = files(a=peer("n/1"), b=peer("n/2"), c=peer("n/3"))
    # a wants what c keeps, so a stays at n/1, so b cannot have n/1, so b stays at n/2.
    wanted = files(a=[peer("n/3"), peer("n/4")], b=peer("n/1"), c=peer("n/3"))
    result, errors = admit(before, wanted, "n1")
    assert result == {**before, "c": wanted["c"]}
    assert sorted({error.file for error in errors}) == ["a", "b"]


def test_sources_refused_file_without_earlier_version_is_out() -> None:
    before = files(b=peer("n/x"))
    result, _ = admit(before, {**before, **files(a=[peer("n/other"), peer("n/x")])}, "n1")
    assert result == before


FILES = st.dictionaries(
    st.sampled_from("abcd"),
    st.lists(st.sampled_from("123456"), max_size=3, unique=True),
    max_size=4,
)


@settings(max_examples=200, deadline=None)
@given(st.lists(FILES, min_size=1, max_size=4))
def test_sources_whatever_happens_what_is_in_force_never_conflicts(
    steps: list[dict[str, list[str]]],
) -> None:
    in_force: dict[str, FileVersion] = {}
    for step in steps:
        wanted = {
            file: FileVersion(
                read(*(peer(f"n/{name}") for name in names), file=file) if names else (), (), b""
            )
            for file, names in step.items()
        }
        result, errors = admit(in_force, wanted, "n1")
        held = [
            claim for each in result.values() for d in each.documents for claim in claims(d, "n1")
        ]
        assert len(held) == len(set(held))
        assert result.keys() <= wanted.keys()
        refused = {error.file for error in errors}
        for file, each in wanted.items():
            assert (result.get(file) == each) or file in refused
            assert file not in refused or result.get(file) == in_force.get(file)
        in_force = result
