"""A NumPyro model as pure functions, against NumPyro's own densities."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from flax import linen, nnx
from jax import random
from numpyro import handlers
from numpyro.contrib.module import flax_module, nnx_module
from numpyro.infer.util import potential_energy

from numpyro_ebipla import EBIPLA, EnergyPrior, Persistent
from numpyro_ebipla.model.blocks import Batch
from numpyro_ebipla.model.inspection import inspect_model

M = 6
Y = np.linspace(-1.0, 2.0, M).astype(np.float32)
C = np.linspace(0.5, 1.5, M, dtype=np.float32)
NUM = 2


def normal(*shape):
    return dist.Normal(0, 1).expand(shape).to_event(len(shape))


def logistic_normal():
    """On the simplex of three, and quicker to compile than Dirichlet's sampler."""
    return dist.TransformedDistribution(normal(2), dist.transforms.StickBreakingTransform())


# --- models: (function, arguments, {latent: is it local}) -------------------------------------------------

MODELS = {}


def model(*args, local=(), glob=(), **kwargs):
    def register(fn):
        MODELS[fn.__name__] = (fn, args, kwargs, set(local), set(glob))
        return fn

    return register


@model(Y, local=["x"])
def local_latent(y):
    with numpyro.plate("data", M):
        x = numpyro.sample("x", dist.Normal(numpyro.param("m", 0.3), 1))
        numpyro.sample("y", dist.Normal(x, 0.5), obs=y)


@model(Y, batch_size=2, local=["x"], glob=["w"])
def both_subsampled(y, batch_size):
    w = numpyro.sample("w", dist.Gamma(2.0, 1.0))
    with numpyro.plate("data", len(y), subsample_size=batch_size) as idx:
        x = numpyro.sample("x", normal(2))
        numpyro.sample("y", dist.Normal(w * x.sum(-1), numpyro.param("s", 1.0)), obs=y[idx])


@model(Y, batch_size=3, glob=["w"])
def global_latent(y, batch_size):
    w = numpyro.sample("w", normal(3))
    with numpyro.plate("data", len(y), subsample_size=batch_size):
        numpyro.sample("y", dist.StudentT(4.0, w.sum(), 1), obs=numpyro.subsample(y, event_dim=0))


@model(Y, local=["a", "b", "c"])
def supports_that_depend(y):
    """On parameters and on other latents; in the order in which they come."""
    top = numpyro.param("top", 2.0, constraint=dist.constraints.positive)
    with numpyro.plate("data", M):
        a = numpyro.sample("a", dist.Uniform(0.0, top))
        b = numpyro.sample("b", dist.TruncatedNormal(0.0, 1.0, low=a))
        c = numpyro.sample("c", dist.Uniform(a, a + b + 1))
        numpyro.sample("y", dist.Normal(a + b + c, 1), obs=y)


@model(Y, batch_size=3, local=["p"], glob=["q"])
def simplex(y, batch_size):
    q = numpyro.sample("q", dist.Dirichlet(jnp.ones(3)))
    with numpyro.plate("data", M, subsample_size=batch_size) as idx:
        p = numpyro.sample("p", dist.Dirichlet(jnp.ones(3) + q))
        numpyro.sample("y", dist.Normal(p[:, 0], 1), obs=y[idx])


@model(Y, batch_size=3, local=["l"])
def cholesky(y, batch_size):
    """The unconstrained value has fewer axes than the matrix."""
    with numpyro.plate("data", M, subsample_size=batch_size) as idx:
        chol = numpyro.sample("l", dist.LKJCholesky(3, 2.0))
        numpyro.sample("y", dist.Normal(chol[:, 1, 0], 1), obs=y[idx])


@model(np.outer(Y, [1.0, 2.0, 3.0, 4.0]).astype(np.float32), local=["x", "z"])
def nested_plates_right(y):
    """The data in the right dimension, the other plate to the left of it."""
    with numpyro.plate("data", M, dim=-1):
        x = numpyro.sample("x", dist.Normal(0, 1))
        with numpyro.plate("other", 4, dim=-2):
            z = numpyro.sample("z", normal(2).expand([4, M]))
            numpyro.sample("y", dist.Normal(x + z.sum(-1), 1), obs=y.T)


