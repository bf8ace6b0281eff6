"""Parameters that are held: by ``hold=``, not by ``handlers.substitute``, which SVI trains all the same."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from numpyro import handlers
from numpyro.infer import SVI, Predictive, Trace_ELBO
from numpyro.infer.autoguide import AutoDelta

from numpyro_ebipla import EBIPLA, EBIPLAWarning, EnergyPrior, ModelError

Y = 2 + 3 * np.random.default_rng(0).normal(size=60).astype(np.float32)
POSITIVE = dist.constraints.positive
SMALL = {"num_particles": 2, "num_samples": 2, "num_steps": 3}


def model(y):
    mean = numpyro.param("mean", 0.0)
    scale = numpyro.param("scale", 1.0, constraint=POSITIVE)
    with numpyro.plate("data", len(y)):
        x = numpyro.sample("x", dist.Normal(mean, scale))
        numpyro.sample("y", dist.Normal(x, 1), obs=y)


@pytest.fixture(scope="module")
def fitted():
    ebipla = EBIPLA(model, hold={"mean": 1}, num_steps=400)
    return ebipla, ebipla.run(random.key(0), Y, progress_bar=False)


def exact_log_likelihood(scale):
    return dist.Normal(1.0, jnp.sqrt(scale**2 + 1)).log_prob(Y).sum()


def test_faults_held_parameters_stay(fitted, capsys):
    _, fit = fitted
    assert fit.params["mean"] == 1.0 and [*fit.trained_params] == [*fit.state.params] == ["scale"]
    best = np.sqrt(np.mean((Y - 1) ** 2) - 1)
    error = (-jax.grad(jax.grad(exact_log_likelihood))(best)) ** -0.5
    np.testing.assert_allclose(fit.params["scale"], best, atol=0.1 * error)
    np.testing.assert_allclose(fit.standard_errors()["scale"], error, rtol=0.03)  # 0.993 to 1.000 by the docs' table
    assert fit.summary().names == ("scale",)
    assert fit.aic() == pytest.approx(2 - 2 * float(exact_log_likelihood(best)), abs=0.2)
    assert fit.diagnostics().passed
    fit.print_summary(diagnostics=False)
    assert "mean = 1 (held)" in capsys.readouterr().out


def test_faults_held_parameters_in_other_methods(fitted):
    ebipla, fit = fitted
    found = ebipla.log_likelihood(random.key(1), fit.params, Y).total
    assert float(found.value) == pytest.approx(float(exact_log_likelihood(fit.params["scale"])), abs=0.1)
    assert ebipla.infer(random.key(1), {"scale": 2.0}, Y[:3]).params == {"scale": 2.0, "mean": 1.0}
    assert ebipla.get_params(fit.state) == fit.params
    assert ebipla.init(random.key(0), Y, init_params=fit.params).params.keys() == {"scale"}
    drawn = Predictive(model, params=fit.params, num_samples=200)(random.key(2), Y)["x"]
    assert abs(drawn.mean() - 1) < 4 * fit.params["scale"] / np.sqrt(drawn.size)
    other = {"mean": 0.0, "scale": 2.0}
    with pytest.raises(ModelError, match=r"params: 'mean' has another value than EBIPLA.*hold"):
        ebipla.log_likelihood(random.key(1), other, Y)
    with pytest.raises(ModelError, match="init_params: 'mean' has another value"):
        ebipla.init(random.key(0), Y, init_params=other)


@pytest.mark.unit
@pytest.mark.parametrize(
    ("hold", "error", "words"),
    [
        ({"mu": 1.0}, ModelError, r"hold: the model has no parameter 'mu'; it has \['mean', 'scale'\]"),
        ({"x": 1.0}, ModelError, "hold: the model has no parameter 'x'"),
        ({"mean": np.zeros(2)}, ModelError, "hold: 'mean' has shape"),
        ({"scale": -1.0}, ModelError, "hold: the value of 'scale' is not finite or violates its constraint"),
        ({"mean": np.nan}, ModelError, "hold: the value of 'mean' is not finite"),
        ({"mean": "a"}, TypeError, "hold: the value of 'mean' must be an array"),
        (["mean"], TypeError, "hold must be {name: value}"),
    ],
)
def test_faults_what_cannot_be_held(hold, error, words):
    with pytest.raises(error, match=words):
        EBIPLA(model, hold=hold, **SMALL).init(random.key(0), Y)


def test_faults_held_modules_and_constraints_without_a_bijection():
    """A module's tree is held by its name; so is what could not be trained at all."""
    nn = pytest.importorskip("flax.linen")
    from numpyro.contrib.module import flax_module

    def network(y):
        net = flax_module("net", nn.Dense(1), input_shape=(1,))
        way = numpyro.param("way", jnp.array([1.0, 0.0]), constraint=dist.constraints.sphere)
        w = numpyro.param("w", 1.0)
        with numpyro.plate("data", len(y)):
            x = numpyro.sample("x", dist.Normal(0, 1).expand([1]).to_event(1))
            numpyro.sample("y", dist.Normal(w * net(x)[..., 0] * way[0], 1), obs=y)

    held = {"net$params": {"kernel": jnp.ones((1, 1)), "bias": jnp.zeros(1)}, "way": np.array([0.6, 0.8])}
    fit = EBIPLA(network, hold=held, **SMALL).run(random.key(0), Y, progress_bar=False)
    assert fit.state.params.keys() == {"w"} and fit.params["w"] != 1
    jax.tree.map(np.testing.assert_allclose, {name: fit.params[name] for name in held}, held)
    with pytest.raises(ModelError, match=r"hold: the value of 'way' .* violates its constraint"):
        EBIPLA(network, hold=held | {"way": np.ones(2)}, **SMALL).init(random.key(0), Y)


