"""Persistent particles, moved once or a few times at each step."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array, lax, random

from numpyro_ebipla._core.state import Adaptation, Latents
from numpyro_ebipla._core.tree import normal_like
from numpyro_ebipla._core.validate import check_counts, check_type
from numpyro_ebipla.kernels.base import Kernel, Point, evaluated
from numpyro_ebipla.kernels.mala import MALA, proposal_shape
from numpyro_ebipla.particles.base import (
    Adaptations,
    Block,
    Draw,
    Known,
    LogJoint,
    Points,
    Prepared,
    global_target,
    local_target,
    points_of,
    positions,
    refreshed,
)

#: Of a global latent's step under subsampling, see :class:`Particles`.
_SUBSAMPLING_STEP = 0.2


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
    weighted: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_counts(self, "num_moves")
        check_type(self, "kernel", Kernel, "ULA(), MALA() or Underdamped()")

    @property
    def recalls(self) -> bool:
        """Whether particles that were left behind are moved to the others, see :func:`.recalled`."""
        return type(self) is Particles and self.kernel.adjusted

    def prepare(
        self, rng_key: Array, draw: Draw, log_joint: LogJoint, ratio: float, block: Block, adapt: Adaptations
    ) -> Prepared:
        """Particles of a minibatch at the current parameters, before the gradient.

        Args:
            rng_key: a PRNG key.
            draw: ``rng_key -> (local, global)``, fresh particles from the prior's base.
            log_joint: see :meth:`advance`.
            ratio: ``M/B``.
            block: where they stand.
            adapt: of the local and the global block.
        """
        del rng_key, draw, log_joint, ratio
        return Prepared(block, adapt)

    def start(self, local: Latents, glob: Latents, log_weight: Array, log_density: Array, variance: Array) -> Any:
        """Memory of a population that is exact at the initial parameters, for weighted particles.

        Args:
            local: ``{site: [N, M, *event]}``.
            glob: ``{site: [N, *event]}``.
            log_weight: ``[*C]`` whose log-mean-exp is the log marginal likelihood.
            log_density: ``[*C]`` log joint density.
            variance: ``[1, M]`` or ``[1]``, of the log marginal likelihood.
        """
        del local, glob, log_weight, log_density, variance

    def equally_weighted(self, rng_key: Array, block: Block) -> Block:
        """The particles as a population without weights."""
        del rng_key
        return block

    def advance(
        self, rng_key: Array, log_joint: LogJoint, ratio: float, block: Block, known: Known, adapt: Adaptations
    ) -> tuple[Block, Adaptations, dict[str, Array]]:
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
        points, adapt, info = self.moved(rng_key, log_joint, ratio, points_of(block, known), adapt)
        momenta = None if block.momentum is None else (points[0].momentum, points[1].momentum)
        return Block(*positions(points), momenta, block.memory), adapt, info

    def moved(
        self, rng_key: Array, log_joint: LogJoint, ratio: float, points: Points, adapt: Adaptations
    ) -> tuple[Points, Adaptations, dict[str, Array]]:
        """As :meth:`advance`, with what the kernels know where the particles arrive."""
        *first, last = random.split(rng_key, self.num_moves)

        def sweep(carry: Any, key: Array) -> tuple[Any, Any]:
            points, adapt, info = self._sweep(key, log_joint, ratio, *carry)
            return (refreshed(log_joint, ratio, points), adapt), info

        if first:
            (points, adapt), _ = lax.scan(sweep, (points, adapt), jnp.stack(first))
        return self._sweep(last, log_joint, ratio, points, adapt)

    def _sweep(
        self, rng_key: Array, log_joint: LogJoint, ratio: float, points: Points, adapt: Any
    ) -> tuple[Points, Any, dict[str, Array]]:
        """One move of the local block and one of the global block."""
        key_local, key_global = random.split(rng_key)
        (local, glob), (adapt_local, adapt_global) = points, adapt
        info = {}
        if local.position:
            target, here = local_target(log_joint, glob.position), local
            local, move = self.kernel.move(key_local, target, here, adapt_local)
            adapt_local = self.kernel.adapt(adapt_local, move, here)
            info["accept_local"] = move.accept_prob
        if glob.position:
            here = glob
            if local.position and self.kernel.adjusted:  # what is known belongs to the old local latents
                here = glob._replace(log_density=None, gradient=None)
            target = global_target(log_joint, ratio, local.position)
            here = evaluated(target, here)
            glob, move = self.kernel.move(key_global, target, here, adapt_global)
            if self.kernel.adjusted and ratio > 1:
                glob = _unadjusted(key_global, here, adapt_global, ratio)
            adapt_global = self.kernel.adapt(adapt_global, move, here)
            info["accept_global"] = move.accept_prob
        return (local, glob), (adapt_local, adapt_global), info


def _unadjusted(rng_key: Array, here: Point, adapt: Adaptation, ratio: float) -> Point:
    """A stochastic-gradient Langevin move with MALA's step, shortened as :class:`Particles` says."""
    h = jnp.exp(adapt.log_step) * _SUBSAMPLING_STEP / ratio
    noise = normal_like(random.fold_in(rng_key, 1), here.position)
    shape = proposal_shape(adapt, here.position)
    moved = jax.tree.map(lambda u, xi: h * u + jnp.sqrt(2 * h) * xi, shape.white(here.gradient), noise)
    return Point(jax.tree.map(jnp.add, here.position, shape.back(moved)), None, None)