@model(np.outer(Y, [1.0, 2.0, 3.0, 4.0]).astype(np.float32), batch_size=3, local=["x", "z"], glob=["u"])
def nested_plates_left(y, batch_size):
    """The data in dimension −2, with a plate of groups inside, and another latent in that plate alone."""
    with numpyro.plate("other", 4, dim=-1):
        u = numpyro.sample("u", dist.HalfNormal(1))
    with numpyro.plate("data", M, subsample_size=batch_size, dim=-2) as idx:
        x = numpyro.sample("x", logistic_normal())
        with numpyro.plate("other", 4, dim=-1):
            z = numpyro.sample("z", dist.Normal(0, u))
            numpyro.sample("y", dist.Normal(x[..., 0] + z, 1), obs=y[idx])


@model({"y": Y, "n": np.arange(M, dtype=np.int32)}, local=["x"])
def dictionary_and_counts(data):
    with numpyro.plate("data", data["y"].shape[0]):
        x = numpyro.sample("x", dist.Normal(0, 1))
        numpyro.deterministic("rate", jnp.exp(x))
        numpyro.sample("n", dist.Poisson(jnp.exp(x)), obs=data["n"])
        numpyro.sample("b", dist.BernoulliLogits(x), obs=data["n"] % 2)
        numpyro.sample("k", dist.Categorical(logits=jnp.stack([x, -x, 0 * x], -1)), obs=data["n"] % 3)


@model(num=M, batch_size=2, local=["x"])
def keyword_arguments_only(*, num, batch_size):
    with numpyro.plate("data", num, subsample_size=batch_size) as idx:
        x = numpyro.sample("x", dist.Normal(0, 1))
        numpyro.factor("f", -jnp.square(x - jnp.asarray(C)[idx]))


@model(glob=["x"])
def no_arguments():
    x = numpyro.sample("x", dist.Normal(numpyro.param("m", 0.0), 1).expand([3]))
    numpyro.sample("y", dist.Normal(x, 1), obs=jnp.arange(3.0))


@model(Y, batch_size=3, local=["x"], glob=["w"])
def factor_mask_scale(y, batch_size):
    w = numpyro.sample("w", dist.Normal(0, 1))
    numpyro.factor("outside", -(w**4))
    with numpyro.plate("data", M, subsample_size=batch_size) as idx:
        with handlers.scale(scale=jnp.asarray(C)[idx]):
            x = numpyro.sample("x", dist.Normal(w, 1))
        with handlers.mask(mask=jnp.asarray(C)[idx] > 0.8), handlers.scale(scale=0.5):
            numpyro.sample("y", dist.Normal(x, 1), obs=y[idx])
        numpyro.factor("inside", -(x**4))


@model(Y, batch_size=3, local=["x"])
def energy_latent(y, batch_size):
    a = numpyro.param("a", 0.3)
    with numpyro.plate("data", M, subsample_size=batch_size) as idx:
        x = numpyro.sample("x", EnergyPrior(lambda x: a * (x**4).sum(-1), normal(2)))
        numpyro.sample("y", dist.Normal(x.sum(-1), 1), obs=y[idx])


@model(Y, batch_size=3, local=["x"])
def energy_on_covariates(y, batch_size):
    a = numpyro.param("a", 0.3)
    with numpyro.plate("data", M, subsample_size=batch_size) as idx:
        c = jnp.asarray(C)[idx]
        x = numpyro.sample("x", EnergyPrior(lambda x: a * (x - c) ** 2, dist.Gamma(2.0, 1.0)))
        numpyro.sample("y", dist.Normal(x, 1), obs=y[idx])


@model(np.outer(Y, [1.0, 2.0]).astype(np.float32), batch_size=3)
def energy_observed(y, batch_size):
    a = numpyro.param("a", 0.3)
    with numpyro.plate("data", M, subsample_size=batch_size) as idx:
        numpyro.sample("y", EnergyPrior(lambda x: a * (x**4).sum(-1), normal(2)), obs=y[idx])


