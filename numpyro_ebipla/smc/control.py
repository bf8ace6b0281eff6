r"""Zero-variance control variates, as weights of the particles.

At the posterior ``p(x | y)`` gradients of its own log density have known means: ``E[∂_i log p] = 0`` and
``E[1 + (x_i − c) ∂_i log p] = 0`` for any ``c`` (integration by parts). What of a parameter's gradient is linear in
these is noise, and a regression takes it away (Assaraf and Caffarel, 1999; Mira, Solgi and Imparato, 2013, *Zero
variance MCMC for Bayesian estimators*). A regression's intercept is linear in what is regressed, so all that it takes
is a weight for each particle, the same for all parameters: no gradient by particle, whatever the network.

Where the posterior is normal and a parameter's gradient is quadratic without mixed terms, as of locations, scales and
variances, nothing of the noise is left. The density must be continuous in the latents: where it jumps, as that of
``Uniform(0, x)`` at an observation, gradients do not know the jump, and the weights would have a bias.
"""

import math

import jax
import jax.numpy as jnp
from jax import Array

from numpyro_ebipla._core.state import Sites

#: Parts of the particles: each gets its coefficients from the others, so that the weighted mean has no bias.
FOLDS = 4
#: Particles to a feature, at least, for coefficients that add less noise than they take away; and how many must be left
#: beyond the features among those that a fold's coefficients come from. Fewer have tails so heavy that the bound below
#: is met in equilibrium, and biases skewed posteriors: item responses were 0.03 nats off with eight particles.
PARTICLES_PER_FEATURE, SPARE_PARTICLES = 2, 8
#: Of a feature's variance, added to it.
RIDGE = 1e-5
#: A correction is bounded where the particles' mean features are this many times as far from zero as four standard
#: deviations of equilibrium: they lag behind their posterior then, and the regression extrapolates.
FAR = 30.0
#: Particles are taken along, see :func:`recentring`, where their mean slope is this many times as far: before that, but
#: of 400 data with eight particles none is in 5000 steps of equilibrium (a p-value of 1e-7).
BEHIND = 5.0


