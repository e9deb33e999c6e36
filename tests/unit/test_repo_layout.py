"""Rules of the repository that no linter knows."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from nodeagent import api
from nodeagent.settings import Settings, load_settings

ROOT = Path(__file__).parents[2]

MAX_LINES = {".bpf.c": 400, ".c": 800, ".h": 800, ".py": 500}
"""A file above this has outgrown one concept. The first suffix that fits counts."""

SOURCES = (
    "nodeagent",
    "ztunnel",
    "bpf",
    "tests",
    "bench",
    "systemd",
    "vagrant",
    "docs",
    "schemas",
    ".ci",
)
PLAIN = (
    "Makefile",
    "README.md",
    "setup.py",
    "pyproject.toml",
    "requirements.lock",
    "web/.npmrc",
    "web/package.json",
    "web/package-lock.json",
    "web/tsconfig.json",
)

NOT_TEXT = {".so", ".o", ".pyc", ".partial", ".png", ".gz", ".bin"}

FOREIGN = re.compile(
    # Directories of one person's machine, and addresses of package indexes.
    r"(?<![\w.])/(?:root|home/\w+)/|https?://[\w.-]*(?:pypi|pythonhosted|crates|npmjs)[\w.-]*"
)


def sources() -> Iterator[Path]:
    for directory in SOURCES:
        for path in (ROOT / directory).rglob("*"):
            if path.is_file() and path.suffix not in NOT_TEXT:
                yield path
    for name in (*PLAIN, "requirements-dev.lock"):
        yield ROOT / name


def test_files_hold_one_concept() -> None:
    grown = []
    for path in sources():
        limit = next((most for end, most in MAX_LINES.items() if path.name.endswith(end)), None)
        if limit is not None:
            lines = len(path.read_text(encoding="utf-8").splitlines())
            if lines > limit:
                grown.append(f"{path.relative_to(ROOT)}: {lines} lines, {limit} at most")
    assert not grown


def test_nothing_points_at_one_machine() -> None:
    found = []
    for path in sources():
        if path == Path(__file__):
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if FOREIGN.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}")
    assert not found


@pytest.mark.parametrize("package", ["nodeagent", "ztunnel"])
def test_every_module_says_what_it_owns(package: str) -> None:
    silent = []
    for path in (ROOT / package).rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if tree.body and not ast.get_docstring(tree):
            silent.append(str(path.relative_to(ROOT)))
    assert not silent


def locked(name: str) -> dict[str, str]:
    text = (ROOT / name).read_text(encoding="utf-8")
    return dict(re.findall(r"^([\w.-]+)==([^\s\\]+)", text, re.MULTILINE))


def normalised(requirement: str) -> str:
    return re.split(r"[<>=!~;\[ ]", requirement, maxsplit=1)[0].lower().replace("_", "-")


def test_lock_files_hold_every_dependency_and_agree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    runtime, development = locked("requirements.lock"), locked("requirements-dev.lock")
    assert {normalised(each) for each in project["dependencies"]} <= runtime.keys()
    extra = project["optional-dependencies"]["dev"]
    assert {normalised(each) for each in extra} <= development.keys()
    assert runtime.items() <= development.items()


def test_every_locked_version_has_hashes() -> None:
    for name in ("requirements.lock", "requirements-dev.lock"):
        text = (ROOT / name).read_text(encoding="utf-8")
        for entry in re.split(r"^(?=[\w.-]+==)", text, flags=re.MULTILINE)[1:]:
            assert "--hash=sha256:" in entry, entry.splitlines()[0]


def test_extension_module_wins_over_the_directory_of_its_sources() -> None:
    """ztunnel/_core holds C and is no package: the name means the compiled module."""
    done = subprocess.run(
        [sys.executable, "-c", "import ztunnel._core as core; print(core.__file__)"],
        check=True,
        text=True,
        capture_output=True,
        cwd="/",
    )
    assert re.search(r"/ztunnel/_core\.[\w-]+\.so$", done.stdout.strip())
    assert not list((ROOT / "ztunnel" / "_core").glob("*.py"))


def test_help_lists_every_target() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    phony = set(re.findall(r"^\.PHONY: (\S+)$", makefile, re.MULTILINE)) - {"system-packages"}
    done = subprocess.run(
        ["make", "--no-print-directory", "help"],
        check=True,
        text=True,
        capture_output=True,
        cwd=ROOT,
    )
    assert phony == set(re.findall(r"^  ([a-z-]+)", done.stdout, re.MULTILINE))


@pytest.mark.parametrize("document", ["README.md", "docs/operations.md"])
def test_documents_name_only_what_exists(document: str) -> None:
    """Each `make TARGET` is a target, and each linked file is there."""
    text = (ROOT / document).read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    assert set(re.findall(r"`make ([a-z-]+)`", text)) <= targets
    for target in re.findall(r"^make ([a-z-]+)", text, re.MULTILINE):
        assert target in targets
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert ((ROOT / document).parent / link).exists(), f"{document}: {link}"


def test_examples_of_the_readme_are_valid() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    examples = re.findall(r"^```yaml\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert examples
    for example in examples:
        loaded = api.load(example.encode(), "README.md")
        assert not loaded.errors, loaded.errors
        assert not loaded.warnings, loaded.warnings
        assert loaded.documents


def test_installed_settings_are_the_defaults() -> None:
    """The commented file that `make install` leaves changes nothing, and shows true defaults."""
    path = ROOT / "systemd" / "nodeagent.yaml"
    assert load_settings(path) == Settings()
    shown = dict(re.findall(r"^# (\w+): (\S+)$", path.read_text(encoding="utf-8"), re.MULTILINE))
    del shown["node"]
    for name, value in shown.items():
        assert str(getattr(Settings(), name)) == value
