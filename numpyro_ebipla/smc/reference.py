r"""A density to start from where the base is far from what it is tilted to: the base mixed with a fitted normal law.

Tempering and annealing lead from a density that can be drawn from exactly to one that cannot, and are the shorter the
closer the two are (Surjanovic et al., 2022, *Parallel tempering with a variational reference*). The base of an energy
prior may be far off, a quarter or five times as wide as the data or beside them; a normal law with the particles' mean
and covariance is where the prior should be. Mixed half and half with the base, for what the particles know nothing of,
it loses at most ``log 2`` in exchange.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, random

from numpyro_ebipla.smc.density import LEAST_VARIANCE, TiltedDensity

#: Coordinates up to which covariances are fitted; beyond, variances.
MAX_CORRELATED = 64
#: Least variance, in units of the first draws', so that coordinates which are constant in the particles stay harmless.
LEAST_RATIO = 1e-4
#: Added to correlations, which rounding may leave without a factor.
RIDGE = 1e-4


class Reference(NamedTuple):
    """A normal law over flattened events of ``d`` coordinates, or one for each of D elements, which lead then.

    Attributes:
        mean: ``[d]``.
        covariance: ``[d, d]``, or ``[d]`` for more than :data:`MAX_CORRELATED`.
        least: ``[d]`` the least variances.
    """

    mean: Array
    covariance: Array
    least: Array

    @staticmethod
    def of(x: Array, chain_ndim: int) -> "Reference":
        """Fit one to draws ``[n, *event]``, or ``[n, D, *event]`` (``chain_ndim`` 2)."""
        flat = _flat(x, chain_ndim)
        mean = flat.mean(0)
        spread = _spread(flat - mean[None])
        least = LEAST_RATIO * jnp.mean(jnp.square(flat - mean[None]), 0) + LEAST_VARIANCE
        return Reference(mean, spread, least)

    def updated(self, x: Array, rate: Array) -> "Reference":
        """Go on with running means towards the moments of draws."""
        flat = _flat(x, self.mean.ndim)
        mean = self.mean + rate * (flat.mean(0) - self.mean)
        spread = _spread(flat - mean[None])
        return self._replace(mean=mean, covariance=self.covariance + rate * (spread - self.covariance))

    @property
    def variance(self) -> Array:
        """Variances ``[d]``, at least the least."""
        full = self.covariance.ndim > self.mean.ndim
        return self.least + (jnp.diagonal(self.covariance, axis1=-2, axis2=-1) if full else self.covariance)

    def mixed_with(self, density: TiltedDensity) -> TiltedDensity:
        """Return the same tilted density, with the mixture as its base."""
        mean, sd, d = self.mean, jnp.sqrt(self.variance), self.mean.shape[-1]
        if self.covariance.ndim > mean.ndim:
            # Coordinates may have very different units: their correlations are factorised.
            eye = jnp.eye(d, dtype=mean.dtype)
            root = jnp.linalg.cholesky(self.covariance / (sd[..., None] * sd[..., None, :]) + RIDGE * eye)
            inverse = jax.scipy.linalg.solve_triangular(root, jnp.broadcast_to(eye, root.shape), lower=True)
            colour = lambda u: sd[None] * jnp.einsum("...ij,...j->...i", root, u)
            whiten = lambda x: jnp.einsum("...ij,...j->...i", inverse, x / sd[None])
            log_det = jnp.sum(jnp.log(sd * jnp.diagonal(root, axis1=-2, axis2=-1)), -1)
        else:
            colour, whiten, log_det = (lambda u: sd[None] * u), (lambda x: x / sd[None]), jnp.sum(jnp.log(sd), -1)
        constant = log_det + 0.5 * d * math.log(2 * math.pi)

        def log_base(x: Array) -> Array:
            white = whiten(_flat(x, mean.ndim) - mean[None])
            normal = -0.5 * jnp.sum(jnp.square(white), -1) - constant
            return jnp.logaddexp(density.log_base(x), normal) - math.log(2)

        def sample_base(rng_key: Array, num: int) -> Array:
            key_base, key_normal, key_choice = random.split(rng_key, 3)
            base = density.sample_base(key_base, num)
            normal = mean[None] + colour(random.normal(key_normal, (num, *mean.shape), mean.dtype))
            chosen = random.bernoulli(key_choice, 0.5, (num, *mean.shape[:-1]))
            flat = _flat(base, mean.ndim)
            return jnp.where(chosen[..., None], normal, flat).reshape(base.shape).astype(base.dtype)

        return TiltedDensity(log_base, lambda x: log_base(x) - density.log_density(x), sample_base)


def _flat(x: Array, chain_ndim: int) -> Array:
    return x.reshape((*x.shape[:chain_ndim], -1))


def _spread(centred: Array) -> Array:
    """Return the covariance of ``[n, d]`` or ``[n, D, d]``; of many coordinates the variances."""
    if centred.shape[-1] > MAX_CORRELATED:
        return jnp.mean(jnp.square(centred), 0)
    return jnp.einsum("n...i,n...j->...ij", centred, centred) / len(centred)
