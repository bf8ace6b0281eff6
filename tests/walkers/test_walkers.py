"""Prior walkers against densities that move: log Z and expectations at every step, and their caches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random

from numpyro_ebipla import MALA, ULA, Annealed, Persistent, Tempered, Underdamped
from numpyro_ebipla.smc.density import Evaluated, TiltedDensity
from numpyro_ebipla.smc.reference import Reference
from numpyro_ebipla.walkers import Ladder
from numpyro_ebipla.walkers.persistent import TURN, Weighted
from numpyro_ebipla.walkers.tempered import TemperedState, swap

#: See tests/conftest.py.
RUNS_LONG = True

K = 25  # steps of a path of densities
FUNCTIONS = (lambda x: x, lambda x: x**2)


def log_base(x):
    return -0.5 * x**2 - 0.5 * np.log(2 * np.pi)


def tilted(energy):
    return TiltedDensity(log_base, energy, lambda key, num: random.normal(key, (num,)))


def moving_gaussian(t):
    """From N(0, 1) to N(1, 1/4), unnormalised: Z falls from 1 to 1/2."""
    return tilted(lambda x: 0.5 * (1 + 3 * t) * (x - t) ** 2 - 0.5 * x**2)


def moving_double_well(t):
    """To two wells at ±1.2 of unequal depth, from a flatter version of the same: the start is annealed."""
    return tilted(lambda x: (0.3 + 0.7 * t) * (2.5 * (x**2 - 1.44) ** 2 - 0.6 * x - 0.5 * x**2))


def quadrature(density):
    """log Z and expectations."""
    grid = np.linspace(-8, 8, 20_001)
    with jax.enable_x64(True):
        weight = np.exp(np.asarray(density.log_density(jnp.asarray(grid))))
    z = np.trapezoid(weight, grid)
    return np.log(z), np.array([np.trapezoid(f(grid) * weight, grid) / z for f in FUNCTIONS])


def unbiased(estimates, truth, width=3.0):
    """Whether the mean of independent repetitions lies within ``width`` standard errors of the truth."""
    estimates = np.asarray(estimates, np.float64)
    error = estimates.std(0, ddof=1) / np.sqrt(len(estimates))
    assert np.all(np.abs(estimates.mean(0) - truth) < width * error), (estimates.mean(0), truth, error)


def follow(strategy, path, repetitions, seed):
    """``(log Z, weighted means, resampled)`` along a path, ``[R, K]``, of independent populations."""

    def repeat(key):
        key_init, key_run = random.split(key)
        state = strategy.init(key_init, path(0.0))

        def body(state, k):
            now, after = path(k / K), path((k + 1) / K)
            state, info = strategy.advance(random.fold_in(key_run, k), now, after, state, None)
            walk, _, said = strategy.prepare(key_run, after, state)
            means = jnp.stack([jnp.sum(walk.weight * f(walk.position)) for f in FUNCTIONS])
            # The cache belongs to the walkers as they stand, resampled or not.
            stale = jnp.max(jnp.abs(state.jarzynski.log_density - after.log_density(state.position)))
            return state, (said["log_z"], means, info["resampled"], stale)

        return jax.lax.scan(body, state, jnp.arange(K))[1]

    return jax.jit(jax.vmap(repeat))(random.split(random.key(seed), repetitions))


SCHEDULE = lambda k: 0.02 / (1.0 + k / 10)


@pytest.mark.parametrize(
    ("path", "kernel", "num_moves"),
    [
        (moving_gaussian, ULA(0.05), 1),
        (moving_gaussian, MALA(0.3, precondition=False, adapt_step=False), 1),
        # With a step that changes on the way the increment uses the one the move was made with.
        (moving_double_well, ULA(SCHEDULE), 2),
        (moving_double_well, MALA(0.3, precondition=False, adapt_step=False), 1),
    ],
    ids=["gaussian-ULA", "gaussian-MALA", "wells-ULA-schedule", "wells-MALA"],
)
def test_jarzynski_weights_give_log_z_through_resampling(path, kernel, num_moves):
    """Z is estimated without bias at every step, the first included; weighted means are right up to O(1/P)."""
    strategy = Persistent(num_walkers=400, kernel=kernel, num_moves=num_moves, weighted=True, threshold=0.9)
    log_z, means, resampled, stale = follow(strategy, path, 64, 0)
    assert np.mean(resampled.sum(1)) >= 1  # every population has been resampled, on average
    np.testing.assert_allclose(stale, 0, atol=1e-4)
    for k in (0, K // 2, K - 1):
        truth, expectation = quadrature(path((k + 1) / K))
        unbiased(np.exp(log_z[:, k] - truth), 1.0)
        unbiased(means[:, k], expectation, 4)
        assert np.std(log_z[:, k]) < 0.3  # or the check above would say nothing


FAR = 6.0  # no walker crosses from one mode to the other


def two_modes(a):
    """30 % in N(a, 1), 70 % in N(FAR, 1): the masses are those at any ``a``."""
    left, right = np.log(0.3), np.log(0.7)
    return tilted(lambda x: -jnp.logaddexp(left + log_base(x - a), right + log_base(x - FAR)) + log_base(x))


def masses_under_a_mode_that_walkers_move(num_passive):
    """Share of walkers in the left mode, ``[R]``, after 200 steps in which its place follows a noisy gradient."""
    strategy = Persistent(200, MALA(1.0, precondition=False, adapt_step=False), weighted=True, num_passive=num_passive)

    def repeat(key):
        state = strategy.init(key, two_modes(-FAR))

        def body(carry, k):
            state, a = carry
            walk, _, _ = strategy.prepare(key, two_modes(a), state)
            gradient = jnp.sum(jnp.where(walk.position < 0, walk.weight * (walk.position - a), 0.0))
            # As a fit does: against the walkers' mean, towards the data's.
            after = a - (gradient + 0.3 * (a + FAR))
            state, _ = strategy.advance(random.fold_in(key, k), two_modes(a), two_modes(after), state, None)
            return (state, after), None

        (state, _), _ = jax.lax.scan(body, (state, jnp.float32(-FAR)), jnp.arange(200))
        first = 200 if num_passive else 0
        return jnp.sum(jnp.where(state.position[first:] < 0, jax.nn.softmax(state.log_weight[first:]), 0.0))

    return np.asarray(jax.jit(jax.vmap(repeat))(random.split(random.key(2), 60)))


def test_walkers_that_choose_the_way_lose_masses_and_those_that_are_relieved_do_not():
    alone, relieved = (masses_under_a_mode_that_walkers_move(n) for n in (0, 400))
    unbiased(relieved, 0.3)
    assert 0.3 - alone.mean() > 0.1, alone.mean()


@pytest.mark.unit
def test_halves_of_the_walkers_take_turns_and_begin_again_at_passive_ones():
    strategy = Persistent(8, MALA(), weighted=True, num_passive=16)
    density = moving_gaussian(0.0)
    state = strategy.init(random.key(0), density)
    # Passive walkers that stand elsewhere: draws of these are recognised.
    position = jnp.where(jnp.arange(24) < 8, state.position, 50.0 + jnp.arange(24))
    far = state._replace(position=position)
    on_duty = lambda s: strategy.prepare(random.key(1), density, s)[0].position
    for k in (0, TURN - 1, TURN, 2 * TURN - 1, 2 * TURN):
        at = far._replace(adapt=far.adapt._replace(count=jnp.int32(k)))
        half = slice(0, 4) if k // TURN % 2 == 0 else slice(4, 8)
        np.testing.assert_array_equal(on_duty(at), position[half])
        after, _ = strategy._resample(random.key(k), Weighted(position, jnp.zeros(24), jnp.zeros(24)), jnp.int32(k))
        relieved = np.asarray(after.position[:8] > 40)
        expected = np.zeros(8, bool)
        expected[half] = (k + 1) % TURN == 0
        np.testing.assert_array_equal(relieved, expected)
    with pytest.raises(ValueError, match="must be even, got 7"):
        Persistent(7, weighted=True, num_passive=4)


@pytest.mark.unit
def test_unweighted_walkers_lag_behind():
    """What the weights are for: the same walkers without them are biased on the same path."""
    strategy = Persistent(num_walkers=400, kernel=ULA(0.05), num_moves=2)

    def repeat(key):
        state = strategy.init(key, moving_gaussian(0.0))

        def body(state, k):
            density = moving_gaussian(k / K)
            return strategy.advance(random.fold_in(key, k), density, density, state, None)[0], None

        return jax.lax.scan(body, state, jnp.arange(K))[0].position.mean()

    means = jax.jit(jax.vmap(repeat))(random.split(random.key(1), 60))
    error = np.std(means) / np.sqrt(60)
    assert 1.0 - np.mean(means) > 10 * error


@pytest.mark.unit
def test_weights_only_for_kernels_that_have_increments():
    with pytest.raises(ValueError, match="Underdamped"):
        Persistent(kernel=Underdamped(), weighted=True)


@pytest.mark.unit
@pytest.mark.parametrize(
    ("kernel", "variance"),
    [(ULA(0.2), 0.5 / (1 - 0.2)), (MALA(), 0.5), (Underdamped(0.05), 0.5)],
    ids=["ULA", "MALA", "Underdamped"],
)
def test_persistent_walkers_find_a_density_that_rests(kernel, variance):
    """N(0, 1/2): ULA's variance is 1 / (p (1 − h p / 2)) with precision p = 2."""
    density = tilted(lambda x: 0.5 * x**2)
    strategy = Persistent(num_walkers=20_000, kernel=kernel)

    def run(key):
        state = strategy.init(key, density)
        body = lambda s, k: (strategy.advance(k, density, density, s, None)[0], None)
        return jax.lax.scan(body, state, random.split(key, 150))[0]

    state = jax.jit(run)(random.key(3))
    bias = 0.03 if kernel.has_momentum else 0.0  # about h/3 of 0.5, see test_kernels for the exact law
    assert abs(float(state.position.var()) - variance) < bias + 5 * variance * np.sqrt(2 / 20_000)


