"""What cannot be fitted is refused early, by the name of the site or argument; and nothing is lost."""

import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jax import random
from numpyro import handlers
from numpyro.contrib.control_flow import cond, scan

from numpyro_ebipla import (
    EBIPLA,
    MALA,
    ULA,
    Annealed,
    Annealing,
    Contrastive,
    EBIPLAWarning,
    EnergyPrior,
    ModelError,
    Particles,
    Persistent,
    ShortRun,
    Tempered,
    Underdamped,
    WeightedParticles,
    kinetic_langevin,
    langevin,
    langevin_noise,
)
from numpyro_ebipla.model.blocks import Batch
from numpyro_ebipla.model.inspection import inspect_model

M = 6
Y = np.linspace(-1.0, 2.0, M, dtype=np.float32)
SMALL = {"num_particles": 2, "num_samples": 2, "thinning": 1, "warmup": 1}


def good(y, batch_size=None):
    with numpyro.plate("data", len(y), subsample_size=batch_size) as idx:
        x = numpyro.sample("x", dist.Normal(numpyro.param("m", 0.0), 1))
        numpyro.deterministic("twice", 2 * x)
        numpyro.sample("y", dist.Normal(x, 1), obs=y[idx])


@pytest.fixture(scope="module")
def fitted():
    fitter = EBIPLA(good, num_steps=3, **SMALL)
    return fitter, fitter.run(random.key(0), Y, progress_bar=False)


# --- models -----------------------------------------------------------------------------------------------


def discrete_latent(y):
    z = numpyro.sample("z", dist.Bernoulli(0.5))
    numpyro.sample("y", dist.Normal(z, 1.0), obs=y)


def nothing_to_do(y):
    numpyro.sample("y", dist.Normal(numpyro.param("m", 0.0), 1), obs=y)


def infinite_energy(y):
    numpyro.sample("y", EnergyPrior(lambda x: jnp.log(-jnp.abs(x)), dist.Normal(0, 1)), obs=y)


def energy_on_a_latent(y):
    w = numpyro.sample("w", dist.Normal(0, 1))
    numpyro.sample("x", EnergyPrior(lambda x: w * x**2, dist.Normal(0, 1)))


def base_on_a_latent(y):
    w = numpyro.sample("w", dist.Normal(0, 1))
    numpyro.sample("y", EnergyPrior(lambda x: x**4, dist.Normal(w, 1)), obs=y)


def energy_on_an_energy(y):
    w = numpyro.sample("w", EnergyPrior(lambda x: x**4, dist.Normal(0, 1)))
    numpyro.sample("x", EnergyPrior(lambda x: w * x**2, dist.Normal(0, 1)))


def crossed_plates(y):
    rows = numpyro.plate("rows", M, subsample_size=2, dim=-1)
    columns = numpyro.plate("columns", M, subsample_size=3, dim=-2)
    with rows:
        a = numpyro.sample("a", dist.Normal(0, 1))
    with columns:
        b = numpyro.sample("b", dist.Normal(0, 1))
    with rows as i, columns as j:
        numpyro.sample("y", dist.Normal(a + b, 1), obs=jnp.outer(y, y)[j][:, i])


def coupled_in_a_subsampled_plate(y):
    with numpyro.plate("data", M, subsample_size=2):
        x = numpyro.sample("x", dist.Normal(0, 1))
    numpyro.factor("total", -(x.sum() ** 2))


def batch_too_large(y):
    with numpyro.plate("data", M, subsample_size=M + 1) as idx:
        numpyro.sample("y", dist.Normal(numpyro.sample("x", dist.Normal(0, 1)), 1), obs=y[idx])


def parameter_outside_its_constraint(y):
    s = numpyro.param("s", -1.0, constraint=dist.constraints.positive)
    x = numpyro.sample("x", dist.Normal(s, 1))
    numpyro.sample("y", dist.Normal(x, 1), obs=y.sum())


