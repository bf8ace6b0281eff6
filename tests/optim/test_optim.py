"""The parameter move: the paper's noise, and every kind of optimiser behind one face."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.optim
import optax
import pytest
from jax import random
from jax.example_libraries import optimizers

from numpyro_ebipla.optim import as_optax, default_optimizer, langevin_noise, orthogonalised
from numpyro_ebipla.optim.reaching_adam import reaching_adam

pytestmark = pytest.mark.unit

PARAMS = {"a": np.array([0.5, -1.0, 2.0], np.float32), "b": {"w": np.array([[0.3]], np.float32)}}


def gradient(params):
    return jax.grad(lambda p: jnp.sum((p["a"] - 1) ** 4) + jnp.sum(jnp.cosh(p["b"]["w"])))(params)


# --- langevin_noise -----------------------------------------------------------------------------------


def chi_square_bound(num):
    """Five standard errors of the mean square of ``num`` standard normals."""
    return 5 * np.sqrt(2 / num)


@pytest.mark.parametrize(("own", "passed", "beta"), [(None, 250, 250), (40.0, 250, 40)])
def test_noise_has_the_papers_variance(own, passed, beta):
    h = 0.03
    optim = langevin_noise(h, own)
    zeros = {"a": jnp.zeros(20000), "b": jnp.zeros((100, 200))}
    updates, state = optim.update(zeros, optim.init(zeros), zeros, rng_key=random.key(0), inverse_temperature=passed)
    for u in updates.values():
        assert abs(np.mean(np.square(u)) / (2 * h / beta) - 1) < chi_square_bound(20000)
    # Leaves get their own noise.
    correlation = np.corrcoef(updates["a"], updates["b"].ravel())[0, 1]
    assert abs(correlation) < 5 / np.sqrt(20000)
    assert int(state.count) == 1


def test_noise_follows_a_schedule_and_is_added():
    schedule = lambda k: 0.1 / (1.0 + k)
    optim = langevin_noise(schedule, 10)
    drift = {"a": jnp.full(20000, 3.0)}
    state = optim.init(drift)
    for k in range(3):
        updates, state = optim.update(drift, state, drift, rng_key=random.key(k))
        noise = np.asarray(updates["a"]) - 3.0
        assert abs(np.mean(noise**2) / (2 * schedule(k) / 10) - 1) < chi_square_bound(20000)


def test_noise_needs_its_key():
    optim = optax.chain(optax.sgd(0.1), langevin_noise(0.1))
    with pytest.raises(TypeError, match="rng_key"):
        optim.update(PARAMS, optim.init(PARAMS), PARAMS, inverse_temperature=1)


def test_noise_keeps_the_dtype():
    optim = langevin_noise(0.1, 5)
    grads = {"half": jnp.zeros(3, jnp.bfloat16), "single": jnp.zeros(3, jnp.float32)}
    updates, _ = optim.update(grads, optim.init(grads), grads, rng_key=random.key(0))
    assert updates["half"].dtype == jnp.bfloat16 and updates["single"].dtype == jnp.float32


def test_temperature_of_billions_does_not_overflow():
    optim = langevin_noise(1e-2)
    grads = {"a": jnp.zeros(1000)}
    updates, _ = optim.update(
        grads, optim.init(grads), grads, rng_key=random.key(0), inverse_temperature=60_000 * 100_000
    )
    assert abs(np.mean(np.square(updates["a"])) / (2e-2 / 6e9) - 1) < chi_square_bound(1000)


# --- as_optax -----------------------------------------------------------------------------------------


def follow(optim, steps=30):
    optim = as_optax(optim)
    params, state = PARAMS, optim.init(PARAMS)

    @jax.jit
    def step(params, state):
        updates, state = optim.update(
            gradient(params), state, params, value=jnp.float32(1.0), rng_key=random.key(0),
            inverse_temperature=1,
        )  # fmt: skip
        return optax.apply_updates(params, updates), state

    for _ in range(steps):
        params, state = step(params, state)
    return params


def close(got, want):
    # Differences of parameters are added back to them: a few float32 roundings per step.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), got, want)


@pytest.mark.parametrize("make", [lambda: optax.sgd(1e-2), lambda: optax.adam(1e-2)], ids=["sgd", "adam"])
def test_same_path_as_optax(make):
    optim = make()
    params, state = PARAMS, optim.init(PARAMS)
    step = jax.jit(lambda p, s: optim.update(gradient(p), s, p))
    for _ in range(30):
        updates, state = step(params, state)
        params = optax.apply_updates(params, updates)
    close(follow(make()), params)


@pytest.mark.parametrize(
    "make",
    [
        lambda: numpyro.optim.Adam(1e-2),
        lambda: numpyro.optim.ClippedAdam(1e-2, clip_norm=0.5),
        lambda: numpyro.optim.Momentum(1e-3, 0.9),
        lambda: numpyro.optim.Adagrad(1e-2),
        lambda: numpyro.optim.RMSProp(optimizers.exponential_decay(1e-2, 10, 0.5)),
        lambda: numpyro.optim.optax_to_numpyro(optax.adamw(1e-2)),
    ],
    ids=["Adam", "ClippedAdam", "Momentum", "Adagrad", "RMSProp", "optax_to_numpyro"],
)
def test_same_path_as_numpyro(make):
    optim = make()
    state = optim.init(PARAMS)
    step = jax.jit(lambda s: optim.update(gradient(optim.get_params(s)), s, value=1.0))
    for _ in range(30):
        state = step(state)
    close(follow(make()), optim.get_params(state))


@pytest.mark.parametrize("make", [lambda: optimizers.sgd(1e-2), lambda: optimizers.adam(1e-2)], ids=["sgd", "adam"])
def test_same_path_as_jax(make):
    init, update, get_params = make()
    state = init(PARAMS)
    step = jax.jit(lambda k, s: update(k, gradient(get_params(s)), s))
    for k in range(30):
        state = step(k, state)
    close(follow(make()), get_params(state))


@pytest.mark.parametrize(
    "wrong",
    [1e-3, "adam", optax.adam, lambda g: g, numpyro.optim.Minimize(), None],
    ids=["number", "string", "uncalled", "function", "Minimize", "None"],
)
def test_wrong_kind_is_named(wrong):
    with pytest.raises(TypeError, match="optim must be"):
        as_optax(wrong)


def test_default_optimizer_moves_all_parameters_and_slows_down():
    optim = default_optimizer(("a",))
    params, state = {"a": jnp.zeros(2), "b": jnp.zeros(2)}, None
    state = optim.init(params)
    grads = {"a": jnp.ones(2), "b": jnp.ones(2)}
    update = jax.jit(lambda s: optim.update(grads, s, params))
    sizes = []
    for _ in range(4000):
        updates, state = update(state)
        sizes.append([float(-updates[k][0]) for k in ("a", "b")]) if len(sizes) in (0, 3999) else sizes.append(0)
    first, last = np.array(sizes[0]), np.array(sizes[-1])
    assert np.all(first > 0) and np.all(last > 0)
    # Rates fall like 1/√k (a constant gradient makes Adam's update the rate itself).
    np.testing.assert_allclose(last / first, 1 / np.sqrt(1 + 3999 / 1000), rtol=1e-2)


# --- reaching_adam ------------------------------------------------------------------------------------

RATE = lambda k: 1e-2 / jnp.sqrt(1 + k / 1000)


def averaged_path(optim, gradient, start, num_steps=5000):
    """Mean of the last tenth of a path that starts at ``start``."""

    def step(carry, key):
        params, state = carry
        updates, state = optim.update(gradient(params, key), state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    start = jnp.asarray(start, float)
    _, path = jax.lax.scan(step, (start, optim.init(start)), random.split(random.key(0), num_steps))
    return np.asarray(path[-num_steps // 10 :].mean(0))


@pytest.mark.parametrize("scale", [1e-4, 1e-2, 1.0, 1e2, 1e4])
def test_a_mean_of_any_scale_is_reached(scale):
    """The gradient of a normal likelihood of 200 data around ``scale``, from zero, with a minibatch's noise."""
    gradient = lambda p, key: (p - scale) / scale**2 + 0.1 * random.normal(key, p.shape) / scale
    for optim, shape in ((reaching_adam(RATE), 3), (reaching_adam(RATE, orthogonal=True), (3, 4))):
        np.testing.assert_allclose(averaged_path(optim, gradient, np.zeros(shape)) / scale, 1, atol=0.02)
    if scale >= 1e2:  # Adam's rates sum up to 29
        assert np.all(np.abs(averaged_path(optax.adam(RATE), gradient, np.zeros(3)) / scale - 1) > 0.5)


