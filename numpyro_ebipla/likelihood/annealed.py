"""Log likelihoods by populations annealed from the prior to each posterior."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax, random

from numpyro_ebipla._core.errors import ModelError
from numpyro_ebipla._core.state import Params
from numpyro_ebipla.likelihood.importance import LEAST_ESS, MAX_DIM, MOST_APART, by_importance
from numpyro_ebipla.likelihood.normal_start import MAX_DENSE, anneal_coupled
from numpyro_ebipla.likelihood.normalisers import Shift, energies_of, log_z_shift, normalisers, shared_normalisers
from numpyro_ebipla.likelihood.posterior import Populations, PosteriorDensity, posterior_density
from numpyro_ebipla.model.blocks import Batch
from numpyro_ebipla.model.latent_model import LatentModel
from numpyro_ebipla.smc.anneal import Population, anneal
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


def is_joint(model: LatentModel) -> bool:
    """Return whether only the density of all data together is to be had."""
    return bool(model.global_sites) or model.plate is None


def log_likelihood(model: LatentModel, params: Params, batch: Batch, populations: Populations) -> LogLikelihood:
    """Estimate ``log p(y)`` of all data at constrained ``params``, whichever of them ``batch`` visits."""
    key_z, key_blocks = random.split(batch.rng_key)
    batch = batch._replace(indices=model.blocks()[0])
    check_proper(model, params, batch)
    log_z = shared_normalisers(model, populations.num_populations, params, batch._replace(rng_key=key_z))
    of_block = model.compiled(_of_block, populations)
    axes = None if is_joint(model) else LogLikelihood._make((0, 0, 0, 0, None))
    found = model.map_blocks(lambda here: of_block(params, here, log_z), batch._replace(rng_key=key_blocks), axes)
    return jax.tree.map(jnp.asarray, found)


def _of_block(
    model: LatentModel, populations: Populations, params: Params, batch: Batch, log_z: dict[str, Estimate]
) -> LogLikelihood:
    """Estimate ``log p(y)`` of the data of one block."""
    proper = model.proper()
    key_z, key_model, key_anneal = random.split(batch.rng_key, 3)
    at, own = batch._replace(rng_key=key_z), energies_of(model, per_datum=True)
    own_z = normalisers(model, own, populations.num_populations, params, at)
    shift, joint = log_z_shift(proper, params, batch._replace(rng_key=key_model), log_z | own_z)
    by_datum, rest = shift({name: estimate.value for name, estimate in (log_z | own_z).items()})
    if model.latents:
        value, variance, own_rest = _annealed(proper, populations, params, batch._replace(rng_key=key_anneal))
    else:
        value, own_rest = joint({})
        variance = jnp.zeros_like(value)
    if is_joint(model):
        whole = value if model.latents else value.sum() + own_rest
        value, rest = whole + by_datum.sum() + rest, jnp.zeros(())
        variance = jnp.sum(variance)
    else:
        value, rest = value + by_datum, own_rest + rest
    shared = jnp.broadcast_to(_variance_by(shift, log_z, is_joint(model), common=True), value.shape)
    error = jnp.sqrt(variance + _variance_by(shift, own_z, is_joint(model), common=False) + shared)
    return LogLikelihood(value, error, 1 / (variance + 1 / populations.total), jnp.sqrt(shared), rest)


def _annealed(model: LatentModel, populations: Populations, params: Params, batch: Batch) -> tuple[Array, Array, Array]:
    """Estimate the log density without normalisers: value, its variance, and what depends on no latent."""
    key_anneal, key_draw = random.split(batch.rng_key)
    density = posterior_density(model, params, batch)
    if model.global_sites and density.size <= MAX_DENSE:
        out = anneal_coupled(
            key_anneal, density, populations.num_particles, populations.num_populations, populations.annealing
        )
        rest = jnp.zeros(())  # all is in one number
    else:
        run = lambda key: anneal(key, density.tilted, populations.num_particles, populations.annealing)
        out = lax.map(run, random.split(key_anneal, populations.num_populations))
        rest = density.log_joint(out.position[0])[1]
    value, variance = pooled(out.log_z, out.variance)
    rounding = jnp.square(jnp.finfo(value.dtype).eps * value)  # of the sums that cancel in the weights
    variance = jnp.where(out.stage_ess.min(0) < TOO_SHORT, jnp.inf, variance + rounding)
    if not model.global_sites and density.size <= MAX_DIM:
        value, variance = _refined(key_draw, density, out, value, variance, populations.num_particles)
    return value, variance, rest


def _refined(
    rng_key: Array, density: PosteriorDensity, out: Population, value: Array, variance: Array, num_at_once: int
) -> tuple[Array, Array]:
    """Return the better of two estimates of each datum: the populations', or one by draws from a law fitted to them."""
    position, log_weight = (x.reshape(-1, *x.shape[2:]) for x in (out.position, out.log_weight))
    near, share = by_importance(rng_key, lambda x: density.log_joint(x)[0], position, log_weight, num_at_once)
    own = jnp.square(near.std_error) + jnp.square(jnp.finfo(value.dtype).eps * near.value)
    agree = jnp.square(near.value - value) <= MOST_APART**2 * (own + variance)
    better = jnp.isfinite(near.value) & (share > LEAST_ESS) & (own < variance) & agree & jnp.isfinite(variance)
    return jnp.where(better, near.value, value), jnp.where(better, own, variance)


def _variance_by(shift: Shift, log_z: dict[str, Estimate], joined: bool, common: bool) -> Array:
    """Return the variance of the log density that comes with that of log normalisers, by datum or in all.

    Args:
        shift: see :func:`.log_z_shift`.
        log_z: the normalisers.
        joined: whether it is wanted of all data together.
        common: whether all data share each normaliser; otherwise they have independent errors.
    """
    total = jnp.zeros(())
    for name, estimate in log_z.items():
        by_datum, rest = shift({name: estimate.std_error})
        if not joined:
            total += jnp.square(by_datum)
        elif common:
            total += jnp.square(jnp.sum(by_datum) + rest)
        else:
            total += jnp.sum(jnp.square(by_datum))
    return total


def check_proper(model: LatentModel, params: Params, batch: Batch, scaled: bool = False) -> None:
    """Raise for latents without a proper prior, and scaled sites (unless ``scaled``): they have no log likelihood.

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
                    f"the site '{name}' is scaled (numpyro.handlers.scale): a power of its density is not a "
                    "likelihood; take the scale off."
                )

    jax.eval_shape(look, batch)


def _can_sample(fn: Any, rng_key: Array) -> bool:
    try:
        jax.eval_shape(fn.sample, rng_key)
    except NotImplementedError:
        return False
    return True
