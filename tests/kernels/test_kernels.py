"""Transition kernels on their own: what they leave invariant, and by how much the unadjusted ones miss it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random
from scipy import integrate, linalg

from numpyro_ebipla import MALA, ULA, Underdamped
from numpyro_ebipla._core.tree import batched_value_and_grad
from numpyro_ebipla.kernels import Point, mala, start


def target_of(log_density):
    return batched_value_and_grad(lambda p: log_density(p["x"]))


def run(kernel, log_density, x, num_moves, key=0, adapting=True, adapt=None):
    """Final point, adaptation, and positions and acceptances of all moves."""
    target = target_of(log_density)
    point, fresh = start(kernel, target, {"x": x})
    point = Point(point.position, None, None, point.momentum)
    adapt = fresh if adapt is None else adapt

    def body(carry, key):
        point, adapt = carry
        here = point._replace(**dict(zip(("log_density", "gradient"), target(point.position), strict=True)))
        new, info = kernel.move(key, target, here, adapt)
        if adapting:
            adapt = kernel.adapt(adapt, info, here)
        # Drop what is known, so that the carry has one structure for all kernels.
        return (new._replace(log_density=None, gradient=None), adapt), (new.position["x"], info.accept_prob)

    scan = jax.jit(lambda c, k: jax.lax.scan(body, c, k))
    (point, adapt), (path, accept) = scan((point, adapt), random.split(random.key(key), num_moves))
    return point, adapt, path, accept


def close(estimates, truth, width=5.0):
    """Whether the mean of independent estimates lies within ``width`` of their standard errors of the truth."""
    estimates = np.asarray(estimates, np.float64)
    error = estimates.std(0, ddof=1) / np.sqrt(len(estimates))
    assert np.all(np.abs(estimates.mean(0) - truth) < width * error + 1e-9), (estimates.mean(0), truth, error)
    return error


def moments(log_density, powers, low=-12.0, high=12.0):
    """E[x^p] under an unnormalised density in one dimension, by quadrature."""
    grid = np.linspace(low, high, 200_001)
    weight = np.exp(np.vectorize(log_density, otypes=[float])(grid)) if np.isscalar(log_density(0.0)) else None
    if weight is None:
        weight = np.exp(np.asarray(log_density(grid)))
    return [np.trapezoid(grid**p * weight, grid) / np.trapezoid(weight, grid) for p in powers]


gauss = lambda x: -0.5 * jnp.sum(x**2, -1)
# A skewed and light-tailed target in one dimension.
quartic = lambda x: -0.25 * x**4 + x


# --- ULA ----------------------------------------------------------------------------------------------


def test_ula_bias_is_linear_in_the_step_size():
    """Stationary variance 1 / (1 − h/2) for the standard normal: excess h/2 + O(h²)."""
    steps, excess = np.array([0.1, 0.2, 0.4]), []
    for h in steps:
        # Start at the claimed law: 60,000 independent chains, then enough moves to forget 1e-3 of it.
        x = random.normal(random.key(1), (60_000, 1))
        point, *_ = run(ULA(float(h)), gauss, x, int(8 / h))
        square = np.asarray(point.position["x"][:, 0]) ** 2
        close(square, 1 / (1 - h / 2), 4)
        excess.append(square.mean() - 1)
    # Relative errors of the excesses are √2·var / (√60000 · excess): 11 %, 6 % and 3 %.
    exact = 1 / (1 - steps / 2) - 1
    slope = np.polyfit(np.log(steps), np.log(excess), 1)[0]
    want = np.polyfit(np.log(steps), np.log(exact), 1)[0]
    assert abs(slope - want) < 0.25 and 0.8 < slope < 1.4


@pytest.mark.unit
def test_ula_is_euler_maruyama():
    h, x = 0.05, jnp.arange(6.0).reshape(3, 2)
    target = target_of(gauss)
    point, adapt = start(ULA(h), target, {"x": x})
    new, info = ULA(h).move(random.key(0), target, point, adapt)
    noise = random.normal(random.split(random.key(0), 1)[0], x.shape)
    np.testing.assert_allclose(new.position["x"], x - h * x + np.sqrt(2 * h) * noise, rtol=1e-5, atol=1e-6)
    assert new.log_density is None and new.gradient is None  # known where it stood, not where it stands
    assert float(info.accept_prob) == 1


@pytest.mark.unit
def test_ula_uses_the_gradient_that_is_there():
    def refuse(_):
        raise AssertionError("a gradient that is known was computed again")

    point, adapt = start(ULA(0.1), target_of(gauss), {"x": jnp.ones((3, 2))})
    ULA(0.1).move(random.key(0), refuse, point, adapt)


@pytest.mark.unit
@pytest.mark.parametrize("kind", [ULA, Underdamped])
def test_step_size_schedule(kind):
    kernel = kind(step_size=lambda k: 0.5 / (1.0 + k))
    x = jnp.zeros((4, 2))
    *_, adapt, _, _ = run(kernel, gauss, x, 3)
    np.testing.assert_allclose(jnp.exp(adapt.log_step), 0.5 / 4, rtol=1e-6)
    assert int(adapt.count) == 3


# --- MALA ---------------------------------------------------------------------------------------------


def test_mala_is_exact_on_a_skewed_target():
    """Zero bias at a step size where ULA's is large: moments against quadrature."""
    powers = (1, 2, 3, 4)
    truth = moments(lambda x: -0.25 * x**4 + x, powers)
    # From N(0, 1/4): of a target with lighter tails than a Gaussian's MALA cannot leave far tails.
    x = 0.5 * random.normal(random.key(2), (40_000,))
    kernel = MALA(step_size=0.4, precondition=False, adapt_step=False)
    point, adapt, _, accept = run(kernel, quartic, x, 60)
    assert float(jnp.exp(adapt.log_step)) == pytest.approx(0.4)  # nothing adapts
    assert 0.5 < float(accept.mean()) < 0.95
    for power, want in zip(powers, truth, strict=True):
        close(point.position["x"] ** power, want, 4)
    # The test can see a bias: ULA's, at an eighth of the step, is 4 standard errors in the fourth moment.
    biased, *_ = run(ULA(0.05), quartic, x, 200)
    fourth = np.asarray(biased.position["x"]) ** 4
    assert abs(fourth.mean() - truth[3]) > 3 * fourth.std() / np.sqrt(len(fourth))