def forgotten_data(y):
    """It took all its steps, with the data as a latent."""
    with numpyro.plate("data", M):
        x = numpyro.sample("x", dist.Normal(numpyro.param("m", 0.0), 1))
        numpyro.sample("y", dist.Normal(x, 1), obs=None)


def data_outside_the_support(y):
    x = numpyro.sample("x", dist.Normal(0, 1))
    numpyro.sample("y", dist.LogNormal(x, 1.0), obs=y)


def counts_below_zero(y):
    x = numpyro.sample("x", dist.Normal(0, 1))
    numpyro.sample("y", dist.Poisson(jnp.exp(x)), obs=jnp.array([-1, 2]))


def impossible_factor(y):
    with numpyro.plate("data", M, subsample_size=2) as idx:
        x = numpyro.sample("x", dist.Normal(0, 1))
        numpyro.factor("wall", jnp.where(idx == M - 1, -jnp.inf, x))


def conditional_on_two_plates(y):
    with numpyro.plate("data", M, subsample_size=3, dim=-1) as idx, numpyro.plate("other", 2, dim=-2):
        c = y[idx] + jnp.arange(2.0)[:, None]
        numpyro.sample("x", EnergyPrior(lambda x: (x - c) ** 2, dist.Normal(0, 1)))


def latent_in_a_scan(y):
    """Once its particles were placed after the body had run on draws of the prior, and fitted to nothing."""

    def transition(x, y_t):
        x = numpyro.sample("x", dist.Normal(x, 1))
        numpyro.sample("y", dist.Normal(x, 1), obs=y_t)
        return x, None

    scan(transition, 0.0, y)


def latent_in_a_cond(y):
    draw = lambda scale: lambda _: numpyro.sample("x", dist.Normal(0, scale))
    x = cond(True, draw(1), draw(2), 0)
    numpyro.sample("y", dist.Normal(x, 1), obs=y)