# --- Annealed and Tempered ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strategy", "steps", "burn_in"),
    [(Annealed(num_walkers=256), 40, 0), (Tempered(num_walkers=64, num_rungs=6, num_moves=2), 300, 60)],
    ids=["Annealed", "Tempered"],
)
def test_double_well_at_every_step(strategy, steps, burn_in):
    """Barrier of 9 nats and wells of weight 0.79 and 0.21: log Z and expectations against quadrature."""
    density = tilted(lambda x: 3 * (x**2 - 1.7) ** 2 - 0.5 * x - 0.5 * x**2)
    truth, expectation = quadrature(density)

    def repeat(key):
        key_init, key_run = random.split(key)
        state = strategy.init(key_init, density)

        def body(state, key):
            walk, state, info = strategy.prepare(key, density, state)
            means = jnp.stack([jnp.sum(walk.weight * f(walk.position)) for f in FUNCTIONS])
            return state, (info["log_z"], means)

        return jax.lax.scan(body, state, random.split(key_run, steps))[1]

    log_z, means = jax.jit(jax.vmap(repeat))(random.split(random.key(4), 16))
    log_z, means = np.asarray(log_z)[:, burn_in:], np.asarray(means)[:, burn_in:]
    if isinstance(strategy, Annealed):
        unbiased(np.exp(log_z - truth).mean(1), 1.0)
    else:
        # The log of Bennett's ratio has a bias of the order of its variance.
        error = log_z.mean(1).std(ddof=1) / np.sqrt(len(log_z))
        assert abs(log_z.mean() - truth) < 3 * error + log_z.var() / 2
    unbiased(means.mean(1), expectation)
    assert log_z.std() < 0.4


