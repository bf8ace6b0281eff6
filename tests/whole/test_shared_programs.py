"""Objects of one model and equal settings share what was compiled, and nothing that is out of date."""

import gc

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random

from numpyro_ebipla import EBIPLA, MALA
from numpyro_ebipla.system import _SHARED

Y = np.linspace(-1, 1, 12, dtype=np.float32)
CENTRE = {"mean": 0.0, "start": 0.0}


def model(y):
    mean = numpyro.param("mean", CENTRE["start"])
    with numpyro.plate("data", len(y)):
        x = numpyro.sample("x", dist.Normal(mean + CENTRE["mean"], 1))
        numpyro.sample("y", dist.Normal(x, 1), obs=y)


def fitted(**options):
    ebipla = EBIPLA(model, num_steps=3, num_samples=2, warmup=1, **options)
    return ebipla, ebipla.run(random.key(0), Y, progress_bar=False)


def system(ebipla):
    (made,) = ebipla._systems.made.values()
    return made


def test_a_second_object_has_the_programs_of_the_first_as_long_as_a_fit_lives():
    first, fit = fitted()
    again, same = fitted()
    assert system(again).run_chunk is system(first).run_chunk and same.params == fit.params
    assert system(again).run_chunk._cache_size() == 1
    other, equal = fitted(num_particles=3)[0], fitted(kernel=MALA())[0]
    assert system(other).run_chunk is not system(first).run_chunk, "another number of particles is another program"
    assert system(equal).run_chunk is system(first).run_chunk, "the kernel is that of the default"
    del first, again, same, other, equal
    gc.collect()
    assert any(key[0] is model for key in _SHARED)
    del fit
    gc.collect()
    assert not any(key[0] is model for key in _SHARED)


@pytest.mark.parametrize("name", ["mean", "start"])
def test_a_model_that_reads_other_numbers_is_another(monkeypatch, name):
    first, before = fitted()
    monkeypatch.setitem(CENTRE, name, 5.0)
    second, after = fitted()
    shift = float(after.params["mean"] - before.params["mean"])
    assert (system(first).run_chunk is system(second).run_chunk) == (name == "start")
    assert abs(shift - (5.0 if name == "start" else 0.0)) < 0.5, "three steps are a short way from the start"
    if name == "mean":
        assert float((after.get_samples()["x"] - before.get_samples()["x"]).mean()) > 2, "half of the way to the data"


def test_parameters_that_are_held_are_not_shared():
    ebipla, fit = fitted(hold={"mean": jnp.array(2.0)})
    other, same = fitted(hold={"mean": jnp.array(-2.0)})
    assert fit.params["mean"] == 2 and same.params["mean"] == -2
    assert system(ebipla).run_chunk is not system(other).run_chunk
