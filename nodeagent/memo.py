"""A function that remembers its last call.

This module owns nothing but that. It promises that the result is what the function would return for
these arguments. It may be put only around functions of values that never change: what they return
is returned again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

__all__ = ["Last"]

R = TypeVar("R")


class Last(Generic[R]):
    """Calls `function` only when its arguments are not equal to those of the call before.

    Containers of Python compare the same objects by their identity, so to find that a hundred
    thousand documents are the same takes a millisecond.
    """

    def __init__(self, function: Callable[..., R]) -> None:
        self._function = function
        self._known: tuple[tuple[Any, ...], R] | None = None

    def __call__(self, *arguments: Any) -> R:  # noqa: ANN401 - the function's own business
        if self._known is None or self._known[0] != arguments:
            self._known = (arguments, self._function(*arguments))
        return self._known[1]