def test_tempered_ladder_equalises_rejection():
    density = tilted(lambda x: 8 * (x - 1) ** 2)
    strategy = Tempered(num_walkers=64, num_rungs=6)

    def run(key):
        state = strategy.init(key, density)
        body = lambda s, k: (strategy.prepare(k, density, s)[1], None)
        return jax.lax.scan(body, state, random.split(key, 800))[0]

    ladder = jax.jit(run)(random.key(5)).ladder
    assert ladder.temperature[0] == 0 and ladder.temperature[-1] == 1
    assert np.all(np.diff(ladder.temperature) > 0)
    # A running mean over 20 steps of 64 walkers each has a relative error of a few per cent.
    assert np.max(ladder.rejection) < 1.5 * np.min(ladder.rejection)


def exact_rungs(key, temperature, P, precision=4.0):
    """Independent exact draws of every rung, N(0, 1 / (1 + t precision)), with what is cached of them."""
    x = random.normal(key, (len(temperature), P)) / jnp.sqrt(1 + temperature[:, None] * precision)
    return Evaluated(x, log_base(x), 0.5 * precision * x**2, -x, precision * x)


@pytest.mark.unit
@pytest.mark.parametrize("parity", [0, 1])
def test_swaps_preserve_the_joint_distribution(parity):
    """Exact draws of all rungs stay exact and independent, and caches go with their walkers."""
    P, temperature = 200_000, jnp.array([0.0, 0.2, 0.6, 1.0])
    known = exact_rungs(random.key(6), temperature, P)
    ladder = Ladder(temperature, jnp.zeros(3), jnp.zeros(3), jnp.asarray(parity, jnp.int32))
    x, base, energy, grad_base, grad_energy = jax.jit(swap)(random.key(7), known, ladder)
    np.testing.assert_array_equal(energy, 0.5 * 4.0 * x**2)
    np.testing.assert_allclose(base, log_base(x), rtol=1e-6)
    np.testing.assert_array_equal(grad_base, -x)
    np.testing.assert_array_equal(grad_energy, 4.0 * x)
    # As a set nothing is gained or lost, in each of the P columns.
    np.testing.assert_array_equal(np.sort(x, 0), np.sort(known.position, 0))
    moved = np.asarray(x != known.position).mean(1)
    pairs = [(0, 1), (2, 3)] if parity == 0 else [(1, 2)]
    for a, b in pairs:
        assert moved[a] == moved[b] and 0.3 < moved[a] < 1.0
    assert all(moved[r] == 0 for r in range(4) if not any(r in pair for pair in pairs))
    z = np.asarray(x, np.float64) * np.sqrt(1 + np.asarray(temperature)[:, None] * 4.0)
    square = z**2
    assert np.all(np.abs(square.mean(1) - 1) < 5 * np.sqrt(2 / P))
    assert np.all(np.abs((z**4).mean(1) - 3) < 5 * np.sqrt(96 / P))
    assert np.all(np.abs(np.corrcoef(z) - np.eye(4)) < 5 / np.sqrt(P))
    assert np.all(np.abs(np.corrcoef(square) - np.eye(4)) < 5 / np.sqrt(P))


