"""A path of densities learned beforehand, and weights of chains that go along it, or back."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax, random

from numpyro_ebipla.smc.annealing import FIRST_STEP, Annealing
from numpyro_ebipla.smc.density import TARGET_ACCEPT, Evaluated, TiltedDensity, move_tempered, population_variance
from numpyro_ebipla.smc.weights import resample


class Path(NamedTuple):
    """A fixed path: ``[L]`` temperatures, ``[L]`` log step sizes, ``[L, *C, D]`` variances that scale the moves."""

    temps: Array
    log_step: Array
    variance: Array


def learn_path(rng_key: Array, density: TiltedDensity, num_walkers: int, temps: Array, annealing: Annealing) -> Path:
    """Learn step sizes and scales along ``temps``, from a population that is resampled on its way."""
    key_base, key_stages = random.split(rng_key)
    walkers = density.evaluate(density.sample_base(key_base, num_walkers))

    def stage(carry: tuple[Evaluated, Array, Array], at: tuple[Array, Array, Array]) -> tuple[Any, Any]:
        (walkers, log_weight, log_step), (before, t, key) = carry, at
        key_resample, key_move = random.split(key)
        log_weight = log_weight - (t - before) * walkers.energy
        log_weight = jnp.where(jnp.isfinite(log_weight), log_weight, -jnp.inf)
        log_weight, walkers, _ = resample(key_resample, log_weight, walkers, annealing.threshold)
        variance = population_variance(walkers.position, log_weight)
        walkers, accepted = move_at(key_move, density, walkers, Path(t, log_step, variance), annealing.num_moves)
        adapted = log_step + annealing.rate * annealing.num_moves * (accepted - TARGET_ACCEPT)
        return (walkers, log_weight, adapted), (log_step, variance)

    start = (walkers, jnp.zeros_like(walkers.energy), jnp.full((), jnp.log(FIRST_STEP), walkers.position.dtype))
    stages = (_before(temps), temps, random.split(key_stages, temps.shape[0]))
    _, (log_step, variance) = lax.scan(stage, start, stages)
    return Path(temps, log_step, variance)


def weigh_along(
    rng_key: Array, density: TiltedDensity, x: Array, path: Path, num_moves: int, back: bool = False
) -> Array:
    """Return log weights ``[*C]`` of chains that go along the path from ``x``, or back from its end.

    Annealed importance sampling (Neal, 2001), without resampling.
    """

    def stage(carry: tuple[Evaluated, Array], at: tuple) -> tuple[tuple[Evaluated, Array], None]:
        (walkers, log_weight), (before, here, key) = carry, at
        if not back:
            log_weight = log_weight - (here.temps - before) * walkers.energy
        walkers, _ = move_at(key, density, walkers, here, num_moves)
        if back:
            log_weight = log_weight + (here.temps - before) * walkers.energy
        return (walkers, log_weight), None

    stages = (_before(path.temps), path, random.split(rng_key, path.temps.shape[0]))
    walkers = density.evaluate(x)
    return lax.scan(stage, (walkers, jnp.zeros_like(walkers.energy)), stages, reverse=back)[0][1]


def _before(temps: Array) -> Array:
    """Return the temperature before each one: zero, the base's, before the first."""
    return jnp.concatenate([jnp.zeros(1), temps[:-1]])


def move_at(
    rng_key: Array, density: TiltedDensity, walkers: Evaluated, here: Path, num_moves: int
) -> tuple[Evaluated, Array]:
    """Move walkers at one temperature of a path; also their mean acceptance."""

    def move(walkers: Evaluated, key: Array) -> tuple[Evaluated, Array]:
        step_size = jnp.exp(here.log_step)
        walkers, prob = move_tempered(key, density.evaluate, walkers, here.temps, step_size, here.variance)
        return walkers, prob.mean()

    walkers, accepted = lax.scan(move, walkers, random.split(rng_key, num_moves))
    return walkers, accepted.mean()
