r"""Sequential Monte Carlo from a base density to a tilted one.

Targets ``log π_t = log p_0 − t E`` for ``t`` from 0 to 1. A population starts as exact draws of ``p_0``; each
stage raises ``t`` by as much as the spread of ``E`` allows, reweights, resamples if the effective sample
size is low, and moves every walker by MALA (Del Moral et al., 2006; Neal, 2001, for the weights). It
estimates ``log Z = log ∫ p_0 e^{−E}`` with an unbiased estimate of ``Z``, and gives draws of ``p_0 e^{−E} / Z``
whether or not that density is multimodal, which one chain started at ``p_0`` does not.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax, random

from numpyro_ebipla.smc.annealing import NUM_KNOTS, Annealing
from numpyro_ebipla.smc.density import TARGET_ACCEPT, Evaluated, TiltedDensity, move_tempered, population_variance
from numpyro_ebipla.smc.weights import ess, log_mean_exp, normalised, resample, resample_to

#: Least spread of the energies: where it is less, one stage is enough.
LEAST_SPREAD = 1e-6


class Population(NamedTuple):
    """A weighted population at ``t = 1``.

    Attributes:
        position: ``[P, *event]`` (or ``[P, D, *event]``).
        log_weight: ``[P]`` (``[P, D]``); their log-mean-exp is ``log_z``.
        log_z: estimate of the log normaliser, scalar (``[D]``).
        variance: estimate of its variance: ``1/ESS − 1/P`` summed over the resamplings and the end. It takes the
            stages as independent, which chains that mix well between two resamplings are.
        log_step: ``[NUM_KNOTS]`` adapted log step sizes, to start the next anneal with.
        ess: smallest effective sample size on the way, as a fraction of P.
        accept_prob: mean acceptance of the moves.
        num_temps: number of temperatures visited.
        temps: ``[max_temps]`` these temperatures, filled up with ones.
        stage_ess: scalar (``[D]``), the smallest share of the population that one reweighting left, to second order.
            If this is far below the option of the same name, the ladder was too short and the rest is unreliable.
    """

    position: Array
    log_weight: Array
    log_z: Array
    variance: Array
    log_step: Array
    ess: Array
    accept_prob: Array
    num_temps: Array
    temps: Array
    stage_ess: Array


class _Stage(NamedTuple):
    """What is carried from temperature to temperature.

    Attributes:
        t: the temperature.
        k: number of stages so far.
        walkers: the population.
        log_weight: its weights.
        log_step: ``[NUM_KNOTS]``.
        ess: the smallest so far, as a fraction.
        variance: see :class:`Population`.
        accept: sum of the stages' mean acceptances.
        temps: the temperatures so far.
        loss: −log of the smallest share that one reweighting left.
    """

    t: Array
    k: Array
    walkers: Evaluated
    log_weight: Array
    log_step: Array
    ess: Array
    variance: Array
    accept: Array
    temps: Array
    loss: Array


def anneal(
    rng_key: Array,
    density: TiltedDensity,
    num_walkers: int,
    annealing: Annealing = Annealing(),
    log_step: Array | None = None,
) -> Population:
    """Anneal a fresh population from the base to the tilted density.

    Args:
        rng_key: a PRNG key.
        density: base and energy.
        num_walkers: P.
        annealing: how.
        log_step: ``[NUM_KNOTS]`` log step sizes by temperature, in units of the population's variance, to begin with;
            None for the options' own.
    """
    key_base, key_stages = random.split(rng_key)

    def stage(s: _Stage) -> _Stage:
        keys = random.split(random.fold_in(key_stages, s.k), 1 + annealing.num_moves)
        s = _resampled(keys[0], _reweighted(s, annealing), annealing)
        return _moved(keys[1:], s, density, annealing)

    x = density.sample_base(key_base, num_walkers)
    last = lax.while_loop(lambda s: s.t < 1, stage, _first(density.evaluate(x), annealing, log_step))
    return Population(
        position=last.walkers.position,
        log_weight=last.log_weight,
        log_z=log_mean_exp(last.log_weight),
        variance=last.variance + 1 / ess(last.log_weight) - 1 / num_walkers,
        log_step=last.log_step,
        ess=last.ess,
        accept_prob=last.accept / last.k,
        num_temps=last.k,
        temps=last.temps,
        stage_ess=jnp.exp(-last.loss),
    )


def _first(walkers: Evaluated, annealing: Annealing, log_step: Array | None) -> _Stage:
    dtype, weight = walkers.position.dtype, walkers.log_base
    return _Stage(
        t=jnp.zeros((), dtype),
        k=jnp.zeros((), jnp.int32),
        walkers=walkers,
        log_weight=jnp.zeros_like(weight),
        log_step=annealing.initial_log_step(dtype) if log_step is None else log_step,
        ess=jnp.ones((), dtype),
        variance=jnp.zeros_like(weight[0]),
        accept=jnp.zeros(()),
        temps=jnp.ones((annealing.max_temps,), dtype),
        loss=jnp.zeros_like(weight[0]),
    )


def _reweighted(s: _Stage, annealing: Annealing) -> _Stage:
    """Choose the next temperature and weigh the walkers by it.

    To second order reweighting by ``exp(−Δ E)`` leaves an ESS of ``exp(−Δ² Var E)``.
    """
    # Walkers beyond a wall (of infinite energy, or none) will be gone, and say nothing of the rest.
    standing = jnp.isfinite(s.walkers.energy)
    weight = normalised(jnp.where(standing, s.log_weight, -jnp.inf))
    energy = jnp.where(standing & (weight > 0), s.walkers.energy, 0.0)
    deviation = jnp.square(energy - jnp.sum(weight * energy, 0, keepdims=True))
    spread = jnp.sqrt(jnp.sum(weight * deviation, 0))
    step = jnp.sqrt(-jnp.log(annealing.stage_ess)) / jnp.maximum(jnp.max(spread), LEAST_SPREAD)
    # Where base and target are far apart the first steps are many and tiny, the later ones grow like t itself.
    most = annealing.max_temps
    step = jnp.maximum(step, jnp.where(s.k < most // 2, 0.0, (1 - s.t) / (most - s.k)))
    t = jnp.where(jnp.isfinite(step), jnp.minimum(s.t + step, 1.0), 1.0)

    loss = jnp.maximum(s.loss, jnp.square((t - s.t) * spread))
    log_weight = s.log_weight - (t - s.t) * s.walkers.energy
    log_weight = jnp.where(jnp.isfinite(log_weight), log_weight, -jnp.inf)
    return s._replace(t=t, log_weight=log_weight, loss=loss)


def _resampled(rng_key: Array, s: _Stage, annealing: Annealing) -> _Stage:
    """Resample where the effective sample size is low."""
    number, num_walkers = ess(s.log_weight), s.log_weight.shape[0]
    low = jnp.minimum(s.ess, number.min() / num_walkers)
    log_weight, walkers, resampled = resample(rng_key, s.log_weight, s.walkers, annealing.threshold)
    variance = s.variance + jnp.where(resampled, 1 / number - 1 / num_walkers, 0.0)
    return s._replace(log_weight=log_weight, walkers=walkers, ess=low, variance=variance)


def _moved(keys: Array, s: _Stage, density: TiltedDensity, annealing: Annealing) -> _Stage:
    """Move the walkers at the stage's temperature, and adapt its step size."""
    knot = jnp.round(s.t * (NUM_KNOTS - 1)).astype(jnp.int32)
    variance = population_variance(s.walkers.position, s.log_weight)
    rate = annealing.rate if annealing.step_size is None else 0.0

    def move(carry: tuple[Evaluated, Array], key: Array) -> tuple[tuple[Evaluated, Array], Array]:
        walkers, log_step = carry
        walkers, prob = move_tempered(key, density.evaluate, walkers, s.t, jnp.exp(log_step[knot]), variance)
        return (walkers, log_step.at[knot].add(rate * (prob.mean() - TARGET_ACCEPT))), prob.mean()

    (walkers, log_step), accepted = lax.scan(move, (s.walkers, s.log_step), keys)
    accept, temps = s.accept + accepted.mean(), s.temps.at[s.k].set(s.t)
    return s._replace(k=s.k + 1, walkers=walkers, log_step=log_step, accept=accept, temps=temps)


def draw_equally(rng_key: Array, position: Array, log_weight: Array, num_draws: int) -> Array:
    """Return ``num_draws`` unweighted draws ``[num_draws, ...]`` of a weighted population, in random order.

    Args:
        rng_key: a PRNG key.
        position: ``[P, ...]`` (or ``[P, D, ...]``).
        log_weight: ``[P]`` (``[P, D]``).
        num_draws: how many.
    """
    num = log_weight.shape[0]

    def draw(key: Array, log_weight: Array) -> Array:
        return random.choice(key, num, (num_draws,), p=normalised(log_weight))

    if log_weight.ndim == 1:
        key_order, key_draw = random.split(rng_key)
        _, x = resample_to(key_draw, max(num, num_draws), log_weight, position)
        return random.permutation(key_order, x)[:num_draws]
    keys = random.split(rng_key, log_weight.shape[1])
    ancestors = jax.vmap(draw, (0, 1), 1)(keys, log_weight)
    return position[ancestors, jnp.arange(ancestors.shape[1])]
