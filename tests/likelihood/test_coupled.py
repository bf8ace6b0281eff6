"""Log-likelihoods of many latents that all data share."""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from scipy.special import logsumexp
from scipy.stats import multivariate_normal

from numpyro_ebipla import EBIPLA

#: See tests/conftest.py.
RUNS_LONG = True


def nested(key_count=200):
    """Three levels of normal latents, and the exact log-likelihood; 400 latents of them were off by 4.2 ± 0.6."""
    rng = np.random.default_rng(0)
    num, broods, places = key_count, key_count * 3 // 10, key_count * 3 // 20
    brood = np.arange(num) * broods // num
    place = brood * places // broods
    y = rng.normal(0, 0.6, places)[place] + rng.normal(0, 0.75, broods)[brood] + rng.normal(0, 0.62, num)

    def model(brood, place, y):
        with numpyro.plate("place", places):
            w = numpyro.sample("w", dist.Normal(0, 0.6))
        with numpyro.plate("brood", broods):
            v = numpyro.sample("v", dist.Normal(0, 0.75))
        with numpyro.plate("obs", num):
            e = numpyro.sample("e", dist.Normal(0, 0.55))
            numpyro.sample("y", dist.Normal(w[place] + v[brood] + e, 0.3), obs=y)

    cov = 0.36 * (place[:, None] == place) + 0.5625 * (brood[:, None] == brood) + (0.3025 + 0.09) * np.eye(num)
    return model, (brood, place, y.astype(np.float32)), multivariate_normal(np.zeros(num), cov).logpdf(y)


def test_a_normal_posterior_is_exact():
    model, args, exact = nested()
    for seed in range(2):
        found = EBIPLA(model).log_likelihood(random.key(seed), {}, *args).total
        assert abs(float(found.value) - exact) < 0.01 and float(found.std_error) < 0.01


def counted(family):
    """Groups of four data with an intercept each, written as one block, and the exact log-likelihood by quadrature."""
    rng = np.random.default_rng(1)
    num_groups, n = 40, 4
    g = np.repeat(np.arange(num_groups), n)
    eta = 0.5 + (1.5 * rng.normal(size=num_groups))[g]
    y = (rng.random(len(g)) < 1 / (1 + np.exp(-eta))) if family == "bernoulli" else rng.poisson(np.exp(eta))
    law = {"bernoulli": lambda eta: dist.Bernoulli(logits=eta), "poisson": lambda eta: dist.Poisson(jnp.exp(eta))}

    def model(g, y):
        with numpyro.plate("groups", num_groups):
            u = numpyro.sample("u", dist.Normal(0, 1.5))
        with numpyro.plate("obs", len(y)):
            numpyro.sample("y", law[family](0.5 + u[g]), obs=y)

    grid = np.linspace(-12, 12, 4001)
    each = np.asarray(law[family](jnp.asarray(0.5 + grid)).log_prob(y[:, None].astype(np.float32)), np.float64)
    by_group = each.reshape(num_groups, n, -1).sum(1) - 0.5 * (grid / 1.5) ** 2 - np.log(1.5 * np.sqrt(2 * np.pi))
    return model, (g, y.astype(np.float32)), logsumexp(by_group + np.log(grid[1] - grid[0]), axis=1).sum()


@pytest.mark.parametrize("family", ["bernoulli", "poisson"])
def test_others_are_within_their_error(family):
    model, args, exact = counted(family)
    ebipla = EBIPLA(model)
    found = [ebipla.log_likelihood(random.key(seed), {}, *args).total for seed in range(4)]
    off = np.array([float(f.value) - exact for f in found])
    error = np.array([float(f.std_error) for f in found])
    assert np.all(error < 0.1) and np.all(np.abs(off) < 4 * error) and abs(off.mean()) < 2 * error.mean()
