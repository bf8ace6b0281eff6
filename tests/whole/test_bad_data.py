"""Data that are given in turn, or that are another run's."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random

from numpyro_ebipla import EBIPLA, ModelError
from tests.models import fitter, hierarchy

Y, OTHER = np.random.default_rng(0).normal(size=(2, 30)).astype(np.float32)


class Loader:
    """As those of PyTorch, Grain and TensorFlow: batches, one after the other."""

    def __iter__(self):
        return iter([Y])

    def __len__(self):
        return 1


@pytest.mark.unit
@pytest.mark.parametrize(
    ("data", "kind"),
    [(Loader(), r"a loader \(Loader\)"), (iter([Y]), r"an iterator \(list_iterator"), (zip(Y), "an iterator")],
)
def test_iterators_and_loaders_are_refused_by_name(data, kind):
    with pytest.raises(ModelError, match=f"argument 'y' of the model is {kind}.*as one array"):
        EBIPLA(hierarchy).init(random.key(0), data)


def weighted(y, temperature, names=("a", "b"), kinds=frozenset("ab")):
    """With arguments that may well change from step to step, or be iterated over."""
    mean = numpyro.param("mean", 0.0)
    with numpyro.plate("data", len(y)):
        x = numpyro.sample("x", dist.Normal(mean, 1))
        numpyro.sample("y", dist.Normal(x, temperature), obs=y)


def test_data_of_another_run_are_refused():
    ebipla = fitter(weighted, num_particles=4)
    one, two = (ebipla.init(random.key(seed), y, jnp.array(1.0)) for seed, y in enumerate((Y, OTHER)))
    for state, own, other in ((one, Y, OTHER), (two, OTHER, Y)):
        state, _ = ebipla.update(state, own, jnp.array(2.0))  # another temperature is another matter
        state, _ = ebipla.update(state, jnp.asarray(own + 0.01 * OTHER), jnp.array(1.0))  # and so is a little noise
        with pytest.raises(ModelError, match="argument 'y' of the model holds other data than the run of this state"):
            ebipla.update(state, other, jnp.array(1.0))
        with pytest.raises(ModelError, match="this init_state, whose particles belong to them"):
            ebipla.run(random.key(0), other, jnp.array(1.0), init_state=state, num_steps=1, num_samples=0)
    # A state from elsewhere has the data with which it is first seen.
    new = EBIPLA(weighted, num_particles=4)
    state, _ = new.update(one, OTHER, jnp.array(1.0))
    with pytest.raises(ModelError, match="'y'"):
        new.update(state, Y, jnp.array(1.0))
    jax.jit(new.update)(state, Y, jnp.array(1.0))  # there are no numbers to look at


def test_images_may_stay_bytes():
    """uint8 in memory, scaled in the model: the fit is that of the scaled floats."""

    def model(y, batch_size=None):
        level = numpyro.param("level", jnp.zeros(6))
        with numpyro.plate("data", len(y), subsample_size=batch_size):
            x = numpyro.sample("x", dist.Normal(0, 1))
            batch = numpyro.subsample(y, event_dim=1) / 127.5 - 1
            numpyro.sample("y", dist.Normal(level + x[:, None], 1).to_event(1), obs=batch)

    images = np.random.default_rng(1).integers(0, 256, (20, 6)).astype(np.uint8)
    run = lambda y: EBIPLA(model, num_particles=4, num_steps=20, num_samples=2).run(
        random.key(0), y, batch_size=10, progress_bar=False
    )
    found, floats = run(images), run(images.astype(np.float32))
    assert found.args[0].dtype == np.uint8
    np.testing.assert_allclose(found.params["level"], floats.params["level"], rtol=1e-5)


@pytest.mark.unit
@pytest.mark.parametrize("make", [list, "Series"])
def test_lists_and_columns_are_named_where_the_model_cannot_take_them(make):
    """JAX said that float is no valid type, or Python that sequences do not multiply."""
    make = getattr(pytest.importorskip("pandas"), make) if isinstance(make, str) else make

    def scaled(x, y):
        slope = numpyro.param("slope", 0.0)
        with numpyro.plate("data", len(y)):
            z = numpyro.sample("z", dist.Normal(0, 1))
            numpyro.sample("y", dist.Normal(z + slope * x, 1), obs=y)

    given = make(Y.tolist())
    with pytest.raises(ModelError, match=f"Argument 'x' is a {type(given).__name__}.*pass numpy.asarray\\(x\\)"):
        EBIPLA(scaled).init(random.key(0), given, Y)
