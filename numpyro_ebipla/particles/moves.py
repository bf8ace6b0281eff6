"""Moves of the two blocks of latents in turn, by any kernel."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax, random

from numpyro_ebipla._core.state import Adaptation, Latents, Sites
from numpyro_ebipla._core.tree import batched_value_and_grad, chain_select, normal_like
from numpyro_ebipla.kernels.base import AbstractKernel, Evaluation, Point, Target, evaluate
from numpyro_ebipla.kernels.mala import proposal_shape
from numpyro_ebipla.particles.block import Adaptations, Block, Info, Known, LogJoint
from numpyro_ebipla.smc.control import recentring

#: Factor of a shared latent's step under subsampling, see :class:`.Particles`.
SUBSAMPLING_STEP = 0.2


class Points(NamedTuple):
    """The local block and the shared one, with what kernels know of them."""

    local: Point
    shared: Point

    @property
    def latents(self) -> Latents:
        """Where they stand."""
        return Latents(self.local.position, self.shared.position)


def evaluate_at(log_joint: LogJoint, ratio: float, latents: Latents) -> Known:
    """Return the log densities and gradients that a step's backward pass would know."""

    def total(latents: Latents) -> tuple[Array, tuple[Array, Array]]:
        per_datum, rest = log_joint(latents)
        return per_datum.sum() + rest.sum() / ratio, (per_datum, rest)

    (_, (per_datum, rest)), gradient = jax.value_and_grad(total, has_aux=True)(latents)
    shared = jax.tree.map(lambda g: ratio * g, gradient.shared)
    return Known(Evaluation(per_datum, gradient.local), Evaluation(ratio * per_datum.sum(-1) + rest, shared))


class _Followed(NamedTuple):
    """Particles, what is known there, a shift of each posterior's to try, and how often one was."""

    latents: Latents
    known: Known
    shift: Sites
    tries: Array


def follow(log_joint: LogJoint, ratio: float, latents: Latents) -> tuple[Latents, Known]:
    """Take particles along that the parameters have left behind; return them with what is known there.

    Where a location moves by many standard deviations of its posterior in one step, moves alone would hold it back. The
    particles of a posterior are all shifted alike, to the mean that :func:`.recentring` finds, where that is far and
    their mean log density rises. In equilibrium none is as far.
    """
    block, chain_ndim = ("shared", 1) if latents.shared else ("local", 2)

    def look(carry: _Followed) -> _Followed:
        tried = jax.tree.map(lambda x, shift: x + shift[None], getattr(carry.latents, block), carry.shift)
        there = evaluate_at(log_joint, ratio, carry.latents._replace(**{block: tried}))
        before, after = getattr(carry.known, block), getattr(there, block)
        better = (carry.tries == 0) | (after.log_density.mean(0) > before.log_density.mean(0))
        taken = jnp.broadcast_to(better, after.log_density.shape)
        position, here = chain_select(taken, (tried, after), (getattr(carry.latents, block), before))
        shift, far = recentring(position, here.gradient, chain_ndim)
        shift = chain_select(far & better, shift, jax.tree.map(jnp.zeros_like, shift))
        tries = jnp.where(jnp.any(far) & (carry.tries == 0), 1, 2).astype(carry.tries.dtype)
        return _Followed(carry.latents._replace(**{block: position}), there._replace(**{block: here}), shift, tries)

    shapes = jax.eval_shape(lambda: evaluate_at(log_joint, ratio, latents))
    unknown = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    still = jax.tree.map(lambda x: jnp.zeros(x.shape[1:], x.dtype), getattr(latents, block))
    first = _Followed(latents, unknown, still, jnp.zeros((), jnp.int32))
    last = lax.while_loop(lambda carry: carry.tries < 2, look, first)
    return last.latents, last.known


def points_of(block: Block, known: Known) -> Points:
    """Return a block with what is known there."""
    local, shared = block.momentum or (None, None)
    return Points(Point(block.latents.local, *known.local, local), Point(block.latents.shared, *known.shared, shared))


def local_target(log_joint: LogJoint, shared: Sites) -> Target:
    """Return the log density of the local latents, each datum's by itself, given the shared ones."""
    return batched_value_and_grad(lambda local: log_joint(Latents(local, shared)).per_datum)


