"""Syntax: what YAML offers and this reader refuses, and where it says so."""

from __future__ import annotations

import itertools
import json

import pytest
import yaml

from nodeagent.api import ConfigError, PeerAuthentication, _tree, load
from nodeagent.api._tree import (
    MAX_BYTES,
    MAX_DEPTH,
    MAX_DOCUMENTS,
    MAX_ERRORS,
    MAX_ITEMS,
    MAX_NODES,
    read_tree,
)
from support.resources import docs, peer, refuse, workload

HEAD = "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: a}\n"


@pytest.fixture(params=["libyaml", "pure"], autouse=True)
def _both_parsers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test here runs with both of PyYAML's parsers: which one is there must not matter."""
    if request.param == "pure":
        monkeypatch.setattr(_tree, "_LOADER", yaml.SafeLoader)
    elif not yaml.__with_libyaml__:
        pytest.skip("PyYAML was built without libyaml")


def only(errors: tuple[ConfigError, ...]) -> ConfigError:
    assert len(errors) == 1, [str(error) for error in errors]
    return errors[0]


def test_config_error_names_file_line_column_field_and_reason() -> None:
    error = only(refuse(HEAD + "spec:\n  mtls:\n    mode: strict\n"))
    assert (error.file, error.line, error.column, error.field) == (
        "bad.yaml",
        6,
        11,
        "spec.mtls.mode",
    )
    assert "STRICT" in error.reason
    assert str(error).startswith("bad.yaml:6:11: spec.mtls.mode: ")


def test_config_merge_key_bomb_is_refused_at_once() -> None:
    """729 bytes of merge keys take PyYAML two seconds; each level doubles that: 40 never end."""
    lines = ["a0: &a0 {k: v}"]
    lines += [f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}" for i in range(1, 40)]
    errors = refuse("\n".join(lines))
    reasons = " ".join(error.reason for error in errors)
    assert "merge key" in reasons
    assert "anchor" in reasons
    assert "alias" in reasons


def test_config_alias_bomb_is_refused_and_never_expanded() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    errors = refuse("\n".join(lines))
    assert any("alias *a0" in error.reason for error in errors)


def test_config_alias_to_itself_is_refused() -> None:
    assert any("alias" in error.reason for error in refuse("&a [*a]"))


@pytest.mark.parametrize("text", ["&x a: b", "a: &x b", "a: &x {}", "a: &x []"])
def test_config_anchor_without_alias_is_refused(text: str) -> None:
    assert any("anchor" in error.reason for error in refuse(text))


def test_config_merge_key_is_refused_where_it_stands() -> None:
    errors = refuse(HEAD + "spec:\n  <<: {mtls: {mode: STRICT}}\n")
    assert any("merge key" in error.reason and error.line == 5 for error in errors)


@pytest.mark.parametrize(
    "tag",
    [
        "!!python/object/apply:os.system",
        "!!str",
        "!!binary",
        "!custom",
        "!",
        "!<tag:yaml.org,2002:int>",
    ],
)
def test_config_tag_is_refused(tag: str) -> None:
    errors = refuse(HEAD + f"spec: {{mtls: {{mode: {tag} STRICT}}}}\n")
    assert any("tag" in error.reason for error in errors)


def test_config_last_duplicate_does_not_win() -> None:
    """PyYAML takes the last of two equal keys: a second `mode` would hide the first."""
    error = only(refuse(HEAD + "spec:\n  mtls:\n    mode: STRICT\n    mode: DISABLE\n"))
    assert (error.line, error.field) == (7, "spec.mtls.mode")
    assert "first in line 6" in error.reason


@pytest.mark.parametrize("second", ["'8080'", '"8080"', "8080"])
def test_config_duplicate_with_other_quotes_is_a_duplicate(second: str) -> None:
    ports = f"portLevelMtls: {{8080: {{mode: STRICT}}, {second}: {{mode: DISABLE}}}}"
    errors = refuse(HEAD + f"spec: {{selector: {{matchLabels: {{a: b}}}}, {ports}}}\n")
    assert any("given twice" in error.reason for error in errors)


def test_config_duplicate_top_level_key_is_refused() -> None:
    errors = refuse(HEAD + "spec: {mtls: {mode: STRICT}}\nspec: {}\n")
    assert any(error.field == "spec" and "twice" in error.reason for error in errors)


@pytest.mark.parametrize("unit", ["[", "{a: ", "- ", "[[{a: "])
def test_config_deep_nesting_is_refused_without_recursion(unit: str) -> None:
    for text in (unit * 10_000, "x: " + unit * 10_000):
        assert any(
            "nested deeper" in error.reason or "not YAML" in error.reason for error in refuse(text)
        )


