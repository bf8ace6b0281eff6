"""Bayesian logistic regression by empirical Bayes (2204.12965, App. F.4; 2505.18427, §5.1): θ, and what it predicts.

``w ~ N(θ 1, 5 I)``, ``y ~ Bernoulli(sigmoid(x w))``; θ maximises the marginal likelihood. The reference is importance
sampling from a multivariate t around the posterior's mode, which gives log p(y | θ) for every θ from the same draws.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import random
from matplotlib.figure import Figure
from scipy.optimize import minimize
from scipy.special import expit, gammaln, logsumexp
from sklearn.datasets import load_breast_cancer

from benchmarks.papers.paths import Walk
from benchmarks.report import Report
from numpyro_ebipla import EBIPLA, recipes
from numpyro_ebipla.optim import langevin

PRIOR_VARIANCE = 5.0


class Settings(NamedTuple):
    """Steps are ``relative_step / L``: 2505.18427 scales its grid of steps by this bound L on the curvature."""

    num_particles: tuple[int, ...] = (10, 50, 100)
    num_steps: int = 4000
    soul_steps: int = 1000
    repeats: int = 3
    relative_step: float = 1.0
    rate: float = 0.01  # of θ, for the recipes that have a rate of their own
    num_features: int = 30
    test_fraction: float = 0.2
    draws: int = 2**15
    batches: int = 8


REDUCED, FULL = Settings(), Settings(num_steps=40_000, soul_steps=10_000, repeats=10, batches=32)


class Data(NamedTuple):
    X: np.ndarray
    y: np.ndarray
    X_test: np.ndarray
    y_test: np.ndarray


def load(s: Settings, seed: int) -> Data:
    """Breast cancer, features standardised over all data as in 2204.12965."""
    X, y = load_breast_cancer(return_X_y=True)
    X = ((X - X.mean(0)) / X.std(0))[:, : s.num_features]
    order = np.random.RandomState(seed).permutation(len(y))
    cut = round(len(y) * (1 - s.test_fraction))
    train, test = order[:cut], order[cut:]
    return Data(X[train], y[train].astype(float), X[test], y[test].astype(float))


def model(X, y):
    theta = numpyro.param("theta", 0.0)
    w = numpyro.sample("w", dist.Normal(theta, PRIOR_VARIANCE**0.5).expand([X.shape[1]]).to_event(1))
    with numpyro.plate("data", len(y)):
        numpyro.sample("y", dist.Bernoulli(logits=X @ w), obs=y)


# --- reference ----------------------------------------------------------------------------------------


def log_likelihood(X: np.ndarray, y: np.ndarray, w: np.ndarray) -> np.ndarray:
    """``[n, data] `` log probabilities of every datum for ``w [n, d]``."""
    logits = w @ X.T
    return y * logits - np.logaddexp(0, logits)


class Reference(NamedTuple):
    """θ by importance sampling, with standard errors from independent batches."""

    theta: float
    theta_error: float
    test_density: float
    test_error: float
    ess: float
    grid: np.ndarray
    log_marginal: np.ndarray
    posterior: np.ndarray  # [n] draws of one weight, equally weighted


def mode(data: Data, theta: float) -> tuple[np.ndarray, np.ndarray]:
    """The posterior's mode, by Newton's method with a trust region, and the inverse of its Hessian."""
    d = data.X.shape[1]

    def minus_log(w: np.ndarray) -> float:
        return -log_likelihood(data.X, data.y, w).sum() + np.sum((w - theta) ** 2) / (2 * PRIOR_VARIANCE)

    gradient = lambda w: data.X.T @ (expit(data.X @ w) - data.y) + (w - theta) / PRIOR_VARIANCE
    slope = lambda w: expit(data.X @ w) * expit(-data.X @ w)
    hessian = lambda w: (data.X.T * slope(w)) @ data.X + np.eye(d) / PRIOR_VARIANCE
    w = minimize(minus_log, np.zeros(d), jac=gradient, hess=hessian, method="trust-exact").x
    return w, np.linalg.inv(hessian(w))


class Draws(NamedTuple):
    """Draws ``w [n, d]`` of a multivariate t and what their weights need at any θ."""

    w: np.ndarray
    base: np.ndarray

    def log_weight(self, theta: float) -> np.ndarray:
        """Of the prior at θ times the likelihood against the proposal: a function of ``Σ w`` and ``Σ w²`` only."""
        square = np.sum(self.w**2, 1) - 2 * theta * self.w.sum(1) + self.w.shape[1] * theta**2
        return self.base - square / (2 * PRIOR_VARIANCE)


def draw(data: Data, num: int, rng: np.random.RandomState, centre: np.ndarray, cov: np.ndarray, dof: float) -> Draws:
    d, root = len(centre), np.linalg.cholesky(cov)
    z = rng.standard_normal((num, d))
    scale = np.sqrt(dof / rng.chisquare(dof, num))
    w = centre + scale[:, None] * z @ root.T
    log_q = gammaln((dof + d) / 2) - gammaln(dof / 2) - d / 2 * np.log(dof * np.pi) - np.log(np.diag(root)).sum()
    log_q = log_q - (dof + d) / 2 * np.log1p(scale**2 * np.sum(z**2, 1) / dof)
    prior = 0.5 * d * np.log(2 * np.pi * PRIOR_VARIANCE)
    return Draws(w, log_likelihood(data.X, data.y, w).sum(1) - log_q - prior)


def reference(data: Data, s: Settings, rng: np.random.RandomState, shown: int, dof: float = 10.0) -> Reference:
    """The proposal has the mode's curvature first, then thrice the moments of its weighted draws, θ with it."""
    theta = 0.0
    for _ in range(30):  # EM with the mode in place of the mean
        theta = mode(data, theta)[0].mean()
    centre, cov = mode(data, theta)
    for _ in range(4):
        draws = draw(data, 2 * s.draws, rng, centre, cov, dof)
        weight = draws.log_weight(theta)
        weight = np.exp(weight - logsumexp(weight))
        centre = weight @ draws.w
        cov = (draws.w - centre).T @ (weight[:, None] * (draws.w - centre))
        theta = centre.mean()  # a step of EM
    grid = theta + np.linspace(-1, 1, 201)
    curves, tests, fractions, kept = [], [], [], []
    for _ in range(s.batches):
        draws = draw(data, s.draws, rng, centre, cov, dof)
        curves.append(np.array([logsumexp(draws.log_weight(t)) for t in grid]) - np.log(s.draws))
        weight = draws.log_weight(theta)
        weight = np.exp(weight - logsumexp(weight))
        fractions.append(1 / np.sum(weight**2) / s.draws)
        kept.append(draws.w[rng.choice(s.draws, 2000, p=weight), shown])
        tests.append(np.mean(np.log(weight @ np.exp(log_likelihood(data.X_test, data.y_test, draws.w)))))
    pooled = logsumexp(np.array(curves), axis=0) - np.log(s.batches)
    best = np.array([peak(grid, curve) for curve in curves])
    spread = lambda x: float(np.std(x, ddof=1) / np.sqrt(len(x)))
    return Reference(
        peak(grid, pooled), spread(best), float(np.mean(tests)), spread(np.array(tests)), float(np.mean(fractions)),
        grid, pooled, np.concatenate(kept),
    )  # fmt: skip


