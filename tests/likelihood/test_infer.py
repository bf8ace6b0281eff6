"""``infer`` and ``reconstruct`` against closed forms; fresh draws of a prior with eight modes."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from jax.scipy.special import logsumexp
from scipy import stats

from numpyro_ebipla import (
    EBIPLA,
    MALA,
    Annealing,
    EBIPLAWarning,
    EnergyPrior,
    ModelError,
    WeightedParticles,
    nan_masked,
)
from numpyro_ebipla._core.tree import batched_value_and_grad
from numpyro_ebipla.kernels import evaluate, start
from numpyro_ebipla.likelihood.chains import BURN_IN, CHAINS, LOOKS, THINNING
from tests.models import fitter, hierarchy

LOADING = np.array([[1.0, 0.5, -1.0], [0.3, 2.0, 1.0]])


def linear(y, batch_size=None):
    with numpyro.plate("data", len(y), subsample_size=batch_size):
        x = numpyro.sample("x", dist.Normal(0, 1).expand([2]).to_event(1))
        loading = numpyro.param("loading", jnp.ones((2, 3)))
        batch = numpyro.subsample(y, event_dim=1)
        numpyro.sample("y", dist.Normal(x @ loading, 0.5).to_event(1), obs=batch)


def exact(y):
    """Mean ``[M, 2]`` and covariance of each posterior, missing elements left out."""
    means, covariances = [], []
    for row in y:
        there = ~np.isnan(row)
        covariance = np.linalg.inv(np.eye(2) + LOADING[:, there] @ LOADING[:, there].T / 0.25)
        covariances.append(covariance)
        means.append(covariance @ LOADING[:, there] @ row[there] / 0.25)
    return np.array(means), np.array(covariances)


Y = np.array([[1.0, 2.0, -0.5], [0.0, 0.0, 0.0], [-2.0, -1.0, 3.0], [0.5, 1.0, 0.5], [3.0, 3.0, 0.0]])


@pytest.mark.parametrize(
    "settings", [{}, {"batch_size": 2}, pytest.param({"posterior": WeightedParticles()}, marks=pytest.mark.slow)]
)
def test_posteriors_of_new_data(settings):
    """A model never run: 64 particles of 100 draws, whose moments are those of the posterior."""
    batch = {k: v for k, v in settings.items() if k == "batch_size"}
    options = {k: v for k, v in settings.items() if k != "batch_size"}
    ebipla = EBIPLA(linear, num_particles=64, num_samples=100, **options)
    fit = ebipla.infer(random.key(0), {"loading": LOADING}, Y, **batch)
    x = fit.get_samples()["x"].astype(np.float64)
    assert x.shape == (64, 100, 5, 2) and fit.history["contrast"].shape == (0,)
    np.testing.assert_allclose(fit.params["loading"], LOADING, rtol=1e-6)
    mean, covariance = exact(Y)
    # The particles are independent chains, or nearly: the error is at most that of 64 draws.
    sd = np.sqrt(np.einsum("mii->mi", covariance))
    assert np.all(np.abs(x.mean((0, 1)) - mean) < 4 * sd / 8)
    pooled = (x - x.mean((0, 1))).reshape(-1, 5, 2)
    assert np.all(np.abs(np.einsum("nmi,nmi->mi", pooled, pooled) / len(pooled) / sd**2 - 1) < 4 * np.sqrt(2 / 64))
    assert np.mean(fit.draws.accept["accept_local"]) > 0.4
    assert fit.to_arviz(prior=False).posterior["x"].shape == (64, 100, 5, 2)


def test_modes_of_a_posterior_have_their_masses():
    """y = |x| + noise: two modes, of which chains see one each; the prior weighs them."""

    def model(y):
        with numpyro.plate("data", len(y)):
            x = numpyro.sample("x", dist.Normal(0.3, 1))
            numpyro.sample("y", dist.Normal(jnp.abs(x), 0.2), obs=y)

    y = np.array([2.0, 1.0, 3.0])
    fit = EBIPLA(model, num_particles=400, num_samples=5).infer(random.key(1), {}, y)
    grid = np.linspace(-8, 8, 8001)
    weight = stats.norm.pdf(grid, 0.3, 1) * stats.norm.pdf(y[:, None], np.abs(grid), 0.2)
    truth = weight[:, grid > 0].sum(1) / weight.sum(1)
    found = (fit.get_samples()["x"] > 0).mean((0, 1))
    # Masses come from the annealed population of 400, whose resamplings add to the binomial error.
    assert np.all(np.abs(found - truth) < 4 * np.sqrt(2 * truth * (1 - truth) / 400))


def test_a_fit_of_new_data_goes_on_from_the_params_of_another():
    ebipla = EBIPLA(linear, num_particles=8, num_steps=20, num_samples=5)
    fit = ebipla.run(random.key(0), Y, progress_bar=False)
    new = ebipla.infer(random.key(1), fit.params, Y[:2], sites=["x"], indices=[1])
    assert new.get_samples()["x"].shape == (8, 5, 1, 2) and new.stopped is None
    np.testing.assert_allclose(new.params["loading"], fit.params["loading"], rtol=1e-6)


@pytest.mark.parametrize("batch_size", [None, 2])
def test_reconstructions(batch_size):
    """E[x | y] times the loading, and draws with the posterior's covariance."""
    params = {"loading": LOADING}
    mean, covariance = exact(Y)
    ebipla = EBIPLA(linear)
    got = ebipla.reconstruct(random.key(0), params, Y, batch_size=batch_size, num_particles=512)["y"]
    sd = np.sqrt(np.einsum("ij,mik,kj->mj", LOADING, covariance, LOADING))
    assert got.shape == Y.shape
    # Resamplings leave some hundred effective draws of 512.
    assert np.all(np.abs(got - mean @ LOADING) < 4 * sd / np.sqrt(150))
    draws = ebipla.reconstruct(random.key(0), params, Y, batch_size=batch_size, num_draws=400, num_particles=400)["y"]
    assert draws.shape == (400, *Y.shape)
    assert np.all(np.abs(draws.std(0) / sd - 1) < 4 / np.sqrt(2 * 100))


