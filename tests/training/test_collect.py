"""How many draws of how many data a run collects."""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random

from numpyro_ebipla import EBIPLA, ModelError
from numpyro_ebipla.results.build import CHEAP, OVERHEAD, SHARE
from tests.models import fitter

NUM_DATA = 400


def network(y, batch_size=None):
    """A decoder of 60,000 weights, so that a move is not cheap."""
    hidden = numpyro.param("hidden", 0.1 * jnp.ones((2, 2000)))
    out = numpyro.param("out", 0.001 * jnp.ones((2000, 28)))
    with numpyro.plate("data", len(y), subsample_size=batch_size):
        x = numpyro.sample("x", dist.Normal(0, 1).expand([2]).to_event(1))
        mean = jnp.tanh(x @ hidden) @ out
        numpyro.sample("y", dist.Normal(mean, 1).to_event(1), obs=numpyro.subsample(y, event_dim=1))


def one_level(y, batch_size=None):
    mu = numpyro.param("mu", 0.0)
    with numpyro.plate("data", len(y), subsample_size=batch_size):
        x = numpyro.sample("x", dist.Normal(mu, 1))
        numpyro.sample("y", dist.Normal(x, 1), obs=numpyro.subsample(y, event_dim=0))


def images():
    return np.zeros((NUM_DATA, 28), np.float32)


def test_draws_of_minibatches_data_take_half_the_moves_of_the_steps():
    """They cost forty times as much: a thousand moves for each of all data."""
    options = dict(batch_size=10, num_samples=4, thinning=15, warmup=20, progress_bar=False)
    fit = fitter(network, num_particles=20).run(random.key(0), images(), num_steps=60, **options)
    allowed = max(SHARE * 60 * 10 * 20, CHEAP // (4000 + 56000 + OVERHEAD))
    assert len(fit.collected) == int(allowed // (20 * 80)) < NUM_DATA
    assert fit.get_samples()["x"].shape == (20, 4, len(fit.collected), 2)
    assert f"for {len(fit.collected)} of 400 data" in repr(fit) and np.ptp(fit.collected) == 399
    options |= dict(thinning=1, warmup=0)
    every = fitter(network, num_particles=20).run(
        random.key(0), images(), num_steps=60, indices=range(NUM_DATA), **options
    )
    assert every.get_samples()["x"].shape == (20, 4, NUM_DATA, 2)


@pytest.mark.parametrize("batch_size", [None, 50])
def test_cheap_moves_are_made_for_all_data(batch_size):
    y = np.zeros(NUM_DATA, np.float32)
    kwargs = {} if batch_size is None else {"batch_size": batch_size}
    fit = fitter(one_level, num_samples=10).run(random.key(0), y, num_steps=5, progress_bar=False, **kwargs)
    assert fit.get_samples()["x"].shape[2] == NUM_DATA and fit.plan.indices is None


def test_draws_fit_into_memory_unless_data_were_named():
    y = np.zeros(NUM_DATA, np.float32)
    ebipla = fitter(one_level, num_particles=4, num_samples=10)
    fit = ebipla.run(random.key(0), y, num_steps=5, max_bytes=4 * 4 * 10 * 100, progress_bar=False)
    assert len(fit.collected) == 100
    with pytest.raises(ModelError, match="lower num_samples"):
        ebipla.run(random.key(0), y, num_steps=5, max_bytes=16000, indices=range(NUM_DATA), progress_bar=False)


def test_no_draws_are_collected_on_request_and_some_later():
    y = np.random.default_rng(0).normal(size=NUM_DATA).astype(np.float32)
    ebipla = fitter(one_level)
    fit = ebipla.run(random.key(0), y, num_steps=30, num_samples=0, progress_bar=False)
    assert fit.draws is None and fit.get_samples() == {}
    assert not fit.diagnostics()["draws"].passed
    later = ebipla.run(
        random.key(1), y, num_steps=0, init_state=fit.state, num_samples=5, thinning=2, warmup=1, progress_bar=False
    )
    assert later.params == fit.params and later.get_samples()["x"].shape[1:] == (5, NUM_DATA)
    assert (later.plan.thinning, later.plan.warmup) == (2, 1)


def test_counts_that_are_none():
    ebipla, y = EBIPLA(one_level), np.zeros(3, np.float32)
    for options, words in (
        (dict(num_samples=-1), "num_samples must be an integer of at least 0"),
        (dict(thinning=0), "thinning must be an integer of at least 1"),
        (dict(warmup=1.5), "warmup must be an integer of at least 0"),
    ):
        with pytest.raises(ValueError, match=words):
            ebipla.run(random.key(0), y, **options)
    with pytest.raises(ValueError, match="num_samples must be an integer of at least 0"):
        ebipla.infer(random.key(0), {"mu": 0.0}, y, num_samples=0.5)
