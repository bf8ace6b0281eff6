"""Draws of the posterior particles with the parameters held."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax, random
from jax.flatten_util import ravel_pytree

from numpyro_ebipla._core.errors import ModelError
from numpyro_ebipla._core.state import Latents, Params, TrainState
from numpyro_ebipla._core.validate import as_site_names, check_scalar
from numpyro_ebipla.model.blocks import BY_BLOCK, Batch
from numpyro_ebipla.model.inspection import Inspection
from numpyro_ebipla.model.latent_model import LatentModel
from numpyro_ebipla.particles.base import AbstractParticles
from numpyro_ebipla.particles.block import Adaptations, Block, Info, Terms, gather
from numpyro_ebipla.particles.moves import Points, evaluate_at, move_points, points_of, refresh
from numpyro_ebipla.smc.control import control_weights, num_features_of
from numpyro_ebipla.training.safeguards import recall

#: Parameters up to which each is a direction of its own in :func:`slope_and_curvature`.
MAX_COORDINATES = 32


class Plan(NamedTuple):
    """What to collect.

    Attributes:
        num_samples: draws of each particle.
        thinning: moves between draws.
        warmup: moves before the first draw, in which the kernel still adapts.
        sites: latent or deterministic sites.
        indices: ``[M']`` data whose local sites are wanted, None for all.
        max_bytes: of all draws together.
    """

    num_samples: int
    thinning: int
    warmup: int
    sites: tuple[str, ...]
    indices: np.ndarray | None
    max_bytes: int


class Draws(NamedTuple):
    """What was collected.

    Attributes:
        samples: ``{site: [N, S, …]}``, constrained.
        log_density: ``[N, S]``, or ``[N, S, M']`` where the chains of different data are independent.
        accept: ``{block: [S]}`` mean acceptance over the particles.
        gain: ``[N]`` where global latents couple all data, else None: by how much the log joint density is higher than
            at ``state.slow_average``, averaged over the draws of each particle. In the mean it bounds from above what
            the log likelihood has gained since then.
        score: ``[2, M', L]`` where the chains of different data are independent, else None: how the log density of
            each datum changes if one of the L parameter arrays goes on by as much as it has gone since
            ``state.slow_average``; means of some of the draws, of the first and of the second half of the particles.
            ``-log Z`` of energy priors is in neither of the two.
        newton: where global latents couple all data, there are enough adjusted particles for control variates and no
            energy priors, else None: the slope of the log likelihood along L directions, ``[P, L]``, and minus its
            second derivatives, ``[P, L, L]``, estimated at P of the draws; see :func:`.slope_and_curvature`.
    """

    samples: dict[str, Any]
    log_density: Any
    accept: dict[str, Any]
    gain: Any = None
    score: Any = None
    newton: Any = None


class SiteLayout(NamedTuple):
    """Shape and type of one particle's value at a site, and its data axis from the right (None if global)."""

    shape: tuple[int, ...]
    dtype: Any
    axis: int | None


def with_sites(
    plan: Plan, sites: Sequence[str] | None, indices: Any, inspection: Inspection, num_particles: int, data: Any
) -> tuple[Plan, dict[str, SiteLayout]]:
    """Return the plan for these sites (None: all latent ones) and data, and how the values are laid out.

    Raises:
        ModelError: for a name that is neither a latent nor a deterministic site, for indices of no datum, or for
            draws above ``plan.max_bytes``.
    """
    model = inspection.model
    known = [*model.latents, *inspection.deterministic]
    chosen = tuple(model.latents) if sites is None else as_site_names("sites", sites)
    check_scalar("max_bytes", plan.max_bytes, lambda x: x > 0, "a number above 0")
    for name in chosen:
        if name not in known:
            raise ModelError(f"sites: there is no latent or deterministic site '{name}'; there are {known}.")
    if indices is not None:
        indices = np.atleast_1d(np.asarray(indices))
        if not np.issubdtype(indices.dtype, np.integer) or np.any((indices < 0) | (indices >= model.num_data)):
            raise ModelError(f"indices must be integers from 0 to {model.num_data - 1}, got {indices}.")
    plan = plan._replace(sites=chosen, indices=indices)
    layout = _layouts(model, plan.sites, inspection.params, data, inspection.mutable) if plan.sites else {}
    _check_memory(model, plan, num_particles, layout)
    return plan, layout


def _layouts(
    model: LatentModel, sites: Sequence[str], params: Params, data: Any, mutable: dict[str, Any]
) -> dict[str, SiteLayout]:
    """Return how the values at latent and deterministic sites are laid out.

    The data axis of a deterministic site is the one whose length follows that of the minibatch.
    """

    def shapes(width: int) -> dict[str, jax.ShapeDtypeStruct]:
        def values(key: Array) -> dict[str, Array]:
            constrained = model.constrain_params(params)
            indices = jnp.arange(width, dtype=jnp.int32) if model.subsampled else None
            batch = Batch(indices, data, key, mutable)
            local, shared = jax.tree.map(lambda x: x[None], model.draw_latents(constrained, batch))
            return model.values(constrained, local, shared, batch, sites)

        return jax.eval_shape(values, random.key(0))

    here = shapes(model.batch_size)
    ask = model.subsampled and any(name not in model.latents for name in sites)
    wider = shapes(model.batch_size + 1) if ask else here
    result = {}
    for name, value in here.items():
        shape = value.shape[1:]
        grown = [i - len(shape) for i, (a, b) in enumerate(zip(shape, wider[name].shape[1:], strict=True)) if a != b]
        axis = grown[0] if grown else None
        if name in model.latents:
            axis = model.latents[name].value_axis if model.latents[name].local else None
        result[name] = SiteLayout(shape, value.dtype, axis)
    return result


def _check_memory(model: LatentModel, plan: Plan, num_particles: int, layout: dict[str, SiteLayout]) -> None:
    """Estimate the memory of all draws before any work.

    Raises:
        ModelError: if it exceeds ``plan.max_bytes``.
    """
    wanted = model.num_data if plan.indices is None else len(plan.indices)
    total = 0
    for shape, dtype, axis in layout.values():
        size = math.prod(shape) * jnp.dtype(dtype).itemsize
        total += size if axis is None else size // shape[axis] * wanted
    total *= num_particles * plan.num_samples
    if total > plan.max_bytes:
        raise ModelError(
            f"the draws would take {total / 2**30:.1f} GiB, above the limit of {plan.max_bytes / 2**30:.1f} GiB: "
            "lower num_samples or num_particles, name fewer sites=… or data indices=… in run(), or raise "
            "max_bytes."
        )


def collect(
    model: LatentModel,
    particles: AbstractParticles,
    plan: Plan,
    layout: dict[str, SiteLayout],
    params: Params,
    state: TrainState,
    data: Any,
    rng_key: Array,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Draws:
    """Run every particle on at ``params`` (unconstrained) and keep ``plan.num_samples`` draws.

    Local latents of different data are independent given the parameters, so a subsampled model is worked off
    in blocks of B data. A global latent couples all data: then they form one block.
    """
    run = model.compiled(_run_block, particles, plan.num_samples, plan.thinning, plan.warmup, plan.sites)
    by_datum = _by_datum(model)
    chains, scores = (-1, -2) if by_datum else (None, None)
    axes = Draws._make(({name: layout[name].axis for name in plan.sites}, chains, BY_BLOCK, None, scores, None))
    found = model.map_blocks(
        lambda batch: run((params, state.slow_average), *gather(state.posterior, batch.indices), batch),
        Batch(None, data, rng_key, state.mutable),
        axes,
        plan.indices,
        progress=progress,
    )
    accept = {name: np.mean(value, axis=0) for name, value in found.accept.items()}
    draws = jax.tree.map(np.asarray, found._replace(accept=accept))
    return draws._replace(samples={name: draws.samples[name] for name in plan.sites})  # trees sort their keys


def _run_block(
    model: LatentModel,
    particles: AbstractParticles,
    num_samples: int,
    thinning: int,
    warmup: int,
    sites: tuple[str, ...],
    theta: tuple[Params, Params],
    chains: Block,
    adapt: Adaptations,
    batch: Batch,
) -> Draws:
    """Warm the particles of one block up and draw from them.

    ``theta`` are the parameters and the slow average, unconstrained.
    """
    params = model.constrain_params(theta[0])
    key_model, key_warmup, key_draws = random.split(batch.rng_key, 3)
    batch = batch._replace(rng_key=key_model)
    chains = particles.drop_weights(random.fold_in(key_warmup, 1), chains)
    by_datum = _by_datum(model)

    def log_joint(latents: Latents) -> Terms:
        joint = model.log_joint(params, *latents, batch, {})
        return Terms(joint.per_datum, joint.rest)

    def log_density(latents: Latents, theta: Params) -> Array:
        joint = model.log_joint(model.constrain_params(theta), *latents, batch, {})
        return joint.per_datum if by_datum else joint.per_datum.sum(-1) + joint.rest

    def advance(key: Array, points: Points, adapt: Adaptations, num_moves: int) -> tuple[Points, Adaptations, Info]:
        points, adapt, info = move_points(particles.kernel, num_moves, key, log_joint, 1.0, points, adapt)
        return refresh(log_joint, 1.0, points), adapt, info

    def draw(points: Points, key: Array) -> tuple[Points, Draws]:
        points, _, info = advance(key, points, adapt, thinning)
        at = points.latents
        density: Any = (points.local if by_datum else points.shared).log_density
        gain = None if by_datum else density - log_density(at, theta[1])
        return points, Draws(model.values(params, *at, batch, sites), density, info, gain)

    def draws(points: Points, keys: Array) -> tuple[Points, Draws]:
        points, out = lax.scan(draw, points, keys)
        at = points.latents
        if not by_datum:
            if model.energies or not particles.kernel.adjusted or not num_features_of(at.shared, 1):
                return points, out
            return points, out._replace(newton=slope_and_curvature(log_density, at, *theta))
        score = slopes(partial(log_density, at), *theta)
        halves = jnp.stack([half.mean(0) for half in jnp.array_split(score, min(2, len(score)))])
        return points, out._replace(score=halves)

    known = evaluate_at(log_joint, 1.0, chains.latents)
    if warmup and particles.recalls:
        chains, known, _ = recall(chains, known, jnp.ones((), bool))
    points = points_of(chains, known)
    if warmup:
        points, adapt, _ = advance(key_warmup, points, adapt, warmup)
    parts = _score_times(num_samples, len(jax.tree.leaves(params)))
    _, out = lax.scan(draws, points, random.split(key_draws, num_samples).reshape(parts, -1))
    return _by_particle(out)


def _by_particle(out: Draws) -> Draws:
    """Return draws ``[N, S, …]`` from ``[part, draw, N, …]``, gains and scores averaged over the draws."""
    score = out.score
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), out._replace(score=None, newton=None))
    samples, density = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), (flat.samples, flat.log_density))
    if score is not None:
        score = score.mean(0)
        score = jnp.broadcast_to(score, (2, *score.shape[1:]))  # of one particle both halves are the same
    gain = None if flat.gain is None else flat.gain.mean(0)
    return Draws(samples, density, flat.accept, gain, score, out.newton)


