"""Options of kernels and strategies refused by name, where they are given."""

from collections.abc import Callable, Iterable
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
    if not callable(value):
        bounds = f"above {above:g}" if np.isinf(below) else f"between {above:g} and {below:g}"
        scalar(name, value, lambda x: above < x < below, f"a number {bounds}")


def scalar(name: str, value: Any, sound: Callable[[Any], Any], wanted: str) -> None:
    """Refuse what is no number, or not ``sound``.

    Raises:
        ValueError: naming it, and what is wanted.
    """
    a_number = isinstance(value, int | float | np.number | np.ndarray | jax.Array) and not isinstance(value, bool)
    if not (a_number and np.ndim(value) == 0 and sound(value)):
        raise ValueError(f"{name} must be {wanted}, got {value!r}.")


def site_names(name: str, value: Any) -> tuple[str, ...]:
    """Names of sites; a lone string is one.

    Raises:
        TypeError: naming the argument.

    >>> site_names("sites", "latent")
    ('latent',)
    """
    if isinstance(value, str):
        return (value,)
    found = tuple(value) if isinstance(value, Iterable) else (None,)
    if not all(isinstance(x, str) for x in found):
        raise TypeError(f'{name} must be names of sites, such as ["x"], got {value!r}.')
    return found


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
