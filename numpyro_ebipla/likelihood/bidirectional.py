"""Bidirectional Monte Carlo: how far annealing is off, for data simulated from the model itself.

The latents that a datum was simulated with are one exact draw of its posterior. Annealed importance sampling from the
prior gives an unbiased estimate of ``p(y)``, and so on average too low a logarithm; run backwards from the exact draw
it gives an unbiased estimate of ``1/p(y)``, and too high a one (Grosse, Ghahramani and Adams, 2015; Grosse, Ancha and
Roy, 2016). Temperatures, step sizes and scales of the moves are learned beforehand, the same for both directions.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, random
from numpyro import handlers

from numpyro_ebipla._core.errors import ModelError
from numpyro_ebipla._core.state import Params, Sites
from numpyro_ebipla.likelihood.annealed import check_proper, is_joint
from numpyro_ebipla.likelihood.normalisers import energies_of, log_z_shift, normalisers, shared_normalisers
from numpyro_ebipla.likelihood.posterior import Populations, anneal_posterior, posterior_density
from numpyro_ebipla.model.blocks import Batch
from numpyro_ebipla.model.latent_model import LatentModel
from numpyro_ebipla.smc.normaliser import Estimate
from numpyro_ebipla.smc.path import learn_path, weigh_along
from numpyro_ebipla.smc.weights import log_mean_exp

#: Lengths of ladders are multiples of this.
LADDER_LENGTH = 32


class Bounds(NamedTuple):
    """Bounds of ``log p(y)`` in nats that hold on average, for simulated data: ``[M]``, or scalars of all data.

    Attributes:
        lower: by annealing from the prior.
        upper: by annealing back from the latents that the datum was simulated with.
    """

    lower: Array
    upper: Array

    @property
    def gap(self) -> Array:
        """``upper − lower``; its mean over data bounds the mean error of either."""
        return self.upper - self.lower


def bidirectional(model: LatentModel, params: Params, batch: Batch, populations: Populations) -> Bounds:
    """Simulate data as many as there are and bound their ``log p(y)``; see :meth:`.EBIPLA.bidirectional`."""
    key_z, key_blocks = random.split(batch.rng_key)
    batch = batch._replace(indices=model.blocks()[0])
    check_proper(model, params, batch)
    _check_simulated(model, params, batch)
    log_z = shared_normalisers(model, populations.num_populations, params, batch._replace(rng_key=key_z))
    simulate, climb = model.compiled(_simulate), model.compiled(_climb, populations)
    bound = model.compiled(_bounds, populations)

    def of_block(here: Batch) -> Bounds:
        key_draw, key_temps, key_run = random.split(here.rng_key, 3)
        draw = simulate(params, here._replace(rng_key=key_draw))
        ladder = _even_ladder(*climb(params, here._replace(rng_key=key_temps), draw.values))
        return bound(params, here._replace(rng_key=key_run), log_z, draw, ladder)

    axis = None if is_joint(model) else 0
    return model.map_blocks(of_block, batch._replace(rng_key=key_blocks), Bounds._make((axis, axis)))


class Simulated(NamedTuple):
    """Sites drawn from the model, and values of its observed sites."""

    local: Sites
    shared: Sites
    values: dict[str, Array]


def _simulate(model: LatentModel, params: Params, batch: Batch) -> Simulated:
    return Simulated(*model.proper().simulate(params, batch))


def _observing(model: LatentModel, values: dict[str, Array]) -> LatentModel:
    """Return the model with simulated values in the place of the data."""
    model = model.proper()
    return replace(model, model=handlers.condition(model.model, data=values))


def _climb(
    model: LatentModel, populations: Populations, params: Params, batch: Batch, values: dict[str, Array]
) -> tuple[Array, Array]:
    """Return temperatures at which stages cost equally much, and their number."""
    observing = _observing(model, values)
    out = anneal_posterior(observing, params, batch, populations.num_particles, populations.annealing).annealed
    return out.temps, out.num_temps


def _even_ladder(temps: Array, num_temps: Array) -> Array:
    """Return a ladder of about these temperatures, in one of a few lengths only, as each is compiled for."""
    num = int(num_temps)
    length = -(-num // LADDER_LENGTH) * LADDER_LENGTH
    from_zero = jnp.concatenate([jnp.zeros(1), temps[:num]])
    return jnp.interp(jnp.linspace(0, num, length + 1)[1:], jnp.arange(num + 1), from_zero)


def _bounds(
    model: LatentModel,
    populations: Populations,
    params: Params,
    batch: Batch,
    log_z: dict[str, Estimate],
    draw: Simulated,
    temps: Array,
) -> Bounds:
    """Anneal forwards from the prior and back from the latents that the data were simulated with."""
    observing = _observing(model, draw.values)
    key_z, key_model, key_pilot, key_base, key_forward, key_back = random.split(batch.rng_key, 6)
    at, own = batch._replace(rng_key=key_z), energies_of(model, per_datum=True)
    own_z = normalisers(model, own, populations.num_populations, params, at)
    log_z = log_z | own_z
    batch = batch._replace(rng_key=key_model)
    shift, _ = log_z_shift(observing, params, batch, log_z)
    by_datum, rest = shift({name: estimate.value for name, estimate in log_z.items()})
    density = posterior_density(observing, params, batch)
    num, annealing = populations.num_particles, populations.annealing
    path = learn_path(key_pilot, density.tilted, num, temps, annealing)
    base = density.tilted.sample_base(key_base, num)
    true = density.flat(*jax.tree.map(lambda x: jnp.repeat(x[None], num, 0), (draw.local, draw.shared)))
    lower = log_mean_exp(weigh_along(key_forward, density.tilted, base, path, annealing.num_moves))
    upper = -log_mean_exp(weigh_along(key_back, density.tilted, true, path, annealing.num_moves, back=True))
    by_datum = by_datum.sum() + rest if is_joint(model) else by_datum
    return Bounds(lower + by_datum, upper + by_datum)


def _check_simulated(model: LatentModel, params: Params, batch: Batch) -> None:
    """Raise unless the model can be simulated, as it is weighed.

    Raises:
        ModelError: naming the site.
    """
    if not model.latents:
        raise ModelError("bidirectional: the model has no latent site, so its density is not annealed.")

    def look(batch: Batch) -> Any:
        for name, site in model.sites(params, batch).items():
            if name not in model.latents and site["is_observed"]:
                try:
                    jax.eval_shape(site["fn"].sample, batch.rng_key)
                except NotImplementedError as e:
                    raise ModelError(
                        f"bidirectional: '{name}' ({type(site['fn']).__name__}) cannot be simulated."
                    ) from e
        return model.simulate(params, batch)

    jax.eval_shape(look, batch)