def _score_times(num_samples: int, num_arrays: int) -> int:
    """Return at how many draws scores are taken: a divisor of their number, so that they cost less than moves."""
    most = max(1, num_samples // (2 * max(1, num_arrays)))
    return max(n for n in range(1, most + 1) if num_samples % n == 0)


def slopes(f: Callable[[Params], Array], params: Params, before: Params) -> Array:
    """Return derivatives ``[…, L]`` of ``f`` at ``params`` as one by one their L arrays go on from ``before``."""
    leaves, structure = jax.tree.flatten(params)
    ahead = jax.tree.map(jnp.subtract, leaves, jax.tree.leaves(before))

    def along(which: Array) -> Array:
        tangent = [which[i].astype(d.dtype) * d for i, d in enumerate(ahead)]
        return jax.jvp(f, (params,), (jax.tree.unflatten(structure, tangent),))[1]

    return jnp.moveaxis(lax.map(along, jnp.eye(len(leaves))), 0, -1)


def slope_and_curvature(
    log_joint: Callable[[Latents, Params], Array], at: Latents, params: Params, before: Params
) -> tuple[Array, Array]:
    """Estimate slope and curvature of the log likelihood from particles of the posterior at ``params``.

    With control variates (:mod:`numpyro_ebipla.smc.control`) the weighted mean of the particles' scores is the
    slope at parameters nearby, too, as the weights extrapolate to the posterior there; so its derivative is the second
    one of the log likelihood, up to what the regression cannot know.

    Args:
        log_joint: ``(latents, params) -> [N]``.
        at: the particles; global latents among them.
        params: unconstrained.
        before: where directions come from if there are many parameters.

    Returns:
        ``[L]`` and minus the second derivatives ``[L, L]``: along all L coordinates of up to :data:`MAX_COORDINATES`
        parameters, or as one by one L arrays go on from ``before``.
    """
    here, unflatten = ravel_pytree(params)
    leaves, structure = jax.tree.flatten(params)
    few = here.size <= MAX_COORDINATES

    def moved(along: Array) -> Params:
        if few:
            return unflatten(here + along.astype(here.dtype))
        ahead = zip(along, leaves, jax.tree.leaves(before), strict=True)
        return jax.tree.unflatten(structure, [x + a.astype(x.dtype) * (x - b) for a, x, b in ahead])

    def slope(along: Array) -> Array:
        theta = moved(along)
        gradient = jax.grad(lambda shared: log_joint(at._replace(shared=shared), theta).sum())(at.shared)
        weight = control_weights(at.shared, gradient, 1)
        return jax.grad(lambda a: jnp.sum(weight * log_joint(at, moved(a))))(along)

    origin = jnp.zeros(here.size if few else len(leaves))
    return slope(origin), -jax.jacfwd(slope)(origin)


def _by_datum(model: LatentModel) -> bool:
    """Return whether the chains of different data are independent, so that each has a log density of its own."""
    return bool(model.local_sites) and not model.global_sites
