"""Standard errors of chosen parameters, by scores and clusters, and of energies: against exact scores and Hessians."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random

from numpyro_ebipla import ModelError
from numpyro_ebipla.results.information import chosen_params, scores
from tests.models import fitter, latent_energy, observed_energy
from tests.results.test_estimates import GROUP, cases, one_level, slopes

#: See tests/conftest.py.
RUNS_LONG = True

CLUSTER = np.arange(200) // 4


def covariances(density, params, clusters=None):
    """Return H⁻¹ (with clusters B⁻¹ and H⁻¹ B H⁻¹) of ``density(params) -> [M]``, in the space of the parameters."""
    with jax.enable_x64(True):
        at = jax.tree.map(lambda x: jnp.asarray(np.asarray(x), jnp.float64), params)
        flat, unflatten = jax.flatten_util.ravel_pytree(at)
        score = np.asarray(jax.jacfwd(lambda v: density(unflatten(v)))(flat))
        hessian = np.asarray(jax.hessian(lambda v: -density(unflatten(v)).sum())(flat))
    bread = np.linalg.inv(hessian)
    if clusters is None:
        return {"information": bread}
    total = np.stack([score[clusters == k].sum(0) for k in np.unique(clusters)])
    meat = total.T @ total
    return {"information": bread, "scores": np.linalg.inv(meat), "sandwich": bread @ meat @ bread}


def errors(covariance):
    return np.sqrt(np.diag(covariance))


@pytest.fixture(scope="module")
def skewed():
    """Data that the model is wrong for, so that the three covariances differ."""
    y = np.random.default_rng(0).gamma(1.5, 1.5, 200)
    y = (y + np.repeat(np.random.default_rng(1).normal(size=50), 4)).astype(np.float32)
    return fitter(one_level).run(random.key(0), y, num_steps=2500, progress_bar=False), y


@pytest.mark.parametrize("clustered", [False, True])
def test_scores_and_sandwiches_are_exact(skewed, clustered):
    """Within 3 %, also by clusters; the three differ by more than that."""
    fit, y = skewed
    density = lambda p: dist.Normal(p["mu"], jnp.sqrt(1 + p["s"] ** 2)).log_prob(jnp.asarray(y, jnp.float64))
    exact = covariances(density, fit.params, CLUSTER if clustered else np.arange(200))
    for kind in ("scores", "sandwich"):
        found = fit.covariance(kind=kind, cluster=CLUSTER if clustered else None)
        np.testing.assert_allclose(errors(found.value), errors(exact[kind]), rtol=0.03)
        assert abs(errors(exact[kind]) / errors(exact["information"]) - 1).max() > 0.1
    table = fit.summary(kind="sandwich", cluster=CLUSTER if clustered else "data")
    np.testing.assert_allclose(table.std_error, errors(exact["sandwich"]), rtol=0.03)


def test_chosen_parameters_are_those_of_a_model_where_the_others_are_known(skewed):
    fit, _ = skewed
    known = np.sqrt((1 + float(fit.params["s"]) ** 2) / 200)
    assert fit.standard_errors(["mu"]) == {"mu": pytest.approx(known, rel=0.03)}
    assert fit.summary(params="mu").names == ("mu",)
    with pytest.raises(ModelError, match=r"there is no parameter 'w'; there are \['mu', 's'\]"):
        fit.standard_errors(["w"])


def test_functions_of_the_parameters_by_the_delta_method(skewed):
    """In the order given, and with other parameters known where they are chosen."""
    fit, _ = skewed
    mu, s = float(fit.params["mu"]), float(fit.params["s"])
    table = fit.summary(functions={"variance": lambda p: p["s"] ** 2, "at": lambda p: p["mu"] + jnp.arange(2) * p["s"]})
    assert table.names == ("variance", "at[0]", "at[1]")
    np.testing.assert_allclose(table.estimate, [s**2, mu, mu + s], rtol=1e-5)
    covariance = fit.covariance().value
    expected = [4 * s**2 * covariance[1, 1], covariance[0, 0], covariance.sum()]
    np.testing.assert_allclose(table.std_error, np.sqrt(expected), rtol=1e-3)
    alone = fit.summary(params="s", functions={"at": lambda p: p["mu"] + p["s"]})
    np.testing.assert_allclose(alone.std_error, fit.summary(params="s").std_error, rtol=1e-3)


def test_parameters_beside_a_network():
    """Its 40 weights are too many; the mean is that of data of known variance."""

    def model(y):
        w, mu = numpyro.param("w", 0.1 * jnp.ones(40)), numpyro.param("mu", 0.0)
        with numpyro.plate("data", len(y)):
            x = numpyro.sample("x", dist.Normal(mu + 0.0 * w.sum(), 1))
            numpyro.sample("y", dist.Normal(x, 1), obs=y)

    y = np.random.default_rng(0).normal(1, np.sqrt(2), 100).astype(np.float32)
    fit = fitter(model).run(random.key(0), y, num_steps=500, progress_bar=False)
    assert fit.standard_errors(["mu"])["mu"] == pytest.approx(np.sqrt(2 / 100), rel=0.03)
    with pytest.raises(ModelError, match="more than 32 parameters: name some"):
        fit.standard_errors()


def test_groups_of_a_mixed_model_in_long_format():
    """Latents of groups couple the data; the groups themselves are independent."""
    _, _, (t, y) = cases()["slopes"]
    t, y = t.astype(np.float32), y.astype(np.float32)
    fit = fitter(slopes).run(random.key(0), t, y, num_steps=2500, progress_bar=False)

    def density(p):
        X = jnp.stack([jnp.ones(6), t[:6]], 1)
        cov = (X * p["s"] ** 2) @ X.T + p["noise"] ** 2 * jnp.eye(6)
        return dist.MultivariateNormal(X @ p["beta"], cov).log_prob(jnp.asarray(y, jnp.float64).reshape(8, 6))

    exact = covariances(density, fit.params, np.arange(8))
    by_group = {"groups": range(8), "data": GROUP}
    for kind in ("scores", "sandwich"):
        found = fit.covariance(kind=kind, cluster=by_group)
        np.testing.assert_allclose(errors(found.value), errors(exact[kind]), rtol=0.03)
    for cluster, words in (
        (None, "'u' couples the data"),
        ("groups", "depend on the parameters, and belong to no cluster"),
        ({"data": GROUP}, "the latent 'u' lies in none of"),
        ({"groups": range(8), "data": GROUP[:5]}, "each of the 48 elements of 'data'"),
        ({"groups": range(8), "visits": GROUP}, "there is no plate 'visits'"),
    ):
        with pytest.raises(ModelError, match=words):
            fit.standard_errors(kind="sandwich", cluster=cluster)
    with pytest.raises(ValueError, match="cluster belongs to"):
        fit.standard_errors(cluster=by_group)
    with pytest.raises(ValueError, match="kind must be one of"):
        fit.standard_errors(kind="robust")


@pytest.mark.slow_but("8-few")
@pytest.mark.parametrize("groups", [pytest.param(8, id="8-few"), 80])
def test_effects_of_groups_beside_those_of_data(groups):
    """The latents of 480 data are more than particles: their noise hid the curvature of their standard deviation."""
    rng, group = np.random.default_rng(6), np.arange(480) % groups
    y = 3 + rng.normal(size=groups)[group] + 0.7 * rng.normal(size=480) + 0.4 * rng.normal(size=480)
    y = y.astype(np.float32)

    def both(y):
        scale = lambda name: numpyro.param(name, 1.0, constraint=dist.constraints.positive)
        mu = numpyro.param("mu", 0.0)
        with numpyro.plate("groups", groups):
            u = numpyro.sample("u", dist.Normal(0, scale("s")))
        with numpyro.plate("data", 480):
            v = numpyro.sample("v", dist.Normal(0, scale("t")))
            numpyro.sample("y", dist.Normal(mu + u[group] + v, 0.4), obs=y)

    fit = fitter(both).run(random.key(0), y, num_steps=1500, progress_bar=False)
    same = jnp.asarray(group[:, None] == group)

    def density(p):
        cov = p["s"] ** 2 * same + (p["t"] ** 2 + 0.16) * jnp.eye(480)
        return dist.MultivariateNormal(jnp.full(480, p["mu"]), cov).log_prob(jnp.asarray(y, jnp.float64))

    exact = covariances(density, fit.params)["information"]
    np.testing.assert_allclose(errors(fit.covariance().value), errors(exact), rtol=0.03)


@pytest.mark.slow
def test_a_plate_beside_the_datas_by_its_name():
    """Of 30 × 12 normal data: the data are rows, the clusters columns, and each cell has a latent of its own."""

    def table(y):
        mu, s = numpyro.param("mu", 0.0), numpyro.param("s", 1.0, constraint=dist.constraints.positive)
        with numpyro.plate("rows", 30, dim=-2), numpyro.plate("columns", 12, dim=-1):
            x = numpyro.sample("x", dist.Normal(mu, s))
            numpyro.sample("y", dist.Normal(x, 1), obs=y)

    y = np.random.default_rng(4).normal(1, 2, (30, 12)) + np.random.default_rng(5).normal(size=12)
    fit = fitter(table).run(random.key(0), y.astype(np.float32), num_steps=2000, progress_bar=False)
    assert fit.plate_name == "rows"
    density = lambda p: dist.Normal(p["mu"], jnp.sqrt(1 + p["s"] ** 2)).log_prob(jnp.asarray(y, jnp.float64)).ravel()
    exact = covariances(density, fit.params, np.tile(np.arange(12), 30))
    found = fit.covariance(kind="sandwich", cluster="columns")
    np.testing.assert_allclose(errors(found.value), errors(exact["sandwich"]), rtol=0.03)


@pytest.mark.slow_but("None")
@pytest.mark.parametrize("batch_size", [None, 60])
def test_an_energy_of_latents(batch_size):
    """Data are N(0, 1 + 1 / (1 + a)); the curvature of log Z is that of fresh draws of the prior."""
    y = np.random.default_rng(2).normal(0, np.sqrt(1.4), 400).astype(np.float32)
    fit = fitter(latent_energy).run(random.key(0), y, batch_size=batch_size, num_steps=2500, progress_bar=False)
    exact = covariances(
        lambda p: dist.Normal(0, jnp.sqrt(1 + 1 / (1 + p["a"]))).log_prob(jnp.asarray(y, jnp.float64)),
        fit.params,
        np.arange(400),
    )
    for kind, expected in exact.items():
        np.testing.assert_allclose(errors(fit.covariance(kind=kind).value), errors(expected), rtol=0.03)
    total = scores(fit, chosen_params(fit, None), None).mean(0).sum(0) * 400 / len(fit.collected)
    assert abs(total) < 0.2 / errors(exact["information"]), "the slope is zero at the maximum"


def test_an_energy_of_data():
    """Data are N(0, 1 / (1 + a)), without latents: the information is M / (2 (1 + a)²)."""
    y = np.random.default_rng(2).normal(0, 0.6, 300).astype(np.float32)
    fit = fitter(observed_energy).run(random.key(0), y, num_steps=1500, progress_bar=False)
    expected = (1 + float(fit.params["a"])) * np.sqrt(2 / 300)
    assert fit.standard_errors()["a"] == pytest.approx(expected, rel=0.03)
    assert fit.standard_errors(kind="scores")["a"] > 0
