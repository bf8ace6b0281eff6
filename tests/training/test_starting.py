"""Particles that begin at given values, or at draws of a guide."""

import functools

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal

from numpyro_ebipla import EBIPLA, ModelError, Particles, ShortRunParticles, WeightedParticles
from tests.models import fitter

#: Far from the prior N(0, 1) at the start, so that draws from it have a way to go.
Y = np.random.default_rng(0).normal(20, 1.4, 60).astype(np.float32)


def model(y, batch_size=None):
    """Latents N(mean, 1), data N(x, 1)."""
    mean = numpyro.param("mean", 0.0)
    with numpyro.plate("data", len(y), subsample_size=batch_size):
        x = numpyro.sample("x", dist.Normal(mean, 1))
        numpyro.sample("y", dist.Normal(x, 1), obs=numpyro.subsample(y, event_dim=0))


def guide(y, batch_size=None):
    """An encoder: N(shift + slope y, scale); for mean = 20 it is exact at 10, 1/2 and √½."""
    shift, slope = numpyro.param("shift", 0.0), numpyro.param("slope", 0.0)
    scale = numpyro.param("scale", 1.0, constraint=dist.constraints.positive)
    with numpyro.plate("data", len(y), subsample_size=batch_size):
        batch = numpyro.subsample(y, event_dim=0)
        numpyro.sample("x", dist.Normal(shift + slope * batch, scale))


EXACT = {"shift": 10.0, "slope": 0.5, "scale": 0.5**0.5, "mean": 20.0}


@functools.cache
def guided():
    return EBIPLA(model, num_particles=32, guide=guide, guide_params=EXACT)


@pytest.mark.parametrize("batch_size", [None, 16])
def test_particles_begin_at_the_guides_draws(batch_size):
    kwargs = {} if batch_size is None else {"batch_size": batch_size}
    state = guided().init(random.key(0), Y, **kwargs)
    x = np.asarray(state.posterior.local["x"])
    assert x.shape == (32, 60) and x.dtype == np.float32
    scaled = (x - (10 + Y / 2)) / 0.5**0.5
    assert abs(scaled.mean()) < 4 / np.sqrt(x.size) and abs(scaled.var() - 1) < 4 * np.sqrt(2 / x.size)
    assert np.all(np.abs(scaled.mean(0)) < 4.5 / np.sqrt(32))  # every datum by itself


def test_from_the_guide_equilibrium_is_there_at_once_and_is_the_same():
    """At the maximum already, the mean log density of the particles is in its place from the first step on."""
    begin = dict(init_params={"mean": jnp.array(20.0)}, num_steps=400, num_samples=0, progress_bar=False)
    options = dict(num_particles=32, posterior=Particles(quiet=False))  # so that the contrast is a plain mean
    begun = EBIPLA(model, guide=guide, guide_params=EXACT, **options).run(random.key(0), Y, **begin)
    drawn = EBIPLA(model, **options).run(random.key(0), Y, **begin)
    settled = [fit.losses[-200:] for fit in (begun, drawn)]
    assert abs(np.mean(settled[0]) - np.mean(settled[1])) < 0.02  # a tenth of the latter, over 20 or more lengths
    off = lambda fit: abs(fit.losses[:3].mean() - np.mean(settled))
    # Steps are means over 1920 chains of the like, of variance 1/2. Draws from the prior are a nat off.
    assert off(begun) < 4 * np.sqrt(0.5 / 1920) < off(drawn) / 4
    for fit in (begun, drawn):
        assert fit.params["mean"] == pytest.approx(float(Y.mean()), abs=0.05)


def test_new_data_begin_at_the_guides_draws():
    """The guide is exact at mean 20, so no move is needed: 32 draws of variance 1/2."""
    y = np.array([18.0, 21.0, 25.0], np.float32)
    new = guided().infer(random.key(1), {"mean": 20.0}, y, num_samples=1, warmup=0, thinning=1)
    x = np.asarray(new.state.posterior.local["x"])
    np.testing.assert_allclose(x.mean(0), 10 + y / 2, atol=4 * np.sqrt(0.5 / 32))
    later = new.collect(100, progress_bar=False).get_samples()["x"]
    np.testing.assert_allclose(later.mean((0, 1)), 10 + y / 2, atol=4 * np.sqrt(0.5 / 300))
    # A guide that is off by two is mended by the warm-up.
    off = EBIPLA(model, num_particles=32, guide=guide, guide_params=EXACT | {"shift": 12.0})
    x = off.infer(random.key(1), {"mean": 20.0}, y).get_samples()["x"]
    np.testing.assert_allclose(x.mean((0, 1)), 10 + y / 2, atol=4 * np.sqrt(0.5 / 300))


