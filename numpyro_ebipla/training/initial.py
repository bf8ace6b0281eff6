"""The state before the first step: particles drawn from the prior, walkers, and a check that all is finite."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax, random

from numpyro_ebipla._core.errors import ModelError
from numpyro_ebipla._core.state import Latents, Params, PosteriorState, Sites, TrainState
from numpyro_ebipla._core.tree import chain_select, strong_type
from numpyro_ebipla.likelihood.posterior import anneal_posterior
from numpyro_ebipla.model.blocks import Batch
from numpyro_ebipla.smc.annealing import Annealing
from numpyro_ebipla.training.config import Config

#: Draws from the prior for an initial particle whose log density is not finite, before an error.
REDRAWS = 10
#: Log density of a site from which on particles are drawn again, too, where they can be: single precision tells no two
#: of these apart, and their gradients soon overflow. Where all are so low, as of data millions from the start, it is
#: no fault.
ABSURD = -1e12


class _Attempt(NamedTuple):
    """Particles after some draws.

    Attributes:
        count: of the draws.
        latents: the particles.
        lowest: ``{site: [N, B] or [N]}`` log density, −inf where it is not finite.
    """

    count: Array  # type: ignore[assignment]
    latents: Latents
    lowest: dict[str, Array]


def initial_state(
    config: Config, rng_key: Array, params: Params, mutable: Any, data: Any
) -> tuple[TrainState, dict[str, Array]]:
    """Return the initial state, and at how many chains each site's log density is not finite."""
    model, kernel = config.model, config.particles.kernel
    key_latents, key_walkers, key_run = random.split(rng_key, 3)
    latents, faults = _draw_particles(config, key_latents, params, mutable, data)
    momentum = jax.tree.map(jnp.zeros_like, latents) if kernel.has_momentum else None
    memory = None
    if config.particles.weighted:
        latents, memory = _weighted_particles(config, key_latents, params, mutable, data)
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
        posterior=PosteriorState(
            *latents,
            momentum=momentum,
            adapt_local=kernel.init(latents.local, 2),
            adapt_shared=kernel.init(latents.shared, 1),
            memory=memory,
        ),
        prior={
            name: config.walkers[name].init(random.fold_in(key_walkers, i), density)
            for i, (name, density) in enumerate(densities.items())
        },
    )
    return jax.tree.map(jnp.copy, _strong_type_state(state)), faults  # no buffer twice: the loop donates them


def _draw_particles(
    config: Config, rng_key: Array, params: Params, mutable: Any, data: Any
) -> tuple[Latents, dict[str, Array]]:
    """Draw particles of all data from the prior, batch by batch, and count faults."""
    model = config.model
    key_first, key_rest = random.split(rng_key)

    def draw(key: Array, indices: Array | None, known: Sites | None) -> tuple[Latents, dict[str, Array]]:
        return _draw_batch(config, model.constrain_params(params), Batch(indices, data, key, mutable), known)

    if not model.subsampled:
        return draw(key_first, None, None)
    indices = model.blocks(joint=False)
    shared = draw(key_first, indices[0], None)[0].shared if model.global_sites else None
    keys = random.split(key_rest, len(indices))
    parts, faults = lax.map(lambda a: draw(a[0], a[1], shared), (keys, indices))
    local = jax.tree.map(lambda x: _join(x, model.num_data), parts.local)
    return Latents(local, shared or {}), jax.tree.map(jnp.sum, faults)


