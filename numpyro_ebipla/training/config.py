"""What a step is composed of: one choice for each column of the table of systems."""

from collections.abc import Callable
from typing import Any, NamedTuple

import optax

from numpyro_ebipla._core.errors import ModelError
from numpyro_ebipla._core.state import Params, TrainState
from numpyro_ebipla._core.validate import as_count
from numpyro_ebipla.kernels.base import AbstractKernel
from numpyro_ebipla.kernels.mala import MALA
from numpyro_ebipla.model.latent_model import LatentModel
from numpyro_ebipla.particles.base import AbstractParticles
from numpyro_ebipla.particles.persistent import Particles
from numpyro_ebipla.walkers.annealed import Annealed
from numpyro_ebipla.walkers.base import AbstractWalkers
from numpyro_ebipla.walkers.tempered import Tempered

#: Walkers of each datum's own prior, by default: there are as many populations as data in a minibatch.
WALKERS_PER_DATUM = 64


class Config(NamedTuple):
    """One choice per column of the table of systems: what a step is composed of."""

    model: LatentModel
    particles: AbstractParticles
    walkers: dict[str, AbstractWalkers]
    energy_params: tuple[str, ...]
    optim: optax.GradientTransformationExtraArgs
    num_particles: int
    averaging: float | None
    max_energy: float

    def estimate(self, state: TrainState) -> Params:
        """Return the parameters that a fit reports, unconstrained: the running average, or the last ones."""
        return state.params if self.averaging is None else state.average


def parse_posterior(posterior: Any, kernel: Any, num_moves: Any) -> AbstractParticles:
    """Return how the particles are kept, from either of the two ways to say it.

    Raises:
        TypeError, ValueError: naming the argument that is off.
    """
    if posterior is not None:
        if not isinstance(posterior, AbstractParticles):
            raise TypeError(f"posterior must be Particles() or another way to keep particles, got {posterior!r}.")
        if kernel is not None or num_moves is not None:
            raise ValueError(
                f"kernel and num_moves belong to posterior: pass {type(posterior).__name__}(kernel=…, num_moves=…)."
            )
        return posterior
    kernel = MALA() if kernel is None else kernel
    if not isinstance(kernel, AbstractKernel):
        raise TypeError(f"kernel must be ULA(), MALA() or Underdamped(), got {kernel!r}.")
    return Particles(kernel, 1 if num_moves is None else as_count("num_moves", num_moves))


def choose_walkers(model: LatentModel, prior: Any) -> dict[str, AbstractWalkers]:
    """Return the strategy of every energy prior, from one strategy for all, or one for each site.

    Raises:
        ModelError: for a site without an energy prior, or a strategy that cannot serve it.
    """
    walkers: dict[str, AbstractWalkers] = {}
    for name, site in model.energies.items():
        chosen = prior.get(name) if isinstance(prior, dict) else prior
        if chosen is None:
            chosen = Annealed(num_walkers=WALKERS_PER_DATUM) if site.per_datum else Tempered()
        if site.per_datum and not chosen.per_datum:
            raise ModelError(
                f"the energy prior at '{name}' is conditional on covariates of the data, so each datum has a "
                f"normaliser of its own; {type(chosen).__name__} cannot serve it: use prior=Annealed()."
            )
        walkers[name] = chosen
    for name in prior if isinstance(prior, dict) else ():
        if name not in model.energies:
            raise ModelError(f"prior: there is no energy prior at '{name}'; there are {list(walkers)}.")
    return walkers


def check_posterior(model: LatentModel, posterior: AbstractParticles, refuse: Callable | None) -> None:
    """Raise if a recipe cannot fit the model, or if weights would need all data at a step that sees a minibatch.

    Raises:
        ModelError: saying what to use instead.
    """
    reason = refuse(model) if refuse is not None else None
    if reason:
        raise ModelError(reason)
    if posterior.weighted and model.subsampled and model.global_sites:
        raise ModelError(
            f"the latent '{model.global_sites[0]}' is global and the data are subsampled: its weights would need all "
            "data at every step. Drop batch_size, or use posterior=Particles()."
        )