@pytest.mark.unit
def test_swaps_refuse_what_is_not_finite():
    temperature = jnp.array([0.0, 1.0])
    ladder = Ladder(temperature, jnp.zeros(1), jnp.zeros(1), jnp.zeros((), jnp.int32))
    for bad in (jnp.inf, jnp.nan):
        x = jnp.array([[5.0] * 100, [0.0] * 100])
        energy = jnp.array([[bad] * 100, [1.0] * 100])
        after = swap(random.key(0), Evaluated(x, x, energy, x, x), ladder)
        np.testing.assert_array_equal(after.position, x)


def test_tempered_moves_leave_every_rung_invariant():
    """One whole step from exact draws of all rungs, with fixed temperatures and step sizes."""
    P, rungs = 60_000, 4
    density = tilted(lambda x: 2.0 * x**2)
    strategy = Tempered(num_walkers=P, num_rungs=rungs, num_moves=2)
    temperature = jnp.linspace(0, 1, rungs) ** 2
    x, *_ = exact_rungs(random.key(8), temperature, P)
    ladder = Ladder(temperature, jnp.full(rungs - 1, np.log(0.2)), jnp.full(rungs - 1, 0.1), jnp.zeros((), jnp.int32))
    state = TemperedState(x, ladder, Reference(jnp.zeros(1), jnp.eye(1), jnp.zeros(1)))  # the base itself
    walk, state, info = jax.jit(lambda k, s: strategy.prepare(k, density, s))(random.key(9), state)
    z = np.asarray(state.position) * np.sqrt(1 + np.asarray(temperature)[:, None] * 4.0)
    assert np.all(np.abs((z**2).mean(1) - 1) < 5 * np.sqrt(2 / P))
    assert np.all(np.abs((z**4).mean(1) - 3) < 5 * np.sqrt(96 / P))
    # What enters the gradient are the walkers of all rungs, weighted to the prior N(0, 1/5); the last rung is shown.
    np.testing.assert_array_equal(walk.position[-P:], state.position[-1])
    np.testing.assert_array_equal(strategy.draw(random.key(0), walk, state), state.position[-1])
    z, weight, number = np.sqrt(5) * walk.position, walk.weight, P * float(info["ess"])
    assert number > 1.5 * P and float(weight.sum()) == pytest.approx(1, abs=1e-4)
    assert abs(float((weight * z**2).sum()) - 1) < 5 * np.sqrt(2 / number)
    assert abs(float((weight * z**4).sum()) - 3) < 5 * np.sqrt(96 / number)
    # Bennett's estimate from P exact draws at each rung.
    assert float(info["log_z"]) == pytest.approx(-0.5 * np.log(5), abs=5 * 2 / np.sqrt(P))


