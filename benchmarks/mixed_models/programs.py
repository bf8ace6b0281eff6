"""The models of ``python -m benchmarks.mixed_models``, in long format, and their data."""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pandas as pd
from numpyro.distributions import constraints


def code(column):
    """Return the group of each row, and how many there are."""
    codes, names = pd.factorize(column)
    return codes, len(names)


def single(column):
    """Return numbers as JAX has them."""
    return column.to_numpy(np.float32)


def positive(name):
    """Return a parameter above zero, from one."""
    return numpyro.param(name, 1.0, constraint=constraints.positive)


def lines(g, groups, t, y):
    """Regress with an intercept and a slope of each group's own, correlated."""
    b, sigma = numpyro.param("b", jnp.zeros(2)), positive("sigma")
    scale = numpyro.param("L", jnp.eye(2), constraint=constraints.lower_cholesky)
    with numpyro.plate("groups", groups):
        u = numpyro.sample("u", dist.MultivariateNormal(0, scale_tril=scale))[g]
    with numpyro.plate("data", len(y)):
        numpyro.sample("y", dist.Normal(b[0] + u[:, 0] + (b[1] + u[:, 1]) * t, sigma), obs=y)


def crossed(g, groups, h, others, y):
    """Add effects of two factors."""
    b, sigma = numpyro.param("b", jnp.zeros(1)), positive("sigma")
    with numpyro.plate("first", groups):
        u = numpyro.sample("u", dist.Normal(0, positive("s")))
    with numpyro.plate("second", others):
        v = numpyro.sample("v", dist.Normal(0, positive("r")))
    with numpyro.plate("data", len(y)):
        numpyro.sample("y", dist.Normal(b[0] + u[g] + v[h], sigma), obs=y)


def proportions(g, groups, period, size, y):
    """Compare four periods, herds having chances of their own."""
    b = numpyro.param("b", jnp.zeros(4))
    with numpyro.plate("groups", groups):
        u = numpyro.sample("u", dist.Normal(0, positive("s")))
    with numpyro.plate("data", len(y)):
        logits = b[0] + jnp.where(period > 0, b[period], 0.0) + u[g]
        numpyro.sample("y", dist.Binomial(size, logits=logits), obs=y)


def growth(g, t, y):
    """Grow logistically to a size of each tree's own."""
    b, sigma = numpyro.param("b", jnp.array([150.0, 700.0, 300.0])), positive("sigma")
    with numpyro.plate("groups", 5):
        u = numpyro.sample("u", dist.Normal(0, positive("s")))
    with numpyro.plate("data", len(y)):
        numpyro.sample("y", dist.Normal((b[0] + u[g]) / (1 + jnp.exp(-(t - b[1]) / b[2])), sigma), obs=y)


PROGRAMS = {
    "sleepstudy": lambda d: (lines, (*code(d.Subject), single(d.Days), single(d.Reaction))),
    "pigs": lambda d: (lines, (*code(d.Pig), single(d.Time), single(d.Weight))),
    "penicillin": lambda d: (crossed, (*code(d["plate"]), *code(d["sample"]), single(d.diameter))),
    "cbpp": lambda d: (proportions, (*code(d.herd), code(d.period)[0], d["size"].to_numpy(), d.incidence.to_numpy())),
    "orange": lambda d: (growth, (d.g.to_numpy(), single(d.t), single(d.y))),
}
