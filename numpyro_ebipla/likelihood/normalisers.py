"""Log normalisers of a model's energy priors, and what they do to its log density."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax, random

from numpyro_ebipla._core.state import Params
from numpyro_ebipla.model.energy import anneal_prior
from numpyro_ebipla.model.latent_model import Batch, LatentModel
from numpyro_ebipla.smc.normaliser import Estimate, pooled


@partial(jax.jit, static_argnums=(0, 1), static_argnames="per_datum")
def normalisers(
    model: LatentModel, num_populations: int, params: Params, batch: Batch, *, per_datum: bool
) -> dict[str, Estimate]:
    """Log Z of the energy priors with one normaliser, or with one for each datum, annealed as they say.

    Each has its prior's batch shape.
    """
    names = [name for name, site in model.energies.items() if site.per_datum == per_datum]
    priors = model.proper().energy_priors(params, batch)
    result = {}
    for i, name in enumerate(names):
        prior = priors[name]
        # A prior with a normaliser for each datum has that many populations.
        num = prior.num_walkers if prior.batch_shape else 4 * prior.num_walkers

        def one(key: Array, prior: Any = prior, num: int = num) -> tuple[Array, Array]:
            out = anneal_prior(prior, prior.tilted(), key, num)
            return out.log_z.reshape(prior.batch_shape), out.variance.reshape(prior.batch_shape)

        keys = random.split(random.fold_in(batch.rng_key, i), num_populations)
        value, variance = pooled(*lax.map(one, keys))
        result[name] = Estimate(value, jnp.sqrt(variance))
    return result


def log_z_shift(
    model: LatentModel, params: Params, batch: Batch, log_z: dict[str, Estimate]
) -> tuple[Callable, Callable]:
    """How the log density ``([B] per datum, rest)`` moves by log normalisers, in which it is linear; and itself."""
    local, glob = jax.tree.map(lambda x: x[None], model.draw_latents(params, batch))
    zero = {name: jnp.zeros_like(estimate.value) for name, estimate in log_z.items()}

    def joint(log_z: dict[str, Array]) -> tuple[Array, Array]:
        per_datum, rest = model.log_joint(params, local, glob, batch, log_z)[:2]
        return per_datum[0], rest[0]

    return lambda by: jax.jvp(joint, (zero,), (zero | by,))[1], joint
