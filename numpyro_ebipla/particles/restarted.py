"""Particles that are restarted, or successive states of one chain: the rivals of persistent ones."""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax, random

from numpyro_ebipla._core.tree import normal_like
from numpyro_ebipla.kernels.base import Kernel
from numpyro_ebipla.kernels.langevin import ULA
from numpyro_ebipla.particles.base import Adaptations, Block, Draw, Known, LogJoint, Prepared, evaluated_at
from numpyro_ebipla.particles.persistent import Particles


@dataclass(frozen=True)
class ShortRunParticles(Particles):
    """Restarted from the prior's base (``p_0`` of an energy prior) at every step, then K moves (2006.08205, Alg. 1).

    What they reach is not the posterior, so the gradient is biased by as much as they fall short of it.

    Args:
        kernel: of all latents; LEBM writes its step ``s``, with ``h = s²/2``.
        num_moves: K.
    """

    kernel: Kernel = field(default_factory=lambda: ULA(0.1**2 / 2))
    num_moves: int = 20

    def prepare(
        self, rng_key: Array, draw: Draw, log_joint: LogJoint, ratio: float, block: Block, adapt: Adaptations
    ) -> Prepared:
        """As :meth:`Particles.prepare`."""
        key_draw, key_momentum, key_moves = random.split(rng_key, 3)
        local, glob = draw(key_draw)
        momentum = normal_like(key_momentum, (local, glob)) if self.kernel.has_momentum else None
        known = evaluated_at(log_joint, ratio, local, glob)
        start = Block(local, glob, momentum, block.memory)
        block, adapt, info = super().advance(key_moves, log_joint, ratio, start, known, adapt)
        return Prepared(block, adapt, info=info)

    def advance(
        self, rng_key: Array, log_joint: LogJoint, ratio: float, block: Block, known: Known, adapt: Adaptations
    ) -> tuple[Block, Adaptations, dict[str, Array]]:
        """Nothing to do: see :meth:`prepare`."""
        return block, adapt, {}


@dataclass(frozen=True)
class SuccessiveParticles(Particles):
    """One chain, whose next N states are the N particles of a step (SOUL; De Bortoli et al., 2021, Alg. 1).

    Args:
        kernel: of all latents; ULA in the paper.
        num_moves: between two of these states.
    """

    kernel: Kernel = field(default_factory=lambda: ULA(1e-2))

    def prepare(
        self, rng_key: Array, draw: Draw, log_joint: LogJoint, ratio: float, block: Block, adapt: Adaptations
    ) -> Prepared:
        """As :meth:`Particles.prepare`."""
        last = jax.tree.map(lambda x: x[-1:], block._replace(memory=None))
        num = jax.tree.leaves(block)[0].shape[0]

        def move(carry: tuple[Block, Adaptations], key: Array) -> tuple[Any, Any]:
            here, adapt = carry
            known = evaluated_at(log_joint, ratio, here.local, here.glob)
            there, adapt, info = super(SuccessiveParticles, self).advance(key, log_joint, ratio, here, known, adapt)
            return (there, adapt), (there, info)

        (_, adapt), (states, info) = lax.scan(move, (last, adapt), random.split(rng_key, num))
        return Prepared(jax.tree.map(lambda x: x[:, 0], states), adapt, info=jax.tree.map(jnp.mean, info))

    def advance(
        self, rng_key: Array, log_joint: LogJoint, ratio: float, block: Block, known: Known, adapt: Adaptations
    ) -> tuple[Block, Adaptations, dict[str, Array]]:
        """Nothing to do: see :meth:`prepare`."""
        return block, adapt, {}
