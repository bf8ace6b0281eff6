"""Importance weights against brute force, and the classical ways to get them wrong."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random

from numpyro_ebipla.smc.weights import (
    ess,
    log_mean_exp,
    normalised,
    resample,
    systematic_ancestors,
    ula_increment,
)


def log_weights(seed, shape):
    return 2 * random.normal(random.key(seed), shape)


@pytest.mark.unit
@pytest.mark.parametrize("shape", [(50,), (50, 3)])
@pytest.mark.parametrize("shift", [0.0, 3000.0, -3000.0], ids=["plain", "huge", "tiny"])
def test_against_brute_force_whatever_the_shift(shape, shift):
    # exp(±3000) over- and underflows even in float64: only a max-shift survives.
    a = log_weights(0, shape) + shift
    exact = np.asarray(a, np.float64) - shift
    w = np.exp(exact) / np.exp(exact).sum(0)
    np.testing.assert_allclose(normalised(a), w, rtol=2e-3)  # float32 keeps 2e-4 of 3000
    np.testing.assert_allclose(ess(a), 1 / (w**2).sum(0), rtol=5e-3)
    np.testing.assert_allclose(log_mean_exp(a), np.log(np.exp(exact).mean(0)) + shift, atol=1e-3)


@pytest.mark.unit
def test_ess_at_its_extremes():
    one = jnp.full(100, -jnp.inf).at[3].set(7.0)
    np.testing.assert_allclose(ess(one), 1.0, rtol=1e-6)
    np.testing.assert_allclose(ess(jnp.full(100, -5e4)), 100.0, rtol=1e-5)
    np.testing.assert_allclose(log_mean_exp(one), 7 - np.log(100), rtol=1e-6)


@pytest.mark.unit
def test_systematic_counts_are_floor_or_ceiling_and_unbiased():
    a = log_weights(1, (37,))
    expected = 37 * np.asarray(normalised(a), np.float64)
    K = 4000
    drawn = jax.jit(jax.vmap(systematic_ancestors, (0, None)))(random.split(random.key(2), K), a)
    counts = np.stack([np.bincount(row, minlength=37) for row in np.asarray(drawn)])
    assert np.all(counts >= np.floor(expected - 1e-4)) and np.all(counts <= np.ceil(expected + 1e-4))
    # A count is Bernoulli on top of its floor: standard deviation at most 1/2.
    assert np.abs(counts.mean(0) - expected).max() < 5 * 0.5 / np.sqrt(K)


@pytest.mark.unit
def test_walkers_of_zero_weight_are_never_chosen():
    a = jnp.where(jnp.arange(1000) % 7 == 3, 0.0, -jnp.inf)
    for seed in range(5):
        ancestors = np.asarray(systematic_ancestors(random.key(seed), a))
        assert np.all(ancestors % 7 == 3)
    # Where the first or last weights vanish the edges of the cumulated weights coincide.
    for a in (jnp.array([-jnp.inf, -jnp.inf, 0.0, 0.0]), jnp.array([0.0, 0.0, -jnp.inf, -jnp.inf])):
        allowed = set(np.flatnonzero(np.isfinite(a)).tolist())
        for seed in range(20):
            assert set(systematic_ancestors(random.key(seed), a).tolist()) <= allowed


@pytest.mark.unit
@pytest.mark.parametrize("columns", [None, 4])
def test_resampling_takes_caches_along_and_keeps_log_z(columns):
    shape = (200,) if columns is None else (200, columns)
    x = random.normal(random.key(3), (*shape, 2))
    a = jnp.where(x[..., 0] > 0, 3 * x[..., 1], -2.0)
    cached = {"x": x, "energy": jnp.sum(x**2, -1), "grad": 2 * x}
    resampled = jax.jit(resample, static_argnums=3)
    after, tree, low = resampled(random.key(4), a, cached, 1.1)
    assert bool(jnp.all(low))
    np.testing.assert_array_equal(tree["energy"], jnp.sum(tree["x"] ** 2, -1))
    np.testing.assert_array_equal(tree["grad"], 2 * tree["x"])
    np.testing.assert_allclose(log_mean_exp(after), log_mean_exp(a), rtol=1e-5)
    assert np.all(np.asarray(after) == np.asarray(after)[0])
    # Nobody crosses from one population to another.
    for d in range(columns or 1):
        old = x if columns is None else x[:, d]
        new = tree["x"] if columns is None else tree["x"][:, d]
        assert set(map(tuple, np.asarray(new).tolist())) <= set(map(tuple, np.asarray(old).tolist()))


@pytest.mark.unit
def test_resampling_preserves_weighted_means():
    P = 100_000
    x = random.normal(random.key(5), (P,))
    a = 0.8 * x  # N(0.8, 1) after weighting
    after, y, _ = resample(random.key(6), a, x, 1.1)
    # Systematic resampling adds at most sd/√P to the weighted mean, which itself lies sd/√ESS from 0.8.
    before = float(jnp.sum(normalised(a) * x))
    assert abs(float(y.mean()) - before) < 5 / np.sqrt(P)
    assert abs(before - 0.8) < 5 / np.sqrt(float(ess(a)))
    assert np.ptp(after) == 0


def test_only_populations_below_the_threshold_are_resampled():
    equal, uneven = jnp.zeros(50), jnp.linspace(0.0, 20.0, 50)
    a = jnp.stack([equal, uneven], 1)
    x = random.normal(random.key(7), (50, 2))
    after, y, low = resample(random.key(8), a, x, 0.5)
    assert low.tolist() == [False, True]
    np.testing.assert_array_equal(y[:, 0], x[:, 0])
    np.testing.assert_array_equal(after[:, 0], 0.0)
    assert (y[:, 1] != x[:, 1]).any()
    after, y, low = resample(random.key(8), uneven, x, 0.0)
    assert not bool(low) and bool((y == x).all()) and bool((after == uneven).all())


@pytest.mark.parametrize("shape", [(6,), (6, 3)], ids=["P", "PxD"])
def test_ula_increment_is_the_log_ratio_of_path_densities(shape):
    """``A += log p_{k+1}(y) K_{k+1}(y → x) − log p_k(x) K_k(x → y)``: what eq. (13) abbreviates."""
    h = 0.3
    x, y = (random.normal(random.key(s), (*shape, 4)) for s in (0, 1))
    old = lambda x: -0.25 * jnp.sum(x**4, -1) + x[..., 0]
    new = lambda x: -jnp.sum(jnp.cosh(x), -1)

    def known(f, x):
        return x, f(x), jax.grad(lambda x: f(x).sum())(x)

    def log_kernel(f, x, y):
        return -jnp.sum((y - x - h * known(f, x)[2]) ** 2, -1) / (4 * h)

    want = new(y) + log_kernel(new, y, x) - old(x) - log_kernel(old, x, y)
    got = ula_increment(known(old, x), known(new, y), h, len(shape))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