@pytest.mark.unit
def test_mala_keeps_exact_draws_exact():
    """Invariance, from exact draws by inverting the distribution function: no burn-in can hide a fault."""
    grid = np.linspace(-6, 6, 20_001)
    cdf = integrate.cumulative_trapezoid(np.exp(-0.25 * grid**4 + grid), grid, initial=0)
    u = np.random.default_rng(0).uniform(size=200_000)
    x = jnp.asarray(np.interp(u, cdf / cdf[-1], grid), jnp.float32)
    kernel = MALA(step_size=0.6, precondition=False, adapt_step=False)
    point, *_ = run(kernel, quartic, x, 3)
    edges = np.interp(np.linspace(0, 1, 41), cdf / cdf[-1], grid)
    counts = np.histogram(point.position["x"], edges)[0]
    expected = len(u) / 40
    # χ² with 39 degrees of freedom has mean 39 and standard deviation √78.
    assert np.sum((counts - expected) ** 2) / expected < 39 + 5 * np.sqrt(78)


@pytest.mark.unit
def test_every_chain_is_accepted_on_its_own():
    """Refused chains stand still while their neighbours move, in all coordinates and sites."""
    P = 400
    x = {"a": random.normal(random.key(3), (P, 2)), "b": random.normal(random.key(4), (P,))}
    stiff = jnp.where(jnp.arange(P) % 2 == 0, 1.0, 400.0)
    target = batched_value_and_grad(lambda p: -0.5 * stiff * (jnp.sum(p["a"] ** 2, -1) + p["b"] ** 2))
    kernel = MALA(step_size=0.3, precondition=False, adapt_step=False)
    point, adapt = start(kernel, target, x)
    new, info = kernel.move(random.key(5), target, point, adapt)
    moved = np.asarray(new.position["b"] != x["b"])
    np.testing.assert_array_equal(np.asarray(new.position["a"] != x["a"]), np.stack([moved, moved], 1))
    assert moved[::2].mean() > 0.5 and moved[1::2].mean() < 0.1
    # What is cached belongs to where each chain stands.
    value, gradient = target(new.position)
    np.testing.assert_allclose(new.log_density, value, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), new.gradient, gradient)
    assert 0 < float(info.accept_prob) < 1


