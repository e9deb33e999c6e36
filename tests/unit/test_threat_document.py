"""docs/threat-model.md names only tests that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs/threat-model.md"
CITED = re.compile(r"`(test_[a-z0-9_]+)::(test_[a-z0-9_]+)`")
ITEM = re.compile(r"\*\*([CNT]\d+)\. ")


def existing() -> set[tuple[str, str]]:
    found = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                found.add((path.stem, node.name))
    return found


def test_every_test_that_is_cited_exists() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    cited = set(CITED.findall(text))
    assert cited
    missing = sorted(f"{file}::{name}" for file, name in cited - existing())
    assert not missing, f"{DOCUMENT.name} cites tests that do not exist: {missing}"
    # Nothing that looks like a test is cited in a form that is not checked.
    assert len(re.findall(r"\btest_[a-z0-9_]+\b", text)) == 2 * len(CITED.findall(text))


def test_every_attack_has_a_test_or_says_why_not() -> None:
    items = re.split(r"(?=\*\*[CNT]\d+\. )", DOCUMENT.read_text(encoding="utf-8"))[1:]
    names = [found[1] for item in items if (found := ITEM.match(item))]
    assert len(names) == len(set(names)) == len(items)
    for item in items:
        assert CITED.search(item) or "Not defended" in item or "Not done yet" in item, item[:60]


def test_every_test_of_a_threat_is_cited() -> None:
    cited = {file for file, _ in CITED.findall(DOCUMENT.read_text(encoding="utf-8"))}
    own = {path.stem for path in (ROOT / "tests").rglob("test_threat_*.py")}
    assert own - cited == {Path(__file__).stem}
