"""Particles against NUTS with the parameters held at the fit, with default draws."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from numpyro import handlers
from numpyro.diagnostics import split_gelman_rubin
from numpyro.infer import MCMC, NUTS

from numpyro_ebipla import EBIPLA

#: See tests/conftest.py.
RUNS_LONG = True


def counts(keys):
    return (random.poisson(keys[1], jnp.exp(0.8 + 0.6 * random.normal(keys[2], (12,)))),)


def labels(keys):
    covariates = random.normal(keys[0], (40, 3))
    return covariates, random.bernoulli(keys[3], jax.nn.sigmoid(covariates @ jnp.array([1.0, -1.0, 0.5]))).astype(int)


def table(keys):
    return (random.poisson(keys[4], 2.0 * jnp.ones((8, 3))),)


def local(y):
    mean = numpyro.param("mean", 0.0)
    sd = numpyro.param("sd", 1.0, constraint=dist.constraints.positive)
    with numpyro.plate("data", len(y)):
        x = numpyro.sample("x", dist.Normal(mean, sd))
        numpyro.sample("y", dist.Poisson(jnp.exp(x)), obs=y)


def global_(z, y):
    sd = numpyro.param("sd", 1.0, constraint=dist.constraints.positive)
    w = numpyro.sample("w", dist.Normal(0, sd).expand([3]).to_event(1))
    with numpyro.plate("data", len(y)):
        numpyro.sample("y", dist.BernoulliLogits(z @ w), obs=y)


def constrained(y):
    """Local latents on the simplex and the half line, given a global one that sets their scale."""
    sd = numpyro.param("sd", 1.0, constraint=dist.constraints.positive)
    scale = numpyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with numpyro.plate("data", len(y)):
        to_simplex = dist.transforms.StickBreakingTransform()
        p = numpyro.sample("p", dist.TransformedDistribution(dist.Normal(0, sd).expand([2]).to_event(1), to_simplex))
        r = numpyro.sample("r", dist.HalfNormal(scale))
        numpyro.sample("y", dist.Poisson(3 * r[..., None] * p).to_event(1), obs=y)


@pytest.mark.slow_but("global_-labels")
@pytest.mark.parametrize(
    "model, data", [(local, counts), (global_, labels), (constrained, table)], ids=lambda x: x.__name__
)
def test_particles_agree_with_nuts(model, data):
    args = data(random.split(random.key(0), 5))
    fit = EBIPLA(model, num_steps=500).run(random.key(1), *args, progress_bar=False)
    nuts = NUTS(handlers.substitute(model, data=fit.params))
    mcmc = MCMC(nuts, num_warmup=500, num_samples=5000, progress_bar=False)
    mcmc.run(random.key(2), *args)
    ours = fit.get_samples()
    for name, exact in mcmc.get_samples().items():
        pooled = ours[name].reshape((-1, *ours[name].shape[2:]))
        sd = exact.std(0)
        np.testing.assert_array_less(np.abs(pooled.mean(0) - exact.mean(0)), 0.1 * sd)
        np.testing.assert_array_less(np.abs(pooled.std(0) - sd), 0.1 * sd)
        assert split_gelman_rubin(ours[name]).max() < 1.02


def test_data_of_very_different_information_have_their_posteriors():
    """A count of 5,000 says a hundred times more of its latent than a count of none."""
    counts = jnp.array([0, 0, 1, 2, 1, 0, 3, 0, 1, 5000])

    def model(y):
        mean = numpyro.param("mean", 0.0)
        with numpyro.plate("data", len(y)):
            x = numpyro.sample("x", dist.Normal(mean, 3))
            numpyro.sample("y", dist.Poisson(jnp.exp(x)), obs=y)

    fit = EBIPLA(model, num_steps=1000, num_particles=16).run(random.key(0), counts, progress_bar=False)
    x = fit.get_samples()["x"].astype(float)
    grid = np.linspace(-25, 15, 400_001)[:, None]
    log_p = -0.5 * ((grid - float(fit.params["mean"])) / 3) ** 2 + np.asarray(counts) * grid - np.exp(grid)
    p = np.exp(log_p - log_p.max(0))
    p /= p.sum(0)
    mean = (p * grid).sum(0)
    sd = np.sqrt((p * (grid - mean) ** 2).sum(0))
    assert np.max(split_gelman_rubin(x)) < 1.02
    np.testing.assert_array_less(np.abs(x.mean((0, 1)) - mean) / sd, 0.1)
    np.testing.assert_array_less(np.abs(x.std((0, 1)) / sd - 1), 0.1)
