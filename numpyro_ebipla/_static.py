"""Splitting Python objects into arrays, which JAX traces, and the rest, by which it caches."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np


class Structural:
    """A function compared by its code and what it closes over.

    ``flax_module`` makes a new closure at each call of the model; compared by identity, each would cost
    a compilation.
    """

    def __init__(self, fn: Callable) -> None:
        cells = getattr(fn, "__closure__", None) or ()
        contents = tuple(hashable(c.cell_contents) for c in cells)
        defaults = hashable(getattr(fn, "__defaults__", None))
        self.key = (fn.__code__, contents, defaults)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Structural) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


class Leaf:
    """A leaf that is no array, held by value where it is hashable."""

    def __init__(self, value: Any) -> None:
        self.value, self.key = value, hashable(value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Leaf) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


def hashable(value: Any) -> Any:
    """``value`` if it can stand in a dictionary's key, else its identity."""
    if hasattr(value, "__code__"):
        return Structural(value)
    try:
        hash(value)
    except TypeError:
        return id(value)
    return (type(value), value)


def is_array(x: Any) -> bool:
    """Whether JAX should trace it; Python numbers stay static, as shapes depend on them."""
    return isinstance(x, jax.Array | jax.core.Tracer | np.ndarray)


def split_static(tree: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """``(arrays, static)``: the arrays of a pytree, and all else as something hashable."""
    leaves, treedef = jax.tree.flatten(tree)
    arrays = tuple(x for x in leaves if is_array(x))
    rest = tuple(None if is_array(x) else Leaf(x) for x in leaves)
    return arrays, (treedef, rest)


def join_static(arrays: Any, static: Any) -> Any:
    """The inverse of :func:`split_static`."""
    treedef, rest = static
    remaining = iter(arrays)
    return jax.tree.unflatten(treedef, [next(remaining) if x is None else x.value for x in rest])
