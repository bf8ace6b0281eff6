"""Minibatches are uniform, without replacement within an epoch, and cost nothing in M."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random
from scipy import stats

from numpyro_ebipla.training.minibatch import batches_per_epoch, minibatch, permuted


@pytest.mark.unit
@pytest.mark.parametrize(("M", "B"), [(1, 1), (2, 1), (2, 2), (3, 2), (10, 5), (16, 4), (17, 5), (64, 7)])
def test_every_epoch_visits_every_datum(M, B):
    per_epoch = batches_per_epoch(M, B)
    steps = jnp.arange(3 * per_epoch)
    batches = np.asarray(jax.jit(jax.vmap(lambda k: minibatch(random.key(0), k, M, B)))(steps))
    assert batches.dtype == np.int32
    for batch in batches:  # put() and take() promise unique indices
        assert len(set(batch.tolist())) == B
    for epoch in batches.reshape(3, per_epoch * B):
        # In order the first M are a permutation, and what is left wraps round to the epoch's first data.
        assert sorted(epoch[:M].tolist()) == list(range(M))
        np.testing.assert_array_equal(epoch[M:], epoch[: per_epoch * B - M])


@pytest.mark.unit
def test_epochs_and_keys_differ():
    draw = jax.jit(lambda key, k: minibatch(key, k, 50, 50))
    first, second = draw(random.key(0), 0), draw(random.key(0), 1)
    other = draw(random.key(1), 0)
    assert (first != second).any() and (first != other).any()
    np.testing.assert_array_equal(first, draw(random.key(0), 0))


@pytest.mark.unit
@pytest.mark.parametrize("M", [1, 2, 3, 4, 5, 31, 32, 33, 63, 65, 1000])
def test_permuted_is_a_permutation(M):
    order = jax.jit(permuted, static_argnums=2)(random.key(3), jnp.arange(M), M)
    assert sorted(order.tolist()) == list(range(M))


@pytest.mark.parametrize("M", [2, 5, 8, 12])
def test_positions_and_pairs_are_uniform(M):
    # 200000 independent keys. Under uniformity each chi² has the given distribution; with a fixed key a level
    # of 1e-4 is a bound on the test's power, not on its flakiness.
    K = 200_000
    keys = random.split(random.key(7), K)
    order = jax.jit(jax.vmap(lambda key: permuted(key, jnp.arange(M), M)))(keys)
    order = np.asarray(order)
    for position in range(min(M, 3)):
        counts = np.bincount(order[:, position], minlength=M)
        assert stats.chisquare(counts).pvalue > 1e-4, f"datum at position {position}"
    for i, j in [(0, 1), (0, M - 1)]:
        if i == j:
            continue
        pairs = np.bincount(order[:, i] * M + order[:, j], minlength=M * M).reshape(M, M)
        assert np.all(np.diag(pairs) == 0)
        off = pairs[~np.eye(M, dtype=bool)]
        if len(off) > 1:
            assert stats.chisquare(off).pvalue > 1e-4, f"data at positions {i} and {j}"


@pytest.mark.unit
def test_successive_epochs_of_one_run_are_independent():
    M, epochs = 6, 12000
    first = jax.jit(jax.vmap(lambda k: minibatch(random.key(11), k * M, M, 1)[0]))(jnp.arange(epochs))
    first = np.asarray(first)
    pairs = np.bincount(first[:-1] * M + first[1:], minlength=M * M)
    assert stats.chisquare(pairs).pvalue > 1e-4


@pytest.mark.unit
def test_large_data_do_not_overflow():
    M, B = 2_000_000_011, 1000
    per_epoch = batches_per_epoch(M, B)
    draw = jax.jit(lambda k: minibatch(random.key(5), k, M, B))
    for k in (0, 1, per_epoch // 2, per_epoch - 2, per_epoch - 1, per_epoch):
        batch = np.asarray(draw(k))
        assert batch.min() >= 0 and batch.max() < M
        assert len(set(batch.tolist())) == B
        # Mean of B uniform draws: within 5 standard errors of the middle.
        assert abs(batch.mean() / M - 0.5) < 5 / np.sqrt(12 * B)
    # The last batch wraps round to the first data of its epoch.
    last, start = np.asarray(draw(per_epoch - 1)), np.asarray(draw(0))
    wrapped = per_epoch * B - M
    assert wrapped > 0
    np.testing.assert_array_equal(last[B - wrapped :], start[:wrapped])


@pytest.mark.unit
def test_one_compilation_for_all_steps():
    count = 0

    @jax.jit
    def draw(k):
        nonlocal count
        count += 1
        return minibatch(random.key(0), k, 100, 10)

    for k in range(12):
        draw(jnp.asarray(k, jnp.int32))
    assert count == 1
