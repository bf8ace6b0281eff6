"""Habits from SVI and MCMC, and calls that NumPyro or JAX would not explain."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from numpyro.infer import Trace_ELBO

from numpyro_ebipla import EBIPLA, EnergyPrior, ModelError
from numpyro_ebipla._core.validate import check_key

Y = np.linspace(-1, 1, 20, dtype=np.float32)
SMALL = {"num_particles": 2, "num_samples": 2, "num_steps": 3}
KEY = random.key(0)


def model(y, scale=1.0):
    mean = numpyro.param("mean", 0.0)
    with numpyro.plate("data", len(y)):
        x = numpyro.sample("x", dist.Normal(mean, 1))
        numpyro.sample("y", dist.Normal(x, scale), obs=y)


ebipla = EBIPLA(model)
P = {"mean": 0.0}


@pytest.mark.unit
@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (
            lambda: EBIPLA(model, model, numpyro.optim.Adam(0.1), Trace_ELBO()),
            TypeError,
            r"got 3 more: .*optim=.*guide",
        ),
        (lambda: EBIPLA(model, loss=Trace_ELBO()), TypeError, "no option 'loss'.*no ELBO"),
        (lambda: EBIPLA(model, num_warmup=5), TypeError, "did you mean warmup"),
        (lambda: EBIPLA(model, num_chains=5), TypeError, "did you mean num_particles"),
        (lambda: EBIPLA(model, lr=0.1), TypeError, "optim=optax.adam"),
        (lambda: EBIPLA(model, step_size=0.1), TypeError, "optim=.*kernel="),
        (lambda: EBIPLA(model, optimizer=None), TypeError, r"did you mean optim\?"),
        (lambda: ebipla.run(KEY, 1000, Y), ModelError, r"Is 1000 the number of steps\? .*num_steps=1000"),
        (lambda: ebipla.run(KEY, 1000, Y, 1.0), ModelError, r"too many positional.*Is 1000 the number of steps"),
        (lambda: ebipla.run(KEY, Y, stable_update=True), TypeError, "never taken"),
        (lambda: ebipla.infer(KEY, P, Y, n_samples=5), TypeError, "infer has no option 'n_samples'"),
        (lambda: ebipla.log_likelihood(KEY, P, Y, n_particles=5), TypeError, "did you mean num_particles"),
        (lambda: ebipla.anomaly_score(KEY, P, Y, num_particle=5), TypeError, "did you mean num_particles"),
        (lambda: ebipla.reconstruct(KEY, P, Y, num_draw=5), TypeError, "did you mean num_draws"),
        (lambda: ebipla.bidirectional(KEY, P, Y, num_particle=5), TypeError, "did you mean num_particles"),
        (lambda: ebipla.log_likelihood(KEY, P, Y, max_temps=5), TypeError, r"annealing=Annealing\(max_temps=5\)"),
    ],
)
def test_faults_habits(call, error, words):
    with pytest.raises(error, match=words):
        call()


@pytest.mark.unit
def test_faults_whole_numbers_that_a_model_wants_first_are_its_own():
    def grouped(number, y):
        numpyro.sample("y", dist.Normal(numpyro.sample("x", dist.Normal(0, number)), 1), obs=y)

    EBIPLA(grouped, **SMALL).init(KEY, 3, Y)


# --- keys -------------------------------------------------------------------------------------------------


@pytest.mark.unit
@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
@pytest.mark.parametrize("typed", [True, False])
def test_faults_keys_of_every_generator(impl, typed):
    """Legacy keys of four words were no keys."""
    with jax.default_prng_impl(impl):
        key = random.key(3) if typed else random.PRNGKey(3)
        assert check_key(key) == random.key(3)
    if not typed and impl != "unsafe_rbg":  # as far as a shape says what they are
        assert check_key(key) == random.key(3, impl=impl)


def test_faults_a_checkpoint_by_a_key_of_four_words(tmp_path):
    fits = [
        EBIPLA(model, **SMALL).run(random.PRNGKey(1, impl="rbg"), Y, progress_bar=False, checkpoint_dir=tmp_path)
        for _ in range(2)
    ]
    assert fits[0].params == fits[1].params and str(random.key_impl(fits[1].state.rng_key)) == "rbg"


# --- arguments of the model -------------------------------------------------------------------------------


@pytest.mark.unit
@pytest.mark.parametrize(
    "call",
    [
        lambda e, d: e.init(KEY, d),
        lambda e, d: e.run(KEY, d),
        lambda e, d: e.log_likelihood(KEY, P, y=d),
        lambda e, d: e.run(KEY, [{"a": d}]),
    ],
)
def test_faults_keys_of_several_types_in_a_dictionary(call):
    """JAX: Comparator raised exception while sorting pytree dictionary keys."""
    with pytest.raises(ModelError, match=r"a dictionary with keys of several types, \['a', 1\]"):
        call(ebipla, {"a": Y, 1: Y})


@pytest.mark.unit
@pytest.mark.parametrize(
    ("turn", "named", "remedy"),
    [
        (lambda y, n: model(y * float(n)), "'n'", r"int\(…\) or float"),
        (lambda y, n: model(y if n > 0 else -y), "'n'", r"int\(…\) or float"),
        (lambda y, n: model(y * n.item()), "'n'", r"int\(…\) or float"),
        (lambda y, n: model(y + jnp.zeros(n)), "'n'", r"int\(…\) or float"),
        (lambda y, n: model(np.sqrt(np.asarray(y) + 2)), "'y'", "jax.numpy .*compute it before"),
        (lambda y, n: model(y[y > 0]), "'y'", "jax.numpy .*compute it before"),
        (lambda y, n: model(y * len(np.unique(y))), "'y'", "jax.numpy .*compute it before"),
    ],
)
def test_faults_arguments_that_a_model_turns_into_python_numbers(turn, named, remedy):
    """It was said that one of them was, and not of boolean indices."""
    with pytest.raises(ModelError, match=f"the value of argument {named} where only a Python number.*{remedy}"):
        EBIPLA(turn).init(KEY, Y, np.array(20))


# --- settings of JAX --------------------------------------------------------------------------------------


def toy(y):
    """Global and local latents, and an energy prior of two coordinates."""
    mean, a = numpyro.param("mean", 0.0), numpyro.param("a", 0.1)
    w = numpyro.sample("w", dist.Normal(mean, 1))
    base = dist.Normal(0, 1).expand([2]).to_event(1)
    with numpyro.plate("data", len(y)):
        x = numpyro.sample("x", EnergyPrior(lambda x: a * jnp.sum(x**2, -1), base))
        numpyro.sample("y", dist.Normal(x.sum(-1) + w, 1), obs=y)


@pytest.mark.slow_but("rank_promotion")
@pytest.mark.parametrize("setting", ["debug_nans", "rank_promotion"])
def test_faults_strict_settings_of_jax(setting):
    """Ranks were promoted at thirty places, which a user who forbids it met as errors of theirs."""
    how = jax.debug_nans(True) if setting == "debug_nans" else jax.numpy_rank_promotion("raise")
    with how:
        ebipla = EBIPLA(toy, **SMALL | {"num_samples": 4})
        fit = ebipla.run(KEY, Y, progress_bar=False)
        assert np.isfinite(fit.losses).all()
        fit.diagnostics()
        found = ebipla.log_likelihood(KEY, fit.params, Y, num_particles=8, num_populations=2)
        assert np.isfinite(found.value)
        local = EBIPLA(model, **SMALL | {"num_samples": 4}).run(KEY, Y, progress_bar=False)
        assert np.isfinite(local.losses).all()
        with jax.numpy_rank_promotion("allow"):
            same = EBIPLA(model, **SMALL | {"num_samples": 4}).run(KEY, Y, progress_bar=False)
        assert same.params == local.params
