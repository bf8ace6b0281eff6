"""Bidirectional Monte Carlo: how far annealing is off, for data simulated from the model itself.

The latents that a datum was simulated with are one exact draw of its posterior. Annealed importance sampling from the
prior gives an unbiased estimate of ``p(y)``, and so on average too low a logarithm; run backwards from the exact draw
it gives an unbiased estimate of ``1/p(y)``, and too high a one (Grosse, Ghahramani and Adams, 2015; Grosse, Ancha and
Roy, 2016). Temperatures, step sizes and scales of the moves are learned beforehand, the same for both directions.
"""

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax, random

from numpyro_ebipla._core.errors import ModelError
from numpyro_ebipla._core.state import Latents, Params
from numpyro_ebipla._core.tree import batched_value_and_grad, chain_select
from numpyro_ebipla.kernels.metropolis import Shape, metropolis
from numpyro_ebipla.likelihood.annealed import (
    AnnealOptions,
    check_proper,
    is_joint,
    log_z_shift,
    normalisers,
)  # fmt: skip
from numpyro_ebipla.likelihood.posterior import anneal_posterior, posterior_density
from numpyro_ebipla.model.handlers import Observe
from numpyro_ebipla.model.latent_model import Batch, LatentModel
from numpyro_ebipla.smc.anneal import TARGET_ACCEPT, TiltedDensity, population_variance
from numpyro_ebipla.smc.weights import log_mean_exp, resample

#: Of the adaptation of step sizes, in the run that learns them.
RATE = 0.2


class Bounds(NamedTuple):
    """Bounds of ``log p(y)`` in nats that hold on average, for simulated data: ``[M]``, or scalars of all data.

    Attributes:
        lower: by annealing from the prior.
        upper: by annealing back from the latents that the datum was simulated with.
    """

    lower: Array
    upper: Array

    @property
    def gap(self) -> Array:
        """``upper − lower``; its mean over data bounds the mean error of either."""
        return self.upper - self.lower


class Schedule(NamedTuple):
    """A fixed path: ``[L]`` temperatures, ``[L]`` log step sizes, ``[L, *C, D]`` variances that scale the moves."""

    temps: Array
    log_step: Array
    variance: Array


