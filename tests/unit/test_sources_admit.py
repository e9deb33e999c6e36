"""Which version of each file is in force when files fight over the same thing."""

from __future__ import annotations

from collections.abc import Mapping

from hypothesis import given, settings
from hypothesis import strategies as st

from nodeagent.api import ConfigError, Document, claims, conflict
from nodeagent.sources._admit import FileVersion, InForce, admit
from support.resources import peer, read, workload


def version(file: str, *texts: str) -> FileVersion:
    return FileVersion(read(*texts, file=file), (), "".join(texts).encode())


def files(**texts: str | list[str]) -> dict[str, FileVersion]:
    return {
        name: version(name, *([found] if isinstance(found, str) else found))
        for name, found in texts.items()
    }


def admitted(
    before: Mapping[str, FileVersion], wanted: Mapping[str, FileVersion]
) -> tuple[dict[str, FileVersion], list[ConfigError]]:
    """Return what is in force after `wanted`, where `before` was."""
    in_force, errors = admit(InForce(), before, "n1")
    assert not errors
    result, errors = admit(in_force, wanted, "n1")
    return result.files, errors


def test_sources_without_conflict_all_is_taken() -> None:
    wanted = files(a=peer("n/a"), b=peer("n/b"))
    assert admitted({}, wanted) == (wanted, [])
    assert admitted(wanted, {}) == ({}, [])


def test_sources_conflict_names_both_places() -> None:
    wanted = files(a=peer("n/x", "STRICT"), b=[peer("n/y"), peer("n/x", "DISABLE")])
    result, errors = admitted({}, wanted)
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
        result, errors = admitted(before, wanted)
        assert result == {"b": wanted["b"]}
        assert [error.file for error in errors] == ["a"]


def test_sources_conflict_over_address_or_namespace_keeps_the_first_identity() -> None:
    before = files(b=workload("shop/web", "10.0.0.1", netns="web"))
    for newcomer in (
        workload("evil/web", "10.0.0.1"),
        workload("evil/web", "10.0.0.2", addresses="::ffff:10.0.0.1"),
        workload("evil/web", "10.0.0.2", netns="n1:/run/netns/web"),
    ):
        result, errors = admitted(before, {**before, **files(a=newcomer)})
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
        assert admitted(before, wanted) == (wanted, [])


def test_sources_refused_file_keeps_its_version_and_takes_back_what_it_released() -> None:
    before = files(a=peer("n/1"), b=peer("n/2"), c=peer("n/3"))
    # a wants what c keeps, so a stays at n/1, so b cannot have n/1, so b stays at n/2.
    wanted = files(a=[peer("n/3"), peer("n/4")], b=peer("n/1"), c=peer("n/3"))
    result, errors = admitted(before, wanted)
    assert result == {**before, "c": wanted["c"]}
    assert sorted({error.file for error in errors}) == ["a", "b"]


def test_sources_refused_file_without_earlier_version_is_out() -> None:
    before = files(b=peer("n/x"))
    result, _ = admitted(before, {**before, **files(a=[peer("n/other"), peer("n/x")])})
    assert result == before


def test_sources_a_file_that_is_refused_itself_keeps_no_other_out() -> None:
    before = files(a=peer("n/1"), b=peer("n/2"), c=peer("n/3"))
    # b wants what c keeps, so a cannot have n/2; so n/9, which a asks for too, is free.
    further = files(a=[peer("n/2"), peer("n/9")], b=peer("n/3"), d=peer("n/9"))
    result, errors = admitted(before, {**before, **further})
    assert result == {**before, "d": further["d"]}
    assert {(error.file, error.reason.partition(" at ")[2][0]) for error in errors} == {
        ("a", "b"),
        ("a", "d"),
        ("b", "c"),
    }


FILES = st.dictionaries(
    st.sampled_from("abcd"),
    st.lists(st.sampled_from("123456"), max_size=3, unique=True).map(tuple),
    max_size=4,
)

Claims = dict[str, tuple[Document, str]]


def all_claims(versions: Mapping[str, FileVersion]) -> dict[str, Claims]:
    return {
        file: {
            claim: (d, field) for d in each.documents for claim, field in claims(d, "n1").items()
        }
        for file, each in versions.items()
    }


def the_long_way(
    before: Mapping[str, FileVersion], wanted: Mapping[str, FileVersion]
) -> tuple[dict[str, FileVersion], list[ConfigError]]:
    """Decide over all claims of all files, until nobody is refused, and nobody need be."""
    had, asked = all_claims(before), all_claims(wanted)
    back: set[str] = set()
    chosen = dict(asked)
    while True:
        holders = {
            claim: (file, chosen[file][claim][0])
            for file in chosen
            for claim in chosen[file].keys() & had.get(file, {}).keys()
        }
        refused: list[str] = []
        for file in sorted(chosen):
            if any(claim in holders and holders[claim][0] != file for claim in chosen[file]):
                refused.append(file)
            else:
                holders |= {claim: (file, found[0]) for claim, found in chosen[file].items()}
        if not refused:
            break
        for file in refused:
            back.add(file)
            if file in had and chosen[file] is not had[file]:
                chosen[file] = had[file]
            else:
                del chosen[file]
    errors: dict[str, list[ConfigError]] = {}
    for file in sorted(back) * (len(back) + 1):
        held = {
            claim: document
            for other, made in chosen.items()
            if other != file
            for claim, (document, _) in made.items()
        }
        errors[file] = [
            conflict(document, held[claim], claim, field)
            for claim, (document, field) in asked[file].items()
            if claim in held
        ]
        if not errors[file]:
            chosen[file] = asked[file]
            back.discard(file)
    result = {
        file: before[file] if file in back else wanted[file]
        for file in sorted(wanted)
        if file in chosen
    }
    return result, [error for file in sorted(back) for error in errors[file]]


@settings(max_examples=300, deadline=None)
@given(st.lists(FILES, min_size=1, max_size=5))
def test_sources_whatever_happens_what_is_in_force_never_conflicts(
    steps: list[dict[str, tuple[str, ...]]],
) -> None:
    in_force = InForce()
    versions: dict[tuple[str, tuple[str, ...]], FileVersion] = {}
    for step in steps:
        for file, names in step.items():
            # A file that goes back to what it was is read again, and is another object.
            if in_force.files.get(file) is not versions.get((file, names)):
                versions.pop((file, names), None)
            if (file, names) not in versions:
                texts = [peer(f"n/{name}") for name in names]
                found = read(*texts, file=file) if texts else ()
                versions[file, names] = FileVersion(found, (), b"")
        wanted = {file: versions[file, names] for file, names in step.items()}
        result, errors = admit(in_force, wanted, "n1")
        assert (result.files, errors) == the_long_way(in_force.files, wanted)
        held = {
            claim: (file, document)
            for file, found in all_claims(result.files).items()
            for claim, (document, _) in found.items()
        }
        assert result.holders == held
        assert len(held) == sum(map(len, all_claims(result.files).values()))
        refused = {error.file for error in errors}
        for file, each in wanted.items():
            assert (result.files.get(file) == each) or file in refused
            assert file not in refused or result.files.get(file) == in_force.files.get(file)
        in_force = result
