"""How long flows are kept: settings, defaults and documentation agree."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

import msgspec
import pytest

from nodeagent.api import ConfigError
from nodeagent.settings import load_settings
from nodeagent.settings.flows import Keep, Section

PAGE: Final = Path(__file__).parents[2] / "docs" / "configuration.md"
CHAPTER: Final = re.compile(r"^### Recorded flows$(.*?)^#", re.MULTILINE | re.DOTALL)
ROW: Final = re.compile(r"^\| `(\w+)` \| (\d+) \| (\d+)–(\d+) \|", re.MULTILINE)


def load(tmp_path: Path, text: str) -> Keep:
    path = tmp_path / "nodeagent.yaml"
    path.write_text(f"node: node-1\n{text}")
    return load_settings(path).flows


def test_the_page_has_all_fields_with_their_defaults_and_ranges(tmp_path: Path) -> None:
    chapter = CHAPTER.search(PAGE.read_text(encoding="utf-8"))
    assert chapter is not None
    rows = {
        name: (int(default), int(least), int(most))
        for name, default, least, most in ROW.findall(chapter[1])
    }
    assert {name: row[0] for name, row in rows.items()} == msgspec.structs.asdict(Keep())
    assert tuple(rows) == Section.__struct_fields__
    for name, (_, least, most) in rows.items():
        for value in (least, most):
            assert getattr(load(tmp_path, f"flows: {{{name}: {value}}}\n"), name) == value
        for value in (least - 1, most + 1):
            with pytest.raises(ConfigError, match=f"flows.{name}.*is not between"):
                load(tmp_path, f"flows: {{{name}: {value}}}\n")


def test_what_is_left_out_has_its_default(tmp_path: Path) -> None:
    assert load(tmp_path, "") == Keep()
    assert load(tmp_path, "flows: {max_megabytes: 5}\n") == Keep(max_megabytes=5)
    with pytest.raises(ConfigError, match="unknown field"):
        load(tmp_path, "flows: {days: 5}\n")
