"""The parameter move: the paper's noise, and every kind of optimiser behind one face."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.optim
import optax
import pytest
from jax import random
from jax.example_libraries import optimizers
from jax.flatten_util import ravel_pytree

from numpyro_ebipla.optim import (
    as_optax,
    default_optimizer,
    in_single_precision,
    inverse_sqrt_decay,
    langevin,
    langevin_noise,
    nesterov_mean,
    orthogonalise,
    orthogonalised,
    reaching_adam,
    scale_by_capped_adam,
    scale_by_fan_in,
    scale_by_width,
    with_reach,
)
from numpyro_ebipla.optim.default import default_for
from numpyro_ebipla.optim.transforms import fan_in

PARAMS = {"a": np.array([0.5, -1.0, 2.0], np.float32), "b": {"w": np.array([[0.3]], np.float32)}}


def gradient(params):
    return jax.grad(lambda p: jnp.sum((p["a"] - 1) ** 4) + jnp.sum(jnp.cosh(p["b"]["w"])))(params)


# --- langevin_noise -----------------------------------------------------------------------------------


def chi_square_bound(num):
    """Five standard errors of the mean square of ``num`` standard normals."""
    return 5 * np.sqrt(2 / num)


@pytest.mark.unit
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


@pytest.mark.unit
def test_noise_follows_a_schedule_and_is_added():
    schedule = lambda k: 0.1 / (1.0 + k)
    optim = langevin_noise(schedule, 10)
    drift = {"a": jnp.full(20000, 3.0)}
    state = optim.init(drift)
    for k in range(3):
        updates, state = optim.update(drift, state, drift, rng_key=random.key(k))
        noise = np.asarray(updates["a"]) - 3.0
        assert abs(np.mean(noise**2) / (2 * schedule(k) / 10) - 1) < chi_square_bound(20000)


@pytest.mark.unit
def test_noise_needs_its_key():
    optim = optax.chain(optax.sgd(0.1), langevin_noise(0.1))
    with pytest.raises(TypeError, match="rng_key"):
        optim.update(PARAMS, optim.init(PARAMS), PARAMS, inverse_temperature=1)


@pytest.mark.unit
def test_noise_keeps_the_dtype():
    optim = langevin_noise(0.1, 5)
    grads = {"half": jnp.zeros(3, jnp.bfloat16), "single": jnp.zeros(3, jnp.float32)}
    updates, _ = optim.update(grads, optim.init(grads), grads, rng_key=random.key(0))
    assert updates["half"].dtype == jnp.bfloat16 and updates["single"].dtype == jnp.float32


@pytest.mark.unit
def test_temperature_of_billions_does_not_overflow():
    optim = langevin_noise(1e-2)
    grads = {"a": jnp.zeros(1000)}
    updates, _ = optim.update(
        grads, optim.init(grads), grads, rng_key=random.key(0), inverse_temperature=60_000 * 100_000
    )
    assert abs(np.mean(np.square(updates["a"])) / (2e-2 / 6e9) - 1) < chi_square_bound(1000)


# --- langevin -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("whole", [False, True])
def test_langevin_is_a_gradient_step_with_the_papers_noise(whole):
    """The mean contrast at temperature ``1/(MN)``; or the sum over the data at ``1/N``, with ``h M`` for ``h``."""
    num_data, num_particles = 25, 10
    schedule = lambda k: 0.03 / (1.0 + k)
    given = {"num_data": num_data, "inverse_temperature": num_data * num_particles}
    grads = {"a": jnp.full(20000, 2.0), "b": jnp.full((100, 200), -0.5)}
    noisy, plain = langevin(schedule, whole=whole), langevin(schedule, noise=False, whole=whole)
    state, state_plain = noisy.init(grads), plain.init(grads)
    for k in range(3):
        updates, state = noisy.update(grads, state, grads, rng_key=random.key(k), **given)
        drifts, state_plain = plain.update(grads, state_plain, grads, rng_key=random.key(k), **given)
        step = schedule(k) * (num_data if whole else 1)
        variance = 2 * schedule(k) / (num_particles if whole else num_data * num_particles)
        for name, g in grads.items():
            np.testing.assert_allclose(drifts[name], -step * g, rtol=1e-6)
            noise = np.asarray(updates[name]) + step * np.asarray(g)
            assert abs(np.mean(noise**2) / variance - 1) < chi_square_bound(20000)


def test_langevin_keeps_the_dtype():
    grads = {"half": jnp.ones(3, jnp.bfloat16), "single": jnp.ones(3, jnp.float32)}
    for optim in (langevin(0.1), langevin(lambda k: 0.1 / (1 + k), whole=True)):
        given = {"rng_key": random.key(0), "num_data": 3, "inverse_temperature": 6}
        updates, _ = optim.update(grads, optim.init(grads), grads, **given)
        assert updates["half"].dtype == jnp.bfloat16 and updates["single"].dtype == jnp.float32


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


@pytest.mark.unit
@pytest.mark.parametrize("make", [lambda: optax.sgd(1e-2), lambda: optax.adam(1e-2)], ids=["sgd", "adam"])
def test_same_path_as_optax(make):
    optim = make()
    params, state = PARAMS, optim.init(PARAMS)
    step = jax.jit(lambda p, s: optim.update(gradient(p), s, p))
    for _ in range(30):
        updates, state = step(params, state)
        params = optax.apply_updates(params, updates)
    close(follow(make()), params)


@pytest.mark.unit
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


@pytest.mark.unit
@pytest.mark.parametrize("make", [lambda: optimizers.sgd(1e-2), lambda: optimizers.adam(1e-2)], ids=["sgd", "adam"])
def test_same_path_as_jax(make):
    init, update, get_params = make()
    state = init(PARAMS)
    step = jax.jit(lambda k, s: update(k, gradient(get_params(s)), s))
    for k in range(30):
        state = step(k, state)
    close(follow(make()), get_params(state))


@pytest.mark.unit
@pytest.mark.parametrize(
    "wrong",
    [1e-3, "adam", optax.adam, lambda g: g, numpyro.optim.Minimize(), None],
    ids=["number", "string", "uncalled", "function", "Minimize", "None"],
)
def test_wrong_kind_is_named(wrong):
    with pytest.raises(TypeError, match="optim must be"):
        as_optax(wrong)


@pytest.mark.unit
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


@pytest.mark.unit
def test_large_gradients_at_the_start_are_forgotten():
    """A log variance that starts at zero where 1e6 is right: its first gradient is a million times its last."""
    gradient = lambda p, key: 1 - 1e6 * jnp.exp(-p) * (1 + 0.1 * random.normal(key, p.shape))
    best = np.log(1e6)
    assert averaged_path(reaching_adam(RATE), gradient, np.zeros(1)) == pytest.approx(best, abs=0.02)
    assert averaged_path(optax.adam(RATE), gradient, np.zeros(1)) < best - 2


@pytest.mark.unit
def test_weights_of_a_network_move_as_by_adam():
    """Arrays of size below one with gradients that fluctuate about a drift: within a factor of two all the way."""
    gradient = lambda p, key: 0.3 * (p - 0.3) + random.normal(key, p.shape)
    start = 0.1 * np.asarray(random.normal(random.key(1), (400,)))
    ours, adam = (
        averaged_path(optim, gradient, start, 600).mean() for optim in (reaching_adam(RATE), optax.adam(RATE))
    )
    assert 0.05 < adam < 0.3
    assert ours == pytest.approx(adam, rel=0.3)


# --- the transformations it is made of ----------------------------------------------------------------


def noisy_gradients(num_steps, shape, seed=0):
    """Noise about a drift that turns every 94 steps; the first twenty are a thousand times as large."""
    drift = 0.5 * np.sign(np.sin(np.arange(num_steps) / 30))
    size = np.where(np.arange(num_steps) < 20, 1e3, 1.0)
    per_step = (-1,) + (1,) * len(shape)
    noise = np.random.default_rng(seed).normal(size=(num_steps, *shape))
    return size.reshape(per_step) * (drift.reshape(per_step) + noise)


def updates_of(optim, gradients, params, **extra):
    """Updates ``[K, …]`` of a sequence of gradients at fixed parameters, and the last state."""

    def step(state, g):
        updates, state = optim.update(g, state, params, **extra)
        return state, updates

    state, updates = jax.lax.scan(step, optim.init(params), gradients)
    return updates, state


def means(sequence, decay):
    """Exponential means of a sequence, corrected for their start at zero."""
    mean, found = np.zeros_like(sequence[0]), []
    for k, x in enumerate(sequence):
        mean = decay * mean + (1 - decay) * x
        found.append(mean / (1 - decay ** (k + 1)))
    return np.array(found)


def capped_adam(gradients, eps=1e-8):
    """The rule of scale_by_capped_adam, and where its cap binds."""
    square, recent = means(gradients**2, 0.999), means(gradients**2, 0.9)
    return means(gradients, 0.9) / (np.sqrt(np.minimum(square, 4 * recent)) + eps), square > 4 * recent


def log_reaches(gradients, furthest, decay=0.9, gain=0.1, slack=1.0):
    """The rule of with_reach, with the log of the array's size at every step."""
    axes = tuple(range(1, gradients.ndim))
    steadiness = np.sum(means(gradients, decay) ** 2, axes) / means(np.sum(gradients**2, axes), 0.9)
    white = (1 - decay) / (1 + decay)
    log_reach, found = 0.0, []
    for s, most in zip(steadiness, furthest, strict=True):
        pivot = slack * white if log_reach > 0 else white / slack
        log_reach = min(log_reach + gain * (s - pivot), max(most, 0.0))
        found.append(log_reach)
    return np.array(found)