@pytest.mark.parametrize(("first", "goal"), [(0.02, 0.5), (0.2, 0.65), (5.0, 0.9)])
def test_step_size_reaches_its_target_acceptance(first, goal):
    x = random.normal(random.key(6), (500, 5))
    _, adapt, _, accept = run(MALA(step_size=first, target_accept=goal), gauss, x, 900)
    # The mean over 400 moves of 500 chains has a Monte Carlo error of 1e-3; what remains of the start is less.
    assert abs(float(accept[500:].mean()) - goal) < 0.01
    assert float(jnp.exp(adapt.log_step)) > 0.05


def test_preconditioner_finds_scales_that_differ_by_ten_thousand():
    """Also from far out: scales from the mean squared gradient alone held the chains there for 10,000 moves."""
    scale = jnp.array([1e-2, 1.0, 1e2])
    log_density = lambda x: -0.5 * jnp.sum((x / scale) ** 2, -1)
    x = random.normal(random.key(7), (2000, 3))  # 100 deviations out in one coordinate, a hundredth in another
    _, adapt, *_ = run(MALA(), log_density, x, 1500)
    np.testing.assert_allclose(jnp.sqrt(adapt.curvature["x"]) * scale, 1.0, atol=0.1)
    # Draws at the adapted step and scales, from exact ones.
    exact = random.normal(random.key(8), (40_000, 3)) * scale
    point, _, _, accept = run(MALA(), log_density, exact, 20, adapting=False, adapt=adapt)
    close((point.position["x"] / scale) ** 2, 1.0, 4)
    assert float(accept.mean()) == pytest.approx(0.65, abs=0.05)
    # All coordinates forget their start at the same pace.
    lag = np.mean(np.asarray(exact * point.position["x"] / scale**2), 0)
    assert np.ptp(lag) < 10 / np.sqrt(40_000) and np.all(lag < 0.1)


def test_a_curvature_of_another_place_is_forgotten(monkeypatch):
    """Chains begin where the target is 1e12 times steeper: their mean squared gradient stayed for 5000 moves.

    In equilibrium nothing is: the running mean goes on as it is, bit for bit.
    """
    wall = lambda x: -0.5 * jnp.sum(x**2, -1) - 1e12 * jnp.sum(jnp.maximum(jnp.abs(x) - 6, 0.0), -1)
    x = jnp.where(jnp.arange(500)[:, None] % 2, 6.5, random.normal(random.key(0), (500, 2)))
    _, adapt, _, accept = run(MALA(), wall, x, 1500)
    np.testing.assert_allclose(adapt.curvature["x"], 1.0, atol=0.3)
    assert float(accept[1300:].mean()) == pytest.approx(0.65, abs=0.05)
    few = random.normal(random.key(1), (4, 2))
    with_it = run(MALA(), gauss, few, 500)[1]
    monkeypatch.setattr(mala, "ELSEWHERE", 0.0)
    jax.tree.map(np.testing.assert_array_equal, with_it, run(MALA(), gauss, few, 500)[1])


def correlated(num_sites, condition=1e4, dim=5):
    """A rotated Gaussian of that condition number, its coordinates in one site or in several; and its covariance."""
    rng = np.random.default_rng(0)
    rotation = np.linalg.qr(rng.normal(size=(dim, dim)))[0]
    covariance = rotation * np.array([1 / condition] + [1.0] * (dim - 1)) @ rotation.T
    precision = jnp.asarray(np.linalg.inv(covariance), jnp.float32)
    split = np.cumsum([2] * (num_sites - 1)).tolist()

    def parts(x):
        return dict(zip("abc", jnp.split(x, split, axis=-1), strict=False))

    def log_density(p):
        x = jnp.concatenate([p[k] for k in sorted(p)], -1)
        return -0.5 * jnp.einsum("...i,ij,...j", x, precision, x)

    return batched_value_and_grad(log_density), parts, covariance


