"""The suite's truths: optima are maxima, likelihoods and posteriors are those of the models. Nothing is fitted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random
from jax.flatten_util import ravel_pytree
from numpyro import handlers
from numpyro.infer.util import log_density
from scipy import special, stats

from benchmarks.suite import cases, energies, judge
from benchmarks.suite.gaussian import LinearGaussian

ENERGIES = [name for name in cases.NAMES if hasattr(energies, name)]
MIXED = [name for name in cases.NAMES if name.startswith("mixed_")]
CLOSED = [name for name in cases.NAMES if name not in [*ENERGIES, *MIXED]]
GRID = ["poisson", "poisson_50000", "beta_binomial", "logistic_groups", "conditional_energy"]
GAUSSIAN = [name for name in CLOSED if name not in [*GRID, "eight_schools"]]


#: Mixed models whose log joint density is quadratic in the latents.
LINEAR = [name for name in MIXED if name.split("_")[1] in ("intercepts", "slopes", "crossed", "nested", "variances")]

OTHERS = [name for name in MIXED if name not in LINEAR]


def initial_params(case):
    trace = handlers.trace(handlers.seed(case.model, random.key(0))).get_trace(*case.args)
    return {name: site["value"] for name, site in trace.items() if site["type"] == "param"}


def log_joint(case, params, x, names=None):
    """``log p(x, y)`` of each datum by the model itself, ``[M]``; of a site alone with ``names``."""
    kwargs = {k: v for k, v in case.kwargs.items() if k != "batch_size"}
    model = handlers.substitute(handlers.seed(case.model, random.key(0)), data={**params, case.site: x})
    trace = handlers.trace(model).get_trace(*case.args, **kwargs)
    sites = [s for k, s in trace.items() if s["type"] == "sample" and (names is None or k in names)]
    return sum(s["fn"].log_prob(s["value"]) for s in sites)


@pytest.mark.parametrize("name", CLOSED)
def test_optimum_is_a_maximum(name):
    """No neighbour is better, and the loss is even about the optimum: its gradient is zero there."""
    case = cases.make(name)
    assert case.value(case.best) == case.optimum
    rng = np.random.default_rng(0)
    for _ in range(5):
        direction = {k: rng.normal(size=np.shape(v)) for k, v in case.best.items()}
        if "q" in direction:  # a symmetric matrix
            direction["q"] = direction["q"] + direction["q"].T
        lost = {}
        for step in (-0.02, 0.02):
            near = {k: v + step * np.maximum(np.abs(v), 1e-4) * direction[k] for k, v in case.best.items()}
            lost[step] = case.optimum - case.value(near)
        # 1e-9: the precision of the numerical maxima.
        assert min(lost.values()) > -1e-9, lost
        if name != "eight_schools":  # there τ is at its boundary
            assert abs(lost[0.02] - lost[-0.02]) < 0.5 * sum(lost.values()) + 1e-9, lost


@pytest.mark.parametrize("name", GAUSSIAN)
def test_gaussian_truths_are_those_of_the_model(name):
    """A quadratic log joint: its Hessian and one Newton step give posterior and marginal of every datum."""
    case = cases.make(name)
    indices = case.compared()
    mean, sd = case.posterior(case.best, np.arange(case.num_data))
    params = {k: jnp.asarray(v, jnp.float32) for k, v in case.best.items()}
    unit = lambda t: log_joint(case, params, jnp.asarray(mean, jnp.float32) + jnp.asarray(sd, jnp.float32) * t)
    shape = np.shape(mean)[1:]
    zero = jnp.zeros(shape)  # the same move, in posterior sds, for all data at once: they are independent
    value, gradient, hessian = jax.jit(lambda t: (unit(t), jax.jacobian(unit)(t), jax.hessian(unit)(t)))(zero)
    size = int(np.prod(shape, dtype=int))
    hessian = np.asarray(hessian, np.float64).reshape(-1, size, size)
    cov = np.linalg.inv(-hessian)
    np.testing.assert_allclose(np.asarray(gradient)[indices], 0, atol=0.02)  # in units of one posterior sd
    np.testing.assert_allclose(np.diagonal(cov, axis1=1, axis2=2), 1, rtol=1e-3)
    scale = np.log(sd).reshape(-1, size).sum(1)
    marginal = np.asarray(value) + 0.5 * size * np.log(2 * np.pi) + 0.5 * np.linalg.slogdet(cov)[1] + scale
    if name == "quadratic_energy":  # the model's prior lacks its log Z: that of N(0, I) tilted to N(S b, S)
        s = np.linalg.inv(np.eye(2) + case.best["q"])
        marginal = marginal - 0.5 * np.linalg.slogdet(s)[1] - 0.5 * case.best["b"] @ s @ case.best["b"]
    np.testing.assert_allclose(marginal.mean(), case.optimum, atol=1e-3)


@pytest.mark.parametrize("name", [*GRID, "eight_schools"])
def test_quadrature_is_that_of_the_model(name):
    """Sums over a grid about each posterior, of the joint density as NumPyro has it."""
    case = cases.make(name)
    args = tuple(jnp.asarray(a) for a in case.args)
    if name == "poisson_50000":
        args = (args[0][:500],)
    case = case._replace(args=args, num_data=len(args[-1]), extremes=())
    params = dict(case.best)
    if name == "eight_schools":
        params["tau"] = 3.0
    params = {k: jnp.asarray(v, jnp.float32) for k, v in params.items()}
    mean, sd = case.posterior(params, np.arange(case.num_data))
    t = np.linspace(-9, 12, 301)
    low = 0.0 if name == "beta_binomial" else -np.inf
    x = np.clip(mean + sd * t[:, None], low + 1e-7, 1 - 1e-7 if low == 0 else np.inf)
    total = jax.jit(lambda x: jax.lax.map(lambda row: log_joint(case, params, row), x))(jnp.asarray(x, jnp.float32))
    total = np.asarray(total, np.float64).T
    step = np.gradient(x.T, axis=1)  # zero where clipped
    with np.errstate(divide="ignore"):
        total = total + np.log(step)
    marginal = special.logsumexp(total, axis=1)
    weight = np.exp(total - marginal[:, None])
    first = (weight * x.T).sum(1)
    second = np.sqrt((weight * (x.T - first[:, None]) ** 2).sum(1))
    indices = case.compared()
    np.testing.assert_allclose(((first - mean) / sd)[indices], 0, atol=5e-3)
    np.testing.assert_allclose((second / sd)[indices], 1, atol=5e-3)
    if name == "conditional_energy":  # the model's prior lacks its log Z
        grid = jnp.linspace(-9, 9, 1201)
        prior = jax.lax.map(lambda x: log_joint(case, params, jnp.full(case.num_data, x), {"x"}), grid)
        marginal = marginal - special.logsumexp(np.asarray(prior), axis=0) - np.log(grid[1] - grid[0])
    if name != "poisson_50000":  # where it is of a part of the data
        np.testing.assert_allclose(marginal.mean(), case.value(params), atol=1e-3)


@pytest.mark.parametrize("name", ENERGIES)
def test_density_of_a_family_is_that_of_its_draws(name):
    """It integrates to one, and bins hold as many draws as it says."""
    family, num, noise = getattr(energies, name)(), 100_000, energies.NOISE
    axis = np.linspace(-3.6, 3.6, 61)
    width = axis[1] - axis[0]
    density = np.exp(family.log_density(np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2))).reshape(61, 61)
    assert abs(density.sum() * width**2 - 1) < 1e-4
    rng = np.random.default_rng(0)
    x = family.draw(rng, num) + noise * rng.normal(size=(num, 2))
    # The mean of a smooth function of draws, against the sum: 4 standard errors.
    for f in (
        lambda a, b: np.cos(2 * a + b),
        lambda a, b: np.sin(3 * b - a),
        lambda a, b: np.cos(4 * a) * np.cos(4 * b),
    ):
        drawn = f(*x.T)
        assert abs(drawn.mean() - (density * f(*np.meshgrid(axis, axis))).sum() * width**2) < 4 * drawn.std() / num**0.5


@pytest.mark.slow
def test_grid_of_a_fitted_energy():
    """Against a closed form without the energy, and against the model's own joint density with it."""
    case = cases.make("two_moons")
    params = {**initial_params(case), "noise": jnp.asarray(0.2)}
    flat = {**params, "energy$params": jax.tree.map(jnp.zeros_like, params["energy$params"])}
    decoder = {k: np.asarray(v, np.float64) for k, v in params["decoder$params"].items()}
    normal = LinearGaussian(np.zeros(2), np.eye(2), decoder["kernel"].T, decoder["bias"], np.full(10, 0.2**2))
    y = np.asarray(case.args[0][:20], np.float64)
    grid = energies.Grid(flat)
    np.testing.assert_allclose(grid.log_likelihood(y).mean(), normal.log_density(y), rtol=1e-6)
    np.testing.assert_allclose(grid.posterior(y)[0], normal.posterior(y)[0], atol=1e-5)
    np.testing.assert_allclose(case.rival.value(flat), case.value(flat), rtol=1e-6)

    steep = {**params, "energy$params": jax.tree.map(lambda v: 2 * v, params["energy$params"])}
    few = case._replace(args=(case.args[0][:20],))
    mean, sd = energies.Grid(steep).posterior(y)
    axis = np.linspace(-7, 7, 31)
    t = np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 1, 2)
    x = mean + sd * t
    total = jax.lax.map(lambda row: log_joint(few, steep, row), jnp.asarray(x, jnp.float32))
    weight = special.softmax(np.asarray(total, np.float64), axis=0)[..., None]
    first = (weight * x).sum(0)
    np.testing.assert_allclose((first - mean) / sd, 0, atol=2e-3)
    np.testing.assert_allclose(np.sqrt((weight * (x - first) ** 2).sum(0)) / sd, 1, atol=2e-3)
    coarse = energies.Grid(steep, num=201)
    np.testing.assert_allclose(coarse.log_likelihood(y), energies.Grid(steep).log_likelihood(y), rtol=1e-6)


