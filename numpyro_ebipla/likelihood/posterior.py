"""The marginal likelihood: from populations annealed to the posterior, or from a fit's own weighted particles."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from numpyro_ebipla._core.state import Latents, Params
from numpyro_ebipla.model.latent_model import Batch, LatentModel
from numpyro_ebipla.smc.anneal import anneal
from numpyro_ebipla.smc.density import TiltedDensity
from numpyro_ebipla.smc.weights import systematic_ancestors


class Population(NamedTuple):
    """Weighted draws of the posterior; ``C`` is ``(N, B)``, or ``(N,)`` if there are global latents.

    Attributes:
        local: ``{site: [N, B, *event]}`` unconstrained.
        glob: ``{site: [N, *event]}``.
        log_weight: ``[*C]``.
        log_density: ``[*C]`` log joint density at fixed parameters, energies unnormalised.
        log_z: ``[B]`` (a scalar) log ∫ exp(log joint) over the latents.
        variance: of ``log_z``, see :class:`~numpyro_ebipla.smc.anneal.Annealed`.
        rest: log density of what depends on no latent, beside ``log_z``: observed sites outside the data plate.
        ess: smallest effective sample size on the way, as a fraction of N.
        num_temps: number of temperatures.
        temps: ``[max_temps]`` these, filled up with ones.
        stage_ess: as :attr:`.Annealed.stage_ess`, ``[B]`` or a scalar.
    """

    local: Latents
    glob: Latents
    log_weight: Array
    log_density: Array
    log_z: Array
    variance: Array
    rest: Array
    ess: Array
    num_temps: Array
    temps: Array
    stage_ess: Array


class PosteriorDensity(NamedTuple):
    """The posterior as a base (the prior, with energy priors' bases) tilted by an energy, over flat chains.

    Attributes:
        tilted: over ``[N, B, D]``, or ``[N, D]`` if there are global latents.
        log_joint: flat chains ``-> (log joint density [*C], rest)``, energies unnormalised.
        split: flat chains ``-> (local, global)`` latents.
        flat: the inverse of ``split``.
    """

    tilted: TiltedDensity
    log_joint: Callable[[Array], tuple[Array, Array]]
    split: Callable[[Array], tuple[Latents, Latents]]
    flat: Callable[[Latents, Latents], Array]


def posterior_density(model: LatentModel, params: Params, batch: Batch) -> PosteriorDensity:
    """The posterior of a minibatch along ``log p_0(x) + t (log p(x, y) − log p_0(x))``.

    Data are independent unless there are global latents; then all data must be in the batch.
    """
    draw = lambda key: model.draw_latents(params, batch._replace(rng_key=key))
    local, glob = jax.eval_shape(draw, batch.rng_key)
    joined = bool(model.global_sites)

    def split(x: Array) -> tuple[Latents, Latents]:
        out: list[Latents] = [{}, {}]
        at = 0
        for which, sites in enumerate((local, glob)):
            for name, site in sites.items():
                shape = site.shape if joined or which else site.shape[1:]
                size = math.prod(shape)
                out[which][name] = x[..., at : at + size].reshape((*x.shape[:-1], *shape))
                at += size
        return out[0], out[1]

    def flat(local: Latents, glob: Latents) -> Array:
        lead = 1 if joined else 2
        parts = [v.reshape((*v.shape[:lead], -1)) for v in (*local.values(), *glob.values())]
        return jnp.concatenate(parts, -1)

    def log_base(x: Array) -> Array:
        per_datum, rest = model.log_base(params, *split(x), batch)
        return per_datum.sum(-1) + rest if joined else per_datum

    def log_joint(x: Array) -> tuple[Array, Array]:
        per_datum, rest = model.log_joint(params, *split(x), batch, {})[:2]
        return (per_datum.sum(-1) + rest, jnp.zeros(())) if joined else (per_datum, rest[0])

    def sample_base(key: Array, num: int) -> Array:
        return flat(*jax.vmap(draw)(jax.random.split(key, num)))

    tilted = TiltedDensity(log_base, lambda x: log_base(x) - log_joint(x)[0], sample_base)
    return PosteriorDensity(tilted, log_joint, split, flat)


def anneal_posterior(
    model: LatentModel,
    params: Params,
    batch: Batch,
    num_particles: int,
    *,
    num_moves: int = 5,
    stage_ess: float = 0.9,
    max_temps: int = 200,
) -> Population:
    """Anneal particles from the prior (the base, for energy priors) to the posterior of a minibatch.

    See :func:`posterior_density` for the path, :func:`~numpyro_ebipla.smc.anneal.anneal` for the options.
    """
    density = posterior_density(model, params, batch)
    out = anneal(
        batch.rng_key,
        density.tilted,
        num_particles,
        num_moves=num_moves,
        stage_ess=stage_ess,
        max_temps=max_temps,
        rate=0.2,
    )
    log_density, rest = density.log_joint(out.position)
    latents = density.split(out.position)
    how = (out.ess, out.num_temps, out.temps, out.stage_ess)
    return Population(*latents, out.log_weight, log_density, out.log_z, out.variance, rest, *how)


def equal_draws(rng_key: Array, population: Population, num_draws: int) -> tuple[Latents, Latents]:
    """``num_draws`` equally weighted ``(local, global)`` latents of a population, for each datum of its own."""
    log_weight = population.log_weight
    if log_weight.ndim == 1:
        ancestors = systematic_ancestors(rng_key, log_weight, num_draws)
        return jax.tree.map(lambda x: x[ancestors], (population.local, population.glob))
    keys = jax.random.split(rng_key, log_weight.shape[1])
    draw = lambda key, log_weight: systematic_ancestors(key, log_weight, num_draws)
    ancestors = jax.vmap(draw, (0, 1), 1)(keys, log_weight)
    columns = jnp.arange(log_weight.shape[1])
    return jax.tree.map(lambda x: x[ancestors, columns], population.local), {}
