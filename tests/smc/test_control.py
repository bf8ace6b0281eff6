"""Control variates as weights: what they make exact, what they leave unbiased, and when they are off."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from scipy.optimize import minimize
from scipy.stats import multivariate_normal

from numpyro_ebipla import EBIPLA, MALA, Particles
from numpyro_ebipla._core.state import Latents
from numpyro_ebipla.particles.block import Terms
from numpyro_ebipla.particles.moves import follow
from numpyro_ebipla.smc.control import RIDGE, control_weights

#: See tests/conftest.py.
RUNS_LONG = True


@pytest.mark.parametrize("num", [32, 101])
def test_means_and_variances_of_a_normal_posterior_are_exact(num):
    """Scores of locations and scales are linear and quadratic: nothing is left of their noise but the ridge."""
    mean, sd = jnp.array([3.0, -200.0, 1e-3]), jnp.array([2.0, 0.5, 1e-4])
    noise = random.normal(random.key(0), (num, 3))
    x = mean + sd * noise
    weight = control_weights({"a": x[:, :1], "b": x[:, 1:]}, {"a": (-noise / sd)[:, :1], "b": (-noise / sd)[:, 1:]}, 1)
    weight = np.asarray(weight, np.float64)
    np.testing.assert_allclose(weight.sum(), 1, atol=1e-5)
    white = np.asarray(noise, np.float64)
    left = 10 * RIDGE / np.sqrt(num) + 2e-5  # and rounding
    assert np.all(np.abs(white.mean(0)) > 2 * left), "the plain mean is noisy"
    np.testing.assert_allclose(weight @ white, 0, atol=left)
    np.testing.assert_allclose(weight @ white**2, 1, atol=2 * left)


def test_a_skewed_posterior_has_no_bias():
    """log of a gamma variate of shape 2: means over many sets of particles are right, and far less noisy."""
    shape, sets, num = 2.0, 4000, 16
    x = jnp.log(random.gamma(random.key(1), shape, (num, sets)))
    weight = control_weights({"x": x}, {"x": shape - jnp.exp(x)}, 2)
    estimates, truth = np.asarray(jnp.sum(weight * x, 0), np.float64), float(jax.scipy.special.digamma(shape))
    assert abs(estimates.mean() - truth) < 3 * estimates.std() / np.sqrt(sets)
    assert estimates.std() < 0.6 * float(x.mean(0).std())


def test_nothing_is_cut_off_in_equilibrium():
    """A bound on what features say, which are skewed, was met by 0.7 % of such data, and the mean of x² 0.16 % off."""
    x = random.normal(random.key(5), (14, 40_000, 1))
    weight = control_weights({"x": x}, {"x": -x}, 2)
    off = np.asarray(jnp.sum(weight[..., None] * jnp.square(x), 0), np.float64) - 1
    assert np.abs(off).max() < 2e-3 and abs(off.mean()) < 1e-6, "but for the ridge and rounding"


def test_gradients_that_are_not_finite_leave_equal_weights():
    x = random.normal(random.key(2), (16, 1))
    weight = control_weights({"x": x}, {"x": -x.at[3].set(jnp.nan)}, 1)
    np.testing.assert_allclose(weight, 1 / 16)


def test_particles_are_taken_along_in_one_step():
    """A normal posterior's mean is known from any particles; in equilibrium, however few they are, nothing moves."""
    mean, sd = jnp.array([1e3, -5.0, 0.0]), jnp.array([2.0, 0.1, 1.0])
    at = lambda latents: Terms(-0.5 * jnp.sum(jnp.square((latents.local["x"] - mean) / sd), -1), jnp.zeros(24))
    noise = sd * random.normal(random.key(3), (24, 400, 3))  # of 400 data
    behind = noise.at[:, :5].add(-300 * sd)
    moved, known = follow(at, 1.0, Latents({"x": mean + behind}, {}))
    np.testing.assert_array_equal(moved.local["x"][:, 5:], (mean + noise)[:, 5:])
    # What is left is that of the regression's ridge and of rounding, in sds of the posterior.
    np.testing.assert_allclose(((moved.local["x"] - mean) / sd).mean(0)[:5], 0, atol=300 * 10 * RIDGE + 1e-2)
    np.testing.assert_allclose(known.local.log_density, at(moved).per_datum, rtol=1e-5)
    np.testing.assert_allclose(known.local.gradient["x"], -(moved.local["x"] - mean) / sd**2, rtol=1e-4, atol=1e-2)


def test_a_shift_that_lowers_the_density_is_not_taken():
    """Slopes of a density that is flat far out point too far: linear, they would end beyond the other tail."""
    at = lambda latents: Terms(-jnp.log1p(jnp.square(latents.local["x"])), jnp.zeros(16))
    x = 100 + random.normal(random.key(4), (16, 1))
    moved, known = follow(at, 1.0, Latents({"x": x}, {}))
    before = at(Latents({"x": x}, {})).per_datum.mean()
    assert known.local.log_density.mean() >= before and jnp.abs(moved.local["x"]).max() < 110


