"""Hostile values: tiny, huge, constant, single, of any type. The fit is right, or the error names what is off.

In the model here x ~ N(mean, 1) and y ~ N(x, 1), so the maximum is at the mean of y, with a standard error of √(2/M).
"""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random

from numpyro_ebipla import EBIPLA, EBIPLAWarning, EnergyPrior, ModelError

Y = np.linspace(-1.0, 2.0, 6).astype(np.float32)
SMALL = {"num_particles": 16, "num_steps": 1500, "num_samples": 4, "warmup": 20}
SHORT = {"num_particles": 2, "num_steps": 12, "num_samples": 2, "thinning": 1, "warmup": 1}


def model(y, batch_size=None, start=0.0):
    mean = numpyro.param("mean", start)
    with numpyro.plate("data", len(y), subsample_size=batch_size) as i:
        x = numpyro.sample("x", dist.Normal(mean, 1))
        numpyro.sample("y", dist.Normal(x, 1), obs=y if batch_size is None else y[i])


def run(fitter, y, **options):
    return fitter.run(random.key(0), y, progress_bar=False, **options)


def assert_right(fit, y):
    """The particles' Monte Carlo error is √(1/2 / (16 M)) at each step, and averaged over hundreds of them."""
    y = np.asarray(y, np.float64)
    assert fit.stopped is None or fit.arrived
    assert abs(float(fit.params["mean"]) - y.mean()) < 0.1 * np.sqrt(2 / len(y))
    x = fit.get_samples()["x"]
    assert x.shape == (16, 4, len(y))
    # Posteriors are N((mean + y) / 2, 1/2), their draws over 64 hardly dependent chains and moves.
    np.testing.assert_allclose(x.mean((0, 1)), (y.mean() + y) / 2, atol=5 * np.sqrt(0.5 / 16))


# --- data that can be fitted ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fitter():
    """One for all: data of one shape and type are compiled for once."""
    return EBIPLA(model, **SMALL)


@pytest.mark.parametrize(
    "y",
    [Y, 0 * Y, 0 * Y + 3, np.repeat(Y[[0, 5]], 3), 1e-30 * Y, 1e-42 * Y, Y + 1e3, [*Y[:5], 50.0]],
    ids=["plain", "zero", "constant", "duplicated", "tiny", "subnormal", "far", "outlier"],
)
def test_values(fitter, y):
    y = np.asarray(y, np.float32)
    assert_right(run(fitter, y, num_steps=3000), y)  # a thousand steps and more to get to the far ones


@pytest.mark.parametrize(
    "y",
    [Y[5:], Y.astype(np.float16), np.arange(6), np.array([True, False, True]), np.float64([0.5, 1.5])],
    ids=["one datum", "half", "integers", "truth values", "double"],
)
def test_types(fitter, y):
    assert_right(run(fitter, y), y)


@pytest.mark.parametrize("y", [Y, Y.astype(np.float64)], ids=["single", "double"])
def test_double_precision(y):
    with jax.enable_x64(True):
        fit = run(EBIPLA(model, **SMALL), y)
    assert_right(fit, y)
    assert fit.params["mean"].dtype == fit.get_samples()["x"].dtype == np.float64


@pytest.mark.parametrize("dtype, x64", [(jnp.float16, False), (jnp.bfloat16, True), (jnp.float32, True)])
def test_parameters_of_fewer_bits_than_the_rest(dtype, x64):
    """In double precision modules still have single parameters; the default optimiser used not to take them."""
    with jax.enable_x64(x64):
        fit = run(EBIPLA(model, **SMALL), Y, start=jnp.zeros((), dtype))
    assert fit.params["mean"].dtype == dtype
    assert abs(float(fit.params["mean"]) - Y.mean()) < 0.1 * np.sqrt(2 / len(Y))


@pytest.mark.slow
def test_an_energys_parameters_of_fewer_bits_than_the_rest():
    def tilted(y):
        a = numpyro.param("a", jnp.zeros((), jnp.float32))
        numpyro.sample("y", EnergyPrior(lambda x: a * x, dist.Normal(0.0, 1.0)), obs=y)

    with jax.enable_x64(True):
        fit = run(EBIPLA(tilted, **SHORT), Y)
    assert fit.params["a"].dtype == np.float32 and np.isfinite(fit.params["a"])


