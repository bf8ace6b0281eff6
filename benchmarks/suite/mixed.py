"""Mixed models as one writes them, from zeros and ones, judged in total and in standard errors.

The marginal likelihood of a linear one is normal; that of one latent a group is a sum over a fine grid.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import Array
from jax.flatten_util import ravel_pytree
from jax.scipy.special import logsumexp
from numpyro.distributions import biject_to, constraints
from scipy import optimize

from benchmarks.suite.case import Case, Params, double

positive = constraints.positive
#: Nats above the optimum, of all data together.
TOTAL = 0.02
#: Standard normal values of a group's effect: beyond any posterior here, and finer than the narrowest.
Z = np.linspace(-9, 9, 721)


class Truth(NamedTuple):
    """What is exact about a mixed model, as functions of its parameters in double precision.

    Attributes:
        log_marginal: ``params -> log p(y)``, of all data.
        posterior: ``params -> (means, sds)`` of the site's elements.
        start: near the maximum, constrained.
        constraints: of the parameters that have one.
    """

    log_marginal: Callable[[Any], Array]
    posterior: Callable[[Any], tuple[Array, Array]]
    start: dict[str, Any]
    constraints: dict[str, Any]


def mixed_case(name: str, model: Callable, args: tuple, site: str, truth: Truth) -> Case:
    """Return a case whose values are of all data together; the maximum and its curvature are found numerically."""
    bijections = {k: biject_to(truth.constraints.get(k, constraints.real)) for k in truth.start}

    def free(params: Params) -> np.ndarray:
        with jax.enable_x64(True):
            p = {k: bijections[k].inv(jnp.asarray(params[k], jnp.float64)) for k in truth.start}
            return np.asarray(ravel_pytree(p)[0])

    with jax.enable_x64(True):
        start = {k: bijections[k].inv(jnp.asarray(v, jnp.float64)) for k, v in truth.start.items()}
        flat, unravel = ravel_pytree(start)
        back = lambda v: {k: bijections[k](x) for k, x in unravel(v).items()}
        loss = lambda v: -truth.log_marginal(back(v))
        slope = jax.jit(jax.value_and_grad(loss))

        def both(v: np.ndarray) -> tuple[float, np.ndarray]:
            with jax.enable_x64(True):
                value, grad = slope(jnp.asarray(v))
                return float(value), np.asarray(grad)

        found = optimize.minimize(both, np.asarray(flat), jac=True, method="BFGS", options={"gtol": 1e-5})
        information = np.asarray(jax.hessian(loss)(jnp.asarray(found.x)))
        best = jax.tree.map(np.asarray, back(jnp.asarray(found.x)))
        means = jax.eval_shape(lambda: truth.posterior(best))[0]
    errors = np.sqrt(np.diag(np.linalg.inv(information)))

    def value(params: Params) -> float:
        return -both(free(params))[0]

    def posterior(params: Params, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        with jax.enable_x64(True):
            mean, sd = truth.posterior(jax.tree.map(jnp.asarray, double(params)))
            return np.asarray(mean)[indices], np.asarray(sd)[indices]

    def off(params: Params) -> float:
        return float(np.max(np.abs(free(params) - found.x) / errors))

    return Case(name, model, args, site, means.shape[0], value, -found.fun, posterior, best, threshold=TOTAL, off=off)


# --- linear mixed models ------------------------------------------------------------------------------


class Linear(NamedTuple):
    """``y = fixed + design · effects + e``, ``effects ~ N(0, cov)``, ``e ~ N(0, diag(noise))``."""

    fixed: Array
    design: Array
    cov: Array
    noise: Array


def linear_truth(y: np.ndarray, read: Callable[[Any], Linear], shape: tuple, start: dict, limits: dict) -> Truth:
    """Return the truth of a linear model, the site being the first effects, of this shape."""
    y = np.asarray(y, np.float64)

    def log_marginal(p: Any) -> Array:
        fixed, design, cov, noise = read(p)
        root = jnp.linalg.cholesky(design @ cov @ design.T + jnp.diag(noise))
        return dist.MultivariateNormal(fixed, scale_tril=root).log_prob(y)

    def posterior(p: Any) -> tuple[Array, Array]:
        fixed, design, cov, noise = read(p)
        gain = jnp.linalg.solve(design @ cov @ design.T + jnp.diag(noise), design @ cov).T
        sd = jnp.sqrt(jnp.diag(cov - gain @ design @ cov))
        size = int(np.prod(shape))
        return (gain @ (y - fixed))[:size].reshape(shape), sd[:size].reshape(shape)

    return Truth(log_marginal, posterior, start, limits)


def indicators(group: np.ndarray, number: int) -> np.ndarray:
    return (group[:, None] == np.arange(number)).astype(np.float64)


def intercepts_case(name: str, far: float = 23.0, scale: float = 1.0) -> Case:
    """Six groups whose mean is far from zero in units of their spread, as lengths in millimetres are."""
    rng, groups = np.random.default_rng(10), 6
    g = np.repeat(np.arange(groups), 24)
    y = scale * (far + 1.8 * rng.standard_normal(groups)[g] + 0.55 * rng.standard_normal(len(g)))

    def model(g, y):
        mu = numpyro.param("mu", 0.0)
        s = numpyro.param("s", 1.0, constraint=positive)
        e = numpyro.param("e", 1.0, constraint=positive)
        with numpyro.plate("groups", groups):
            u = numpyro.sample("u", dist.Normal(0, s))
        with numpyro.plate("obs", len(y)):
            numpyro.sample("y", dist.Normal(mu + u[g], e), obs=y)

    design = indicators(g, groups)
    read = lambda p: Linear(p["mu"] + 0.0 * y, design, p["s"] ** 2 * jnp.eye(groups), p["e"] ** 2 + 0.0 * y)
    start = {"mu": far * scale, "s": 1.8 * scale, "e": 0.55 * scale}
    truth = linear_truth(y.astype(np.float32), read, (groups,), start, {"s": positive, "e": positive})
    return mixed_case(name, model, (g, y.astype(np.float32)), "u", truth)


def slopes_case(name: str) -> Case:
    """Reaction times over days (after lme4's sleepstudy): correlated intercepts and slopes, days from zero on."""
    rng, groups = np.random.default_rng(11), 18
    g, t = np.repeat(np.arange(groups), 10), np.tile(np.arange(10.0), groups)
    b = rng.multivariate_normal([0, 0], [[24.0**2, 14.4], [14.4, 36.0]], groups)
    y = 251 + 10.5 * t + b[g, 0] + b[g, 1] * t + 25 * rng.standard_normal(len(g))

    def model(g, t, y):
        beta = numpyro.param("beta", jnp.zeros(2))
        s = numpyro.param("s", jnp.ones(2), constraint=positive)
        root = numpyro.param("root", jnp.eye(2), constraint=constraints.corr_cholesky)
        e = numpyro.param("e", 1.0, constraint=positive)
        with numpyro.plate("groups", groups):
            u = numpyro.sample("u", dist.MultivariateNormal(0, scale_tril=s[:, None] * root))
        with numpyro.plate("obs", len(y)):
            mean = beta[0] + u[g, 0] + (beta[1] + u[g, 1]) * t
            numpyro.sample("y", dist.Normal(mean, e), obs=y)

    one = indicators(g, groups)
    design = np.stack([one, one * t[:, None]], -1).reshape(len(g), 2 * groups)  # by group, intercept then slope

    def read(p: Any) -> Linear:
        root = p["s"][:, None] * p["root"]
        cov = jnp.kron(jnp.eye(groups), root @ root.T)
        return Linear(p["beta"][0] + p["beta"][1] * t, design, cov, p["e"] ** 2 + 0.0 * t)

    start = {"beta": [251.0, 10.5], "s": [24.0, 6.0], "root": np.array([[1, 0], [0.1, 0.995]]), "e": 25.0}
    limits = {"s": positive, "root": constraints.corr_cholesky, "e": positive}
    truth = linear_truth(y.astype(np.float32), read, (groups, 2), start, limits)
    return mixed_case(name, model, (g, t.astype(np.float32), y.astype(np.float32)), "u", truth)


def two_factors_case(name: str, a: np.ndarray, b: np.ndarray, sds: tuple[float, float, float]) -> Case:
    """Two grouping factors, crossed or nested, and a mean of 23."""
    rng, (A, B) = np.random.default_rng(12), (int(a.max()) + 1, int(b.max()) + 1)
    noise = sds[2] * rng.standard_normal(len(a))
    y = 23 + sds[0] * rng.standard_normal(A)[a] + sds[1] * rng.standard_normal(B)[b] + noise

    def model(a, b, y):
        mu = numpyro.param("mu", 0.0)
        s, r, e = (numpyro.param(k, 1.0, constraint=positive) for k in "sre")
        with numpyro.plate("A", A):
            u = numpyro.sample("u", dist.Normal(0, s))
        with numpyro.plate("B", B):
            v = numpyro.sample("v", dist.Normal(0, r))
        with numpyro.plate("obs", len(y)):
            numpyro.sample("y", dist.Normal(mu + u[a] + v[b], e), obs=y)

    design = np.concatenate([indicators(a, A), indicators(b, B)], 1)

    def read(p: Any) -> Linear:
        cov = jnp.diag(jnp.concatenate([jnp.full(A, p["s"] ** 2), jnp.full(B, p["r"] ** 2)]))
        return Linear(p["mu"] + 0.0 * y, design, cov, p["e"] ** 2 + 0.0 * y)

    start = {"mu": 23.0, **dict(zip("sre", sds, strict=True))}
    truth = linear_truth(y.astype(np.float32), read, (A,), start, dict.fromkeys("sre", positive))
    return mixed_case(name, model, (a, b, y.astype(np.float32)), "u", truth)


def crossed_case(name: str) -> Case:
    """Every sample on every plate (after lme4's Penicillin)."""
    return two_factors_case(name, np.repeat(np.arange(24), 6), np.tile(np.arange(6), 24), (0.85, 1.9, 0.55))


def nested_case(name: str) -> Case:
    """Broods within locations, some of them alone there."""
    brood = np.arange(240) * 72 // 240
    return two_factors_case(name, brood * 36 // 72, brood, (0.6, 0.75, 0.55))


def variances_case(name: str) -> Case:
    """A variance of its own for each of two kinds of children (after nlme's Orthodont)."""
    rng, groups = np.random.default_rng(13), 27
    kind = (np.arange(groups) < 11).astype(int)
    g, t = np.repeat(np.arange(groups), 4), np.tile([8.0, 10, 12, 14], groups)
    noise = np.where(kind[g] == 1, 0.7, 1.6) * rng.standard_normal(len(g))
    y = 16.8 + 0.7 * t + 1.8 * rng.standard_normal(groups)[g] + noise

    def model(g, k, t, y):
        beta = numpyro.param("beta", jnp.zeros(2))
        s = numpyro.param("s", 1.0, constraint=positive)
        e = numpyro.param("e", jnp.ones(2), constraint=positive)
        with numpyro.plate("groups", groups):
            u = numpyro.sample("u", dist.Normal(0, s))
        with numpyro.plate("obs", len(y)):
            numpyro.sample("y", dist.Normal(beta[0] + beta[1] * t + u[g], e[k]), obs=y)

    design = indicators(g, groups)

    def read(p: Any) -> Linear:
        noise = p["e"][kind[g]] ** 2
        return Linear(p["beta"][0] + p["beta"][1] * t, design, p["s"] ** 2 * jnp.eye(groups), noise)

    start = {"beta": [16.8, 0.7], "s": 1.8, "e": [1.6, 0.7]}
    truth = linear_truth(y.astype(np.float32), read, (groups,), start, {"s": positive, "e": positive})
    return mixed_case(name, model, (g, kind[g], t.astype(np.float32), y.astype(np.float32)), "u", truth)


def factors_case(name: str) -> Case:
    """A factor model with one factor: six columns of 300 people, loadings from ones."""
    rng, people = np.random.default_rng(14), 300
    loadings = np.array([1.2, 0.8, -0.5, 0.6, 1.0, 0.3])
    y = 3 + rng.standard_normal((people, 1)) * loadings + rng.uniform(0.5, 1, 6) * rng.standard_normal((people, 6))
    y = y.astype(np.float32)

    def model(y):
        mean, load = numpyro.param("mean", jnp.zeros(6)), numpyro.param("load", jnp.ones(6))
        e = numpyro.param("e", jnp.ones(6), constraint=positive)
        with numpyro.plate("people", people):
            f = numpyro.sample("f", dist.Normal(0, 1))
            numpyro.sample("y", dist.Normal(mean + f[..., None] * load, e).to_event(1), obs=y)

    data = y.astype(np.float64)

    def log_marginal(p: Any) -> Array:
        cov = jnp.outer(p["load"], p["load"]) + jnp.diag(p["e"] ** 2)
        return dist.MultivariateNormal(p["mean"], cov).log_prob(data).sum()

    def posterior(p: Any) -> tuple[Array, Array]:
        weight = p["load"] / p["e"] ** 2
        precision = 1 + weight @ p["load"]
        return (data - p["mean"]) @ weight / precision, jnp.full(people, precision**-0.5)

    start = {"mean": np.full(6, 3.0), "load": loadings, "e": np.full(6, 0.75)}
    return mixed_case(name, model, (y,), "f", Truth(log_marginal, posterior, start, {"e": positive}))


# --- one latent a group -------------------------------------------------------------------------------


def grid_truth(log_lik: Callable[[Any, Array], Array], scale: Callable, start: dict, limits: dict) -> Truth:
    """Return the truth from ``log_lik(params, z) -> [groups]`` at a standard normal effect ``z``.

    The sum over the grid is exact to rounding, as the integrand vanishes at both ends.
    """

    def log_joint(p: Any) -> Array:
        one = lambda z: log_lik(p, z) - 0.5 * z**2 - 0.5 * jnp.log(2 * jnp.pi)
        return jax.lax.map(jax.checkpoint(one), jnp.asarray(Z, jnp.float64))

    def posterior(p: Any) -> tuple[Array, Array]:
        weight = jax.nn.softmax(log_joint(p), 0)
        mean = Z @ weight
        return scale(p) * mean, scale(p) * jnp.sqrt(Z**2 @ weight - mean**2)

    log_marginal = lambda p: (logsumexp(log_joint(p), 0) + np.log(Z[1] - Z[0])).sum()
    return Truth(log_marginal, posterior, start, limits)


GROUPS, EACH = 40, 12


def answers_case(name: str, family: str) -> Case:
    """A covariate and an intercept by group, for one family of answers."""
    rng = np.random.default_rng(15)
    g, x = np.repeat(np.arange(GROUPS), EACH), rng.normal(2.0, 1.5, GROUPS * EACH).astype(np.float32)
    draw, likelihood, extras = FAMILIES[family]
    y, censored = draw(rng, x, rng.standard_normal(GROUPS)[g])

    def model(g, x, y, censored):
        slope = numpyro.param("slope", 0.0)
        s = numpyro.param("s", 1.0, constraint=positive)
        more = {k: numpyro.param(k, jnp.asarray(v), constraint=c) for k, (v, _, c) in extras.items()}
        with numpyro.plate("groups", GROUPS):
            u = numpyro.sample("u", dist.Normal(0, s))
        with numpyro.plate("obs", len(y)):
            d = likelihood(slope * x + u[g], more)
            if censored is None:
                numpyro.sample("y", d, obs=y)
            else:
                numpyro.sample("y", dist.RightCensoredDistribution(d, censored), obs=y)

    def log_lik(p: Any, z: Array) -> Array:
        d = likelihood(p["slope"] * x.astype(np.float64) + p["s"] * z, p)
        if censored is None:
            value = d.log_prob(y if y.dtype == np.int32 else y.astype(np.float64))
        else:
            survives = -((y.astype(np.float64) / d.scale) ** d.concentration)
            value = jnp.where(censored, survives, d.log_prob(y.astype(np.float64)))
        return jnp.zeros(GROUPS, value.dtype).at[g].add(value)

    start = {"slope": 0.5, "s": 0.8, **{k: v for k, (_, v, _) in extras.items()}}
    limits = {"s": positive, **{k: c for k, (_, _, c) in extras.items()}}
    truth = grid_truth(log_lik, lambda p: p["s"], start, limits)
    return mixed_case(name, model, (g, x, y, censored), "u", truth)


def _counts(rng, mean, rest):
    return rng.poisson(mean * rest).astype(np.float32), None


def _survival(rng, x, u):
    time, end = 8 * rng.weibull(1.4, len(x)) * np.exp(0.5 * x + 0.6 * u), rng.uniform(5, 60, len(x))
    return np.minimum(time, end).astype(np.float32), (time > end)


_real, _unit = constraints.real, constraints.unit_interval
#: By family: draw ``(rng, x, u) -> (y, censored)``; ``(eta, params) -> distribution``; and
#: ``{param: (start, near, limits)}``.
FAMILIES: dict[str, tuple[Callable, Callable, dict[str, tuple]]] = {
    "bernoulli": (
        lambda rng, x, u: (rng.binomial(1, 1 / (1 + np.exp(1 - 0.6 * x - 0.9 * u))).astype(np.float32), None),
        lambda eta, p: dist.Bernoulli(logits=p["b"] + eta),
        {"b": (0.0, -1.0, _real)},
    ),
    "binomial": (
        lambda rng, x, u: (rng.binomial(8, 1 / (1 + np.exp(1 - 0.6 * x - 0.9 * u))).astype(np.float32), None),
        lambda eta, p: dist.Binomial(8, logits=p["b"] + eta),
        {"b": (0.0, -1.0, _real)},
    ),
    "poisson": (
        lambda rng, x, u: _counts(rng, np.exp(1 + 0.3 * x + 0.7 * u), 1.0),
        lambda eta, p: dist.Poisson(jnp.exp(p["b"] + eta)),
        {"b": (0.0, 1.0, _real)},
    ),
    "negative_binomial": (
        lambda rng, x, u: _counts(rng, np.exp(1 + 0.3 * x + 0.7 * u), rng.gamma(2.5, 1 / 2.5, len(x))),
        lambda eta, p: dist.NegativeBinomial2(jnp.exp(p["b"] + eta), p["k"]),
        {"b": (0.0, 1.0, _real), "k": (1.0, 2.5, positive)},
    ),
    "zero_inflated": (
        lambda rng, x, u: _counts(rng, np.exp(1 + 0.3 * x + 0.7 * u), rng.uniform(size=len(x)) > 0.3),
        lambda eta, p: dist.ZeroInflatedPoisson(p["gate"], rate=jnp.exp(p["b"] + eta)),
        {"b": (0.0, 1.0, _real), "gate": (0.5, 0.3, _unit)},
    ),
    "ordinal": (
        lambda rng, x, u: (
            np.digitize(0.6 * x + 1.1 * u + rng.logistic(size=len(x)), [-0.5, 1, 2.5]).astype(np.int32),
            None,
        ),
        lambda eta, p: dist.OrderedLogistic(eta, p["cut"]),
        {"cut": ([-1.0, 0.0, 1.0], [-0.5, 1.0, 2.5], constraints.ordered_vector)},
    ),
    "survival": (
        _survival,
        lambda eta, p: dist.Weibull(jnp.exp(p["b"] + eta), p["k"]),
        {"b": (0.0, 2.0, _real), "k": (1.0, 1.4, positive)},
    ),
}


def growth_case(name: str) -> Case:
    """Logistic growth over years (after nlme's Orange): each tree's size at the end is its own."""
    rng = np.random.default_rng(16)
    g, t = np.repeat(np.arange(GROUPS), EACH), np.tile(np.linspace(0.3, 4.4, EACH), GROUPS)
    size = 19 + 3 * rng.standard_normal(GROUPS)[g]
    y = (size / (1 + np.exp(-(t - 2) / 0.9)) + 0.8 * rng.standard_normal(len(g))).astype(np.float32)

    def model(g, t, y):
        end, middle = numpyro.param("end", 1.0), numpyro.param("middle", 1.0)
        rate, s, e = (numpyro.param(k, 1.0, constraint=positive) for k in ("rate", "s", "e"))
        with numpyro.plate("trees", GROUPS):
            u = numpyro.sample("u", dist.Normal(0, s))
        with numpyro.plate("obs", len(y)):
            mean = (end + u[g]) / (1 + jnp.exp(-(t - middle) / rate))
            numpyro.sample("y", dist.Normal(mean, e), obs=y)

    def log_lik(p: Any, z: Array) -> Array:
        mean = (p["end"] + p["s"] * z) / (1 + jnp.exp(-(t - p["middle"]) / p["rate"]))
        value = dist.Normal(mean, p["e"]).log_prob(y.astype(np.float64))
        return jnp.zeros(GROUPS, value.dtype).at[g].add(value)

    start = {"end": 19.0, "middle": 2.0, "rate": 0.9, "s": 3.0, "e": 0.8}
    limits = dict.fromkeys(("rate", "s", "e"), positive)
    truth = grid_truth(log_lik, lambda p: p["s"], start, limits)
    return mixed_case(name, model, (g, t.astype(np.float32), y), "u", truth)


def responses_case(name: str, people: int = 400, items: int = 10) -> Case:
    """Two-parameter item responses."""
    rng = np.random.default_rng(17)
    slope, easy = np.exp(0.3 * rng.standard_normal(items)), rng.standard_normal(items)
    logits = slope * rng.standard_normal((people, 1)) + easy
    y = (rng.random((people, items)) < 1 / (1 + np.exp(-logits))).astype(np.float32)

    def model(y):
        a, d = numpyro.param("a", jnp.ones(items)), numpyro.param("d", jnp.zeros(items))
        with numpyro.plate("people", people):
            t = numpyro.sample("t", dist.Normal(0, 1))
            numpyro.sample("y", dist.Bernoulli(logits=a * t[..., None] + d).to_event(1), obs=y)

    data = y.astype(np.float64)

    def log_lik(p: Any, z: Array) -> Array:
        eta = p["a"] * z + p["d"]
        return data @ eta - jnp.logaddexp(0.0, eta).sum()

    truth = grid_truth(log_lik, lambda p: jnp.ones(()), {"a": slope, "d": easy}, {})
    return mixed_case(name, model, (y,), "t", truth)