@pytest.mark.unit
@pytest.mark.parametrize(
    "model, message",
    [
        (latent_in_a_scan, "'x' is inside .*scan or cond.*draw it before"),
        (latent_in_a_cond, "'x' is inside .*scan or cond"),
        (discrete_latent, "'z' is discrete .* marginalise"),
        (nothing_to_do, "nothing to do.*SVI"),
        (forgotten_data, "observes nothing.*pass the data"),
        (infinite_energy, "energy at 'y' is not finite"),
        (energy_on_a_latent, "'x' depends on the latent 'w'"),
        (base_on_a_latent, "'y' depends on the latent 'w'"),
        (energy_on_an_energy, "'x' depends on another energy prior 'w'"),
        (crossed_plates, r"\['rows', 'columns'\] are all subsampled.*subsample_size=None"),
        (coupled_in_a_subsampled_plate, "'x' in the subsampled plate 'data' is coupled"),
        (batch_too_large, "'data' has subsample_size 7, above its 6 data"),
        (parameter_outside_its_constraint, "'s' is not finite or violates its constraint"),
        (data_outside_the_support, "observed values at 'y' lie outside the support"),
        (counts_below_zero, "log density at 'y' is not finite"),
        (impossible_factor, "log density at 'wall' is not finite at 2 of"),
        (conditional_on_two_plates, "'x' is conditional on the data plate and on another plate"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_models_that_cannot_be_fitted(model, message):
    with pytest.raises(ModelError, match=message):
        EBIPLA(model, num_particles=2).init(random.key(0), Y)


@pytest.mark.unit
def test_an_energys_wrong_shape_is_named():
    def model(y):
        numpyro.sample("y", EnergyPrior(lambda x: x[..., None], dist.Normal(0, 1)), obs=y)

    with pytest.raises(ValueError, match="squeeze its last axis"):
        EBIPLA(model).init(random.key(0), Y)


@pytest.mark.unit
def test_an_energy_of_integers_is_refused():
    with pytest.raises(ValueError, match=r"energy returns numbers of type int32.*gradient"):
        EnergyPrior(lambda x: (x > 0).astype(jnp.int32), dist.Normal(0, 1))


def test_a_scan_over_observations_is_fitted():
    def model(y):
        x = numpyro.sample("x", dist.Normal(0, 1))
        scan(lambda c, y_t: (c, numpyro.sample("y", dist.Normal(x, 1), obs=y_t)), 0.0, y)

    layout = inspect_model(model, random.key(0), (Y,), {})
    batch = Batch(None, layout.data, random.key(0), {})
    joint = layout.model.log_joint({}, {}, {"x": jnp.array([0.3])}, batch, {})
    exact = dist.Normal(0, 1).log_prob(0.3) + dist.Normal(0.3, 1).log_prob(Y).sum()
    np.testing.assert_allclose(joint.per_datum.sum() + joint.rest.sum(), exact, rtol=1e-5)


def test_fractions_at_a_bernoulli_site_are_common_use():
    def model(y):
        x = numpyro.sample("x", dist.Normal(0, 1))
        numpyro.sample("y", dist.BernoulliLogits(x), obs=y)

    inspect_model(model, random.key(0), (jnp.array([0.2, 0.7]),), {})


def test_masked_observations_may_be_anything():
    def model(y):
        x = numpyro.sample("x", dist.Normal(0, 1))
        numpyro.sample("y", dist.LogNormal(x, 1.0).mask(y > 0), obs=y)

    inspect_model(model, random.key(0), (Y,), {})


# --- arguments of the model ------------------------------------------------------------------------------


@pytest.mark.unit
@pytest.mark.parametrize(
    "y",
    [
        np.where(np.arange(M) == 2, np.float32(np.nan), Y),
        np.array([1.0, np.nan], np.float16),
        {"a": Y, "b": np.nan * Y},
        float("nan"),
    ],
)
def test_nan_in_the_data_is_named(y):
    with pytest.raises(ModelError, match=r"argument 'y' of the model contains NaN.*mask"):
        EBIPLA(good).init(random.key(0), y)


@pytest.mark.unit
def test_unbindable_arguments():
    with pytest.raises(ModelError, match=r"cannot be called.*'z'"):
        EBIPLA(good).init(random.key(0), Y, z=1)
    with pytest.raises(ModelError, match="missing a required argument: 'y'"):
        EBIPLA(good).init(random.key(0))


@pytest.mark.unit
@pytest.mark.parametrize(
    "init_params, error, message",
    [
        ({"w": 1.0}, ModelError, r"no parameter 'w'; it has \['m'\]"),
        ({"m": np.zeros(2)}, ModelError, "'m' has shape"),
        ({"m": jnp.nan}, ModelError, "'m' is not finite"),
        ([1.0], TypeError, "init_params must be"),
    ],
)
def test_initial_parameters(init_params, error, message):
    with pytest.raises(error, match=message):
        inspect_model(good, random.key(0), (Y,), {}, init_params)


@pytest.mark.unit
@pytest.mark.parametrize(
    "make",
    [
        *(lambda: 0, lambda: None, lambda: "key", lambda: np.zeros(2)),
        *(lambda: jnp.zeros(3), lambda: random.split(random.key(0))),
    ],
)
def test_a_key_that_is_none(make):
    key = make()
    with pytest.raises(TypeError, match="rng_key must be a PRNG key"):
        EBIPLA(good).init(key, Y)


# --- arguments of EBIPLA ----------------------------------------------------------------------------------

COUNTS = ["num_particles", "num_steps", "thinning", "num_moves"]


@pytest.mark.unit
@pytest.mark.parametrize("name", [*COUNTS, "warmup", "num_samples"])
@pytest.mark.parametrize("value", [-1, 1.5, True, "3"])
def test_counts(name, value):
    with pytest.raises(ValueError, match=name):
        EBIPLA(good, **{name: value})
    if name in COUNTS:
        with pytest.raises(ValueError, match=name):
            EBIPLA(good, **{name: 0})


@pytest.mark.unit
@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"optim": 1e-3}, TypeError, r"optim must be an optax.GradientTransformation.*adam"),
        ({"optim": optax.adam}, TypeError, "optim must be"),
        ({"optim": numpyro.optim.Minimize()}, TypeError, "not Minimize"),
        ({"kernel": "MALA"}, TypeError, "kernel must be"),
        ({"kernel": ULA}, TypeError, "kernel must be"),
        ({"prior": "tempered"}, TypeError, "prior must be"),
        ({"prior": Tempered}, TypeError, "prior must be"),
        ({"prior": {"x": "tempered"}}, TypeError, "prior"),
        ({"averaging": -1.0}, ValueError, "averaging"),
        ({"max_energy": 0.0}, ValueError, "max_energy"),
        ({"max_energy": float("nan")}, ValueError, "max_energy"),
    ],
)
def test_options(options, error, message):
    with pytest.raises(error, match=message):
        EBIPLA(good, **options)