def newton_schulz(matrix):
    """Five iterations of Jordan et al. (2024)."""
    x = matrix / (np.linalg.norm(matrix) + 1e-30)
    x = x.T if x.shape[0] > x.shape[1] else x
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def orthogonal_moves(gradients):
    """Muon's moves, with Nesterov's mean and the factor for the shape."""
    ahead = 0.95 * means(gradients, 0.95) + 0.05 * gradients
    width = max(1.0, gradients.shape[2] / gradients.shape[1]) ** 0.5
    return width * np.array([newton_schulz(matrix) for matrix in ahead])


def unchanged(decay=0.9):
    """Passes gradients on, with a state that has their mean."""
    mean = nesterov_mean(decay)
    return optax.GradientTransformation(mean.init, lambda g, state, params=None: (g, mean.update(g, state)[1]))


def test_capped_adam_is_the_rule():
    gradients = noisy_gradients(200, (7,))
    want, binds = capped_adam(gradients)
    assert binds.any() and not binds.all()
    with jax.enable_x64(True):
        got, _ = updates_of(scale_by_capped_adam(), gradients, jnp.zeros(7))
    np.testing.assert_allclose(got, want, rtol=1e-11)


def test_capped_adam_is_adam_where_gradients_keep_their_size():
    gradients = np.sign(noisy_gradients(200, (7,)))
    with jax.enable_x64(True):
        got, _ = updates_of(scale_by_capped_adam(0.8, 0.99, 1e-3), gradients, jnp.zeros(7))
        want, _ = updates_of(optax.scale_by_adam(0.8, 0.99, 1e-3), gradients, jnp.zeros(7))
    np.testing.assert_allclose(got, want, rtol=1e-11)


