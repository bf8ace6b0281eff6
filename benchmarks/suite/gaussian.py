"""Linear-Gaussian cases: the marginal of a datum is normal, and so is its posterior."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import random
from scipy import linalg, optimize

from benchmarks.suite.case import Case, Params, Rival, double
from numpyro_ebipla import EnergyPrior

positive = dist.constraints.positive


# --- the models ---------------------------------------------------------------------------------------


def toy_hierarchy(y, scale=1.0):
    theta = numpyro.param("theta", 0.0)
    with numpyro.plate("data", len(y)):
        x = numpyro.sample("x", dist.Normal(theta, scale))
        numpyro.sample("y", dist.Normal(x, scale), obs=y)


def variance_components(y):
    mu = numpyro.param("mu", 0.0)
    between = numpyro.param("between", 1.0, constraint=positive)
    within = numpyro.param("within", 1.0, constraint=positive)
    with numpyro.plate("groups", len(y)):
        x = numpyro.sample("x", dist.Normal(mu, between))
        numpyro.sample("y", dist.Normal(x[..., None].repeat(y.shape[1], -1), within).to_event(1), obs=y)


def eight_schools(sigma, y):
    mu = numpyro.param("mu", 0.0)
    tau = numpyro.param("tau", 1.0, constraint=positive)
    with numpyro.plate("schools", len(y)):
        theta = numpyro.sample("theta", dist.Normal(mu, tau))
        numpyro.sample("y", dist.Normal(theta, sigma), obs=y)


def probabilistic_pca(y, num_latents=3):
    return _factors(y, num_latents, numpyro.param("noise", 1.0, constraint=positive))


def factor_analysis(y, num_latents=2):
    return _factors(y, num_latents, numpyro.param("noise", jnp.ones(y.shape[1]), constraint=positive))


def _factors(y, num_latents, noise):
    loadings = numpyro.param("loadings", lambda key: random.normal(key, (y.shape[1], num_latents)))
    mean = numpyro.param("mean", jnp.zeros(y.shape[1]))
    with numpyro.plate("data", len(y)):
        x = numpyro.sample("x", dist.Normal(0, 1).expand([num_latents]).to_event(1))
        numpyro.sample("y", dist.Normal(x @ loadings.T + mean, noise).to_event(1), obs=y)


QUADRATIC_NOISE = 0.5


def quadratic_energy(y, design):
    """The energy ½ xᵀQx − bᵀx makes N(0, I) into N(S b, S) with S = (I + Q)⁻¹."""
    q = numpyro.param("q", jnp.eye(2), constraint=dist.constraints.positive_definite)
    b = numpyro.param("b", jnp.zeros(2))
    energy = lambda x: 0.5 * jnp.einsum("...i,ij,...j", x, q, x) - x @ b
    with numpyro.plate("data", len(y)):
        x = numpyro.sample("x", EnergyPrior(energy, dist.Normal(0, 1).expand([2]).to_event(1)))
        numpyro.sample("y", dist.Normal(x @ design.T, QUADRATIC_NOISE).to_event(1), obs=y)


def tilted_gaussian(y, design):
    """The same family of priors as a normal, for SVI."""
    loc = numpyro.param("loc", jnp.zeros(2))
    root = numpyro.param("root", jnp.eye(2), constraint=dist.constraints.lower_cholesky)
    with numpyro.plate("data", len(y)):
        x = numpyro.sample("x", dist.MultivariateNormal(loc, scale_tril=root))
        numpyro.sample("y", dist.Normal(x @ design.T, QUADRATIC_NOISE).to_event(1), obs=y)


# --- the truth about them -----------------------------------------------------------------------------


class LinearGaussian(NamedTuple):
    """``x ~ N(mean, cov)``, ``y | x ~ N(loadings x + offset, diag(noise))``."""

    mean: np.ndarray
    cov: np.ndarray
    loadings: np.ndarray
    offset: np.ndarray
    noise: np.ndarray  # variances

    @property
    def marginal(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and covariance of y."""
        w = self.loadings
        return w @ self.mean + self.offset, w @ self.cov @ w.T + np.diag(self.noise)

    def log_density(self, y: np.ndarray) -> float:
        """Mean of log p(y) over the rows of y."""
        mean, cov = self.marginal
        try:
            root = np.linalg.cholesky(cov)
        except np.linalg.LinAlgError:
            return -np.inf
        z = linalg.solve_triangular(root, (y - mean).T, lower=True)
        return -0.5 * (z**2).sum(0).mean() - np.log(np.diag(root)).sum() - 0.5 * len(mean) * np.log(2 * np.pi)

    def posterior(self, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Means and standard deviations of x given each row of y."""
        scaled = self.loadings / self.noise[:, None]
        root = np.linalg.cholesky(self.cov)  # of the prior, so that a narrow one does no harm
        inner = np.linalg.inv(np.eye(len(self.mean)) + root.T @ (self.loadings.T @ scaled) @ root)
        cov = root @ inner @ root.T
        mean = self.mean + (y - self.marginal[0]) @ scaled @ cov
        return mean, np.broadcast_to(np.sqrt(np.diag(cov)), mean.shape)


def linear_gaussian_case(
    name: str,
    model: Callable,
    args: tuple,
    y: np.ndarray,
    read: Callable[[Params], LinearGaussian],
    best: Params,
    **rest,
) -> Case:
    """A case from ``read``: what the parameters say. The data are the rows of ``y [M, D]``."""
    y = np.asarray(y, np.float64)
    value = lambda params: read(double(params)).log_density(y)

    def posterior(params: Params, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        mean, sd = read(double(params)).posterior(y[indices])
        return (mean[:, 0], sd[:, 0]) if mean.shape[1] == 1 else (mean, sd)  # a number has no axis of its own

    return Case(name, model, args, "x", len(y), value, value(best), posterior, best, **rest)


def toy_case(name: str, num_data: int, scale: float = 1.0) -> Case:
    """Toy hierarchy: the marginal is N(θ, 2), times the scale."""
    y = (scale * (1 + np.sqrt(2) * np.random.default_rng(1).normal(size=num_data))).astype(np.float32)

    def read(p: Params) -> LinearGaussian:
        one = np.ones((1, 1))
        return LinearGaussian(p["theta"] * one[0], scale**2 * one, one, np.zeros(1), scale**2 * one[0])

    best = {"theta": y.astype(np.float64).mean()}
    kwargs = {} if scale == 1 else {"scale": scale}
    return linear_gaussian_case(name, toy_hierarchy, (y,), y[:, None], read, best, kwargs=kwargs)


def components_case(name: str, scale: float = 1.0, groups: int = 100, repeats: int = 5) -> Case:
    """Variance components of balanced groups: closed form (Searle et al., 1992)."""
    rng = np.random.default_rng(2)
    y = 1.5 + 0.8 * rng.normal(size=(groups, 1)) + 0.5 * rng.normal(size=(groups, repeats))
    y = (scale * y).astype(np.float32)

    def read(p: Params) -> LinearGaussian:
        one = np.ones(repeats)
        return LinearGaussian(
            p["mu"][None], p["between"] ** 2 * np.eye(1), one[:, None], 0 * one, p["within"] ** 2 * one
        )

    exact = y.astype(np.float64)
    within = ((exact - exact.mean(1, keepdims=True)) ** 2).sum() / (groups * (repeats - 1))
    between = exact.mean(1).var() - within / repeats
    best = {"mu": exact.mean(), "between": np.sqrt(between), "within": np.sqrt(within)}
    return linear_gaussian_case(name, variance_components, (y,), y, read, best)


def read_factors(p: Params) -> LinearGaussian:
    size, num_latents = p["loadings"].shape
    noise = np.broadcast_to(p["noise"] ** 2, size)
    return LinearGaussian(np.zeros(num_latents), np.eye(num_latents), p["loadings"], p["mean"], noise)


def draw_factors(num_latents: int, noise: Any, seed: int, num_data: int = 500, size: int = 10) -> np.ndarray:
    rng = np.random.default_rng(seed)
    loadings = rng.normal(size=(size, num_latents))
    y = rng.normal(size=size) + rng.normal(size=(num_data, num_latents)) @ loadings.T
    return (y + noise * rng.normal(size=(num_data, size))).astype(np.float32)


def pca_case(name: str) -> Case:
    """Probabilistic PCA: the maximum is by the eigenvectors (Tipping and Bishop, 1999)."""
    y = draw_factors(3, 0.5, seed=3)
    exact = y.astype(np.float64)
    eigenvalues, vectors = np.linalg.eigh(np.cov(exact.T, bias=True))
    noise = eigenvalues[:-3].mean()
    loadings = vectors[:, -3:] * np.sqrt(eigenvalues[-3:] - noise)
    best = {"loadings": loadings, "mean": exact.mean(0), "noise": np.sqrt(noise)}
    return linear_gaussian_case(name, probabilistic_pca, (y,), y, read_factors, best)


def factor_case(name: str) -> Case:
    """Factor analysis: the maximum by EM, from the truth's neighbourhood (Rubin and Thayer, 1982)."""
    y = draw_factors(2, np.linspace(0.3, 1.2, 10), seed=4)
    exact = y.astype(np.float64)
    cov = np.cov(exact.T, bias=True)
    eigenvalues, vectors = np.linalg.eigh(cov)
    w, psi = vectors[:, -2:] * np.sqrt(eigenvalues[-2:]), 0.3 * np.diag(cov)
    for _ in range(100_000):
        beta = np.linalg.solve(w @ w.T + np.diag(psi), w).T
        second = np.eye(2) - beta @ w + beta @ cov @ beta.T
        w_new = cov @ beta.T @ np.linalg.inv(second)
        psi_new = np.diag(cov - w_new @ beta @ cov)
        change = max(np.abs(w_new - w).max(), np.abs(psi_new - psi).max())
        w, psi = w_new, psi_new
        if change < 1e-13:
            break
    best = {"loadings": w, "mean": exact.mean(0), "noise": np.sqrt(psi)}
    return linear_gaussian_case(name, factor_analysis, (y,), y, read_factors, best)


def quadratic_case(name: str) -> Case:
    """Quadratic energy: least squares of y on the design is N(S b, S + noise), and says all about Q and b."""
    rng = np.random.default_rng(5)
    design = rng.normal(size=(5, 2))
    root = np.linalg.cholesky(np.array([[0.5, 0.2], [0.2, 0.3]]))
    x = np.array([0.6, -0.4]) + rng.normal(size=(300, 2)) @ root.T
    y = (x @ design.T + QUADRATIC_NOISE * rng.normal(size=(300, 5))).astype(np.float32)
    design = design.astype(np.float32)
    exact = design.astype(np.float64)
    noise = np.full(5, QUADRATIC_NOISE**2)
    gaussian = lambda mean, cov: LinearGaussian(mean, cov, exact, np.zeros(5), noise)

    def read(p: Params) -> LinearGaussian:
        cov = np.linalg.inv(np.eye(2) + p["q"])
        return gaussian(cov @ p["b"], cov)

    least_squares = y.astype(np.float64) @ np.linalg.pinv(exact).T
    cov = np.cov(least_squares.T, bias=True) - QUADRATIC_NOISE**2 * np.linalg.inv(exact.T @ exact)
    assert (np.linalg.eigvalsh(cov) > 0).all() and (np.linalg.eigvalsh(cov) < 1).all()  # an interior maximum
    precision = np.linalg.inv(cov)
    best = {"q": precision - np.eye(2), "b": precision @ least_squares.mean(0)}
    case = linear_gaussian_case(name, quadratic_energy, (y, design), y, read, best)

    def rival_value(params: Params) -> float:
        p = double(params)
        return gaussian(p["loc"], p["root"] @ p["root"].T).log_density(y.astype(np.float64))

    return case._replace(rival=Rival(tilted_gaussian, None, rival_value))


def schools_case(name: str) -> Case:
    """Eight schools (Rubin, 1981): the likelihood of τ is largest at its boundary, τ = 0."""
    y = np.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0], np.float32)
    sigma = np.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0], np.float32)
    data, noise = y.astype(np.float64), sigma.astype(np.float64) ** 2

    def at(mu: float, tau: float) -> float:
        variance = tau**2 + noise
        return float(np.mean(-0.5 * (data - mu) ** 2 / variance - 0.5 * np.log(2 * np.pi * variance)))

    def centre(tau: float) -> float:
        return float(np.average(data, weights=1 / (tau**2 + noise)))

    profile = lambda tau: -at(centre(tau), tau)
    inner = optimize.minimize_scalar(profile, bounds=(0, 50), method="bounded", options={"xatol": 1e-10}).x
    tau = inner if profile(inner) < profile(0.0) - 1e-12 else 0.0
    best = {"mu": centre(tau), "tau": tau}
    value = lambda params: at(float(params["mu"]), float(params["tau"]))

    def posterior(params: Params, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        p = double(params)
        shrink = p["tau"] ** 2 / (p["tau"] ** 2 + noise[indices])
        return p["mu"] + shrink * (data[indices] - p["mu"]), p["tau"] * np.sqrt(1 - shrink)

    return Case(name, eight_schools, (sigma, y), "theta", len(y), value, value(best), posterior, best)
