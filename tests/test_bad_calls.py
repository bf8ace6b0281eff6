"""Calls that are off in type, precision or place are refused by name, or work."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random

from numpyro_ebipla import EBIPLA, ModelError

M = 6
Y = jnp.linspace(-1.0, 2.0, M)
P = {"m": jnp.array(0.5)}
SMALL = {"num_particles": 2, "num_samples": 2, "thinning": 1, "warmup": 1, "num_steps": 3}
QUICK = {"num_particles": 16, "num_populations": 2}


def good(y, batch_size=None):
    m = numpyro.param("m", 0.0)
    with numpyro.plate("data", len(y), subsample_size=batch_size) as idx:
        x = numpyro.sample("x", dist.Normal(m, 1))
        numpyro.sample("y", dist.Normal(x, 1), obs=y[idx])


@pytest.fixture(scope="module")
def fitted():
    fitter = EBIPLA(good, **SMALL)
    return fitter, fitter.run(random.key(0), Y, progress_bar=False)


# --- precision --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("x64", [False, True])
def test_a_state_of_the_other_precision(x64, tmp_path):
    """Shapes alone were compared: the run ended in JAX's complaint of the carry of a while loop."""
    fitter = EBIPLA(good, **SMALL)
    with jax.enable_x64(x64):
        state = fitter.run(random.key(0), Y, progress_bar=False, checkpoint_dir=tmp_path).state
    with jax.enable_x64(not x64):
        with pytest.raises(ModelError, match=f"type float.*jax_enable_x64={x64}: call numpyro.enable_x64"):
            fitter.run(random.key(0), Y, init_state=state, progress_bar=False)
        with pytest.raises(ModelError, match=f"checkpoint_dir: .*jax_enable_x64={x64}: call numpyro.enable_x64"):
            fitter.run(random.key(0), Y, num_steps=4, progress_bar=False, checkpoint_dir=tmp_path)


@pytest.mark.parametrize("one", [1, np.float64(1), np.ones((), np.float16), True], ids=repr)
def test_parameters_held_in_another_type(one):
    """An integer was refused by JAX's derivatives, after all the annealing."""
    fitter = EBIPLA(good, **SMALL)
    fit, like = (fitter.infer(random.key(0), {"m": m}, Y) for m in (one, jnp.array(1.0)))
    assert fit.params["m"].dtype == jnp.float32
    np.testing.assert_array_equal(fit.get_samples()["x"], like.get_samples()["x"])
