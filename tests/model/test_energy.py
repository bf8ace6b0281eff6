"""``EnergyPrior`` as a NumPyro distribution."""

import functools
import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from flax import linen, nnx
from jax import random
from numpyro import handlers
from numpyro.contrib.module import eqx_module, flax_module, nnx_module
from numpyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO
from numpyro.infer.inspect import get_model_relations

from numpyro_ebipla import MALA, ULA, Annealing, EBIPLAWarning, EnergyPrior, Underdamped

NORMAL2 = dist.Normal(0, 1).expand([2]).to_event(1)


class LinenNet(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(1)(linen.tanh(linen.Dense(4)(x)))[..., 0]


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.first, self.last = nnx.Linear(2, 4, rngs=rngs), nnx.Linear(4, 1, rngs=rngs)

    def __call__(self, x):
        return self.last(jnp.tanh(self.first(x)))[..., 0]


# Made on their first use, which may be inside a trace of the model.
@functools.cache
@jax.ensure_compile_time_eval()
def nnx_net():
    return NnxNet(nnx.Rngs(0))


@functools.cache
@jax.ensure_compile_time_eval()
def eqx_net():
    return eqx.nn.MLP(2, "scalar", 4, 1, activation=jnp.tanh, key=random.key(0))


def plain():
    w = numpyro.param("w", jnp.array([1.0, 0.5]))
    return lambda x: jnp.sum(w * x**2, -1)


def around_a_module():
    net = flax_module("net", LinenNet(), input_shape=(2,))
    return lambda x: 0.1 * jnp.sum(x**2, -1) + net(x)


ENERGIES = {
    "linen": lambda: flax_module("net", LinenNet(), input_shape=(2,)),
    "nnx": lambda: nnx_module("net", nnx_net()),
    "equinox": lambda: eqx_module("net", eqx_net()),
    "function": plain,
    "function of a module": around_a_module,
}


@pytest.fixture(params=ENERGIES, ids=str)
def energy(request):
    return ENERGIES[request.param]


def model_of(energy, y=None, num=5):
    prior = EnergyPrior(energy(), NORMAL2, num_walkers=32, annealing=Annealing(1))
    with numpyro.plate("data", num):
        x = numpyro.sample("x", prior)
        numpyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=y)


def bind(energy, seed=0):
    """An EnergyPrior as a model makes it, at parameters that depend on the seed."""
    with handlers.seed(rng_seed=seed):
        trace = handlers.trace(energy).get_trace()
    params = {n: jax.tree.map(lambda x: x + seed, s["value"]) for n, s in trace.items() if s["type"] == "param"}
    with handlers.substitute(data=params), handlers.seed(rng_seed=seed):
        return EnergyPrior(energy(), NORMAL2, num_walkers=32, annealing=Annealing(1))


# --- a NumPyro distribution -------------------------------------------------------------------------------


def test_works_with_numpyros_tools(energy):
    model = lambda: model_of(energy)
    assert get_model_relations(model)["sample_dist"]["x"] == "EnergyPrior"
    assert _trace(model)["x"]["value"].shape == (5, 2)
    draws = Predictive(model, num_samples=3)(random.key(0))
    assert draws["x"].shape == (3, 5, 2)


@pytest.mark.unit
def test_renders():
    pytest.importorskip("graphviz")
    graph = numpyro.render_model(lambda: model_of(plain), render_distributions=True)
    assert "EnergyPrior" in graph.source


@pytest.mark.unit
def test_does_not_retrace(energy):
    """The bug: ``flax_module`` makes a new closure in each call of the model, and an energy that is a lambda
    around parameters held them in its closure, where no jit could see them."""
    traces = []

    @jax.jit
    def log_prob(prior, x):
        traces.append(1)
        return prior.log_prob(x)

    x = jnp.ones((3, 2))
    first, second = bind(energy, 0), bind(energy, 1)
    for prior in (first, second):
        np.testing.assert_allclose(log_prob(prior, x), prior.log_prob(x), rtol=1e-5)
    assert len(traces) == 1
    assert not np.allclose(first.log_prob(x), second.log_prob(x))


def test_sampling_twice_compiles_once(energy):
    from numpyro_ebipla.model.energy import _sample

    bind(energy, 0).sample(random.key(0), (2,))
    known = _sample._cache_size()
    bind(energy, 1).sample(random.key(1), (2,))
    assert _sample._cache_size() == known


