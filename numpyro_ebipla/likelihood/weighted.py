"""The marginal likelihood from a fit's own weighted particles."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from numpyro_ebipla._core.state import Latents, Params, PosteriorState
from numpyro_ebipla.model.blocks import Batch
from numpyro_ebipla.model.latent_model import LatentModel
from numpyro_ebipla.particles.block import Block, Terms, gather
from numpyro_ebipla.particles.moves import evaluate_at
from numpyro_ebipla.particles.weighted import weights_at
from numpyro_ebipla.smc.normaliser import Estimate
from numpyro_ebipla.smc.weights import ess, log_mean_exp


def weighted_log_marginal(
    model: LatentModel, params: Params, posterior: PosteriorState, batch: Batch, log_z: dict[str, Estimate]
) -> Estimate:
    """Estimate the log marginal likelihood of all data by weighted particles.

    Their weights move them to ``params``. Each population's ``log mean exp`` is corrected for half its variance, by
    which the log of an unbiased estimate is too low: over many data this bias would outgrow the standard error.

    Args:
        model: the model.
        params: constrained.
        posterior: the particles.
        batch: what the model sees.
        log_z: the energy priors' normalisers.
    """
    values = {name: estimate.value for name, estimate in log_z.items()}
    of_block = model.compiled(_of_block)

    def at(batch: Batch) -> tuple[Array, Array, Array, dict[str, Array]]:
        return of_block(params, gather(posterior, batch.indices)[0], batch, values)

    by_datum = None if model.global_sites else 0
    value, variance, rest, count = model.map_blocks(at, batch, (by_datum, by_datum, None, None))
    if not model.global_sites:
        value = value.sum() + rest
    repeated = model.num_data / model.batch_size if model.subsampled else 1.0
    errors = [repeated * count[name] * log_z[name].std_error for name in log_z]
    return Estimate(value, jnp.sqrt(jnp.sum(variance) + sum(jnp.square(e) for e in errors)))


def _of_block(
    model: LatentModel, params: Params, block: Block, batch: Batch, log_z: dict[str, Array]
) -> tuple[Array, Array, Array, dict[str, Array]]:
    """Return log marginal likelihoods, their variances, what depends on no latent, and slopes of the whole in log Z."""

    def log_joint(latents: Latents, log_z: Any = log_z) -> Terms:
        joint = model.log_joint(params, *latents, batch, log_z)
        return Terms(joint.per_datum, joint.rest)

    log_weight = weights_at(block, evaluate_at(log_joint, 1.0, block.latents))
    variance = block.memory.variance[0] + 1 / ess(log_weight) - 1 / log_weight.shape[0]
    _, rest = log_joint(block.latents)
    whole = lambda z: sum(jnp.sum(x[0]) for x in log_joint(block.latents, z))
    return log_mean_exp(log_weight) + variance / 2, variance, rest[0], jax.grad(whole)(log_z)
