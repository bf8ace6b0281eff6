"""What a fit has compiled goes when it goes."""

import gc
import weakref

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import random

from numpyro_ebipla import EBIPLA, Annealing, EnergyPrior


def test_programs_do_not_outlive_their_model():
    """They were kept by module-level jits, keyed by an object's identity: a worker of many fits came to 10 GB."""

    def model(y):
        slope = numpyro.param("slope", 0.1)
        with numpyro.plate("data", len(y)):
            x = numpyro.sample("x", EnergyPrior(lambda x: slope * x**2, dist.Normal(0, 1), annealing=Annealing(1)))
            numpyro.sample("y", dist.Normal(x, 1), obs=y)

    y = np.linspace(-1, 1, 4, dtype=np.float32)
    fitter = EBIPLA(model, num_particles=2, num_steps=2, num_samples=4, thinning=1, warmup=1)
    fit = fitter.run(random.key(0), y, progress_bar=False)
    fitter.log_likelihood(random.key(1), fit.params, y, num_particles=4, num_populations=1, annealing=Annealing(1))
    fitter.infer(random.key(2), fit.params, y)
    fit.prior_samples()
    alive = weakref.ref(fit.config.model)
    assert len(alive().programs) > 3
    del fitter, fit
    gc.collect()
    assert alive() is None


def test_equal_arguments_share_a_program():
    """A second run of an object compiles nothing."""

    def model(y):
        with numpyro.plate("data", len(y)):
            x = numpyro.sample("x", dist.Normal(numpyro.param("mean", 0.0), 1))
            numpyro.sample("y", dist.Normal(x, 1), obs=y)

    fitter = EBIPLA(model, num_particles=2, num_steps=2, num_samples=2, thinning=1, warmup=1)
    fits = [fitter.run(random.key(i), jnp.arange(3.0) + i, progress_bar=False) for i in range(2)]
    assert fits[0].config is fits[1].config
    program = next(iter(fits[0].config.model.programs.values()))
    assert program._cache_size() == 1
