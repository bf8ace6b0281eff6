"""The mixture that a ladder starts from: normalised, drawn from as it says, and no change of what is tilted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random

from numpyro_ebipla import Tempered
from numpyro_ebipla.smc.density import TiltedDensity
from numpyro_ebipla.smc.reference import LEAST_RATIO, Reference


def normal_base(dim, energy):
    log_base = lambda x: -0.5 * jnp.sum(x**2, -1) - 0.5 * dim * jnp.log(2 * jnp.pi)
    return TiltedDensity(log_base, energy, lambda key, num: random.normal(key, (num, dim)))


def fitted(x, rounds=400):
    """The reference after many steps with the same particles."""
    first = Reference.of(random.normal(random.key(9), (1000, *x.shape[1:])), x.ndim - 1)
    step = lambda reference, _: (reference.updated(x, 0.05), None)
    return jax.lax.scan(step, first, None, rounds)[0]


def test_moments_are_those_of_the_particles():
    x = random.normal(random.key(0), (500, 3)) @ jnp.array([[2.0, 1.0, 0.0], [0.0, 0.5, 0.3], [0.0, 0.0, 1e-9]]) + 40.0
    reference = fitted(x)
    np.testing.assert_allclose(reference.mean, x.mean(0), rtol=1e-4)
    np.testing.assert_allclose(reference.covariance, np.cov(x.T, bias=True), atol=2e-3)
    assert np.all(np.isclose(reference.least, LEAST_RATIO, rtol=0.3)), "of the first draws' variance"


@pytest.mark.parametrize("dim", [1, 2])
def test_the_mixture_is_normalised_and_tilted_to_the_same_density(dim):
    energy = lambda x: 0.3 * jnp.sum((x - 2.0) ** 2, -1)
    density = normal_base(dim, energy)
    mixed = fitted(3.0 + 0.5 * random.normal(random.key(1), (400, dim))).mixed_with(density)
    axis = np.linspace(-8, 10, 601)
    grid = jnp.asarray(np.stack(np.meshgrid(*[axis] * dim, indexing="ij"), -1).reshape(-1, dim), jnp.float32)
    np.testing.assert_allclose(np.exp(mixed.log_base(grid)).sum() * (axis[1] - axis[0]) ** dim, 1, rtol=1e-4)
    far = mixed.log_base(grid) > -60  # below, single precision cancels
    np.testing.assert_allclose(mixed.log_density(grid)[far], density.log_density(grid)[far], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dim", [3, 80])
def test_draws_are_of_the_density(dim):
    """E[N / q] = 1 = E[p0 / q] over draws of q, for a full covariance and for variances only."""
    density = normal_base(dim, lambda x: jnp.zeros(x.shape[:-1]))
    reference = fitted(0.5 + 1.3 * random.normal(random.key(2), (4000, dim)))
    mixed = reference.mixed_with(density)
    x = mixed.sample_base(random.key(3), 20_000)
    ratio = np.exp(np.asarray(density.log_base(x) - mixed.log_base(x), np.float64))
    assert abs(ratio.mean() - 1) < 3 * ratio.std() / np.sqrt(len(x))
    np.testing.assert_allclose(x.mean(0), 0.25, atol=4 * 1.25 / np.sqrt(len(x)) + 0.03)


def test_elements_with_a_normaliser_of_their_own():
    x = jnp.array([1.0, -50.0]) + random.normal(random.key(4), (2000, 2))
    reference = Reference.of(x, 2)
    assert reference.mean.shape == (2, 1) and reference.covariance.shape == (2, 1, 1)
    base = TiltedDensity(lambda x: -0.5 * x**2 - 0.919, jnp.zeros_like, lambda key, num: random.normal(key, (num, 2)))
    draws = reference.mixed_with(base).sample_base(random.key(5), 4000)
    np.testing.assert_allclose(draws.mean(0), [0.5, -25.0], atol=1.5)


@pytest.mark.slow_but("30.0-5.0", "0.0-0.2")
@pytest.mark.parametrize("scale", [0.2, 5.0, 100.0])
@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_tempered_walkers_know_log_z_however_far_the_base_is(scale, offset):
    """Target N(offset, scale²) in three dimensions, unnormalised by e⁻¹, over a standard normal base."""
    dim = 3

    def energy(x):
        return 0.5 * jnp.sum(((x - offset) / scale) ** 2 - x**2, -1) + 1.0

    density, strategy = normal_base(dim, energy), Tempered(num_walkers=64)
    state = strategy.init(random.key(0), density._replace(energy=lambda x: 0.0 * energy(x)))
    particles = offset + scale * random.normal(random.key(1), (256, dim))

    def step(state, key):
        walkers, state, info = strategy.prepare(key, density, state, particles)
        return state, (info["log_z"], jnp.sum(walkers.weight * walkers.position[:, 0]))

    _, (log_z, mean) = jax.lax.scan(step, state, random.split(random.key(2), 600))
    truth = dim * np.log(scale) - 1.0
    late = np.asarray(log_z[200:], np.float64)
    error = late.std() * np.sqrt(20 / len(late))  # neighbouring steps share their walkers
    assert abs(late.mean() - truth) < 3 * error + 0.02, (late.mean(), truth, error)
    assert abs(float(mean[200:].mean()) - offset) < 0.1 * scale