def peak(grid: np.ndarray, curve: np.ndarray) -> float:
    """The maximum of a parabola through the largest value and its neighbours."""
    i = int(np.clip(np.argmax(curve), 1, len(grid) - 2))
    a, b, c = curve[i - 1 : i + 2]
    return float(grid[i] + 0.5 * (grid[1] - grid[0]) * (a - c) / (a - 2 * b + c))


# --- fits ---------------------------------------------------------------------------------------------


def systems(s: Settings, h: float) -> dict[str, tuple[Callable[[int], EBIPLA], int]]:
    """``{name: (N -> system, steps)}``."""
    # θ may move faster than the particles: 2505.18427 has two steps, of which it tunes both.
    move = langevin(s.rate, noise=False, whole=True)
    return {
        "PGD": (lambda n: recipes.pgd(model, step_size=h, num_particles=n, optim=move), s.num_steps),
        "IPLA": (lambda n: recipes.ipla(model, step_size=h, num_particles=n), s.num_steps),
        "SOUL": (lambda n: recipes.soul(model, step_size=h, rate=s.rate, num_particles=n), s.soul_steps),
        "JALA-EM": (lambda n: recipes.jala_em(model, step_size=h, num_particles=n, optim=move), s.num_steps),
        "default (MALA, Adam)": (lambda n: EBIPLA(model, num_particles=n), s.num_steps),
    }


def cloud(state: Any) -> tuple[np.ndarray, np.ndarray]:
    """``(w [N, d], weights [N])`` of the last particles."""
    w = np.asarray(state.posterior.shared["w"], np.float64)
    memory = state.posterior.memory
    if memory is None:
        return w, np.full(len(w), 1 / len(w))
    log_weight = np.asarray(memory.log_weight, np.float64)
    return w, np.exp(log_weight - logsumexp(log_weight))


