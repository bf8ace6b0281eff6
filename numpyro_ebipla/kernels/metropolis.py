r"""Metropolis-adjusted Langevin proposals in preconditioned coordinates.

A proposal has the covariance ``2 h S R^{-1} S``: ``h`` is the step size, ``S`` are scales of the coordinates, and ``R``
is the correlation matrix of the target's curvature in units of these. With ``R = L Lᵀ`` the white coordinates are
``w = Lᵀ S⁻¹ x``, in which the proposal is isotropic. Without a coupling ``L`` is the identity.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, random
from jax.scipy.linalg import solve_triangular

from numpyro_ebipla._core.few import FEW, cross
from numpyro_ebipla._core.tree import chain_sum, normal_like

#: Largest drift of a proposal, in standard deviations of its noise.
MAX_DRIFT = 4.0
#: Least pivot of ``R`` that is inverted in single precision.
LEAST_PIVOT = 3e-4


class Shape(NamedTuple):
    """Shape of a proposal's covariance, up to the step size: scales and the inverse factor of their correlations.

    Attributes:
        variance: ``S²``, leaves broadcasting to the positions.
        inverse: ``[D/m, m, m]`` lower triangular ``L⁻¹``, by blocks of m of the coordinates of all leaves in order;
            None: the identity.
    """

    variance: Any
    inverse: Array | None = None

    def whiten(self, gradient: Any) -> Any:
        """Return ``L⁻¹ S g`` of every chain: the gradient in white coordinates."""
        scaled = jax.tree.map(lambda v, g: jnp.broadcast_to(jnp.sqrt(v), g.shape) * g, self.variance, gradient)
        return scaled if self.inverse is None else rotate(scaled, self.inverse.swapaxes(1, 2))

    def unwhiten(self, moved: Any) -> Any:
        """Return ``S L⁻ᵀ w`` of every chain: a step in white coordinates as one of the position."""
        scaled = moved if self.inverse is None else rotate(moved, self.inverse)
        return jax.tree.map(lambda v, w: jnp.broadcast_to(jnp.sqrt(v), w.shape) * w, self.variance, scaled)


class Here(NamedTuple):
    """Where every chain stands.

    Attributes:
        position: a tree of arrays ``[*C, *event]``.
        log_density, gradient: there; ``[*C]`` and like the position.
    """

    position: Any
    log_density: Array
    gradient: Any


class Proposal(NamedTuple):
    """Where every chain might go.

    Attributes:
        position: like that of the chains.
        log_density, gradient: there; ``[*C]`` and like the position.
        extra: what else the target knows there.
        moved: the step in white coordinates, like the position.
        turned: the change of the gradient in white coordinates, likewise.
    """

    position: Any
    log_density: Array
    gradient: Any
    extra: Any
    moved: Any
    turned: Any


def metropolis(
    rng_key: Array,
    target: Callable[[Any], tuple[Array, Any, Any]],
    here: Here,
    step_size: Array,
    shape: Shape,
) -> tuple[Array, Proposal, Array]:
    """Make a Metropolis-adjusted Langevin proposal of every chain, and decide whether each accepts it.

    The drift is cut off at four standard deviations of the noise (MALTA; Roberts and Tweedie, 1996): far out in a tail
    with a steep gradient it would overshoot, always be refused, and the chain never move again.

    Args:
        rng_key: a PRNG key.
        target: position -> ``(log density [*C], gradient, anything else known there)``.
        here: where the chains stand.
        step_size: ``h``.
        shape: of the proposal's covariance.

    Returns:
        ``(accept, proposal, prob)``: booleans ``[*C]``, the proposal, and acceptance probabilities ``[*C]``.
    """
    h, sd = step_size, jnp.sqrt(2 * step_size)
    key_noise, key_accept = random.split(rng_key)
    noise = normal_like(key_noise, here.position)

    def drift(u: Array) -> Array:
        return jnp.clip(h * u, -MAX_DRIFT * sd, MAX_DRIFT * sd)

    before = shape.whiten(here.gradient)
    moved = jax.tree.map(lambda u, xi: drift(u) + sd * xi, before, noise)
    proposed = jax.tree.map(lambda x, d: (x + d).astype(x.dtype), here.position, shape.unwhiten(moved))
    value, new_gradient, extra = target(proposed)
    after = shape.whiten(new_gradient)
    # log q(x | x') − log q(x' | x); the forward residual is the noise itself.
    backward = jax.tree.map(lambda w, u: jnp.square(w + drift(u)) / (4 * h), moved, after)
    forward = jax.tree.map(lambda xi: 0.5 * jnp.square(xi), noise)
    log_ratio = value - here.log_density + chain_sum(forward, value.shape) - chain_sum(backward, value.shape)
    # A proposal where anything is not finite is refused; a chain that stands in such a place may leave.
    leave = jnp.isfinite(value) & ~jnp.isfinite(here.log_density)
    prob = jnp.where(jnp.isfinite(log_ratio), jnp.exp(jnp.minimum(log_ratio, 0.0)), 0.0)
    prob = jnp.where(leave, 1.0, prob)
    accept = random.uniform(key_accept, value.shape, prob.dtype) < prob
    turned = jax.tree.map(jnp.subtract, after, before)
    return accept, Proposal(proposed, value, new_gradient, extra, moved, turned), prob


# --- the coupling of coordinates ----------------------------------------------------------------------


def estimate_coupling(proposal: Proposal, factor: Array) -> Array:
    """Return the curvature along the proposals in units of the scales, ``[D/m, m, m]`` with mean diagonals of one.

    The change of the gradient over a step is minus the Hessian times the step, wherever the chain is; so their mean
    product over the isotropic steps of white coordinates is the mean Hessian there. A chain of larger curvature
    counts less, as it is the shape that is asked for. NaN where nothing is known.
    """
    moved, turned = (_blocks(tree, factor.shape) for tree in (proposal.moved, proposal.turned))
    known = jnp.isfinite(turned).all((1, 2), keepdims=True) & jnp.isfinite(moved).all((1, 2), keepdims=True)
    moved, turned = (jnp.where(known, a, 0.0) for a in (moved, turned))
    length = jnp.sum(jnp.square(moved), (1, 2), keepdims=True)
    ratio = jnp.sqrt(jnp.sum(jnp.square(turned), (1, 2), keepdims=True) / jnp.where(length > 0, length, 1.0))

    def of_block(moved: Array, turned: Array, factor: Array) -> Array:
        product = -cross(turned, moved)
        curvature = factor @ (product + product.T) @ factor.T
        size = jnp.trace(curvature) / len(factor)
        return curvature / jnp.where(size > 0, size, jnp.nan)

    return jax.vmap(of_block, (1, 1, 0))(moved, turned / (1 + ratio), factor)


def learn_coupling(factor: Array, curvature: Array, rate: Array) -> Array:
    """Return ``L`` of the correlations of a running mean, unchanged where it would not be safely positive definite."""

    def of_block(factor: Array, curvature: Array) -> Array:
        mean = factor @ factor.T
        mean = mean + rate * (curvature - mean)
        sd = jnp.sqrt(jnp.diag(mean))
        new = jnp.linalg.cholesky(mean / (sd[:, None] * sd[None]))
        sound = jnp.isfinite(new).all() & (jnp.diag(new).min() > LEAST_PIVOT)
        return jnp.where(sound, new, factor)

    return jax.vmap(of_block)(factor, curvature)


def rotate(tree: Any, matrix: Array) -> Any:
    """Multiply every chain's coordinates, as rows of blocks, by matrices ``[D/m, m, m]``."""
    leaves, treedef = jax.tree.flatten(tree)
    blocks = _blocks(tree, matrix.shape)
    if matrix.shape[1] > FEW:
        blocks = jnp.einsum("cgi,gij->cgj", blocks, matrix)
    else:
        blocks = jnp.sum(blocks[..., None] * matrix[None], 2)
    rows = blocks.reshape(len(blocks), -1)
    ends = np.cumsum([leaf.size // len(rows) for leaf in leaves])[:-1]
    parts = zip(jnp.split(rows, ends, axis=1), leaves, strict=True)
    return jax.tree.unflatten(treedef, [part.reshape(leaf.shape).astype(leaf.dtype) for part, leaf in parts])


def _blocks(tree: Any, shape: tuple[int, ...]) -> Array:
    """Return all chains, whatever their axes, with the coordinates of all leaves in blocks: ``[C, D/m, m]``."""
    leaves = jax.tree.leaves(tree)
    num_chains = sum(leaf.size for leaf in leaves) // (shape[0] * shape[1])
    return jnp.concatenate([leaf.reshape(num_chains, -1) for leaf in leaves], axis=1).reshape(num_chains, *shape[:2])


def invert(factor: Array) -> Array:
    """Invert lower triangular matrices ``[…, m, m]``."""
    identity = jnp.broadcast_to(jnp.eye(factor.shape[-1], dtype=factor.dtype), factor.shape)
    return solve_triangular(factor, identity, lower=True)