def prepared(model, *args, num_particles=32, **options):
    """The particles' weights at the first step."""
    from numpyro_ebipla.model.blocks import Batch
    from numpyro_ebipla.training.step import prepare, step_keys

    ebipla = EBIPLA(model, num_particles=num_particles, **options)
    state = ebipla.init(random.key(0), *args)
    call = ebipla._systems.read(args, {})
    config, keys = ebipla._systems.of_state(state, call).config, step_keys(state)
    indices = jnp.arange(config.model.batch_size) if config.model.subsampled else None
    return prepare(config, state, Batch(indices, call.data, keys.model, {}), keys)[0].weight


def test_where_they_are_off():
    from tests.models import global_latent, hierarchy

    y = jnp.linspace(-1.0, 1.0, 8)
    assert prepared(hierarchy, y).shape == (32, 8) and prepared(global_latent, y).shape == (32,)
    assert prepared(global_latent, y, 4) is None, "a minibatch does not know the slope of a global latent"
    assert prepared(hierarchy, y, num_particles=4) is None
    assert prepared(hierarchy, y, posterior=Particles(MALA(), quiet=False)) is None


def grouped(which, far=23.0):
    """A mixed model written as everyone writes it, its data and minus its exact log likelihood."""
    rng = np.random.default_rng(0)
    positive = dist.constraints.positive
    if which == "intercepts":
        g = np.repeat(np.arange(6), 24)
        y = far + 1.8 * rng.standard_normal(6)[g] + 0.55 * rng.standard_normal(144)
        features = np.ones((144, 1))
    elif which == "many intercepts":
        g = np.concatenate([np.arange(150), np.random.default_rng(1).integers(0, 150, 450)])
        y = far + 1.8 * rng.standard_normal(150)[g] + 0.55 * rng.standard_normal(600)
        features = np.ones((600, 1))
    elif which == "many slopes":
        g, t = np.repeat(np.arange(72), 6), np.tile(np.arange(6.0), 72)
        y = 16 + 7 * t + (5 * rng.standard_normal(72))[g] + rng.standard_normal(72)[g] * t
        y += 2 * rng.standard_normal(len(y))
        features = np.stack([np.ones_like(t), t], -1)
    else:
        g, t = np.repeat(np.arange(8), 12), np.tile(np.arange(12.0), 8)
        y = 250 + 10 * t + (24 * rng.standard_normal(8))[g] + (6 * rng.standard_normal(8))[g] * t
        y += 25 * rng.standard_normal(len(y))
        features = np.stack([np.ones_like(t), t], -1)
    num_groups, width = g.max() + 1, features.shape[1]

    def model(g, features, y):
        beta = numpyro.param("beta", jnp.zeros(width))
        scale = numpyro.param("scale", jnp.ones(width), constraint=positive)
        sigma = numpyro.param("sigma", 1.0, constraint=positive)
        with numpyro.plate("groups", num_groups):
            u = numpyro.sample("u", dist.Normal(0, scale).to_event(1))
        with numpyro.plate("obs", len(y)):
            numpyro.sample("y", dist.Normal(jnp.sum(features * (beta + u[g]), -1), sigma), obs=y)

    def loss(p):
        beta, scale, sigma = p[:width], np.exp(p[width:-1]), np.exp(p[-1])
        cov = (g[:, None] == g) * ((features * scale**2) @ features.T) + sigma**2 * np.eye(len(y))
        return -multivariate_normal(features @ beta, cov).logpdf(y)

    return model, (g, features.astype(np.float32), y.astype(np.float32)), loss


@pytest.mark.slow_but("intercepts")
@pytest.mark.parametrize("which", ["intercepts", "slopes"])
def test_mixed_models_from_naive_starts(which):
    """From zeros and ones s swallowed the mean, which then crept: 20 nats short after 5000 steps, and after 30,000."""
    check_arrival(*grouped(which))


def test_a_mean_of_three_hundred_standard_deviations():
    """It was to move by thousands of sds of the latents' posterior, and waited for the particles: 33 nats short."""
    check_arrival(*grouped("intercepts", far=300.0))


@pytest.mark.slow_but("intercepts")
@pytest.mark.parametrize("which", ["many intercepts", "many slopes"])
def test_many_groups(which):
    """Beyond 128 latents there were no control variates: the mean of 72 pigs' slopes stood 163 nats below lme4's."""
    check_arrival(*grouped(which), num_steps=1200)


def check_arrival(model, args, loss, **options):
    fit = EBIPLA(model, num_samples=20, **options).run(random.key(0), *args, progress_bar=False)
    theta = {k: np.asarray(v, np.float64) for k, v in fit.params.items()}
    found = np.concatenate([theta["beta"], np.log(theta["scale"]), np.log(theta["sigma"])[None]])
    best = minimize(loss, found, method="BFGS")
    assert loss(found) - best.fun < 0.02, "nats in total, not per datum"
