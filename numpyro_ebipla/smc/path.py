"""A path of densities learned beforehand, and weights of chains that go along it, or back."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax, random

from numpyro_ebipla._core.tree import batched_value_and_grad, chain_select
from numpyro_ebipla.kernels.metropolis import Shape, metropolis
from numpyro_ebipla.smc.anneal import TARGET_ACCEPT, population_variance
from numpyro_ebipla.smc.density import TiltedDensity
from numpyro_ebipla.smc.weights import resample

#: Of the adaptation of step sizes, in the run that learns them.
RATE = 0.2


class Schedule(NamedTuple):
    """A fixed path: ``[L]`` temperatures, ``[L]`` log step sizes, ``[L, *C, D]`` variances that scale the moves."""

    temps: Array
    log_step: Array
    variance: Array


def moved_at(
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


def learn_path(rng_key: Array, density: TiltedDensity, num: int, temps: Array, num_moves: int) -> Schedule:
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
        x, accepted = moved_at(key_move, density, x, t, log_step, variance, num_moves)
        here = log_step + RATE * num_moves * (accepted - TARGET_ACCEPT)
        return (x, log_weight, here), (log_step, variance)

    start = (x, jnp.zeros_like(density.energy(x)), jnp.full((), jnp.log(0.3), x.dtype))
    before = jnp.concatenate([jnp.zeros(1), temps[:-1]])
    _, (log_step, variance) = lax.scan(stage, start, (before, temps, random.split(key_stages, temps.shape[0])))
    return Schedule(temps, log_step, variance)


def anneal_along(
    rng_key: Array, density: TiltedDensity, x: Array, schedule: Schedule, num_moves: int, back: bool = False
) -> Array:
    """Log weights ``[*C]`` of chains that go along the schedule from ``x``, or back from its end."""

    def stage(carry: tuple[Array, Array], at: tuple) -> tuple[tuple[Array, Array], None]:
        (x, log_weight), (before, (t, log_step, variance), key) = carry, at
        if not back:
            log_weight = log_weight - (t - before) * density.energy(x)
        x, _ = moved_at(key, density, x, t, log_step, variance, num_moves)
        if back:
            log_weight = log_weight + (t - before) * density.energy(x)
        return (x, log_weight), None

    temps = schedule.temps
    before = jnp.concatenate([jnp.zeros(1), temps[:-1]])
    stages = (before, tuple(schedule), random.split(rng_key, temps.shape[0]))
    start = (x, jnp.zeros_like(density.energy(x)))
    return lax.scan(stage, start, stages, reverse=back)[0][1]
