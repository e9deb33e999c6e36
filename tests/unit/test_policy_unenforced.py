"""What an AuthorizationPolicy asks for and this agent cannot do: it is said, and by whom."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from structlog.testing import capture_logs

from nodeagent.api import AuthorizationPolicy
from nodeagent.cli import cli
from nodeagent.policy import Unenforced, unenforced
from nodeagent.sources.files import MAX_WARNINGS
from support.resources import authorization, read
from support.watched import Reader, put, run, source

METHODS = [{"to": [{"operation": {"methods": ["GET"], "paths": ["/a"]}}]}]
HEADERS = [{"when": [{"key": "request.headers[x]", "values": ["y"]}]}]
PORTS = [{"to": [{"operation": {"ports": ["80"]}}]}]
TARGET = {"kind": "Service", "group": "", "name": "web"}


def found(*texts: str) -> tuple[Unenforced, ...]:
    return unenforced(
        document for text in texts for document in read(text)
        if isinstance(document, AuthorizationPolicy)
    )  # fmt: skip


@pytest.mark.parametrize(
    "action,word",
    [("ALLOW", "would allow is denied"), ("DENY", "denies more"), ("AUDIT", "marks more")],
)
@pytest.mark.parametrize(
    "rules,fields", [(METHODS, ("methods", "paths")), (HEADERS, ("request.headers[x]",))]
)
def test_unenforced_names_the_fields_and_what_is_done_instead(
    action: str, word: str, rules: list[Any], fields: tuple[str, ...]
) -> None:
    (one,) = found(authorization("shop/p", action, [*PORTS, *rules, *rules]))
    assert (one.policy, one.action, one.fields) == ("shop/p", action, fields)
    assert word in one.effect
    assert one.origin.startswith("mesh.yaml:")


def test_unenforced_target_is_for_somebody_else() -> None:
    (one,) = found(authorization("shop/p", "ALLOW", PORTS, targetRefs=[TARGET]))
    assert one.fields == ("targetRefs",)
    assert "no effect here" in one.effect


def test_what_is_enforced_as_written_is_not_listed() -> None:
    assert found(authorization("shop/p", "DENY", PORTS), authorization("shop/q", "ALLOW", [])) == ()


# --- load time -----------------------------------------------------------------------------------


def test_the_log_has_each_warning_once(folder: Path) -> None:
    put(folder / "a.yaml", authorization("shop/p", "DENY", METHODS))

    async def body(reader: Reader) -> None:
        await reader.names("p")
        put(folder / "b.yaml", authorization("shop/q", "DENY", PORTS))
        await reader.names("p", "q")

    with capture_logs() as logs:
        run(source(folder), body)
    said = [each["warning"] for each in logs if each["event"] == "config_warning"]
    assert len(said) == len(set(said)) == 2
    assert all(each.startswith(f"{folder / 'a.yaml'}:") for each in said)
    assert "operation.methods" in said[0]


def test_very_many_warnings_are_counted(folder: Path) -> None:
    texts = [
        authorization(f"shop/p{number}", "DENY", HEADERS) for number in range(MAX_WARNINGS + 3)
    ]
    # In two files: of one a hundred are kept at most.
    put(folder / "a.yaml", *texts[:10])
    put(folder / "b.yaml", *texts[10:])

    async def body(reader: Reader) -> None:
        await reader.until(lambda state: len(state.documents) == len(texts))

    with capture_logs() as logs:
        run(source(folder), body)
    assert sum(each["event"] == "config_warning" for each in logs) == MAX_WARNINGS
    (left,) = [each for each in logs if each["event"] == "config_warnings_left_out"]
    assert left["count"] == 3


def test_custom_is_refused_in_the_log_with_its_place(folder: Path) -> None:
    put(folder / "a.yaml", authorization("shop/p", "CUSTOM", PORTS, provider={"name": "opa"}))

    async def body(reader: Reader) -> None:
        state = await reader.until(lambda state: bool(state.problems))
        (problem,) = state.problems
        assert (problem.field, state.documents) == ("spec.action", ())

    with capture_logs() as logs:
        run(source(folder), body)
    (refused,) = [each for each in logs if each["event"] == "config_refused"]
    assert "CUSTOM asks an external authorizer" in refused["problem"]


# --- command line --------------------------------------------------------------------------------


@pytest.mark.parametrize("output", ["text", "json"])
@pytest.mark.parametrize(
    "text,code,word",
    [
        (authorization("shop/p", "ALLOW", METHODS), 0, "operation.methods"),
        (authorization("shop/p", "DENY", HEADERS), 0, "when[0].key"),
        (authorization("shop/p", "ALLOW", PORTS, targetRefs=[TARGET]), 0, "spec.targetRefs[0]"),
        (authorization("shop/p", "CUSTOM", PORTS, provider={"name": "opa"}), 1, "spec.action"),
    ],
)
def test_policy_check_says_it(tmp_path: Path, text: str, code: int, word: str, output: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(text)
    result = CliRunner().invoke(cli, ["policy", "check", "-o", output, str(path)])
    assert result.exit_code == code
    said = result.stdout
    if output == "json":
        report = json.loads(said)
        said = json.dumps(report["errors"] if code else report["warnings"])
    assert word in said
    assert "a.yaml" in said
