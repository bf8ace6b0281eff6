"""Calls that are off in type, precision or place are refused by name, or work."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random

from numpyro_ebipla import EBIPLA, Annealing, EBIPLAWarning, EnergyPrior, ModelError, nan_masked, recipes
from numpyro_ebipla.optim import default_optimizer
from tests.models import fitter as shared
from tests.models import hierarchy

M = 6
Y = np.linspace(-1.0, 2.0, M, dtype=np.float32)
P = {"mean": np.float32(0.5)}
SMALL = {"num_particles": 2, "num_samples": 2, "thinning": 1, "warmup": 1, "num_steps": 3}
QUICK = {"num_particles": 16, "num_populations": 2}


def prior_of_data(y):
    a = numpyro.param("a", 0.1)
    with numpyro.plate("data", len(y)):
        numpyro.sample("y", EnergyPrior(lambda x: a * x**2, dist.Normal(0, 1)), obs=y)


@pytest.fixture(scope="module")
def fitted():
    fitter = shared(hierarchy, **SMALL)
    return fitter, fitter.run(random.key(0), Y, progress_bar=False)


@pytest.fixture(scope="module")
def fitted_prior():
    return shared(prior_of_data, **SMALL).run(random.key(0), Y, progress_bar=False)


# --- precision --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("x64", [False, True])
def test_a_state_of_the_other_precision(x64, tmp_path):
    """Shapes alone were compared: the run ended in JAX's complaint of the carry of a while loop."""
    fitter = shared(hierarchy, **SMALL)
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
    fitter = shared(hierarchy, **SMALL)
    fit, like = (fitter.infer(random.key(0), {"mean": m}, Y) for m in (one, jnp.array(1.0)))
    assert fit.params["mean"].dtype == jnp.float32
    np.testing.assert_array_equal(fit.get_samples()["x"], like.get_samples()["x"])


# --- inside jit and vmap ----------------------------------------------------------------------------------

HELD = {
    "log_likelihood": lambda e, k, p, y, **o: e.log_likelihood(k, p, y, **QUICK, **o).value,
    "anomaly_score": lambda e, k, p, y, **o: e.anomaly_score(k, p, y, **QUICK, **o),
    "reconstruct": lambda e, k, p, y, **o: e.reconstruct(k, p, y, num_particles=16, **o)["y"],
}


@pytest.mark.slow_but("anomaly_score-batch1")
@pytest.mark.parametrize(
    "name, batch",
    [
        *((name, {}) for name in HELD),
        ("log_likelihood", {"batch_size": 4}),
        ("anomaly_score", {"batch_size": 4}),
        ("reconstruct", {"batch_size": 4}),
    ],
)
def test_held_parameters_inside_jit(name, batch):
    """Only a model that had not been called before got through; now all do, with the same numbers."""
    fitter, f, key = EBIPLA(hierarchy, **SMALL), HELD[name], random.key(0)
    closed = jax.jit(lambda k: f(fitter, k, P, Y, **batch))(key)
    eager = f(fitter, key, P, Y, **batch)
    open_ = jax.jit(lambda k, p, y: f(fitter, k, p, y, **batch))(key, P, Y)
    mapped = jax.vmap(lambda m: f(fitter, key, {"mean": m}, Y, **batch))(jnp.array([0.5, 2.0]))
    again = jax.jit(lambda k: f(fitter, k, P, Y, **batch))(key)
    for found in (closed, open_, mapped[0], again):
        np.testing.assert_allclose(found, eager, rtol=1e-3, atol=1e-3)  # rounding, which may tip a draw over
    assert np.all(np.abs(mapped[1] - mapped[0]) > 1e-3)


@pytest.mark.parametrize(
    "name, call",
    [
        ("init", lambda e, k, m: e.init(k, Y, init_params={"mean": m}).step),
        ("run", lambda e, k, m: e.run(k, Y, init_params={"mean": m}, progress_bar=False).losses),
        ("infer", lambda e, k, m: e.infer(k, {"mean": m}, Y).state.step),
        ("bidirectional", lambda e, k, m: e.bidirectional(k, {"mean": m}, Y).gap),
    ],
)
@pytest.mark.parametrize("transform", [jax.jit, lambda f: lambda k, m: jax.vmap(f, (None, 0))(k, m[None])])
def test_what_looks_at_numbers_stays_outside(fitted, name, call, transform):
    with pytest.raises(ModelError, match=f"{name} looks at its numbers.*call it outside"):
        transform(lambda k, m: call(fitted[0], k, m))(random.key(0), jnp.asarray(P["mean"]))


def test_steps_of_a_new_fitter_inside_jit():
    """What is closed over has its numbers even there."""
    state = shared(hierarchy, **SMALL).init(random.key(0), Y)
    eager = shared(hierarchy, **SMALL).update(state, Y)[1]
    np.testing.assert_allclose(jax.jit(lambda s: EBIPLA(hierarchy, **SMALL).update(s, Y)[1])(state), eager, rtol=1e-5)


# --- arguments of another type ----------------------------------------------------------------------------


