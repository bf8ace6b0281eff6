"""Small helpers over pytrees whose leaves share leading chain axes."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax, random

#: Arrays in any nesting of containers, or a bare array.
PyTree = Any


def spaced(size: int, number: int) -> np.ndarray:
    """Return up to ``number`` evenly spaced indices below ``size``."""
    return np.arange(size) if size <= number else np.linspace(0, size - 1, number).astype(int)


def normal_like(rng_key: Array, tree: Any) -> Any:
    """Draw standard normal noise in the shape and dtype of every leaf."""
    leaves, treedef = jax.tree.flatten(tree)
    keys = random.split(rng_key, max(len(leaves), 1))
    noise = [random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=False)]
    return jax.tree.unflatten(treedef, noise)


def chain_sum(tree: Any, chain_shape: tuple[int, ...]) -> Array:
    """Sum all leaves over all but their leading chain axes: ``[*C]``."""
    ndim = len(chain_shape)
    total = [jnp.sum(x, axis=tuple(range(ndim, x.ndim))) for x in jax.tree.leaves(tree)]
    return sum(total, start=jnp.zeros(chain_shape))


def chain_select(accept: Array, new: Any, old: Any) -> Any:
    """Take ``new`` where ``accept`` (``[*C]``), else ``old``, leaf by leaf."""

    def select(a: Array, b: Array) -> Array:
        return jnp.where(accept.reshape(accept.shape + (1,) * (a.ndim - accept.ndim)), a, b)

    return jax.tree.map(select, new, old)


def take(tree: Any, indices: Array | None, axis: int) -> Any:
    """Gather ``indices`` along ``axis`` of every leaf; all of it if ``indices`` is None."""
    if indices is None:
        return tree
    return jax.tree.map(lambda x: jnp.take(x, indices, axis=axis, unique_indices=True), tree)


def put(tree: Any, indices: Array | None, new: Any, axis: int) -> Any:
    """Scatter ``new`` back to where :func:`take` found it."""
    if indices is None:
        return new
    where = (slice(None),) * axis + (indices,)
    return jax.tree.map(lambda x, y: x.at[where].set(y, unique_indices=True), tree, new)


def by_path(tree: Any) -> dict[str, Any]:
    """Return the leaves by their path in the tree, as text; that of a lone leaf is empty."""
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def batched_value_and_grad(fn: Callable[[Any], Array]) -> Callable[[Any], tuple[Array, Any]]:
    """Return value ``[*C]`` and gradient of a function of independent chains, in one backward pass."""

    def total(x: Any) -> tuple[Array, Array]:
        value = fn(x)
        return value.sum(), value

    def value_and_grad(x: Any) -> tuple[Array, Any]:
        (_, value), grad = jax.value_and_grad(total, has_aux=True)(x)
        return value, grad

    return value_and_grad


def strong_type(tree: Any) -> Any:
    """Strip weak types, which would cost a second compilation."""
    return jax.tree.map(lambda x: lax.convert_element_type(x, jnp.result_type(x)), tree)


def all_finite(tree: Any) -> Array:
    """Return whether every inexact leaf is finite, a boolean scalar."""
    leaves = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return jnp.all(jnp.array([jnp.all(jnp.isfinite(x)) for x in leaves] or [True]))