@pytest.mark.parametrize(("num_sites", "chains"), [(1, (400,)), (2, (400,)), (2, (4, 100))])
def test_correlated_coordinates_are_decoupled(num_sites, chains):
    """A posterior of condition number 10⁴ in a rotated direction: scales alone need 10⁴ moves to forget their start."""
    target, parts, covariance = correlated(num_sites)
    kernel = MALA()
    point, adapt = start(kernel, target, parts(random.normal(random.key(0), (*chains, 5))))

    def move(carry, key):
        point, adapt = carry
        point, info = kernel.move(key, target, point, adapt)
        return (point, kernel.adapt(adapt, info, point)), None

    (point, adapt), _ = jax.lax.scan(move, (point, adapt), random.split(random.key(1), 1500))
    scale = np.concatenate([np.asarray(adapt.curvature[k]) for k in sorted(adapt.curvature)]) ** -0.5
    inverse = np.linalg.inv(np.asarray(adapt.coupling[0], float))
    shape = scale[:, None] * inverse.T @ inverse * scale
    root = np.linalg.cholesky(np.linalg.inv(covariance))
    spread = np.linalg.eigvalsh(root.T @ shape @ root)
    assert spread.max() / spread.min() < 2  # 10⁴ without
    # From exact draws, with all adaptation held, the distribution stays, and the start is soon forgotten.
    exact = np.random.default_rng(2).multivariate_normal(np.zeros(5), covariance, chains).astype(np.float32)
    value, gradient = target(parts(jnp.asarray(exact)))
    point = point._replace(position=parts(jnp.asarray(exact)), log_density=value, gradient=gradient)
    hold = lambda point, key: (kernel.move(key, target, point, adapt)[0], None)
    point, _ = jax.lax.scan(hold, point, random.split(random.key(3), 20))
    x = np.concatenate([np.asarray(point.position[k], float) for k in sorted(point.position)], -1).reshape(-1, 5)
    white = x @ np.linalg.inv(np.linalg.cholesky(covariance)).T
    close(white**2, 1.0, 4)
    before = exact.reshape(-1, 5) @ np.linalg.inv(np.linalg.cholesky(covariance)).T
    assert np.all(np.abs((white * before).mean(0)) < 0.05 + 4 / np.sqrt(len(x)))


@pytest.mark.unit
def test_decoupled_moves_leave_the_target_as_it_is():
    """A wrong factor costs acceptance, never truth: 40,000 exact draws of a correlated target, moved ten times."""
    target, parts, covariance = correlated(1, condition=10.0, dim=2)
    kernel = MALA(step_size=0.05, adapt_step=False)
    exact = np.random.default_rng(4).multivariate_normal(np.zeros(2), covariance, 40_000).astype(np.float32)
    point, adapt = start(kernel, target, parts(jnp.asarray(exact)))
    adapt = adapt._replace(coupling=jnp.array([[[1.0, 0.0], [0.6, 0.8]]]), curvature={"a": jnp.array([2.0, 0.7])})
    hold = lambda point, key: kernel.move(key, target, point, adapt)
    point, info = jax.lax.scan(hold, point, random.split(random.key(5), 10))
    white = np.asarray(point.position["a"], float) @ np.linalg.inv(np.linalg.cholesky(covariance)).T
    close(white**2, 1.0, 4)
    close(white[:, 0] * white[:, 1], 0.0, 4)
    assert 0.3 < float(info.accept_prob.mean()) < 0.95


