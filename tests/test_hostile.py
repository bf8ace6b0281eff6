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
    assert fit.stopped is None
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


@pytest.mark.parametrize("scale", [1e10, 1e15])
def test_data_whose_squares_are_just_numbers(fitter, scale):
    """Too far to get there in a few steps, but every number is sound."""
    fit = run(fitter, Y * np.float32(scale))
    assert fit.stopped is None
    assert all(np.isfinite(x).all() for x in [fit.params["mean"], fit.losses, fit.get_samples()["x"]])
    assert fit.params["mean"] > 0


def test_data_whose_sum_of_squares_overflows(fitter):
    """Every datum's log density is a number, but not their sum."""
    with pytest.warns(EBIPLAWarning, match="diverged at step 1: the contrast is not finite"):
        fit = run(fitter, np.full(6, 1.2e19, np.float32))
    assert "diverged" in fit.stopped and fit.params["mean"] == 0 and np.isfinite(fit.get_samples()["x"]).all()


def test_double_precision_has_room_for_more():
    with jax.enable_x64(True):
        fit = run(EBIPLA(model, **SHORT), Y.astype(np.float64) * 1e30)
    assert fit.stopped is None and np.isfinite(fit.params["mean"]) and np.isfinite(fit.losses).all()
