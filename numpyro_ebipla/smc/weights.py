r"""Importance weights along a path of densities: ESS, Jarzynski increments, systematic resampling.

Walkers carry log weights ``A`` such that, at every step, expectations under the current density are
weighted means with ``softmax(A)`` and ``log Z = log Z_0 + log mean exp(A)`` (2305.19414, Prop. 1).
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, random
from jax.scipy.special import logsumexp

from numpyro_ebipla._core.tree import chain_sum


def log_mean_exp(log_weight: Array) -> Array:
    """Return ``log mean exp`` over the leading axis, max-shifted."""
    return logsumexp(log_weight, axis=0) - jnp.log(log_weight.shape[0])


def normalised(log_weight: Array) -> Array:
    """Return self-normalised weights over the leading axis (they sum to one)."""
    return jax.nn.softmax(log_weight, axis=0)


def ess(log_weight: Array) -> Array:
    """Return the effective sample size ``1 / Σ w²`` over the leading axis, between 1 and P.

    >>> round(float(ess(jnp.zeros(100))), 3)
    100.0
    """
    return 1 / jnp.sum(jnp.square(normalised(log_weight)), axis=0)


def quantile(values: Array, weight: Array, q: float) -> Array:
    """Return the smallest value at which the weights (which sum to one) add up to ``q``, over the leading axis.

    >>> float(quantile(jnp.array([3.0, 1.0, 2.0]), jnp.array([0.2, 0.2, 0.6]), 0.5))
    2.0
    """
    order = jnp.argsort(values, axis=0)
    reached = jnp.cumsum(jnp.take_along_axis(weight, order, 0), 0) >= q
    where = jnp.where(reached.any(0), jnp.argmax(reached, 0), len(values) - 1)  # rounding may leave the sum below q
    return jnp.take_along_axis(values, jnp.take_along_axis(order, where[None], 0), 0)[0]


def ula_increment(
    old: tuple[Array, Array, Array], new: tuple[Array, Array, Array], step_size: Array, chain_ndim: int = 1
) -> Array:
    r"""Return Jarzynski's increment of ``A`` for an unadjusted Langevin move (2305.19414, eq. 13).

    With ``U = −log density`` and the move ``x → y`` made at ``θ_k`` with step ``h``:
    ``α_k(x, y) = U_k(x) + ½⟨y − x, ∇U_k(x)⟩ + (h/4)‖∇U_k(x)‖²`` and the increment is
    ``α_k(x, y) − α_{k+1}(y, x)``.

    Args:
        old: ``(x, log density, gradient)`` at ``θ_k``: ``[*C, *event]``, ``[*C]``, ``[*C, *event]``.
        new: the same for ``y`` at ``θ_{k+1}``.
        step_size: ``h`` with which the move was made.
        chain_ndim: number of leading chain axes.
    """
    shape = old[0].shape[:chain_ndim]
    forward = ula_action(shape, old[1], old[2], new[0] - old[0], step_size)
    return forward - ula_action(shape, new[1], new[2], old[0] - new[0], step_size)


def ula_action(chain_shape: tuple[int, ...], log_density: Array, gradient: Any, moved: Any, step_size: Array) -> Array:
    r"""Return ``α(x, y) = U(x) + ½⟨y − x, ∇U(x)⟩ + (h/4)‖∇U(x)‖²`` (2305.19414, eq. 12) for each chain: ``[*C]``.

    Args:
        chain_shape: ``C``.
        log_density: ``−U(x)``, ``[*C]``.
        gradient: ``−∇U(x)``, a pytree of ``[*C, ...]``.
        moved: ``y − x``, likewise.
        step_size: ``h``, a scalar or ``[*C]``.
    """
    cross = chain_sum(jax.tree.map(jnp.multiply, moved, gradient), chain_shape)
    square = chain_sum(jax.tree.map(jnp.square, gradient), chain_shape)
    return -log_density - 0.5 * cross + 0.25 * step_size * square


def systematic_ancestors(rng_key: Array, log_weight: Array, num_draws: int | None = None) -> Array:
    """Draw ancestors ``[P]`` (int32) by systematic resampling: each index ``⌊P w⌋`` or ``⌈P w⌉`` times.

    ``num_draws``: how many; by default as many as there are weights.

    >>> systematic_ancestors(random.key(0), jnp.log(jnp.array([0.5, 0.5, 0.0, 0.0]))).tolist()
    [0, 0, 1, 1]
    """
    num = log_weight.shape[0] if num_draws is None else num_draws
    edges = jnp.cumsum(normalised(log_weight))
    points = (jnp.arange(num) + random.uniform(rng_key, dtype=edges.dtype)) / num
    # The last edge may fall short of one by rounding.
    return jnp.clip(jnp.searchsorted(edges / edges[-1], points), 0, log_weight.shape[0] - 1).astype(jnp.int32)


def resample(rng_key: Array, log_weight: Array, tree: Any, threshold: float) -> tuple[Array, Any, Array]:
    """Resample where ``ESS < threshold · P``, everything cached with the walkers included.

    Args:
        rng_key: a PRNG key.
        log_weight: ``[P]``, or ``[P, D]`` for D independent populations.
        tree: arrays ``[P, ...]`` (``[P, D, ...]``) that belong to the walkers.
        threshold: fraction of P.

    Returns:
        ``(log_weight, tree, resampled)``. After resampling every log weight is ``log mean exp`` of the old
        ones, so the running log Z is kept; ``resampled`` is a boolean scalar (``[D]``).
    """
    low = ess(log_weight) < threshold * log_weight.shape[0]
    same = jnp.arange(log_weight.shape[0]).reshape((-1,) + (1,) * low.ndim)
    ancestors = jnp.where(low, _ancestors(rng_key, log_weight), same)
    return jnp.where(low, log_mean_exp(log_weight), log_weight), _take(tree, ancestors), low


def resample_to(rng_key: Array, num_draws: int, log_weight: Array, tree: Any) -> tuple[Array, Any]:
    """Return equal log weights that keep a population's log Z, and ``num_draws`` systematic draws of it.

    Args:
        rng_key: a PRNG key.
        num_draws: how many.
        log_weight: ``[P]``, or ``[P, D]`` for D independent populations.
        tree: arrays ``[P, ...]`` (``[P, D, ...]``) that belong to the walkers.
    """
    ancestors = _ancestors(rng_key, log_weight, num_draws)
    level = jnp.broadcast_to(log_mean_exp(log_weight), ancestors.shape)
    return level, _take(tree, ancestors)


def _ancestors(rng_key: Array, log_weight: Array, num_draws: int | None = None) -> Array:
    """Return systematic ancestors of one population ``[n]``, or of D of them ``[n, D]``."""
    if log_weight.ndim == 1:
        return systematic_ancestors(rng_key, log_weight, num_draws)
    draw = partial(systematic_ancestors, num_draws=num_draws)
    return jax.vmap(draw, (0, 1), 1)(random.split(rng_key, log_weight.shape[1]), log_weight)


def _take(tree: Any, ancestors: Array) -> Any:
    """Return what belongs to the ancestors, of arrays ``[P, ...]`` or ``[P, D, ...]``."""
    where = (ancestors,) if ancestors.ndim == 1 else (ancestors, jnp.arange(ancestors.shape[1]))
    return jax.tree.map(lambda x: x[where], tree)