def test_sites_of_different_types_keep_them():
    target = batched_value_and_grad(lambda p: -0.5 * (p["a"] ** 2 + 2 * (p["b"] - p["a"]) ** 2).astype(jnp.float32))
    x = {"a": random.normal(random.key(0), (50,), jnp.float16), "b": random.normal(random.key(1), (50,))}
    kernel = MALA()
    point, adapt = start(kernel, target, x)
    assert adapt.coupling.dtype == jnp.float32
    for key in random.split(random.key(2), 3):
        point, info = kernel.move(key, target, point, adapt)
        adapt = kernel.adapt(adapt, info, point)
    assert (point.position["a"].dtype, point.position["b"].dtype) == (jnp.float16, jnp.float32)
    assert adapt.coupling.dtype == jnp.float32 and float(adapt.coupling[0, 1, 0]) < 0


@pytest.mark.unit
def test_where_the_curvature_is_negative_nothing_is_learned():
    """A Hessian of negative trace has no proposals of its shape."""
    target = batched_value_and_grad(lambda p: 0.05 * jnp.sum(p["x"] ** 2, -1) - 0.03 * p["x"][..., 0] * p["x"][..., 1])
    kernel = MALA(step_size=0.01)
    point, adapt = start(kernel, target, {"x": random.normal(random.key(0), (4000, 2))})
    _, info = kernel.move(random.key(1), target, point, adapt)
    np.testing.assert_array_equal(kernel.adapt(adapt, info, point).coupling[0], np.eye(2))


def test_the_coupling_of_each_group_is_learned():
    """100 groups of two coordinates, whose correlations differ: scales alone leave 39 of that of 0.95."""
    correlation = np.linspace(-0.95, 0.95, 100)
    inverse = np.stack([np.linalg.inv([[1, r], [r, 1]]) for r in correlation])

    def log_density(p):
        x = p["x"] / jnp.array([1.0, 20.0])
        return -0.5 * jnp.einsum("...gi,gij,...gj->...", x, inverse.astype(np.float32), x)

    target, kernel = batched_value_and_grad(log_density), MALA()
    noise = random.normal(random.key(0), (128, 100, 2)) * jnp.array([1.0, 20.0])
    point, adapt = start(kernel, target, {"x": noise})
    assert adapt.coupling.shape == (100, 2, 2)

    def move(carry, key):
        point, adapt = carry
        point, info = kernel.move(key, target, point, adapt)
        return (point, kernel.adapt(adapt, info, point)), None

    (point, adapt), _ = jax.lax.scan(move, (point, adapt), random.split(random.key(1), 400))
    scale = np.asarray(adapt.curvature["x"]) ** -0.5 / np.array([1, 20])
    factor = np.linalg.inv(np.asarray(adapt.coupling, float))
    shape = scale[:, :, None] * (factor.swapaxes(1, 2) @ factor) * scale[:, None]
    spread = np.linalg.eigvals(shape @ inverse).real
    assert np.all(spread.max(1) / spread.min(1) < 2)


@pytest.mark.unit
def test_coupling_is_not_learned_of_many_coordinates():
    _, adapt = start(
        MALA(), batched_value_and_grad(lambda p: -0.5 * jnp.sum(p["x"] ** 2, -1)), {"x": jnp.ones((3, 2, 33))}
    )
    assert adapt.coupling is None


@pytest.mark.unit
def test_preconditioner_is_optional():
    _, adapt, *_ = run(MALA(precondition=False), gauss, jnp.ones((50, 2)), 10)
    assert adapt.curvature is None
    _, fixed, *_ = run(MALA(adapt_step=False), gauss, jnp.ones((50, 2)), 10)
    assert float(jnp.exp(fixed.log_step)) == pytest.approx(0.2)


@pytest.mark.unit
def test_nothing_gets_past_a_wall():
    """NaN beyond x = 0: no chain goes there, and the half normal is sampled exactly."""
    wall = lambda x: jnp.where(x > 0, -0.5 * x**2, jnp.nan)
    x = jnp.abs(random.normal(random.key(9), (40_000,)))
    kernel = MALA(step_size=0.3, precondition=False, adapt_step=False)
    point, _, _, accept = run(kernel, wall, x, 30)
    position = np.asarray(point.position["x"])
    assert np.all(position > 0) and np.all(np.isfinite(accept))
    close(position, np.sqrt(2 / np.pi), 4)
    close(position**2, 1.0, 4)