def test_posterior_errors_see_a_bias_and_not_the_noise():
    case = cases.make("toy_hierarchy")
    mean, sd = case.posterior(case.best, np.arange(case.num_data))
    rng = np.random.default_rng(0)
    draws = mean + sd * rng.normal(size=(20, 200, case.num_data))
    found = judge.posterior_errors(case, case.best, draws)
    assert found["mean"] < 0.02 and found["log_sd"] < 0.02 and found["rms_mean"] < 0.01
    off = judge.posterior_errors(case, case.best, mean + 1.2 * (draws - mean) + 0.2 * sd)
    assert 0.1 < off["mean"] < 0.3 and 0.1 < off["log_sd"] < 0.3
    assert judge.frozen_chains(draws) == 0
    draws[3, :, 7] = 1.0
    assert judge.frozen_chains(draws) == 1
    assert abs(off["rms_mean"] - 0.2) < 0.02 and abs(off["rms_log_sd"] - np.log(1.2)) < 0.02


def test_eight_schools_has_its_maximum_at_the_boundary():
    case = cases.make("eight_schools")
    sigma, y = (np.asarray(a, np.float64) for a in case.args)
    assert case.best["tau"] == 0
    assert case.optimum == pytest.approx(stats.norm.logpdf(y, case.best["mu"], sigma).mean())


