"""No parser that reads more than it should is in the daemons' reach."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]

LOOSE = {
    "urlsplit": "drops tabs, newlines and a leading NUL, and takes the host after an @",
    "urlparse": "as urlsplit",
    "fnmatch": "honours [ and ? inside names",
    "fnmatchcase": "as fnmatch",
    "inet_aton": "takes 127.1, octal and trailing words",
    "getaddrinfo": "resolves names: what was checked need not be what is called",
    "gethostbyname": "as getaddrinfo",
    "match": "a pattern's $ accepts a final newline: fullmatch",
    "pickle": "runs what it reads",
    "marshal": "as pickle",
    "eval": "runs what it reads",
    "exec": "as eval",
    "is_private": "::ffff:10.0.0.1 is not private: compare canonical addresses",
}

NORMALISED = {
    "nodeagent/api/values.py",
    "nodeagent/settings/__init__.py",
    "nodeagent/settings/page.py",
    "nodeagent/capture/older.py",
}
"""Where `is_loopback` is asked of what is never IPv4-mapped, or refuses where it is."""


def sources() -> list[Path]:
    found = [
        path
        for package in ("nodeagent", "ztunnel")
        for path in sorted((ROOT / package).rglob("*.py"))
        # The lab runs on a developer's machine, on what its owner wrote.
        if "lab" not in path.relative_to(ROOT).parts
    ]
    assert len(found) > 50
    return found


def names(path: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.Attribute(attr=name) | ast.Name(id=name):
                yield name, node.lineno
            case ast.Import(names=imported) | ast.ImportFrom(names=imported):
                for alias in imported:
                    yield alias.name.rpartition(".")[2], node.lineno


def test_no_loose_parser_is_used() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: {name}: {LOOSE[name]}"
        for path in sources()
        for name, line in names(path)
        if name in LOOSE
    ]
    assert not found, "\n".join(found)


def test_loopback_is_asked_of_canonical_addresses_only() -> None:
    """`::ffff:127.0.0.1` is no loopback to Python 3.11; `ztunnel.address` knows better."""
    users = {
        str(path.relative_to(ROOT))
        for path in sources()
        if any(name == "is_loopback" for name, _ in names(path))
    }
    assert users <= NORMALISED
