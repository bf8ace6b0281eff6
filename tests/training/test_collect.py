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


@pytest.mark.slow
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


# --- deterministic sites --------------------------------------------------------------------------------


def derived(y, batch_size=None):
    """Deterministic sites of each datum, of the parameters, of a minibatch, and one that is a tree."""
    mu = numpyro.param("mu", 0.5)
    numpyro.deterministic("shifted", mu + 1)
    with numpyro.plate("data", len(y), subsample_size=batch_size) as i:
        x = numpyro.sample("x", dist.Normal(mu, 1))
        numpyro.deterministic("log", jnp.log(x))
        numpyro.deterministic("own", (x + y[i])[:, None] * jnp.arange(3.0))
        numpyro.sample("y", dist.Normal(x, 1), obs=y[i])
    numpyro.deterministic("total", x.sum())
    numpyro.deterministic("tree", {"x": x})


def coupled(y, batch_size=None):
    """The same with a global latent, so that all data make one block."""
    z = numpyro.sample("z", dist.Normal(0, 1))
    numpyro.deterministic("twice", 2 * z)
    with numpyro.plate("data", len(y), subsample_size=batch_size) as i:
        x = numpyro.sample("x", dist.Normal(z, 1))
        numpyro.deterministic("own", x + z)
        numpyro.sample("y", dist.Normal(x, 1), obs=y[i])
    numpyro.deterministic("total", x.sum())


FEW = dict(num_particles=3, num_samples=4, warmup=2, thinning=1)


@pytest.mark.parametrize("batch_size", [None, 3])
def test_deterministic_sites_are_functions_of_the_draws(batch_size, capsys):
    """Those of a minibatch, which belong to no datum and not to all, are left out, and refused by name."""
    y = np.linspace(-1, 1, 8, dtype=np.float32)
    ebipla, options = fitter(derived, **FEW), dict(num_steps=2, progress_bar=False, batch_size=batch_size)
    fit = ebipla.run(random.key(0), y, **options)
    found = fit.get_samples()
    assert {*found} == {"x", "shifted", "log", "own"} | ({"total"} if batch_size is None else set())
    np.testing.assert_allclose(found["own"], (found["x"] + y)[..., None] * np.arange(3.0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found["shifted"], np.full((3, 4), fit.params["mu"] + 1), rtol=1e-6)
    if batch_size is None:
        np.testing.assert_allclose(found["total"], found["x"].sum(-1), rtol=1e-4, atol=1e-5)
    else:
        with pytest.raises(ModelError, match="'total' is of a minibatch"):
            ebipla.run(random.key(0), y, sites=["x", "total"], **options)
    draws = next(check for check in fit.diagnostics().checks if check.name == "non-finite draws")
    assert draws.passed and np.isnan(found["log"]).any(), "log of a negative number is the model's own affair"
    fit.print_summary(diagnostics=False)
    said = capsys.readouterr().out
    assert "own[0,0]" in said and "own: 10 of 24 scalars shown; over all 24: r_hat max" in said
    assert "max nan" not in said, "of the scalars that vary"


def test_deterministic_sites_beside_global_latents():
    y = np.linspace(-1, 1, 8, dtype=np.float32)
    fit = fitter(coupled, **FEW).run(random.key(0), y, batch_size=3, num_steps=2, progress_bar=False)
    found = fit.get_samples()
    np.testing.assert_allclose(found["twice"], 2 * found["z"], rtol=1e-6)
    np.testing.assert_allclose(found["own"], found["x"] + found["z"][..., None], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found["total"], found["x"].sum(-1), rtol=1e-4, atol=1e-5)


def test_deterministic_sites_do_not_push_data_out():
    """They are left out one by one where memory ends, before there are fewer data; named latents are alone."""
    y = np.linspace(-1, 1, 8, dtype=np.float32)
    ebipla, options = fitter(derived, **FEW), dict(num_steps=2, progress_bar=False, batch_size=3)
    room = 4 * FEW["num_particles"] * FEW["num_samples"] * (8 + 1 + 8)  # for x, shifted and log
    fit = ebipla.run(random.key(0), y, max_bytes=room, **options)
    assert {*fit.get_samples()} == {"x", "shifted", "log"} and len(fit.collected) == 8
    assert "; own: not collected, as the draws would exceed max_bytes)" in repr(fit)
    assert {*ebipla.run(random.key(0), y, sites=["x"], **options).get_samples()} == {"x"}
