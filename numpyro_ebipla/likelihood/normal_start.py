r"""A start near the posterior of many coupled latents, for which the way from the prior is too long.

Hundreds of latents that all data share make a posterior far narrower than the prior, in directions that no population
of a hundred particles knows: annealed from the prior its log Z is off by several nats, and its error does not say so. A
normal law with the posterior's own curvature is near: with it the path is short, for a normal posterior none is left.
"""

import math

import jax
import jax.numpy as jnp
from jax import Array, lax, random

from numpyro_ebipla.likelihood.posterior import PosteriorDensity
from numpyro_ebipla.smc.anneal import Population, anneal, draw_equally
from numpyro_ebipla.smc.annealing import Annealing
from numpyro_ebipla.smc.density import TiltedDensity

#: Latents up to which the curvature is computed, a dense matrix.
MAX_DENSE = 1024
#: Draws of a pilot population at which it is computed.
NUM_CURVATURES = 8
#: Least curvature, in units of the largest.
LEAST_CURVATURE = 1e-9


def normal_start(density: PosteriorDensity, draws: Array) -> TiltedDensity:
    """Return the posterior over ``v`` of ``x = m + R v``, tilted from a standard normal law.

    ``R Rᵀ`` is the inverse of the mean curvature ``H`` at the draws, and ``m = x̄ + H⁻¹ ḡ``, where their mean gradient
    would vanish: both are exact for a normal posterior, wherever the draws are.

    Args:
        density: of all latents together, over ``[N, D]``.
        draws: ``[n, D]`` of about the posterior.
    """
    log_joint = lambda x: density.log_joint(x[None])[0][0]
    curvature = -lax.map(jax.hessian(log_joint), draws).mean(0)
    slope = jax.vmap(jax.grad(log_joint))(draws).mean(0)
    value, vector = jnp.linalg.eigh(curvature)
    value = jnp.maximum(jnp.abs(value), LEAST_CURVATURE * jnp.max(jnp.abs(value)))
    mean = draws.mean(0) + vector @ ((vector.T @ slope) / value)
    root, dim = vector / jnp.sqrt(value)[None], draws.shape[-1]
    log_det = -0.5 * jnp.sum(jnp.log(value))

    def log_base(v: Array) -> Array:
        return -0.5 * jnp.sum(jnp.square(v), -1) - 0.5 * dim * math.log(2 * math.pi)

    def energy(v: Array) -> Array:
        return log_base(v) - density.log_joint(mean[None] + v @ root.T)[0] - log_det

    return TiltedDensity(log_base, energy, lambda key, num: random.normal(key, (num, dim), draws.dtype))


def anneal_coupled(
    rng_key: Array, density: PosteriorDensity, num_particles: int, num_populations: int, annealing: Annealing
) -> Population:
    """Anneal populations from the prior or from a normal start, whichever a trial of each finds the better.

    Returns:
        A population with a leading axis of ``num_populations``. Positions are those of ``v`` where the start is normal.
    """
    key_pilot, key_draw, key_trial, key_runs = random.split(rng_key, 4)
    pilot = anneal(key_pilot, density.tilted, num_particles, annealing)
    draws = draw_equally(key_draw, pilot.position, pilot.log_weight, min(NUM_CURVATURES, num_particles))
    near = normal_start(density, draws)
    trial = anneal(key_trial, near, num_particles, annealing)
    better = (trial.variance < pilot.variance) & jnp.isfinite(trial.log_z)

    def one(key: Array) -> Population:
        run = lambda start: lambda key: anneal(key, start, num_particles, annealing)
        return lax.cond(better, run(near), run(density.tilted), key)

    return lax.map(one, random.split(key_runs, num_populations))
