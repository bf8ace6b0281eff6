"""Posterior means of what the observed sites' distributions expect, given data."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax, random

from numpyro_ebipla._core.errors import ModelError
from numpyro_ebipla._core.state import Latents, Params
from numpyro_ebipla._core.static import is_traced
from numpyro_ebipla.likelihood.annealed import AnnealOptions, check_proper
from numpyro_ebipla.likelihood.posterior import anneal_posterior, equal_draws
from numpyro_ebipla.model.energy import unwrap
from numpyro_ebipla.model.handlers import simulated
from numpyro_ebipla.model.latent_model import Batch, LatentModel
from numpyro_ebipla.smc.weights import normalised


def reconstruct(
    model: LatentModel,
    params: Params,
    batch: Batch,
    num_draws: int | None,
    sites: tuple[str, ...] | None,
    options: AnnealOptions,
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Posterior means, or draws, of the means at observed sites; see :meth:`.EBIPLA.reconstruct`.

    Also :attr:`.Population.stage_ess`, ``[M]`` or a scalar: how the ladders of temperatures did.
    """
    whole = model.blocks()
    batch = batch._replace(indices=whole[0])
    check_proper(model, params, batch, scaled=True)
    axes = _axes(model, params, batch, sites)
    parts = []
    for i, indices in enumerate(whole):
        here = batch._replace(indices=indices, rng_key=random.fold_in(batch.rng_key, i))
        part = _of_block(model, tuple(axes.items()), num_draws, options, params, here)
        parts.append(part if is_traced(part) else jax.tree.map(np.asarray, part))
    if len(parts) == 1:
        return parts[0]

    numpy = jnp if is_traced(parts) else np

    def join(arrays: list[Any], axis: int | None) -> Any:
        return (
            arrays[0] if axis is None else numpy.take(numpy.concatenate(arrays, axis), np.arange(model.num_data), axis)
        )

    found = {name: join([part[0][name] for part in parts], axis) for name, axis in axes.items()}
    return found, join([part[1] for part in parts], 0 if parts[0][1].ndim else None)


def _axes(model: LatentModel, params: Params, batch: Batch, sites: tuple[str, ...] | None) -> dict[str, int | None]:
    """The sites to reconstruct, and the axis of each mean that runs over the data.

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
            found[name] = model.plate.dim - site["fn"].event_dim if model.is_local(site) else None
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


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _of_block(
    model: LatentModel,
    axes: tuple[tuple[str, int | None], ...],
    num_draws: int | None,
    options: AnnealOptions,
    params: Params,
    batch: Batch,
) -> tuple[dict[str, Array], Array]:
    model = model.proper()
    key_anneal, key_draw = random.split(batch.rng_key)
    names = tuple(name for name, _ in axes)

    def means(local: Latents, glob: Latents) -> dict[str, Array]:
        return model.means(params, local, glob, batch, names)

    if not model.latents:
        only = means({}, {})
        return (only if num_draws is None else jax.tree.map(lambda x: jnp.stack([x] * num_draws), only)), jnp.ones(())
    num = options.num_particles * options.num_populations
    population = anneal_posterior(model, params, batch._replace(rng_key=key_anneal), num, **options.anneal())
    if num_draws is not None:
        draws = equal_draws(key_draw, population, num_draws)
        return lax.map(lambda latents: means(*latents), draws), population.stage_ess
    weight = normalised(population.log_weight)

    def add(total: dict[str, Array], particle: Any) -> tuple[dict[str, Array], None]:
        """One particle at a time: all of them at once may not fit into memory."""
        local, glob, weight = particle
        mean = means(local, glob)
        for name, axis in axes:
            if weight.ndim == 0:
                share = weight
            else:  # a site outside the plate depends on no local latent
                share = jnp.array(1 / num) if axis is None else weight.reshape((-1,) + (1,) * (-axis - 1))
            total[name] += share * mean[name]
        return total, None

    one = jax.tree.map(lambda x: x[0], (population.local, population.glob))
    shapes = jax.eval_shape(means, *one)
    start = {name: jnp.zeros(x.shape, x.dtype) for name, x in shapes.items()}
    return lax.scan(add, start, (population.local, population.glob, weight))[0], population.stage_ess
