"""Models that were refused, or fitted to something else, with no word of it."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from numpyro import handlers
from numpyro.infer.util import log_density

from numpyro_ebipla import EBIPLA, EBIPLAWarning, EnergyPrior, ModelError, nan_masked
from numpyro_ebipla.model.blocks import Batch
from numpyro_ebipla.model.inspection import inspect_model

Y = np.linspace(-1, 1, 20, dtype=np.float32)
SMALL = {"num_particles": 2, "num_samples": 2, "num_steps": 3}
KEY = random.key(0)


def look(model, *args):
    """Look at a model, as every method does before its work."""
    return inspect_model(model, KEY, args, {})


# --- energies that are no functions of their points -------------------------------------------------------


def with_energy(make):
    def model(y):
        energy = make()
        with numpyro.plate("data", len(y)):
            x = numpyro.sample("x", EnergyPrior(energy, dist.Normal(0, 1).expand([1]).to_event(1)))
            numpyro.sample("y", dist.Normal(x[..., 0], 1), obs=y)

    return model


def linen_energy(layer, mutable):
    nn = pytest.importorskip("flax.linen")
    from numpyro.contrib.module import flax_module

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(1)(nn.tanh(layer(nn, x)))[..., 0]

    return lambda: flax_module("net", Net(), input_shape=(3, 1), mutable=mutable)


def linen_batch_norm(running):
    return linen_energy(lambda nn, x: nn.BatchNorm(running)(nn.Dense(4)(x)), ["batch_stats"])


def linen_spectral_norm(update):
    return linen_energy(lambda nn, x: nn.SpectralNorm(nn.Dense(4))(x, update_stats=update), ["batch_stats"])


def nnx_energy(make_layer, train):
    nnx = pytest.importorskip("flax.nnx")
    from numpyro.contrib.module import nnx_module

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.first, self.layer = nnx.Linear(1, 4, rngs=rngs), make_layer(nnx, rngs)
            self.last = nnx.Linear(4, 1, rngs=rngs)

        def __call__(self, x):
            return self.last(nnx.tanh(self.layer(self.first(x))))[..., 0]

    net = Net(nnx.Rngs(0))
    net.train() if train else net.eval()
    return lambda: nnx_module("net", net)


def nnx_batch_norm(train):
    return nnx_energy(lambda nnx, rngs: nnx.BatchNorm(4, rngs=rngs), train)


def nnx_dropout(train):
    return nnx_energy(lambda nnx, rngs: nnx.Dropout(0.5, rngs=rngs), train)


NEIGHBOURS, STATE = "'x' of a point depends on the other points", "'x' writes a state"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: linen_batch_norm(False), NEIGHBOURS),
        (lambda: nnx_batch_norm(True), NEIGHBOURS),
        (lambda: lambda: lambda x: numpyro.param("a", 1.0) * (x - x.mean()).sum(-1) ** 2, NEIGHBOURS),
        (lambda: linen_spectral_norm(True), STATE),
        (lambda: nnx_dropout(True), STATE),
    ],
    ids=["linen batch norm", "nnx batch norm", "mean", "spectral norm", "dropout"],
)
def test_faults_energies_of_neighbours_or_of_a_state(make, words):
    """The state stayed as it was at the start, and each energy was that of its batch."""
    with pytest.raises(ModelError, match=words):
        look(with_energy(make()), Y)


@pytest.mark.parametrize(
    "make",
    [
        lambda: linen_batch_norm(True),
        lambda: linen_spectral_norm(False),
        lambda: nnx_batch_norm(False),
        lambda: nnx_dropout(False),
    ],
    ids=["linen batch norm", "spectral norm", "nnx batch norm", "dropout"],
)
def test_faults_a_state_that_stands_still_is_no_fault(make):
    look(with_energy(make()), Y)


def test_faults_a_bare_module_as_energy():
    """Its weights were constants: there was nothing to fit, and all steps were taken."""
    eqx = pytest.importorskip("equinox")
    from numpyro.contrib.module import eqx_module

    net = eqx.nn.MLP(1, "scalar", 4, 1, key=KEY)
    with pytest.raises(ModelError, match=r"'x' is a module whose weights are constants.*eqx_module.*lambda x: module"):
        look(with_energy(lambda: net), Y)
    assert look(with_energy(lambda: eqx_module("net", net)), Y).params.keys() == {"net$params"}
    assert look(with_energy(lambda: lambda x: net(x)), Y).params == {}


# --- plates -----------------------------------------------------------------------------------------------


def test_faults_one_plate_at_two_dims():
    """It was a raw error of an axis; NumPyro's own log density says what is right."""

    def model(y):
        m = numpyro.param("m", 0.0)
        with numpyro.plate("data", 5, dim=-1):
            x = numpyro.sample("x", dist.Normal(m, 1).expand([2]).to_event(1))
        with numpyro.plate("other", 4, dim=-1), numpyro.plate("data", 5, dim=-2):
            z = numpyro.sample("z", dist.Normal(x.sum(-1)[:, None], 1))
            numpyro.sample("y", dist.Normal(z, 1), obs=y)

    y = Y.reshape(5, 4)
    found = look(model, y).model
    batch = Batch(None, (jnp.asarray(y),), KEY, {})
    assert found.local_sites == ["x", "z"]
    local, _ = found.draw_latents({"m": 0.3}, batch)
    assert local["x"].shape == (5, 2) and local["z"].shape == (5, 4)
    joint = found.log_joint({"m": 0.3}, jax.tree.map(lambda x: x[None], local), {}, batch, {})
    np.testing.assert_allclose(joint.per_datum.sum(), log_density(model, (y,), {}, local | {"m": 0.3})[0], rtol=1e-5)
    alone = jax.grad(
        lambda z: found.log_joint({"m": 0.3}, {"x": local["x"][None], "z": z[None]}, {}, batch, {}).per_datum[0, 2]
    )
    assert not np.asarray(alone(local["z"]))[[0, 1, 3, 4]].any()
    fit = EBIPLA(model, **SMALL).run(KEY, y, progress_bar=False, indices=[3, 1])
    assert fit.get_samples()["z"].shape == (2, 2, 2, 4) and fit.get_samples()["x"].shape == (2, 2, 2, 2)


