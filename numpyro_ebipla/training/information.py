"""Slope and curvature of the log likelihood at the parameters reached, from particles of the posterior.

By Fisher's identity the slope is the posterior mean of the slope of ``log p(x, y)``. Its derivative, the observed
information, is known to Louis (1982) as ``−E[∂²] − Var[∂]``; control variates take the noise of both.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.flatten_util import ravel_pytree

from numpyro_ebipla._core.state import Latents, Params, Sites
from numpyro_ebipla.smc.control import control_weights, explained, quiet_sites

#: Parameters up to which each is a direction of its own.
MAX_COORDINATES = 32
#: Curvature of a direction, in units of each parameter's own, from which the data know something of it.
LEAST_KNOWN = 1e-4
#: Standard errors that a figure's noise is allowed for.
ERRORS = 2


def by_coordinate(params: Params) -> bool:
    """Return whether the parameters are few, so that each coordinate is a direction of its own."""
    return sum(x.size for x in jax.tree.leaves(params)) <= MAX_COORDINATES


def num_directions(params: Params) -> int:
    """Return how many directions there are, L."""
    leaves = jax.tree.leaves(params)
    return sum(x.size for x in leaves) if by_coordinate(params) else len(leaves)


def go_along(params: Params, before: Params) -> Callable[[Array], Params]:
    """Return parameters as a function of how far they go along each of L directions.

    These are all coordinates of up to :data:`MAX_COORDINATES` unconstrained parameters; of more, one for each array,
    which goes on from ``before``.
    """
    if by_coordinate(params):
        here, unflatten = ravel_pytree(params)
        return lambda along: unflatten(here + along.astype(here.dtype))
    leaves, structure = jax.tree.flatten(params)
    ahead = [x - b for x, b in zip(leaves, jax.tree.leaves(before), strict=True)]
    return lambda along: jax.tree.unflatten(
        structure, [x + a.astype(x.dtype) * d for a, x, d in zip(along, leaves, ahead, strict=True)]
    )


def principal_directions(information: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return curvatures ``[L]``, in units of each parameter's own, and their directions, the columns of ``[L, L]``.

    With these in ``V``, ``Vᵀ I V`` is the diagonal matrix of the curvatures.
    """
    size = np.sqrt(np.abs(np.diag(information)))
    scale = np.where(size > 0, size, 1.0)
    value, vector = np.linalg.eigh(information / np.outer(scale, scale))
    return value, vector / scale[:, None]


def slopes(f: Callable[[Params], Array], params: Params, before: Params) -> Array:
    """Return derivatives ``[…, L]`` of ``f`` at ``params`` along each of the directions of :func:`go_along`."""
    moved, origin = go_along(params, before), jnp.zeros(num_directions(params))
    along = lambda tangent: jax.jvp(lambda a: f(moved(a)), (origin,), (tangent,))[1]
    return jnp.moveaxis(lax.map(along, jnp.eye(len(origin))), 0, -1)


def slope_and_curvature(
    log_joint: Callable[[Latents, Params], Array], at: Latents, params: Params, before: Params
) -> tuple[Array, Array]:
    """Estimate slope and curvature of the log likelihood.

    The slope is a mean of the particles' scores with control variates (:mod:`numpyro_ebipla.smc.control`). What these
    explain of a score is ``h · ∇ log p + div h``, of a field ``h`` linear in the latents: particles that move by ``−h``
    follow their posterior. So minus the second derivatives are ``−E[(∂ − h · ∇) ∂] − Var[left]``, of what the
    regression leaves (Louis, 1982, where ``h = 0``). Where scores are linear in the control variates that is exact for
    any draws; and each datum's complete information, which may be a million times the observed, cancels by itself.

    Args:
        log_joint: ``(latents, params) -> [N]``, or ``[N, B]`` where data are independent.
        at: the particles; those that :func:`.quiet_sites` leaves out stay as they are.
        params: unconstrained.
        before: see :func:`go_along`.

    Returns:
        ``[L]`` and minus the second derivatives ``[L, L]``, of all data together.
    """
    return score_and_curvature(log_joint, at, params, before)[1](None)


def score_and_curvature(
    log_joint: Callable[[Latents, Params], Array], at: Latents, params: Params, before: Params
) -> tuple[Array, Callable[[Array | None], tuple[Array, Array]]]:
    """Return scores ``[N, L]`` (``[N, B, L]``), and what gives slope and curvature for weights ``[N]``, None if equal.

    Args:
        log_joint: see :func:`slope_and_curvature`.
        at: likewise.
        params: likewise.
        before: likewise.
    """
    moved, origin = go_along(params, before), jnp.zeros(num_directions(params))
    quiet, chain_ndim = quiet_sites(at)

    def density(quiet: Sites, along: Array) -> Array:
        return log_joint(at.replaced(quiet), moved(along))

    gradient = jax.grad(lambda quiet: density(quiet, origin).sum())(quiet)
    score = slopes(lambda params: log_joint(at, params), params, before)

    def by_weight(weight: Array | None) -> tuple[Array, Array]:
        field, left = explained(quiet, gradient, score, chain_ndim, weight)
        weight = control_weights(quiet, gradient, chain_ndim, weight)
        slope = lambda quiet, along: jax.grad(lambda a: jnp.sum(weight * density(quiet, a)))(along)
        ways = jax.tree.map(jnp.negative, field), jnp.eye(len(origin))
        bend = lax.map(lambda way: jax.jvp(slope, (quiet, origin), way)[1], ways)
        return jnp.tensordot(weight, score, weight.ndim), -bend - left

    return score, by_weight