@pytest.mark.unit
@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Tempered(num_walkers=0), "Tempered: num_walkers"),
        (lambda: Tempered(num_rungs=1), "num_rungs must be an integer of at least 2"),
        (lambda: Tempered(restraint=(3.0, 1.0)), "restraint must be"),
        (lambda: Tempered(trust=-1.0), "trust must be"),
        (lambda: Annealed(num_walkers=-1), "Annealed: num_walkers"),
        (lambda: Annealing(stage_ess=1.5), "stage_ess must be a number between 0 and 1"),
        (lambda: Persistent(num_walkers=1.5), "Persistent: num_walkers"),
        (lambda: Persistent(num_moves=0), "Persistent: num_moves"),
        (lambda: Persistent(num_passive=-1), "num_passive"),
        (lambda: Persistent(kernel="ULA"), "Persistent: kernel must be"),
        (lambda: ShortRun(num_walkers=0), "ShortRun: num_walkers"),
        (lambda: Contrastive(reset_every=0), "Contrastive: reset_every"),
        (lambda: Particles(num_moves=0), "Particles: num_moves"),
        (lambda: ULA(-0.1), "ULA: step_size"),
        (lambda: ULA(float("nan")), "ULA: step_size"),
        (lambda: ULA("small"), "ULA: step_size"),
        (lambda: MALA(target_accept=2.0), "MALA: target_accept"),
        (lambda: Underdamped(friction=-1.0), "Underdamped: friction"),
        (lambda: langevin_noise(-1.0), "langevin_noise: step_size"),
        (lambda: langevin(0.0), "langevin: step_size"),
        (lambda: kinetic_langevin(0.1, friction=0.0), "kinetic_langevin: friction"),
    ],
)
def test_options_of_parts(make, message):
    """They were taken as they came, and failed inside JAX, or not at all."""
    with pytest.raises((ValueError, TypeError), match=message):
        make()


@pytest.mark.unit
def test_schedules_are_step_sizes():
    assert ULA(optax.constant_schedule(0.1)).step_size(0) == 0.1


@pytest.mark.unit
@pytest.mark.parametrize("optim", [optax.lbfgs(), optax.lookahead(optax.sgd(0.1), 5, 0.5)], ids=["lbfgs", "lookahead"])
def test_optimisers_that_need_more_than_a_gradient(optim):
    with pytest.raises(TypeError, match=r"optim does not work on the model's parameters.*adam"):
        EBIPLA(good, optim=optim).init(random.key(0), Y)


@pytest.mark.unit
def test_a_model_that_is_none():
    with pytest.raises(TypeError, match="model must be a function"):
        EBIPLA("model")


@pytest.mark.unit
def test_a_strategy_for_an_unknown_site():
    with pytest.raises(ModelError, match="no energy prior at 'x'"):
        EBIPLA(good, prior={"x": Tempered()}).init(random.key(0), Y)