def bidirectional(model: LatentModel, params: Params, batch: Batch, options: AnnealOptions) -> Bounds:
    """Simulate data as many as there are and bound their ``log p(y)``; see :meth:`.EBIPLA.bidirectional`."""
    whole = model.blocks()
    key_z, key_blocks = random.split(batch.rng_key)
    batch = batch._replace(indices=whole[0])
    check_proper(model, params, batch)
    _check_simulated(model, params, batch)
    log_z = normalisers(model, options.num_populations, params, batch._replace(rng_key=key_z), per_datum=False)
    parts = []
    for i, indices in enumerate(whole):
        key_draw, key_temps, key_run = random.split(random.fold_in(key_blocks, i), 3)
        draw = _simulate(model, params, batch._replace(indices=indices, rng_key=key_draw))
        temps, num = _ladder(model, options, params, batch._replace(indices=indices, rng_key=key_temps), draw[1])
        # A few lengths only, as each is compiled for.
        length = -(-int(num) // 32) * 32
        ladder = jnp.interp(jnp.linspace(0, int(num), length + 1)[1:], jnp.arange(int(num) + 1), _from_zero(temps, num))
        here = batch._replace(indices=indices, rng_key=key_run)
        parts.append(_both(model, options, params, here, log_z, draw, ladder))
    if len(parts) == 1:
        return parts[0]
    lower, upper = (jnp.concatenate(column)[: model.num_data] for column in zip(*parts, strict=True))
    return Bounds(lower, upper)


def _from_zero(temps: Array, num: Array) -> Array:
    return jnp.concatenate([jnp.zeros(1), temps[: int(num)]])


def _observing(model: LatentModel, values: dict[str, Array]) -> LatentModel:
    model = model.proper()
    return replace(model, model=Observe(model.model, values))


@partial(jax.jit, static_argnums=0)
def _simulate(model: LatentModel, params: Params, batch: Batch) -> tuple[tuple[Latents, Latents], dict[str, Array]]:
    local, glob, values = model.proper().simulate(params, batch)
    return (local, glob), values


@partial(jax.jit, static_argnums=(0, 1))
def _ladder(
    model: LatentModel, options: AnnealOptions, params: Params, batch: Batch, values: dict[str, Array]
) -> tuple[Array, Array]:
    """Temperatures at which stages cost equally much, and their number."""
    out = anneal_posterior(_observing(model, values), params, batch, options.num_particles, **options.anneal())
    return out.temps, out.num_temps


@partial(jax.jit, static_argnums=(0, 1))
def _both(
    model: LatentModel,
    options: AnnealOptions,
    params: Params,
    batch: Batch,
    log_z: dict[str, Any],
    draw: tuple[tuple[Latents, Latents], dict[str, Array]],
    temps: Array,
) -> Bounds:
    latents, values = draw
    observing = _observing(model, values)
    key_z, key_model, key_pilot, key_base, key_forward, key_back = random.split(batch.rng_key, 6)
    own_z = normalisers(model, options.num_populations, params, batch._replace(rng_key=key_z), per_datum=True)
    log_z = log_z | own_z
    batch = batch._replace(rng_key=key_model)
    shift, _ = log_z_shift(observing, params, batch, log_z)
    by_datum, rest = shift({name: estimate.value for name, estimate in log_z.items()})
    density = posterior_density(observing, params, batch)
    num, moves = options.num_particles, options.num_moves
    schedule = _learned(key_pilot, density.tilted, num, temps, moves)
    base = density.tilted.sample_base(key_base, num)
    true = density.flat(*jax.tree.map(lambda x: jnp.repeat(x[None], num, 0), latents))
    lower = log_mean_exp(_annealed(key_forward, density.tilted, base, schedule, moves))
    upper = -log_mean_exp(_annealed(key_back, density.tilted, true, schedule, moves, back=True))
    by_datum = by_datum.sum() + rest if is_joint(model) else by_datum
    return Bounds(lower + by_datum, upper + by_datum)


def _moved(
    rng_key: Array, density: TiltedDensity, x: Array, t: Array, log_step: Array, variance: Array, num_moves: int
) -> tuple[Array, Array]:
    """``x`` after MALA moves at temperature ``t``, and their mean acceptance."""
    value_and_grad = batched_value_and_grad(lambda x: density.log_base(x) - t * density.energy(x))

    def target(x: Array) -> tuple[Array, Array, None]:
        return *value_and_grad(x), None

    def move(here: Any, key: Array) -> tuple[Any, Array]:
        accept, new, prob = metropolis(key, target, here, jnp.exp(log_step), Shape(variance))
        return chain_select(accept, new[:3], here), prob.mean()

    start: Any = (x, *value_and_grad(x))
    (x, *_), accepted = lax.scan(move, start, random.split(rng_key, num_moves))
    return x, accepted.mean()


def _learned(rng_key: Array, density: TiltedDensity, num: int, temps: Array, num_moves: int) -> Schedule:
    """Step sizes and scales along ``temps``, from a population that is resampled on its way."""
    key_base, key_stages = random.split(rng_key)
    x = density.sample_base(key_base, num)

    def stage(carry: tuple[Array, Array, Array], at: tuple[Array, Array, Array]) -> tuple[Any, Any]:
        (x, log_weight, log_step), (before, t, key) = carry, at
        key_resample, key_move = random.split(key)
        log_weight = log_weight - (t - before) * density.energy(x)
        log_weight = jnp.where(jnp.isfinite(log_weight), log_weight, -jnp.inf)
        log_weight, x, _ = resample(key_resample, log_weight, x, 0.5)
        variance = population_variance(x, log_weight)
        x, accepted = _moved(key_move, density, x, t, log_step, variance, num_moves)
        here = log_step + RATE * num_moves * (accepted - TARGET_ACCEPT)
        return (x, log_weight, here), (log_step, variance)

    start = (x, jnp.zeros_like(density.energy(x)), jnp.full((), jnp.log(0.3), x.dtype))
    before = jnp.concatenate([jnp.zeros(1), temps[:-1]])
    _, (log_step, variance) = lax.scan(stage, start, (before, temps, random.split(key_stages, temps.shape[0])))
    return Schedule(temps, log_step, variance)


def _annealed(
    rng_key: Array, density: TiltedDensity, x: Array, schedule: Schedule, num_moves: int, back: bool = False
) -> Array:
    """Log weights ``[*C]`` of chains that go along the schedule from ``x``, or back from its end."""

    def stage(carry: tuple[Array, Array], at: tuple) -> tuple[tuple[Array, Array], None]:
        (x, log_weight), (before, (t, log_step, variance), key) = carry, at
        if not back:
            log_weight = log_weight - (t - before) * density.energy(x)
        x, _ = _moved(key, density, x, t, log_step, variance, num_moves)
        if back:
            log_weight = log_weight + (t - before) * density.energy(x)
        return (x, log_weight), None

    temps = schedule.temps
    before = jnp.concatenate([jnp.zeros(1), temps[:-1]])
    stages = (before, tuple(schedule), random.split(rng_key, temps.shape[0]))
    start = (x, jnp.zeros_like(density.energy(x)))
    return lax.scan(stage, start, stages, reverse=back)[0][1]


def _check_simulated(model: LatentModel, params: Params, batch: Batch) -> None:
    """Refuse what cannot be simulated, or is simulated otherwise than it is weighed.

    Raises:
        ModelError: naming the site.
    """
    if not model.latents:
        raise ModelError("bidirectional: the model has no latent site, so its density is not annealed.")

    def look(batch: Batch) -> Any:
        for name, site in model.sites(params, batch).items():
            if name not in model.latents and site["is_observed"]:
                try:
                    jax.eval_shape(site["fn"].sample, batch.rng_key)
                except NotImplementedError as e:
                    raise ModelError(
                        f"bidirectional: '{name}' ({type(site['fn']).__name__}) cannot be simulated."
                    ) from e
        return model.simulate(params, batch)

    jax.eval_shape(look, batch)
