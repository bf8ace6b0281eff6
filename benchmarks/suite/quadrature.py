"""Cases with one latent number per datum: sums over a fine grid, or a closed form, and the maximum numerically."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from scipy import special, stats

from benchmarks.suite.case import Case, Params, Rival, double, maximise
from numpyro_ebipla import EnergyPrior

positive = dist.constraints.positive


# --- the models ---------------------------------------------------------------------------------------


def poisson_lognormal(y, batch_size=None):
    mu = numpyro.param("mu", 0.0)
    s = numpyro.param("s", 1.0, constraint=positive)
    with numpyro.plate("data", len(y), subsample_size=batch_size):
        x = numpyro.sample("x", dist.Normal(mu, s))
        numpyro.sample("y", dist.Poisson(jnp.exp(x)), obs=numpyro.subsample(y, event_dim=0))


def beta_binomial(y, trials=20):
    a = numpyro.param("a", 1.0, constraint=positive)
    b = numpyro.param("b", 1.0, constraint=positive)
    with numpyro.plate("data", len(y)):
        p = numpyro.sample("p", dist.Beta(a, b))
        numpyro.sample("y", dist.Binomial(trials, p), obs=y)


def logistic_groups(covariate, y):
    intercept = numpyro.param("intercept", 0.0)
    slope = numpyro.param("slope", 0.0)
    s = numpyro.param("s", 1.0, constraint=positive)
    with numpyro.plate("groups", len(y)):
        x = numpyro.sample("x", dist.Normal(0, s))
        logits = intercept + slope * covariate + x[..., None]
        numpyro.sample("y", dist.Bernoulli(logits=logits).to_event(1), obs=y)


CONDITIONAL_NOISE = 0.3


def conditional_energy(covariate, y):
    """Two modes at a distance ``half`` from a centre that moves with the covariate."""
    depth = numpyro.param("depth", 1.0, constraint=positive)
    slope = numpyro.param("slope", 0.0)
    half = numpyro.param("half", 0.5)
    with numpyro.plate("data", len(y)) as i:
        centre = slope * covariate[i]
        x = numpyro.sample("x", EnergyPrior(lambda x: depth * ((x - centre) ** 2 - half) ** 2, dist.Normal(0, 1)))
        numpyro.sample("y", dist.Normal(x, CONDITIONAL_NOISE), obs=y)


def conditional_gaussian(covariate, y):
    """A normal prior that moves with the covariate, for SVI."""
    slope = numpyro.param("slope", 0.0)
    s = numpyro.param("s", 1.0, constraint=positive)
    with numpyro.plate("data", len(y)):
        x = numpyro.sample("x", dist.Normal(slope * covariate, s))
        numpyro.sample("y", dist.Normal(x, CONDITIONAL_NOISE), obs=y)


# --- the truth about them -----------------------------------------------------------------------------

#: Standard normal values for a prior of one scale: beyond any posterior here, and finer than the narrowest.
STANDARD = np.linspace(-20, 20, 1601)


def moments(grid: np.ndarray, log_joint: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Log marginal, mean and sd of each row of ``log p(x, y) [m, K]`` on an even grid of x.

    The sum is exact to rounding where the integrand is smooth and vanishes at both ends.
    """
    log_marginal = special.logsumexp(log_joint, axis=1)
    weight = np.exp(log_joint - log_marginal[:, None])
    mean = weight @ grid
    sd = np.sqrt((weight * (grid - mean[:, None]) ** 2).sum(1))
    return log_marginal + np.log(grid[1] - grid[0]), mean, sd