def test_config_depth_limit_is_exact() -> None:
    assert read_tree(("[" * MAX_DEPTH + "]" * MAX_DEPTH).encode(), "f")[1] == []
    deeper = MAX_DEPTH + 1
    _, errors = read_tree(("[" * deeper + "]" * deeper).encode(), "f")
    assert str(MAX_DEPTH) in errors[0].reason


def test_config_size_limit() -> None:
    assert "limit" in refuse(b"#" * (MAX_BYTES + 1))[0].reason
    assert load(b"#" * MAX_BYTES, "f").errors == ()


def test_config_count_limits() -> None:
    items = "[" + "1," * (MAX_ITEMS + 1) + "]"
    assert "items" in refuse(items)[0].reason
    entries = "".join(f"k{i}: v\n" for i in range(MAX_ITEMS + 1))
    assert "entries" in refuse(entries)[0].reason
    many = ("- [" + "1," * (MAX_ITEMS - 1) + "]\n") * (MAX_NODES // MAX_ITEMS + 1)
    assert any(str(MAX_NODES) in error.reason for error in refuse(many))
    assert any("documents" in error.reason for error in refuse("---\n" * (MAX_DOCUMENTS + 2)))


def test_config_errors_are_many_but_bounded() -> None:
    errors = refuse("---\n".join("kind: x\n" for _ in range(500)))
    assert MAX_ERRORS < len(errors) <= MAX_ERRORS + 1
    assert "more errors" in errors[-1].reason


def test_config_collects_errors_of_all_documents_and_fields() -> None:
    text = (
        HEAD
        + "spec: {mtls: {mode: no}, nothing: 1}\n---\n"
        + HEAD.replace("a}", "B}")
        + "spec: {}\n"
    )
    fields = {(error.line, error.field) for error in refuse(text)}
    assert fields == {(4, "spec.mtls.mode"), (4, "spec.nothing"), (8, "metadata.name")}


def test_config_syntax_error_keeps_what_came_before_visible() -> None:
    errors = refuse(HEAD + "spec: {x: 1}\n---\na: [1\nb: 2\n")
    assert [error.field for error in errors] == ["spec.x", ""]
    assert errors[1].reason.startswith("not YAML: ")
    assert errors[1].line >= 6


def test_config_utf8_byte_order_mark_is_dropped() -> None:
    assert len(load(b"\xef\xbb\xbf" + docs(peer("a/b")), "f").documents) == 1


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1"])
def test_config_other_encodings_are_refused(encoding: str) -> None:
    text = "\ufeff" + HEAD if encoding.endswith(("le", "be")) else "# ä\n" + HEAD
    if encoding == "latin-1":
        text = "# ä\n" + HEAD
    reason = refuse(text.encode(encoding))[0].reason
    assert "UTF-8" in reason or "not allowed" in reason


def test_config_invalid_utf8_names_line_and_column() -> None:
    error = only(refuse(HEAD.encode() + b"spec: {mtls: {mode: \xff}}\n"))
    assert (error.line, error.column) == (4, 21)
    assert "0xff" in error.reason


@pytest.mark.parametrize(
    "character",
    [
        "\x00",
        "\x01",
        "\x07",
        "\x0b",
        "\x1b",
        "\x7f",
        "\x85",
        "\u2028",
        "\u202e",
        "\u2066",
        "\ufeff",
    ],
)
def test_config_control_and_bidirectional_characters_are_refused(character: str) -> None:
    error = only(refuse(HEAD + f"spec: {{}} # a{character}b\n"))
    assert f"U+{ord(character):04X}" in error.reason
    assert error.line == 4
    assert character not in str(error)


def test_config_escaped_control_character_cannot_forge_a_log_line() -> None:
    text = docs(workload("a/b", "10.0.0.1")).replace(b'"address"', b'"netw\\norkx": "x", "address"')
    errors = refuse(text)
    assert all("\n" not in str(error) for error in errors)
    errors = refuse(HEAD + 'spec: {mtls: {mode: "STRICT\\nINFO all is well"}}\n')
    assert all("\n" not in str(error) for error in errors)


def test_config_json_is_yaml_too() -> None:
    text = json.dumps(
        {
            "apiVersion": "security.istio.io/v1",
            "kind": "PeerAuthentication",
            "metadata": {"name": "a", "labels": {"x": "a/b".replace("/", ".")}},
            "spec": {
                "selector": {"matchLabels": {"a": "b"}},
                "portLevelMtls": {"80": {"mode": "STRICT"}},
            },
        },
        indent=2,
    )
    loaded = load(text.encode(), "a.json")
    assert loaded.errors == ()
    (document,) = loaded.documents
    assert isinstance(document, PeerAuthentication)
    assert list(document.spec.port_level_mtls) == [80]


@pytest.mark.parametrize("text", ["", "\n", "---\n", "---\n---\n", "# nothing\n", "null\n", "~"])
def test_config_empty_documents_are_no_documents(text: str) -> None:
    loaded = load(text.encode(), "f")
    assert (loaded.documents, loaded.errors) == ((), ())


@pytest.mark.parametrize("text", ["a", "[a]", "1", "- kind: x"])
def test_config_document_must_be_a_mapping(text: str) -> None:
    assert "must be a resource" in only(refuse(text)).reason


@pytest.mark.parametrize("text", ["? [a]\n: b", "? {a: b}\n: c", "{[a]: b}"])
def test_config_complex_key_is_refused(text: str) -> None:
    assert any("key must be a word" in error.reason for error in refuse(text))


def test_config_null_field_is_not_a_default() -> None:
    """A selector whose labels fell out of the indentation would select everything."""
    for spec in ("mtls: ", "mtls: {mode: null}", "selector: ~", "selector: {matchLabels: }"):
        assert any("is empty" in error.reason for error in refuse(HEAD + f"spec: {{{spec}}}\n"))
    assert any("is empty" in error.reason for error in refuse(HEAD + "spec:\n"))


AMBIGUOUS = [
    *["no", "No", "NO", "yes", "on", "off", "Off", "y", "n", "Y", "N", "true", "True", "FALSE"],
    *["null", "~", "Null", "0", "1", "-1", "+1", "010", "0o10", "0x10", "0b1", "1_000"],
    *["22:22", "1:2:3:4:5:6:7:8", "1.0", ".5", "1.", "1e3", "1.5e-3", ".inf", "-.INF", ".nan", "="],
    *["685_230.15", "190:20:30.15", "08", "09", "1e5", "12e03"],
]


@pytest.mark.parametrize("word", AMBIGUOUS)
def test_config_norway_problem_word_must_be_quoted(word: str) -> None:
    head = HEAD.replace("{name: a}", f"{{name: a, labels: {{country: {word}}}}}")
    error = only(refuse(head + "spec: {}\n"))
    assert error.field == "metadata.labels.country"
    assert "quotes" in error.reason or "is empty" in error.reason


@pytest.mark.parametrize("word", ["no", "22", "1e3", "0x10", "1.0", "true", "010"])
def test_config_norway_problem_quoted_word_is_text(word: str) -> None:
    head = HEAD.replace("{name: a}", f"{{name: a, labels: {{country: '{word}'}}}}")
    (document,) = load((head + "spec: {}\n").encode(), "f").documents
    assert document.metadata.labels == {"country": word}


@pytest.mark.parametrize("word", ["no", "1.5", "null", "yes"])
def test_config_norway_problem_holds_for_keys(word: str) -> None:
    head = HEAD.replace("{name: a}", f"{{name: a, labels: {{{word}: x}}}}")
    assert refuse(head + "spec: {}\n")


@pytest.mark.parametrize(
    "word",
    [
        "010",
        "0x50",
        "0o120",
        "1_000",
        "22:22",
        "1e3",
        "80.0",
        "+80",
        "-80",
        "'80'",
        '"80"',
        "８０",
        "80 ",
    ],
)
def test_config_number_has_one_spelling(word: str) -> None:
    text = docs(workload("a/b", "10.0.0.1", ports={"http": 80})).decode()
    text = text.replace('"http": 80', f'"http": {word}')
    if word == "80 ":
        assert not load(text.encode(), "f").errors
    else:
        assert only(refuse(text)).field == "spec.ports.http"


def test_config_huge_number_is_refused() -> None:
    text = docs(workload("a/b", "10.0.0.1", ports={"http": 80})).decode()
    assert refuse(text.replace('"http": 80', f'"http": {"9" * 100_000}'))


def test_config_plain_timestamp_stays_text() -> None:
    head = HEAD.replace("{name: a}", "{name: a, creationTimestamp: 2026-01-31T12:00:00Z}")
    (document,) = load((head + "spec: {}\n").encode(), "f").documents
    created = document.metadata.creation_timestamp
    assert created is not None
    assert created.isoformat() == "2026-01-31T12:00:00+00:00"


def test_config_catastrophic_regex_input_is_linear() -> None:
    """`(x+)+` on 26 bytes takes seconds where patterns are evaluated, and doubles with each byte.

    Here nothing of a document is evaluated, and our own patterns are linear: this ends.
    """
    for value, field in itertools.product(
        [
            "(x+)+$",
            "a" * 20_000 + "!",
            "a." * 10_000,
            "1" * 20_000,
            "1_" * 9_999 + "x",
            "0:" * 9_999,
        ],
        ["name", "namespace"],
    ):
        head = HEAD.replace("name: a", f"{field}: {value}")
        assert refuse(head + "spec: {}\n")
