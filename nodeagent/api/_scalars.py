"""What an unquoted word means: nothing that any reader of YAML could take for something else.

This module owns the reading of scalars. It promises that a value means here what it means to every
other reader (YAML 1.1, YAML 1.2 core, JSON, Kubernetes), or is refused with the spelling to use;
so `no`, `22:22`, `010` and `1e3` never change their meaning on the way. It may not know fields.

Sources: YAML 1.1 types bool, int, float, null, merge, value; YAML 1.2 core schema, 10.3.2.
"""

from __future__ import annotations

import re
from typing import Final

from nodeagent.api._errors import quote
from nodeagent.api._tree import Scalar

__all__ = ["is_null", "read_boolean", "read_integer", "read_string"]

_NULL: Final = frozenset({"", "~", "null", "Null", "NULL"})

_BOOLEAN: Final = frozenset(
    spelling
    for word in ("y", "n", "yes", "no", "true", "false", "on", "off")
    for spelling in (word, word.capitalize(), word.upper())
)

# Whatever any of the two versions takes for a number: decimal, 0x, 0o, 0b and leading-zero octal,
# base 60 (`22:22`), underscores, floats, infinities.
_NUMBER: Final = re.compile(
    r"""[-+]?(?:
        0b[01_]+ | 0o[0-7_]+ | 0x[0-9a-fA-F_]+
      | [0-9][0-9_]*(?::[0-5]?[0-9])+(?:\.[0-9_]*)?
      | [0-9][0-9_]*(?:\.[0-9_]*)?(?:[eE][-+]?[0-9]+)?
      | \.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?
      | \.(?:inf|Inf|INF)
    ) | \.(?:nan|NaN|NAN)""",
    re.VERBOSE,
)

# Eighteen digits: below 2**63, and far below the length at which int() itself refuses.
_INTEGER: Final = re.compile(r"0|-?[1-9][0-9]{0,17}")


def is_null(scalar: Scalar) -> bool:
    return scalar.plain and scalar.text in _NULL


def read_string(scalar: Scalar) -> str:
    """Return the text. Raises ValueError if some reader would not take it for text."""
    text = scalar.text
    if not scalar.plain:
        return text
    kind = ""
    if text in _NULL:
        kind = "null"
    elif text in _BOOLEAN:
        kind = "a boolean"
    elif _NUMBER.fullmatch(text):
        kind = "a number"
    elif text in {"<<", "="}:
        kind = "an operator"
    if kind:
        raise ValueError(f"{quote(text)} is {kind} in YAML: put it in quotes to mean text")
    return text


def read_integer(scalar: Scalar) -> int:
    """Return the number. Raises ValueError unless it is written in plain decimal digits."""
    if not scalar.plain:
        raise ValueError(f"{quote(scalar.text)} is text: write the number without quotes")
    if not _INTEGER.fullmatch(scalar.text):
        raise ValueError(
            f"{quote(scalar.text)} is no whole number: write decimal digits only, "
            "without leading zeros, signs, dots, colons or underscores"
        )
    return int(scalar.text)


def read_boolean(scalar: Scalar) -> bool:
    """Return the truth value. Raises ValueError unless it is `true` or `false`."""
    if not scalar.plain or scalar.text not in {"true", "false"}:
        raise ValueError(f"{quote(scalar.text)} is no boolean: write true or false, unquoted")
    return scalar.text == "true"