@pytest.mark.unit
def test_other_code_or_structure_is_another_function():
    traces = []

    @jax.jit
    def log_prob(prior, x):
        traces.append(1)
        return prior.log_prob(x)

    def power(k):
        return EnergyPrior(lambda x: jnp.sum(x**k, -1), NORMAL2)

    x = jnp.array([2.0, 3.0])
    values = [log_prob(p, x) for p in (power(2), power(4), power(2))]
    np.testing.assert_allclose(values[0], values[2])
    np.testing.assert_allclose(values[0] - values[1], 2**4 + 3**4 - 2**2 - 3**2, rtol=1e-5)
    assert len(traces) == 2


@pytest.mark.unit
def test_survives_flattening_and_vmap():
    prior = EnergyPrior(functools.partial(jnp.multiply, jnp.array(2.0)), dist.Normal(0, 1))
    again = jax.tree.unflatten(jax.tree.structure(prior), jax.tree.leaves(prior))
    np.testing.assert_allclose(again.log_prob(1.0), prior.log_prob(1.0))
    stacked = jax.tree.map(lambda *x: jnp.stack(x), prior, jax.tree.map(lambda x: 2 * x, prior))
    values = jax.vmap(lambda p: p.energy(jnp.array(1.0)))(stacked)
    np.testing.assert_allclose(values, [2.0, 4.0])


@pytest.mark.unit
def test_energies_of_many_kinds():
    x = jnp.ones((3, 2))

    class Callable_:
        def __call__(self, x):
            return jnp.sum(x, -1)

        def method(self, x):
            return jnp.sum(x, -1)

    def recursive(x, k=2):
        return jnp.sum(x, -1) if k == 0 else recursive(x, k - 1)

    for energy in (
        Callable_(),
        Callable_().method,
        recursive,
        jax.jit(lambda x: jnp.sum(x, -1)),
        jnp.linalg.norm,
    ):
        assert EnergyPrior(energy, NORMAL2).energy(x).shape == (3,)


@pytest.mark.unit
@pytest.mark.parametrize("energy", [lambda x: eqx_net()(x), lambda x: x[0] ** 2 + x[1], lambda x: jnp.sum(x**2)])
@pytest.mark.parametrize("batch", [(), (4,)])
def test_energies_of_single_points_are_mapped(energy, batch):
    prior = EnergyPrior(energy, NORMAL2.expand(batch))
    x = random.normal(random.key(0), (3, *batch, 2))
    assert prior.batch_shape == batch
    expected = jnp.array([energy(p) for p in x.reshape(-1, 2)]).reshape((3, *batch))
    np.testing.assert_allclose(prior.energy(x), expected, rtol=1e-5)


@pytest.mark.unit
@pytest.mark.parametrize("num", [1, 4])
def test_covariates_give_the_batch_shape(num):
    """Also for one covariate, which looks like an axis to squeeze."""
    c = jnp.arange(num) * 1.0
    prior = EnergyPrior(lambda x: (x.sum(-1) - c) ** 2, NORMAL2)
    assert prior.batch_shape == (num,)
    assert prior.log_prob(jnp.zeros((3, num, 2))).shape == (3, num)
    assert jax.eval_shape(lambda key: prior.sample(key, (7,)), random.key(0)).shape == (7, num, 2)


# --- sampling ---------------------------------------------------------------------------------------------


def moments_by_quadrature(prior, grid):
    log_p = prior.log_prob(grid)
    p = jnp.exp(log_p - log_p.max())
    mean = (grid * p).sum() / p.sum()
    return mean, jnp.sqrt(((grid - mean) ** 2 * p).sum() / p.sum())


@pytest.mark.parametrize(
    "base, energy, low, high, options",
    [
        (dist.Normal(0, 2), lambda x: 2 * (x**2 - 2) ** 2, -8, 8, {}),
        (
            dist.Gamma(2.0, 1.0),
            lambda x: 3 * jnp.cos(2 * x),
            0,
            25,
            {"kernel": MALA(), "annealing": Annealing(6, 0.98)},
        ),
        (dist.Uniform(-1.0, 3.0), lambda x: 2 * (x - 2.5) ** 2, -1, 3, {}),
    ],
    ids=["bimodal", "positive", "interval"],
)
def test_samples_match_quadrature(base, energy, low, high, options):
    prior = EnergyPrior(energy, base, **options)
    x = prior.sample(random.key(0), (10_000,))
    assert bool(base.support(x).all())
    mean, sd = moments_by_quadrature(prior, jnp.linspace(low + 1e-4, high - 1e-4, 20_001))
    np.testing.assert_allclose(x.mean(), mean, atol=0.06 * sd)
    np.testing.assert_allclose(x.std(), sd, rtol=0.05)