@pytest.mark.parametrize(("size", "slack"), [(0.1, 1.0), (3.0, 1.0), (1e3, 1.0), (3.0, 2.0)])
def test_reach_is_the_rule(size, slack):
    gradients, params = noisy_gradients(300, (2, 3)), size * np.array([[1.0, -1, 1], [-1, 1, -1]])
    furthest = np.log(min(10 * size, size**2))
    want = log_reaches(gradients, np.full(300, furthest), slack=slack)
    assert want.max() <= max(furthest, 0) and np.ptp(want) > 0.4
    with jax.enable_x64(True):
        got, state = updates_of(with_reach(unchanged(), slack=slack), gradients, jnp.asarray(params))
    np.testing.assert_allclose(got, np.exp(want)[:, None, None] * gradients, rtol=1e-11)
    assert state.log_reach == pytest.approx(want[-1], rel=1e-11)


def test_reach_neither_grows_nor_falls_in_noise():
    """Its drift in white noise is zero: over ``K`` steps it walks by gain times a sum of ``K`` correlated terms."""
    num_steps, num_entries = 4000, 300
    gradients = random.normal(random.key(0), (num_steps, num_entries))
    _, state = updates_of(with_reach(unchanged()), gradients, jnp.full(num_entries, 1e6))
    # The mean of ten gradients has a squared norm of deviation w √(2/n), correlated over as many steps; both moments
    # start with one gradient, of steadiness one, which is worth a few steps of growth.
    walk = 0.1 * (0.1 / 1.9) * np.sqrt(2 / num_entries) * np.sqrt(10 * num_steps)
    assert abs(state.log_reach) < 0.1 * 10 + 5 * walk