@pytest.mark.unit
def test_faults_one_plate_of_two_sizes():
    def model(y):
        with numpyro.plate("data", 5):
            x = numpyro.sample("x", dist.Normal(0, 1))
        with numpyro.plate("data", 4):
            numpyro.sample("y", dist.Normal(x[:4], 1), obs=y[:4])

    with pytest.raises(ModelError, match="plate 'data' has 4 elements, and 5 elsewhere"):
        look(model, Y)


def semi_supervised(name, size, masked=False):
    def model(y, label):
        mean = numpyro.param("mean", 0.0)
        with numpyro.plate("data", len(y)):
            x = numpyro.sample("x", dist.Normal(mean, 1))
            numpyro.sample("y", dist.Normal(x, 1), obs=y)
        with numpyro.plate(name, size), handlers.mask(mask=jnp.arange(size) < 8 if masked else True):
            numpyro.sample("label", dist.Normal(x[:size], 1), obs=label[:size])

    return model


@pytest.mark.parametrize("size", [8, len(Y)])
def test_faults_two_plates_over_the_same_data(size):
    """The latents were global without a word; the remedies of the warning make them local."""
    words = "'x' of plate 'data' is treated as global.*'label'.*in plate 'labelled'.*one name.*mask"
    with pytest.warns(EBIPLAWarning, match=words):
        EBIPLA(semi_supervised("labelled", size), **SMALL).run(KEY, Y, Y, progress_bar=False)


@pytest.mark.unit
def test_faults_two_plates_of_one_name():
    for masked in (False, True):
        assert look(semi_supervised("data", len(Y), masked), Y, Y).model.local_sites == ["x"]


def test_faults_latents_that_are_coupled_indeed_are_not_warned_of():
    """A random walk, and long data of groups."""

    def walk(y):
        with numpyro.plate("data", len(y)):
            x = numpyro.sample("x", dist.Normal(0, numpyro.param("s", 1.0)))
            numpyro.sample("y", dist.Normal(x, 1), obs=y)
        with numpyro.plate("moves", len(y) - 1):
            numpyro.sample("move", dist.Normal(x[1:] - x[:-1], 1), obs=jnp.zeros(len(y) - 1))

    def groups(y):
        with numpyro.plate("groups", 5):
            u = numpyro.sample("u", dist.Normal(0, numpyro.param("s", 1.0)))
        with numpyro.plate("data", len(y)):
            numpyro.sample("y", dist.Normal(u[jnp.arange(len(y)) % 5], 1), obs=y)

    for model in (walk, groups):
        found = look(model, Y)
        assert found.note == "" and found.model.local_sites == []


