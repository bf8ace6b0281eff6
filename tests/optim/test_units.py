"""Parameters whose numbers have different units, from zeros and ones: all numbers of a vector reach the maximum."""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from scipy.linalg import block_diag
from scipy.optimize import minimize
from scipy.stats import multivariate_normal

from numpyro_ebipla import EBIPLA

#: See tests/conftest.py.
RUNS_LONG = True
POSITIVE = dist.constraints.positive


def regression():
    """Years, an income and a sex beside random intercepts: one vector of coefficients, from 3e-4 to 120."""
    rng, g = np.random.default_rng(0), np.repeat(np.arange(30), 10)
    age, income, sex = rng.normal(0, 12, 300), rng.normal(0, 10_000, 300), rng.random(300) < 0.5
    features = np.stack([np.ones(300), age, income, sex], 1).astype(np.float32)
    y = features @ [120, 0.5, 3e-4, -5] + 6 * rng.normal(size=30)[g] + 9 * rng.normal(size=300)

    def model(features, y):
        b = numpyro.param("b", jnp.zeros(4))
        s, noise = (numpyro.param(name, 1.0, constraint=POSITIVE) for name in ("s", "noise"))
        with numpyro.plate("groups", 30):
            u = numpyro.sample("u", dist.Normal(0, s))
        with numpyro.plate("data", 300):
            numpyro.sample("y", dist.Normal(features @ b + u[g], noise), obs=y)

    def log_likelihood(b, s, noise):
        one = s**2 * np.ones((10, 10)) + noise**2 * np.eye(10)
        return multivariate_normal(features @ b, block_diag(*[one] * 30)).logpdf(y)

    start = [*np.linalg.lstsq(features, y, rcond=None)[0], np.log(6), np.log(9)]
    scale = np.array([1, 0.05, 1e-4, 1, 0.1, 0.1])
    at = lambda x: (x[:4], *np.exp(x[4:]))
    return model, (features, y.astype(np.float32)), log_likelihood, ("b", "s", "noise"), at, start, scale


def factor():
    """One factor behind indicators of about 1 and of hundreds: vectors of means, loadings and noises."""
    rng, units = np.random.default_rng(405), np.array([1.0, 1.0, 100.0, 10.0])
    y = units * (np.arange(2, 6) + rng.normal(size=(150, 1)) * [1, 0.8, 0.6, 0.9] + 0.7 * rng.normal(size=(150, 4)))

    def model(y):
        m, w = numpyro.param("m", jnp.zeros(4)), numpyro.param("w", jnp.ones(4))
        noise = numpyro.param("noise", jnp.ones(4), constraint=POSITIVE)
        with numpyro.plate("data", 150):
            x = numpyro.sample("x", dist.Normal(0, 1))
            numpyro.sample("y", dist.Normal(m + x[:, None] * w, noise).to_event(1), obs=y)

    def log_likelihood(m, w, noise):
        return multivariate_normal(m, np.outer(w, w) + np.diag(noise**2)).logpdf(y).sum()

    start = [*y.mean(0), *(0.8 * units), *np.log(0.7 * units)]
    at = lambda x: (x[:4], x[4:8], np.exp(x[8:]))
    return model, (y.astype(np.float32),), log_likelihood, ("m", "w", "noise"), at, start, [*units, *units, *np.ones(4)]


@pytest.mark.parametrize("make", [regression, factor])
def test_numbers_of_a_vector_may_have_different_units(make):
    """They shared one reach: 92 nats short after 5000 steps, and with six indicators 131."""
    model, args, log_likelihood, names, at, start, scale = make()
    loss = lambda z: -log_likelihood(*at(start + z * np.asarray(scale)))
    best = -minimize(loss, np.zeros(len(start)), method="BFGS", options={"gtol": 1e-4}).fun
    fit = EBIPLA(model).run(random.key(0), *args, num_steps=4000, num_samples=0, progress_bar=False)
    short = best - log_likelihood(*(np.asarray(fit.params[name], float) for name in names))
    assert -1e-4 < short < 0.02, short
