"""The core takes OpenSSL's functions once, and from one library only."""

from __future__ import annotations

import pytest

from ztunnel import _core, tls


def test_a_second_core_takes_the_functions_of_the_first() -> None:
    table = tls.function_table(_core.FUNCTIONS)
    first = _core.Core(1, table)
    second = _core.Core(1, dict(table))
    assert first is not second


def test_a_missing_function_is_named() -> None:
    table = dict(tls.function_table(_core.FUNCTIONS))
    del table["SSL_read"]
    with pytest.raises(ValueError, match="no address for SSL_read"):
        _core.Core(1, table)


def test_another_library_beside_the_first_is_refused() -> None:
    table = dict(tls.function_table(_core.FUNCTIONS))
    _core.Core(1, dict(table))
    table["SSL_read"] = table["SSL_write"]
    with pytest.raises(ValueError, match="not those of the process' first core"):
        _core.Core(1, table)