def test_large_gradients_at_the_start_are_forgotten():
    """A log variance that starts at zero where 1e6 is right: its first gradient is a million times its last."""
    gradient = lambda p, key: 1 - 1e6 * jnp.exp(-p) * (1 + 0.1 * random.normal(key, p.shape))
    best = np.log(1e6)
    assert averaged_path(reaching_adam(RATE), gradient, np.zeros(1)) == pytest.approx(best, abs=0.02)
    assert averaged_path(optax.adam(RATE), gradient, np.zeros(1)) < best - 2


def test_weights_of_a_network_move_as_by_adam():
    """Arrays of size below one with gradients that fluctuate about a drift: within a factor of two all the way."""
    gradient = lambda p, key: 0.3 * (p - 0.3) + random.normal(key, p.shape)
    start = 0.1 * np.asarray(random.normal(random.key(1), (400,)))
    ours, adam = (
        averaged_path(optim, gradient, start, 600).mean() for optim in (reaching_adam(RATE), optax.adam(RATE))
    )
    assert 0.05 < adam < 0.3
    assert ours == pytest.approx(adam, rel=0.3)


# --- orthogonal moves ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 5), (3, 40), (40, 3), (7, 1)], ids=str)
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_orthogonalised_has_the_singular_vectors_of_the_matrix_and_values_near_one(shape, size):
    matrix = size * np.asarray(random.normal(random.key(2), shape))
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    inner = u.T @ np.asarray(orthogonalised(jnp.asarray(matrix))) @ vt.T
    kept = s > 0.05 * s[0]  # five iterations raise smaller ones not quite as far
    assert np.all(np.abs(np.diag(inner)[kept] - 0.95) < 0.3)
    np.testing.assert_allclose(inner - np.diag(np.diag(inner)), 0, atol=1e-3)


def test_orthogonalised_nothing_is_nothing():
    np.testing.assert_array_equal(orthogonalised(jnp.zeros((3, 4))), np.zeros((3, 4)))


def test_orthogonal_moves_turn_with_the_gradients():
    """A network's hidden units may be rotated into each other: the moves follow, those of Adam do not."""
    turn = jnp.linalg.qr(random.normal(random.key(3), (6, 6)))[0]
    gradients = random.normal(random.key(4), (10, 6, 9))

    def moves(optim, gradients):
        params = jnp.zeros((6, 9))
        state = optim.init(params)
        return jax.lax.scan(lambda state, g: optim.update(g, state, params)[::-1], state, gradients)[1]

    for orthogonal, equal in ((True, True), (False, False)):
        optim = reaching_adam(RATE, orthogonal=orthogonal)
        there, back = moves(optim, turn @ gradients), turn @ moves(optim, gradients)
        assert np.allclose(there, back, atol=1e-4) == equal