@pytest.mark.unit
@pytest.mark.parametrize(
    "call, error, message",
    [
        (
            lambda: EBIPLA(hierarchy, averaging="a"),
            ValueError,
            "averaging must be None or a number of at least 0, got 'a'",
        ),
        (lambda: EBIPLA(hierarchy, averaging=np.inf), ValueError, "averaging must be"),
        (lambda: EBIPLA(hierarchy, max_energy="a"), ValueError, "max_energy must be a number above 0"),
        (lambda: EBIPLA(hierarchy, max_energy=None), ValueError, "max_energy must be a number above 0, got None"),
        (lambda: EBIPLA(hierarchy, refuse=3), TypeError, "refuse must be a function"),
        (lambda: recipes.ipla(hierarchy, step_size=0.1, refuse=3), TypeError, "refuse is the recipe's own"),
        (lambda: nan_masked(3), TypeError, "nan_masked: model must be a function"),
        (lambda: nan_masked(hierarchy, sites=3), TypeError, "nan_masked: sites must be names"),
    ],
)
def test_types_of_options(call, error, message):
    """They ended in comparisons that Python does not have, with no word of the argument."""
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"max_bytes": "a"}, ValueError, "max_bytes must be a number above 0, got 'a'"),
        ({"max_bytes": None}, ValueError, "max_bytes must be a number"),
        ({"sites": 3}, TypeError, "sites must be names of sites"),
        ({"sites": [3]}, TypeError, "sites must be names of sites"),
        ({"sites": "latent"}, ModelError, "site 'latent'"),
        ({"init_params": {"mean": "a"}}, TypeError, "init_params: the value of 'mean' must be an array"),
    ],
    ids=str,
)
def test_types_of_options_of_run(fitted, options, error, message):
    with pytest.raises(error, match=message):
        fitted[0].run(random.key(0), Y, progress_bar=False, **options)


@pytest.mark.parametrize(
    "call",
    [
        lambda fit: fit.diagnostics(3),
        lambda fit: fit.log_normalizer(rng_key=3),
        lambda fit: fit.prior_samples(3),
        lambda fit: fit.to_arviz(rng_key=3),
    ],
)
def test_keys_of_a_fit(fitted_prior, call):
    with pytest.raises(TypeError, match="rng_key must be a PRNG key"):
        call(fitted_prior)


def test_masked_arrays_of_numpy(fitted):
    y = np.ma.masked_array(np.asarray(Y), np.arange(M) == 2)
    for model in (hierarchy, nan_masked(hierarchy)):
        with pytest.raises(ModelError, match=r"argument 'y' .* masked array.*y.filled\(np.nan\).*nan_masked"):
            EBIPLA(model, **SMALL).run(random.key(0), y, progress_bar=False)
    with pytest.raises(ModelError, match=r"argument 'y' .* masked array"):
        fitted[0].update(fitted[1].state, y)


def test_a_lone_string_is_one_site():
    def model(y):
        with numpyro.plate("data", len(y)):
            latent = numpyro.sample("latent", dist.Normal(numpyro.param("mean", 0.0), 1))
            numpyro.sample("image", dist.Normal(latent, 1), obs=y)

    fitter = EBIPLA(model, **SMALL)
    assert [*fitter.run(random.key(0), Y, sites="latent", progress_bar=False).get_samples()] == ["latent"]
    assert [*fitter.reconstruct(random.key(0), P, Y, sites="image", num_particles=4)] == ["image"]


@pytest.mark.parametrize(
    "optim", [default_optimizer, {"energy": default_optimizer, "rest": default_optimizer}], ids=["itself", "by role"]
)
def test_the_default_optimiser_by_its_name(fitted_prior, optim):
    """The name that the docstring gives was refused as no optimiser."""
    fit = EBIPLA(prior_of_data, optim=optim, **SMALL).run(random.key(0), Y, progress_bar=False)
    np.testing.assert_array_equal(fitted_prior.losses, fit.losses)
    assert fitted_prior.params["a"] == fit.params["a"] != 0.1


# --- stepping by hand -------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("method", ["update", "evaluate"])
def test_states_of_other_data_by_hand(fitted, method, wrap):
    """They ended in shapes that do not fit, somewhere in the model."""
    fitter, fit = fitted
    fitter.init(random.key(0), Y[:5])
    call = getattr(fitter, method)
    with pytest.raises(ModelError, match=r"^state holds particles of 6 data at 'x', but the plate 'data' now has 5"):
        wrap(call)(fit.state, Y[:5])
    with pytest.raises(ModelError, match=r"^state has 2 particles, this EBIPLA 3: pass num_particles=2"):
        getattr(EBIPLA(hierarchy, num_particles=3), method)(fit.state, Y)
    for other in (fit, fit.params):
        with pytest.raises(TypeError, match=r"^state must be the state of a fit \(fit.state\), got (Fit|dict)"):
            call(other, Y)


def test_parameters_of_what_is_no_state(fitted):
    with pytest.raises(TypeError, match="state must be the state of a fit"):
        fitted[0].get_params(fitted[1])


