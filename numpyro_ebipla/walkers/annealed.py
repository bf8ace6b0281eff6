"""Prior walkers annealed afresh at every step."""

from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array

from numpyro_ebipla._core.state import WalkerState
from numpyro_ebipla._core.validate import check_counts, check_type
from numpyro_ebipla.smc.anneal import anneal
from numpyro_ebipla.smc.annealing import EVERY_STEP, TO_LEARN_STEPS, Annealing
from numpyro_ebipla.smc.density import TiltedDensity
from numpyro_ebipla.smc.weights import normalised
from numpyro_ebipla.walkers.base import Info, Walkers, WalkerStrategy


@dataclass(frozen=True)
class Annealed(WalkerStrategy):
    """Walkers annealed afresh from the base at every step, by sequential Monte Carlo.

    They have no memory that could go wrong; only the step sizes of their moves are carried. Reliable where a
    few dozen temperatures suffice; in higher dimensions see :class:`.Tempered`.

    Args:
        num_walkers: P.
        annealing: by default in large stages of one move each.
    """

    num_walkers: int = 256
    annealing: Annealing = EVERY_STEP
    per_datum = True
    brake_gap = True

    def __post_init__(self) -> None:
        check_counts(self, "num_walkers")
        check_type(self, "annealing", Annealing, "Annealing(…)")

    def init(self, rng_key: Array, density: TiltedDensity) -> WalkerState:
        """As :meth:`WalkerStrategy.init`."""
        x = density.sample_base(rng_key, 1)
        shape = density.log_base(x).shape[1:]
        start = anneal(rng_key, density, self.num_walkers, TO_LEARN_STEPS)
        return WalkerState(None, None, None, None, jnp.zeros(shape, x.dtype), start.log_step)

    def prepare(
        self, rng_key: Array, density: TiltedDensity, state: WalkerState, particles: Array | None = None
    ) -> tuple[Walkers, WalkerState, Info]:
        """As :meth:`WalkerStrategy.prepare`."""
        population = anneal(rng_key, density, self.num_walkers, self.annealing, state.adapt)
        state = state._replace(adapt=population.log_step, log_z=population.log_z)
        info = {
            "accept": population.accept_prob,
            "ess": population.ess,
            "log_z": jnp.mean(population.log_z),
            "num_temps": population.num_temps,
        }
        return Walkers(population.position, normalised(population.log_weight)), state, info
