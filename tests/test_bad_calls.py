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


# --- inside jit and vmap ----------------------------------------------------------------------------------

HELD = {
    "log_likelihood": lambda e, k, p, y, **o: e.log_likelihood(k, p, y, **QUICK, **o).value,
    "anomaly_score": lambda e, k, p, y, **o: e.anomaly_score(k, p, y, **QUICK, **o),
    "reconstruct": lambda e, k, p, y, **o: e.reconstruct(k, p, y, num_particles=16, **o)["y"],
}


@pytest.mark.parametrize("batch", [{}, {"batch_size": 4}], ids=["all", "batches"])
@pytest.mark.parametrize("name", HELD)
def test_held_parameters_inside_jit(name, batch):
    """Only a model that had not been called before got through; now all do, with the same numbers."""
    fitter, f, key = EBIPLA(good, **SMALL), HELD[name], random.key(0)
    closed = jax.jit(lambda k: f(fitter, k, P, Y, **batch))(key)
    eager = f(fitter, key, P, Y, **batch)
    open_ = jax.jit(lambda k, p, y: f(fitter, k, p, y, **batch))(key, P, Y)
    mapped = jax.vmap(lambda m: f(fitter, key, {"m": m}, Y, **batch))(jnp.array([0.5, 2.0]))
    again = jax.jit(lambda k: f(fitter, k, P, Y, **batch))(key)
    for found in (closed, open_, mapped[0], again):
        np.testing.assert_allclose(found, eager, rtol=1e-3, atol=1e-3)  # rounding, which may tip a draw over
    assert np.all(np.abs(mapped[1] - mapped[0]) > 1e-3)


@pytest.mark.parametrize(
    "name, call",
    [
        ("init", lambda e, k, m: e.init(k, Y, init_params={"m": m}).step),
        ("run", lambda e, k, m: e.run(k, Y, init_params={"m": m}, progress_bar=False).losses),
        ("infer", lambda e, k, m: e.infer(k, {"m": m}, Y).state.step),
        ("bidirectional", lambda e, k, m: e.bidirectional(k, {"m": m}, Y).gap),
    ],
)
@pytest.mark.parametrize("transform", [jax.jit, lambda f: lambda k, m: jax.vmap(f, (None, 0))(k, m[None])])
def test_what_looks_at_numbers_stays_outside(fitted, name, call, transform):
    with pytest.raises(ModelError, match=f"{name} looks at its numbers.*call it outside"):
        transform(lambda k, m: call(fitted[0], k, m))(random.key(0), P["m"])


def test_steps_of_a_new_fitter_inside_jit():
    """What is closed over has its numbers even there."""
    state = EBIPLA(good, **SMALL).init(random.key(0), Y)
    eager = EBIPLA(good, **SMALL).update(state, Y)[1]
    np.testing.assert_allclose(jax.jit(lambda s: EBIPLA(good, **SMALL).update(s, Y)[1])(state), eager, rtol=1e-5)
