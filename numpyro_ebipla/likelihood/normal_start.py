r"""A start near the posterior of many coupled latents, for which the way from the prior is too long.

Hundreds of latents that all data share make a posterior far narrower than the prior, in directions that no population
of a hundred particles knows: annealed from the prior its log Z is off by several nats, and its error does not say so. A
normal law with the posterior's own curvature is near: with it the path is short, for a normal posterior none is left.
"""

import math
from typing import Any, NamedTuple

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


class NormalStart(NamedTuple):
    """A normal law of ``x = m + R v``, ``v`` standard normal.

    Attributes:
        mean: ``m``, ``[D]``.
        root: ``R``, ``[D, D]``.
        log_det: log determinant of ``R``.
    """

    mean: Array
    root: Array
    log_det: Array


def normal_start(density: PosteriorDensity, draws: Array) -> NormalStart:
    """Return the normal law with the posterior's own curvature.

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
    return NormalStart(mean, vector / jnp.sqrt(value)[None], -0.5 * jnp.sum(jnp.log(value)))


def tilted_from(density: PosteriorDensity, near: NormalStart, from_near: Array) -> TiltedDensity:
    """Return the posterior tilted from a normal law, over ``v``, or from the prior, over ``x`` itself.

    ``from_near`` (a traced bool) decides: one program serves both.
    """
    dim = near.mean.shape[0]

    def log_base(v: Array) -> Array:
        normal = lambda v: -0.5 * jnp.sum(jnp.square(v), -1) - 0.5 * dim * math.log(2 * math.pi) - near.log_det
        return lax.cond(from_near, normal, density.tilted.log_base, v)

    def energy(v: Array) -> Array:
        x = lax.cond(from_near, lambda v: near.mean[None] + v @ near.root.T, lambda v: v, v)
        return log_base(v) - density.log_joint(x)[0]

    def sample_base(key: Array, num: int) -> Array:
        normal = lambda key: random.normal(key, (num, dim), near.mean.dtype)
        return lax.cond(from_near, normal, lambda key: density.tilted.sample_base(key, num), key)

    return TiltedDensity(log_base, energy, sample_base)


def anneal_coupled(
    rng_key: Array, density: PosteriorDensity, num_particles: int, num_populations: int, annealing: Annealing
) -> Population:
    """Anneal populations from the prior or from a normal start, whichever a trial of each finds the better.

    All runs are one loop, as a program of four anneals would take three times as long to compile.

    Returns:
        A population with a leading axis of ``num_populations``. Positions are those of ``v`` where the start is normal.
    """
    key_pilot, key_draw, key_trial, key_runs = random.split(rng_key, 4)
    keys = jnp.concatenate([jnp.stack([key_pilot, key_trial]), random.split(key_runs, num_populations)])
    origin = jax.eval_shape(lambda key: density.tilted.sample_base(key, 1)[0], rng_key)
    nowhere = NormalStart(jnp.zeros_like(origin), jnp.eye(origin.size, dtype=origin.dtype), jnp.zeros((), origin.dtype))

    def fitted(pilot: Population) -> NormalStart:
        few = min(NUM_CURVATURES, num_particles)
        return normal_start(density, draw_equally(key_draw, pilot.position, pilot.log_weight, few))

    def run(carry: Any, at: tuple[Array, Array]) -> tuple[Any, Population]:
        number, key = at
        near, from_near, of_pilot = carry
        out = anneal(key, tilted_from(density, near, from_near), num_particles, annealing)
        near = lax.cond(number == 0, fitted, lambda _: near, out)
        better = (out.variance < of_pilot) & jnp.isfinite(out.log_z)
        from_near = (number == 0) | jnp.where(number == 1, better, from_near)
        return (near, from_near, jnp.where(number == 0, out.variance, of_pilot)), out

    begin = (nowhere, jnp.array(False), jnp.zeros((), origin.dtype))
    _, out = lax.scan(run, begin, (jnp.arange(num_populations + 2), keys))
    return jax.tree.map(lambda x: x[2:], out)
