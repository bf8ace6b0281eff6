"""Options of kernels and strategies refused by name, where they are given."""

from typing import Any

import jax
import numpy as np


def count(name: str, value: Any, least: int = 1) -> int:
    """``value`` as an integer of at least ``least``; a ValueError names it otherwise."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}.")
    return int(value)


def check_counts(options: Any, *names: str) -> None:
    """:func:`count` over attributes."""
    for name in names:
        count(f"{type(options).__name__}: {name}", getattr(options, name))


def number(name: str, value: Any, above: float = 0.0, below: float = np.inf) -> None:
    """Refuse what is no number between two bounds; a schedule (a function) passes.

    Raises:
        ValueError: naming it.
    """
    if callable(value):
        return
    a_number = isinstance(value, int | float | np.number | np.ndarray | jax.Array) and not isinstance(value, bool)
    if not (a_number and np.ndim(value) == 0 and above < value < below):
        bounds = f"above {above:g}" if np.isinf(below) else f"between {above:g} and {below:g}"
        raise ValueError(f"{name} must be a number {bounds}, got {value!r}.")


def check_number(options: Any, name: str, above: float = 0.0, below: float = np.inf) -> None:
    """:func:`number` of an attribute."""
    number(f"{type(options).__name__}: {name}", getattr(options, name), above, below)


def check_type(options: Any, name: str, kind: type, examples: str) -> None:
    """Refuse an attribute of another type.

    Raises:
        TypeError: naming it.
    """
    value = getattr(options, name)
    if not isinstance(value, kind):
        raise TypeError(f"{type(options).__name__}: {name} must be {examples}, got {value!r}.")