# --- too large --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e20, 1e30, 1e38])
def test_data_whose_squares_overflow(fitter, scale):
    with pytest.raises(ModelError, match=r"log density at 'y' is not finite at .* of the initial particles"):
        run(fitter, Y * np.float32(scale))


@pytest.mark.parametrize("scale", [1e7, 1e10, 1e15])
def test_data_whose_squares_are_just_numbers(fitter, scale):
    """Too far to get there in a few steps; from 1e10 on no density tells two particles apart. But numbers are sound."""
    fit = run(fitter, Y * np.float32(scale))
    assert fit.stopped is None or fit.arrived
    assert all(np.isfinite(x).all() for x in [fit.params["mean"], fit.losses, fit.get_samples()["x"]])
    assert scale > 1e7 or fit.params["mean"] > 1e4


def test_data_whose_sum_of_squares_overflows(fitter):
    """Every datum's log density is a number, but not their sum."""
    with pytest.warns(EBIPLAWarning, match="diverged at step 1: the contrast is not finite"):
        fit = run(fitter, np.full(6, 1.2e19, np.float32))
    assert "diverged" in fit.stopped and fit.params["mean"] == 0 and np.isfinite(fit.get_samples()["x"]).all()


def test_double_precision_has_room_for_more():
    with jax.enable_x64(True):
        fit = run(EBIPLA(model, **SHORT), Y.astype(np.float64) * 1e30)
    assert (fit.stopped is None or fit.arrived) and np.isfinite(fit.params["mean"]) and np.isfinite(fit.losses).all()


# --- what is refused --------------------------------------------------------------------------------------


class Series:
    """Like one of pandas: converts to an array, but is none."""

    def __init__(self, values):
        self.values = values

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.values, dtype)

    def __len__(self):
        return len(self.values)


@pytest.mark.parametrize(
    "y, message",
    [
        ([0.0, 1.0], r"observed values at 'y' are a list, not an array of numbers: pass jnp.asarray"),
        ((0, 1), r"observed values at 'y' are a tuple"),
        (Series(Y), r"observed values at 'y' are a Series"),
        (np.array(["a", "b"]), r"observed values at 'y' are .* not an array of numbers"),
        (np.array([1.0, None], object), r"observed values at 'y' are .* not an array of numbers"),
        (np.array(["2020-01-01"], "datetime64[D]"), r"observed values at 'y' are .* not an array of numbers"),
        (Y + 1j, "observed values at 'y' are complex"),
        (np.zeros(0), "argument 'y' of the model is empty.*size of plate should be positive"),
        (np.array([0.0, np.inf]), "observed values at 'y' lie outside the support"),
    ],
    ids=["list", "tuple", "series", "words", "objects", "dates", "complex", "empty", "infinite"],
)
def test_data_that_are_none(fitter, y, message):
    """The first ones ended in JAX's errors, those about types, or in NumPyro's, without a name."""
    with pytest.raises(ModelError, match=message):
        run(fitter, y)


@pytest.mark.parametrize(
    "batch_size, message",
    [
        (0, "plate 'data' has subsample_size 0; it must be an integer of at least 1"),
        (-1, "plate 'data' has subsample_size -1"),
        (2.0, r"plate 'data' has subsample_size 2\.0"),
        (True, "plate 'data' has subsample_size True"),
        (7, "plate 'data' has subsample_size 7, above its 6 data"),
        (jnp.array(2), r"only a Python number will do, such as the size of a plate"),
    ],
)
def test_batch_sizes_that_are_none(fitter, batch_size, message):
    with pytest.raises(ModelError, match=message):
        run(fitter, Y, batch_size=batch_size)
    with pytest.raises(ModelError, match=r"argument 'y' of the model is empty|subsample_size|Python number"):
        run(fitter, Y[:0], batch_size=batch_size)