def test_reach_needs_the_parameters():
    optim = with_reach(unchanged())
    with pytest.raises(ValueError, match=r"update\(grads, state, params\)"):
        optim.update(PARAMS, optim.init(PARAMS))


def test_each_array_has_its_own_reach():
    gradients = {"steady": jnp.ones((100, 3)), "turning": jnp.ones((100, 3)) * (-1.0) ** jnp.arange(100)[:, None]}
    params = {"steady": jnp.full(3, 100.0), "turning": jnp.full(3, 100.0)}
    _, state = updates_of(with_reach(unchanged()), gradients, params)
    assert state.log_reach["steady"] == pytest.approx(np.log(1000)), "ten times the size"
    assert state.log_reach["turning"] < 0


def test_nesterov_mean_is_the_rule():
    gradients = noisy_gradients(100, (7,))
    with jax.enable_x64(True):
        got, _ = updates_of(nesterov_mean(0.95), gradients, jnp.zeros(7))
    np.testing.assert_allclose(got, 0.95 * means(gradients, 0.95) + 0.05 * gradients, rtol=1e-10)


@pytest.mark.parametrize("shape", [(5, 5), (3, 40), (40, 3), (7, 1)], ids=str)
def test_orthogonalise_is_newton_and_schulz_and_optax_muon(shape):
    """Without momentum Muon is that alone; that optax 0.2.6 includes the factor for the shape does not matter so."""
    gradients = noisy_gradients(30, shape)
    short_last = optax.contrib.MuonDimensionNumbers(*((0, 1) if shape[0] >= shape[1] else (1, 0)))
    muon = optax.contrib.scale_by_muon(beta=0.0, nesterov=False, weight_dimension_numbers=short_last)
    with jax.enable_x64(True):
        got, _ = updates_of(orthogonalise(), gradients, jnp.zeros(shape))
        theirs, _ = updates_of(muon, gradients, jnp.zeros(shape))
    np.testing.assert_allclose(got, [newton_schulz(g) for g in gradients], atol=1e-11)
    np.testing.assert_allclose(got, theirs, atol=1e-6)  # they add 1e-8 to the norm


@pytest.mark.parametrize("shape", [(5, 5), (3, 40), (40, 3), (7, 1)], ids=str)
def test_width_makes_entries_of_an_orthogonal_matrix_depend_on_its_inputs_only(shape):
    u, _, vt = np.linalg.svd(np.random.default_rng(0).normal(size=shape), full_matrices=False)
    orthogonal = jnp.asarray(u @ vt)
    scaled, _ = scale_by_width().update(orthogonal, scale_by_width().init(orthogonal), orthogonal)
    assert np.sqrt(np.mean(np.square(scaled))) == pytest.approx(1 / np.sqrt(shape[0]), rel=1e-5)