def grid_case(
    name: str,
    model: Callable,
    args: tuple,
    log_joint: Callable[[Params, np.ndarray], tuple[np.ndarray, np.ndarray]],
    start: Params,
    positive: tuple[str, ...],
    rows: np.ndarray | None = None,
    counts: np.ndarray | None = None,
    **rest: Any,
) -> Case:
    """A case from ``log_joint(params, indices) -> (grid, log p(x, y_i) [m, K])``.

    ``rows`` are data that stand for all, ``counts`` times each, where many are equal.
    """
    num_data = len(args[-1])
    rows = np.arange(num_data) if rows is None else rows

    def value(params: Params) -> float:
        return float(np.average(moments(*log_joint(double(params), rows))[0], weights=counts))

    def posterior(params: Params, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return moments(*log_joint(double(params), indices))[1:]

    best = maximise(value, start, positive)
    return Case(name, model, args, "x", num_data, value, value(best), posterior, best, **rest)


def poisson_case(name: str, num_data: int, **kwargs: Any) -> Case:
    rng = np.random.default_rng(6)
    y = rng.poisson(np.exp(1.0 + 0.7 * rng.normal(size=num_data))).astype(np.float32)
    _, rows, counts = np.unique(y, return_index=True, return_counts=True)

    def log_joint(p: Params, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        x = p["mu"] + p["s"] * STANDARD
        prior = stats.norm.logpdf(STANDARD) - np.log(p["s"])
        data = y[indices, None].astype(np.float64)
        rate = np.exp(np.minimum(x, 700))
        return x, prior + data * x - rate - special.gammaln(data + 1)

    start = {"mu": 1.0, "s": 0.7}
    largest = tuple(np.argsort(y)[-10:])  # their posteriors are the narrowest
    options = dict(kwargs=kwargs, extremes=largest)
    return grid_case(name, poisson_lognormal, (y,), log_joint, start, ("s",), rows, counts, **options)


def logistic_case(name: str, groups: int = 100, repeats: int = 6) -> Case:
    rng = np.random.default_rng(7)
    covariate = rng.normal(size=(groups, repeats)).astype(np.float32)
    logits = -0.5 + 1.0 * covariate + 1.2 * rng.normal(size=(groups, 1))
    y = (rng.random((groups, repeats)) < special.expit(logits)).astype(np.float32)

    def log_joint(p: Params, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        x = p["s"] * STANDARD
        fixed = p["intercept"] + p["slope"] * covariate[indices].astype(np.float64)
        sign = 2 * y[indices].astype(np.float64) - 1
        likelihood = sum(-np.logaddexp(0, -sign[:, [j]] * (fixed[:, [j]] + x)) for j in range(repeats))
        return x, stats.norm.logpdf(STANDARD) - np.log(p["s"]) + likelihood

    start = {"intercept": -0.5, "slope": 1.0, "s": 1.2}
    return grid_case(name, logistic_groups, (covariate, y), log_joint, start, ("s",))


def conditional_case(name: str, num_data: int = 200) -> Case:
    rng = np.random.default_rng(8)
    covariate = rng.uniform(-1.5, 1.5, size=num_data).astype(np.float32)
    grid = np.linspace(-9, 9, 1201)
    c = covariate.astype(np.float64)

    def log_prior(p: Params, indices: np.ndarray) -> np.ndarray:
        centre = p["slope"] * c[indices, None]
        tilted = stats.norm.logpdf(grid) - p["depth"] * ((grid - centre) ** 2 - p["half"]) ** 2
        return tilted - special.logsumexp(tilted, axis=1, keepdims=True) - np.log(grid[1] - grid[0])

    truth = {"depth": 2.0, "slope": 1.0, "half": 1.0}
    mass = np.cumsum(np.exp(log_prior(truth, np.arange(num_data))), 1) * (grid[1] - grid[0])
    x = grid[(mass < rng.random((num_data, 1))).sum(1)]
    y = (x + CONDITIONAL_NOISE * rng.normal(size=num_data)).astype(np.float32)
    data = y.astype(np.float64)

    def log_joint(p: Params, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return grid, log_prior(p, indices) + stats.norm.logpdf(data[indices, None], grid, CONDITIONAL_NOISE)

    def gaussian_value(params: Params) -> float:
        p = double(params)
        return stats.norm.logpdf(data, p["slope"] * c, np.sqrt(p["s"] ** 2 + CONDITIONAL_NOISE**2)).mean()

    rival = Rival(conditional_gaussian, None, gaussian_value)
    return grid_case(name, conditional_energy, (covariate, y), log_joint, truth, ("depth",), rival=rival)


def beta_case(name: str, num_data: int = 200, trials: int = 20) -> Case:
    rng = np.random.default_rng(9)
    y = rng.binomial(trials, rng.beta(2.0, 4.0, size=num_data)).astype(np.float32)
    data = y.astype(np.float64)
    choose = special.gammaln(trials + 1) - special.gammaln(data + 1) - special.gammaln(trials - data + 1)

    def value(params: Params) -> float:
        p = double(params)
        after = special.betaln(p["a"] + data, p["b"] + trials - data)
        return float((choose + after - special.betaln(p["a"], p["b"])).mean())

    def posterior(params: Params, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        p = double(params)
        after = stats.beta(p["a"] + data[indices], p["b"] + trials - data[indices])
        return after.mean(), after.std()

    best = maximise(value, {"a": 2.0, "b": 4.0}, ("a", "b"))
    return Case(name, beta_binomial, (y,), "p", num_data, value, value(best), posterior, best)