@pytest.mark.unit
def test_a_strategy_that_cannot_serve_covariates():
    def model(y):
        with numpyro.plate("data", M):
            numpyro.sample("y", EnergyPrior(lambda x: (x - Y) ** 2, dist.Normal(0, 1)), obs=y)

    with pytest.raises(ModelError, match=r"'y' is conditional on covariates.*Annealed"):
        EBIPLA(model, prior=Persistent()).init(random.key(0), Y)


# --- arguments of run -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"indices": [0, M]}, ModelError, "indices must be integers from 0 to 5"),
        ({"indices": [-1]}, ModelError, "indices must be"),
        ({"indices": [0.5]}, ModelError, "indices must be"),
        ({"sites": ["z"]}, ModelError, "no latent or deterministic site 'z'.*'x', 'twice'"),
        ({"max_bytes": 10}, ModelError, "lower num_samples"),
        ({"num_steps": -1}, ValueError, "num_steps"),
        ({"init_state": 3}, TypeError, "init_state must be"),
    ],
    ids=str,
)
def test_run(fitted, options, error, message):
    with pytest.raises(error, match=message):
        fitted[0].run(random.key(0), Y, progress_bar=False, **options)


def test_a_plate_that_changed_size(fitted):
    with pytest.raises(ModelError, match="6 data at 'x', but the plate 'data' now has 5"):
        fitted[0].run(random.key(0), Y[:5], init_state=fitted[1].state, progress_bar=False)


def test_a_state_of_another_fitter(fitted):
    state = fitted[1].state
    with pytest.raises(ModelError, match="num_particles=2"):
        EBIPLA(good, num_particles=3).run(random.key(0), Y, init_state=state, progress_bar=False)
    with pytest.raises(ModelError, match="optim"):
        EBIPLA(good, num_particles=2, optim=optax.sgd(0.1)).run(random.key(0), Y, init_state=state, progress_bar=False)


@pytest.mark.parametrize(
    "changed, part",
    [({"kernel": Underdamped(0.1)}, "kernel="), ({"posterior": WeightedParticles()}, "posterior=")],
    ids=["kernel", "posterior"],
)
def test_a_state_of_other_particles(fitted, changed, part):
    """They failed inside a kernel, as what it carries was not there."""
    with pytest.raises(ModelError, match=f"other particles .*{part}"):
        EBIPLA(good, **SMALL, **changed).run(random.key(0), Y, init_state=fitted[1].state, progress_bar=False)


def test_a_state_of_other_walkers():
    """Twice as many went on silently with those of the state."""

    def model(y):
        a = numpyro.param("a", 0.1)
        numpyro.sample("y", EnergyPrior(lambda x: a * x**2, dist.Normal(0, 1)), obs=y)

    state = EBIPLA(model, prior=Persistent(8)).init(random.key(0), Y)
    for prior in (Persistent(16), Tempered(8)):
        with pytest.raises(ModelError, match="other walkers at 'y'"):
            EBIPLA(model, prior=prior).run(random.key(0), Y, init_state=state, progress_bar=False)


def test_nan_in_the_data_of_a_run_that_goes_on(fitted):
    y = np.where(np.arange(M) == 0, np.float32(np.nan), Y)
    with pytest.raises(ModelError, match="argument 'y' of the model contains NaN"):
        fitted[0].run(random.key(0), y, init_state=fitted[1].state, progress_bar=False)


def test_a_refusal_comes_before_the_start_is_computed(monkeypatch):
    monkeypatch.setattr("numpyro_ebipla.system.check_faults", lambda faults: pytest.fail("the start was computed"))
    with pytest.raises(ModelError, match="no latent or deterministic site 'z'"):
        EBIPLA(good, **SMALL).run(random.key(0), Y, sites=["z"], progress_bar=False)


# --- nothing is lost --------------------------------------------------------------------------------------


