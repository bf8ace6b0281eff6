"""Faults that users of NumPyro met, each kind as a whole."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random

from numpyro_ebipla import EBIPLA, ModelError

Y = np.linspace(-1, 1, 20, dtype=np.float32)
#: Read by a model as a global.
TABLE = {"y": Y}


def normal_data(y):
    mean = numpyro.param("mean", 0.0)
    with numpyro.plate("data", len(y)):
        x = numpyro.sample("x", dist.Normal(mean, 1))
        numpyro.sample("y", dist.Normal(x, 1), obs=y)


class Study:
    """A model as a method of an object that holds its data."""

    def __init__(self):
        self.y = Y

    def model(self):
        normal_data(self.y)


def by_object():
    held = SimpleNamespace(y=Y)
    return lambda: normal_data(held.y), lambda y: setattr(held, "y", y)


def by_array():
    held = Y.copy()
    return lambda: normal_data(jnp.asarray(held)), lambda y: held.__setitem__(slice(None), y)


def by_method():
    study = Study()
    return study.model, lambda y: setattr(study, "y", y)


def by_global():
    TABLE["y"] = Y
    return lambda: normal_data(TABLE["y"]), lambda y: TABLE.__setitem__("y", y)


def by_cell():
    y = Y

    def change(new):
        nonlocal y
        y = new

    return lambda: normal_data(y), change


@pytest.mark.slow_but("by_object")
@pytest.mark.parametrize("made", [by_object, by_array, by_method, by_global, by_cell])
def test_faults_old_data_are_not_fitted_again(made):
    """A compiled program keeps the numbers that a model holds: the second fit was that of the first data."""
    model, change = made()
    ebipla = EBIPLA(model, num_steps=60, num_samples=4)
    first = ebipla.run(random.key(0), progress_bar=False)
    again = ebipla.run(random.key(0), progress_bar=False)
    assert first.params == again.params
    before = float(ebipla.log_likelihood(random.key(1), {"mean": 0.0}).total.value)
    change(Y + 5)
    fresh = EBIPLA(lambda: normal_data(Y + 5), num_steps=60, num_samples=4).run(random.key(0), progress_bar=False)
    now = ebipla.run(random.key(0), progress_bar=False)
    assert now.params == fresh.params and now.params != first.params
    after = float(ebipla.log_likelihood(random.key(1), {"mean": 0.0}).total.value)
    exact = lambda y: float(dist.Normal(0, 2**0.5).log_prob(y).sum())
    assert after - before == pytest.approx(exact(Y + 5) - exact(Y), abs=0.5)
    later = ebipla.run(random.key(0), init_state=first.state, progress_bar=False)
    assert float(later.params["mean"]) > float(first.params["mean"]) + 0.2


@pytest.mark.unit
@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: EBIPLA(normal_data, n_particles=5), "did you mean num_particles"),
        (lambda: EBIPLA(normal_data).run(random.key(0), Y, guide=normal_data), r"EBIPLA\(model, guide="),
        (lambda: EBIPLA(normal_data).run(random.key(0), Y, num_step=5), "did you mean num_steps"),
        (lambda: EBIPLA(normal_data).run(random.key(0), Y, nonsense=5), "has no option 'nonsense'"),
    ],
)
def test_faults_options_of_other_names(call, words):
    with pytest.raises(TypeError, match=words):
        call()


def test_faults_a_constraint_without_a_bijection():
    def model(y):
        w = numpyro.param("w", jnp.array([1.0, 0.0]), constraint=dist.constraints.sphere)
        with numpyro.plate("data", len(y)):
            x = numpyro.sample("x", dist.Normal(0, 1))
            numpyro.sample("y", dist.Normal(w[0] * x, 1), obs=y)

    with pytest.raises(ModelError, match=r"parameter 'w' has the constraint .*divide by its norm"):
        EBIPLA(model).run(random.key(0), Y)
