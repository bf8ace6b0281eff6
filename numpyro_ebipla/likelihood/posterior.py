"""Populations annealed from the prior to each posterior, which give draws of it and the marginal likelihood."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, random

from numpyro_ebipla._core.errors import ModelError, warn
from numpyro_ebipla._core.state import Params, Sites
from numpyro_ebipla._core.static import is_traced
from numpyro_ebipla.model.blocks import Batch
from numpyro_ebipla.model.latent_model import LatentModel
from numpyro_ebipla.smc import anneal as smc
from numpyro_ebipla.smc.annealing import Annealing
from numpyro_ebipla.smc.density import TiltedDensity
from numpyro_ebipla.smc.weights import resample_to


@dataclass(frozen=True)
class Populations:
    """How many populations are annealed to each posterior, of what size, and how."""

    num_particles: int = 128
    num_populations: int = 4
    annealing: Annealing = Annealing()

    @property
    def total(self) -> int:
        """Particles of all populations together."""
        return self.num_particles * self.num_populations


class PosteriorPopulation(NamedTuple):
    """Weighted draws of the posterior; ``C`` is ``(N, B)``, or ``(N,)`` if there are global latents.

    Attributes:
        local: ``{site: [N, B, *event]}`` unconstrained.
        shared: ``{site: [N, *event]}``.
        log_density: ``[*C]`` log joint density at fixed parameters, energies unnormalised.
        rest: log density of what depends on no latent, beside ``annealed.log_z``: observed sites outside the data
            plate.
        annealed: weights, ``log_z`` (``[B]``, a scalar): log ∫ exp(log joint) over the latents, and how it went.
    """

    local: Sites
    shared: Sites
    log_density: Array
    rest: Array
    annealed: smc.Population


class PosteriorDensity(NamedTuple):
    """The posterior as a base (the prior, with energy priors' bases) tilted by an energy, over flat chains.

    Attributes:
        tilted: over ``[N, B, D]``, or ``[N, D]`` if there are global latents.
        log_joint: flat chains ``-> (log joint density [*C], rest)``, energies unnormalised.
        split: flat chains ``-> (local, global)`` latents.
        flat: the inverse of ``split``.
        size: ``D``, the number of coordinates of a chain.
    """

    tilted: TiltedDensity
    log_joint: Callable[[Array], tuple[Array, Array]]
    split: Callable[[Array], tuple[Sites, Sites]]
    flat: Callable[[Sites, Sites], Array]
    size: int


def posterior_density(model: LatentModel, params: Params, batch: Batch) -> PosteriorDensity:
    """Return the posterior of a minibatch along ``log p_0(x) + t (log p(x, y) − log p_0(x))``.

    Data are independent unless there are global latents; then all data must be in the batch.
    """
    draw = lambda key: model.draw_latents(params, batch._replace(rng_key=key))
    local, shared = jax.eval_shape(draw, batch.rng_key)
    joined = bool(model.global_sites)

    def split(x: Array) -> tuple[Sites, Sites]:
        out: list[Sites] = [{}, {}]
        at = 0
        for which, sites in enumerate((local, shared)):
            for name, site in sites.items():
                shape = site.shape if joined or which else site.shape[1:]
                size = math.prod(shape)
                out[which][name] = x[..., at : at + size].reshape((*x.shape[:-1], *shape))
                at += size
        return out[0], out[1]

    def flat(local: Sites, shared: Sites) -> Array:
        lead = 1 if joined else 2
        parts = [v.reshape((*v.shape[:lead], -1)) for v in (*local.values(), *shared.values())]
        return jnp.concatenate(parts, -1)

    def log_base(x: Array) -> Array:
        per_datum, rest = model.log_base(params, *split(x), batch)
        return per_datum.sum(-1) + rest if joined else per_datum

    def log_joint(x: Array) -> tuple[Array, Array]:
        joint = model.log_joint(params, *split(x), batch, {})
        if joined:
            return joint.per_datum.sum(-1) + joint.rest, jnp.zeros(())
        return joint.per_datum, joint.rest[0]

    def sample_base(key: Array, num: int) -> Array:
        return flat(*jax.vmap(draw)(random.split(key, num)))

    tilted = TiltedDensity(log_base, lambda x: log_base(x) - log_joint(x)[0], sample_base)
    sizes = [math.prod(v.shape[1 - joined :]) for v in local.values()] + [v.size for v in shared.values()]
    return PosteriorDensity(tilted, log_joint, split, flat, sum(sizes))


def anneal_posterior(
    model: LatentModel, params: Params, batch: Batch, num_particles: int, annealing: Annealing
) -> PosteriorPopulation:
    """Anneal particles from the prior (the base, for energy priors) to the posterior of a minibatch.

    See :func:`posterior_density` for the path.
    """
    density = posterior_density(model, params, batch)
    out = smc.anneal(batch.rng_key, density.tilted, num_particles, annealing)
    return PosteriorPopulation(*density.split(out.position), *density.log_joint(out.position), out)


def draw_posterior(rng_key: Array, population: PosteriorPopulation, num_draws: int) -> tuple[Sites, Sites]:
    """Return ``num_draws`` equally weighted ``(local, global)`` latents, for each datum of its own."""
    latents = (population.local, population.shared)
    return resample_to(rng_key, num_draws, population.annealed.log_weight, latents)[1]


def warn_of_short_ladders(what: str, short: Any, annealing: Annealing, so: str) -> None:
    """Warn of the data, if any, that the temperatures did not reach: ``short`` is ``[M]``, or one for all."""
    if is_traced(short):
        return
    lost = np.flatnonzero(short)
    if len(lost):
        which = f"{len(lost)} data, the first is {lost[0]}" if np.ndim(short) else "all data together"
        warn(
            f"{what}: {annealing.max_temps} temperatures were too few for {which}, far from where the model expects "
            f"data; {so}. Raise max_temps of annealing=Annealing(…)."
        )


def check_finite(what: str, value: Array) -> None:
    """Raise if an estimate is not finite.

    Raises:
        ModelError: naming the first datum.
    """
    bad = np.flatnonzero(~np.isfinite(np.atleast_1d(value)))
    if len(bad):
        which = f"datum {bad[0]}" if np.ndim(value) else "the data"
        raise ModelError(
            f"{what}: the log density of {which} is not finite at these params (of {len(bad)} data in all): they are "
            "too large for the arithmetic, or lie where the model gives them no density."
        )