def test_steps_are_checked_inside_scan_too(fitted):
    fitter, fit = fitted
    alone = []
    state = fit.state
    for _ in range(3):
        state, value = fitter.update(state, Y)
        alone.append(value)
    together = jax.lax.scan(lambda s, _: fitter.update(s, Y), fit.state, None, length=3)[1]
    np.testing.assert_allclose(together, np.array(alone), rtol=1e-5)


# --- keywords of the model --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["run", "init", "infer", "log_likelihood", "update"])
def test_a_keyword_given_twice(fitted, name):
    """The constructor's won without a word."""
    fitter = EBIPLA(hierarchy, batch_size=4, **SMALL)
    first = {"update": (fitted[1].state,), "run": (random.key(0),), "init": (random.key(0),)}
    with pytest.raises(TypeError, match="multiple values for keyword argument 'batch_size'"):
        getattr(fitter, name)(*first.get(name, (random.key(0), P)), Y, batch_size=5)


def clashing(y, sites=None, num_particles=3, num_steps=2, annealing=None):
    hierarchy(y)
    numpyro.deterministic("wide", jnp.zeros(num_particles))


@pytest.mark.parametrize(
    "option, call",
    [
        ("sites", lambda e, **o: e.run(random.key(0), Y, progress_bar=False, **o)),
        ("num_steps", lambda e, **o: e.run(random.key(0), Y, progress_bar=False, **o)),
        ("sites", lambda e, **o: e.infer(random.key(0), P, Y, **o)),
        ("num_particles", lambda e, **o: e.log_likelihood(random.key(0), P, Y, **o)),
        ("num_particles", lambda e, **o: e.anomaly_score(random.key(0), P, Y, **o)),
        ("sites", lambda e, **o: e.reconstruct(random.key(0), P, Y, **o)),
        ("annealing", lambda e, **o: e.bidirectional(random.key(0), P, Y, **o)),
    ],
)
def test_an_option_that_the_model_has_as_well(option, call):
    """The method took it, and the model never saw it."""
    value = {"sites": ["x"], "num_steps": 5, "num_particles": 5, "annealing": Annealing(stage_ess=0.8)}[option]
    with pytest.raises(ModelError, match=f"'{option}' is an option of .* rename the model's"):
        call(EBIPLA(clashing, **SMALL), **{option: value})


def test_what_only_the_model_is_given_stays_its_own():
    fitter = EBIPLA(clashing, **SMALL)
    fitter.run(random.key(0), Y, progress_bar=False)
    fitter.run(random.key(0), Y, None, 4, progress_bar=False)
    fit = fitter.infer(random.key(0), P, Y, None, 4)
    assert fit.get_samples()["x"].shape == (2, 2, M)
    fitter.log_likelihood(random.key(0), P, Y, None, 4)


# --- messages ---------------------------------------------------------------------------------------------


def test_there_is_no_energy_prior(fitted):
    """It was to be "one of the model's energy priors []"."""
    plots = pytest.importorskip("numpyro_ebipla.plots", exc_type=ImportError)
    for call in (fitted[1].energy_prior, fitted[1].log_normalizer, lambda: plots.plot_energy(fitted[1])):
        with pytest.raises(ValueError, match="the model has no energy prior"):
            call()


@pytest.mark.unit
def test_words_as_data():
    with pytest.raises(ModelError, match="observed values at 'y' are of NumPy's type <U1, not an array of numbers"):
        EBIPLA(lambda y: numpyro.sample("y", dist.Normal(numpyro.sample("x", dist.Normal(0, 1)), 1), obs=y)).init(
            random.key(0), np.array(["a", "b"])
        )


def test_a_check_of_another_name(fitted):
    with pytest.raises(KeyError, match=r"no check 'log Z, std error'; there are .*'non-finite steps'"):
        fitted[1].diagnostics()["log Z, std error"]


@pytest.mark.parametrize("name", ["log_likelihood", "anomaly_score"])
def test_warnings_point_at_the_line_of_the_call(name):
    with pytest.warns(EBIPLAWarning, match="temperatures were too few") as caught:
        getattr(EBIPLA(hierarchy), name)(
            random.key(0), P, Y + 1e3, num_particles=4, num_populations=1, annealing=Annealing(max_temps=2)
        )
    assert [warning.filename for warning in caught] == [__file__]


def test_a_reconstruction_of_what_has_no_mean():
    """It was to be left out of the sites, where there was no other."""
    with pytest.raises(ModelError, match=r"'y' .EnergyPrior. has no mean: the model observes nothing else"):
        EBIPLA(prior_of_data).reconstruct(random.key(0), {"a": 0.1}, Y)

    def model(y):
        prior_of_data(y)
        numpyro.sample("z", dist.Normal(0, 1), obs=1.0)

    with pytest.raises(ModelError, match=r"has no mean: leave it out, as by sites=\['z'\]"):
        EBIPLA(model).reconstruct(random.key(0), {"a": 0.1}, Y)