def num_features(num_particles: int, size: int) -> int:
    """Return how many features serve N particles of ``size`` coordinates: two to a coordinate, or one, or none."""
    others = num_particles - -(-num_particles // FOLDS)
    most = min(num_particles // PARTICLES_PER_FEATURE, others - SPARE_PARTICLES)
    return next((n * size for n in (2, 1) if 0 < n * size <= most), 0)


def num_features_of(position: Sites, chain_ndim: int) -> int:
    """Return :func:`num_features` for chains ``{site: [*C, *event]}``; none without sites."""
    leaves = list(position.values())
    return num_features(leaves[0].shape[0], sum(math.prod(x.shape[chain_ndim:]) for x in leaves)) if leaves else 0


def control_weights(position: Sites, gradient: Sites, chain_ndim: int) -> Array:
    """Return weights ``[*C]`` that sum to one over the particles, the leading axis.

    Args:
        position: ``{site: [*C, *event]}``, of chains ``C`` of which :func:`num_features_of` is above zero.
        gradient: of the log density there, likewise.
        chain_ndim: one, or two where chains belong to data.
    """
    x, slope = _flat(position, gradient, chain_ndim)
    return reweighted(jnp.full(x.shape[:chain_ndim], 1 / len(x), x.dtype), x, slope, num_features(len(x), x.shape[-1]))


def recentring(position: Sites, gradient: Sites, chain_ndim: int) -> tuple[Sites, Array]:
    """Return how far the particles' mean is from the posterior's, ``{site: [*data, *event]}``, and where that is far.

    By the same regression: gradients of a normal density are linear, whatever the particles' distance, so that its
    mean is known from any of them.

    Args:
        position: see :func:`control_weights`.
        gradient: likewise.
        chain_ndim: likewise.

    Returns:
        The shifts that would take the particles to the mean, and ``[*data]`` whether they are far behind.
    """
    x, slope = _flat(position, gradient, chain_ndim)
    num, size = len(x), x.shape[-1]

    def one(x: Array, slope: Array) -> tuple[Array, Array]:
        centred = slope - slope.mean(0)
        scale = jnp.sqrt(jnp.mean(jnp.square(centred), 0)) + jnp.finfo(x.dtype).tiny
        centred, mean = centred / scale, slope.mean(0) / scale
        gram = centred.T @ centred / num + RIDGE * jnp.eye(size, dtype=x.dtype)
        coefficient = jax.scipy.linalg.solve(gram, mean, assume_a="pos")
        # Hotelling's T² over N − 1, of which minus twice the log p-value is about this, however few the particles.
        surprise = (num - size) * jnp.log1p(mean @ coefficient)
        return -(centred @ coefficient) @ (x - x.mean(0)) / num, surprise > BEHIND * _usual(size)

    shift, far = one(x, slope) if chain_ndim == 1 else jax.vmap(one, 1)(x, slope)
    parts, start = {}, 0
    for name, value in position.items():
        event = value.shape[chain_ndim:]
        part = shift[..., start : start + math.prod(event)]
        parts[name], start = part.reshape((*part.shape[:-1], *event)), start + math.prod(event)
    return parts, far


def unexplained(position: Sites, gradient: Sites, values: Array, chain_ndim: int) -> Array:
    """Return the covariance ``[L, L]`` of ``values`` ``[*C, L]`` that control variates leave, summed over data.

    Args:
        position: see :func:`control_weights`.
        gradient: likewise.
        values: of each chain.
        chain_ndim: likewise.
    """
    x, slope = _flat(position, gradient, chain_ndim)
    number = num_features(len(x), x.shape[-1])

    def left(x: Array, slope: Array, values: Array) -> Array:
        features = _features(x, slope, x.mean(0), number)
        features, values = features - features.mean(0), values - values.mean(0)
        features = features / (jnp.sqrt(jnp.mean(jnp.square(features), 0)) + jnp.finfo(x.dtype).tiny)
        gram = features.T @ features + RIDGE * len(x) * jnp.eye(number, dtype=x.dtype)
        rest = values - features @ jax.scipy.linalg.solve(gram, features.T @ values, assume_a="pos")
        return rest.T @ rest / (len(x) - number - 1)

    return left(x, slope, values) if chain_ndim == 1 else jax.vmap(left, (1, 1, 1))(x, slope, values).sum(0)


def _flat(position: Sites, gradient: Sites, chain_ndim: int) -> tuple[Array, Array]:
    """Return both as ``[*C, d]``, with the sites in one order: JAX sorts the keys of what it differentiates."""
    flat = lambda sites: jnp.concatenate([sites[k].reshape((*sites[k].shape[:chain_ndim], -1)) for k in position], -1)
    return flat(position), flat(gradient)


def _features(x: Array, slope: Array, centre: Array, number: int) -> Array:
    """Return what has mean zero at the posterior, ``[N, number]``."""
    return jnp.concatenate([slope, 1 + (x - centre[None]) * slope], -1) if number > x.shape[-1] else slope


def reweighted(weight: Array, x: Array, slope: Array, number: int) -> Array:
    """Return weights ``[N]`` (``[N, D]``) by which the control variates of particles with ``weight`` have mean zero.

    Args:
        weight: sums to one over the leading axis.
        x: ``[N, d]`` (``[N, D, d]``) positions.
        slope: gradient of the log density there.
        number: of features: ``d``, or ``2 d``.
    """
    if weight.ndim > 1:
        return jax.vmap(reweighted, (1, 1, 1, None), 1)(weight, x, slope, number)
    corrections, ratio = _corrections(weight, x, slope, number)
    total = jnp.sum(corrections / jnp.maximum(ratio / FAR, 1.0)[:, None], 0)
    return weight - jnp.where(jnp.isfinite(total).all(), total, 0.0)


def _usual(number: int) -> float:
    """Return the mean of χ² and four of its standard deviations: equilibrium is seldom as far."""
    return number + 4 * (2 * number) ** 0.5


def _corrections(weight: Array, x: Array, slope: Array, number: int) -> tuple[Array, Array]:
    """Return what each fold takes from the weights ``[FOLDS, N]``, and its distance ``[FOLDS]`` over what is usual."""
    fold = jnp.arange(len(x)) % FOLDS
    inside = (fold[None] == jnp.arange(FOLDS)[:, None]).astype(x.dtype)  # [FOLDS, N]

    def correction(inside: Array) -> tuple[Array, Array]:
        share = jnp.sum(inside * weight)
        mine, others = inside * weight / share, (1 - inside) * weight / (1 - share)
        features = _features(x, slope, others @ x, number)
        centred = features - (others @ features)[None]
        scale = jnp.sqrt(others @ jnp.square(centred)) + jnp.finfo(x.dtype).tiny
        centred, mean = centred / scale[None], mine @ features / scale
        gram = (others[None] * centred.T) @ centred + RIDGE * jnp.eye(number, dtype=x.dtype)
        coefficient = jax.scipy.linalg.solve(gram, mean, assume_a="pos")
        distance = mean @ coefficient / jnp.sum(jnp.square(mine))
        return share * others * (centred @ coefficient), distance / _usual(number)

    return jax.vmap(correction)(inside)
