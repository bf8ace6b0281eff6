"""Log normalisers from independent populations: one estimator for all who need one."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.scipy.special import logsumexp
from scipy.special import chdtri


class Estimate(NamedTuple):
    """A number estimated by Monte Carlo, and its standard error."""

    value: Array
    std_error: Array


#: Populations contradict the error that they claim where χ² is as unlikely as this.
CONTRADICTION = 1e-3


def pooled(log_z: Array, variance: Array) -> tuple[Array, Array]:
    """Log of the mean of independent estimates ``[K, …]`` of Z, corrected for its bias, and its variance.

    The variance is what the populations claim, unless their spread contradicts it (they may each have found other
    modes): then it is the spread's.

    >>> pooled(jnp.zeros(4), jnp.full(4, 0.04))
    (Array(0.005, dtype=float32), Array(0.01, dtype=float32))
    """
    num = log_z.shape[0]
    log_mean = logsumexp(log_z, 0) - jnp.log(num)
    share = jnp.exp(log_z - log_mean) / num
    value = jnp.sum(jnp.square(share) * variance, 0)
    if num > 1:
        spread = jnp.var(share, axis=0, ddof=1) * num
        limit = chdtri(num - 1, CONTRADICTION) / (num - 1)
        value = jnp.where(spread > limit * value, spread, value)
    return log_mean + value / 2, value
