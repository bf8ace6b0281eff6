"""Bidirectional Monte Carlo: how far annealing is off, for data simulated from the model itself.

The latents that a datum was simulated with are one exact draw of its posterior. Annealed importance sampling from the
prior gives an unbiased estimate of ``p(y)``, and so on average too low a logarithm; run backwards from the exact draw
it gives an unbiased estimate of ``1/p(y)``, and too high a one (Grosse, Ghahramani and Adams, 2015; Grosse, Ancha and
Roy, 2016). Temperatures, step sizes and scales of the moves are learned beforehand, the same for both directions.
"""

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, random

from numpyro_ebipla._core.errors import ModelError
from numpyro_ebipla._core.state import Latents, Params
from numpyro_ebipla.likelihood.annealed import AnnealOptions, check_proper, is_joint
from numpyro_ebipla.likelihood.normalisers import log_z_shift, normalisers
from numpyro_ebipla.likelihood.posterior import anneal_posterior, posterior_density
from numpyro_ebipla.model.handlers import Observe
from numpyro_ebipla.model.latent_model import Batch, LatentModel
from numpyro_ebipla.smc.path import anneal_along, learn_path
from numpyro_ebipla.smc.weights import log_mean_exp


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


def bidirectional(model: LatentModel, params: Params, batch: Batch, options: AnnealOptions) -> Bounds:
    """Simulate data as many as there are and bound their ``log p(y)``; see :meth:`.EBIPLA.bidirectional`."""
    whole = model.blocks()
    key_z, key_blocks = random.split(batch.rng_key)
    batch = batch._replace(indices=whole[0])
    check_proper(model, params, batch)
    _check_simulated(model, params, batch)
    log_z = normalisers(model, options.num_populations, params, batch._replace(rng_key=key_z), per_datum=False)
    parts = []
    for i, indices in enumerate(whole):
        key_draw, key_temps, key_run = random.split(random.fold_in(key_blocks, i), 3)
        draw = _simulate(model, params, batch._replace(indices=indices, rng_key=key_draw))
        temps, num = _ladder(model, options, params, batch._replace(indices=indices, rng_key=key_temps), draw[1])
        # A few lengths only, as each is compiled for.
        length = -(-int(num) // 32) * 32
        ladder = jnp.interp(jnp.linspace(0, int(num), length + 1)[1:], jnp.arange(int(num) + 1), _from_zero(temps, num))
        here = batch._replace(indices=indices, rng_key=key_run)
        parts.append(_both(model, options, params, here, log_z, draw, ladder))
    if len(parts) == 1:
        return parts[0]
    lower, upper = (jnp.concatenate(column)[: model.num_data] for column in zip(*parts, strict=True))
    return Bounds(lower, upper)


def _from_zero(temps: Array, num: Array) -> Array:
    return jnp.concatenate([jnp.zeros(1), temps[: int(num)]])


def _observing(model: LatentModel, values: dict[str, Array]) -> LatentModel:
    model = model.proper()
    return replace(model, model=Observe(model.model, values))


@partial(jax.jit, static_argnums=0)
def _simulate(model: LatentModel, params: Params, batch: Batch) -> tuple[tuple[Latents, Latents], dict[str, Array]]:
    local, glob, values = model.proper().simulate(params, batch)
    return (local, glob), values


@partial(jax.jit, static_argnums=(0, 1))
def _ladder(
    model: LatentModel, options: AnnealOptions, params: Params, batch: Batch, values: dict[str, Array]
) -> tuple[Array, Array]:
    """Temperatures at which stages cost equally much, and their number."""
    out = anneal_posterior(_observing(model, values), params, batch, options.num_particles, **options.anneal())
    return out.temps, out.num_temps


@partial(jax.jit, static_argnums=(0, 1))
def _both(
    model: LatentModel,
    options: AnnealOptions,
    params: Params,
    batch: Batch,
    log_z: dict[str, Any],
    draw: tuple[tuple[Latents, Latents], dict[str, Array]],
    temps: Array,
) -> Bounds:
    latents, values = draw
    observing = _observing(model, values)
    key_z, key_model, key_pilot, key_base, key_forward, key_back = random.split(batch.rng_key, 6)
    own_z = normalisers(model, options.num_populations, params, batch._replace(rng_key=key_z), per_datum=True)
    log_z = log_z | own_z
    batch = batch._replace(rng_key=key_model)
    shift, _ = log_z_shift(observing, params, batch, log_z)
    by_datum, rest = shift({name: estimate.value for name, estimate in log_z.items()})
    density = posterior_density(observing, params, batch)
    num, moves = options.num_particles, options.num_moves
    schedule = learn_path(key_pilot, density.tilted, num, temps, moves)
    base = density.tilted.sample_base(key_base, num)
    true = density.flat(*jax.tree.map(lambda x: jnp.repeat(x[None], num, 0), latents))
    lower = log_mean_exp(anneal_along(key_forward, density.tilted, base, schedule, moves))
    upper = -log_mean_exp(anneal_along(key_back, density.tilted, true, schedule, moves, back=True))
    by_datum = by_datum.sum() + rest if is_joint(model) else by_datum
    return Bounds(lower + by_datum, upper + by_datum)


def _check_simulated(model: LatentModel, params: Params, batch: Batch) -> None:
    """Refuse what cannot be simulated, or is simulated otherwise than it is weighed.

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
