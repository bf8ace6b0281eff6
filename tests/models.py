"""Models that several tests fit, and fitters made once: equal models with equal options compile once in a process."""

import functools

import numpyro
import numpyro.distributions as dist

from numpyro_ebipla import EBIPLA, EnergyPrior


def hierarchy(y, batch_size=None):
    """Latents N(mean, 1), data N(x, 1): each datum is N(mean, 2)."""
    mean = numpyro.param("mean", 0.0)
    with numpyro.plate("data", len(y), subsample_size=batch_size):
        x = numpyro.sample("x", dist.Normal(mean, 1))
        numpyro.sample("y", dist.Normal(x, 1), obs=numpyro.subsample(y, event_dim=0))


def one_level(y, batch_size=None):
    """Latents N(mu, s²), data N(x, 1): each datum is N(mu, 1 + s²)."""
    mu, s = numpyro.param("mu", 0.0), numpyro.param("s", 1.0, constraint=dist.constraints.positive)
    with numpyro.plate("data", len(y), subsample_size=batch_size):
        x = numpyro.sample("x", dist.Normal(mu, s))
        numpyro.sample("y", dist.Normal(x, 1), obs=numpyro.subsample(y, event_dim=0))


def global_latent(y, batch_size=None):
    """One latent N(mean, 1) for all data: they are N(mean, I + 11ᵀ)."""
    mean = numpyro.param("mean", 0.0)
    z = numpyro.sample("z", dist.Normal(mean, 1))
    with numpyro.plate("data", len(y), subsample_size=batch_size):
        numpyro.sample("y", dist.Normal(z, 1), obs=numpyro.subsample(y, event_dim=0))


def latent_energy(y, batch_size=None):
    """Latents N(0, 1 / (1 + a)) by the energy a x² / 2, data N(x, 1)."""
    a = numpyro.param("a", 0.0)
    with numpyro.plate("data", len(y), subsample_size=batch_size):
        x = numpyro.sample("x", EnergyPrior(lambda x: 0.5 * a * x**2, dist.Normal(0, 1)))
        numpyro.sample("y", dist.Normal(x, 1), obs=numpyro.subsample(y, event_dim=0))


def observed_energy(y):
    """Data N(0, 1 / (1 + a)) by the energy a y² / 2."""
    a = numpyro.param("a", 0.0)
    with numpyro.plate("data", len(y)):
        numpyro.sample("y", EnergyPrior(lambda y: 0.5 * a * y**2, dist.Normal(0, 1)), obs=y)


@functools.cache
def fitter(model, **options):
    """Return the one EBIPLA of a model and options, whose programs all tests of a file share.

    A test of what a new one does (in a transformation, on its first call) makes its own.
    """
    return EBIPLA(model, **options)