def run(full: bool, seed: int, data_dir: str | None, settings: Settings | None = None) -> Report:
    del data_dir
    s = settings or (FULL if full else REDUCED)
    data = load(s, seed)
    shown = 1
    known = reference(data, s, np.random.RandomState(seed), shown)
    curvature = np.linalg.eigvalsh(data.X.T @ data.X / 4)[-1] + 1 / PRIOR_VARIANCE
    h = s.relative_step / curvature
    args = [jnp.asarray(a, jnp.float32) for a in (data.X, data.y)]
    where = f"{len(data.y)} training data, {data.X.shape[1]} features"
    drawn = f"{s.batches} × {s.draws} draws, ESS {known.ess:.0%}"
    tested = f"mean over {len(data.y_test)} test data"
    rows: list[tuple[str, Any, Any, str]] = [
        ("reference: θ", "–", f"{known.theta:.4f} ± {known.theta_error:.4f}", f"{where}; {drawn}"),
        ("reference: test log density", "–", f"{known.test_density:.4f} ± {known.test_error:.4f}", tested),
    ]  # fmt: skip
    paths: dict[str, dict[int, np.ndarray]] = {}
    clouds = {}
    for name, (make, steps) in systems(s, h).items():
        paths[name] = {}
        for n in s.num_particles:
            system = make(n)
            at = (
                (lambda state, _: state.average["theta"])
                if system.averaging
                else (lambda state, _: state.params["theta"])
            )
            walk = Walk(system, steps, at)
            estimates, densities = [], []
            for repeat in range(s.repeats):
                state, path = walk(random.fold_in(random.key(seed), 1000 * repeat + n), *args)
                w, weight = cloud(state)
                estimates.append(path[-1] if system.averaging else path[len(path) // 2 :].mean())
                densities.append(np.mean(np.log(weight @ np.exp(log_likelihood(data.X_test, data.y_test, w)))))
            paths[name][n], clouds[name, n] = path, (w[:, shown], weight)
            what = f"N = {n}, {steps} steps, {s.repeats} repeats"
            found = [f"{np.mean(x):.4f} ± {np.std(x, ddof=1):.4f}" for x in (estimates, densities)]
            print(f"{name}, N = {n}: θ = {found[0]}, reference {known.theta:.4f}", flush=True)
            rows.append((f"{name}, N = {n}: θ", found[0], f"{known.theta:.4f}", what))
            rows.append((f"{name}, N = {n}: test log density", found[1], f"{known.test_density:.4f}", what))
    notes = (
        "The data are scikit-learn's (the diagnostic set, 569 × 30); the papers' is the original one of 683 × 9, "
        "which is not there, so their figures do not apply. The reference stands in the place of published values.",
        "θ is the mean over the second half of the steps, for the default its running average; test densities are "
        "those of the last N particles, log of the mean over particles. Both: mean ± standard deviation of repeats.",
        f"h = {s.relative_step:g}/L = {h:.2g} for all particles and IPLA's θ; θ's rate is {s.rate:g} for PGD, SOUL "
        "and JALA-EM.",
        "With that h the flattest weights, whose curvature is the prior's 1/5, forget their start in about "
        f"{PRIOR_VARIANCE / h:.0f} steps: in fewer, θ keeps part of the error of the N draws that a run began with, "
        "and its path looks steadier than it is. MALA's adapted scales shorten this.",
        "SOUL's N particles are successive states of one chain, much nearer to each other than the posterior is wide.",
        f"The reference is a t proposal at the posterior's mode; errors are from {s.batches} independent batches.",
    )
    record = {
        "settings": s._asdict(), "step": h, "reference": known._asdict() | {"posterior": None},
        "paths": {k: {n: p[:: max(1, len(p) // 400)] for n, p in v.items()} for k, v in paths.items()},
    }  # fmt: skip
    title = "Bayesian logistic regression, empirical Bayes (2204.12965, 2505.18427)"
    return Report(title, rows, record, _figure(s, paths, clouds, known), notes)


def _figure(s: Settings, paths: Any, clouds: Any, known: Reference) -> Figure:
    figure = Figure(figsize=(12, 7), layout="constrained")
    axes = figure.subplots(2, len(s.num_particles), squeeze=False)
    grid = np.linspace(*np.quantile(known.posterior, [0.0005, 0.9995]), 200)
    for column, n in enumerate(s.num_particles):
        top, bottom = axes[:, column]
        for i, name in enumerate(paths):
            path = paths[name][n]
            top.plot(np.arange(len(path)), path, color=f"C{i}", lw=1.2, label=name)
            bottom.plot(grid, smoothed(grid, *clouds[name, n]), color=f"C{i}", lw=1.5, label=name)
        top.axhline(known.theta, color="k", ls="--", lw=1, label="reference")
        bottom.fill_between(grid, smoothed(grid, known.posterior), color="k", alpha=0.15, label="reference")
        top.set(title=f"N = {n} particles", xlabel="step", ylabel="θ", xscale="symlog")
        top.set_xlim(0, s.num_steps)
        bottom.set_ylim(0, 3 * smoothed(grid, known.posterior).max())
        bottom.set(xlabel="weight of the second feature", ylabel="posterior density")
        top.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=8)
    figure.suptitle(
        "Logistic regression, w ~ N(θ, 5): the estimate of θ (above), and the last particles' posterior of one weight, "
        "smoothed, grey the reference (below)",
        fontsize=11,
    )
    return figure


def smoothed(grid: np.ndarray, x: np.ndarray, weight: np.ndarray | None = None) -> np.ndarray:
    """A kernel density estimate by Silverman's rule."""
    weight = np.full(len(x), 1 / len(x)) if weight is None else weight
    mean = weight @ x
    width = 1.06 * np.sqrt(weight @ (x - mean) ** 2) * (1 / np.sum(weight**2)) ** -0.2
    return np.exp(-0.5 * ((grid[:, None] - x) / width) ** 2) @ weight / (width * np.sqrt(2 * np.pi))