def joint_of_all(case):
    """The log joint density of all data by the model itself, of its latents in a row, and one point."""
    params = {k: jnp.asarray(v) for k, v in case.best.items()}
    trace = handlers.trace(handlers.seed(case.model, random.key(0))).get_trace(*case.args)
    latents = {k: s["value"] for k, s in trace.items() if s["type"] == "sample" and not s["is_observed"]}
    flat, unravel = ravel_pytree(jax.tree.map(lambda x: x.astype(jnp.float64), latents))
    model = lambda v: log_density(case.model, case.args, {}, {**params, **unravel(v)})[0]
    return jax.jit(model), flat


@pytest.mark.slow_but("mixed_slopes")
@pytest.mark.parametrize("name", LINEAR)
def test_linear_mixed_models_are_those_of_the_model(name):
    """One Newton step ends at the mode of a quadratic, whose Hessian gives the marginal and the posterior."""
    with jax.enable_x64(True):
        case = cases.make(name)
        joint, start = joint_of_all(case)
        hessian = jax.hessian(joint)(start)
        mode = start - jnp.linalg.solve(hessian, jax.grad(joint)(start))
        marginal = joint(mode) + 0.5 * len(mode) * jnp.log(2 * jnp.pi) - 0.5 * jnp.linalg.slogdet(-hessian)[1]
        assert float(marginal) == pytest.approx(case.optimum, rel=1e-7)
        mean, sd = case.posterior(case.best, np.arange(case.num_data))
        np.testing.assert_allclose(mode[: mean.size], mean.ravel(), rtol=1e-5)
        np.testing.assert_allclose(jnp.sqrt(jnp.diag(jnp.linalg.inv(-hessian)))[: mean.size], sd.ravel(), rtol=1e-6)


@pytest.mark.slow_but("mixed_binomial", "mixed_survival")
@pytest.mark.parametrize("name", OTHERS)
def test_quadrature_of_mixed_models_is_that_of_the_model(name):
    """With all effects equal, the gradient holds each group's slope: its integral, and one value, are the marginal."""
    with jax.enable_x64(True):
        case = cases.make(name)
        joint, start = joint_of_all(case)
        mean, sd = case.posterior(case.best, np.arange(case.num_data))
        reach = np.abs(mean).max() + 10 * sd.max()
        axis = jnp.linspace(-reach, reach, 4001)
        slopes = jax.lax.map(jax.grad(joint), axis[:, None] * jnp.ones_like(start))  # [grid, groups]
        width = axis[1] - axis[0]
        risen = jnp.cumsum(0.5 * (slopes[1:] + slopes[:-1]) * width, 0)
        risen = jnp.concatenate([jnp.zeros_like(risen[:1]), risen]) - risen[1999]  # from the middle, which is zero
        marginal = joint(jnp.zeros_like(start)) + jnp.sum(special.logsumexp(risen, axis=0) + jnp.log(width))
        # The trapezoid's error of a slope.
        assert float(marginal) == pytest.approx(case.optimum, abs=2e-3)
        weight = special.softmax(risen, axis=0)
        np.testing.assert_allclose((axis @ weight - mean) / sd, 0, atol=2e-3)


@pytest.mark.slow_but("mixed_slopes", "mixed_ordinal")
@pytest.mark.parametrize("name", MIXED)
def test_no_step_along_a_parameter_gains(name):
    case = cases.make(name)
    assert case.off(case.best) < 1e-6
    for k, v in case.best.items():
        if k != "root":  # a factor of a correlation has no free neighbours
            for step in (-1e-3, 1e-3):
                near = {**case.best, k: v + step * np.maximum(np.abs(v), 1e-4)}
                assert case.value(near) < case.optimum + 1e-8