# --- sites ------------------------------------------------------------------------------------------------


def named(one, other):
    """Sites of these kinds, by one name."""

    def site(kind):
        if kind == "param":
            numpyro.param("a", 0.0)
        elif kind == "plate":
            with numpyro.plate("a", 3):
                pass
        elif kind == "deterministic":
            numpyro.deterministic("a", 0.0)
        else:
            numpyro.sample("a", dist.Normal(0, 1))

    def model(y):
        site(one)
        site(other)
        numpyro.sample("y", dist.Normal(numpyro.sample("z", dist.Normal(0, 1)), 1), obs=y)

    return model


@pytest.mark.unit
@pytest.mark.parametrize(
    ("kinds", "words"),
    [
        (("param", "sample"), "of a parameter and of a sample site"),
        (("param", "plate"), "of a parameter and of a plate"),  # the parameter was lost
        (("plate", "sample"), "of a plate and of a sample site"),
        (("sample", "sample"), "of a sample site and of another sample site"),
        (("deterministic", "param"), "of a deterministic site and of a parameter"),
    ],
)
def test_faults_two_sites_of_one_name(kinds, words):
    with pytest.raises(ModelError, match=f"'a' is the name {words}"):
        look(named(*kinds), Y)


@pytest.mark.unit
def test_faults_supports_without_a_bijection():
    """NumPyro's NotImplementedError says nothing."""
    sphere = dist.ProjectedNormal(jnp.array([1.0, 0.0]))
    with pytest.raises(ValueError, match=r"base ProjectedNormal has the support Sphere.*no map"):
        EnergyPrior(lambda x: x[..., 0], sphere)

    def model(y):
        z = numpyro.sample("z", sphere)
        numpyro.sample("y", dist.Normal(z[0], 1), obs=y)

    with pytest.raises(ModelError, match=r"'z' .ProjectedNormal. has the support Sphere.*ProjectedNormalReparam"):
        look(model, Y)


# --- data -------------------------------------------------------------------------------------------------


def normal_data(y):
    mean = numpyro.param("mean", 0.0)
    with numpyro.plate("data", len(y)):
        x = numpyro.sample("x", dist.Normal(mean, 1))
        numpyro.sample("y", dist.Normal(x, 1), obs=y)


@pytest.mark.unit
@pytest.mark.parametrize("where", ["frame", "closure"])
def test_faults_nan_where_no_argument_shows_it(where):
    """It lay "outside the support"."""
    y = np.where(np.arange(20) == 3, np.float32(np.nan), Y)
    if where == "frame":
        pandas = pytest.importorskip("pandas")
        model, args = lambda frame: normal_data(jnp.asarray(frame["y"].to_numpy())), (pandas.DataFrame({"y": y}),)
    else:
        model, args = lambda: normal_data(jnp.asarray(y)), ()
    with pytest.raises(ModelError, match=r"observed values at 'y' contain NaN.*mask.*nan_masked"):
        look(model, *args)
    look(nan_masked(model), *args)
    look(handlers.scale(nan_masked(model), scale=2.0), *args)


@pytest.mark.unit
def test_faults_nan_in_a_handler_around_nan_masked():
    look(handlers.scale(nan_masked(normal_data), scale=2.0), np.where(np.arange(20) == 3, np.float32(np.nan), Y))


@pytest.mark.unit
@pytest.mark.parametrize("how", ["condition", "obs"])
def test_faults_all_data_where_a_batch_is_wanted(how):
    """It was an error of shapes, somewhere in a density."""

    def model(y, obs=None):
        with numpyro.plate("data", len(y), subsample_size=5):
            x = numpyro.sample("x", dist.Normal(numpyro.param("m", 0.0), 1).expand([2]).to_event(1))
            numpyro.sample("y", dist.Normal(x, 1).to_event(1), obs=obs)

    y = jnp.stack([Y, Y], -1)
    with pytest.raises(ModelError, match=r"'y' has values for all 20 data of the plate 'data', of which 5.*subsample"):
        if how == "condition":
            look(handlers.condition(model, {"y": y}), y)
        else:
            look(model, y, y)