def _weighted_particles(config: Config, rng_key: Array, params: Params, mutable: Any, data: Any) -> tuple[Latents, Any]:
    """Anneal particles of all data to the posterior at the initial parameters; also return their memory."""
    model = config.model
    params = model.constrain_params(params)

    def anneal(key: Array, indices: Array | None) -> tuple[Latents, Array, Array, Array]:
        out = anneal_posterior(model, params, Batch(indices, data, key, mutable), config.num_particles, Annealing())
        return Latents(out.local, out.shared), out.annealed.log_weight, out.log_density, out.annealed.variance[None]

    if not model.subsampled:
        latents, log_weight, log_density, variance = anneal(rng_key, None)
    else:
        indices = model.blocks()
        parts = lax.map(lambda a: anneal(*a), (random.split(rng_key, len(indices)), indices))
        latents, log_weight, log_density, variance = jax.tree.map(lambda x: _join(x, model.num_data), parts)
    return latents, config.particles.start(latents, log_weight, log_density, variance)


def _join(x: Array, num_data: int) -> Array:
    """Join ``[K, N, B, …]`` of K blocks to ``[N, M, …]``."""
    return jnp.swapaxes(x, 0, 1).reshape((x.shape[1], -1, *x.shape[3:]))[:, :num_data]


def _draw_batch(config: Config, params: Params, batch: Batch, known: Sites | None) -> tuple[Latents, dict[str, Array]]:
    """Draw particles of a batch, and again a few times where their log density is not finite.

    ``known`` are the shared latents if they are drawn already.
    """
    model, num = config.model, config.num_particles
    key_model, key_draws = random.split(batch.rng_key)

    def draw(key: Array) -> Latents:
        one = lambda k, shared: model.draw_latents(params, batch._replace(rng_key=k), shared)
        local, shared = jax.vmap(one)(random.split(key, num), known or {})
        return Latents(local, known or shared)

    def lowest(latents: Latents) -> dict[str, Array]:
        def one(latents: Latents) -> dict[str, Array]:
            return model.lowest(params, latents.local, latents.shared, batch._replace(rng_key=key_model))

        if not model.latents:
            return jax.tree.map(lambda x: x[None], one(latents))
        return jax.vmap(one)(latents)

    # A shared latent takes all local ones of its particle with it.
    joint = known is None and bool(model.global_sites)

    def worst(values: dict[str, Array]) -> Array:
        rows = [v.reshape(num, -1) for v in values.values()]
        return jnp.stack([v.min(1) for v in rows] if joint else jnp.broadcast_arrays(*rows)).min(0)

    def attempt(s: _Attempt) -> _Attempt:
        new = draw(random.fold_in(key_draws, s.count))
        now, before = lowest(new), worst(s.lowest)
        better = (before < ABSURD) & (worst(now) >= before)
        local = chain_select(better, new.local, s.latents.local)
        shared = chain_select(better, new.shared, s.latents.shared) if joint else s.latents.shared
        choose = lambda a, b: chain_select(better, a, b) if joint or a.ndim == 2 else a
        return _Attempt(s.count + 1, Latents(local, shared), jax.tree.map(choose, now, s.lowest))

    def go_on(s: _Attempt) -> Array:
        return (s.count <= REDRAWS) & jnp.any(worst(s.lowest) < ABSURD)

    def faults(values: dict[str, Array]) -> dict[str, Array]:
        return {name: jnp.sum(value == -jnp.inf) for name, value in values.items()}

    if not model.latents:
        return Latents({}, {}), faults(lowest(Latents({}, {})))
    # Everything counts as faulty before the first attempt, so that the model is compiled but once.
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(draw, key_draws))
    nothing = nothing._replace(shared=known or nothing.shared)
    never = jax.tree.map(lambda x: jnp.full(x.shape, -jnp.inf, x.dtype), jax.eval_shape(lowest, nothing))
    last = lax.while_loop(go_on, attempt, _Attempt(jnp.zeros((), jnp.int32), nothing, never))
    return last.latents, faults(last.lowest)


def _strong_type_state(state: TrainState) -> TrainState:
    """Return the state without weak types; the key is left as it is."""
    key = state.rng_key
    return strong_type(state._replace(rng_key=jnp.zeros(())))._replace(rng_key=key)


def check_faults(faults: dict[str, Array]) -> None:
    """Raise if a log density is not finite at the start.

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
