"""YAML as the lab writes it.

This module owns turning plain values into YAML text and putting files where a watcher reads them.
It promises text that every reader of YAML takes for the same values (whatever could be taken for a
number, a boolean or a time is quoted), and that a watcher never sees half a file. It may not know
what the values mean.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import yaml

__all__ = ["replace_file", "to_yaml"]

_WORD: Final = re.compile(r"[A-Za-z/][A-Za-z0-9 ./_-]{5,}")
"""Long enough that it cannot be one of YAML's words (`no`, `null`, `false` …)."""


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: object) -> bool:
        del data
        return True


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    style = None if _WORD.fullmatch(value) else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


def _mapping(dumper: yaml.SafeDumper, value: dict[str, Any]) -> yaml.MappingNode:
    node = dumper.represent_mapping("tag:yaml.org,2002:map", value.items())
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode) and re.fullmatch(r"[A-Za-z_]{3,}", key.value):
            key.style = None
    return node


_Dumper.add_representer(str, _text)
_Dumper.add_representer(dict, _mapping)


def to_yaml(documents: Iterable[Any]) -> str:
    """Return a stream of documents."""
    return yaml.dump_all(
        documents,
        Dumper=_Dumper,
        explicit_start=True,
        sort_keys=False,
        allow_unicode=True,
        width=99,
    )


def replace_file(path: Path, text: str) -> None:
    """Put `text` at `path` in one step; the name used meanwhile is hidden and no YAML file's."""
    fresh = path.with_name(f".{path.name}.new")
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
    fresh.replace(path)