def test_no_draw_is_a_copy_of_another():
    """Of 800 draws 583 were different: a walker of much weight was drawn again and again."""
    draws = EnergyPrior(lambda x: 2 * x**2 - jnp.cos(3 * x), dist.Normal(0, 2)).sample(random.key(0), (800,))
    assert len(np.unique(np.asarray(draws))) > 795


def test_samples_on_the_simplex_match_quadrature():
    prior = EnergyPrior(lambda x: 4 * x[..., 0] * x[..., 1], dist.Dirichlet(jnp.array([2.0, 1.5, 1.0])))
    x = prior.sample(random.key(0), (10_000,))
    assert x.shape == (10_000, 3)
    np.testing.assert_allclose(x.sum(-1), 1, rtol=1e-5)
    a, b = jnp.meshgrid(jnp.linspace(0, 1, 402)[1:-1], jnp.linspace(0, 1, 402)[1:-1], indexing="ij")
    inside = a + b < 0.999
    points = jnp.stack([a, b, 1 - a - b], -1)
    p = jnp.where(inside, jnp.exp(prior.log_prob(jnp.where(inside[..., None], points, 1 / 3))), 0)
    expected = (points * p[..., None]).sum((0, 1)) / p.sum()
    np.testing.assert_allclose(x.mean(0), expected, atol=0.01)


def test_samples_in_two_dimensions_match_quadrature():
    prior = EnergyPrior(lambda x: 3 * (x[..., 0] ** 2 - 1) ** 2 + x[..., 0] * x[..., 1], NORMAL2)
    x = prior.sample(random.key(1), (10_000,))
    a, b = jnp.meshgrid(jnp.linspace(-5, 5, 401), jnp.linspace(-5, 5, 401), indexing="ij")
    p = jnp.exp(prior.log_prob(jnp.stack([a, b], -1)))
    product = (a * b * p).sum() / p.sum()
    np.testing.assert_allclose((x[:, 0] * x[:, 1]).mean(), product, atol=0.05)
    np.testing.assert_allclose((x[:, 0] ** 2).mean(), (a**2 * p).sum() / p.sum(), rtol=0.03)


def test_conditional_priors_sample_each_element_from_its_own_density():
    c = jnp.array([-2.0, 0.0, 3.0])
    prior = EnergyPrior(lambda x: 0.5 * (x - c) ** 2, dist.Normal(0, 1))
    x = prior.sample(random.key(0), (8000,))
    np.testing.assert_allclose(x.mean(0), c / 2, atol=0.05)
    np.testing.assert_allclose(x.std(0), np.sqrt(0.5), rtol=0.05)


@pytest.mark.parametrize(
    "options",
    [
        {"annealing": Annealing(step_size=0.5, num_moves=2, max_temps=5)},
        {"kernel": ULA(0.01)},
        {"kernel": Underdamped(0.1)},
    ],
    ids=str,
)
def test_sampling_can_be_set(options):
    prior = EnergyPrior(lambda x: 0.5 * x**2, dist.Normal(0, 1), num_walkers=64, **options)
    x = prior.sample(random.key(0), (4000,))
    np.testing.assert_allclose(x.std(), np.sqrt(0.5), rtol=0.06)


# --- the missing normaliser --------------------------------------------------------------------------------


def params_gradient(model, y):
    """What SVI and MCMC over parameters differentiate, without their compilation."""
    params = {n: s["value"] for n, s in _trace(model, y).items() if s["type"] == "param"}

    def log_density(params):
        return numpyro.infer.util.log_density(model, (y,), {}, {**params, "x": jnp.ones((5, 2))})[0]

    return jax.eval_shape(jax.grad(log_density, allow_int=True), params)


def _trace(model, *args):
    return handlers.trace(handlers.seed(model, 0)).get_trace(*args)


@pytest.mark.unit
def test_gradients_in_the_energys_parameters_warn(energy):
    with pytest.warns(EBIPLAWarning, match="normaliser"):
        params_gradient(lambda y: model_of(energy, y), jnp.zeros((5, 2)))


