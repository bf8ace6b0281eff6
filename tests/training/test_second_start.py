"""Parameters that ran to an edge of their space begin once more, and those that belong there go there again."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from flax import linen as nn
from jax import random
from numpyro.contrib.module import flax_module
from scipy import optimize

from numpyro_ebipla import EBIPLA
from tests.models import fitter, one_level

#: See tests/conftest.py.
RUNS_LONG = True

POSITIVE = dist.constraints.positive


def frontier(x, y, inefficiency="half-normal"):
    """A stochastic frontier (Aigner, Lovell and Schmidt, 1977; Meeusen and van den Broeck, 1977)."""
    b = numpyro.param("b", jnp.zeros(2))
    su, sv = (numpyro.param(name, 1.0, constraint=POSITIVE) for name in ("su", "sv"))
    with numpyro.plate("data", len(y)):
        u = numpyro.sample("u", dist.HalfNormal(su) if inefficiency == "half-normal" else dist.Exponential(1 / su))
        numpyro.sample("y", dist.Normal(b[0] + b[1] * x - u, sv), obs=y)


def log_likelihood(inefficiency, x, y, theta):
    """Of ``b`` and the logarithms of ``su, sv``: both closed forms are of Kumbhakar and Lovell (2000), chapter 3."""
    (su, sv), rest = jnp.exp(theta[2:]), y - theta[0] - theta[1] * x
    log_cdf = jax.scipy.stats.norm.logcdf
    if inefficiency == "half-normal":
        s = jnp.sqrt(su**2 + sv**2)
        return (jnp.log(2.0) + dist.Normal(0, s).log_prob(rest) + log_cdf(-rest * su / (sv * s))).sum()
    return (-jnp.log(su) + sv**2 / (2 * su**2) + rest / su + log_cdf(-rest / sv - sv / su)).sum()


def simulated(sign, inefficiency, seed=9):
    rng = np.random.default_rng(seed)
    x = rng.uniform(5, 15, 250)
    u = np.abs(rng.normal(size=250)) if inefficiency == "half-normal" else rng.exponential(size=250)
    y = 2 + 0.7 * x + 0.4 * rng.normal(size=250) - sign * 0.8 * u
    return x.astype(np.float32), y.astype(np.float32)


def missing_nats(fit, inefficiency, x, y):
    p = fit.params
    theta = np.array([*p["b"], np.log(p["su"]), np.log(p["sv"])], np.float64)
    value = jax.jit(jax.value_and_grad(lambda t: -log_likelihood(inefficiency, x, y, t)))
    both = lambda t: tuple(np.asarray(v, np.float64) for v in value(jnp.asarray(t, jnp.float32)))
    best = optimize.minimize(both, [2.0, 0.7, np.log(0.8), np.log(0.4)], jac=True, method="BFGS")
    return both(theta)[0] - best.fun


@pytest.mark.slow_but("half-normal")
@pytest.mark.parametrize("inefficiency", ["half-normal", "exponential"])
def test_a_scale_that_residuals_drove_to_zero_comes_back(inefficiency):
    """It stayed at zero, 7 nats below the maximum, and all diagnostics passed."""
    x, y = simulated(1, inefficiency)
    fit = fitter(frontier, inefficiency=inefficiency).run(random.key(0), x, y, num_steps=4000, progress_bar=False)
    assert missing_nats(fit, inefficiency, x, y) < 0.02


def test_a_scale_that_belongs_at_zero_goes_there_again():
    """Residuals that are skewed the other way: at zero the likelihood is highest, least squares are the fit."""
    x, y = simulated(-1, "half-normal", seed=10)
    fit = fitter(frontier).run(random.key(0), x, y, num_steps=4000, progress_bar=False)
    slope, middle = np.polyfit(x, y, 1)
    assert float(fit.params["su"]) < 0.02
    np.testing.assert_allclose(fit.params["b"], [middle, slope], atol=0.03)


def test_a_run_that_goes_on_across_it_is_the_same_bit_for_bit():
    x, y = simulated(1, "half-normal")
    ebipla = fitter(frontier)
    options = {"progress_bar": False, "num_samples": 0}
    whole = ebipla.run(random.key(0), x, y, num_steps=1100, **options)
    part = ebipla.run(random.key(0), x, y, num_steps=930, **options)
    resumed = ebipla.run(random.key(0), x, y, num_steps=170, init_state=part.state, **options)
    jax.tree.map(np.testing.assert_array_equal, whole.params, resumed.params)
    assert int(resumed.state.step) == 1100
    assert np.ptp(whole.history["contrast"][950:1000]) < abs(np.diff(whole.history["contrast"])[999]), "it was given"


def test_nothing_happens_where_nothing_is_at_an_edge(monkeypatch):
    y = (3 + 2 * np.random.default_rng(0).normal(size=100)).astype(np.float32)
    run = lambda: EBIPLA(one_level).run(
        random.key(0), y, num_steps=1050, progress_bar=False, num_samples=0, stop_at_gain=False
    )
    with_it = run()
    monkeypatch.setattr("numpyro_ebipla.training.loop.SECOND_START", 10_000)
    jax.tree.map(np.testing.assert_array_equal, with_it.params, run().params)


def test_parameters_of_a_small_module_are_no_obstacle():
    """A tree in place of an array stopped a run at step 1000."""

    def model(x, y):
        net = flax_module("net", nn.Dense(1), input_shape=(1,))
        s = numpyro.param("s", 1.0, constraint=POSITIVE)
        with numpyro.plate("data", len(y)):
            u = numpyro.sample("u", dist.Normal(0, s))
            numpyro.sample("y", dist.Normal(net(x)[:, 0] + u, 0.3), obs=y)

    x = np.linspace(-1, 1, 60, dtype=np.float32)[:, None]
    y = (1 + 2 * x[:, 0] + np.random.default_rng(0).normal(size=60)).astype(np.float32)
    fit = EBIPLA(model).run(random.key(0), x, y, num_steps=1010, progress_bar=False, num_samples=0, stop_at_gain=False)
    assert fit.stopped is None and int(fit.state.step) == 1010
    middle = np.polyfit(x[:, 0], y, 1)[1]
    assert float(fit.params["net$params"]["bias"][0]) == pytest.approx(middle, abs=0.02)