@model(np.outer(Y, [1.0, 2.0]).astype(np.float32))
def energy_observed_without_a_plate(y):
    a = numpyro.param("a", 0.3)
    numpyro.sample("y", EnergyPrior(lambda x: a * (x**4).sum(-1), normal(2)), obs=y)


@model(Y, glob=["w"], local=["x", "z"])
def several_energies(y):
    """One of them global, one masked, one scaled."""
    a = numpyro.param("a", 0.3)
    w = numpyro.sample("w", EnergyPrior(lambda x: a * x**4, dist.Normal(0, 1)))
    with numpyro.plate("data", M):
        with handlers.mask(mask=C > 0.8):
            x = numpyro.sample("x", EnergyPrior(lambda x: a * x**2, dist.Normal(0, 1)))
        with handlers.scale(scale=2.0):
            z = numpyro.sample("z", EnergyPrior(lambda x: a * jnp.sin(x), dist.Uniform(0.0, 3.0)))
        numpyro.sample("y", dist.Normal(w + x + z, 1), obs=y)


CONSTANT = EnergyPrior(lambda x: x**4, dist.Normal(0, 1))


@model(Y, local=["x"])
def energy_made_outside(y):
    with numpyro.plate("data", M):
        x = numpyro.sample("x", CONSTANT)
        numpyro.sample("y", dist.Normal(x, numpyro.param("s", 1.0)), obs=y)


@model(Y, batch_size=3, glob=["k"], local=["x"])
def energies_by_group(y, batch_size):
    """A plate of groups has a normaliser for each group: a batch shape that is not the data's."""
    a = numpyro.param("a", jnp.array([0.1, 0.2, 0.3]))
    with numpyro.plate("groups", 3):
        k = numpyro.sample("k", EnergyPrior(lambda x: a * x**4, dist.Normal(0, 1)))
    with numpyro.plate("data", M, subsample_size=batch_size) as idx:
        x = numpyro.sample("x", dist.Normal(0, 1))
        numpyro.sample("y", dist.Normal(x + k.sum(), 1), obs=y[idx])


@model(Y, batch_size=3, local=["x"])
def parameters_by_datum(y, batch_size):
    with numpyro.plate("data", M, subsample_size=batch_size) as idx:
        m = numpyro.param("m", jnp.arange(M) * 1.0, event_dim=0)
        x = numpyro.sample("x", dist.Normal(m, 1))
        numpyro.sample("y", dist.Normal(x, 1), obs=y[idx])


@model(Y[:1], local=["x"])
def single_datum(y):
    with numpyro.plate("data", 1):
        x = numpyro.sample("x", dist.Exponential(1.0))
        numpyro.sample("y", dist.Normal(x, 1), obs=y)


@model(Y, batch_size=M, local=["x"])
def batch_of_all(y, batch_size):
    with numpyro.plate("data", M, subsample_size=batch_size) as idx:
        x = numpyro.sample("x", dist.Normal(0, 1))
        numpyro.sample("y", dist.Normal(x, 1), obs=y[idx])


@model(Y, glob=["x"])
def coupled_elements(y):
    """What couples the elements of a plate from outside makes one block of them."""
    with numpyro.plate("data", M):
        x = numpyro.sample("x", dist.Normal(0, 1))
        numpyro.sample("y", dist.Normal(x, 1), obs=y)
    numpyro.factor("smooth", -jnp.square(jnp.diff(x)).sum())


@model(Y, local=["x"])
def reparametrised(y):
    with numpyro.plate("data", M):
        x = numpyro.sample(
            "x", dist.TransformedDistribution(dist.Normal(0, 1), dist.transforms.AffineTransform(1.0, 2.0))
        )
        numpyro.sample("y", dist.Normal(x, 1).mask(Y > 0), obs=y)


@model(Y, local=["x"])
def improper(y):
    with numpyro.plate("data", M):
        x = numpyro.sample("x", dist.ImproperUniform(dist.constraints.positive, (), ()))
        numpyro.sample("y", dist.Normal(x, 1), obs=y)


