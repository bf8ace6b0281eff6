"""Features of mean zero: those of their fields, exact for normal groups of any sizes, unbiased for others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random

from numpyro_ebipla.smc.control import control_weights, explained, recentring
from numpyro_ebipla.smc.features import Fields, Own, Shared, choose_fields


@pytest.mark.parametrize(
    "fields", [Fields((Own(14),)), Fields((Own(14),), steep=False), Fields((Shared(5, 2), Own(1), Shared(3, 1)))]
)
def test_features_are_those_of_their_fields(fields):
    """``h · ∂ log p + div h`` of the field that belongs to each."""
    x, slope = random.normal(random.key(0), (2, 12, 14))
    weight = jnp.full(12, 1 / 12)
    features = fields.features(weight, x, slope)
    assert features.shape == (12, fields.number)

    def field(y):  # at one more particle, which does not count in centres and covariances
        return fields.field(jnp.append(weight, 0.0), jnp.concatenate([x, y[None]]), jnp.eye(fields.number))[:, -1]

    for n in (0, 7):
        steps = jax.vmap(field)(x[n] + jnp.eye(14)) - field(x[n])  # fields are linear
        divergence = jnp.trace(steps, axis1=0, axis2=2)
        np.testing.assert_allclose(features[n], field(x[n]) @ slope[n] + divergence, atol=2e-5)


def test_groups_share_where_coordinates_are_too_many():
    assert choose_fields(64, [(6,)], shared=True) == choose_fields(64, [(6,)]) == Fields((Own(6),))
    assert choose_fields(20, [(6,)]) == Fields((Own(6),), steep=False) and choose_fields(11, [(6,)]) is None
    assert choose_fields(4, [(1,)]) is None, "four folds of one particle each know nothing"
    assert choose_fields(256, [(500, 2), (40,)], shared=True) == Fields((Shared(500, 2), Shared(40, 1)))
    assert choose_fields(256, [(2,), (500,)], shared=True) == Fields((Own(2), Shared(500, 1))), "few keep their own"
    assert choose_fields(256, [(784, 40)], shared=True) is None, "a network's weights are no groups"
    assert choose_fields(256, [(500, 2)]) is None and choose_fields(16, [(500, 2)], shared=True) is None


def normal_groups(size, num_groups=200, num=160):
    """Exact particles of a mixed model whose groups have 1 to 12 data: with their slopes, ∂ log p and their means."""
    rng = np.random.default_rng(0)
    scale, sigma = np.diag([1.5, 0.7][:size]), 0.8
    x, slope, score, exact = [], [], [], []
    for _ in range(num_groups):
        number = rng.integers(1, 13)
        design = np.concatenate([np.ones((number, 1)), rng.normal(size=(number, size - 1))], 1)
        y = design @ (scale @ rng.normal(size=size)) + sigma * rng.normal(size=number)
        precision = design.T @ design / sigma**2 + np.linalg.inv(scale @ scale)
        cov = np.linalg.inv(precision)
        mean = cov @ design.T @ y / sigma**2
        u = rng.multivariate_normal(mean, cov, num)
        rest, middle = y - u @ design.T, y - design @ mean
        x.append(u)
        slope.append((mean - u) @ precision)
        score.append(np.concatenate([rest @ design, u**2, np.square(rest).sum(1, keepdims=True)], 1))
        spread = np.trace(design @ cov @ design.T)
        exact.append(np.concatenate([middle @ design, mean**2 + np.diag(cov), [middle @ middle + spread]]))
    arrays = (np.stack(a, 1).astype(np.float32) for a in (x, slope))
    return *arrays, np.sum(score, 0), np.sum(exact, 0)


@pytest.mark.parametrize("size", [1, 2])
def test_unequal_groups_of_a_normal_model_are_quiet(size):
    """200 groups have more coordinates than there are particles; a fiftieth of the variance is left."""
    x, slope, score, exact = normal_groups(size)
    assert choose_fields(len(x), [x.shape[1:]], shared=True).parts == (Shared(200, size),)
    weight = np.asarray(control_weights({"u": x}, {"u": slope}, 1), np.float64)
    plain = score.std(0) / np.sqrt(len(x))
    off, left = weight @ score - exact, explained({"u": x}, {"u": slope}, score.astype(np.float32), 1)[1]
    assert np.all(np.abs(off) < 3 * 0.14 * plain) and abs(weight.sum() - 1) < 1e-5
    assert np.all(np.sqrt(np.diag(left) / len(x)) < 0.14 * plain)


def test_a_common_shift_of_all_groups_is_found():
    """A mean that has moved leaves all groups behind alike, and they are taken along; in equilibrium nothing moves."""
    x, slope, *_ = normal_groups(1)
    behind, steeper = x - 30.0, slope + 30.0 / np.var(x, 0)
    shift, far = recentring({"u": behind}, {"u": steeper}, 1)
    assert bool(far) and 24 < np.median(shift["u"]) < 36
    assert not bool(recentring({"u": x}, {"u": slope}, 1)[1])


def test_skewed_groups_have_no_bias():
    """150 groups of log gamma variates of two shapes: means of many sets of particles are right, and less noisy."""
    shape = np.where(np.arange(150) < 50, 1.0, 4.0).astype(np.float32)
    x = jnp.asarray(np.log(np.random.default_rng(0).gamma(shape, size=(200, 64, 150))), jnp.float32)
    weight = jax.vmap(lambda x: control_weights({"x": x}, {"x": shape - jnp.exp(x)}, 1))(x)
    total = x.sum(-1)
    estimates = np.asarray(jnp.sum(weight * total, 1), np.float64)
    truth = float(jax.scipy.special.digamma(shape).sum())
    assert abs(estimates.mean() - truth) < 3 * estimates.std() / np.sqrt(len(x))
    assert estimates.std() < 0.6 * float(total.mean(1).std())
