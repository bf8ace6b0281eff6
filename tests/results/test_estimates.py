"""Standard errors, tables and tests, against exact Hessians and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from scipy import stats

from numpyro_ebipla import EBIPLA, ULA, EnergyPrior, ModelError, compare
from numpyro_ebipla.results.estimates import likelihood_ratio, num_observations
from numpyro_ebipla.results.information import Information
from numpyro_ebipla.smc.normaliser import Estimate
from tests.models import fitter, one_level

#: See tests/conftest.py.
RUNS_LONG = True

POSITIVE = dist.constraints.positive
GROUP = np.repeat(np.arange(8), 6)
GRID = np.linspace(-7, 7, 281)


def one_level_exact(params, y):
    return dist.Normal(params["mu"], jnp.sqrt(1 + params["s"] ** 2)).log_prob(y).sum()


def slopes(t, y):
    beta = numpyro.param("beta", jnp.zeros(2))
    s = numpyro.param("s", jnp.ones(2), constraint=POSITIVE)
    noise = numpyro.param("noise", 1.0, constraint=POSITIVE)
    with numpyro.plate("groups", 8):
        u = numpyro.sample("u", dist.Normal(0, s).to_event(1))
    with numpyro.plate("data", len(y)):
        b = beta + u[GROUP]
        numpyro.sample("y", dist.Normal(b[:, 0] + b[:, 1] * t, noise), obs=y)


def slopes_exact(params, t, y):
    X = jnp.stack([jnp.ones_like(t), t], 1)
    same = GROUP[:, None] == GROUP
    cov = same * ((X * params["s"] ** 2) @ X.T) + params["noise"] ** 2 * jnp.eye(len(y))
    return dist.MultivariateNormal(X @ params["beta"], cov).log_prob(y)


def counts(y):
    b, s = numpyro.param("b", 0.0), numpyro.param("s", 1.0, constraint=POSITIVE)
    with numpyro.plate("data", len(y)):
        x = numpyro.sample("x", dist.Normal(b, s))
        numpyro.sample("y", dist.Poisson(jnp.exp(x)), obs=y)


def counts_exact(params, y):
    at = params["b"] + params["s"] * GRID[:, None]
    each = dist.Poisson(jnp.exp(at)).log_prob(y) + stats.norm.logpdf(GRID)[:, None]
    return (jax.scipy.special.logsumexp(each, 0) + np.log(GRID[1] - GRID[0])).sum()


def shares(y):
    a = numpyro.param("a", jnp.ones(3), constraint=POSITIVE)
    with numpyro.plate("data", len(y)):
        q = numpyro.sample("q", dist.Dirichlet(a))
        numpyro.sample("y", dist.Multinomial(15, probs=q), obs=y)


def shares_exact(params, y):
    return dist.DirichletMultinomial(params["a"], 15).log_prob(y).sum()


def edges(y):
    low, width = numpyro.param("low", 0.0), numpyro.param("width", 1.0, constraint=POSITIVE)
    s = numpyro.param("s", 1.0, constraint=POSITIVE)
    with numpyro.plate("data", len(y)):
        x = numpyro.sample("x", dist.Uniform(low, low + width))
        numpyro.sample("y", dist.Normal(x, s), obs=y)


def edges_exact(params, y):
    low, s = params["low"], params["s"]
    each = jax.scipy.stats.norm.cdf((y - low) / s) - jax.scipy.stats.norm.cdf((y - low - params["width"]) / s)
    return (jnp.log(each) - jnp.log(params["width"])).sum()


def walk(y):
    start = numpyro.param("start", 0.0)
    s, noise = (numpyro.param(name, 1.0, constraint=POSITIVE) for name in ("s", "noise"))
    x = numpyro.sample("x", dist.GaussianRandomWalk(s, num_steps=len(y)))
    with numpyro.plate("data", len(y)):
        numpyro.sample("y", dist.Normal(start + x, noise), obs=y)


def walk_exact(params, y):
    k = jnp.arange(1, len(y) + 1)
    cov = params["s"] ** 2 * jnp.minimum(k[:, None], k) + params["noise"] ** 2 * jnp.eye(len(y))
    return dist.MultivariateNormal(params["start"] * jnp.ones(len(y)), cov).log_prob(y)


def cases():
    rng = np.random.default_rng(0)
    t = np.tile(np.linspace(0, 1, 6), 8)
    u = rng.normal(size=(8, 2)) * [1.5, 2.0]
    y = 20 + u[GROUP, 0] + (5 + u[GROUP, 1]) * t + 0.4 * rng.normal(size=48)
    return {
        "one level": (one_level, one_level_exact, (2 + 1.8 * rng.normal(size=200),)),
        "slopes": (slopes, slopes_exact, (t, y)),
        "counts": (counts, counts_exact, (rng.poisson(np.exp(rng.normal(0.5, 0.8, 200))),)),
        # Where the latents' laws have heavy tails, edges or strong correlations: 0.6 to 0.9 of the exact ones once.
        "shares": (
            shares,
            shares_exact,
            (np.stack([rng.multinomial(15, q) for q in rng.dirichlet([0.3, 1, 4], 200)]),),
        ),
        "edges": (edges, edges_exact, (rng.uniform(2, 9, 150) + 0.3 * rng.normal(size=150),)),
        "walk": (walk, walk_exact, (5 + np.cumsum(0.3 * rng.normal(size=80)) + rng.normal(size=80),)),
    }


@pytest.mark.slow_but("one level", "edges")
@pytest.mark.parametrize("name", ["one level", "slopes", "counts", "shares", "edges", "walk"])
def test_standard_errors_are_those_of_the_exact_hessian(name):
    """Within 3 %, in the space of the parameters: the delta method is the Hessian there, at the maximum."""
    model, exact, args = cases()[name]
    args = tuple(np.asarray(a, np.int32 if a.ndim > 1 else np.float32) for a in args)
    fit = fitter(model).run(random.key(0), *args, num_steps=2500, progress_bar=False)
    with jax.enable_x64(True):
        at = jax.tree.map(lambda x: jnp.asarray(np.asarray(x), jnp.float64), fit.params)
        flat, unflatten = jax.flatten_util.ravel_pytree(at)
        hessian = jax.hessian(lambda v: -exact(unflatten(v), *(jnp.asarray(a, jnp.float64) for a in args)))(flat)
        expected = np.sqrt(np.diag(np.linalg.inv(np.asarray(hessian))))
    table = fit.summary()
    # Of 14 particles' posteriors at edges the curvature is known to a tenth; it was twice too high.
    np.testing.assert_allclose(table.std_error, expected, rtol=0.15 if name == "edges" else 0.03)
    np.testing.assert_allclose(table.upper - table.estimate, 1.96 * table.std_error, rtol=1e-3)
    errors = fit.standard_errors()
    assert jax.tree.map(np.shape, errors) == jax.tree.map(np.shape, fit.params)
    assert num_observations(fit) == args[-1].size, "and not the groups"
    value, error = fit.log_likelihood()
    assert abs(float(value) - float(exact(fit.params, *args))) < 4 * float(error) + 0.02


@pytest.mark.slow
def test_minibatches_have_those_of_all_data():
    """Blocks of 30 for 200 data: the last one is filled up, and no datum counts twice."""
    _, _, (y,) = cases()["one level"]
    y = y.astype(np.float32)
    ebipla = fitter(one_level, num_particles=16)
    fit = ebipla.run(random.key(0), y, batch_size=30, num_steps=900, progress_bar=False)
    s = float(fit.params["s"])
    hessian = jax.hessian(lambda p: -one_level_exact({"mu": p[0], "s": p[1]}, y))(jnp.array([fit.params["mu"], s]))
    exact = np.sqrt(np.diag(np.linalg.inv(hessian)))
    np.testing.assert_allclose(fit.summary().std_error, exact, rtol=0.01)
    some = ebipla.run(random.key(0), y, batch_size=30, num_steps=900, progress_bar=False, indices=np.arange(0, 200, 2))
    assert some.standard_errors()["mu"] == pytest.approx(np.sqrt((1 + s**2) / 200), rel=0.03)


def test_any_number_of_draws_will_do():
    """250 draws of 7 particles: no divisor of the one makes four equal groups of both."""
    _, _, (y,) = cases()["one level"]
    fit = fitter(one_level, num_particles=7).run(
        random.key(0), y.astype(np.float32), num_steps=900, num_samples=250, thinning=1, progress_bar=False
    )
    s = float(fit.params["s"])
    assert fit.standard_errors()["mu"] == pytest.approx(np.sqrt((1 + s**2) / 200), rel=0.03)


def test_a_variance_at_zero_has_no_standard_error():
    rng = np.random.default_rng(3)
    y = rng.normal(size=300)
    y = (0.9 * (y - y.mean()) / y.std()).astype(np.float32)
    fit = fitter(one_level).run(random.key(0), y, num_steps=5000, progress_bar=False)
    mu, s = fit.summary().std_error
    # Of a datum's complete information, 1 / s² = 2.5e6, single precision leaves 0.2 of one: rounded alike for all data,
    # as it was by the derivative of the weights, that took up to a third of the information.
    assert mu == pytest.approx(np.sqrt(1 / 300), rel=0.15)
    assert np.isnan(s) or s > float(fit.params["s"]), "no interval that would exclude zero"


def test_errors_that_rounding_hides_are_not_given():
    """A meta-analysis in thousandths, whose heterogeneity is zero: the error was 0.07 to 0.5 of the exact one."""
    rng = np.random.default_rng(4)
    se = (1e-3 * rng.uniform(0.5, 3, 14)).astype(np.float32)
    y = rng.normal(size=14)
    y = (0.002 + 0.5 * se * (y - y.mean()) / y.std()).astype(np.float32)

    def studies(se, y):
        mean, tau = numpyro.param("mean", 0.0), numpyro.param("tau", 1.0, constraint=POSITIVE)
        with numpyro.plate("studies", len(y)):
            effect = numpyro.sample("effect", dist.Normal(mean, tau))
            numpyro.sample("y", dist.Normal(effect, se), obs=y)

    fit = EBIPLA(studies).run(random.key(0), se, y, num_steps=4000, progress_bar=False)
    assert float(fit.params["tau"]) < 1e-5
    table = fit.summary()
    error, exact = table.std_error[0], np.sqrt(1 / np.sum(1 / se.astype(np.float64) ** 2))
    assert np.isnan(error) or error == pytest.approx(exact, rel=0.2)
    assert not np.isnan(error) or "enable_x64" in str(table)


@pytest.mark.parametrize("nothing", [[1], [0, 1]])
def test_a_curvature_that_is_noise_hides_no_other(monkeypatch, nothing):
    """The entries of what nothing is known of are noise; in its own units, as large as anything."""
    _, _, (y,) = cases()["one level"]
    fit = fitter(one_level).run(random.key(0), y.astype(np.float32), num_steps=300, progress_bar=False)
    each = np.tile(np.diag([4.0, 9.0]), (4, 1, 1))
    each[:, nothing, :] = np.array([-1e-5, 3e-5, 1e-5, -2e-5])[:, None, None]
    found = Information(each, np.zeros(2))
    monkeypatch.setattr("numpyro_ebipla.results.estimates.information", lambda *_: found)
    errors = fit.standard_errors()
    assert np.isnan(errors["s"])
    assert np.isnan(errors["mu"]) if 0 in nothing else errors["mu"] == pytest.approx(0.5)


def test_the_table_comes_first_in_the_summary(capsys):
    _, _, (y,) = cases()["one level"]
    fit = fitter(one_level).run(random.key(0), y.astype(np.float32), num_steps=300, progress_bar=False)
    fit.print_summary(diagnostics=False)
    said = capsys.readouterr().out
    assert "std error" in said and "2.5 %" in said and said.index("mu ") < said.index("n_eff")
    columns = fit.summary(0.9).to_dict()
    assert columns["names"] == ["mu", "s"] and len(columns["lower"]) == 2


@pytest.mark.slow
def test_where_there_are_none_the_reason_is_said():
    def conditional(y):
        a = numpyro.param("a", 0.1, constraint=POSITIVE)
        with numpyro.plate("data", len(y)):
            base = dist.Normal(0, 1).expand([len(y)])
            x = numpyro.sample("x", EnergyPrior(lambda x: a * (x - y) ** 2, base))
            numpyro.sample("y", dist.Normal(x, 1), obs=y)

    def wide(y):
        w = numpyro.param("w", jnp.zeros(40))
        with numpyro.plate("data", len(y)):
            x = numpyro.sample("x", dist.Normal(w.sum(), 1))
            numpyro.sample("y", dist.Normal(x, 1), obs=y)

    y = np.linspace(-1, 1, 20, dtype=np.float32)
    for ebipla, words in (
        (EBIPLA(conditional), "a normaliser for each datum"),
        (EBIPLA(wide), "32 parameters"),
        (EBIPLA(one_level, kernel=ULA(0.01)), "default kernel"),
        (EBIPLA(one_level, num_particles=1, num_samples=4), "num_samples"),
    ):
        fit = ebipla.run(random.key(0), y, num_steps=20, progress_bar=False)
        with pytest.raises(ModelError, match=words):
            fit.standard_errors()


def test_nested_models_are_compared():
    """Against the closed form: the statistic is that of the exact likelihoods."""
    _, exact, (y,) = cases()["one level"]
    y = y.astype(np.float32)

    def zero(y):
        with numpyro.handlers.substitute(data={"mu": 0.0}):
            s = numpyro.param("s", 1.0, constraint=POSITIVE)
            with numpyro.plate("data", len(y)):
                x = numpyro.sample("x", dist.Normal(0, s))
                numpyro.sample("y", dist.Normal(x, 1), obs=y)

    free = fitter(one_level).run(random.key(0), y, num_steps=2000, progress_bar=False)
    fixed = fitter(zero).run(random.key(0), y, num_steps=2000, progress_bar=False)
    found = compare({"free": free, "mean zero": fixed})
    test = found.tests["mean zero", "free"]
    statistic = 2 * float(exact(free.params, y) - exact({"mu": 0.0, **fixed.params}, y))
    assert test.df == 1 and abs(test.statistic - statistic) < 4 * test.std_error + 0.02
    assert next(iter(found.rows)) == "free" and "χ²" in str(found)
    assert free.bic() - free.aic() == pytest.approx(2 * (np.log(200) - 2), abs=0.1)
    with pytest.raises(ValueError, match="two fits"):
        compare({"free": free})
    fewer = fitter(one_level).run(random.key(0), y[:100], num_steps=10, progress_bar=False)
    with pytest.raises(ValueError, match="'fit 0': 200, 'fit 1': 100"):
        compare([free, fewer])


@pytest.mark.unit
def test_the_boundary_takes_half_of_each():
    found = likelihood_ratio(Estimate(-101.0, 0.1), Estimate(-100.0, 0.1), 1)
    assert found.p_value == pytest.approx(stats.chi2.sf(2.0, 1))
    assert found.p_value_at_boundary == pytest.approx(stats.chi2.sf(2.0, 1) / 2)
    assert found.std_error == pytest.approx(2 * np.hypot(0.1, 0.1))
    two = likelihood_ratio(Estimate(-102.0, 0.0), Estimate(-100.0, 0.0), 2)
    assert two.p_value_at_boundary == pytest.approx((stats.chi2.sf(4.0, 1) + stats.chi2.sf(4.0, 2)) / 2)
    below = likelihood_ratio(Estimate(-100.0, 0.1), Estimate(-100.1, 0.1), 1)
    assert below.p_value == below.p_value_at_boundary == 1


@pytest.mark.unit
def test_the_boundary_is_that_of_simulated_tests():
    """A variance at zero: 100,000 data N(0, 1), by maxima in closed form, 40,000 times: within four deviations."""
    power = np.random.default_rng(0).chisquare(100_000, 40_000) / 100_000
    best = np.maximum(power, 1)  # 1 + s²
    statistic = 100_000 * (power - power / best - np.log(best))
    for level in (0.1, 0.05):
        cut = stats.chi2.isf(2 * level, 1)
        found = likelihood_ratio(Estimate(-cut / 2, 0.0), Estimate(0.0, 0.0), 1)
        assert found.p_value_at_boundary == pytest.approx(level)
        assert abs(np.mean(statistic > cut) - level) < 4 * np.sqrt(level / 40_000)
