"""Splitting Python objects into arrays, which JAX traces, and the rest, by which it caches."""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import CellType, FunctionType, MethodType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


class Structural:
    """A function compared by its code and what it closes over.

    ``flax_module`` makes a new closure at each call of the model; compared by identity, each would cost
    a compilation.
    """

    def __init__(self, fn: Callable, seen: tuple[int, ...] = ()) -> None:
        cells = getattr(fn, "__closure__", None) or ()
        seen = (*seen, id(fn))
        contents = tuple(hashable(c.cell_contents, seen) for c in cells)
        defaults = hashable(getattr(fn, "__defaults__", None), seen)
        self.key = (fn.__code__, contents, defaults)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Structural) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


class Leaf:
    """A leaf that is not an array, held by value where it is hashable."""

    def __init__(self, value: Any) -> None:
        self.value, self.key = value, hashable(value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Leaf) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


def hashable(value: Any, seen: tuple[int, ...] = ()) -> Any:
    """Return ``value`` if it can stand in a dictionary's key, else its identity; ``seen``: functions around it."""
    if id(value) in seen:  # a function that calls itself
        return value.__code__
    if hasattr(value, "__code__"):
        return Structural(value, seen)
    try:
        hash(value)
    except TypeError:
        return id(value)
    return (type(value), value)


def is_array(x: Any) -> bool:
    """Return whether JAX should trace it: not Python numbers, on which shapes depend, nor words and dates."""
    return isinstance(x, jax.Array | jax.core.Tracer) or (isinstance(x, np.ndarray) and x.dtype.kind not in "OSUMm")


def is_traced(*values: Any) -> bool:
    """Return whether some of these arrays have no numbers to look at, as inside ``jax.jit``, ``vmap`` or ``grad``."""
    return any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(values))


def constants_are_traced() -> bool:
    """Return whether JAX, here, traces even what is made of constants: inside ``jax.jit``."""
    return is_traced(jnp.zeros(()))


def outside_jit() -> AbstractContextManager:
    """Give what is made of constants its numbers, within this context, even inside ``jax.jit``."""
    return jax.ensure_compile_time_eval() if constants_are_traced() else nullcontext()


def split_static(tree: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Return ``(arrays, static)``: the arrays of a pytree, and all else as something hashable."""
    leaves, treedef = jax.tree.flatten(tree)
    arrays = tuple(x for x in leaves if is_array(x))
    rest = tuple(None if is_array(x) else Leaf(x) for x in leaves)
    return arrays, (treedef, rest)


def join_static(arrays: Any, static: Any) -> Any:
    """Invert :func:`split_static`."""
    treedef, rest = static
    remaining = iter(arrays)
    return jax.tree.unflatten(treedef, [next(remaining) if x is None else x.value for x in rest])


# --- functions as pytrees -----------------------------------------------------------------------------


class _Function:
    """A function or ``functools.partial`` taken apart: what it holds are children, its code is static."""

    def __init__(self, children: Any, code: Any) -> None:
        self.children, self.code = children, code


jax.tree_util.register_pytree_node(
    _Function, lambda f: ((f.children,), f.code), lambda code, children: _Function(children[0], code)
)


def split_function(fn: Callable) -> tuple[tuple[Any, ...], Any]:
    """Apply :func:`split_static` to a callable, the arrays held in its closures and partials included.

    A module bound in a model, or a function of ``numpyro.param`` values, is a new object at each call of the
    model, but its code is not: so two calls have equal static parts, and one compilation serves both.
    """
    return split_static(_take_apart(fn, ()))


def join_function(arrays: Any, static: Any) -> Callable:
    """Invert :func:`split_function`, with copies of whatever containers the callable holds."""
    return _put_together(join_static(arrays, static))


def _take_apart(tree: Any, seen: tuple[int, ...]) -> Any:
    def visit(leaf: Any) -> Any:
        if id(leaf) in seen:  # a function that calls itself
            return leaf
        inside = (*seen, id(leaf))
        if isinstance(leaf, functools.partial):
            return _Function(_take_apart((leaf.func, leaf.args, leaf.keywords), inside), "partial")
        if isinstance(leaf, MethodType):
            return _Function(_take_apart((leaf.__func__, leaf.__self__), inside), "method")
        if not isinstance(leaf, FunctionType):
            return leaf
        try:
            cells = [cell.cell_contents for cell in leaf.__closure__ or ()]
        except ValueError:  # a cell that is not filled yet
            return leaf
        held = (cells, leaf.__defaults__, leaf.__kwdefaults__)
        return _Function(_take_apart(held, inside), _Code(leaf))

    return jax.tree.map(visit, tree)


def _put_together(tree: Any) -> Any:
    def visit(leaf: Any) -> Any:
        if not isinstance(leaf, _Function):
            return leaf
        children = _put_together(leaf.children)
        if leaf.code == "partial":
            return functools.partial(children[0], *children[1], **children[2])
        if leaf.code == "method":
            return MethodType(*children)
        return leaf.code.function(*children)

    return jax.tree.map(visit, tree, is_leaf=lambda x: isinstance(x, _Function))


class _Code:
    """Code and globals of a function, compared as such."""

    def __init__(self, fn: FunctionType) -> None:
        self.code, self.globals, self.name = fn.__code__, fn.__globals__, fn.__name__

    def function(self, cells: list, defaults: Any, kwdefaults: Any) -> FunctionType:
        """Make a function of this code that closes over ``cells``."""
        fn = FunctionType(self.code, self.globals, self.name, defaults, tuple(CellType(value) for value in cells))
        fn.__kwdefaults__ = kwdefaults
        return fn

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Code) and self.code == other.code and self.globals is other.globals

    def __hash__(self) -> int:
        return hash(self.code)
