"""Annealed populations against quadrature: log Z, expectations, and what survives at the edges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random
from jax.scipy.special import logsumexp

from numpyro_ebipla import Annealing
from numpyro_ebipla.smc.anneal import anneal, draw_equally
from numpyro_ebipla.smc.density import TiltedDensity
from numpyro_ebipla.smc.weights import ess, normalised

#: Of the adaptation of step sizes.
RATE = 0.1


def gaussian_base(dim=None, scale=1.0):
    """``(log_base, sample_base)`` of N(0, scale²) in one or ``dim`` dimensions."""
    shape = () if dim is None else (dim,)

    def log_base(x):
        each = -0.5 * (x / scale) ** 2 - np.log(scale) - 0.5 * np.log(2 * np.pi)
        return each if dim is None else each.sum(-1)

    return log_base, lambda key, num: scale * random.normal(key, (num, *shape))


def double_well(height, tilt=0.0):
    """Wells at ±1.5 of the energy, the right one deeper by ``3 · tilt``."""
    return lambda x: height * (x**2 - 2.25) ** 2 / 5 - tilt * x


def quadrature(density, functions=(lambda x: 1.0,)):
    """log Z and expectations in one dimension."""
    grid = np.linspace(-8, 8, 40_001)
    with jax.enable_x64(True):
        log_density = np.asarray(density.log_base(jnp.asarray(grid)) - density.energy(jnp.asarray(grid)))
    weight = np.exp(log_density)
    z = np.trapezoid(weight, grid)
    return np.log(z), [np.trapezoid(f(grid) * weight, grid) / z for f in functions]


def unbiased(estimates, truth, width):
    """Whether the mean of independent estimates is within ``width`` of their standard errors of the truth."""
    estimates = np.asarray(estimates, np.float64)
    error = estimates.std(0, ddof=1) / np.sqrt(len(estimates))
    assert np.all(np.abs(estimates.mean(0) - truth) < width * error), (estimates.mean(0), truth, error)


FUNCTIONS = (lambda x: x, lambda x: x**2, lambda x: 1.0 * (x > 0))


@pytest.mark.parametrize("num_moves", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_double_well(num_moves):
    """Barrier of 10 nats, wells of unequal depth: one chain would stay in the well it found."""
    base = gaussian_base(scale=1.5)
    density = TiltedDensity(base[0], double_well(10.0, 0.4), base[1])
    log_z, truth = quadrature(density, FUNCTIONS)

    @jax.jit
    @jax.vmap
    def repeat(key):
        out = anneal(key, density, 500, Annealing(num_moves, stage_ess=0.8, rate=RATE))
        weight = normalised(out.log_weight)
        means = jnp.array([jnp.sum(weight * f(out.position)) for f in FUNCTIONS])
        draws = draw_equally(random.fold_in(key, 1), out.position, out.log_weight, 500)
        return out.log_z, means, jnp.array([jnp.mean(f(draws)) for f in FUNCTIONS]), out.num_temps

    estimate, means, drawn, num_temps = repeat(random.split(random.key(0), 100))
    # Z itself is what is estimated without bias; the standard errors are those of 100 repetitions.
    unbiased(np.exp(estimate - log_z), 1.0, 3)
    unbiased(means, truth, 3)
    unbiased(drawn, truth, 3)
    assert num_temps.max() < 100
    assert np.std(estimate) < 0.15


def test_log_z_of_a_gaussian_tilt_in_several_dimensions():
    d, precision = 8, jnp.linspace(1.0, 20.0, 8)
    base = gaussian_base(d)
    density = TiltedDensity(base[0], lambda x: 0.5 * jnp.sum((precision - 1) * x**2, -1), base[1])
    truth = -0.5 * np.sum(np.log(precision))

    @jax.jit
    @jax.vmap
    def repeat(key):
        out = anneal(key, density, 300, Annealing(2, stage_ess=0.8, rate=RATE))
        return out.log_z, jnp.sum(normalised(out.log_weight)[:, None] * out.position**2, 0)

    log_z, square = repeat(random.split(random.key(1), 64))
    unbiased(np.exp(log_z - truth), 1.0, 3)
    unbiased(square * precision, np.ones(d), 4)  # eight at once


def test_a_mixture_in_fifty_dimensions_in_single_precision():
    """Energies of ±100 nats whose exponentials underflow float32; Z = 1 as the mixture is normalised."""
    d, spread = 50, 0.6
    centres = jnp.stack([jnp.full(d, 0.4), jnp.full(d, -0.4)])
    log_base, sample = gaussian_base(d)

    def energy(x):
        each = -0.5 * jnp.sum((x[..., None, :] - centres) ** 2, -1) / spread**2
        each = each - d * (np.log(spread) + 0.5 * np.log(2 * np.pi)) - np.log(2)
        return log_base(x) - logsumexp(each, -1)

    density = TiltedDensity(log_base, energy, sample)

    @jax.jit
    @jax.vmap
    def repeat(key):
        out = anneal(key, density, 256, Annealing(3, stage_ess=0.8, rate=RATE))
        return out.log_z, out.position.mean(), out.log_weight

    log_z, _, log_weight = repeat(random.split(random.key(2), 24))
    assert log_z.dtype == jnp.float32 and np.all(np.isfinite(log_z)) and np.all(np.isfinite(log_weight))
    # The log of an unbiased estimate is low by half its variance.
    unbiased(log_z + np.var(log_z) / 2, 0.0, 3)
    assert np.std(log_z) < 1.0


def test_weights_survive_energies_far_from_zero():
    """The same density with its energy shifted by 10,000 nats: log Z moves by that, the rest not at all."""
    base = gaussian_base()

    @jax.jit
    def run(shift):
        density = TiltedDensity(base[0], lambda x: 2 * x**2 + shift, base[1])
        return anneal(random.key(3), density, 2000, Annealing(1, 0.5, max_temps=100, rate=RATE))

    for shift in (0.0, 1e4, -1e4):
        out = run(shift)
        assert np.all(np.isfinite(out.log_weight)) and float(out.ess) > 0.2
        # E ~ 1e4 is known to 1e-3 in float32; the standard error of log Z is below 0.03.
        assert float(out.log_z) + shift == pytest.approx(-0.5 * np.log(5), abs=0.1)
        second = jnp.sum(normalised(out.log_weight) * out.position**2)
        assert float(second) == pytest.approx(0.2, abs=5 * 0.2 * np.sqrt(2 / 400))


def test_a_wall_in_the_energy():
    """Where the energy is infinite or not a number there is no mass, and the anneal goes by the rest.

    Such walkers once made the spread of the energies NaN, and all temperatures were leapt over.
    """
    base = gaussian_base()
    beyond = lambda x: jnp.where(x > -1, jnp.inf, jnp.nan)
    density = TiltedDensity(base[0], lambda x: jnp.where(x > 0, 15 * (x - 2) ** 2, beyond(x)), base[1])
    finite = TiltedDensity(base[0], lambda x: jnp.where(x > 0, 15 * (x - 2) ** 2, 1e6), base[1])
    log_z, truth = quadrature(finite, (lambda x: x, lambda x: x**2))

    @jax.jit
    @jax.vmap
    def repeat(key):
        out = anneal(key, density, 500, Annealing(2, 0.5, max_temps=100, rate=RATE))
        # A walker beyond the wall has weight zero.
        weight, x = normalised(out.log_weight), jnp.maximum(out.position, 0.0)
        return out.log_z, jnp.stack([jnp.sum(weight * x), jnp.sum(weight * x**2)]), out.num_temps, out.ess

    estimate, means, num_temps, low = repeat(random.split(random.key(4), 64))
    unbiased(np.exp(estimate - log_z), 1.0, 3)
    unbiased(means, truth, 3)
    # It is not done by one leap of importance sampling (which leaves 2 % of the walkers).
    assert num_temps.min() > 2
    assert low.min() > 0.1


@pytest.mark.unit
def test_no_energy_costs_no_work():
    base = gaussian_base(3)
    density = TiltedDensity(base[0], lambda x: jnp.zeros(x.shape[:-1]), base[1])
    out = jax.jit(lambda k: anneal(k, density, 100, Annealing(1, 0.5, max_temps=100, rate=RATE)))(random.key(5))
    assert int(out.num_temps) == 1 and float(out.log_z) == 0 and float(ess(out.log_weight)) == pytest.approx(100)


def test_the_ladder_is_stretched_to_end_in_time():
    """Few temperatures cost precision, not truth."""
    base = gaussian_base()
    density = TiltedDensity(base[0], lambda x: 30 * (x - 1.0) ** 2, base[1])
    log_z, _ = quadrature(density)
    run = jax.jit(jax.vmap(lambda k: anneal(k, density, 400, Annealing(1, 0.5, max_temps=3, rate=RATE))[2::4]))
    estimate, num_temps = run(random.split(random.key(6), 400))
    assert num_temps.max() <= 3
    unbiased(np.exp(estimate - log_z), 1.0, 3)


def test_populations_with_normalisers_of_their_own():
    """``[P, D]``: each column is an anneal of its own."""
    mean = jnp.array([0.0, 1.0, -2.0])
    log_base, _ = gaussian_base()
    density = TiltedDensity(log_base, lambda x: 2 * (x - mean) ** 2, lambda key, num: random.normal(key, (num, 3)))
    run = jax.jit(jax.vmap(lambda k: anneal(k, density, 300, Annealing(2, 0.5, max_temps=100, rate=RATE))))
    out = run(random.split(random.key(7), 64))
    # N(0, 1) times exp(−2 (x − m)²): precision 5, mean 4m/5, Z = √(1/5) exp(−2 m²/5).
    unbiased(np.exp(out.log_z + 0.5 * np.log(5) + 0.4 * mean**2), 1.0, 4)
    unbiased(jnp.sum(normalised(out.log_weight.swapaxes(0, 1)).swapaxes(0, 1) * out.position, 1), 0.8 * mean, 4)
    drawn = draw_equally(random.key(8), out.position[0], out.log_weight[0], 4000)
    assert drawn.shape == (4000, 3)
    # The population's own mean is what they are draws of.
    weight = normalised(out.log_weight[0])
    np.testing.assert_allclose(drawn.mean(0), jnp.sum(weight * out.position[0], 0), atol=5 * np.sqrt(0.2 / 4000) + 1e-3)