@pytest.mark.unit
def test_a_chain_that_starts_beyond_the_wall_leaves():
    bad = lambda x: jnp.where(jnp.abs(x) < 3, -0.5 * x**2, -jnp.inf)
    point, adapt, _, _ = run(MALA(), bad, jnp.linspace(-3.3, 3.3, 100), 300)
    assert np.all(np.abs(point.position["x"]) < 3)
    for leaf in jax.tree.leaves(adapt):
        assert np.all(np.isfinite(leaf))


# --- Underdamped --------------------------------------------------------------------------------------


def underdamped_by_hand(h, gamma, curvature):
    """``(A, Q)`` of the linear recursion of (x, v) for a Gaussian target, its noise by quadrature."""
    decay = np.exp(-gamma * h)
    drift = (1 - decay) / gamma
    A = np.array([[1 - (h - drift) / gamma * curvature, drift], [-drift * curvature, decay]])
    # Response of (x, v) at time h to a kick of v at time h − s.
    response = lambda s: np.array([(1 - np.exp(-gamma * s)) / gamma, np.exp(-gamma * s)])
    grid = np.linspace(0, h, 20_001)
    outer = np.einsum("it,jt->ijt", response(grid), response(grid)) * 2 * gamma
    return A, np.trapezoid(outer, grid)


@pytest.mark.unit
@pytest.mark.parametrize(("h", "gamma"), [(0.1, 2.0), (0.7, 2.0), (0.3, 0.5)])
def test_underdamped_noise_has_its_joint_covariance(h, gamma):
    P = 100_000
    kernel = Underdamped(h, gamma)
    x = {"x": jnp.full((P,), 0.8)}
    target = target_of(lambda x: -0.5 * x**2)
    point, adapt = start(kernel, target, x)
    point = point._replace(momentum={"x": jnp.full((P,), -1.2)})
    new, _ = kernel.move(random.key(0), target, point, adapt)
    A, Q = underdamped_by_hand(h, gamma, 1.0)
    got = np.stack([new.position["x"], new.momentum["x"]], 1).astype(np.float64) - A @ [0.8, -1.2]
    deviation = np.sqrt(np.diag(Q))
    close(got / deviation, 0.0)
    close(got[:, :, None] * got[:, None, :] / np.outer(deviation, deviation), Q / np.outer(deviation, deviation))


def test_underdamped_stationary_covariance():
    """Exact law of the discretised scheme, and the target's own as h → 0.

    A peer with the noises of position and velocity swapped had variance 2.16 where 0.5 is right.
    """
    target = lambda x: -0.5 * 2.0 * x**2  # variance 1/2
    for h, tolerance in ((0.5, None), (0.1, 0.02)):
        x = np.sqrt(0.5) * random.normal(random.key(1), (60_000,))
        point, *_ = run(Underdamped(h), target, x, int(12 / h))
        A, Q = underdamped_by_hand(h, 2.0, 2.0)
        law = linalg.solve_discrete_lyapunov(A, Q)
        z = np.stack([point.position["x"], point.momentum["x"]], 1).astype(np.float64)
        close(z[:, :, None] * z[:, None, :], law, 4)
        if tolerance:
            np.testing.assert_allclose(law, np.diag([0.5, 1.0]), atol=0.06)
            np.testing.assert_allclose(z.T @ z / len(z), np.diag([0.5, 1.0]), atol=0.06 + tolerance)


@pytest.mark.unit
def test_underdamped_bias_falls_linearly():
    bias = [linalg.solve_discrete_lyapunov(*underdamped_by_hand(h, 2.0, 1.0))[0, 0] - 1 for h in (0.02, 0.04)]
    assert bias[1] / bias[0] == pytest.approx(2, abs=0.1)


