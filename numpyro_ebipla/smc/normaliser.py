"""Log normalisers from independent annealed populations: one estimator for all who need one."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax, random
from jax.scipy.special import logsumexp
from scipy.special import chdtri

from numpyro_ebipla.smc.anneal import anneal
from numpyro_ebipla.smc.annealing import Annealing
from numpyro_ebipla.smc.density import TiltedDensity

#: Populations contradict the error that they claim where χ² is as unlikely as this.
CONTRADICTION = 1e-3


class Estimate(NamedTuple):
    """A number estimated by Monte Carlo, and its standard error."""

    value: Array
    std_error: Array


def log_normaliser(
    rng_key: Array, density: TiltedDensity, num_walkers: int, num_populations: int, annealing: Annealing
) -> Estimate:
    """Estimate ``log Z = log ∫ p_0 e^{−E}`` from populations annealed one after the other.

    Args:
        rng_key: a PRNG key.
        density: base and energy.
        num_walkers: of each population.
        num_populations: independent ones.
        annealing: how.

    Returns:
        Value and standard error, scalars (or ``[D]``), by :func:`pooled`.
    """

    def one(key: Array) -> tuple[Array, Array]:
        population = anneal(key, density, num_walkers, annealing)
        return population.log_z, population.variance

    value, variance = pooled(*lax.map(one, random.split(rng_key, num_populations)))
    return Estimate(value, jnp.sqrt(variance))


def pooled(log_z: Array, variance: Array) -> tuple[Array, Array]:
    """Return the log of the mean of independent estimates ``[K, …]`` of Z, and its variance.

    The log of an unbiased estimate is too low by half its variance, for which the value is corrected. The variance is
    what the populations claim, unless their spread contradicts it (they may each have found other modes): then it is
    the spread's.

    >>> pooled(jnp.zeros(4), jnp.full(4, 0.04))
    (Array(0.005, dtype=float32), Array(0.01, dtype=float32))
    """
    num = log_z.shape[0]
    log_mean = logsumexp(log_z, 0) - jnp.log(num)
    share = jnp.exp(log_z - log_mean[None]) / num
    value = jnp.sum(jnp.square(share) * variance, 0)
    if num > 1:
        spread = jnp.var(share, axis=0, ddof=1) * num
        limit = chdtri(num - 1, CONTRADICTION) / (num - 1)
        value = jnp.where(spread > limit * value, spread, value)
    return log_mean + value / 2, value
