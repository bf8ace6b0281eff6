"""Draws after a run, and posterior means of which none is kept, against a closed form."""

import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random

from numpyro_ebipla import ModelError
from tests.models import fitter, observed_energy

NUM_DATA = 40


def model(y, batch_size=None):
    """Latents N(mean, 1), data N(x, 1): the posterior of each is N((mean + y) / 2, 1/2)."""
    mean = numpyro.param("mean", 0.0)
    with numpyro.plate("data", len(y), subsample_size=batch_size):
        x = numpyro.sample("x", dist.Normal(mean, 1))
        numpyro.deterministic("twice", 2 * x)
        numpyro.sample("y", dist.Normal(x, 1), obs=numpyro.subsample(y, event_dim=0))


Y = np.random.default_rng(0).normal(1, 1.4, NUM_DATA).astype(np.float32)


@pytest.fixture(scope="module", params=[None, 16])
def fit(request):
    options = {} if request.param is None else {"batch_size": request.param}
    run = fitter(model, num_particles=32).run
    return run(random.key(0), Y, num_steps=300, num_samples=0, warmup=20, progress_bar=False, **options)


def exact(fit):
    return (float(fit.params["mean"]) + Y) / 2


def test_draws_are_those_that_the_run_would_have_collected(fit):
    key, counts = random.key(0), dict(num_samples=8, thinning=3)
    options = {"batch_size": 16} if fit.config.model.subsampled else {}
    ran = fitter(model, num_particles=32).run(key, Y, num_steps=300, warmup=20, progress_bar=False, **counts, **options)
    later = fit.collect(**counts, rng_key=random.fold_in(key, 1), progress_bar=False)
    np.testing.assert_array_equal(later.get_samples()["x"], ran.get_samples()["x"])
    np.testing.assert_array_equal(later.draws.log_density, ran.draws.log_density)
    assert fit.draws is None and later.params == fit.params and later.plan.warmup == 20


def test_draws_of_some_data_and_other_sites(fit):
    found = fit.collect(50, sites=["x", "twice"], indices=[7, 2], progress_bar=False)
    x, twice = (found.get_samples()[name] for name in ("x", "twice"))
    assert x.shape == (32, 50, 2) and found.collected.tolist() == [7, 2]
    np.testing.assert_allclose(twice, 2 * x, rtol=1e-6)
    # 32 chains of 250 moves: some three hundred independent draws at least, of variance 1/2.
    np.testing.assert_allclose(x.mean((0, 1)), exact(fit)[[7, 2]], atol=4 * np.sqrt(0.5 / 300))
    again = found.collect(2, indices=[1], progress_bar=False)  # the model visits these data now
    assert again.to_arviz(prior=False).posterior["x"].shape == (32, 2, 1)


def test_posterior_means_of_latent_deterministic_and_observed_sites(fit):
    found = fit.posterior_mean(["x", "twice", "y"], progress_bar=False)
    # 32 chains of 40 moves: a hundred independent draws at least.
    np.testing.assert_allclose(found["x"], exact(fit), atol=4 * np.sqrt(0.5 / 100))
    np.testing.assert_allclose(found["twice"], 2 * found["x"], rtol=1e-5)
    np.testing.assert_allclose(found["y"], found["x"], rtol=1e-5)  # the mean of the observation is the latent
    some = fit.posterior_mean("y", [7, 2], num_samples=60, progress_bar=False)["y"]
    np.testing.assert_allclose(some, exact(fit)[[7, 2]], atol=4 * np.sqrt(0.5 / 200))


def test_posterior_means_of_new_data():
    ebipla, y = fitter(model, num_particles=32), np.array([3.0, -1.0, 0.5], np.float32)
    new = ebipla.infer(random.key(1), {"mean": 1.0}, y, num_samples=0)
    assert new.draws is None
    found = new.posterior_mean(progress_bar=False)["x"]
    # The population's 32 particles come of 256 with resamplings, and 40 moves go on from there.
    np.testing.assert_allclose(found, (1 + y) / 2, atol=4 * np.sqrt(0.5 / 100))


def test_what_cannot_be_drawn_is_refused(fit):
    for call, words in (
        (lambda: fit.collect(5, sites=["z"]), "there is no latent or deterministic site 'z'"),
        (lambda: fit.collect(5, indices=[NUM_DATA]), "indices must be integers from 0 to 39"),
        (lambda: fit.collect(100, indices=range(40), max_bytes=1000), "above the limit"),
        (lambda: fit.posterior_mean("z"), "no site 'z' to average; there are"),
        (lambda: fit.posterior_mean(indices=[-1]), "indices must be integers from 0 to 39"),
    ):
        with pytest.raises(ModelError, match=words):
            call()
    with pytest.raises(ValueError, match="num_samples must be an integer of at least 1"):
        fit.collect(0)
    without = fitter(observed_energy, num_steps=2).run(random.key(0), Y, progress_bar=False)
    with pytest.raises(ModelError, match="posterior_mean: the model has no latent site"):
        without.posterior_mean()
