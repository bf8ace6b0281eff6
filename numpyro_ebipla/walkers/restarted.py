"""Walkers that are restarted, at the base or at the particles, and moved a fixed number of times.

What these chains reach in K moves is not the prior, so the gradient is biased, by as much as they fall short. They
are the rivals that the persistent strategies of :mod:`~numpyro_ebipla.walkers.persistent` are compared with.
"""

from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple, final

import jax.numpy as jnp
from jax import Array, random

from numpyro_ebipla._core.state import Adaptation
from numpyro_ebipla._core.tree import normal_like
from numpyro_ebipla._core.validate import check_counts, check_type
from numpyro_ebipla.kernels.base import AbstractKernel, Point
from numpyro_ebipla.kernels.langevin import ULA
from numpyro_ebipla.kernels.mala import MALA
from numpyro_ebipla.smc.density import TiltedDensity
from numpyro_ebipla.walkers.base import (
    AbstractPrepared,
    Info,
    Walkers,
    chain_shape,
    draw_resampled,
    equal_weights,
    move_walkers,
)


class ShortRunState(NamedTuple):
    """What is carried of short-run walkers.

    Attributes:
        adapt: of the kernel.
    """

    adapt: Adaptation


class ContrastiveState(NamedTuple):
    """Contrastive walkers.

    Attributes:
        position: ``[P, *event]``.
        momentum: like ``position``, of underdamped kernels, else None.
        adapt: of the kernel.
    """

    position: Array
    momentum: Array | None
    adapt: Adaptation


@final
@dataclass(frozen=True)
class ShortRun(AbstractPrepared):
    """Short-run chains (Nijkamp et al., 2019; LEBM, 2006.08205, Alg. 1): from the base afresh, K moves at each step.

    Args:
        num_walkers: P.
        kernel: ULA, MALA or Underdamped. LEBM writes its step ``s``, with ``h = s²/2``.
        num_moves: K.
    """

    num_walkers: int = 256
    kernel: AbstractKernel = field(default_factory=lambda: ULA(0.4**2 / 2))
    num_moves: int = 60
    per_datum: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_counts(self, "num_walkers", "num_moves")
        check_type(self, "kernel", AbstractKernel, "ULA(), MALA() or Underdamped()")

    def init(self, rng_key: Array, density: TiltedDensity) -> ShortRunState:
        """Return an adaptation to begin with."""
        x = density.sample_base(rng_key, 1)
        return ShortRunState(self.kernel.init(x, len(chain_shape(density, x))))

    def prepare(
        self, rng_key: Array, density: TiltedDensity, state: ShortRunState, particles: Array | None = None
    ) -> tuple[Walkers, ShortRunState, Info]:
        """Draw walkers from the base and make K moves."""
        del particles
        key_base, key_momentum, key_moves = random.split(rng_key, 3)
        x = density.sample_base(key_base, self.num_walkers)
        momentum = normal_like(key_momentum, x) if self.kernel.has_momentum else None
        start = Point(x, None, None, momentum)
        point, adapt, accept = move_walkers(self.kernel, self.num_moves, key_moves, density, start, state.adapt)
        return Walkers(point.position, equal_weights(density, x)), ShortRunState(adapt), {"accept": accept}

    def draw(self, rng_key: Array, walkers: Walkers, state: ShortRunState) -> Array:
        """Resample the walkers, which brings them in random order."""
        del state
        return draw_resampled(rng_key, walkers)


@final
@dataclass(frozen=True)
class Contrastive(AbstractPrepared):
    """Contrastive chains (CD-k; Hinton, 2002): from the particles, K moves.

    At an observed energy site they start at the minibatch's data, at a latent one at its posterior particles.

    Args:
        num_walkers: P, drawn from these without replacement as far as they reach.
        kernel: ULA, MALA or Underdamped.
        num_moves: k, at each step.
        reset_every: steps between two restarts.
    """

    num_walkers: int = 256
    kernel: AbstractKernel = field(default_factory=MALA)
    num_moves: int = 1
    reset_every: int = 1
    persists: ClassVar[bool] = True
    follows_particles: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_counts(self, "num_walkers", "num_moves", "reset_every")
        check_type(self, "kernel", AbstractKernel, "ULA(), MALA() or Underdamped()")

    def init(self, rng_key: Array, density: TiltedDensity) -> ContrastiveState:
        """Draw walkers from the base, until there are particles to start at."""
        x = density.sample_base(rng_key, self.num_walkers)
        momentum = jnp.zeros_like(x) if self.kernel.has_momentum else None
        return ContrastiveState(x, momentum, self.kernel.init(x, len(chain_shape(density, x))))

    def prepare(
        self, rng_key: Array, density: TiltedDensity, state: ContrastiveState, particles: Array | None = None
    ) -> tuple[Walkers, ContrastiveState, Info]:
        """Put the walkers at the particles, if it is time, and make k moves."""
        key_start, key_momentum, key_moves = random.split(rng_key, 3)
        x, momentum = state.position, state.momentum
        if particles is not None:
            num = particles.shape[0]
            chosen = random.choice(key_start, num, (self.num_walkers,), replace=num < self.num_walkers)
            due = (state.adapt.count // self.num_moves) % self.reset_every == 0
            x = jnp.where(due, particles[chosen], x)
            if momentum is not None:
                momentum = jnp.where(due, normal_like(key_momentum, momentum), momentum)
        start = Point(x, None, None, momentum)
        point, adapt, accept = move_walkers(self.kernel, self.num_moves, key_moves, density, start, state.adapt)
        walkers = Walkers(point.position, equal_weights(density, x))
        return walkers, ContrastiveState(point.position, point.momentum, adapt), {"accept": accept}

    def draw(self, rng_key: Array, walkers: Walkers, state: ContrastiveState) -> Array:
        """Resample the walkers, which brings them in random order."""
        del state
        return draw_resampled(rng_key, walkers)