def test_a_plate_whose_size_is_traced():
    def sized(y, num):
        with numpyro.plate("data", num):
            numpyro.sample("y", dist.Normal(numpyro.sample("x", dist.Normal(0, 1)), 1), obs=y)

    with pytest.raises(ModelError, match=r"only a Python number will do.*int\(…\)"):
        EBIPLA(sized, **SHORT).init(random.key(0), Y, jnp.array(6))


@pytest.mark.parametrize("start", [0, jnp.array(1), True, 1j])
def test_parameters_without_gradients(fitter, start):
    with pytest.raises(ModelError, match=r"parameter 'mean' is of type .* begin at 0\.0 instead of 0"):
        run(fitter, Y, start=start)


def test_whole_numbers_among_the_initial_parameters(fitter):
    assert run(fitter, Y, init_params={"mean": 1}, num_steps=3).params["mean"].dtype == np.float32


def test_words_in_an_array_are_not_data():
    """They stay as they are, like other arguments that are no arrays of numbers."""

    def named(y, names):
        mean = numpyro.param(str(names[1]), 0.0)
        with numpyro.plate("data", len(y)):
            numpyro.sample("y", dist.Normal(numpyro.sample("x", dist.Normal(mean, 1)), 1), obs=y)

    assert set(EBIPLA(named, **SHORT).init(random.key(0), Y, np.array(["a", "b"])).params) == {"b"}


def elimination(t, y):
    log_cl, log_v = numpyro.param("log_cl", 0.0), numpyro.param("log_v", 0.0)
    s = numpyro.param("s", jnp.ones(2), constraint=dist.constraints.positive)
    noise = numpyro.param("noise", 1.0, constraint=dist.constraints.positive)
    with numpyro.plate("subjects", len(y)):
        cl = jnp.exp(numpyro.sample("cl", dist.Normal(log_cl, s[0])))
        v = jnp.exp(numpyro.sample("v", dist.Normal(log_v, s[1])))
        mean = (500 / v)[:, None] * jnp.exp(-(cl / v)[:, None] * t)
        numpyro.sample("y", dist.Normal(mean, noise * mean).to_event(1), obs=y)


def elimination_exact(t, y, theta):
    """By a grid over the two latents, of ``log_cl, log_v, s, noise``, the last three in logarithms."""
    z = jnp.linspace(-5, 5, 81)
    a, b = (g.ravel() for g in jnp.meshgrid(z, z))
    cl, v = jnp.exp(theta[0] + jnp.exp(theta[2]) * a), jnp.exp(theta[1] + jnp.exp(theta[3]) * b)
    mean = (500 / v)[:, None] * jnp.exp(-(cl / v)[:, None] * t)
    each = lambda y: dist.Normal(mean, jnp.exp(theta[4]) * mean).log_prob(y).sum(-1) - (a**2 + b**2) / 2
    return jax.lax.map(lambda y: jax.scipy.special.logsumexp(each(y)), y).sum()


def test_noise_in_proportion_to_a_prediction_near_zero():
    """Particles of the prior expect next to nothing at late times, and log densities of them are −1e36.

    Then the first gradient was none, and the fit ended with it ("lower the learning rate").
    """
    rng = np.random.default_rng(0)
    t = np.array([0.5, 1, 2, 4, 8, 12, 24])
    cl, v = 3 * np.exp(0.3 * rng.normal(size=30)), 30 * np.exp(0.2 * rng.normal(size=30))
    y = (500 / v)[:, None] * np.exp(-(cl / v)[:, None] * t) * (1 + 0.12 * rng.normal(size=(30, 7)))
    fit = EBIPLA(elimination).run(random.key(0), t.astype(np.float32), y.astype(np.float32), progress_bar=False)
    assert fit.arrived
    p = fit.params
    theta = jnp.concatenate([jnp.stack([p["log_cl"], p["log_v"]]), jnp.log(p["s"]), jnp.log(p["noise"])[None]])
    value = lambda theta: elimination_exact(jnp.asarray(t, jnp.float32), jnp.asarray(y, jnp.float32), theta)
    slope, information = jax.grad(value)(theta), -jax.hessian(value)(theta)
    assert 0.5 * slope @ np.linalg.solve(information, slope) < 0.02, "nats in all below the maximum"
