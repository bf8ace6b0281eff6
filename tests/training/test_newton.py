"""Runs that end when they have arrived: what looks know, and that nothing stops short of the maximum."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from scipy.stats import norm

from numpyro_ebipla import EBIPLA, ModelError
from numpyro_ebipla.training.newton import FEWEST_LOOKS, GAIN, LOOK_EVERY, LOOK_FROM, Looks, is_maximum
from tests.models import fitter, hierarchy, latent_energy, one_level

#: See tests/conftest.py.
RUNS_LONG = True

Y = (2.0 + 1.4 * np.random.default_rng(1).normal(size=100)).astype(np.float32)
QUIET = dict(progress_bar=False)


@pytest.mark.unit
@pytest.mark.parametrize("off", [0.0, 0.05])
def test_the_gain_has_no_bias_and_its_error_is_no_smaller_than_it_is(off):
    """Looks around a known maximum, of three parameters in other units: many verdicts from eight looks each."""
    rng = np.random.default_rng(0)
    curvature = np.diag([1.0, 1e4, 1e-4])
    scale = 0.03 / np.sqrt(np.diag(curvature))
    at = {"w": jnp.asarray(off / np.sqrt(np.diag(curvature)), jnp.float32)}
    truth = 0.5 * 3 * off**2
    value, error = [], []
    for _ in range(2000):
        best = scale * rng.normal(size=(8, 3))
        looks = Looks(600.0 + 50 * np.arange(8), best, np.tile(curvature, (8, 1, 1)))
        found = looks.gain(at, 1000)
        value.append(found[0])
        error.append(found[1])
    assert abs(np.mean(value) - truth) < 3 * np.std(value) / np.sqrt(2000)
    # It takes the distance of the looks' mean for the true one, and so is up to twice as large where that is zero.
    assert 0.9 < np.sqrt(np.mean(np.square(error))) / np.std(value) < 2


@pytest.mark.unit
def test_too_few_looks_and_no_maximum_know_nothing():
    at, step = {"w": jnp.zeros(2)}, LOOK_FROM + LOOK_EVERY * np.arange(FEWEST_LOOKS)
    looks = Looks(step.astype(float), np.zeros((FEWEST_LOOKS, 2)), np.tile(np.eye(2), (FEWEST_LOOKS, 1, 1)))
    assert np.isfinite(looks.gain(at, int(step[-1]))[0])
    assert looks.gain(at, int(step[-1]) + LOOK_EVERY)[0] == np.inf, "the first has gone out of sight"
    saddle = Looks.one(450, at, jnp.ones(2), jnp.diag(jnp.array([1.0, -1e-6])))
    assert np.isnan(saddle.best).all()
    with_saddle = Looks(*map(np.concatenate, zip(jax.tree.map(lambda x: x[:-1], looks), saddle, strict=True)))
    assert with_saddle.gain(at, 450)[0] == np.inf
    known = {"ridge": [[1, 1], [1, 1]], "level": [[1, 0], [0, 0]], "fine": [[1, 0.9], [0.9, 1]], "tiny": [[1e-9]]}
    assert [name for name, x in known.items() if is_maximum(np.array(x, float))] == ["fine", "tiny"]


def exact(params, y):
    return norm.logpdf(y.astype(float), float(params["mu"]), np.sqrt(1 + float(params["s"]) ** 2)).sum()


def test_an_arrived_run_is_at_the_maximum_and_began_like_a_longer_one():
    ebipla = fitter(one_level)
    fit = ebipla.run(random.key(0), Y, **QUIET)
    assert fit.arrived and 400 < len(fit.losses) < 2000 and fit.stopped.startswith(f"arrived after {len(fit.losses)} ")
    assert "stopped early" not in repr(fit)
    y = Y.astype(float)
    best = {"mu": y.mean(), "s": np.sqrt(y.var() - 1)}
    assert 0 <= exact(best, Y) - exact(fit.params, Y) < GAIN
    assert fit.diagnostics().passed
    whole = ebipla.run(random.key(0), Y, num_steps=len(fit.losses) + 10, stop_at_gain=False, **QUIET)
    assert not whole.arrived and len(whole.losses) == len(fit.losses) + 10
    np.testing.assert_array_equal(whole.losses[:-10], fit.losses)


def test_a_resumed_run_arrives_at_the_same_step(tmp_path):
    """The looks are in the checkpoint; a run that has arrived takes no more steps."""
    ebipla = fitter(one_level)
    fit = ebipla.run(random.key(0), Y, **QUIET)
    options = dict(checkpoint_dir=tmp_path, checkpoint_every=130, **QUIET)
    ebipla.run(random.key(0), Y, num_steps=330, **options)
    for _ in range(2):
        again = ebipla.run(random.key(0), Y, **options)
        assert again.stopped == fit.stopped and again.params == fit.params
        np.testing.assert_array_equal(again.losses, fit.losses)


def test_a_variance_at_zero_and_a_likelihood_without_a_maximum_take_all_steps():
    """Nothing says that they have arrived: of the one parameter nothing is known, of the two only the sum."""
    small = (0.5 * np.random.default_rng(2).normal(size=60)).astype(np.float32)
    assert len(fitter(one_level).run(random.key(0), small, num_steps=700, **QUIET).losses) == 700

    def ridge(y):
        a, b = numpyro.param("a", 0.0), numpyro.param("b", 0.0)
        with numpyro.plate("data", len(y)):
            x = numpyro.sample("x", dist.Normal(a + b, 1))
            numpyro.sample("y", dist.Normal(x, 1), obs=y)

    fit = fitter(ridge).run(random.key(0), Y, num_steps=700, **QUIET)
    assert not fit.arrived and len(fit.losses) == 700


def test_where_it_is_not_known():
    few = dict(num_steps=1, num_samples=1, warmup=0, **QUIET)
    for model, more in ((latent_energy, {}), (hierarchy, {"batch_size": 10})):
        with pytest.raises(ModelError, match="stop_at_gain: what going on would gain is not known here"):
            fitter(model).run(random.key(0), Y, stop_at_gain=0.1, **few, **more)
    for wrong in (0, -1.0, "soon", None, np.nan):
        with pytest.raises(ValueError, match="stop_at_gain must be a number above 0"):
            EBIPLA(hierarchy).run(random.key(0), Y, stop_at_gain=wrong, **few)
