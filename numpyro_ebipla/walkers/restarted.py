"""Walkers that are restarted, at the base or at the particles, and moved a fixed number of times.

What these chains reach in K moves is not the prior, so the gradient is biased, by as much as they fall short. They
are the rivals that the persistent strategies of :mod:`~numpyro_ebipla.walkers.base` are compared with.
"""

from dataclasses import dataclass, field

import jax.numpy as jnp
from jax import Array, random

from numpyro_ebipla._core.state import WalkerState
from numpyro_ebipla._core.tree import normal_like
from numpyro_ebipla._core.validate import check_counts, check_type
from numpyro_ebipla.kernels.base import Kernel
from numpyro_ebipla.kernels.langevin import ULA
from numpyro_ebipla.kernels.mala import MALA
from numpyro_ebipla.smc.density import TiltedDensity
from numpyro_ebipla.walkers.base import Info, Walkers, WalkerStrategy, moved


@dataclass(frozen=True)
class ShortRun(WalkerStrategy):
    """Short-run chains (Nijkamp et al., 2019; LEBM, 2006.08205, Alg. 1): from the base afresh, K moves at each step.

    Args:
        num_walkers: P.
        kernel: ULA, MALA or Underdamped. LEBM writes its step ``s``, with ``h = s²/2``.
        num_moves: K.
    """

    num_walkers: int = 256
    kernel: Kernel = field(default_factory=lambda: ULA(0.4**2 / 2))
    num_moves: int = 60
    per_datum = True

    def __post_init__(self) -> None:
        check_counts(self, "num_walkers", "num_moves")
        check_type(self, "kernel", Kernel, "ULA(), MALA() or Underdamped()")

    def init(self, rng_key: Array, density: TiltedDensity) -> WalkerState:
        """As :meth:`WalkerStrategy.init`."""
        x = density.sample_base(rng_key, 1)
        shape = density.log_base(x).shape
        log_z = jnp.full(shape[1:], jnp.nan, x.dtype)
        return WalkerState(None, None, None, None, log_z, self.kernel.init({"x": x}, len(shape)))

    def prepare(
        self, rng_key: Array, density: TiltedDensity, state: WalkerState, particles: Array | None = None
    ) -> tuple[Walkers, WalkerState, Info]:
        """As :meth:`WalkerStrategy.prepare`."""
        del particles
        key_base, key_momentum, key_moves = random.split(rng_key, 3)
        x = density.sample_base(key_base, self.num_walkers)
        momentum = normal_like(key_momentum, x) if self.kernel.has_momentum else None
        new = moved(self.kernel, self.num_moves, key_moves, density, x, momentum, state.adapt)
        shape = (self.num_walkers, *state.log_z.shape)
        walkers = Walkers(new.position, jnp.full(shape, 1 / self.num_walkers, x.dtype))
        return walkers, state._replace(adapt=new.adapt), {"accept": new.accept}


@dataclass(frozen=True)
class Contrastive(WalkerStrategy):
    """Contrastive chains (CD-k; Hinton, 2002): from the particles, K moves.

    At an observed energy site they start at the minibatch's data, at a latent one at its posterior particles.

    Args:
        num_walkers: P, drawn from these without replacement as far as they reach.
        kernel: ULA, MALA or Underdamped.
        num_moves: k, at each step.
        reset_every: steps between two restarts.
    """

    num_walkers: int = 256
    kernel: Kernel = field(default_factory=MALA)
    num_moves: int = 1
    reset_every: int = 1
    follows_particles = True

    def __post_init__(self) -> None:
        check_counts(self, "num_walkers", "num_moves", "reset_every")
        check_type(self, "kernel", Kernel, "ULA(), MALA() or Underdamped()")

    def init(self, rng_key: Array, density: TiltedDensity) -> WalkerState:
        """As :meth:`WalkerStrategy.init`."""
        x = density.sample_base(rng_key, self.num_walkers)
        shape = density.log_base(x).shape
        momentum = jnp.zeros_like(x) if self.kernel.has_momentum else None
        log_z = jnp.full(shape[1:], jnp.nan, x.dtype)
        return WalkerState(x, None, None, momentum, log_z, self.kernel.init({"x": x}, len(shape)))

    def prepare(
        self, rng_key: Array, density: TiltedDensity, state: WalkerState, particles: Array | None = None
    ) -> tuple[Walkers, WalkerState, Info]:
        """As :meth:`WalkerStrategy.prepare`."""
        key_start, key_momentum, key_moves = random.split(rng_key, 3)
        x, momentum = state.position, state.momentum
        if particles is not None:
            num = particles.shape[0]
            chosen = random.choice(key_start, num, (self.num_walkers,), replace=num < self.num_walkers)
            due = (state.adapt.count // self.num_moves) % self.reset_every == 0
            x = jnp.where(due, particles[chosen], x)
            if momentum is not None:
                momentum = jnp.where(due, normal_like(key_momentum, momentum), momentum)
        new = moved(self.kernel, self.num_moves, key_moves, density, x, momentum, state.adapt)
        state = state._replace(position=new.position, momentum=new.momentum, adapt=new.adapt)
        weight = jnp.full((self.num_walkers, *state.log_z.shape), 1 / self.num_walkers, x.dtype)
        return Walkers(new.position, weight), state, {"accept": new.accept}
