"""The marginal likelihood from a fit's own weighted particles."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from numpyro_ebipla._core.state import Latents, Params, PosteriorState
from numpyro_ebipla.model.latent_model import Batch, LatentModel
from numpyro_ebipla.particles.base import Block, evaluated_at, gather
from numpyro_ebipla.particles.weighted import weights_at
from numpyro_ebipla.smc.normaliser import Estimate
from numpyro_ebipla.smc.weights import ess, log_mean_exp


def weighted_log_marginal(
    model: LatentModel, params: Params, posterior: PosteriorState, batch: Batch, log_z: dict[str, Estimate]
) -> Estimate:
    """Log marginal likelihood of all data by weighted particles, moved by their weights to ``params`` (constrained).

    Each population's ``log mean exp`` is corrected for half its variance, by which the log of an unbiased estimate is
    too low: over many data this bias would outgrow the standard error. ``log_z`` are the energy priors' normalisers.
    """
    values = {name: estimate.value for name, estimate in log_z.items()}
    parts = []
    for indices in model.blocks():
        block, _ = gather(posterior, indices)
        parts.append(_log_marginal_block(model, params, block, batch._replace(indices=indices), values))
    value, variance, rest, count = parts[0]
    if model.subsampled:
        value, variance = (jnp.concatenate([p[i] for p in parts])[: model.num_data] for i in range(2))
        count = jax.tree.map(lambda c: c * model.num_data / model.batch_size, count)
    if not model.global_sites:
        value = value.sum() + rest
    errors = [count[name] * log_z[name].std_error for name in log_z]
    return Estimate(value, jnp.sqrt(jnp.sum(variance) + sum(jnp.square(e) for e in errors)))


@partial(jax.jit, static_argnums=0)
def _log_marginal_block(
    model: LatentModel, params: Params, block: Block, batch: Batch, log_z: dict[str, Array]
) -> tuple[Array, Array, Array, dict[str, Array]]:
    """Log marginal likelihoods, their variances, what depends on no latent, derivatives of the whole in ``log_z``."""

    def log_joint(local: Latents, glob: Latents, log_z: Any = log_z) -> tuple[Array, Array]:
        return model.log_joint(params, local, glob, batch, log_z)[:2]

    log_weight = weights_at(block, evaluated_at(log_joint, 1.0, block.local, block.glob))
    variance = block.memory.variance[0] + 1 / ess(log_weight) - 1 / log_weight.shape[0]
    _, rest = log_joint(block.local, block.glob)
    whole = lambda z: sum(jnp.sum(x[0]) for x in log_joint(block.local, block.glob, z))
    return log_mean_exp(log_weight) + variance / 2, variance, rest[0], jax.grad(whole)(log_z)
