"""The state before the first step: particles drawn from the prior, walkers, and a check that all is finite."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax, random

from numpyro_ebipla._core.errors import ModelError
from numpyro_ebipla._core.state import Params, PosteriorState, TrainState
from numpyro_ebipla._core.tree import chain_select, strong_type
from numpyro_ebipla.likelihood.posterior import anneal_posterior
from numpyro_ebipla.model.blocks import Batch
from numpyro_ebipla.smc.annealing import Annealing
from numpyro_ebipla.training.config import Config

#: Draws from the prior for an initial particle whose log density is not finite, before an error.
REDRAWS = 10


def initial_state(
    config: Config, rng_key: Array, params: Params, mutable: Any, data: Any
) -> tuple[TrainState, dict[str, Array]]:
    """Return the initial state, and at how many chains each site's log density is not finite."""
    model, kernel = config.model, config.particles.kernel
    key_latents, key_walkers, key_run = random.split(rng_key, 3)
    (local, glob), faults = _draw_particles(config, key_latents, params, mutable, data)
    momentum = jax.tree.map(jnp.zeros_like, (local, glob)) if kernel.has_momentum else None
    memory = None
    if config.particles.weighted:
        (local, glob), memory = _weighted_particles(config, key_latents, params, mutable, data)
    batch = Batch(model.blocks(joint=False)[0], data, key_walkers, mutable)
    densities = model.tilted(model.constrain_params(params), batch)
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        rng_key=key_run,
        params=params,
        average=params,
        slow_average=params,
        optim_state=config.optim.init(params),
        mutable=mutable,
        posterior=PosteriorState(local, glob, momentum, kernel.init(local, 2), kernel.init(glob, 1), memory),
        prior={
            name: config.walkers[name].init(random.fold_in(key_walkers, i), density)
            for i, (name, density) in enumerate(densities.items())
        },
    )
    return jax.tree.map(jnp.copy, _strong_type_state(state)), faults  # no buffer twice: the loop donates them


def _draw_particles(config: Config, rng_key: Array, params: Params, mutable: Any, data: Any) -> Any:
    """Particles of all data from the prior: ``[N, M, …]`` and ``[N, …]``, batch by batch; and faults."""
    model = config.model
    key_first, key_rest = random.split(rng_key)

    def draw(key: Array, indices: Array | None, known: Any) -> Any:
        return _draw_batch(config, model.constrain_params(params), Batch(indices, data, key, mutable), known)

    if not model.subsampled:
        return draw(key_first, None, None)
    indices = model.blocks(joint=False)
    glob = draw(key_first, indices[0], None)[0][1] if model.global_sites else None
    keys = random.split(key_rest, len(indices))
    (local, _), faults = lax.map(lambda a: draw(a[0], a[1], glob), (keys, indices))
    local = jax.tree.map(lambda x: _together(x, model.num_data), local)
    return (local, glob or {}), jax.tree.map(jnp.sum, faults)


def _weighted_particles(config: Config, rng_key: Array, params: Params, mutable: Any, data: Any) -> Any:
    """Particles of all data annealed to the posterior at the initial parameters, and their memory."""
    model = config.model
    params = model.constrain_params(params)

    def anneal(key: Array, indices: Array | None) -> tuple[Any, ...]:
        out = anneal_posterior(model, params, Batch(indices, data, key, mutable), config.num_particles, Annealing())
        return (out.local, out.glob), out.annealed.log_weight, out.log_density, out.annealed.variance[None]

    if not model.subsampled:
        latents, log_weight, log_density, variance = anneal(rng_key, None)
    else:
        indices = model.blocks()
        out = lax.map(lambda a: anneal(*a), (random.split(rng_key, len(indices)), indices))
        out = jax.tree.map(lambda x: _together(x, model.num_data), out)
        latents, log_weight, log_density, variance = out
    local, glob = latents
    return latents, config.particles.start(local, glob, log_weight, log_density, variance)


def _together(x: Array, num_data: int) -> Array:
    """``[K, N, B, …]`` of K blocks -> ``[N, M, …]``."""
    return jnp.swapaxes(x, 0, 1).reshape((x.shape[1], -1, *x.shape[3:]))[:, :num_data]


def _draw_batch(config: Config, params: Params, batch: Batch, known: Any) -> tuple[tuple[Any, Any], dict[str, Array]]:
    """Particles of a batch, redrawn a few times where their log density is not finite.

    ``known`` are the global latents if they are drawn already.
    """
    model, num = config.model, config.num_particles
    key_model, key_draws = random.split(batch.rng_key)

    def draw(key: Array) -> tuple[Any, Any]:
        one = lambda k, glob: model.draw_latents(params, batch._replace(rng_key=k), glob)
        local, glob = jax.vmap(one)(random.split(key, num), known or {})
        return local, known or glob

    def faults(local: Any, glob: Any) -> dict[str, Array]:
        one = lambda local, glob: model.faults(params, local, glob, batch._replace(rng_key=key_model))
        if not model.latents:
            return jax.tree.map(lambda x: x[None], one({}, {}))
        return jax.vmap(one)(local, glob)

    def attempt(carry: Any) -> Any:
        i, (local, glob), bad = carry
        new_local, new_glob = draw(random.fold_in(key_draws, i))
        if glob and known is None:  # a global latent takes all local ones of its particle with it
            rows = jnp.stack([b.reshape(b.shape[0], -1).any(-1) for b in bad.values()]).any(0)
            local, glob = chain_select(rows, (new_local, new_glob), (local, glob))
        else:
            own = [b if b.ndim == 2 else b[:, None] for b in bad.values()]
            where = jnp.any(jnp.stack(jnp.broadcast_arrays(*own)), 0)
            local = chain_select(where, new_local, local)
        return i + 1, (local, glob), faults(local, glob)

    def go_on(carry: Any) -> Array:
        return (carry[0] <= REDRAWS) & jnp.stack([b.any() for b in carry[2].values()]).any()

    if not model.latents:
        return ({}, {}), jax.tree.map(jnp.sum, faults({}, {}))
    # Everything counts as faulty before the first attempt, so that the model is compiled but once.
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(draw, key_draws))
    nothing = (nothing[0], known or nothing[1])
    bad = jax.tree.map(lambda x: jnp.ones(x.shape, bool), jax.eval_shape(faults, *nothing))
    _, chains, bad = lax.while_loop(go_on, attempt, (jnp.zeros((), jnp.int32), nothing, bad))
    return chains, jax.tree.map(jnp.sum, bad)


def _strong_type_state(state: TrainState) -> TrainState:
    """The state without weak types; the key is left as it is."""
    key = state.rng_key
    return strong_type(state._replace(rng_key=jnp.zeros(())))._replace(rng_key=key)


def check_faults(faults: dict[str, Array]) -> None:
    """Refuse a start at which a log density is not finite.

    Raises:
        ModelError: naming the site.
    """
    for name, count in faults.items():
        if int(count):
            raise ModelError(
                f"the log density at '{name}' is not finite at {int(count)} of the initial particles, after "
                f"{REDRAWS} further draws from the prior: check that the data lie where the model gives them "
                "positive density, and the initial parameters (init_params)."
            )
