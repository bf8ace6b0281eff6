"""Linear algebra for matrices of few columns, many at once, as sums and products of whole arrays.

XLA compiles a kernel for each product of matrices, however small, and calls LAPACK for each factor: with two columns
the one is a third of a small model's programs, and the other slower than all that it is needed for.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

#: Columns that are few.
FEW = 4


def as_groups(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return how many groups a latent's shape stands for, of how many coordinates: the trailing axes of a few in all.

    A last axis of more than a few is none of groups, but of the weights of a network's layer, for example.

    >>> as_groups((72, 2)), as_groups((300,)), as_groups((12, 6, 2)), as_groups(()), as_groups((784, 40))
    ((72, 2), (300, 1), (72, 2), (1, 1), (1, 31360))
    """
    if len(shape) > 1 and shape[-1] > FEW:
        return 1, math.prod(shape)
    size = 1
    for width in reversed(shape[1:]):
        if size * width > FEW:
            break
        size *= width
    return math.prod(shape) // size, size


def weigh(weight: Array, x: Array) -> Array:
    """Return ``weight @ x`` of ``[n]`` and ``[n, k]``.

    >>> weigh(jnp.array([1.0, 2.0]), jnp.array([[1.0, 0.0], [1.0, 3.0]])).tolist()
    [3.0, 6.0]
    """
    return jnp.sum(weight[:, None] * x, 0)


def apply(x: Array, vector: Array) -> Array:
    """Return ``x @ vector`` of ``[n, k]`` and ``[k]``."""
    return jnp.sum(x * vector[None], 1)


def cross(a: Array, b: Array) -> Array:
    """Return ``aᵀ b`` of ``[n, k]`` and ``[n, l]``."""
    if max(a.shape[1], b.shape[1]) > FEW:
        return a.T @ b
    return jnp.sum(a[:, :, None] * b[:, None, :], 0)


def solver(matrix: Array) -> Callable[[Array], Array]:
    """Return ``b -> x`` of ``matrix @ x = b`` for a symmetric positive definite ``[k, k]`` and ``[k]``.

    NaN where it is not positive definite.

    >>> solver(jnp.array([[2.0, 1.0], [1.0, 3.0]]))(jnp.array([1.0, 3.0])).round(6).tolist()
    [0.0, 1.0]
    """
    size = len(matrix)
    if size > FEW:
        factor = jax.scipy.linalg.cho_factor(matrix)
        return lambda b: jax.scipy.linalg.cho_solve(factor, b)
    root: dict[tuple[int, int], Array] = {}  # the lower Cholesky factor, by entry
    for j in range(size):
        for i in range(j, size):
            rest = matrix[i, j] - sum(root[i, k] * root[j, k] for k in range(j))
            root[i, j] = jnp.sqrt(rest) if i == j else rest / root[j, j]

    def solve(b: Array) -> Array:
        x: list[Array] = []
        for i in range(size):
            x.append((b[i] - sum(root[i, k] * x[k] for k in range(i))) / root[i, i])
        for i in reversed(range(size)):
            x[i] = (x[i] - sum(root[k, i] * x[k] for k in range(i + 1, size))) / root[i, i]
        return jnp.stack(x)

    return solve
