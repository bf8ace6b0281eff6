"""An ordinary energy-based model (the energy's site is observed), whose likelihood quadrature knows."""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jax import random
from scipy import optimize, special

from numpyro_ebipla import EBIPLA, MALA, ULA, Contrastive, EnergyPrior, ShortRun, Tempered, recipes

#: See tests/conftest.py.
RUNS_LONG = True

#: A barrier between two wells, and how unequal their masses are.
TRUTH = np.array([1.5, 0.7])
START = np.array([0.5, 0.0])
GRID = np.linspace(-12, 12, 4001)
SCALE = 3.0


def features(x):
    """Tails are quadratic: steeper ones hold persistent walkers, drawn from the base, where they start."""
    return (jnp.sqrt(x**2 + 0.25) - 2) ** 2, jnp.tanh(x)


def model(y):
    barrier, tilt = (numpyro.param(name, value) for name, value in zip(("barrier", "tilt"), START, strict=True))

    def energy(x):
        well, side = features(x)
        return barrier * well + tilt * side

    with numpyro.plate("data", len(y)):
        numpyro.sample("x", EnergyPrior(energy, dist.Normal(0, SCALE)), obs=y)


def log_density(theta, x):
    """Unnormalised, in double precision."""
    log_base = -0.5 * (x / SCALE) ** 2 - np.log(SCALE * np.sqrt(2 * np.pi))
    return log_base - theta[0] * (np.sqrt(x**2 + 0.25) - 2) ** 2 - theta[1] * np.tanh(x)


def log_z(theta):
    return special.logsumexp(log_density(theta, GRID)) + np.log(GRID[1] - GRID[0])


def cross_entropy(theta, y):
    return log_z(theta) - log_density(theta, y).mean()


@pytest.fixture(scope="module")
def y():
    """Quantiles of the truth: its sample without the sampling error."""
    mass = np.exp(log_density(TRUTH, GRID))
    return np.interp((np.arange(500) + 0.5) / 500, np.cumsum(mass) / mass.sum(), GRID)


@pytest.fixture(scope="module")
def mle(y):
    return optimize.minimize(cross_entropy, TRUTH, args=(y,)).x


def fitted(system, y):
    """The fit and its parameters in double precision."""
    fit = system.run(random.key(0), jnp.asarray(y, jnp.float32), progress_bar=False)
    assert fit.stopped is None
    return fit, np.array([float(fit.params["barrier"]), float(fit.params["tilt"])])


COMMON = {"optim": optax.adam(0.02), "num_steps": 300}


def test_default_finds_the_maximum_likelihood_and_its_cross_entropy(y, mle):
    fit, theta = fitted(EBIPLA(model, prior=Tempered(num_walkers=100), **COMMON), y)
    np.testing.assert_allclose(theta, mle, atol=0.15)
    assert cross_entropy(theta, y) - cross_entropy(mle, y) < 2e-3
    np.testing.assert_allclose(fit.log_normalizer("x")[0], log_z(theta), atol=0.03)


def test_jarzynski_finds_them_too_and_knows_its_cross_entropy(y, mle):
    fit, theta = fitted(recipes.jarzynski_ebm(model, **COMMON), y)
    np.testing.assert_allclose(theta, mle, atol=0.2)
    assert cross_entropy(theta, y) - cross_entropy(mle, y) < 3e-3
    last = np.array([float(fit.state.params["barrier"]), float(fit.state.params["tilt"])])
    np.testing.assert_allclose(fit.history["cross_entropy"][-1], cross_entropy(last, y), atol=0.06)
    assert fit.history["x/ess"].min() > 0.3


def test_pcd_is_right_where_its_walkers_keep_up(y, mle):
    system = recipes.pcd(model, num_walkers=1000, num_moves=10, **COMMON)
    np.testing.assert_allclose(fitted(system, y)[1], mle, atol=0.3)


@pytest.mark.parametrize(
    "prior, side",
    [(Contrastive(500, ULA(0.002), 2), -1), (ShortRun(500, MALA(), 2), 1)],
    ids=["cd", "short_run"],
)
def test_few_moves_leave_the_masses_wrong(y, mle, prior, side):
    recipe = recipes.cd if isinstance(prior, Contrastive) else EBIPLA
    theta = fitted(recipe(model, prior=prior, optim=optax.sgd(0.3), num_steps=400), y)[1]
    # Chains from the data hardly ask for a tilt, chains from a symmetric base ask for ever more of it.
    assert side * (theta[1] - mle[1]) > 0.3
    assert cross_entropy(theta, y) - cross_entropy(mle, y) > 0.03


@pytest.mark.slow
def test_a_minibatch_does_not_hide_what_is_left_to_gain(y):
    """The check saw one minibatch, of 8 data; what is left was 0.6 nats, and passed."""

    def subsampled(y, batch_size=None):
        mean = numpyro.param("mean", 0.0)
        with numpyro.plate("data", len(y), subsample_size=batch_size):
            batch = numpyro.subsample(y, event_dim=0)
            numpyro.sample("x", EnergyPrior(lambda x: -mean * x, dist.Normal(0, 1)), obs=batch)

    data = jnp.asarray(2.0 + random.normal(random.key(3), (400,)))
    left = {}
    for size in (8, None):
        fit = EBIPLA(subsampled, num_steps=60).run(random.key(0), data, batch_size=size, progress_bar=False)
        left[size] = fit.diagnostics()["nats to gain"]
        assert not left[size].passed
        # Half the squared distance of the mean, and the Monte Carlo error of the fresh draws.
        assert left[size].value == pytest.approx(0.5 * (float(data.mean()) - float(fit.params["mean"])) ** 2, rel=0.3)
