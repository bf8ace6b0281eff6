"""Posterior particles with Jarzynski weights: an exact posterior at every step, and the marginal likelihood."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, random

from numpyro_ebipla._core.state import Latents
from numpyro_ebipla._core.validate import check_share
from numpyro_ebipla.kernels.base import Kernel
from numpyro_ebipla.kernels.langevin import ULA
from numpyro_ebipla.kernels.mala import MALA
from numpyro_ebipla.particles.base import (
    Adaptations,
    Block,
    Draw,
    Known,
    LogJoint,
    Prepared,
    evaluated_at,
    points_of,
    positions,
)
from numpyro_ebipla.particles.persistent import Particles
from numpyro_ebipla.smc.weights import ess, normalised, resample, ula_action


class Memory(NamedTuple):
    """What weighted particles carry; ``C`` is ``(N, M)``, or ``(N,)`` if there are global latents.

    Attributes:
        log_weight: ``[*C]``; their log-mean-exp over N is the log marginal likelihood (of each datum).
        action: ``[*C]`` ``α_k(x, y)`` of the last move, see :func:`~numpyro_ebipla.smc.weights.ula_action`; for moves
            that leave the posterior invariant ``−log density`` where they ended.
        moved: ``(local, global)`` displacement of the last unadjusted move, else None.
        step_size: ``[*C]`` with which it was made.
        variance: ``[1, M]`` or ``[1]``, of the log marginal likelihood, summed up over the resamplings.
    """

    log_weight: Array
    action: Array
    moved: Any
    step_size: Array
    variance: Array


@dataclass(frozen=True)
class WeightedParticles(Particles):
    r"""Persistent particles with Jarzynski weights over N (JALA-EM, 2505.18427, Alg. 1).

    Weights correct both for the parameters, which move under the particles, and (for ULA) for the step size, so
    that weighted means are exact at every ``θ_k``, and the mean weight is the marginal likelihood. Each datum has a
    population and weights of its own; if there are global latents, all latents together have one, which needs the
    whole data at every step. The particles start from a population annealed from the prior.

    Args:
        kernel: ULA with one move per step, or MALA.
        num_moves: moves per step.
        threshold: resample systematically where the ESS falls below this fraction of N.

    Raises:
        ValueError: for another kernel, several unadjusted moves or a threshold outside [0, 1].
    """

    kernel: Kernel = field(default_factory=MALA)
    threshold: float = 0.5
    weighted = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.kernel, ULA | MALA):
            raise ValueError(
                f"WeightedParticles has increments for ULA and MALA, not for {type(self.kernel).__name__}: choose one "
                "of these kernels, or Particles()."
            )
        if isinstance(self.kernel, ULA) and self.num_moves > 1:
            raise ValueError("WeightedParticles weighs one unadjusted move per step: num_moves=1, or kernel=MALA().")
        check_share(self, "threshold")

    def start(self, local: Latents, glob: Latents, log_weight: Array, log_density: Array, variance: Array) -> Memory:
        """As :meth:`Particles.start`."""
        moved = None if self.kernel.adjusted else jax.tree.map(jnp.zeros_like, (local, glob))
        return Memory(log_weight, -log_density, moved, jnp.zeros_like(log_weight), variance)

    def prepare(
        self, rng_key: Array, draw: Draw, log_joint: LogJoint, ratio: float, block: Block, adapt: Adaptations
    ) -> Prepared:
        """As :meth:`Particles.prepare`: the weights at the current parameters."""
        known = evaluated_at(log_joint, ratio, block.local, block.glob)
        log_weight = weights_at(block, known)
        fraction = jnp.min(ess(log_weight)) / log_weight.shape[0]
        block = block._replace(memory=block.memory._replace(log_weight=log_weight))
        return Prepared(block, adapt, normalised(log_weight), known, {"ess": fraction})

    def advance(
        self, rng_key: Array, log_joint: LogJoint, ratio: float, block: Block, known: Known, adapt: Adaptations
    ) -> tuple[Block, Adaptations, dict[str, Array]]:
        """As :meth:`Particles.advance`, after resampling where the weights ask for it."""
        key_resample, key_move = random.split(rng_key)
        memory, num = block.memory, block.memory.log_weight.shape[0]
        spread = 1 / ess(memory.log_weight) - 1 / num
        mine = known if block.glob else known[:2]
        chains = (block.local, block.glob, mine)
        log_weight, (local, glob, mine), low = resample(key_resample, memory.log_weight, chains, self.threshold)
        known = mine if block.glob else (*mine, *known[2:])
        here = block._replace(local=local, glob=glob)
        step_size = jnp.full_like(log_weight, jnp.exp(adapt[1 if glob else 0].log_step))
        points, adapt, info = self.moved(key_move, log_joint, ratio, points_of(here, known), adapt)
        there = positions(points)
        if self.kernel.adjusted:
            action, moved = -(points[1] if glob else points[0]).log_density, None
        else:
            moved = jax.tree.map(jnp.subtract, there, (local, glob))
            action = _action(known, moved, step_size, bool(glob))
        variance = memory.variance + jnp.where(low, spread, 0.0)
        memory = Memory(log_weight, action, moved, step_size, variance)
        return Block(*there, None, memory), adapt, info | {"resampled": jnp.mean(low * 1.0)}

    def equally_weighted(self, rng_key: Array, block: Block) -> Block:
        """As :meth:`Particles.equally_weighted`, by systematic resampling."""
        chains = (block.local, block.glob)
        _, (local, glob), _ = resample(rng_key, block.memory.log_weight, chains, 2.0)
        return block._replace(local=local, glob=glob)


def weights_at(block: Block, known: Known) -> Array:
    """Log weights ``[*C]`` at the parameters at which the densities of ``block`` are ``known``."""
    memory = block.memory
    if memory.moved is None:
        log_density = known[2] if block.glob else known[0]
        return memory.log_weight + memory.action + log_density
    back = jax.tree.map(jnp.negative, memory.moved)
    return memory.log_weight + memory.action - _action(known, back, memory.step_size, bool(block.glob))


def _action(known: Known, moved: Any, step_size: Array, joint: bool) -> Array:
    per_datum, grad_local, whole, grad_glob = known
    if joint:
        return ula_action(whole.shape, whole, (grad_local, grad_glob), moved, step_size)
    return ula_action(per_datum.shape, per_datum, grad_local, moved[0], step_size)
