"""The deadlines have one list of names: settings, protocol, core and documentation agree."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

import msgspec

from nodeagent.settings.deadlines import Section
from ztunnel import _core
from ztunnel.protocol import Deadlines
from ztunnel.reasons import Reason

PAGE: Final = Path(__file__).parents[2] / "docs" / "configuration.md"
ROW: Final = re.compile(
    r"^\| `(\w+)` \| (\d+) \| (\d+)–(\d+) \|.*\|(?: `(\w+)`)?[^|]*\|$", re.MULTILINE
)

DEFAULTS: Final = msgspec.structs.asdict(Deadlines())


def test_the_protocol_has_the_cores_deadlines_and_defaults() -> None:
    assert {name: seconds * 1_000_000 for name, seconds in DEFAULTS.items()} == _core.DEADLINES


def test_the_settings_have_them_all() -> None:
    assert Section.__struct_fields__ == Deadlines.__struct_fields__


def test_the_page_has_them_all_with_their_defaults_and_reasons() -> None:
    rows = {name: rest for name, *rest in ROW.findall(PAGE.read_text(encoding="utf-8"))}
    assert {name: int(row[0]) for name, row in rows.items()} == DEFAULTS
    for default, least, most, reason in rows.values():
        assert int(least) <= int(default) <= int(most)
        assert not reason or Reason(reason)