@pytest.mark.parametrize("batch_size", [None, 16])
def test_reconstructions_by_few_moves(batch_size):
    """By default two chains of each datum, with 200 gradients at most; the prior's draws begin far from the data."""
    assert CHAINS * (1 + BURN_IN + LOOKS * THINNING) <= 200
    y = np.random.default_rng(0).normal(size=(40, 2)) @ LOADING + 0.5 * np.random.default_rng(1).normal(size=(40, 3))
    mean, covariance = exact(y)
    got = EBIPLA(linear).reconstruct(random.key(0), {"loading": LOADING}, y, batch_size=batch_size)["y"]
    sd = np.sqrt(np.einsum("ij,mik,kj->mj", LOADING, covariance, LOADING))
    scaled = (got - mean @ LOADING) / sd
    # 48 looks at two chains: as good as ten independent draws at least, for each of 40 data of two free directions.
    assert np.mean(scaled**2) < 1.5 / 10 and abs(scaled.mean()) < 4 * np.sqrt(1 / 10 / 80)


def test_reconstructions_begin_at_the_guides_draws():
    """Two modes, y = |x|: the guide says that it is the left one, which no move leaves."""

    def model(y):
        with numpyro.plate("data", len(y)):
            x = numpyro.sample("x", dist.Normal(0, 3))
            numpyro.sample("y", dist.Normal(jnp.abs(x), 0.2), obs=y)
            numpyro.sample("sign", dist.Normal(x, 100.0), obs=jnp.zeros(len(y)))

    def guide(y):
        with numpyro.plate("data", len(y)):
            numpyro.sample("x", dist.Normal(numpyro.param("slope", 1.0) * y, 0.2))

    y = np.array([2.0, 3.0, 4.0])
    ebipla = EBIPLA(model, guide=guide, guide_params={"slope": -1.0})
    got = ebipla.reconstruct(random.key(0), {}, y, sites=["sign"])["sign"]
    np.testing.assert_allclose(got, -y, atol=4 * 0.2 / np.sqrt(10))


def test_missing_values_are_filled_in_by_their_posterior_means():
    y = Y.copy()
    y[0, 1] = y[2, :2] = y[4] = np.nan
    mean, covariance = exact(y)
    got = EBIPLA(nan_masked(linear)).reconstruct(random.key(0), {"loading": LOADING}, y, num_particles=512)["y"]
    sd = np.sqrt(np.einsum("ij,mik,kj->mj", LOADING, covariance, LOADING))
    assert np.all(np.abs(got - mean @ LOADING) < 4 * sd / np.sqrt(150))


