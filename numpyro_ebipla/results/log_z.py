"""Slope and curvature of log Z of a fit's energy priors, from fresh draws of them."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax, random

from numpyro_ebipla._core.errors import ModelError
from numpyro_ebipla._core.state import Latents, Params
from numpyro_ebipla.model.blocks import Batch
from numpyro_ebipla.model.latent_model import LatentModel
from numpyro_ebipla.training.collect import GROUPS
from numpyro_ebipla.training.fitted import Fitted
from numpyro_ebipla.training.information import slope_and_curvature

#: Draws of each energy prior.
DRAWS = 8000
#: Tag of the key of these draws.
KEY_INFORMATION = 0x1AF0


class Normaliser(NamedTuple):
    """What is known of log Z of an energy prior, from groups of draws: ``[GROUPS, L]`` and ``[GROUPS, L, L]``.

    Attributes:
        number: of elements of the data that have it.
        slope: of log Z.
        curvature: minus its second derivatives.
    """

    number: float
    slope: np.ndarray
    curvature: np.ndarray


def normaliser_curvatures(fit: Fitted, theta: Params) -> dict[str, Normaliser]:
    """Return what fresh draws of the energy priors know of log Z, by site.

    Args:
        fit: a fit.
        theta: unconstrained parameters in which to differentiate; the others are held.

    Raises:
        ModelError: for a prior with a normaliser for each datum.
    """
    model, found = fit.config.model, {}
    batch = fit.batch(model.blocks(joint=False)[0], fit.key(KEY_INFORMATION, None))
    for i, (name, site) in enumerate(model.energies.items()):
        if site.per_datum:
            raise ModelError(
                f"there are no standard errors: the energy prior at '{name}' has a normaliser for each datum, whose "
                "curvature is not known."
            )
        prior = fit.energy_prior(name)
        keys = random.split(random.fold_in(batch.rng_key, i), GROUPS)
        draws = jnp.stack([prior.as_walkers(prior.sample(key, (DRAWS // GROUPS,))) for key in keys])
        program = model.compiled(_normaliser, name)
        number = num_elements(model, fit.params, batch)[name] / math.prod(prior.batch_shape)
        found[name] = Normaliser(number, *(np.asarray(x, np.float64) for x in program(theta, fit.params, draws, batch)))
    return found


def _normaliser(
    model: LatentModel, name: str, theta: Params, params: Params, draws: Array, batch: Batch
) -> tuple[Array, Array]:
    """Return slopes and curvatures of log Z, from groups of draws ``[GROUPS, n, *event]`` (``n, D`` of D priors)."""
    of_many = model.energy_priors(params, batch)[name].batch_shape != ()

    def log_density(at: Latents, theta: Params) -> Array:
        prior = model.energy_priors(params | model.constrain_params(theta), batch)[name]
        return prior.tilted().log_density((at.local if of_many else at.shared)[name])

    def of_group(x: Array) -> tuple[Array, Array]:
        at = Latents({name: x}, {}) if of_many else Latents({}, {name: x})
        return slope_and_curvature(log_density, at, theta, theta)

    return lax.map(of_group, draws)


def num_elements(model: LatentModel, params: Params, batch: Batch) -> dict[str, float]:
    """Return how many elements each sample site has in all data, an event counted as one."""
    found = {}

    def look() -> None:
        for name, site in model.sites(params, batch).items():
            whole = model.ratio(batch) if model.is_local(site) else 1.0
            found[name] = whole * math.prod(site["fn"].batch_shape)

    jax.eval_shape(look)
    return found