def test_gradients_in_the_bases_parameters_warn():
    def model(y):
        base = dist.Normal(numpyro.param("m", 0.5), 1).expand([2]).to_event(1)
        prior = EnergyPrior(lambda x: jnp.sum(x**4, -1), base)
        with numpyro.plate("data", 5):
            x = numpyro.sample("x", prior)
            numpyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=y)

    with pytest.warns(EBIPLAWarning, match="its base"):
        params_gradient(model, jnp.zeros((5, 2)))


@pytest.mark.unit
def test_svi_warns():
    model = lambda y: model_of(plain, y)

    def guide(y):
        loc = numpyro.param("loc", jnp.zeros((5, 2)))
        with numpyro.plate("data", 5):
            numpyro.sample("x", dist.Normal(loc, 1).to_event(1))

    svi = SVI(model, guide, numpyro.optim.Adam(1e-2), Trace_ELBO())
    with pytest.warns(EBIPLAWarning, match="SVI"):
        svi.run(random.key(0), 3, jnp.zeros((5, 2)), progress_bar=False)


def test_nuts_over_the_energys_parameters_warns():
    def model():
        w = numpyro.sample("w", dist.HalfNormal(1))
        numpyro.sample("x", EnergyPrior(lambda x: w * x**2, dist.Normal(0, 1)), obs=jnp.array(1.0))

    with pytest.warns(EBIPLAWarning, match="MCMC"):
        MCMC(NUTS(model), num_warmup=1, num_samples=1, progress_bar=False).run(random.key(0))


@pytest.mark.unit
def test_nuts_with_the_energy_fixed_does_not_warn(energy):
    params = {n: s["value"] for n, s in _trace(lambda: model_of(energy)).items() if s["type"] == "param"}
    model = handlers.substitute(lambda y: model_of(energy, y), data=params)
    potential = lambda x: numpyro.infer.util.potential_energy(model, (jnp.zeros((5, 2)),), {}, {"x": x})
    with warnings.catch_warnings():
        warnings.simplefilter("error", EBIPLAWarning)
        jax.eval_shape(jax.grad(potential), jnp.zeros((5, 2)))


@pytest.mark.unit
def test_nuts_samples_the_unnormalised_density():
    model = lambda: numpyro.sample("x", EnergyPrior(lambda x: 0.5 * (x - 2) ** 2, dist.Normal(0, 1)))
    mcmc = MCMC(NUTS(model), num_warmup=200, num_samples=2000, progress_bar=False)
    mcmc.run(random.key(0))
    x = mcmc.get_samples()["x"]
    np.testing.assert_allclose([x.mean(), x.std()], [1.0, np.sqrt(0.5)], atol=0.1)


# --- bad arguments -----------------------------------------------------------------------------------------


class NoSample(dist.Distribution):
    support = dist.constraints.real

    def log_prob(self, value):
        return -(value**2)


@pytest.mark.unit
@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((1.0, dist.Normal()), TypeError, "energy must be callable"),
        ((lambda x: x, 3), TypeError, "base must be a NumPyro distribution"),
        ((lambda x: x, dist.Poisson(1.0)), ValueError, "discrete"),
        ((lambda x: x, NoSample()), ValueError, "has no `sample`"),
        ((lambda x: x, dist.ImproperUniform(dist.constraints.real, (), ())), ValueError, "has no `sample`"),
        ((lambda x: x, NORMAL2), ValueError, "did you forget"),
        ((lambda x: x[..., :1], NORMAL2), ValueError, "squeeze its last axis"),
        ((lambda x: x @ jnp.ones((3,)), NORMAL2), ValueError, "failed on x of shape"),
        ((lambda x: jnp.zeros(3), NORMAL2), ValueError, "returns shape"),
        ((lambda x: jnp.sum(x, -1), dist.Normal().expand([4])), ValueError, "to_event"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        EnergyPrior(*arguments)


@pytest.mark.unit
@pytest.mark.parametrize(
    "options, error",
    [
        ({"num_walkers": 0}, ValueError),
        ({"annealing": "fine"}, TypeError),
        ({"kernel": "MALA"}, TypeError),
    ],
)
def test_bad_options_are_named(options, error):
    with pytest.raises(error, match=next(iter(options))):
        EnergyPrior(lambda x: x, dist.Normal(), **options)


@pytest.mark.unit
@pytest.mark.parametrize(
    "options", [{"num_moves": 1.5}, {"max_temps": True}, {"step_size": -1.0}, {"threshold": 2}, {"rate": 0.0}], ids=repr
)
def test_bad_options_of_an_anneal_are_named(options):
    with pytest.raises(ValueError, match=f"Annealing: {next(iter(options))}"):
        Annealing(**options)