def test_half_precision_is_computed_in_single():
    """Squares of 1e3 are out of range of float16, and moments that change by a thousandth stand still in bfloat16."""
    gradients = {
        "half": jnp.asarray(noisy_gradients(200, (7,)), jnp.float16),
        "brain": jnp.ones((200, 3), jnp.bfloat16),
    }
    single = jax.tree.map(lambda g: g.astype(jnp.float32), gradients)
    at = lambda tree: jax.tree.map(lambda g: jnp.ones_like(g[0]), tree)
    got, state = updates_of(in_single_precision(scale_by_capped_adam()), gradients, at(gradients))
    want, state_of_single = updates_of(scale_by_capped_adam(), single, at(single))
    assert got["half"].dtype == jnp.float16 and got["brain"].dtype == jnp.bfloat16
    jax.tree.map(np.testing.assert_array_equal, state, state_of_single)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(a.dtype)), got, want)


def test_wrappers_pass_extra_arguments_on():
    key, params = random.key(0), {"a": jnp.ones(3)}
    plain = langevin_noise(0.1)
    want, _ = plain.update(params, plain.init(params), params, rng_key=key, inverse_temperature=5)
    # Parameters of size one are reached by steps of one, so that the factor is one.
    reaching = with_reach(optax.chain(unchanged(), plain), mean_of=lambda state: state[0].mean)
    for wrapped in (in_single_precision(plain), reaching):
        state = wrapped.init(params)
        got, _ = wrapped.update(params, state, params, rng_key=key, inverse_temperature=5, value=0.0)
        np.testing.assert_array_equal(got["a"], want["a"])


def test_reach_wraps_optax_own():
    """Any transformation that keeps a mean of the gradients will do."""
    gradients, adam = noisy_gradients(300, (6,)), optax.scale_by_adam(0.8)
    with jax.enable_x64(True):
        params = jnp.full(6, 3.0)
        got, _ = updates_of(with_reach(adam, 0.8, mean_of=lambda state: state.mu), gradients, params)
        direction, _ = updates_of(adam, gradients, params)
    reach = np.exp(log_reaches(gradients, np.full(300, np.log(9.0)), 0.8))
    np.testing.assert_allclose(got, reach[:, None] * np.asarray(direction), rtol=1e-11)


def test_inverse_sqrt_decay():
    schedule = inverse_sqrt_decay(0.03)
    np.testing.assert_allclose([schedule(k) for k in (0, 1000, 3000, 99000)], 0.03 / np.sqrt([1, 2, 4, 100]), rtol=1e-6)
    assert inverse_sqrt_decay(1.0, 10)(jnp.int32(30)) == pytest.approx(0.5)


# --- the default as a whole ---------------------------------------------------------------------------

SHAPES = {"wide": (5, 9), "tall": (9, 4), "vector": (7,), "scalar": (), "cube": (2, 3, 4)}
SIZES = {"wide": 0.5, "tall": 30.0, "vector": 50.0, "scalar": 1.5, "cube": 0.1}
#: The last has one matrix only, and is not taken for a network.
SITES = {"energy": [*SHAPES], "network": [*SHAPES], "linear": [name for name in SHAPES if name != "tall"]}


def default_rule(gradients, path, site):
    """Updates ``[K, …]`` of one array by the default optimiser, from its gradients and its values on the way."""
    rms, energy = np.sqrt(np.mean(path.reshape(len(path), -1) ** 2, 1)), site == "energy"
    if orthogonal := site != "linear" and gradients.ndim == 3:
        direction, decay, size = orthogonal_moves(gradients), 0.95, rms * np.sqrt(path.shape[1])
    else:
        direction, decay, size = capped_adam(gradients, 1e-5 if energy else 1e-16)[0], 0.9, rms
    furthest = np.log(np.minimum((1 if energy or orthogonal else 10) * size, size**2))
    log_reach = log_reaches(gradients, furthest, decay, slack=2.0 if energy or orthogonal else 1.0)
    step = np.arange(len(gradients))
    rate = 1e-2 / np.sqrt(1 + step / 1000) * (np.minimum(step / 1000, 1) if site == "network" else 1)
    return -(rate * np.exp(log_reach)).reshape((-1,) + (1,) * (gradients.ndim - 1)) * direction