@pytest.mark.slow_but("16")
@pytest.mark.parametrize("batch_size", [None, 16])
def test_particles_begin_at_given_values_in_the_models_space(batch_size):
    def positive(y, batch_size=None):
        scale = numpyro.sample("scale", dist.LogNormal(0, 1))
        with numpyro.plate("data", len(y), subsample_size=batch_size):
            x = numpyro.sample("x", dist.Exponential(1).expand([2]).to_event(1))
            numpyro.sample("y", dist.Normal(x.sum(-1), scale), obs=numpyro.subsample(y, event_dim=0))

    rng, kwargs = np.random.default_rng(1), {} if batch_size is None else {"batch_size": batch_size}
    given = {"scale": rng.uniform(1, 2, 4), "x": rng.uniform(5, 9, (4, 60, 2))}
    ebipla = EBIPLA(positive, num_particles=4)
    state = ebipla.init(random.key(0), Y, init_particles=given, **kwargs)
    np.testing.assert_allclose(np.exp(state.posterior.shared["scale"]), given["scale"], rtol=1e-5)
    np.testing.assert_allclose(np.exp(state.posterior.local["x"]), given["x"], rtol=1e-5)
    some = ebipla.init(random.key(0), Y, init_particles={"x": given["x"]}, **kwargs)
    np.testing.assert_allclose(np.exp(some.posterior.local["x"]), given["x"], rtol=1e-5)
    assert np.unique(some.posterior.shared["scale"]).size == 4
    fit = ebipla.run(random.key(0), Y, init_particles=given, num_steps=2, num_samples=2, progress_bar=False, **kwargs)
    again = {name: x[:, -1] for name, x in fit.get_samples().items()}
    ebipla.init(random.key(0), Y, init_particles=again, **kwargs)


def test_an_autoguide_after_svi_serves():
    """SVI of the same model, whose parameters the guide's are mixed with."""
    auto = AutoNormal(model)
    svi = SVI(model, auto, numpyro.optim.Adam(0.1), Trace_ELBO())
    found = svi.run(random.key(0), 800, Y, progress_bar=False)
    state = EBIPLA(model, num_particles=32, guide=auto, guide_params=found.params).init(random.key(0), Y)
    x = np.asarray(state.posterior.local["x"])
    # A location for each datum, which Adam at 0.1 leaves some tenths off, and 32 draws.
    assert np.sqrt(np.mean((x.mean(0) - (found.params["mean"] + Y) / 2) ** 2)) < 0.5 and 0.4 < x.std(0).mean() < 1.0


def draws(**sites):
    """A guide of normal sites of some shapes."""

    def guide(y, batch_size=None):
        for name, shape in sites.items():
            numpyro.sample(name, dist.Normal(jnp.zeros(shape), 1))

    return guide


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(guide=draws(z=60)), "guide: 'z' is not a latent site of the model; there are .'x'."),
        (dict(guide=draws(x=59)), r"guide: draws of 'x' have shape \(59,\).* \(60,\)"),
        (dict(guide=draws()), "draws none of the latent sites"),
        (dict(guide=guide), "its parameter 'shift' has no value: .* guide_params=svi_result.params"),
        (dict(guide=guide, guide_params=EXACT | {"shift": np.nan}), "guide: at 1920 of the particles 'x' has values"),
        (dict(guide=guide, guide_params=EXACT, posterior=WeightedParticles()), "anneals its particles from the prior"),
        (dict(guide=guide, guide_params=EXACT, posterior=ShortRunParticles()), "restarts its particles"),
    ],
)
def test_guides_that_do_not_fit_are_refused(options, words):
    with pytest.raises(ModelError, match=words):
        EBIPLA(model, num_particles=32, **options).init(random.key(0), Y)


def test_values_that_do_not_fit_are_refused():
    init = lambda particles: fitter(model, num_particles=32).init(random.key(0), Y, init_particles=particles)
    for particles, words in (
        ({"z": np.zeros((32, 60))}, "there is no latent site 'z'"),
        ({"x": np.zeros((31, 60))}, r"'x' has shape \(31, 60\), but 32 particles of it \(32, 60\)"),
        ({"x": np.zeros(60)}, r"'x' has shape \(60,\)"),
        ({"x": np.full((32, 60), np.inf)}, "init_particles: at 1920 of the particles"),
    ):
        with pytest.raises(ModelError, match=words):
            init(particles)
    for particles in ({"x": "far"}, [1.0]):
        with pytest.raises(TypeError, match="init_particles"):
            init(particles)
    with pytest.raises(TypeError, match="guide must be a function"):
        EBIPLA(model, guide=3)
    with pytest.raises(TypeError, match="guide_params must be"):
        EBIPLA(model, guide_params=EXACT)
    state = fitter(model, num_particles=32).init(random.key(0), Y)
    with pytest.raises(ValueError, match="init_state holds parameters and particles"):
        fitter(model, num_particles=32).run(random.key(0), Y, init_state=state, init_particles={"x": Y})
