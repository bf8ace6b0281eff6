"""Censored observations bounded by an edge of the support were refused as outside; NumPyro's gradient there is NaN."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from numpyro import handlers
from numpyro.infer.util import log_density

from numpyro_ebipla import ModelError
from numpyro_ebipla.model.blocks import Batch
from numpyro_ebipla.model.inspection import inspect_model

KEY = random.key(0)


def look(model, *args):
    """Look at a model, as every method does before its work."""
    return inspect_model(model, KEY, args, {})


def survival(distribution, base, value):
    def model(value):
        with numpyro.plate("data", len(value)):
            u = numpyro.sample("u", dist.Normal(numpyro.param("m", 0.0), 1))
            numpyro.sample("y", distribution(base(u)), obs=value)

    return model, jnp.array(value)


def weibull(u):
    return dist.Weibull(jnp.exp(u), 1.5)


def normal(u):
    return dist.Normal(u, 1.5)


def censored(kind, *flags):
    return lambda base: kind(base, *(jnp.array(flag) for flag in flags))


INTERVAL = dist.IntervalCensoredDistribution
INF = np.inf
#: Distribution, base, observations, and ``(lower, upper)`` within which each lies.
AT_EDGES = [
    (censored(INTERVAL, [0, 0, 1], [0, 1, 0]), weibull, [[0, 1], [2, INF], [0, 2]], [(0, 1), (2, INF), (0, 2)]),
    (censored(INTERVAL, [0, 0], [0, 0]), weibull, [[2, INF], [0, INF]], [(2, INF), (0, INF)]),
    (censored(INTERVAL, [1, 0], [0, 1]), normal, [[-INF, 1], [-INF, INF]], [(-INF, 1), (-INF, INF)]),
    (censored(INTERVAL, [0, 1], [0, 1]), normal, [[-INF, 1], [0, 1]], [(-INF, 1), None]),
    (censored(dist.RightCensoredDistribution, [1, 1]), weibull, [0, 2], [(0, INF), (2, INF)]),
    (censored(dist.RightCensoredDistribution, [1, 1]), normal, [-INF, 2], [(-INF, INF), (2, INF)]),
    (censored(dist.LeftCensoredDistribution, [1, 1]), normal, [INF, 2], [(-INF, INF), (-INF, 2)]),
]


@pytest.mark.parametrize(("distribution", "base", "value", "within"), AT_EDGES)
def test_faults_censored_at_the_edge_of_the_support(distribution, base, value, within):
    """They were refused as outside of it; NumPyro takes them, but gives NaN for the gradient."""
    model, value = survival(distribution, base, value)
    found = look(model, value)
    batch = Batch(None, found.data, KEY, {})
    at = jnp.linspace(-0.5, 0.5, len(value))

    def log_joint(u):
        joint = found.model.log_joint({"m": 0.0}, {"u": u[None]}, {}, batch, {})
        return joint.per_datum.sum()

    def exact(u):
        total = dist.Normal(0, 1).log_prob(u).sum()
        for x, lies in zip(u, within, strict=True):
            cdf = lambda t, x=x: (
                0.0 if (t <= 0 and base is weibull) or t == -INF else 1.0 if t == INF else base(x).cdf(t)
            )
            inside = 1 - (cdf(1.0) - cdf(0.0)) if lies is None else cdf(lies[1]) - cdf(lies[0])
            total += jnp.log(inside)
        return total

    np.testing.assert_allclose(log_joint(at), exact(at), rtol=1e-4)
    np.testing.assert_allclose(jax.grad(log_joint)(at), jax.grad(exact)(at), rtol=1e-3, atol=1e-4)


def test_faults_censored_inside_masks_and_plates():
    def model(value):
        with numpyro.plate("rows", 2, dim=-2), numpyro.plate("data", 3):
            u = numpyro.sample("u", dist.Normal(0, 1))
            with handlers.mask(mask=jnp.array([True, True, False])):
                numpyro.sample("y", dist.RightCensoredDistribution(weibull(u), True), obs=value)

    def expanded(value):
        m = numpyro.param("m", 0.0)
        with numpyro.plate("rows", 2, dim=-2), numpyro.plate("data", 3):
            numpyro.sample("z", dist.Normal(m, 1))
            numpyro.sample("y", dist.RightCensoredDistribution(weibull(m), True), obs=value)

    for each in (model, expanded):
        found = look(each, jnp.array([[0.0, 1.0, 2.0], [2.0, 0.0, 0.0]]))
        particle = found.model.draw_latents({"m": 0.0}, Batch(None, found.data, KEY, {}))
        batched = jax.tree.map(lambda x: x[None], particle)
        joint = found.model.log_joint({"m": 0.0}, *batched, Batch(None, found.data, KEY, {}), {})
        values = {name: jnp.moveaxis(x, 0, -1) for name, x in particle[0].items()}
        data = [found.data[0].at[jnp.where(found.data[0] == 0)].set(1e-30)]  # NumPyro's density is right just inside
        exact, _ = log_density(each, data, {}, values | {"m": 0.0})
        np.testing.assert_allclose(joint.per_datum.sum() + joint.rest.sum(), exact, rtol=1e-4)


@pytest.mark.unit
@pytest.mark.parametrize(
    ("distribution", "value"),
    [
        (censored(dist.RightCensoredDistribution, [0, 1]), [0, 2]),
        (censored(dist.RightCensoredDistribution, [1, 1]), [-1, 2]),
        (censored(dist.LeftCensoredDistribution, [1, 1]), [0, 2]),
        (censored(INTERVAL, [0, 0], [0, 0]), [[2, 1], [1, 2]]),
        (censored(INTERVAL, [0, 0], [0, 0]), [[-1, 1], [1, 2]]),
    ],
)
def test_faults_censored_outside_the_support_is_refused(distribution, value):
    model, value = survival(distribution, weibull, value)
    with pytest.raises(ModelError, match="'y' lie outside the support"):
        look(model, value)