@pytest.mark.parametrize(
    ("dtype", "rtol"),
    [
        ("float64", 2.0**-22),  # JAX divides a step, an int32, in single precision: so does the rate's schedule
        # Means over a thousand steps may be off by as many roundings, and Newton and Schulz raise small singular
        # values, with their rounding, by up to 3.4445⁵ = 485.
        ("float32", 1000 * 2.0**-24 * 2),
        # Updates are rounded to eight bits; those next to the middle of two numbers go either way.
        ("bfloat16", 2.0**-8),
    ],
)
def test_the_default_is_the_rule(dtype, rtol):
    """200 steps of noise about a turning drift: the cap binds, and reaches grow, fall and end at their bounds."""
    with jax.enable_x64(dtype == "float64"):
        gradients, start = {}, {}
        for i, (site, names) in enumerate(SITES.items()):
            noise = {name: noisy_gradients(200, SHAPES[name], 10 * i + len(name)) for name in names}
            gradients[site] = jax.tree.map(lambda g: jnp.asarray(g, dtype), noise)
            start[site] = {n: jnp.asarray(SIZES[n] * np.sign(noise[n][-1]), dtype) for n in names}
        optim = default_optimizer(("energy",))

        def step(carry, g):
            params, state = carry
            updates, state = optim.update(g, state, params)
            return (optax.apply_updates(params, updates), state), (updates, params)

        _, (got, path) = jax.lax.scan(step, (start, optim.init(start)), gradients)
    for site, names in SITES.items():
        for name in names:
            assert got[site][name].dtype == dtype
            g, x, u = (np.asarray(tree[site][name]).astype(float) for tree in (gradients, path, got))
            want = default_rule(g, x, site)
            np.testing.assert_allclose(u, want, rtol=rtol, atol=rtol * abs(want).max())


# --- orthogonal moves ---------------------------------------------------------------------------------


@pytest.mark.unit
@pytest.mark.parametrize("shape", [(5, 5), (3, 40), (40, 3), (7, 1)], ids=str)
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_orthogonalised_has_the_singular_vectors_of_the_matrix_and_values_near_one(shape, size):
    matrix = size * np.asarray(random.normal(random.key(2), shape))
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    inner = u.T @ np.asarray(orthogonalised(jnp.asarray(matrix))) @ vt.T
    kept = s > 0.05 * s[0]  # five iterations raise smaller ones not quite as far
    assert np.all(np.abs(np.diag(inner)[kept] - 0.95) < 0.3)
    np.testing.assert_allclose(inner - np.diag(np.diag(inner)), 0, atol=1e-3)


@pytest.mark.unit
def test_orthogonalised_nothing_is_nothing():
    np.testing.assert_array_equal(orthogonalised(jnp.zeros((3, 4))), np.zeros((3, 4)))


@pytest.mark.unit
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


# --- wide networks --------------------------------------------------------------------------------------


@pytest.mark.unit
@pytest.mark.parametrize("shape", [(512, 128), (3, 3, 64, 32), (4, 4, 16, 1)])
def test_inputs_are_counted_by_shape_or_by_size(shape):
    inputs = int(np.prod(shape[:-1]))
    weights = random.normal(random.key(0), shape) / np.sqrt(inputs)
    assert float(fan_in(weights)) == pytest.approx(inputs, rel=0.25)
    assert float(fan_in(jnp.zeros(shape))) == inputs and float(fan_in(jnp.ones(shape))) == 1
    assert float(fan_in(weights[0, ..., 0].ravel())) == 1, "biases"
    if len(shape) == 2:  # as equinox has it
        assert float(fan_in(weights.T)) == pytest.approx(min(inputs, shape[1]), rel=0.25)


