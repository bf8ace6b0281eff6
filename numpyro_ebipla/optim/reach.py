"""The reach: a factor of the steps of each array, or number, by whether its gradients keep their direction."""

from collections.abc import Callable
from operator import attrgetter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from numpyro_ebipla.optim.transforms import RECENT_DECAY, TINY


class ReachState(NamedTuple):
    """Number of updates; mean of recent squared norms and log factor, by array or number; the inner state."""

    count: Array  # type: ignore[assignment]
    square: Any
    log_reach: Any
    inner: Any


#: Growth of the log factor per step where all gradients are the same: tenfold in two dozen steps, no faster than the
#: means forget, so that a turn is seen before the steps have outgrown it.
GAIN = 0.1
#: Most of an array's size that its steps reach, in units of the inner steps: with rates of 0.01 a tenth of it. From
#: means of 3e9 in units of the start on, 4 were too few for 5000 steps.
MOST = 10.0


def root_mean_square(array: Array) -> Array:
    """Return the size of an array's entries, a scalar."""
    return jnp.sqrt(jnp.mean(jnp.square(array)))


def with_reach(
    inner: optax.GradientTransformation,
    decay: float = 0.9,
    *,
    mean_of: Callable[[Any], Any] = attrgetter("mean"),
    gain: float = GAIN,
    slack: float = 1.0,
    most: float = MOST,
    size: Callable[[Array], Array] = root_mean_square,
    by_number: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Multiply the updates of each array by a factor that grows while its gradients keep their direction.

    The factor ``r`` starts at one and follows ``log r ← log r + gain (s − w)``. Here ``s`` is the squared norm of the
    gradients' mean over the mean of their squared norms: one where all gradients are the same, ``w = (1 − b)/(1 + b)``
    with ``b`` the decay where they are white noise, and less where they point to and fro, as steps too large make
    them do. It grows up to ten times the array's own size in steps (from one on by the square of it), so that a
    location of a million is reached in a few hundred steps.

    Args:
        inner: what makes updates of the order of one from the gradients, such as
            :func:`~numpyro_ebipla.optim.transforms.scale_by_capped_adam`.
        decay: ``b`` of the gradients' mean in the inner state.
        mean_of: maps the inner state to that mean, ``(1 − b) Σ bⁱ g₋ᵢ``, not corrected for its start at zero.
        gain: growth of ``log r`` per step.
        slack: where noise prevails, as in a network's gradients, ``r`` should neither fall nor grow for noise alone:
            it is raised above one for ``s`` above ``slack · w`` only, and lowered below one for ``s`` below
            ``w / slack``.
        most: of an array's size that the steps reach: ``r`` is at most this times the size, or its square, or one.
        size: maps an array to its size in updates of the inner transformation.
        by_number: whether each number has a factor of its own, and its size is its absolute value: then it makes no
            difference whether parameters are an array or scalars. A mean of hundreds may stand beside one of
            thousandths in an array that the user calls one parameter.

    Returns:
        A transformation that needs the parameters, and passes extra arguments on to the inner one. Its ``update``
        raises a ValueError without parameters.
    """
    inner = optax.with_extra_args_support(inner)
    white = (1 - decay) / (1 + decay)
    norm = jnp.square if by_number else lambda x: jnp.sum(jnp.square(x))
    size = jnp.abs if by_number else size

    def grown(log_reach: Array, mean: Array, square: Array, param: Array) -> Array:
        steadiness = norm(mean) / (square + TINY)
        pivot = jnp.where(log_reach > 0, slack * white, white / slack)
        furthest = jnp.log(jnp.maximum(jnp.minimum(most * size(param), jnp.square(size(param))), 1.0))
        return jnp.minimum(log_reach + gain * (steadiness - pivot), furthest).astype(log_reach.dtype)

    def init(params: Any) -> ReachState:
        zeros = jax.tree.map(lambda p: jnp.zeros_like(p if by_number else size(p)), params)
        return ReachState(jnp.zeros((), jnp.int32), zeros, zeros, inner.init(params))

    def update(updates: Any, state: ReachState, params: Any = None, **extra: Any) -> tuple[Any, ReachState]:
        if params is None:
            raise ValueError("with_reach bounds steps by the parameters' size: call update(grads, state, params).")
        count = optax.safe_increment(state.count)
        square = optax.tree.update_moment(jax.tree.map(norm, updates), state.square, RECENT_DECAY, 1)
        updates, inner_state = inner.update(updates, state.inner, params, **extra)
        log_reach = jax.tree.map(
            grown,
            state.log_reach,
            optax.tree.bias_correction(mean_of(inner_state), decay, count),
            optax.tree.bias_correction(square, RECENT_DECAY, count),
            params,
        )
        updates = jax.tree.map(lambda r, u: jnp.exp(r) * u, log_reach, updates)
        return updates, ReachState(count, square, log_reach, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)
