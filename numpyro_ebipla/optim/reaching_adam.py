"""The default optimiser: Adam for parameters of any scale, and orthogonal moves for the matrices of an energy."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array


class ReachState(NamedTuple):
    """Adam's first moment and second moments over long and over short; by parameter array how steady it moves."""

    count: Array  # type: ignore[assignment]
    mean: Any
    square: Any
    recent: Any
    log_reach: Any


def orthogonalised(matrix: Array) -> Array:
    """All singular values of ``[m, n]`` brought near one, by five Newton–Schulz iterations (Jordan et al., 2024)."""
    x = matrix / (jnp.linalg.norm(matrix) + 1e-30)
    x = x.T if x.shape[0] > x.shape[1] else x
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def reaching_adam(
    learning_rate: Callable[[Array], Array], gain: float = 0.1, orthogonal: bool = False
) -> optax.GradientTransformation:
    """Adam for parameters of any scale, however far they have to go.

    Three things differ from Adam (Kingma and Ba, 2015). Gradients at the start of a fit may be larger by orders of
    magnitude than later ones (variances that begin too small), and Adam's second moment remembers them for thousands
    of steps: here it is at most four times that of the last dozen. And the step of each parameter array has a factor
    of its own. It grows while the gradients keep their direction, up to the array's own root mean square, so that 1459
    is as near as 1 in the number of steps; and it falls while they point to and fro, as steps too large make them do.
    And with ``orthogonal``, for the weights of a network, the move of a matrix is its mean gradient with all singular
    values made equal (Muon; Jordan et al., 2024): directions in which gradients are small move as fast as the others.
    An energy learns fine detail so in a fraction of the steps.

    Args:
        learning_rate: schedule of the step size.
        gain: how fast the factors change.
        orthogonal: whether matrices move so.
    """
    b2, b3 = 0.999, 0.9
    # A constant in the energy has no gradient but rounding, 1e-7 in single precision, and must not drift by it.
    least = 1e-5 if orthogonal else 1e-8

    def init(params: Any) -> ReachState:
        wide = lambda p: jnp.promote_types(p.dtype, jnp.float32)  # squares of gradients leave the range of half floats
        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, wide(p)), params)
        log_reach = jax.tree.map(lambda p: jnp.zeros((), wide(p)), params)
        return ReachState(jnp.zeros((), jnp.int32), zeros, zeros, zeros, log_reach)

    def update(updates: Any, state: ReachState, params: Any = None) -> tuple[Any, ReachState]:
        count = state.count + 1
        rate = learning_rate(state.count)

        def leaf(g: Array, m: Array, v: Array, f: Array, r: Array, p: Array) -> tuple[Array, ...]:
            # In double precision the scalars are doubles, but parameters (of modules) may still be single ones.
            rest = lambda b: (1 - b**count).astype(m.dtype)
            is_matrix = orthogonal and p.ndim == 2
            b1 = 0.95 if is_matrix else 0.9
            white = (1 - b1) / (1 + b1)  # squared mean over mean square, where gradients are white noise
            dtype, g, p = p.dtype, g.astype(m.dtype), p.astype(m.dtype)
            m, v, f = m + (1 - b1) * (g - m), v + (1 - b2) * (g**2 - v), f + (1 - b3) * (g**2 - f)
            mean, recent = m / rest(b1), f / rest(b3)
            steady = jnp.sum(mean**2) / (jnp.sum(recent) + 1e-30)
            size = jnp.sqrt(jnp.mean(p**2) * (p.shape[0] if is_matrix else 1))
            # In a network's gradients noise prevails: its steps do not fall or grow for noise alone.
            pivot = jnp.where(r > 0, 2 * white, white / 2) if orthogonal else white
            r = jnp.minimum(r + gain * (steady - pivot), jnp.log(jnp.maximum(size, 1.0)))
            if is_matrix:
                ahead = b1 * mean + (1 - b1) * g  # Nesterov's
                direction = max(1.0, p.shape[1] / p.shape[0]) ** 0.5 * orthogonalised(ahead)
            else:
                direction = mean / (jnp.sqrt(jnp.minimum(v / rest(b2), 4 * recent)) + least)
            step = -(rate * jnp.exp(r)).astype(g.dtype) * direction
            return step.astype(dtype), m, v, f, r

        out = jax.tree.map(leaf, updates, *state[1:], params)
        pick = lambda i: jax.tree.map(lambda o: o[i], out, is_leaf=lambda o: isinstance(o, tuple) and len(o) == 5)
        return pick(0), ReachState(count, *(pick(i) for i in range(1, 5)))

    return optax.GradientTransformation(init, update)