# --- all of them --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", [ULA(0.05), MALA(), Underdamped(0.3)], ids=lambda k: type(k).__name__)
def test_each_kernel_stands_alone(kernel):
    """Two sites of different shapes and two chain axes, in a plain loop."""
    target = batched_value_and_grad(lambda p: -0.5 * jnp.sum(p["a"] ** 2, -1) - 0.5 * p["b"] ** 2)
    x = {"a": jnp.zeros((30, 40, 2)), "b": jnp.zeros((30, 40))}
    point, adapt = start(kernel, target, x)
    move = jax.jit(lambda key, point, adapt: kernel.move(key, target, point, adapt))
    for key in random.split(random.key(0), 100):
        before = point
        point, info = move(key, point, adapt)
        if before.gradient is not None or not kernel.adjusted:
            adapt = kernel.adapt(adapt, info, point)
    for name, leaf in point.position.items():
        assert leaf.shape == x[name].shape and leaf.dtype == x[name].dtype
        # 1200 chains: ULA's excess 0.026 and Underdamped's 0.16 plus 5 standard errors of a variance.
        assert abs(float(leaf.var()) - 1) < 0.2 + 5 * np.sqrt(2 / 1200)


@pytest.mark.unit
@pytest.mark.parametrize("kernel", [ULA(0.05), MALA(), Underdamped(0.1)], ids=lambda k: type(k).__name__)
def test_chains_are_exchangeable(kernel):
    """What one chain does depends on the others' order only through its own noise: moments by halves agree."""
    x = jnp.concatenate([jnp.full((20_000, 1), 2.0), jnp.full((20_000, 1), -2.0)])
    if kernel.adjusted:
        kernel = MALA(precondition=False, adapt_step=False)
    _, _, path, _ = run(kernel, gauss, x, 5)
    first, second = np.asarray(path[-1][:20_000, 0]), -np.asarray(path[-1][20_000:, 0])
    error = np.hypot(first.std(), second.std()) / np.sqrt(20_000)
    assert abs(first.mean() - second.mean()) < 5 * error
    # Independent noises: no correlation between chains.
    assert abs(np.corrcoef(first, second)[0, 1]) < 5 / np.sqrt(20_000)


def test_data_with_narrow_posteriors_are_moved_as_well():
    """Sixteen chains of each of 30 data, whose standard deviations run over three orders of magnitude.

    With one step size for all data the narrow ones hardly ever move, and keep the variance of their start.
    """
    sds = jnp.geomspace(1e-2, 10, 30)
    x = random.normal(random.key(1), (16, 30)) * sds
    log_density = lambda x: -0.5 * jnp.square(x / sds)
    _, adapt, _, _ = run(MALA(), log_density, x, 1500)
    assert adapt.by_datum.log_step.shape == (30,) and np.all(adapt.by_datum.count == 1500)
    _, _, path, _ = run(MALA(), log_density, x, 1500, key=2, adapting=False, adapt=adapt)
    moved = np.mean(np.diff(path, axis=0) != 0, axis=(0, 1))
    np.testing.assert_allclose(moved, 0.65, atol=0.12)
    scaled = np.asarray(path / sds)
    # About 16 × 1500 / 5 independent draws of each.
    np.testing.assert_allclose(np.mean(scaled**2, axis=(0, 1)), 1, atol=5 * np.sqrt(2 / 4800))


def test_a_chain_far_out_in_a_steep_tail_comes_back():
    """A count of none at a log rate of 9 has a gradient of −8,000: an uncut drift overshoots, and is always refused."""
    x = jnp.concatenate([jnp.full(3, 9.0), jnp.full(997, -1.0)])
    log_density = lambda x: -jnp.exp(x) - 0.5 * jnp.square(x / 2)
    _, _, path, _ = run(MALA(), log_density, x, 1000)
    assert np.all(path[100][:3] < 4)
    grid = np.linspace(-15, 8, 100_001)
    p = np.exp(-np.exp(grid) - grid**2 / 8)
    p /= p.sum()
    mean, sd = (p * grid).sum(), np.sqrt((p * grid**2).sum() - (p * grid).sum() ** 2)
    assert np.mean(path[500:]) == pytest.approx(mean, abs=5 * sd / np.sqrt(1000 * 500 / 20))