class Dropout(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dropout(0.5, deterministic=False)(linen.Dense(1)(x[..., None]))[..., 0]


@model(Y, local=["x"])
def dropout(y):
    net = flax_module("net", Dropout(), jnp.ones(M), apply_rng=["dropout"])
    key = numpyro.prng_key()
    with numpyro.plate("data", M):
        x = numpyro.sample("x", dist.Normal(0, 1))
        numpyro.sample("y", dist.Normal(net(x, rngs={"dropout": key}), 1), obs=y)


# --- densities --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_densities_are_numpyros(name):
    """Value and gradient of the whole, and no datum's density depends on another datum's latents."""
    fn, args, kwargs, local_sites, global_sites = MODELS[name]
    found = inspect_model(fn, random.key(0), args, kwargs)
    layout, data = found.model, found.data
    assert set(layout.local_sites) == local_sites
    assert set(layout.global_sites) == global_sites
    params = layout.constrain_params(found.params)
    indices = random.permutation(random.key(1), M)[: layout.batch_size] if layout.subsampled else None
    batch = Batch(indices, data, random.key(2), {})

    def ours(local, glob):
        per_datum, rest, *_ = layout.log_joint(params, local, glob, batch, {})
        ratio = layout.num_data / layout.batch_size
        return ratio * per_datum.sum(-1) + rest, per_datum

    def numpyros(local, glob):
        values = {n: jnp.moveaxis(x, 0, layout.latents[n].axis) for n, x in local.items()} | glob
        bound = {**params} | ({} if indices is None else {layout.plate.name: indices})
        bound = handlers.seed(handlers.substitute(fn, data=bound), batch.rng_key)
        return -potential_energy(bound, jax.tree.map(jnp.asarray, args), kwargs, values)

    @jax.jit
    def compare():
        draw = lambda k: layout.draw_latents(params, batch._replace(rng_key=k))
        local, glob = jax.vmap(draw)(random.split(random.key(3), NUM))
        if not layout.latents:
            return ours({}, {})[0][0], numpyros({}, {}), {}, {}, {}
        (_, own), grads = jax.value_and_grad(lambda *x: (ours(*x)[0].sum(), ours(*x)[0]), (0, 1), True)(local, glob)
        theirs, their_grads = jax.vmap(jax.value_and_grad(numpyros, (0, 1)))(local, glob)
        first = jax.grad(lambda x: ours(x, glob)[1][:, 0].sum())(local) if local else {}
        return own, theirs, grads, their_grads, first

    own, theirs, grads, their_grads, first = compare()
    assert np.isfinite(own).all()
    np.testing.assert_allclose(own, theirs, rtol=2e-5, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), grads, their_grads)
    for value in first.values():
        assert value.shape[:2] == (NUM, layout.batch_size)
        assert not np.any(value[:, 1:]) and np.any(value[:, 0])


FITTED = {  # the whole fit of those that differ in how particles and walkers are kept
    "nested_plates_left": {"u": (4,), "x": (M, 1, 3), "z": (M, 4)},
    "energy_on_covariates": {"x": (M,)},
    "energy_observed_without_a_plate": {},
    "several_energies": {"w": (), "x": (M,), "z": (M,)},
    "energies_by_group": {"k": (3,), "x": (M,)},
    "single_datum": {"x": (1,)},
    "coupled_elements": {"x": (M,)},
}


@pytest.mark.parametrize("name", FITTED)
def test_fits(name):
    """A few steps and draws: shapes, and that nothing leaves the finite numbers."""
    fn, args, kwargs, *_ = MODELS[name]
    prior = None if name == "energy_on_covariates" else Persistent(num_walkers=8)
    fitter = EBIPLA(fn, num_particles=NUM, num_steps=3, num_samples=2, thinning=1, warmup=1, prior=prior)
    fit = fitter.run(random.key(0), *args, progress_bar=False, **kwargs)
    assert fit.stopped is None and np.isfinite(fit.losses).all()
    samples = fit.get_samples()
    assert {n: x.shape for n, x in samples.items()} == {n: (NUM, 2, *s) for n, s in FITTED[name].items()}
    assert all(np.isfinite(x).all() for x in samples.values())
    if name == "nested_plates_left":
        np.testing.assert_allclose(samples["x"].sum(-1), 1, rtol=1e-5)


