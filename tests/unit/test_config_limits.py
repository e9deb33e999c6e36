"""The limits of a pod have one list of names: settings, protocol, core and documentation agree."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

import msgspec

from nodeagent.settings.limits import Section
from ztunnel import _core
from ztunnel.protocol import Limits
from ztunnel.reasons import Reason

PAGE: Final = Path(__file__).parents[2] / "docs" / "configuration.md"
CHAPTER: Final = re.compile(r"^### Limits of a pod$(.*?)^#", re.MULTILINE | re.DOTALL)
ROW: Final = re.compile(r"^\| `(\w+)` \| (\d+) \|.*\|(?: `(\w+)`)?[^|]*\|$", re.MULTILINE)

DEFAULTS: Final = msgspec.structs.asdict(Limits())


def test_the_protocol_has_the_cores_limits_and_defaults() -> None:
    ours = {name: most for name, most in DEFAULTS.items() if name != "failure_lines"}
    assert ours == _core.LIMITS


def test_the_settings_have_them_all() -> None:
    assert Section.__struct_fields__ == Limits.__struct_fields__


def test_the_page_has_them_all_with_their_defaults_and_reasons() -> None:
    chapter = CHAPTER.search(PAGE.read_text(encoding="utf-8"))
    assert chapter is not None
    rows = {name: (int(default), reason) for name, default, reason in ROW.findall(chapter[1])}
    assert {name: default for name, (default, _) in rows.items()} == DEFAULTS
    for _, reason in rows.values():
        assert not reason or Reason(reason)
