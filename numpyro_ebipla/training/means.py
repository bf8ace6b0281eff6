"""Posterior means of the particles' values with the parameters held, of which no draw is kept."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax, random

from numpyro_ebipla._core.state import Latents, Params, TrainState
from numpyro_ebipla.kernels.base import dtype_of
from numpyro_ebipla.model.blocks import Batch
from numpyro_ebipla.model.latent_model import LatentModel
from numpyro_ebipla.particles.base import AbstractParticles
from numpyro_ebipla.particles.block import Adaptations, Block, gather
from numpyro_ebipla.training.held import Held


class Moves(NamedTuple):
    """How particles are moved: ``warmup`` times, then ``thinning`` times before each of ``num_samples`` looks."""

    num_samples: int
    thinning: int
    warmup: int


def posterior_means(
    model: LatentModel,
    particles: AbstractParticles,
    moves: Moves,
    axes: dict[str, int | None],
    indices: np.ndarray | None,
    params: Params,
    state: TrainState,
    batch: Batch,
    progress: Callable[[int, int], None],
) -> dict[str, np.ndarray]:
    """Return means over the particles and their moves at some sites, see :meth:`.LatentModel.expected`.

    Args:
        model: the model.
        particles: how they are kept.
        moves: how many.
        axes: ``{site: data axis from the right, or None}``.
        indices: ``[M']`` data, None for all.
        params: constrained.
        state: where the particles stand.
        batch: what all blocks of data see.
        progress: told how many blocks are done.
    """
    run = model.compiled(_means_of_block, particles, moves, tuple(axes))
    found = model.map_blocks(
        lambda here: run(params, *gather(state.posterior, here.indices), here), batch, axes, indices, progress=progress
    )
    return {name: np.asarray(found[name]) for name in axes}


def _means_of_block(
    model: LatentModel,
    particles: AbstractParticles,
    moves: Moves,
    sites: tuple[str, ...],
    params: Params,
    chains: Block,
    adapt: Adaptations,
    batch: Batch,
) -> dict[str, Array]:
    key_model, key_weights, key_moves = random.split(batch.rng_key, 3)
    held = Held(particles, model, params, batch._replace(rng_key=key_model))
    points = held.start(particles.drop_weights(key_weights, chains), moves.warmup > 0)
    dtype = dtype_of(points.latents)
    accept = {"accept_local": points.latents.local, "accept_global": points.latents.shared}
    info = {name: jnp.zeros((), dtype) for name, sites in accept.items() if sites}

    def values(latents: Latents) -> dict[str, Array]:
        found = model.expected(params, latents.local, latents.shared, held.batch, sites)
        return jax.tree.map(lambda x: x.mean(0), found)

    def look(carry: Any, i: Array) -> Any:
        points, adapt, total = carry
        key, num_warmup = random.fold_in(key_moves, i), jnp.where(i == 0, moves.warmup, 0)
        points, adapt, _ = lax.fori_loop(
            0,
            num_warmup + moves.thinning,
            lambda j, now: held.move(random.fold_in(key, j), now[0], now[1], j < num_warmup),
            (points, adapt, info),
        )
        return (points, adapt, jax.tree.map(jnp.add, total, values(points.latents))), None

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(values, points.latents))
    (_, _, total), _ = lax.scan(look, (points, adapt, zeros), jnp.arange(moves.num_samples))
    return jax.tree.map(lambda x: x / moves.num_samples, total)
