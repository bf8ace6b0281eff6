r"""Importance sampling from a normal law fitted to weighted draws of each posterior.

Annealed populations know where a posterior is, and its log normaliser to a few hundredths; a thousand data then add up
to half a nat. Where the posterior is nearly normal, draws from a law fitted to the populations know it far better, the
more so as they are spread evenly: points of a randomised Sobol sequence (Owen, 1995, *Randomly permuted
(t, m, s)-nets*; here with random shifts) integrate smooth functions at almost twice the rate of independent ones. A
part of the law has heavy tails, so that no weight is much larger than one where the posterior's are heavier than a
normal law's.
"""

import math
from collections.abc import Callable
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax, random
from jax.scipy.special import ndtri
from scipy.stats import qmc

from numpyro_ebipla.smc.normaliser import Estimate
from numpyro_ebipla.smc.weights import ess, log_mean_exp, normalised

#: Coordinates up to which a normal law is tried.
MAX_DIM = 32
#: Independent randomisations of the points, whose spread is the error.
REPETITIONS = 16
#: Points of each randomisation, as a power of two.
LOG2_POINTS = 9
#: Width of the normal component in standard deviations of the draws, and share of the other one, whose coordinates have
#: t laws of two degrees of freedom and the draws' standard deviation for a scale.
WIDTH, SHARE = 1.1, 0.125
#: Least distance of a point from the faces of the unit cube: single precision has few numbers beyond.
EDGE = 1e-7
#: Of the draws' variance, added along every axis.
RIDGE = 1e-6
#: Effective share of the points, and standard errors of a difference to the populations, beyond which they are better.
LEAST_ESS, MOST_APART = 0.05, 4.0


@cache
def sobol_points(dim: int) -> np.ndarray:
    """Return ``[2 ** LOG2_POINTS, dim]`` evenly spread points of the unit cube, in the order of their sequence."""
    return qmc.Sobol(dim, scramble=False).random_base2(LOG2_POINTS).astype(np.float32)


def by_importance(
    rng_key: Array, log_joint: Callable[[Array], Array], position: Array, log_weight: Array, num_at_once: int
) -> tuple[Estimate, Array]:
    """Estimate log normalisers by draws of laws fitted to weighted ones.

    Args:
        rng_key: a PRNG key.
        log_joint: ``[n, B, D] -> [n, B]``.
        position: ``[P, B, D]``.
        log_weight: ``[P, B]``.
        num_at_once: how many draws are evaluated together.

    Returns:
        ``[B]`` with their standard errors, and the effective share of the draws, ``[B]``.
    """
    dim, dtype = position.shape[-1], position.dtype
    weight = jax.vmap(normalised, 1, 1)(log_weight)
    mean = jnp.einsum("pb,pbd->bd", weight, position)
    apart = position - mean[None]
    cov = jnp.einsum("pb,pbi,pbj->bij", weight, apart, apart)
    cov = cov + RIDGE * jnp.einsum("bii,ij->bij", cov, jnp.eye(dim, dtype=dtype))
    root = jnp.linalg.cholesky(cov)
    log_det = jnp.sum(jnp.log(jnp.diagonal(root, axis1=1, axis2=2)), -1)
    points = jnp.asarray(sobol_points(dim), dtype)
    num = len(points)
    # Stretches of the sequence are spread evenly, too; every eighth point would lie in one corner.
    heavy = jnp.arange(num) < SHARE * num

    def log_law(z: Array) -> Array:
        normal = -0.5 * jnp.sum(jnp.square(z / WIDTH), -1) - dim * (0.5 * math.log(2 * math.pi) + math.log(WIDTH))
        t = jnp.sum(-1.5 * jnp.log1p(jnp.square(z) / 2), -1) - dim * 1.5 * math.log(2)
        return jnp.logaddexp(math.log1p(-SHARE) + normal, math.log(SHARE) + t)

    def weigh(shift: Array) -> Array:
        """Return log weights ``[n, B]`` of one randomisation, ``shift`` ``[B, D]``."""

        def some(which: Array) -> Array:
            u = jnp.clip((points[which][:, None] + shift[None]) % 1.0, EDGE, 1 - EDGE)
            of_t = (2 * u - 1) / jnp.sqrt(2 * u * (1 - u))  # the quantiles of the t law
            z = jnp.where(heavy[which][:, None, None], of_t, WIDTH * ndtri(u))
            x = mean[None] + jnp.einsum("bij,nbj->nbi", root, z)
            return log_joint(x) - log_law(z) + log_det[None]

        parts = math.gcd(num, num_at_once)
        found = lax.map(some, jnp.arange(num).reshape(-1, parts))
        return found.reshape(num, -1)

    def one(key: Array) -> tuple[Array, Array]:
        log_weight = weigh(random.uniform(key, mean.shape, dtype))
        log_weight = jnp.where(jnp.isnan(log_weight), -jnp.inf, log_weight)
        return log_mean_exp(log_weight), ess(log_weight) / num

    log_z, share = lax.map(one, random.split(rng_key, REPETITIONS))
    value = log_mean_exp(log_z)
    # That of a t law, which few repetitions make of the error.
    spread = jnp.var(jnp.exp(log_z - value[None]), axis=0, ddof=1)
    variance = spread / REPETITIONS * (REPETITIONS - 1) / (REPETITIONS - 3)
    return Estimate(value + variance / 2, jnp.sqrt(variance)), jnp.mean(share, 0)
