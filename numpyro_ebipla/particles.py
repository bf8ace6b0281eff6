"""Posterior particles: N for each datum (local latents) or N in all (global ones), kept over the whole run."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax, random

from numpyro_ebipla._tree import batched_value_and_grad, normal_like
from numpyro_ebipla._types import Adaptation, Latents
from numpyro_ebipla.kernels import MALA, Kernel, Point, Target, evaluated

LogJoint = Callable[[Latents, Latents], tuple[Array, Array]]

#: Of a global latent's step under subsampling, see :class:`Particles`.
_SUBSAMPLING_STEP = 0.2


class Block(NamedTuple):
    """Chains of the current minibatch with what the step's backward pass already knows of them."""

    local: Latents
    glob: Latents
    momentum: tuple[Latents, Latents] | None


@dataclass(frozen=True)
class Particles:
    """Persistent particles.

    Local and global latents are moved in two blocks. Unadjusted kernels move both at once, from the gradients
    of the step's own backward pass (2510.12311, 2303.13429). MALA accepts local latents per particle and datum,
    then global ones per particle given these.

    When the data are subsampled, a global latent sees only a minibatch at a time, of which no acceptance test
    is exact. Then MALA still finds the step size at which the minibatch's target would be accepted, but global
    latents move unadjusted with that step times ``0.2 B/M``, which keeps the noise of the minibatch below about
    a tenth of that of the chain (stochastic-gradient Langevin; Welling and Teh, 2011).

    Args:
        kernel: of all latents.
        num_moves: moves per step.
    """

    kernel: Kernel = field(default_factory=MALA)
    num_moves: int = 1

    def advance(
        self,
        rng_key: Array,
        log_joint: LogJoint,
        ratio: float,
        block: Block,
        known: tuple[Array, Latents, Array, Latents],
        adapt: tuple[Adaptation, Adaptation],
    ) -> tuple[Block, tuple[Adaptation, Adaptation], dict[str, Array]]:
        """Move the particles of a minibatch.

        Args:
            rng_key: a PRNG key.
            log_joint: ``(local, global) -> ([N, B] per datum, [N] rest)`` log densities.
            ratio: ``M/B``.
            block: where they stand.
            known: log densities and gradients there: local ``[N, B]``, global ``[N]``.
            adapt: of the local and the global block.

        Returns:
            The new block, its adaptation and ``{"accept": …}`` by block.
        """
        momentum = block.momentum or (None, None)
        points = (Point(block.local, *known[:2], momentum[0]), Point(block.glob, *known[2:], momentum[1]))
        *first, last = random.split(rng_key, self.num_moves)

        def sweep(carry: Any, key: Array) -> tuple[Any, Any]:
            points, adapt, info = self._sweep(key, log_joint, ratio, *carry)
            return (_refreshed(log_joint, ratio, points), adapt), info

        if first:
            (points, adapt), _ = lax.scan(sweep, (points, adapt), jnp.stack(first))
        points, adapt, info = self._sweep(last, log_joint, ratio, points, adapt)
        momenta = None if block.momentum is None else (points[0].momentum, points[1].momentum)
        return Block(points[0].position, points[1].position, momenta), adapt, info

    def _sweep(
        self, rng_key: Array, log_joint: LogJoint, ratio: float, points: tuple[Point, Point], adapt: Any
    ) -> tuple[tuple[Point, Point], Any, dict[str, Array]]:
        """One move of the local block and one of the global block."""
        key_local, key_global = random.split(rng_key)
        (local, glob), (adapt_local, adapt_global) = points, adapt
        info = {}
        if local.position:
            target, here = _local_target(log_joint, glob.position), local
            local, move = self.kernel.move(key_local, target, here, adapt_local)
            adapt_local = self.kernel.adapt(adapt_local, move, here)
            info["accept_local"] = move.accept_prob
        if glob.position:
            here = glob
            if local.position and self.kernel.adjusted:  # what is known belongs to the old local latents
                here = glob._replace(log_density=None, gradient=None)
            target = _global_target(log_joint, ratio, local.position)
            here = evaluated(target, here)
            glob, move = self.kernel.move(key_global, target, here, adapt_global)
            if self.kernel.adjusted and ratio > 1:
                glob = _unadjusted(key_global, here, adapt_global, ratio)
            adapt_global = self.kernel.adapt(adapt_global, move, here)
            info["accept_global"] = move.accept_prob
        return (local, glob), (adapt_local, adapt_global), info


def evaluated_at(log_joint: LogJoint, ratio: float, local: Latents, glob: Latents) -> tuple:
    """``known`` for :meth:`Particles.advance`, where no step has computed it."""

    def total(local: Latents, glob: Latents) -> tuple[Array, tuple[Array, Array]]:
        per_datum, rest = log_joint(local, glob)
        return per_datum.sum() + rest.sum() / ratio, (per_datum, rest)

    (_, (per_datum, rest)), grads = jax.value_and_grad(total, (0, 1), has_aux=True)(local, glob)
    return per_datum, grads[0], ratio * per_datum.sum(-1) + rest, jax.tree.map(lambda g: ratio * g, grads[1])


def _local_target(log_joint: LogJoint, glob: Latents) -> Target:
    return batched_value_and_grad(lambda local: log_joint(local, glob)[0])


def _global_target(log_joint: LogJoint, ratio: float, local: Latents) -> Target:
    def whole(glob: Latents) -> Array:
        per_datum, rest = log_joint(local, glob)
        return ratio * per_datum.sum(-1) + rest

    return batched_value_and_grad(whole)


def _refreshed(log_joint: LogJoint, ratio: float, points: tuple[Point, Point]) -> tuple[Point, Point]:
    """Points with log densities and gradients at their present positions."""
    local, glob = points
    if local.position and not glob.position:
        return evaluated(_local_target(log_joint, {}), local), glob
    if glob.position and not local.position:
        return local, evaluated(_global_target(log_joint, ratio, {}), glob)
    value, grad, whole, grad_whole = evaluated_at(log_joint, ratio, local.position, glob.position)
    here = Point(local.position, value, grad, local.momentum)
    return here, Point(glob.position, whole, grad_whole, glob.momentum)


def _unadjusted(rng_key: Array, here: Point, adapt: Adaptation, ratio: float) -> Point:
    """A stochastic-gradient Langevin move with MALA's step, shortened as :class:`Particles` says."""
    h = jnp.exp(adapt.log_step) * _SUBSAMPLING_STEP / ratio
    noise = normal_like(random.fold_in(rng_key, 1), here.position)

    def move(name: str) -> Array:
        variance = 1 / adapt.curvature[name] if adapt.curvature else 1.0
        drift = h * variance * here.gradient[name]
        return here.position[name] + drift + jnp.sqrt(2 * h * variance) * noise[name]

    return Point({name: move(name) for name in here.position}, None, None)
