"""Posterior means of what the observed sites' distributions expect, given data."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax, random

from numpyro_ebipla._core.errors import ModelError
from numpyro_ebipla._core.state import Params, Sites
from numpyro_ebipla.likelihood.annealed import check_proper
from numpyro_ebipla.likelihood.chains import chain_means, warn_of_rising
from numpyro_ebipla.likelihood.posterior import Populations, anneal_posterior, draw_posterior
from numpyro_ebipla.model.blocks import Batch, Progress, silent
from numpyro_ebipla.model.energy import unwrap
from numpyro_ebipla.model.handlers import simulated
from numpyro_ebipla.model.latent_model import LatentModel
from numpyro_ebipla.smc.weights import normalised

#: ``(site, axis of its mean that runs over the data, or None)`` for each site.
Axes = tuple[tuple[str, int | None], ...]


def reconstruct(
    model: LatentModel,
    params: Params,
    batch: Batch,
    num_draws: int | None,
    sites: tuple[str, ...] | None,
    populations: Populations | None,
    guide: Callable | None = None,
    guide_params: Params | None = None,
    progress: Progress = silent,
) -> tuple[dict[str, Any], Any]:
    """Return posterior means, or draws, of the means at observed sites; see :meth:`.EBIPLA.reconstruct`.

    Without populations they are those of some chains, which begin at draws of a guide if there is one.
    Also :attr:`.smc.anneal.Population.stage_ess`, ``[M]`` or a scalar: how the ladders of temperatures did.
    """
    batch = batch._replace(indices=model.blocks()[0])
    check_proper(model, params, batch, scaled=True)
    axes = _axes(model, params, batch, sites)
    by_datum = 0 if model.independent_data else None
    if populations is None and by_datum == 0:
        few = model.compiled(_of_chains, tuple(axes), guide)
        one = lambda here: few(params, guide_params or {}, here)
        found, rising = model.map_blocks(one, batch, (axes, by_datum), progress=progress)
        warn_of_rising(rising)
        return found, jnp.ones(())
    many = model.compiled(_of_block, tuple(axes.items()), num_draws, populations or Populations(256, 1))
    return model.map_blocks(lambda here: many(params, here), batch, (axes, by_datum), progress=progress)


def _axes(model: LatentModel, params: Params, batch: Batch, sites: tuple[str, ...] | None) -> dict[str, int | None]:
    """Return the sites to reconstruct, and the axis of each mean that runs over the data.

    Raises:
        ModelError: naming a site that has no mean, or that is not observed.
    """
    model, found = model.proper(), {}

    def look(batch: Batch) -> None:
        observed = {name: site for name, site in model.sites(params, batch).items() if simulated(site)}
        for name in observed if sites is None else sites:
            if name not in observed:
                raise ModelError(f"reconstruct: there is no observed site '{name}'; there are {list(observed)}.")
            site = observed[name]
            plate = model.plate
            found[name] = plate.dim(site) - site["fn"].event_dim if plate is not None and plate.holds(site) else None
            try:
                _ = site["fn"].mean
            except (NotImplementedError, AttributeError) as e:
                others = [other for other in observed if other != name]
                remedy = (
                    f"leave it out, as by sites={others}"
                    if others
                    else "the model observes nothing else to reconstruct"
                )
                raise ModelError(
                    f"reconstruct: the distribution at '{name}' ({type(unwrap(site['fn'])).__name__}) has no mean: "
                    f"{remedy}."
                ) from e

    jax.eval_shape(look, batch)
    return found


def _of_chains(
    model: LatentModel,
    sites: tuple[str, ...],
    guide: Callable | None,
    params: Params,
    guide_params: Params,
    batch: Batch,
) -> tuple[dict[str, Array], Array]:
    return chain_means(model.proper(), sites, guide, params, guide_params, batch)


def _of_block(
    model: LatentModel, axes: Axes, num_draws: int | None, populations: Populations, params: Params, batch: Batch
) -> tuple[dict[str, Array], Array]:
    """Return means, or draws of means, given the data of one block."""
    model = model.proper()
    key_anneal, key_draw = random.split(batch.rng_key)
    names = tuple(name for name, _ in axes)

    def means(local: Sites, shared: Sites) -> dict[str, Array]:
        return model.means(params, local, shared, batch, names)

    if not model.latents:
        only = means({}, {})
        return (only if num_draws is None else jax.tree.map(lambda x: jnp.stack([x] * num_draws), only)), jnp.ones(())
    at = batch._replace(rng_key=key_anneal)
    population = anneal_posterior(model, params, at, populations.total, populations.annealing)
    left = population.annealed.stage_ess
    if num_draws is not None:
        draws = draw_posterior(key_draw, population, num_draws)
        return lax.map(lambda latents: means(*latents), draws), left
    weight, num = normalised(population.annealed.log_weight), populations.total

    def add(total: dict[str, Array], particle: Any) -> tuple[dict[str, Array], None]:
        """Add one particle's means: those of all particles at once may not fit into memory."""
        local, shared, weight = particle
        mean = means(local, shared)
        for name, axis in axes:
            if weight.ndim == 0:
                share = weight
            else:  # a site outside the plate depends on no local latent
                share = jnp.array(1 / num) if axis is None else weight.reshape((-1,) + (1,) * (-axis - 1))
            total[name] += share * mean[name]
        return total, None

    one = jax.tree.map(lambda x: x[0], (population.local, population.shared))
    shapes = jax.eval_shape(means, *one)
    start = {name: jnp.zeros(x.shape, x.dtype) for name, x in shapes.items()}
    return lax.scan(add, start, (population.local, population.shared, weight))[0], left