def test_reconstructions_with_global_latents_and_outside_the_plate():
    """m ~ N(0, 1), y_i ~ N(m, 1): every reconstruction is E[m | y, z]; a site outside the plate has its own."""

    def model(y):
        m = numpyro.sample("m", dist.Normal(0, 1))
        numpyro.sample("z", dist.Normal(2 * m, 1), obs=1.0)
        with numpyro.plate("data", len(y)):
            numpyro.sample("y", dist.Poisson(jnp.exp(m)), obs=y)

    y = np.array([1, 3, 2])
    grid = np.linspace(-5, 5, 4001)
    weight = stats.norm.pdf(grid) * stats.norm.pdf(1.0, 2 * grid, 1)
    weight *= np.prod(stats.poisson.pmf(y[:, None], np.exp(grid)), 0)
    weight /= weight.sum()
    got = EBIPLA(model).reconstruct(random.key(0), {}, y, num_particles=1000)
    np.testing.assert_allclose(got["z"], 2 * np.sum(weight * grid), atol=4 * 2 * 0.3 / np.sqrt(300))
    np.testing.assert_allclose(got["y"], np.sum(weight * np.exp(grid)), atol=4 * 0.5 / np.sqrt(300))


def test_refusals():
    def model(y):
        with numpyro.plate("data", len(y)):
            x = numpyro.sample("x", dist.Normal(0, 1))
            numpyro.sample("y", EnergyPrior(lambda y: y**2, dist.Normal(0, 1)), obs=y)
            numpyro.sample("z", dist.Normal(x, 1), obs=y)

    def observed(y):
        with numpyro.plate("data", len(y)):
            numpyro.sample("y", EnergyPrior(lambda y: y**2, dist.Normal(0, 1)), obs=y)

    y = np.zeros(2)
    with pytest.raises(ModelError, match=r"at 'y'.*has no mean"):
        EBIPLA(model).reconstruct(random.key(0), {}, y)
    assert set(EBIPLA(model).reconstruct(random.key(0), {}, y, sites=["z"])) == {"z"}
    with pytest.raises(ModelError, match="no observed site 'x'"):
        EBIPLA(model).reconstruct(random.key(0), {}, y, sites=["x"])
    with pytest.raises(ModelError, match="no latent site"):
        EBIPLA(observed).infer(random.key(0), {}, y)
    with pytest.raises(TypeError, match="params must be"):
        EBIPLA(model).infer(random.key(0), y)


# --- fresh draws of the prior -------------------------------------------------------------------------

ANGLES = 2 * np.pi * np.arange(8) / 8
CENTRES = 4 * np.stack([np.cos(ANGLES), np.sin(ANGLES)], -1)
MASSES = np.array([1, 2, 1, 3, 1, 2, 1, 1]) / 12


def eight_gaussians():
    """Modes of deviation 0.25, 3 apart on a circle of radius 4, of unequal masses, tilting N(0, 2²)."""
    base = dist.Normal(0, 2).expand([2]).to_event(1)

    def energy(x):
        each = -0.5 * jnp.sum((x[..., None, :] - CENTRES) ** 2, -1) / 0.25**2
        return base.log_prob(x) - logsumexp(each + jnp.log(MASSES), -1)

    return EnergyPrior(energy, base)


def masses(x):
    """Draws at each mode, and draws that are at none."""
    distance = np.linalg.norm(np.asarray(x)[:, None] - CENTRES, axis=-1)
    return np.bincount(np.argmin(distance, -1), minlength=8), np.mean(distance.min(-1) > 5 * 0.25)