def shared_target(log_joint: LogJoint, ratio: float, local: Sites) -> Target:
    """Return the log density of the shared latents given the local ones, a minibatch standing for all data."""

    def whole(shared: Sites) -> Array:
        per_datum, rest = log_joint(Latents(local, shared))
        return ratio * per_datum.sum(-1) + rest

    return batched_value_and_grad(whole)


def refresh(log_joint: LogJoint, ratio: float, points: Points) -> Points:
    """Return points with log densities and gradients at their present positions."""
    local, shared = points
    if local.position and not shared.position:
        return Points(evaluate(local_target(log_joint, {}), local), shared)
    if shared.position and not local.position:
        return Points(local, evaluate(shared_target(log_joint, ratio, {}), shared))
    known = evaluate_at(log_joint, ratio, points.latents)
    return Points(
        Point(local.position, *known.local, local.momentum), Point(shared.position, *known.shared, shared.momentum)
    )


def move_block(
    kernel: AbstractKernel,
    num_moves: int,
    rng_key: Array,
    log_joint: LogJoint,
    ratio: float,
    block: Block,
    known: Known,
    adapt: Adaptations,
) -> tuple[Block, Adaptations, Info]:
    """Move the particles of a minibatch; the arguments and what is returned are as in ``advance``."""
    points, adapt, info = move_points(kernel, num_moves, rng_key, log_joint, ratio, points_of(block, known), adapt)
    local, shared = points.local.momentum, points.shared.momentum
    momentum = None if local is None or shared is None else Latents(local, shared)
    return Block(points.latents, momentum, block.memory), adapt, info


def move_points(
    kernel: AbstractKernel,
    num_moves: int,
    rng_key: Array,
    log_joint: LogJoint,
    ratio: float,
    points: Points,
    adapt: Adaptations,
) -> tuple[Points, Adaptations, Info]:
    """Move the two blocks in turn, ``num_moves`` times, and return what the kernel knows where they arrive.

    :func:`.run_moves` does not serve here: the target of one block depends on where the other has just gone.
    """
    *first, last = random.split(rng_key, num_moves)

    def sweep(carry: tuple[Points, Adaptations], key: Array) -> tuple[tuple[Points, Adaptations], Info]:
        points, adapt, info = _sweep(kernel, key, log_joint, ratio, *carry)
        return (refresh(log_joint, ratio, points), adapt), info

    if first:
        (points, adapt), _ = lax.scan(sweep, (points, adapt), jnp.stack(first))
    return _sweep(kernel, last, log_joint, ratio, points, adapt)


def _sweep(
    kernel: AbstractKernel, rng_key: Array, log_joint: LogJoint, ratio: float, points: Points, adapt: Adaptations
) -> tuple[Points, Adaptations, Info]:
    """Move the local block once, then the shared block."""
    key_local, key_shared = random.split(rng_key)
    (local, shared), (adapt_local, adapt_shared) = points, adapt
    info = {}
    if local.position:
        target, here = local_target(log_joint, shared.position), local
        local, move = kernel.move(key_local, target, here, adapt_local)
        adapt_local = kernel.adapt(adapt_local, move, here)
        info["accept_local"] = move.accept_prob
    if shared.position:
        here = shared
        if local.position and kernel.adjusted:  # what is known belongs to the old local latents
            here = shared._replace(log_density=None, gradient=None)
        target = shared_target(log_joint, ratio, local.position)
        here = evaluate(target, here)
        shared, move = kernel.move(key_shared, target, here, adapt_shared)
        if kernel.adjusted and ratio > 1:
            shared = _move_unadjusted(key_shared, here, adapt_shared, ratio)
        adapt_shared = kernel.adapt(adapt_shared, move, here)
        info["accept_global"] = move.accept_prob
    return Points(local, shared), Adaptations(adapt_local, adapt_shared), info


def _move_unadjusted(rng_key: Array, here: Point, adapt: Adaptation, ratio: float) -> Point:
    """Make a stochastic-gradient Langevin move with MALA's step, shortened as :class:`.Particles` says."""
    h = jnp.exp(adapt.log_step) * SUBSAMPLING_STEP / ratio
    noise = normal_like(random.fold_in(rng_key, 1), here.position)
    shape = proposal_shape(adapt, here.position)
    moved = jax.tree.map(lambda u, xi: h * u + jnp.sqrt(2 * h) * xi, shape.whiten(here.gradient), noise)
    return Point(jax.tree.map(jnp.add, here.position, shape.unwhiten(moved)), None, None)
