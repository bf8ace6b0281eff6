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

from numpyro_ebipla._core.tree import batched_value_and_grad, chain_select
from numpyro_ebipla.kernels.metropolis import Shape, metropolis
from numpyro_ebipla.smc.density import TiltedDensity
from numpyro_ebipla.smc.weights import ess, log_mean_exp, normalised, resample

#: Step sizes are kept at this many temperatures, equally spaced.
NUM_KNOTS = 16
TARGET_ACCEPT = 0.65


class Annealed(NamedTuple):
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
            Far below the option of that name the ladder was too short, and nothing else can be relied upon.
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
    t: Array
    k: Array
    walkers: tuple[Array, Array, Array, Array, Array]  # position, log_base, energy, their gradients
    log_weight: Array
    log_step: Array
    ess: Array
    variance: Array
    accept: Array
    temps: Array
    loss: Array  # −log of the smallest share left


def initial_log_step(dtype: jnp.dtype) -> Array:
    """Step sizes before any adaptation (relative to the population's variances)."""
    return jnp.full((NUM_KNOTS,), jnp.log(0.3), dtype)


def anneal(
    rng_key: Array,
    density: TiltedDensity,
    num_walkers: int,
    log_step: Array | None = None,
    *,
    num_moves: int = 1,
    stage_ess: float = 0.5,
    threshold: float = 0.5,
    max_temps: int = 100,
    rate: float = 0.1,
) -> Annealed:
    """Anneal a fresh population from the base to the tilted density.

    Args:
        rng_key: a PRNG key.
        density: base and energy.
        num_walkers: P.
        log_step: ``[NUM_KNOTS]`` log step sizes by temperature, in units of the population's variance;
            None for :func:`initial_log_step`.
        num_moves: MALA moves at each temperature.
        stage_ess: effective sample size, as a fraction of P, that one stage's reweighting may cost a
            population of equal weights. Nearer to one: more temperatures.
        threshold: resample when the ESS falls below this fraction of P.
        max_temps: the second half of the ladder is stretched so as to end within this number; the weights stay right,
            but where that costs far more than ``stage_ess`` their variance is not known.
        rate: of the adaptation of ``log_step``.
    """
    key_base, key_stages = random.split(rng_key)
    value_and_grad_base = batched_value_and_grad(density.log_base)
    value_and_grad_energy = batched_value_and_grad(density.energy)

    def evaluate(x: Array) -> tuple[Array, Array, Array, Array]:
        base, grad_base = value_and_grad_base(x)
        energy, grad_energy = value_and_grad_energy(x)
        return base, energy, grad_base, grad_energy

    def stage(s: _Stage) -> _Stage:
        keys = random.split(random.fold_in(key_stages, s.k), 1 + num_moves)
        key_resample, key_moves = keys[0], keys[1:]
        # To second order reweighting by exp(−Δ E) leaves an ESS of exp(−Δ² Var E).
        # Walkers beyond a wall (of infinite energy, or none) will be gone, and say nothing of the rest.
        standing = jnp.isfinite(s.walkers[2])
        weight = normalised(jnp.where(standing, s.log_weight, -jnp.inf))
        energy = jnp.where(standing & (weight > 0), s.walkers[2], 0.0)
        deviation = jnp.square(energy - jnp.sum(weight * energy, 0))
        spread = jnp.sqrt(jnp.sum(weight * deviation, 0))
        step = jnp.sqrt(-jnp.log(stage_ess)) / jnp.maximum(jnp.max(spread), 1e-6)
        # Where base and target are far apart the first steps are many and tiny, the later ones grow like t itself.
        step = jnp.maximum(step, jnp.where(s.k < max_temps // 2, 0.0, (1 - s.t) / (max_temps - s.k)))
        t = jnp.where(jnp.isfinite(step), jnp.minimum(s.t + step, 1.0), 1.0)

        loss = jnp.maximum(s.loss, jnp.square((t - s.t) * spread))
        log_weight = s.log_weight - (t - s.t) * s.walkers[2]
        log_weight = jnp.where(jnp.isfinite(log_weight), log_weight, -jnp.inf)
        number = ess(log_weight)
        low = jnp.minimum(s.ess, number.min() / num_walkers)
        log_weight, walkers, resampled = resample(key_resample, log_weight, s.walkers, threshold)
        variance_z = s.variance + jnp.where(resampled, 1 / number - 1 / num_walkers, 0.0)

        def tempered(x: Array) -> tuple[Array, Array, tuple[Array, ...]]:
            base, energy, grad_base, grad_energy = evaluate(x)
            return base - t * energy, grad_base - t * grad_energy, (base, energy, grad_base, grad_energy)

        knot = jnp.round(t * (NUM_KNOTS - 1)).astype(jnp.int32)
        variance = population_variance(walkers[0], log_weight)

        def move(carry: tuple, key: Array) -> tuple[tuple, Array]:
            walkers, log_step = carry
            x, base, energy, grad_base, grad_energy = walkers
            here = (x, base - t * energy, grad_base - t * grad_energy)
            accept, new, prob = metropolis(key, tempered, here, jnp.exp(log_step[knot]), Shape(variance))
            walkers = chain_select(accept, (new[0], *new[3]), walkers)
            return (walkers, log_step.at[knot].add(rate * (prob.mean() - TARGET_ACCEPT))), prob.mean()

        (walkers, log_step), accepted = lax.scan(move, (walkers, s.log_step), key_moves)
        accept, temps = s.accept + accepted.mean(), s.temps.at[s.k].set(t)
        return _Stage(t, s.k + 1, walkers, log_weight, log_step, low, variance_z, accept, temps, loss)

    x = density.sample_base(key_base, num_walkers)
    known = evaluate(x)
    first = _Stage(
        t=jnp.zeros((), x.dtype),
        k=jnp.zeros((), jnp.int32),
        walkers=(x, *known),
        log_weight=jnp.zeros_like(known[0]),
        log_step=initial_log_step(x.dtype) if log_step is None else log_step,
        ess=jnp.ones((), x.dtype),
        variance=jnp.zeros_like(known[0][0]),
        accept=jnp.zeros(()),
        temps=jnp.ones((max_temps,), x.dtype),
        loss=jnp.zeros_like(known[0][0]),
    )
    last = lax.while_loop(lambda s: s.t < 1, stage, first)
    return Annealed(
        position=last.walkers[0],
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


def equally_weighted(rng_key: Array, annealed: Annealed, num_draws: int) -> Array:
    """``num_draws`` unweighted draws ``[num_draws, ...]`` of an annealed population, in random order."""
    num = annealed.log_weight.shape[0]

    def draw(key: Array, log_weight: Array) -> Array:
        return random.choice(key, num, (num_draws,), p=normalised(log_weight))

    if annealed.log_weight.ndim == 1:
        key_order, key_draw = random.split(rng_key)
        _, x, _ = resample(key_draw, annealed.log_weight, annealed.position, 2.0)
        return random.permutation(key_order, x)[:num_draws]
    keys = random.split(rng_key, annealed.log_weight.shape[1])
    ancestors = jax.vmap(draw, (0, 1), 1)(keys, annealed.log_weight)
    return annealed.position[ancestors, jnp.arange(ancestors.shape[1])]


def population_variance(x: Array, log_weight: Array) -> Array:
    """Weighted variance of the population, per coordinate (and per D), kept away from zero."""
    weight = normalised(log_weight)
    weight = weight.reshape(weight.shape + (1,) * (x.ndim - weight.ndim))
    centred = x - jnp.sum(weight * x, 0)
    return jnp.maximum(jnp.sum(weight * jnp.square(centred), 0), 1e-12)