@pytest.mark.slow
def test_fresh_draws_have_all_modes_with_their_masses():
    """χ² of the counts; draws of one call share their resampling, so 20 calls of 1000 give the counts' spread.

    A chain from N(0, I) fails: MALA of the same number of moves keeps each chain in the mode that it falls into.
    """
    prior = eight_gaussians()
    found = [masses(prior.sample(random.key(i), (1000,))) for i in range(20)]
    counts = np.array([count for count, _ in found])
    assert found[0][1] < 0.01
    # Hotelling's T² of seven free masses over 20 independent calls: exact for means near to normal.
    share = counts[:, :7] / 1000 - MASSES[:7]
    covariance = np.cov(share.T)
    t2 = 20 * share.mean(0) @ np.linalg.solve(covariance, share.mean(0))
    assert stats.f.sf(t2 * 13 / (19 * 7), 7, 13) > 1e-3
    # And the spread is not far above that of independent draws.
    assert np.mean(np.var(counts, axis=0) / (1000 * MASSES * (1 - MASSES))) < 10

    kernel = MALA()
    target = batched_value_and_grad(lambda p: prior.tilted().log_density(p["x"]))

    def move(carry, key):
        point = evaluate(target, carry[0])
        there, info = kernel.move(key, target, point, carry[1])
        return (there, kernel.adapt(carry[1], info, point)), None

    first = start(kernel, target, {"x": random.normal(random.key(1), (1000, 2))})
    (point, _), _ = jax.jit(lambda c: jax.lax.scan(move, c, random.split(random.key(2), 200)))(first)
    count, _ = masses(point.position["x"])
    assert stats.chisquare(count, 1000 * MASSES).pvalue < 1e-6


# --- far from the prior ---------------------------------------------------------------------------------


def density(y):
    return dist.Normal(0.5, 2**0.5).log_prob(y)


def test_what_is_too_far_away_to_be_reached_is_said_to_be_unknown():
    """y = 1000 was off by 1,200 nats, its standard error 6: the ladder ended before the population had arrived."""
    y = jnp.array([0.5, 5.0, 1e3])
    with pytest.warns(EBIPLAWarning, match=r"too few for 1 data, the first is 2.*max_temps"):
        found = fitter(hierarchy).log_likelihood(random.key(0), {"mean": jnp.array(0.5)}, y)
    assert np.isinf(found.std_error[2]) and found.ess[2] == 0
    assert np.all(np.abs(found.value - density(y))[:2] < 4 * found.std_error[:2])


@pytest.mark.parametrize("method", ["infer", "reconstruct"])
def test_so_are_particles_and_reconstructions(method):
    """At y = 10⁴ they were 77 and 1113 in place of 5000, without a word."""
    y, params = jnp.array([0.5, 1e4, 5.0]), {"mean": jnp.array(0.5)}
    ebipla = fitter(hierarchy, num_particles=8, num_samples=10, warmup=10)
    with pytest.warns(EBIPLAWarning, match=rf"{method}: .* were too few for 1 data, the first is 1"):
        getattr(ebipla, method)(random.key(0), params, y)


def test_more_temperatures_reach_it(recwarn):
    y = jnp.array([100.0])
    far = fitter(hierarchy, num_particles=64, num_samples=20)
    new = far.infer(random.key(1), {"mean": jnp.array(0.5)}, 10 * y, annealing=Annealing(max_temps=20_000))
    assert abs(new.get_samples()["x"].mean() - 500.25) < 4 * 0.5**0.5 / 8
    assert not [w for w in recwarn.list if w.category is EBIPLAWarning]
    found = fitter(hierarchy).log_likelihood(
        random.key(0), {"mean": jnp.array(0.5)}, y, annealing=Annealing(max_temps=2000)
    )
    assert float(found.std_error[0]) < 0.3
    assert abs(float(found.value[0] - density(y)[0])) < 4 * float(found.std_error[0])


@pytest.mark.parametrize("method", ["log_likelihood", "anomaly_score", "reconstruct"])
def test_answers_that_are_no_numbers_are_refused(method):
    """They were NaN, all of them."""
    with pytest.raises(ModelError, match="not finite"):
        getattr(fitter(hierarchy), method)(random.key(0), {"mean": jnp.array(0.5)}, jnp.array([0.0, 1e30]))


def test_parameters_and_options_of_the_wrong_type():
    with pytest.raises(TypeError, match="the value of 'mean' must be an array"):
        fitter(hierarchy).log_likelihood(random.key(0), {"mean": "one"}, jnp.zeros(2))
    with pytest.raises(ValueError, match="stage_ess must be a number between 0 and 1"):
        Annealing(stage_ess="a")
    with pytest.raises(TypeError, match=r"pass annealing=Annealing\(stage_ess=0.5\)"):
        fitter(hierarchy).log_likelihood(random.key(0), {"mean": jnp.array(0.5)}, jnp.zeros(2), stage_ess=0.5)
