"""Posterior means by few moves of few chains, where a population annealed to each posterior would cost too much."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax, random

from numpyro_ebipla._core.errors import warn
from numpyro_ebipla._core.state import Latents, Params
from numpyro_ebipla._core.static import is_traced
from numpyro_ebipla.kernels.base import dtype_of
from numpyro_ebipla.kernels.mala import MALA
from numpyro_ebipla.model.blocks import Batch
from numpyro_ebipla.model.guide import draw_guide
from numpyro_ebipla.model.latent_model import LatentModel
from numpyro_ebipla.particles.block import Adaptations, Block, Terms
from numpyro_ebipla.particles.moves import Points, evaluate_at, move_points, points_of, refresh

#: Chains of each datum, and draws from the prior whose best they begin at.
CHAINS, CANDIDATES = 2, 32
#: Moves before the first look, in which the kernel adapts; between two looks; looks. With the first gradient this is
#: just below 200 evaluations of a datum.
BURN_IN, THINNING, LOOKS = 50, 2, 24
#: Rise of the mean log density, over one and the root of the number of coordinates, from the first half of the looks to
#: the second that says that the chains have not arrived. In the posterior that is about four standard deviations.
RISE = 3.0


def chain_means(
    model: LatentModel,
    sites: Sequence[str],
    guide: Callable | None,
    params: Params,
    guide_params: Params,
    batch: Batch,
) -> tuple[dict[str, Array], Array]:
    """Return means over chains and looks of the means at observed sites, for a model without global latents.

    Also which data's chains had not arrived, ``[B]``. All is NaN if a log density is not finite in the end.

    Args:
        model: the model.
        sites: observed ones.
        guide: at whose draws the chains begin, or None for the best of some draws from the prior.
        params: constrained.
        guide_params: of the guide.
        batch: the data.
    """
    key_start, key_model, key_moves = random.split(batch.rng_key, 3)
    batch, kernel = batch._replace(rng_key=key_model), MALA()

    def log_joint(latents: Latents) -> Terms:
        joint = model.log_joint(params, latents.local, latents.shared, batch, {})
        return Terms(joint.per_datum, joint.rest)

    def draw(key: Array) -> Latents:
        at = batch._replace(rng_key=key)
        if guide is None:
            return Latents(*model.draw_latents(params, at))
        return Latents(*model.unconstrain(params, draw_guide(model, guide, guide_params, at), at))

    begun = jax.vmap(draw)(random.split(key_start, CANDIDATES if guide is None else CHAINS))
    begun = _best(begun, log_joint(begun).per_datum) if guide is None else begun
    adapt = Adaptations(kernel.init(begun.local, 2), kernel.init({}, 1))
    info = {"accept_local": jnp.zeros((), dtype_of(begun))}

    def move(key: Array, num_warmup: Array, i: Array, now: Any) -> Any:
        points, learned, info = move_points(kernel, 1, random.fold_in(key, i), log_joint, 1.0, now[0], now[1])
        adapt = jax.tree.map(partial(jnp.where, i < num_warmup), learned, now[1])
        return refresh(log_joint, 1.0, points), adapt, info

    def means(points: Points) -> dict[str, Array]:
        found = jax.vmap(lambda local: model.means(params, local, {}, batch, sites))(points.latents.local)
        return jax.tree.map(lambda x: x.mean(0), found)

    def look(carry: Any, x: tuple[Array, Array]) -> Any:
        points, adapt, total = carry
        step = partial(move, x[0], x[1])
        points, adapt, _ = lax.fori_loop(0, x[1] + THINNING, step, (points, adapt, info))
        return (points, adapt, jax.tree.map(jnp.add, total, means(points))), points.local.log_density

    points = points_of(Block(begun), evaluate_at(log_joint, 1.0, begun))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(means, points))
    warmup = jnp.zeros(LOOKS, jnp.int32).at[0].set(BURN_IN)
    (_, _, total), density = lax.scan(look, (points, adapt, zeros), (random.split(key_moves, LOOKS), warmup))
    early, late = density[: LOOKS // 2].mean((0, 1)), density[LOOKS // 2 :].mean((0, 1))
    size = sum(x[0, 0].size for x in jax.tree.leaves(begun))
    nan = jnp.where(jnp.isfinite(late).all(), 0.0, jnp.nan)
    return jax.tree.map(lambda x: x / LOOKS + nan, total), late - early > RISE * (1 + size**0.5)


def warn_of_rising(rising: Array) -> None:
    """Warn of data whose chains had not arrived."""
    if not is_traced(rising) and len(lost := np.flatnonzero(rising)):
        warn(
            f"reconstruct: {BURN_IN + LOOKS * THINNING} moves were too few for {len(lost)} data, the first is "
            f"{lost[0]}: what is said of them may be far off. Pass annealing=Annealing()."
        )


def _best(draws: Latents, log_density: Array) -> Latents:
    """Return, for each datum by itself, the draws of the highest density."""
    log_density = jnp.where(jnp.isnan(log_density), -jnp.inf, log_density)
    _, top = lax.top_k(log_density.T, CHAINS)
    take = lambda x: jnp.take_along_axis(x, top.T.reshape((*top.T.shape, *(1,) * (x.ndim - 2))), 0)
    return jax.tree.map(take, draws)
