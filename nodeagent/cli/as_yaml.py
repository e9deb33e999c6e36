"""YAML as every reader takes it: pure.

This module owns the YAML that commands write. It promises that what is a text stays one for readers
of YAML 1.1 and of YAML 1.2: an identity named `no`, a serial number like `1e3`. It may not know any
document.
"""

from __future__ import annotations

import re
from datetime import date, datetime
from typing import Any, Final

import msgspec
import yaml

__all__ = ["yaml_of"]

_FLOAT: Final = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?\Z")
_OCTAL: Final = re.compile(r"0o[0-7]+\Z")
"""YAML 1.2, 10.3.2. PyYAML speaks 1.1, for which `1e3` and `0o17` are no numbers."""


class _Dumper(yaml.CSafeDumper):
    """Puts quotes around a text that would be read as anything else."""


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))
_Dumper.add_implicit_resolver("tag:yaml.org,2002:int", _OCTAL, ["0"])


def yaml_of(document: msgspec.Struct | dict[str, Any]) -> str:
    """Return one document, its last line feed included."""
    plain = msgspec.to_builtins(document, builtin_types=(datetime, date))
    said = yaml.dump(plain, Dumper=_Dumper, allow_unicode=True, sort_keys=False)
    assert isinstance(said, str)  # noqa: S101 - without an encoding it is
    return said