@pytest.mark.unit
def test_narrow_networks_and_numbers_of_any_size_are_left_alone():
    params = {"loadings": random.normal(random.key(0), (300, 2)), "narrow": jnp.zeros((64, 10)), "one": jnp.ones(())}
    updates = jax.tree.map(jnp.ones_like, params)
    found, _ = scale_by_fan_in().update(updates, scale_by_fan_in().init(params), params)
    assert all(np.array_equal(found[name], updates[name]) for name in params)


@pytest.mark.parametrize("output", [jnp.tanh, lambda x: 2 * jax.nn.sigmoid(x) - 1, lambda x: x])
@pytest.mark.parametrize("kind", ["dense", "transposed"])
def test_a_wide_generator_is_not_dead_after_its_first_steps(output, kind):
    """At Adam's rate of 0.01 all outputs were at their bounds after three steps, and the gradient gone."""
    keys = random.split(random.key(0), 5)
    lecun = jax.nn.initializers.lecun_normal()
    if kind == "dense":
        shapes = [(16, 512), (512, 512), (512, 196)]
        call = lambda p, z: output(jax.nn.relu(jax.nn.relu(z @ p[0]) @ p[1]) @ p[2])
    else:
        shapes = [(16, 7 * 7 * 64), (4, 4, 64, 1)]

        def call(p, z):
            h = jax.nn.relu(z @ p[0]).reshape(-1, 7, 7, 64)
            return output(jax.lax.conv_transpose(h, p[1], (2, 2), "SAME")).reshape(-1, 196)

    params = [lecun(key, shape) for key, shape in zip(keys, shapes, strict=False)]
    z, target = random.normal(keys[4], (64, 16)), jnp.where(jnp.arange(196) % 5 == 0, 0.8, -1.0)
    loss = lambda p: 0.5 * jnp.square(target - call(p, z)).sum(-1).mean() / 0.09
    optim = default_optimizer()

    named = {"generator": params}
    loss_of = lambda named: loss(named["generator"])
    begin, state = float(loss(params)), optim.init(named)
    step = jax.jit(lambda named, state: optim.update(jax.grad(loss_of)(named), state, named))
    for _ in range(60 if kind == "transposed" else 120):  # matrices move more slowly, and together
        updates, state = step(named, state)
        named = optax.apply_updates(named, updates)
    assert float(loss_of(named)) < 0.1 * begin


# --- each number of a plain parameter -------------------------------------------------------------------


@pytest.mark.unit
def test_it_makes_no_difference_whether_numbers_are_packed():
    """A location of 596, one of 3e-3 and one of 4e5, as one array or as three scalars: the same moves, to rounding."""
    goals = np.array([596.0, 3e-3, 4e5])
    packed, apart = {"m": jnp.zeros(3)}, {"a": jnp.zeros(()), "b": jnp.zeros(()), "c": jnp.zeros(())}
    gradient = lambda p: (p - goals) / goals**2

    def path(params, gather):
        optim = default_for("rest", False)

        def step(carry, _):
            params, state = carry
            flat, unflatten = ravel_pytree(params)
            updates, state = optim.update(unflatten(gradient(flat).astype(flat.dtype)), state, params)
            params = optax.apply_updates(params, updates)
            return (params, state), gather(params)

        return np.asarray(jax.lax.scan(step, (params, optim.init(params)), length=3000)[1])

    one = path(packed, lambda p: p["m"])
    other = path(apart, lambda p: jnp.stack([p["a"], p["b"], p["c"]]))
    np.testing.assert_allclose(one / goals, other / goals, atol=1e-3)
    np.testing.assert_allclose(one[-1], goals, rtol=1e-3)


@pytest.mark.unit
def test_arrays_of_numpy_are_numbers_too():
    """A state that was begun with them goes on with JAX's own."""
    optim = default_for("rest", True)
    begin = {"a": np.zeros(3), "net": {"kernel": np.ones((2, 2))}}
    state = optim.init(begin)
    params = jax.tree.map(jnp.asarray, begin)
    assert jax.tree.structure(optim.update(params, state, params)[1]) == jax.tree.structure(state)
