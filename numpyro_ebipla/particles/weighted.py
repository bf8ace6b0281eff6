"""Posterior particles with Jarzynski weights: an exact posterior at every step, and the marginal likelihood."""

from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple, final

import jax
import jax.numpy as jnp
from jax import Array, random

from numpyro_ebipla._core.state import Latents
from numpyro_ebipla._core.validate import check_share
from numpyro_ebipla.kernels.base import AbstractKernel, Evaluation
from numpyro_ebipla.kernels.langevin import ULA
from numpyro_ebipla.kernels.mala import MALA
from numpyro_ebipla.particles.base import AbstractParticles, check_moves
from numpyro_ebipla.particles.block import Adaptations, Block, Draw, Info, Known, LogJoint, Prepared
from numpyro_ebipla.particles.moves import evaluate_at, move_points, points_of
from numpyro_ebipla.smc.weights import ess, normalised, resample, resample_to, ula_action


class Memory(NamedTuple):
    """What weighted particles carry; ``C`` is ``(N, M)``, or ``(N,)`` if there are shared latents.

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
    moved: Latents | None
    step_size: Array
    variance: Array


@final
@dataclass(frozen=True)
class WeightedParticles(AbstractParticles):
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

    kernel: AbstractKernel = field(default_factory=MALA)
    num_moves: int = 1
    threshold: float = 0.5
    weighted: ClassVar[bool] = True
    quiet = True  # once they are collected

    def __post_init__(self) -> None:
        check_moves(self)
        if not isinstance(self.kernel, ULA | MALA):
            raise ValueError(
                f"WeightedParticles has increments for ULA and MALA, not for {type(self.kernel).__name__}: choose one "
                "of these kernels, or Particles()."
            )
        if isinstance(self.kernel, ULA) and self.num_moves > 1:
            raise ValueError("WeightedParticles weighs one unadjusted move per step: num_moves=1, or kernel=MALA().")
        check_share(self, "threshold")

    @property
    def recalls(self) -> bool:
        """False: a particle that is moved to another would have to take its weight, too."""
        return False

    def start(self, latents: Latents, log_weight: Array, log_density: Array, variance: Array) -> Memory:
        """Return the memory of particles that have not moved yet."""
        moved = None if self.kernel.adjusted else jax.tree.map(jnp.zeros_like, latents)
        return Memory(log_weight, -log_density, moved, jnp.zeros_like(log_weight), variance)

    def prepare(
        self, rng_key: Array, draw: Draw, log_joint: LogJoint, ratio: float, block: Block, adapt: Adaptations
    ) -> Prepared:
        """Weigh the particles at the current parameters."""
        known = evaluate_at(log_joint, ratio, block.latents)
        log_weight = weights_at(block, known)
        fraction = jnp.min(ess(log_weight)) / log_weight.shape[0]
        block = block._replace(memory=block.memory._replace(log_weight=log_weight))
        return Prepared(block, adapt, normalised(log_weight), known, {"ess": fraction})

    def advance(
        self, rng_key: Array, log_joint: LogJoint, ratio: float, block: Block, known: Known, adapt: Adaptations
    ) -> tuple[Block, Adaptations, Info]:
        """Resample where the weights ask for it, and make ``num_moves`` moves."""
        key_resample, key_move = random.split(rng_key)
        memory, num = block.memory, block.memory.log_weight.shape[0]
        joint = bool(block.latents.shared)  # then a particle is all of its latents
        spread = 1 / ess(memory.log_weight) - 1 / num
        mine = known if joint else known.local
        log_weight, (here, mine), low = resample(key_resample, memory.log_weight, (block.latents, mine), self.threshold)
        known = mine if joint else known._replace(local=mine)
        step_size = jnp.full_like(log_weight, jnp.exp((adapt.shared if joint else adapt.local).log_step))
        start = points_of(block._replace(latents=here), known)
        points, adapt, info = move_points(self.kernel, self.num_moves, key_move, log_joint, ratio, start, adapt)
        there = points.latents
        if self.kernel.adjusted:
            log_density = (points.shared if joint else points.local).log_density
            assert log_density is not None
            action, moved = -log_density, None
        else:
            moved = jax.tree.map(jnp.subtract, there, here)
            action = _action(known, moved, step_size, joint)
        variance = memory.variance + jnp.where(low, spread, 0.0)[None]
        memory = Memory(log_weight, action, moved, step_size, variance)
        return Block(there, None, memory), adapt, info | {"resampled": jnp.mean(low * 1.0)}

    def drop_weights(self, rng_key: Array, block: Block) -> Block:
        """Resample the particles systematically."""
        log_weight = block.memory.log_weight
        _, latents = resample_to(rng_key, log_weight.shape[0], log_weight, block.latents)
        return block._replace(latents=latents, memory=None)


def weights_at(block: Block, known: Known) -> Array:
    """Return log weights ``[*C]`` at the parameters at which the densities of ``block`` are ``known``."""
    memory, joint = block.memory, bool(block.latents.shared)
    if memory.moved is None:
        here: Evaluation = known.shared if joint else known.local
        return memory.log_weight + memory.action + here.log_density
    back = jax.tree.map(jnp.negative, memory.moved)
    return memory.log_weight + memory.action - _action(known, back, memory.step_size, joint)


def _action(known: Known, moved: Latents, step_size: Array, joint: bool) -> Array:
    """Return the action of an unadjusted move; ``joint`` if all latents of a particle have one weight."""
    if joint:
        whole, gradient = known.shared.log_density, Latents(known.local.gradient, known.shared.gradient)
        return ula_action(whole.shape, whole, gradient, moved, step_size)
    per_datum = known.local.log_density
    return ula_action(per_datum.shape, per_datum, known.local.gradient, moved.local, step_size)
