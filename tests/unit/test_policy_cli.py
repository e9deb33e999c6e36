"""`nodeagent policy check`: what is found, where, and the exit code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from nodeagent.cli import cli

ALLOW = """\
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: callers, namespace: shop}
spec:
  rules:
  - from: [{source: {principals: ["cluster.local/ns/shop/sa/web"]}}]
"""
STRICT = """\
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: default, namespace: shop}
spec: {mtls: {mode: STRICT}}
"""
WORKLOAD = """\
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {name: web, namespace: shop, annotations: {nodeagent.io/netns: web}}
spec: {address: 10.0.0.1}
"""


def check(*arguments: str, given: str = "") -> Result:
    return CliRunner().invoke(cli, ["policy", "check", *arguments], input=given)


def write(folder: Path, name: str, text: str) -> str:
    path = folder / name
    path.write_text(text)
    return str(path)


def test_documents_that_would_be_in_force(tmp_path: Path) -> None:
    result = check(write(tmp_path, "a.yaml", ALLOW), write(tmp_path, "b.yaml", STRICT))
    assert (result.exit_code, result.stdout) == (
        0,
        "2 documents in 2 files: would be in force; 0 errors, 0 warnings\n",
    )


def test_a_directory_and_standard_input_are_files_too(tmp_path: Path) -> None:
    write(tmp_path, "a.yaml", ALLOW)
    write(tmp_path, "readme.txt", "no document")
    result = check(str(tmp_path), "-", given=STRICT)
    assert result.exit_code == 0
    assert "2 documents in 2 files" in result.stdout


@pytest.mark.parametrize(
    "text,place,reason",
    [
        (STRICT.replace("STRICT", "STRONG"), ":4:", "spec.mtls.mode"),
        (ALLOW.replace("principals", "principal"), ":6:", "unknown field"),
        (ALLOW.replace("callers, namespace", "callers, namespce"), ":3:", "unknown field"),
        ("a: [", ":2:", "not YAML"),
        ("just text\n", ":1:", "must be a resource"),
        (ALLOW.replace("cluster.local/ns/shop/sa/web", "set:friends"), ":6:", "friends"),
        (f"{ALLOW}---\n{ALLOW}", ":8:", "already taken"),
    ],
)
def test_an_error_names_the_file_the_line_and_what_is_wrong(
    tmp_path: Path, text: str, place: str, reason: str
) -> None:
    file = write(tmp_path, "shop.yaml", text)
    result = check(file)
    assert result.exit_code == 1
    first = result.stdout.splitlines()[0]
    assert first.startswith(f"error: {file}{place}")
    assert reason in first
    assert "would not be taken" in result.stdout
    told = json.loads(check(file, "-o", "json").stdout)
    assert told["errors"][0]["file"] == file
    assert f":{told['errors'][0]['line']}:" == place


def test_two_files_that_fight_over_a_name(tmp_path: Path) -> None:
    first = write(tmp_path, "a.yaml", ALLOW)
    second = write(tmp_path, "b.yaml", ALLOW)
    result = check(first, second)
    assert result.exit_code == 1
    assert f"error: {second}:1:1: metadata.name: " in result.stdout
    assert f"at {first}:1" in result.stdout


def test_what_has_no_effect_is_a_warning_and_no_error(tmp_path: Path) -> None:
    layer7 = ALLOW + '    to: [{operation: {methods: ["GET"]}}]\n'
    file = write(tmp_path, "shop.yaml", layer7)
    result = check(file)
    assert result.exit_code == 0
    assert result.stdout.startswith(f"warning: {file}:7:")
    assert "1 warning\n" in result.stdout
    told = json.loads(check(file, "-o", "json").stdout)
    assert (told["errors"], len(told["warnings"])) == ([], 1)


@pytest.mark.parametrize("text", ["", " \n\n"])
def test_an_empty_file_is_refused_as_the_agent_refuses_it(tmp_path: Path, text: str) -> None:
    file = write(tmp_path, "empty.yaml", text)
    result = check(file)
    assert result.exit_code == 1
    assert result.stdout.startswith(f"error: {file}: is empty: ")
    assert check("-", given=text).exit_code == 1


def test_a_file_of_comments_holds_nothing(tmp_path: Path) -> None:
    result = check(write(tmp_path, "comments.yaml", "# nothing\n---\n# yet\n"))
    assert (result.exit_code, result.stdout.splitlines()[-1][:22]) == (0, "0 documents in 1 file:")


def test_an_enormous_file_is_refused_by_its_size(tmp_path: Path) -> None:
    result = check(write(tmp_path, "large.yaml", "#" * (2 << 20)))
    assert result.exit_code == 1
    assert "split the file" in result.stdout


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    for output in ("text", "json"):
        result = check(str(tmp_path / "nowhere.yaml"), "-o", output)
        assert (result.exit_code, result.stdout) == (2, "")
        assert "nowhere.yaml: cannot be read: No such file" in result.stderr
    # As of a variable that is not set: not the current directory.
    unnamed = check("")
    assert (unnamed.exit_code, unnamed.stderr) == (2, "Error: '' names no file\n")


def test_what_is_wrong_with_standard_input_is_said_in_its_own_words() -> None:
    assert "standard input: is empty: did what writes it fail?" in check("-").stdout
    large = check("-", given="#" * (2 << 20))
    assert large.exit_code == 1
    assert "standard input: more than 1048576 bytes: give it in parts" in large.stdout


@pytest.mark.parametrize("name", ["\udcff.yaml", "a\x1b[31m.yaml", "a\nb.yaml"])
def test_a_name_that_is_no_text_is_refused_as_the_agent_refuses_it(
    tmp_path: Path, name: str
) -> None:
    file = write(tmp_path, name, ALLOW)
    for output in ("text", "json"):
        for given in (file, str(tmp_path)):
            result = check(given, "-o", output)
            assert result.exit_code == 1
            assert "has a name that is no text: rename it" in result.stdout
    asked = CliRunner().invoke(cli, ["policy", "explain", "plaintext", "shop/pay:80", file])
    assert asked.exit_code == 2
    tested = CliRunner().invoke(cli, ["policy", "test", file, "--config", file])
    assert tested.exit_code == 2
    assert "has a name that is no text: rename it" in tested.stderr


def test_wrong_usage(tmp_path: Path) -> None:
    assert check().exit_code == 2
    empty = check(str(tmp_path))
    assert empty.exit_code == 2
    assert "holds no file" in empty.stderr
    settings = write(tmp_path, "settings.yaml", "nod: x\n")
    refused = check(write(tmp_path, "a.yaml", ALLOW), "--settings", settings)
    assert refused.exit_code == 2
    assert f"{settings}:1:1" in refused.stderr


def test_the_settings_say_which_namespace_is_the_root(tmp_path: Path) -> None:
    selector = STRICT.replace("spec: {", "spec: {selector: {matchLabels: {app: web}}, ")
    file = write(tmp_path, "shop.yaml", selector)
    assert "0 warnings" in check(file).stdout
    settings = write(tmp_path, "settings.yml", "root_namespace: shop\n")
    result = check(file, "--settings", settings)
    assert result.exit_code == 0
    assert "in the root namespace" in result.stdout


@pytest.mark.parametrize(
    "text,said",
    [
        (
            STRICT.replace("STRICT", "DISABLE"),
            "says DISABLE, which has callers leave mutual TLS out",
        ),
        (
            STRICT.replace("STRICT", "DISABLE") + "---\n" + WORKLOAD,
            "says DISABLE: traffic is in the clear, and callers prove no identity, to shop/web;",
        ),
    ],
)
def test_disable_is_a_warning_with_its_place(tmp_path: Path, text: str, said: str) -> None:
    file = write(tmp_path, "shop.yaml", text)
    result = check(file)
    assert result.exit_code == 0
    assert f"warning: {file}:1:1: spec: PeerAuthentication shop/default {said}" in result.stdout
