"""Log normalisers of a model's energy priors, and what they do to its log density."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, random

from numpyro_ebipla._core.state import Params
from numpyro_ebipla.model.blocks import Batch
from numpyro_ebipla.model.latent_model import LatentModel
from numpyro_ebipla.smc.normaliser import Estimate

#: How the log density moves by given changes of log normalisers: ``by -> (per datum [B], rest)``.
Shift = Callable[[dict[str, Array]], tuple[Array, Array]]
#: Populations by which log Z of an energy prior is estimated.
NUM_POPULATIONS = 4


def energies_of(model: LatentModel, per_datum: bool) -> tuple[str, ...]:
    """Return the energy priors with a normaliser for each datum, or those with one for all."""
    return tuple(name for name, site in model.energies.items() if site.per_datum == per_datum)


def normalisers(
    model: LatentModel, names: tuple[str, ...], num_populations: int, params: Params, batch: Batch
) -> dict[str, Estimate]:
    """Estimate log Z of some energy priors, each of its prior's batch shape, by :meth:`.EnergyPrior.log_normalizer`."""
    priors = model.proper().energy_priors(params, batch) if names else {}
    keys = [random.fold_in(batch.rng_key, i) for i in range(len(names))]
    return {name: priors[name].log_normalizer(key, num_populations) for name, key in zip(names, keys, strict=True)}


def shared_normalisers(model: LatentModel, num_populations: int, params: Params, batch: Batch) -> dict[str, Estimate]:
    """Estimate log Z of the energy priors that have one normaliser for all data, by a compiled program."""
    find = model.compiled(normalisers, energies_of(model, per_datum=False), num_populations)
    return find(params, batch)


def log_z_shift(model: LatentModel, params: Params, batch: Batch, log_z: dict[str, Estimate]) -> tuple[Shift, Shift]:
    """Return two functions: how log normalisers move the log density ``([B] per datum, rest)``; and that density.

    Args:
        model: the model.
        params: constrained.
        batch: data to visit.
        log_z: the normalisers, of which the shapes matter.
    """
    local, shared = jax.tree.map(lambda x: x[None], model.draw_latents(params, batch))
    zero = {name: jnp.zeros_like(estimate.value) for name, estimate in log_z.items()}

    def joint(log_z: dict[str, Array]) -> tuple[Array, Array]:
        found = model.log_joint(params, local, shared, batch, log_z)
        return found.per_datum[0], found.rest[0]

    return lambda by: jax.jvp(joint, (zero,), (zero | by,))[1], joint
