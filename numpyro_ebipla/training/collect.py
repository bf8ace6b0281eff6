"""Draws of the posterior particles with the parameters held."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax, random

from numpyro_ebipla._core.errors import ModelError
from numpyro_ebipla._core.state import Latents, Params, TrainState
from numpyro_ebipla._core.tree import spaced
from numpyro_ebipla._core.validate import as_site_names, check_scalar
from numpyro_ebipla.kernels.base import dtype_of
from numpyro_ebipla.model.blocks import BY_BLOCK, Batch
from numpyro_ebipla.model.latent_model import LatentModel
from numpyro_ebipla.model.values import SiteLayout, lay_out_values, of_minibatches
from numpyro_ebipla.particles.base import AbstractParticles
from numpyro_ebipla.particles.block import Adaptations, Block, gather
from numpyro_ebipla.particles.moves import Points
from numpyro_ebipla.smc.control import fields_of
from numpyro_ebipla.smc.features import choose_fields
from numpyro_ebipla.training.config import Config
from numpyro_ebipla.training.held import Held
from numpyro_ebipla.training.information import (
    by_coordinate,
    num_directions,
    slopes,
)
from numpyro_ebipla.training.newton import log_density_at, newton_of_block

#: Groups of a datum's draws, whose slopes tell the noise, and the draws of each: at least so many, and for each
#: coordinate.
GROUPS, FEWEST_IN_GROUP, DRAWS_PER_COORDINATE = 4, 32, 8


class Plan(NamedTuple):
    """What to collect.

    Attributes:
        num_samples: draws of each particle.
        thinning: moves between draws.
        warmup: moves before the first draw, in which the kernel still adapts.
        sites: latent or deterministic sites.
        indices: ``[M']`` data whose local sites are wanted, None for all.
        max_bytes: of all draws together.
        budget: moves of chains, about, to be spent on the draws of minibatches' data; None for any number.
        left_out: deterministic sites that by default would have been collected, but for ``max_bytes``.
    """

    num_samples: int
    thinning: int
    warmup: int
    sites: tuple[str, ...]
    indices: np.ndarray | None
    max_bytes: int
    budget: int | None = None
    left_out: tuple[str, ...] = ()


class Draws(NamedTuple):
    """What was collected.

    Attributes:
        samples: ``{site: [N, S, …]}``, constrained.
        log_density: ``[N, S]``, or ``[N, S, M']`` where the chains of different data are independent.
        accept: ``{block: [S]}`` mean acceptance over the particles.
        gain: ``[N]`` where global latents couple all data, else None: by how much the log joint density is higher than
            at ``state.slow_average``, averaged over the draws of each particle. In the mean it bounds from above what
            the log likelihood has gained since then.
        score: ``[2, M', L]`` where the chains of different data are independent, else None: slopes of the log density
            of each datum along L directions, see :func:`.go_along`; means of some of the draws, of the first and of
            the second half of the particles. ``-log Z`` of energy priors is in neither this nor ``gain``.
        newton: where there are few parameters or global latents, enough particles or draws of adjusted chains for
            control variates, and no energy priors, else None: the slope of the log likelihood of each of K blocks of
            data along L directions, ``[K, P, L]``, and minus its second derivatives, ``[K, P, L, L]``, estimated from P
            groups of draws; see :func:`.slope_and_curvature`. Where it is known of data, there is no score.
    """

    samples: dict[str, Any]
    log_density: Any
    accept: dict[str, Any]
    gain: Any = None
    score: Any = None
    newton: Any = None


def with_sites(
    plan: Plan, sites: Sequence[str] | None, indices: Any, config: Config, params: Params, batch: Batch
) -> tuple[Plan, dict[str, SiteLayout]]:
    """Return the plan for these sites and data, and how the values are laid out.

    Without ``sites`` these are all latent ones, and the deterministic ones as far as ``max_bytes`` allows; without
    ``indices`` all data, or as many as ``max_bytes`` and the budget allow.

    Raises:
        ModelError: for a name that is neither a latent nor a deterministic site, for a deterministic site of
            minibatches, for indices of no datum, or for draws above ``plan.max_bytes``.
    """
    model, num_particles = config.model, config.num_particles
    known = [*model.latents, *model.deterministic]
    chosen = tuple(model.latents) if sites is None else as_site_names("sites", sites)
    check_scalar("max_bytes", plan.max_bytes, lambda x: x > 0, "a number above 0")
    for name in chosen:
        if name not in known:
            raise ModelError(f"sites: there is no latent or deterministic site '{name}'; there are {known}.")
    plan = plan._replace(sites=chosen, indices=as_indices(model, indices))
    layout = lay_out_values(model, plan.sites, params, batch)
    if trees := [name for name in chosen if name not in layout]:
        raise ModelError(f"sites: the deterministic site '{trees[0]}' is not an array: leave it out.")
    if mixed := [name for name in of_minibatches(model, layout, params, batch) if name in chosen]:
        raise ModelError(
            f"sites: the deterministic site '{mixed[0]}' is of a minibatch, as it depends on the data of a subsampled "
            "plate and has no axis for them: leave it out, or drop the batch size."
        )
    if plan.indices is None and model.independent_data:
        number = _num_affordable(model, plan, num_particles, layout)
        if 0 < number < model.num_data:
            plan = plan._replace(indices=spaced(model.num_data, number))
    _check_memory(model, plan, num_particles, layout)
    if sites is None and model.latents and plan.num_samples:
        return _with_deterministic(plan, layout, config, params, batch)
    return plan, layout


def _with_deterministic(
    plan: Plan, layout: dict[str, SiteLayout], config: Config, params: Params, batch: Batch
) -> tuple[Plan, dict[str, SiteLayout]]:
    """Return the plan with the deterministic sites that there is memory for, beside the data of the latents."""
    model, left_out = config.model, []
    found = lay_out_values(model, model.deterministic, params, batch)
    mixed = of_minibatches(model, found, params, batch)
    for name in (name for name in found if name not in mixed):
        more = {**layout, name: found[name]}
        if _num_bytes(model, plan, config.num_particles, more) > plan.max_bytes:
            left_out.append(name)
        else:
            layout = more
    return plan._replace(sites=tuple(layout), left_out=tuple(left_out)), layout


def as_indices(model: LatentModel, indices: Any) -> np.ndarray | None:
    """Return indices of data as an array, None for all.

    Raises:
        ModelError: for one that is no datum's.
    """
    if indices is None:
        return None
    indices = np.atleast_1d(np.asarray(indices))
    if not np.issubdtype(indices.dtype, np.integer) or np.any((indices < 0) | (indices >= model.num_data)):
        raise ModelError(f"indices must be integers from 0 to {model.num_data - 1}, got {indices}.")
    return indices


def _num_affordable(model: LatentModel, plan: Plan, num_particles: int, layout: dict[str, SiteLayout]) -> int:
    """Return of how many data the draws stay within ``max_bytes`` and the budget."""
    whole, each = _sizes(layout)
    draws, moves = num_particles * plan.num_samples, plan.warmup + plan.num_samples * plan.thinning
    number = model.num_data
    if each * draws * number > plan.max_bytes - whole * draws:
        number = int((plan.max_bytes - whole * draws) // (each * draws))
    if plan.budget is not None and model.subsampled:
        number = min(number, max(model.batch_size, plan.budget // (num_particles * moves)))
    return number


def _sizes(layout: dict[str, SiteLayout]) -> tuple[int, int]:
    """Return the bytes of one particle's values at global sites, and at those of one datum."""
    whole = each = 0
    for shape, dtype, axis in layout.values():
        size = math.prod(shape) * jnp.dtype(dtype).itemsize
        whole, each = (whole + size, each) if axis is None else (whole, each + size // shape[axis])
    return whole, each


def _num_bytes(model: LatentModel, plan: Plan, num_particles: int, layout: dict[str, SiteLayout]) -> int:
    """Return the memory of all draws."""
    wanted = model.num_data if plan.indices is None else len(plan.indices)
    whole, each = _sizes(layout)
    return (whole + each * wanted) * num_particles * plan.num_samples


def _check_memory(model: LatentModel, plan: Plan, num_particles: int, layout: dict[str, SiteLayout]) -> None:
    """Estimate the memory of all draws before any work.

    Raises:
        ModelError: if it exceeds ``plan.max_bytes``.
    """
    total = _num_bytes(model, plan, num_particles, layout)
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
    by_datum = model.independent_data
    chains, scores = (-1, -2) if by_datum else (None, None)
    samples: dict[str, Any] = {name: layout[name].axis for name in plan.sites}
    each: Any = BY_BLOCK
    axes = Draws(samples, chains, accept=each, gain=None, score=scores, newton=each)
    thetas = (params, state.slow_average)

    def of_block(batch: Batch) -> Draws:
        out, kept = run(thetas, *gather(state.posterior, batch.indices), batch)
        return out._replace(newton=_newton(model, thetas, kept, batch)) if kept else out

    found = model.map_blocks(
        of_block,
        Batch(None, data, rng_key, state.mutable),
        axes,
        plan.indices,
        progress=progress,
    )
    accept = {name: np.mean(value, axis=0) for name, value in found.accept.items()}
    newton = found.newton
    if newton is not None and model.subsampled and by_datum:  # blocks stand for all data, the last one is filled up
        visited = np.asarray(model.blocks(plan.indices)).size
        newton = jax.tree.map(lambda x: x * (model.num_data / visited), newton)
    draws = jax.tree.map(np.asarray, found._replace(accept=accept, newton=newton))
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
) -> tuple[Draws, list[Latents]]:
    """Warm the particles of one block up and draw from them.

    ``theta`` are the parameters and the slow average, unconstrained.
    """
    params = model.constrain_params(theta[0])
    key_model, key_weights, key_draws = random.split(batch.rng_key, 3)
    batch = batch._replace(rng_key=key_model)
    chains, held = particles.drop_weights(key_weights, chains), Held(particles, model, params, batch)
    by_datum, log_density = model.independent_data, log_density_at(model, batch)
    accepted = ["accept_local"] * bool(chains.latents.local) + ["accept_global"] * bool(chains.latents.shared)

    def draw(carry: tuple[Points, Adaptations], x: tuple[Array, Array]) -> tuple[Any, Draws]:
        # Warm-up and draws share one loop, so that the model is compiled once.
        key, num_warmup = x
        accept = {name: jnp.zeros((), dtype_of(carry[0].latents)) for name in accepted}
        points, adapt, info = lax.fori_loop(
            0,
            num_warmup + thinning,
            lambda i, now: held.move(random.fold_in(key, i), now[0], now[1], i < num_warmup),
            (*carry, accept),
        )
        at = points.latents
        density: Any = (points.local if by_datum else points.shared).log_density
        gain = None if by_datum else density - log_density(at, theta[1])
        return (points, adapt), Draws(model.values(params, at.local, at.shared, batch, sites), density, info, gain)

    def draws(carry: tuple[Points, Adaptations], x: tuple[Array, Array]) -> tuple[Any, tuple[Draws, Latents]]:
        carry, out = lax.scan(draw, carry, x)
        at = carry[0].latents
        if groups:
            return carry, (out, at)
        if by_datum:
            score = slopes(partial(log_density, at), *theta)
            out = out._replace(score=jnp.stack([half.mean(0) for half in jnp.array_split(score, min(2, len(score)))]))
        return carry, (out, Latents({}, {}))

    groups = _choose_groups(model, particles, chains.latents, num_samples, theta[0])
    parts = groups.parts if groups else _num_parts(num_samples, num_directions(theta[0]))
    keys = random.split(key_draws, num_samples).reshape(parts, -1)
    num_warmup = jnp.zeros(keys.shape, jnp.int32).at[0, 0].set(warmup)
    _, (out, kept) = lax.scan(draws, (held.start(chains, warmup > 0), adapt), (keys, num_warmup))
    out = _by_particle(out)
    if not groups:
        return out, []
    pooled = jax.tree.map(groups.pool, kept)
    return out, [jax.tree.map(lambda x, i=i: x[i], pooled) for i in range(groups.number)]


def _newton(
    model: LatentModel, thetas: tuple[Params, Params], groups: list[Latents], batch: Batch
) -> tuple[np.ndarray, np.ndarray]:
    """Return slopes ``[P, L]`` and curvatures ``[P, L, L]`` from P groups of draws."""
    program = model.compiled(newton_of_block)
    found = [program(thetas, at, batch) for at in groups]
    slope, curvature = (np.stack([np.asarray(x) for x in part]) for part in zip(*found, strict=True))
    return slope, curvature


class Groups(NamedTuple):
    """Draws for :func:`.slope_and_curvature`: ``parts`` of each particle, in a number of groups."""

    parts: int
    number: int

    def pool(self, x: Array) -> Array:
        """Return draws ``[number, n, …]`` from ``[parts, N, …]``; what is over is left out."""
        flat = x.reshape(-1, *x.shape[2:])
        each = len(flat) // self.number
        return flat[: self.number * each].reshape(self.number, each, *x.shape[2:])


def _choose_groups(
    model: LatentModel, particles: AbstractParticles, latents: Latents, num_samples: int, params: Params
) -> Groups | None:
    """Return how draws are pooled for slopes and curvatures; None if there are to be none, or too few draws."""
    if model.energies or not (particles.quiet and particles.kernel.adjusted) or not model.latents:
        return None
    leaves = jax.tree.leaves(latents)
    if latents.shared:  # the particles of one draw, or of a few, at several draws
        parts = _num_parts(num_samples, num_directions(params))
        shapes = [x.shape[1:] for x in leaves]
        for number in (n for n in range(parts, GROUPS - 1, -1) if parts % n == 0):
            if choose_fields(parts // number * len(leaves[0]), shapes, shared=True):
                return Groups(parts, number)
        return Groups(parts, parts) if fields_of(latents.shared, 1) else None
    if not by_coordinate(params):
        return None
    size = sum(math.prod(x.shape[2:]) for x in leaves)
    wanted = GROUPS * max(FEWEST_IN_GROUP, DRAWS_PER_COORDINATE * size)
    enough = [n for n in range(1, num_samples + 1) if num_samples % n == 0 and n * len(leaves[0]) >= wanted]
    if not enough:
        return None
    return Groups(enough[0], enough[0] if fields_of(latents.local, 2) else GROUPS)


def _by_particle(out: Draws) -> Draws:
    """Return draws ``[N, S, …]`` from ``[part, draw, N, …]``, gains and scores averaged over the draws."""
    score = out.score
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), out._replace(score=None))
    samples, density = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), (flat.samples, flat.log_density))
    if score is not None:
        score = score.mean(0)
        score = jnp.broadcast_to(score, (2, *score.shape[1:]))  # of one particle both halves are the same
    gain = None if flat.gain is None else flat.gain.mean(0)
    return Draws(samples, density, flat.accept, gain, score)


def _num_parts(num_samples: int, num_directions: int) -> int:
    """Return at how many draws slopes are taken: a divisor of their number, so that they cost less than moves."""
    most = max(1, num_samples // (2 * max(1, num_directions)))
    return max(n for n in range(1, most + 1) if num_samples % n == 0)