def diverging(y):
    """The log density of the parameter has no upper bound."""
    with numpyro.plate("data", M):
        x = numpyro.sample("x", dist.Normal(0, 1))
        numpyro.sample("y", dist.Normal(x, 1), obs=y)
    numpyro.factor("runaway", numpyro.param("w", 1.0) ** 3)


def test_a_diverging_fit_stops_with_its_last_sound_state():
    fitter = EBIPLA(diverging, num_steps=10_000, optim=optax.sgd(1.0), **SMALL)
    with pytest.warns(EBIPLAWarning, match=r"diverged at step \d+.*not finite"):
        fit = fitter.run(random.key(0), Y, progress_bar=False)
    step = int(fit.state.step)
    assert f"step {step + 1}" in fit.stopped and 3 < step < 100
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((fit.params, fit.state.posterior)))
    assert np.isfinite(fit.losses[:step]).all()
    assert np.isfinite(fit.get_samples()["x"]).all()


def test_an_update_that_is_not_taken_says_so():
    """Its contrast was that of the sound state, so a loop over ``update`` could not see that it stood still."""
    fitter = EBIPLA(diverging, optim=optax.sgd(1.0), **SMALL)
    state, values = fitter.init(random.key(0), Y), []
    for _ in range(100):
        state, value = fitter.update(state, Y)
        values.append(float(value))
        if np.isnan(value):
            break
    assert np.isnan(values[-1]) and int(state.step) == len(values) - 1
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((state.params, state.posterior)))


def test_energies_beyond_the_bound_stop_a_fit():
    def model(y):
        w = numpyro.param("w", 0.1)
        with numpyro.plate("data", M):
            numpyro.sample("y", EnergyPrior(lambda x: -100 * w * jnp.sin(x), dist.Normal(0, 1)), obs=y)

    fitter = EBIPLA(model, num_steps=1000, optim=optax.sgd(1.0), prior=Persistent(num_walkers=8), max_energy=1e3)
    with pytest.warns(EBIPLAWarning, match="max_energy"):
        fit = fitter.run(random.key(0), 1.5 + 0 * Y, progress_bar=False)
    assert fit.stopped and np.isfinite(fit.params["w"])


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
def test_ctrl_c_leaves_a_usable_fit(monkeypatch):
    """The signal comes while the host looks at the first chunk: at any fixed time it could come before the steps."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # processes in the background ignore it
    fitter = EBIPLA(good, **SMALL)
    monkeypatch.setattr("numpyro_ebipla.training.loop._postfix", lambda info: os.kill(os.getpid(), signal.SIGINT))
    with pytest.warns(EBIPLAWarning, match="interrupted after step"):
        fit = fitter.run(random.key(0), Y, num_steps=20_000, progress_bar=False)
    assert 0 < int(fit.state.step) == len(fit.losses)
    assert fit.get_samples()["x"].shape == (2, 2, M)
    monkeypatch.undo()
    again = fitter.run(random.key(0), Y, num_steps=2, init_state=fit.state, progress_bar=False)
    assert int(again.state.step) == int(fit.state.step) + 2
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_while_collecting_leaves_the_parameters(monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("numpyro_ebipla.results.build.collect", interrupted)
    with pytest.warns(EBIPLAWarning, match="interrupted while collecting"):
        fit = EBIPLA(good, num_steps=2, **SMALL).run(random.key(0), Y, progress_bar=False)
    assert np.isfinite(fit.params["m"]) and fit.get_samples() == {}
    # The diagnostics went on to densities of latents that were not there.
    assert [check.name for check in fit.diagnostics().checks if not check.passed] == ["draws"]
    fit.print_summary()


def test_the_first_call_inside_jit_is_refused():
    fitter = EBIPLA(good)
    with pytest.raises(ModelError, match="inside jit"):
        jax.jit(lambda y: fitter.init(random.key(0), y).step)(Y)


def test_handlers_around_the_model_are_part_of_it():
    model = handlers.scale(good, scale=2.0)
    assert inspect_model(model, random.key(0), (Y,), {}).model.local_sites == ["x"]