@pytest.mark.unit
@pytest.mark.parametrize(
    "substituted",
    [
        lambda: handlers.substitute(model, data={"mean": 0.7}),
        lambda: handlers.scale(handlers.substitute(model, data={"mean": 0.7}), scale=2.0),
        lambda: lambda y: handlers.substitute(model, data={"mean": 0.7})(y),
        lambda: handlers.substitute(model, substitute_fn=lambda s: 0.7 if s["name"] == "mean" else None),
    ],
)
def test_faults_substituted_parameters_are_refused(substituted):
    """They were trained from there, as they are by SVI."""
    with pytest.raises(ModelError, match=r"'mean' .*substitute.*hold=\{'mean': value\}.*init_params=\{'mean'"):
        EBIPLA(substituted(), **SMALL).init(random.key(0), Y)


def test_faults_the_warning_of_a_missing_normaliser_says_what_works():
    """It recommended ``substitute``, by which SVI trains the parameter."""

    def ebm(y):
        a = numpyro.param("a", 0.1)
        numpyro.sample("y", EnergyPrior(lambda x: a * x**2, dist.Normal(0, 1)), obs=y)

    def svi(model):
        return SVI(model, AutoDelta(model), numpyro.optim.Adam(0.1), Trace_ELBO())

    params = {"a": 0.3}
    with pytest.warns(EBIPLAWarning, match="block.*substitute.*hide"):
        svi(ebm).run(random.key(0), 2, Y, progress_bar=False)
    hidden = handlers.block(handlers.substitute(ebm, params), hide=[*params])
    assert svi(hidden).run(random.key(0), 2, Y, progress_bar=False).params == {}


def test_faults_a_checkpoint_of_another_held_value(tmp_path):
    def run(value):
        ebipla = EBIPLA(model, hold={"mean": value}, **SMALL)
        return ebipla.run(random.key(0), Y, progress_bar=False, checkpoint_dir=tmp_path)

    assert run(1.0).params == run(1.0).params
    with pytest.raises(ModelError, match="checkpoint_dir"):
        run(2.0)
