"""Particles that begin where they are told to: at given values, or at draws of a guide."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, random

from numpyro_ebipla._core.errors import ModelError
from numpyro_ebipla._core.state import Latents, Params, TrainState
from numpyro_ebipla._core.static import is_array, is_traced
from numpyro_ebipla.model.blocks import BY_BLOCK, Batch
from numpyro_ebipla.model.guide import draw_guide
from numpyro_ebipla.model.latent_model import LatentModel
from numpyro_ebipla.model.values import lay_out_values
from numpyro_ebipla.particles.restarted import ShortRunParticles
from numpyro_ebipla.training.config import Config


class Start(NamedTuple):
    """Where particles begin; latents that are in neither are drawn from the prior.

    Attributes:
        values: ``{site: [N, …]}`` constrained, of all data.
        guide: a NumPyro guide, or None.
        guide_params: its parameters, constrained.
    """

    values: dict[str, Array]
    guide: Callable | None
    guide_params: Params


def start_at(config: Config, start: Start, state: TrainState, batch: Batch) -> TrainState:
    """Return a first state with its particles moved to where they are to begin.

    Args:
        config: of the run.
        start: where.
        state: from :func:`.initial_state`.
        batch: what all blocks of data see.

    Raises:
        ModelError: naming the site, for values of other shapes, outside a support, or where the log density is not
            finite; for particles that begin elsewhere in any case.
    """
    model, what = config.model, "init_particles" if start.guide is None else "guide"
    if config.particles.weighted or isinstance(config.particles, ShortRunParticles):
        how = "anneals" if config.particles.weighted else "restarts"
        raise ModelError(
            f"{what}: posterior={type(config.particles).__name__}() {how} its particles from the prior, wherever they "
            "begin: use posterior=Particles()."
        )
    values = _checked(config, start.values, state.params, batch)
    begin = model.compiled(_begin_block, start.guide, config.num_particles, tuple(values))
    params = model.constrain_params(state.params)
    of_data: Any = None if model.global_sites else 1  # then there is one block
    whole: Any = None
    (found, faults) = model.map_blocks(
        lambda here: begin(params, start.guide_params, values, here), batch, (Latents(of_data, whole), BY_BLOCK)
    )
    for name, count in faults.items():
        if not is_traced(count) and (number := int(np.sum(count))):
            raise ModelError(
                f"{what}: at {number} of the particles '{name}' has values outside its support, or a log density that "
                "is not finite."
            )
    old = state.posterior
    cast = lambda new, like: jnp.asarray(new, like.dtype)
    local, shared = jax.tree.map(cast, found.local, old.local), jax.tree.map(cast, found.shared, old.shared)
    return state._replace(posterior=old._replace(local=local, shared=shared))


def _checked(config: Config, values: dict[str, Any], params: Params, batch: Batch) -> dict[str, Array]:
    """Return given values as arrays.

    Raises:
        TypeError, ModelError: naming the site.
    """
    model, num = config.model, config.num_particles
    for name, value in values.items():
        if name not in model.latents:
            raise ModelError(f"init_particles: there is no latent site '{name}'; there are {list(model.latents)}.")
        if not is_array(value):
            raise TypeError(f"init_particles: the value of '{name}' must be an array, got {value!r}.")
    for name, site in lay_out_values(model, tuple(values), params, batch).items() if values else ():
        shape = list(site.shape)
        if site.axis is not None:
            shape[site.axis] = model.num_data
        if np.shape(values[name]) != (num, *shape):
            raise ModelError(
                f"init_particles: '{name}' has shape {np.shape(values[name])}, but {num} particles of it "
                f"{(num, *shape)}: one of each particle, of all data (num_particles=… says how many particles)."
            )
    return {name: jnp.asarray(value) for name, value in values.items()}


def _begin_block(
    model: LatentModel,
    guide: Callable | None,
    num: int,
    sites: tuple[str, ...],
    params: Params,
    guide_params: Params,
    values: dict[str, Array],
    batch: Batch,
) -> tuple[Latents, dict[str, Array]]:
    """Return the particles of one block, and at how many a site is not finite."""
    if batch.indices is not None:
        local = {name: jnp.take(values[name], batch.indices, model.latents[name].value_axis) for name in sites}
        values = {name: local[name] if model.latents[name].local else values[name] for name in sites}

    def one(key: Array, given: dict[str, Array]) -> tuple[Latents, dict[str, Array]]:
        at = batch._replace(rng_key=key)
        draws = {} if guide is None else draw_guide(model, guide, guide_params, at)
        found = Latents(*model.unconstrain(params, draws | given, at))
        bad = {name: ~jnp.isfinite(x) for part in found for name, x in part.items()}
        lowest = model.lowest(params, found.local, found.shared, at)
        return found, {name: value == -jnp.inf for name, value in lowest.items()} | bad

    found, faults = jax.vmap(one)(random.split(batch.rng_key, num), values)
    return found, jax.tree.map(jnp.sum, faults)
