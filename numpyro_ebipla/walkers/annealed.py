"""Prior walkers annealed afresh at every step."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, final

import jax.numpy as jnp
from jax import Array

from numpyro_ebipla._core.validate import check_counts, check_type
from numpyro_ebipla.smc.anneal import anneal
from numpyro_ebipla.smc.annealing import EVERY_STEP, TO_LEARN_STEPS, Annealing
from numpyro_ebipla.smc.density import TiltedDensity
from numpyro_ebipla.smc.weights import normalised
from numpyro_ebipla.walkers.base import AbstractPrepared, Info, Walkers, draw_resampled


class AnnealedState(NamedTuple):
    """What is carried of annealed walkers.

    Attributes:
        log_step: ``[NUM_KNOTS]`` log step sizes of the moves, by temperature.
    """

    log_step: Array


@final
@dataclass(frozen=True)
class Annealed(AbstractPrepared):
    """Walkers annealed afresh from the base at every step, by sequential Monte Carlo.

    They have no memory that could go wrong; only the step sizes of their moves are carried. Reliable where a
    few dozen temperatures suffice; in higher dimensions see :class:`.Tempered`.

    Args:
        num_walkers: P.
        annealing: by default in large stages of one move each.
    """

    num_walkers: int = 256
    annealing: Annealing = EVERY_STEP
    per_datum: ClassVar[bool] = True
    brake_gap: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_counts(self, "num_walkers")
        check_type(self, "annealing", Annealing, "Annealing(…)")

    def init(self, rng_key: Array, density: TiltedDensity) -> AnnealedState:
        """Anneal once, to learn step sizes."""
        return AnnealedState(anneal(rng_key, density, self.num_walkers, TO_LEARN_STEPS).log_step)

    def prepare(
        self, rng_key: Array, density: TiltedDensity, state: AnnealedState, particles: Array | None = None
    ) -> tuple[Walkers, AnnealedState, Info]:
        """Anneal a fresh population."""
        del particles
        population = anneal(rng_key, density, self.num_walkers, self.annealing, state.log_step)
        info = {
            "accept": population.accept_prob,
            "ess": population.ess,
            "log_z": jnp.mean(population.log_z),
            "num_temps": population.num_temps,
        }
        walkers = Walkers(population.position, normalised(population.log_weight))
        return walkers, AnnealedState(population.log_step), info

    def draw(self, rng_key: Array, walkers: Walkers, state: AnnealedState) -> Array:
        """Resample the population."""
        del state
        return draw_resampled(rng_key, walkers)