# --- mutable sites, types of arrays -----------------------------------------------------------------------


class LinenBatchNorm(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.BatchNorm(use_running_average=False, momentum=0.5)(x[..., None])[..., 0]


class NnxBatchNorm(nnx.Module):
    def __init__(self):
        self.norm = nnx.BatchNorm(1, momentum=0.5, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.norm(x[..., None])[..., 0]


@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_mutable_sites_follow_the_fit(kind):
    y, net = 5.0 + jnp.asarray(Y), NnxBatchNorm()

    def model(y):
        if kind == "linen":
            norm = flax_module("net", LinenBatchNorm(), jnp.ones(M), mutable=["batch_stats"])
        else:
            norm = nnx_module("net", net)
        normed = norm(y)
        with numpyro.plate("data", M):
            x = numpyro.sample("x", dist.Normal(normed, 1))
            numpyro.sample("y", dist.Normal(x, 1), obs=y)

    fit = EBIPLA(model, num_particles=NUM, num_steps=20, num_samples=2, thinning=1, warmup=1).run(
        random.key(0), y, progress_bar=False
    )
    state = jax.tree.leaves_with_path(fit.state.mutable)
    mean = next(x for path, x in state if "mean" in jax.tree_util.keystr(path))
    np.testing.assert_allclose(mean, y.mean(), rtol=1e-3)


@pytest.mark.parametrize("dtype", [np.float64, np.float16, np.int32, np.int8])
def test_numpy_inputs_of_any_type(dtype):
    y = np.arange(M).astype(dtype)
    found = inspect_model(local_latent, random.key(0), (y,), {})
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(found.params))
    fitter = EBIPLA(local_latent, num_particles=NUM)
    state, loss = fitter.update(fitter.init(random.key(0), y), y)
    assert state.posterior.local["x"].dtype == jnp.float32
    assert np.isfinite(loss)


def test_double_precision():
    with jax.enable_x64(True):
        found = inspect_model(supports_that_depend, random.key(0), (Y.astype(np.float64),), {})
        layout = found.model
        batch = Batch(None, found.data, random.key(0), {})
        local, glob = layout.draw_latents({"top": jnp.array(2.0)}, batch)
        local = jax.tree.map(lambda x: x[None], local)
        params = layout.constrain_params(found.params)
        per_datum, *_ = layout.log_joint(params, local, glob, batch, {})
        assert per_datum.dtype == local["a"].dtype == jnp.float64


@pytest.mark.unit
def test_constraints_that_depend_on_the_data():
    def model(y):
        s = numpyro.param("s", 1.0, constraint=dist.constraints.interval(0.0, 2 * y.max()))
        x = numpyro.sample("x", dist.Normal(0, s))
        numpyro.sample("y", dist.Normal(x, 1).expand([len(y)]), obs=y)

    found = inspect_model(model, random.key(0), (Y,), {})
    np.testing.assert_allclose(found.model.constrain_params(found.params)["s"], 1.0, rtol=1e-5)
    assert 3.9 < found.model.constrain_params({"s": jnp.array(50.0)})["s"] <= 4.0


def test_local_latents_start_from_their_particles_global_ones():
    """The bug: each batch's local latents were drawn with global ones of their own, which were thrown away."""

    def model(y, batch_size):
        w = numpyro.sample("w", dist.Normal(0, 100))
        with numpyro.plate("data", M, subsample_size=batch_size) as idx:
            x = numpyro.sample("x", dist.Normal(w, 1e-3))
            numpyro.sample("y", dist.Normal(x, 1), obs=y[idx])

    state = EBIPLA(model, num_particles=NUM).init(random.key(0), Y, batch_size=2)
    x, w = state.posterior.local["x"], state.posterior.shared["w"]
    np.testing.assert_allclose(x, jnp.broadcast_to(w[:, None], x.shape), atol=0.01)


def test_initial_particles_are_redrawn_where_their_density_is_not_finite():
    def model(y):
        with numpyro.plate("data", M):
            x = numpyro.sample("x", dist.Normal(0, 1))
            numpyro.factor("positive", jnp.where(x > 0, 0.0, -jnp.inf))
            numpyro.sample("y", dist.Normal(x, 1), obs=y)

    state = EBIPLA(model, num_particles=4).init(random.key(1), Y)
    assert np.all(state.posterior.local["x"] > 0)


def test_initial_particles_are_redrawn_where_their_density_is_absurd():
    """Of up to eleven draws the first below 1e12 nats from the top is taken; where there is none, the best."""

    def model(y, steepness):
        with numpyro.plate("data", M):
            x = numpyro.sample("x", dist.Normal(0, 1))
            numpyro.factor("wall", -steepness * jnp.maximum(x, 0.0))
            numpyro.sample("y", dist.Normal(x, 1), obs=y)

    start = lambda steepness: EBIPLA(model, num_particles=64).init(random.key(1), Y, steepness).posterior.local["x"]
    assert np.all(start(1e16) < 1e-4)
    assert np.mean(start(1.0) > 0) == pytest.approx(0.5, abs=2.0 / np.sqrt(64 * M)), "what is not absurd stays"

    def low(y):
        with numpyro.plate("data", M):
            x = numpyro.sample("x", dist.Normal(0, 1))
            numpyro.factor("slope", -1e16 * (x + 10))
            numpyro.sample("y", dist.Normal(x, 1), obs=y)

    lowest = EBIPLA(low, num_particles=64).init(random.key(1), Y).posterior.local["x"]
    # The least of eleven normal draws has mean −1.586 and standard deviation 0.58.
    assert np.mean(lowest) == pytest.approx(-1.586, abs=4 * 0.58 / np.sqrt(64 * M))


@pytest.mark.parametrize("batch_size", [1, 2, M])
def test_a_normaliser_for_each_datum_whatever_the_batch(batch_size):
    """With one datum at a time a conditional prior was once taken for one that all data share."""
    layout = inspect_model(energy_on_covariates, random.key(0), (Y, batch_size), {}).model
    assert layout.energies["x"].per_datum


@pytest.mark.unit
def test_why_a_latent_in_a_plate_is_global():
    """Observations outside a latent's plate couple it; of two plates one is the data's."""
    group, item = np.array([0, 0, 1, 1, 2, 2]), np.array([0, 1, 0, 1, 0, 1])

    def crossed(y, outside):
        w = numpyro.sample("w", dist.Normal(0, 1))
        with numpyro.plate("groups", 3):
            u = numpyro.sample("u", dist.Normal(0, 1))
        with numpyro.plate("items", 2):
            v = numpyro.sample("v", dist.Normal(w, 1)) if outside else 0.0 * y[:2]
        with numpyro.plate("data", len(y)):
            numpyro.sample("y", dist.Normal(u[group] + v[item], 1), obs=y)

    def nested(y):
        with numpyro.plate("items", 2, dim=-1):
            v = numpyro.sample("v", dist.Normal(0, 1))
        with numpyro.plate("groups", 3, dim=-2):
            u = numpyro.sample("u", dist.Normal(0, 1).expand([3, 1]))
            with numpyro.plate("items", 2, dim=-1):
                numpyro.sample("y", dist.Normal(u + v, 1), obs=y.reshape(3, 2))

    notes = lambda model, *args: inspect_model(model, random.key(0), args, {}).model.notes
    assert notes(crossed, Y[:6], False) == ("u: global, as 'y' lies outside its plate",)
    assert notes(crossed, Y[:6], True) == ("u, v: global, as 'y' lies outside its plate",)
    assert notes(nested, Y[:6]) == ("v: global, as the data plate is 'groups'",)
    assert notes(dictionary_and_counts, {"y": Y, "n": np.arange(M, dtype=np.int32)}) == ()
