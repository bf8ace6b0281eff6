"""Log likelihoods by populations annealed from the prior to each posterior."""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax, random

from numpyro_ebipla._core.errors import ModelError
from numpyro_ebipla._core.state import Params
from numpyro_ebipla.likelihood.normalisers import log_z_shift, normalisers
from numpyro_ebipla.likelihood.posterior import anneal_posterior
from numpyro_ebipla.model.latent_model import Batch, LatentModel
from numpyro_ebipla.smc.normaliser import Estimate, pooled

#: Share of a population left by one reweighting below which its weights say nothing.
TOO_SHORT = 0.1


class LogLikelihood(NamedTuple):
    """Estimates of ``log p(y)`` in nats, by datum ``[M]``; or of all data together, as scalars.

    The latter if there are global latents, which couple all data, or no data plate.

    Attributes:
        value: ``log p(y)``.
        std_error: of ``value``, the error of log Z included; infinite where the ladder of temperatures was too short
            for a datum far out, so that nothing is known of it.
        ess: effective sample size: of how many independent weighted draws of the prior this is the precision.
        log_z_error: the part of ``std_error`` that all data share, from log Z of energy priors; zero without.
        rest: scalar, the log density of observed sites and factors outside the data plate, which belong to no
            datum and are not in ``value``; zero where ``value`` is of all data.
    """

    value: Array
    std_error: Array
    ess: Array
    log_z_error: Array
    rest: Array

    @property
    def total(self) -> Estimate:
        """Log density of all data, ``rest`` included, and its standard error."""
        own = jnp.square(self.std_error) - jnp.square(self.log_z_error)
        return Estimate(jnp.sum(self.value) + self.rest, jnp.sqrt(jnp.sum(own) + jnp.square(jnp.sum(self.log_z_error))))


@dataclass(frozen=True)
class AnnealOptions:
    """How populations are annealed to the posterior; see :func:`~numpyro_ebipla.smc.anneal.anneal`."""

    num_particles: int = 128
    num_populations: int = 4
    num_moves: int = 5
    stage_ess: float = 0.9
    max_temps: int = 200

    def anneal(self) -> dict[str, Any]:
        """Keyword arguments of :func:`~numpyro_ebipla.likelihood.posterior.anneal_posterior`."""
        return {"num_moves": self.num_moves, "stage_ess": self.stage_ess, "max_temps": self.max_temps}


def is_joint(model: LatentModel) -> bool:
    """Whether only the density of all data together is to be had."""
    return bool(model.global_sites) or model.plate is None


def log_likelihood(model: LatentModel, params: Params, batch: Batch, options: AnnealOptions) -> LogLikelihood:
    """``log p(y)`` at constrained ``params``; see :class:`LogLikelihood`. Of all data, whichever ``batch`` visits."""
    key_z, key_blocks = random.split(batch.rng_key)
    whole = model.blocks()
    batch = batch._replace(indices=whole[0])
    check_proper(model, params, batch)
    log_z = normalisers(model, options.num_populations, params, batch._replace(rng_key=key_z), per_datum=False)
    parts = []
    for i, indices in enumerate(whole):
        here = batch._replace(indices=indices, rng_key=random.fold_in(key_blocks, i))
        parts.append(_of_block(model, options, params, here, log_z))
    if len(parts) == 1:
        return parts[0]
    value, error, number, shared_error = (
        jnp.concatenate(column)[: model.num_data] for column in list(zip(*parts, strict=True))[:4]
    )
    return LogLikelihood(value, error, number, shared_error, parts[0].rest)


@partial(jax.jit, static_argnums=(0, 1))
def _of_block(
    model: LatentModel, options: AnnealOptions, params: Params, batch: Batch, log_z: dict[str, Estimate]
) -> LogLikelihood:
    proper = model.proper()
    key_z, key_model, key_anneal = random.split(batch.rng_key, 3)
    own_z = normalisers(model, options.num_populations, params, batch._replace(rng_key=key_z), per_datum=True)
    shift, joint = log_z_shift(proper, params, batch._replace(rng_key=key_model), log_z | own_z)

    def squared(estimates: dict[str, Estimate]) -> Array:
        """Variance of the log density from that of the log normalisers, by datum or in all."""
        total = jnp.zeros(())
        for name, estimate in estimates.items():
            if is_joint(model):
                by_datum, rest = shift({name: estimate.std_error})
                # Normalisers of different data have independent errors.
                wide = name in own_z
                change = jnp.sum(jnp.square(by_datum)) if wide else jnp.square(jnp.sum(by_datum) + rest)
                total += change
            else:
                total += jnp.square(shift({name: estimate.std_error})[0])
        return total

    by_datum, rest = shift({name: estimate.value for name, estimate in (log_z | own_z).items()})
    num = options.num_particles * options.num_populations
    if not model.latents:
        exact = joint({})
        value, rest = exact[0] + by_datum, exact[1] + rest
        if is_joint(model):
            value, rest = value.sum() + rest, jnp.zeros(())
        variance = jnp.zeros_like(value)
    else:

        def one(key: Array) -> tuple[Array, Array, Array, Array]:
            here = batch._replace(rng_key=key)
            out = anneal_posterior(proper, params, here, options.num_particles, **options.anneal())
            return out.log_z, out.variance, out.rest, out.stage_ess

        log_zs, variances, rests, left = lax.map(one, random.split(key_anneal, options.num_populations))
        value, variance = pooled(log_zs, variances)
        rounding = jnp.square(jnp.finfo(value.dtype).eps * value)  # of the sums that cancel in the weights
        variance = jnp.where(left.min(0) < TOO_SHORT, jnp.inf, variance + rounding)
        if is_joint(model):
            value, rest = value + by_datum.sum() + rest, jnp.zeros(())
        else:
            value, rest = value + by_datum, rests[0] + rest
    shared = jnp.broadcast_to(squared(log_z), value.shape)
    error = jnp.sqrt(variance + squared(own_z) + shared)
    return LogLikelihood(value, error, 1 / (variance + 1 / num), jnp.sqrt(shared), rest)


def check_proper(model: LatentModel, params: Params, batch: Batch, scaled: bool = False) -> None:
    """Refuse latents without a proper prior, and scaled sites (unless ``scaled``): they have no log likelihood.

    Raises:
        ModelError: naming the site.
    """
    model = model.proper()

    def look(batch: Batch) -> None:
        for name, site in model.sites(params, batch).items():
            if name in model.latents and not _can_sample(site["fn"], batch.rng_key):
                raise ModelError(
                    f"the latent '{name}' has no proper prior ({type(site['fn']).__name__} cannot be sampled), so the "
                    "data have no marginal likelihood, and there is nothing to anneal from: give it a proper prior, or "
                    "make it a numpyro.param."
                )
            usual = model.ratio(batch) if model.is_local(site) else 1.0
            scale = usual if site["scale"] is None else site["scale"]
            if not scaled and (isinstance(scale, jax.core.Tracer) or not np.allclose(scale, usual)):
                raise ModelError(
                    f"the site '{name}' is scaled (numpyro.handlers.scale): a power of its density is no likelihood; "
                    "take the scale off."
                )

    jax.eval_shape(look, batch)


def _can_sample(fn: Any, rng_key: Array) -> bool:
    try:
        jax.eval_shape(fn.sample, rng_key)
    except NotImplementedError:
        return False
    return True
