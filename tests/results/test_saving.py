"""A fit in a file: what comes back is what was saved, and other models, data and files are refused."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random

from numpyro_ebipla import EBIPLA, CheckpointError, EBIPLAWarning, EnergyPrior, ModelError, Persistent
from numpyro_ebipla.checkpoint import files
from numpyro_ebipla.results import saving

Y = np.linspace(-1, 1, 7, dtype=np.float32)
OPTIONS = dict(num_particles=8, num_samples=64, warmup=2, thinning=1)


def mixed(y, batch_size=None, power=1):
    """Local latents, a deterministic site and constrained parameters; the plate may be subsampled."""
    mean = numpyro.param("mean/of", jnp.zeros(1))
    s = numpyro.param("s", 1.0, constraint=dist.constraints.positive)
    with numpyro.plate("data", len(y), subsample_size=batch_size) as i:
        x = numpyro.sample("x", dist.Normal(mean[0], s))
        numpyro.deterministic("square/x", x**2)
        numpyro.sample("y", dist.Normal(x**power, 1), obs=y[i])


def energy(y):
    """An energy prior, and a global latent beside it."""
    a = numpyro.param("a", 0.1)
    scale = numpyro.sample("scale", dist.LogNormal(0, 0.1))
    with numpyro.plate("data", len(y)):
        x = numpyro.sample("x", EnergyPrior(lambda x: 0.5 * a * x**2, dist.Normal(0, 1)))
        numpyro.sample("y", dist.Normal(x, scale), obs=y)


def the_same(one, two):
    """Whether two trees are equal, bit for bit."""
    a, b = (jax.tree.flatten(tree) for tree in (one, two))
    raw = lambda x: random.key_data(x) if jnp.issubdtype(jnp.asarray(x).dtype, jax.dtypes.prng_key) else x
    return a[1] == b[1] and all(np.array_equal(raw(x), raw(y), equal_nan=True) for x, y in zip(a[0], b[0], strict=True))


@pytest.fixture(scope="module")
def fit():
    """Of some of the data, in minibatches."""
    return EBIPLA(mixed, **OPTIONS).run(random.key(0), Y, 3, num_steps=5, indices=[5, 1, 4, 0], progress_bar=False)


@pytest.fixture(scope="module")
def path(fit, tmp_path_factory):
    return fit.save(tmp_path_factory.mktemp("fits") / "fit.npz")


def test_a_loaded_fit_is_the_fit(fit, path, capsys):
    """With a new object, whose programs are its own."""
    again = EBIPLA(mixed, **OPTIONS).load(path, Y, 3)
    for name in ("params", "state", "history", "draws", "stopped"):
        assert the_same(getattr(again, name), getattr(fit, name)), name
    assert again.plan._replace(indices=None) == fit.plan._replace(indices=None)
    assert again.layout == fit.layout
    assert again.draws.newton is not None and str(again.summary()) == str(fit.summary())
    said = []
    for one in (fit, again):
        one.print_summary()
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] and "square/x[5]" in said[0]
    assert repr(again) == repr(fit)
    assert the_same(again.log_likelihood(), fit.log_likelihood())
    new = EBIPLA(mixed, **OPTIONS).infer(random.key(1), again.params, Y[:2])
    assert new.get_samples()["x"].shape == (8, 64, 2)


def test_a_loaded_fit_goes_to_arviz(fit, path):
    pytest.importorskip("arviz")
    one, two = (f.to_arviz(var_names=["x"]) for f in (fit, EBIPLA(mixed, **OPTIONS).load(path, Y, 3)))
    for group in ("posterior", "sample_stats", "observed_data"):
        for name in one[group].data_vars:
            np.testing.assert_array_equal(one[group][name].values, two[group][name].values)
    assert list(two["posterior"].coords["data"].values) == [5, 1, 4, 0]


def test_a_loaded_fit_goes_on(tmp_path):
    """Walkers, global latents and weights of the optimiser are in the state: the next steps are the same."""
    ebipla = EBIPLA(energy, num_particles=4, num_samples=4, warmup=1, thinning=1, prior=Persistent(num_walkers=16))
    fit = ebipla.run(random.key(0), Y, num_steps=5, progress_bar=False)
    again = ebipla.load(fit.save(tmp_path / "fit"), Y)
    assert the_same(again.draws, fit.draws) and the_same(again.prior_samples(), fit.prior_samples())
    on = [ebipla.run(random.key(1), Y, num_steps=3, init_state=f.state, progress_bar=False) for f in (fit, again)]
    assert the_same(on[0].state, on[1].state)
    bare = ebipla.run(random.key(0), Y, num_steps=5, num_samples=0, progress_bar=False)
    assert ebipla.load(bare.save(tmp_path / "fit"), Y).draws is None, "and the file is replaced"


def test_what_is_not_the_same_is_refused_by_name(path, tmp_path, monkeypatch):
    ebipla = EBIPLA(mixed, **OPTIONS)
    with pytest.raises(FileNotFoundError, match=r"there is no file '.*nowhere.npz'"):
        ebipla.load(tmp_path / "nowhere.npz", Y, 3)
    with pytest.raises(ModelError, match="other data: pass those that were fitted"):
        ebipla.load(path, Y + 1, 3)
    with pytest.raises(ModelError, match="another model, or with another batch_size"):
        ebipla.load(path, Y, 4)
    with pytest.raises(ModelError, match="another model"):
        EBIPLA(mixed, power=2, **OPTIONS).load(path, Y, 3)
    with pytest.raises(ModelError, match=r"load: .* of another model, data or settings: at '.posterior.local\['x'\]'"):
        EBIPLA(mixed, **OPTIONS | dict(num_particles=4)).load(path, Y, 3)
    with (
        jax.enable_x64(True),
        pytest.raises(ModelError, match=r"jax_enable_x64=False: call numpyro.enable_x64\(False\)"),
    ):
        EBIPLA(mixed, **OPTIONS).load(path, Y, 3)
    cut = tmp_path / "cut.npz"
    cut.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="damaged or cut short"):
        ebipla.load(cut, Y, 3)
    old = files.save(tmp_path / "run.npz", {}, {}, {})
    with pytest.raises(CheckpointError, match="a checkpoint of a run and holds no fit"):
        ebipla.load(old, Y, 3)
    with monkeypatch.context() as patch:
        patch.setattr(files, "VERSION", 99)
        with pytest.raises(CheckpointError, match=r"format version 4 .* reads version 99"):
            ebipla.load(path, Y, 3)
    with monkeypatch.context() as patch:
        patch.setattr(saving, "releases", lambda: {"jax": "another"})
        with pytest.warns(EBIPLAWarning, match="cannot be told whether the model is the same"):
            EBIPLA(mixed, power=2, **OPTIONS).load(path, Y, 3)


def test_where_it_cannot_be_written(fit, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no directory '.*nowhere'"):
        fit.save(tmp_path / "nowhere" / "fit.npz")
    with pytest.raises(TypeError, match="must be that of a file"):
        fit.save(None)


def test_nothing_is_pickled(path):
    with np.load(path, allow_pickle=False) as found:
        assert all(found[name].dtype != object for name in found.files if name != "header.json")
