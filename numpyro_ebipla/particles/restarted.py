"""Particles that are restarted, or successive states of one chain: the rivals of persistent ones."""

from dataclasses import dataclass, field
from typing import Any, final

import jax
import jax.numpy as jnp
from jax import Array, lax, random

from numpyro_ebipla._core.tree import normal_like
from numpyro_ebipla.kernels.base import AbstractKernel
from numpyro_ebipla.kernels.langevin import ULA
from numpyro_ebipla.particles.base import AbstractUnweighted, check_moves
from numpyro_ebipla.particles.block import Adaptations, Block, Draw, Info, Known, LogJoint, Prepared
from numpyro_ebipla.particles.moves import evaluate_at, move_block


class AbstractRemade(AbstractUnweighted):
    """Particles that ``prepare`` makes anew at every step, so that nothing is left to be moved after the gradient."""

    quiet = True  # once they are collected

    @property
    def recalls(self) -> bool:
        """False: none can be left behind."""
        return False

    def advance(
        self, rng_key: Array, log_joint: LogJoint, ratio: float, block: Block, known: Known, adapt: Adaptations
    ) -> tuple[Block, Adaptations, Info]:
        """Return the particles as they are."""
        del rng_key, log_joint, ratio, known
        return block, adapt, {}


@final
@dataclass(frozen=True)
class ShortRunParticles(AbstractRemade):
    """Restarted from the prior's base (``p_0`` of an energy prior) at every step, then K moves (2006.08205, Alg. 1).

    What they reach is not the posterior, so the gradient is biased by as much as they fall short of it.

    Args:
        kernel: of all latents; LEBM writes its step ``s``, with ``h = s²/2``.
        num_moves: K.
    """

    kernel: AbstractKernel = field(default_factory=lambda: ULA(0.1**2 / 2))
    num_moves: int = 20

    def __post_init__(self) -> None:
        check_moves(self)

    def prepare(
        self, rng_key: Array, draw: Draw, log_joint: LogJoint, ratio: float, block: Block, adapt: Adaptations
    ) -> Prepared:
        """Draw particles from the prior's base and make K moves."""
        key_draw, key_momentum, key_moves = random.split(rng_key, 3)
        latents = draw(key_draw)
        momentum = normal_like(key_momentum, latents) if self.kernel.has_momentum else None
        known = evaluate_at(log_joint, ratio, latents)
        start = Block(latents, momentum, block.memory)
        moved = move_block(self.kernel, self.num_moves, key_moves, log_joint, ratio, start, known, adapt)
        block, adapt, info = moved
        return Prepared(block, adapt, info=info)


@final
@dataclass(frozen=True)
class SuccessiveParticles(AbstractRemade):
    """One chain, whose next N states are the N particles of a step (SOUL; De Bortoli et al., 2021, Alg. 1).

    Args:
        kernel: of all latents; ULA in the paper.
        num_moves: between two of these states.
    """

    kernel: AbstractKernel = field(default_factory=lambda: ULA(1e-2))
    num_moves: int = 1

    def __post_init__(self) -> None:
        check_moves(self)

    def prepare(
        self, rng_key: Array, draw: Draw, log_joint: LogJoint, ratio: float, block: Block, adapt: Adaptations
    ) -> Prepared:
        """Go on from the last state of the chain, and keep the next N."""
        last = jax.tree.map(lambda x: x[-1:], block._replace(memory=None))
        num = jax.tree.leaves(block)[0].shape[0]

        def move(carry: tuple[Block, Adaptations], key: Array) -> tuple[Any, Any]:
            here, adapt = carry
            known = evaluate_at(log_joint, ratio, here.latents)
            moved = move_block(self.kernel, self.num_moves, key, log_joint, ratio, here, known, adapt)
            there, adapt, info = moved
            return (there, adapt), (there, info)

        (_, adapt), (states, info) = lax.scan(move, (last, adapt), random.split(rng_key, num))
        return Prepared(jax.tree.map(lambda x: x[:, 0], states), adapt, info=jax.tree.map(jnp.mean, info))