@pytest.mark.slow
def test_passive_walkers_estimate_log_z_without_having_chosen_the_parameters():
    """Walkers that move the parameter by their own mean find log Z low by Σ rate · Var / P; passive ones do not.

    Energy a·x under N(0, 1): log Z = a²/2, and each step adds ``rate · mean(x)`` of the walkers to a, whose sign makes
    E fall where they happen to be. (Gaussian mixture of 2305.19414: 0.28 nats low after 8,000 steps.)
    """
    P, steps, rate = 50, 60, 0.05

    def repeat(key, num_passive):
        strategy = Persistent(P, MALA(0.5, adapt_step=False), weighted=True, num_passive=num_passive, threshold=0.0)
        at = lambda a: tilted(lambda x: a * x)
        state = strategy.init(key, at(0.0))

        def body(carry, k):
            state, a = carry
            walk, state, said = strategy.prepare(key, at(a), state)
            new = a + rate * jnp.sum(walk.weight * walk.position)
            state, _ = strategy.advance(random.fold_in(key, k), at(a), at(new), state, None)
            return (state, new), said["log_z"] - a**2 / 2

        return jax.lax.scan(body, (state, 0.0), jnp.arange(steps))[1][-1]

    keys = random.split(random.key(5), 400)
    own = np.asarray(jax.vmap(lambda key: repeat(key, 0))(keys))
    apart = np.asarray(jax.vmap(lambda key: repeat(key, 200))(keys))
    bias = -rate * steps / P
    assert abs(own.mean() - bias) < 4 * own.std() / 20 + 0.3 * abs(bias)
    assert abs(apart.mean()) < 4 * apart.std() / 20 + apart.var() / 2
    assert abs(bias) > 8 * apart.std() / 20  # or the line above would say nothing
