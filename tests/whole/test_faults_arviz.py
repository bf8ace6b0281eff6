"""Names, axes and coordinates that ArviZ or xarray would not take, or took in the wrong place."""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from numpyro import handlers

from numpyro_ebipla import EBIPLA, EnergyPrior
from numpyro_ebipla.results.arviz import NAME_IN_MODEL

pytest.importorskip("arviz")
Y = np.linspace(-1, 1, 6, dtype=np.float32)
SMALL = {"num_particles": 2, "num_samples": 3, "num_steps": 2, "thinning": 1, "warmup": 1}
KEY = random.key(0)


def slashes(data):
    """Slashes in the names of everything, and a name that is another's without them."""
    mean = numpyro.param("mean/of", 0.0)
    with numpyro.plate("all/data", 6):
        x = numpyro.sample("x/y", EnergyPrior(lambda x: mean * x[..., 0], dist.Normal(0, 1).expand([2]).to_event(1)))
        numpyro.deterministic("x.y", x[..., 0])
        numpyro.sample("obs/x", dist.Normal(x[..., 0] + data["c/v"][:, 0], 1), obs=data["a/b"])


@pytest.fixture(scope="module")
def fitted():
    """A fit in a scope of NumPyro's, which puts ``s/`` before all names."""
    data = {"a/b": Y, "c/v": np.ones((6, 2), np.float32)}
    model = handlers.scope(slashes, prefix="s")
    sites = ["s/x/y", "s/x.y"]
    return EBIPLA(model, **SMALL).run(KEY, data, sites=sites, progress_bar=False)


def test_faults_slashes_in_names(fitted, tmp_path):
    found = fitted.to_arviz(
        log_likelihood=True,
        posterior_predictive=True,
        dims={"s/x/y": ["s/all/data", "f/g"], "data['c/v']": ["s/all/data", "k/l"]},
        coords={"s/all/data": list("abcdef"), "f/g": ["first", "second"]},
        indices=[4, 1],
    )
    x = found["posterior"]["s.x.y_"]
    assert x.dims == ("chain", "draw", "s.all.data", "f.g") and x.attrs[NAME_IN_MODEL] == "s/x/y"
    assert x.coords["s.all.data"].attrs[NAME_IN_MODEL] == "s/all/data"
    assert [*x.coords["s.all.data"].values] == ["e", "b"] and [*x.coords["f.g"].values] == ["first", "second"]
    np.testing.assert_array_equal(x, fitted.get_samples()["s/x/y"][:, :, [4, 1]])
    assert found["posterior"]["s.x.y"].attrs[NAME_IN_MODEL] == "s/x.y"
    np.testing.assert_array_equal(found["posterior"]["s.x.y"], x[..., 0])
    for group in ("observed_data", "log_likelihood", "posterior_predictive"):
        assert found[group]["s.obs.x"].attrs[NAME_IN_MODEL] == "s/obs/x"
    assert found["prior"]["s.x.y_"].attrs[NAME_IN_MODEL] == "s/x/y"
    assert found["constant_data"]["data['c.v']"].dims == ("s.all.data", "k.l")
    try:
        found.to_netcdf(tmp_path / "fit.nc")
    except (ImportError, ValueError, ModuleNotFoundError) as e:  # no library for the file
        assert "netcdf" in str(e).lower() or "engine" in str(e).lower()


def test_faults_slashes_in_checkpoints(tmp_path):
    data = {"a/b": Y, "c/v": np.ones((6, 2), np.float32)}
    ebipla = EBIPLA(slashes, **SMALL)
    first = ebipla.run(KEY, data, progress_bar=False, checkpoint_dir=tmp_path)
    again = ebipla.run(KEY, data, progress_bar=False, checkpoint_dir=tmp_path)
    assert first.params == again.params
    np.testing.assert_array_equal(first.get_samples()["x/y"], again.get_samples()["x/y"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dims": {"s/x/y": ["f", "s/all/data"]}}, "'s/x/y' must have the plate 's/all/data' in its place, .* axis 0"),
        ({"dims": {"s/x/y": ["feature", "f"]}}, "must have the plate 's/all/data' in its place, which is axis 0"),
        ({"dims": {"s/obs/x": ["feature"]}}, "'s/obs/x' must have the plate"),
        (
            {"dims": {"data['c/v']": ["k", "s/all/data"]}},
            r"axis of 'data\['c/v'\]' named 's/all/data' has length 2, not 6",
        ),
        ({"dims": {"nonsense": ["k"]}}, r"dims: there is no site or argument \['nonsense'\]"),
        ({"dims": {"s/x/y": ["s/all/data", "f"]}, "coords": {"f": ["a"]}}, r"'f' has shape \(1,\).*length 2"),
        ({"coords": {"s/all/data": [1, 2]}}, "'s/all/data' has 2 values for 6 data"),
        ({"coords": {"s/all/data": 3}}, "'s/all/data' has 1 values for 6 data"),
    ],
)
def test_faults_axes_and_coordinates_that_do_not_fit(fitted, options, words):
    """The plate in another place was an IndexError, or its data were not cut; wrong coordinates were xarray's."""
    with pytest.raises(ValueError, match=words):
        fitted.to_arviz(**options)


def test_faults_modules_with_slashes():
    """``random_flax_module`` names its latents ``net/Dense_0.kernel``."""
    nn = pytest.importorskip("flax.linen")
    from numpyro.contrib.module import random_flax_module

    def model(y):
        net = random_flax_module("net", nn.Dense(1), dist.Normal(0, 1), input_shape=(1,))
        with numpyro.plate("data", 6):
            numpyro.sample("y", dist.Normal(net(jnp.asarray(Y)[:, None])[:, 0], 1), obs=y)

    found = EBIPLA(model, **SMALL).run(KEY, Y, progress_bar=False).to_arviz()
    assert {*found["posterior"].data_vars} == {"net.kernel", "net.bias"}
