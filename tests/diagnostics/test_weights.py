"""Dead weights are told from weights that have arrived, or that do not matter."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jax import random

from numpyro_ebipla import EBIPLA, EBIPLAWarning
from numpyro_ebipla._core.state import Latents
from numpyro_ebipla.diagnostics.weights import check_weights
from numpyro_ebipla.model.blocks import Batch
from numpyro_ebipla.model.inspection import inspect_model

Y = np.random.default_rng(0).normal(size=(30, 6)).astype(np.float32)


def generator(y, batch_size=None):
    """Two layers: a relu, and tanh outputs three times as large."""
    draw = lambda *shape: random.normal(random.key(len(shape)), shape) / shape[0] ** 0.5
    hidden = numpyro.param("hidden", lambda _: draw(2, 8))
    shift = numpyro.param("shift", jnp.zeros(8))
    out = numpyro.param("out", lambda _: draw(8, 6))
    level = numpyro.param("level", jnp.zeros(6))
    with numpyro.plate("data", len(y), subsample_size=batch_size):
        x = numpyro.sample("x", dist.Normal(0, 1).expand([2]).to_event(1))
        mean = 3 * jnp.tanh(jax.nn.relu(x @ hidden + shift) @ out + level)
        numpyro.sample("y", dist.Normal(mean, 0.5).to_event(1), obs=numpyro.subsample(y, event_dim=1))


@pytest.fixture(scope="module")
def check():
    """A verdict on the generator with some parameters changed."""
    found = inspect_model(generator, random.key(0), (Y,), {})
    x = random.normal(random.key(1), (3, 30, 2))
    batch = Batch(None, found.data, random.key(0), {})

    def check(**params):
        (verdict,) = check_weights(found.model, {**found.params, **params}, Latents({"x": x}, {}), batch)
        return verdict

    return check


@pytest.mark.unit
def test_saturated_outputs_are_dead(check):
    verdict = check(level=jnp.full(6, 20.0))
    assert verdict.value == 1 and "'hidden, out'" in verdict.verdict and not verdict.passed
    assert check(level=jnp.full(6, 20.0).at[2].set(0.0)).passed  # one output moves them all


@pytest.mark.unit
def test_units_that_are_off_are_dead(check):
    """The outputs' level still has a gradient, but no latent reaches the data."""
    assert not check(shift=jnp.full(8, -50.0)).passed
    assert check(shift=jnp.full(8, -50.0).at[3].set(0.0)).passed


@pytest.mark.unit
@pytest.mark.parametrize("zero", ["hidden", "out"])
@pytest.mark.parametrize("size", [0.0, 1e-8, 1e-3])
def test_latents_that_do_not_matter_are_no_death(check, zero, size):
    """Weights of zero in front of the latents or behind them, as where a variance is at its boundary."""
    shape = {"hidden": (2, 8), "out": (8, 6)}[zero]
    assert check(**{zero: jnp.full(shape, size)}, shift=jnp.ones(8)).passed


def deep(y):
    """A wide generator with tanh outputs and relus, of the usual first weights."""
    draw = lambda key, *shape: random.normal(random.key(key), shape) / shape[0] ** 0.5
    first = numpyro.param("first", lambda _: draw(0, 4, 128))
    hidden = numpyro.param("hidden", lambda _: draw(1, 128, 128))
    out = numpyro.param("out", lambda _: draw(2, 128, 100))
    with numpyro.plate("data", len(y)):
        x = numpyro.sample("x", dist.Normal(0, 1).expand([4]).to_event(1))
        mean = jnp.tanh(jax.nn.relu(jax.nn.relu(x @ first) @ hidden) @ out)
        numpyro.sample("y", dist.Normal(mean, 0.2).to_event(1), obs=y)


def test_a_generator_killed_by_its_rate_is_named():
    """Of black images with some white pixels Adam at 1e-1 makes black ones in three steps, and there it stays."""
    images = np.where(np.random.default_rng(1).uniform(size=(64, 100)) < 0.1, 1.0, -1.0).astype(np.float32)
    options = dict(num_steps=120, num_samples=0, progress_bar=False)
    dead = EBIPLA(deep, num_particles=4, optim=optax.adam(1e-1))
    with pytest.warns(EBIPLAWarning, match="dead networks is 1.*'first, hidden, out'.*a lower rate"):
        fit = dead.run(random.key(0), images, **options)
    assert fit.history["grad_norm"][-1] < 1e-6 * fit.history["grad_norm"][0]
    assert not fit.diagnostics()["dead networks"].passed
    fit = EBIPLA(deep, num_particles=4).run(random.key(0), images, **options)  # a warning would be an error
    assert fit.diagnostics()["dead networks"].passed


def test_a_network_that_is_held_is_not_dead():
    """Of a generator that is held at saturated outputs only the level may have to move."""
    held = {"out": np.zeros((8, 6), np.float32), "hidden": np.zeros((2, 8), np.float32)}
    fitter = EBIPLA(generator, num_particles=4, hold=held)
    fit = fitter.run(random.key(0), Y, num_steps=120, num_samples=0, progress_bar=False)
    assert not any(check.name == "dead networks" for check in fit.diagnostics().checks)
    half = EBIPLA(generator, num_particles=4, hold={"hidden": held["hidden"]})
    fit = half.run(
        random.key(0), Y, init_params={"level": jnp.full(6, 20.0)}, num_steps=2, num_samples=0, progress_bar=False
    )
    assert not fit.diagnostics()["dead networks"].passed  # what is still trained is judged
