"""Wald intervals of 200 simulations of four models cover the truth 95 times of 100."""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random

from tests.models import fitter, one_level

#: See tests/conftest.py.
RUNS_LONG = True
SIMULATIONS = 200
POSITIVE = dist.constraints.positive
COVARIATE = np.linspace(-1, 1, 200).astype(np.float32)


def intercepts(y):
    mu, s = numpyro.param("mu", 0.0), numpyro.param("s", 1.0, constraint=POSITIVE)
    noise = numpyro.param("noise", 1.0, constraint=POSITIVE)
    with numpyro.plate("groups", len(y)):
        u = numpyro.sample("u", dist.Normal(0, s))
        numpyro.sample("y", dist.Normal(mu + u[:, None], noise).expand([len(y), 5]).to_event(1), obs=y)


def counts(y):
    b, s = numpyro.param("b", jnp.zeros(2)), numpyro.param("s", 1.0, constraint=POSITIVE)
    with numpyro.plate("data", len(y)):
        u = numpyro.sample("u", dist.Normal(0, s))
        numpyro.sample("y", dist.Poisson(jnp.exp(b[0] + b[1] * COVARIATE + u)), obs=y)


def responses(y):
    easiness = numpyro.param("easiness", jnp.zeros(6))
    slope = numpyro.param("slope", 1.0, constraint=POSITIVE)
    with numpyro.plate("people", len(y)):
        ability = numpyro.sample("ability", dist.Normal(0, 1))
        numpyro.sample("y", dist.Bernoulli(logits=easiness + slope * ability[:, None]).to_event(1), obs=y)


def simulate(rng, name):
    """Return a data set, and the truth in the order of the table."""
    normal = rng.normal
    if name == "one level":
        return 1 + np.hypot(1, 1.2) * normal(size=100), [1, 1.2]
    if name == "intercepts":
        return 20 + 3 * normal(size=(60, 1)) + 2 * normal(size=(60, 5)), [20, 2, 3]
    if name == "counts":
        return rng.poisson(np.exp(1 + 0.5 * COVARIATE + 0.7 * normal(size=200))), [1, 0.5, 0.7]
    easiness = np.linspace(-1.5, 1.5, 6)
    chance = 1 / (1 + np.exp(-(easiness + 1.3 * normal(size=(300, 1)))))
    return rng.random((300, 6)) < chance, [*easiness, 1.3]


MODELS = {"one level": one_level, "intercepts": intercepts, "counts": counts, "responses": responses}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_intervals_cover(name):
    """Within three binomial deviations: between 90.4 and 99.6 %."""
    rng, hits = np.random.default_rng(1), []
    ebipla = fitter(MODELS[name])
    for i in range(SIMULATIONS):
        y, truth = simulate(rng, name)
        table = ebipla.run(random.key(i), y.astype(np.float32), num_steps=900, progress_bar=False).summary()
        hits.append((table.lower <= truth) & (table.upper >= truth))
    cover = np.mean(hits, 0)
    print(f"{name}: {dict(zip(table.names, cover, strict=True))}")
    assert np.all(np.abs(cover - 0.95) < 3 * np.sqrt(0.0475 / SIMULATIONS)), cover
