"""``log_likelihood`` against closed forms and quadrature: bias, coverage, invariances, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from numpyro import handlers
from numpyro.distributions import constraints
from scipy import special, stats

from numpyro_ebipla import EBIPLA, Annealing, EnergyPrior, ModelError, nan_masked
from numpyro_ebipla.likelihood.importance import by_importance
from numpyro_ebipla.likelihood.normalisers import shared_normalisers
from numpyro_ebipla.smc.normaliser import pooled

RNG = np.random.default_rng(0)
GRID = np.linspace(-9, 9, 6001)


def by_quadrature(log_prior, log_lik):
    """``log ∫ prior · likelihood`` over one latent; ``log_lik`` is ``[M, grid]``."""
    values = special.logsumexp(log_prior + log_lik, axis=-1) + np.log(GRID[1] - GRID[0])
    return values - special.logsumexp(log_prior) - np.log(GRID[1] - GRID[0])


# --- models with known answers: (model, params, arguments, log p(y)) ------------------------------------


def linear_gaussian():
    loading = np.array([[1.0, 0.5, -1.0], [0.3, 2.0, 1.0]])
    covariance = loading.T @ loading + 0.09 * np.eye(3)
    y = RNG.multivariate_normal(np.zeros(3), covariance, 5)

    def model(y, batch_size=None):
        with numpyro.plate("data", len(y), subsample_size=batch_size):
            x = numpyro.sample("x", dist.Normal(0, 1).expand([2]).to_event(1))
            batch = numpyro.subsample(y, event_dim=1)
            numpyro.sample("y", dist.Normal(x @ numpyro.param("loading", jnp.ones((2, 3))), 0.3).to_event(1), obs=batch)

    return model, {"loading": jnp.asarray(loading)}, (y,), stats.multivariate_normal(np.zeros(3), covariance).logpdf(y)


def poisson():
    y = np.array([0, 1, 2, 5, 20, 100])

    def model(y, batch_size=None):
        with numpyro.plate("data", len(y), subsample_size=batch_size):
            x = numpyro.sample("x", dist.Normal(0.5, numpyro.param("scale", 1.0, constraint=constraints.positive)))
            numpyro.sample("y", dist.Poisson(jnp.exp(x)), obs=numpyro.subsample(y, event_dim=0))

    prior = stats.norm.logpdf(GRID, 0.5, 1.2)
    return model, {"scale": 1.2}, (y,), by_quadrature(prior, stats.poisson.logpmf(y[:, None], np.exp(GRID)))


def double_well(x):
    return (x**2 - 2.25) ** 2 - 0.3 * x


def energy():
    """Wells at ±1.5 with a barrier of five nats, and a datum between them."""
    y = np.array([0.0, 1.4, -1.5, 3.0, -2.0])

    def model(y, batch_size=None):
        with numpyro.plate("data", len(y), subsample_size=batch_size):
            x = numpyro.sample("x", EnergyPrior(double_well, dist.Normal(0, 1.5)))
            numpyro.sample("y", dist.Normal(x, 0.5), obs=numpyro.subsample(y, event_dim=0))

    prior = stats.norm.logpdf(GRID, 0, 1.5) - double_well(GRID)
    return model, {}, (y,), by_quadrature(prior, stats.norm.logpdf(y[:, None], GRID, 0.5))


def conditional_energy():
    """Energy ``−c x`` on N(0, 1) is N(c, 1), with log Z = c²/2 for each datum."""
    c = np.array([0.0, 1.0, -2.0, 0.5, 1.5])
    y = c + np.array([0.3, -2.0, 0.1, 1.0, -0.5])

    def model(y, c, batch_size=None):
        with numpyro.plate("data", len(y), subsample_size=batch_size) as i:
            tilt = jnp.asarray(c)[i]
            x = numpyro.sample("x", EnergyPrior(lambda x: -tilt * x, dist.Normal(0, 1).expand(tilt.shape)))
            numpyro.sample("y", dist.Normal(x, 0.5), obs=jnp.asarray(y)[i])

    return model, {}, (y, c), stats.norm.logpdf(y, c, np.sqrt(1.25))


CASES = [linear_gaussian, poisson, energy, conditional_energy]
#: The others take longer.
SOME = [poisson, *(pytest.param(case, marks=pytest.mark.slow) for case in CASES if case is not poisson)]


def estimates(case, repetitions, **options):
    """``value``, ``std_error`` ``[repetitions, M]``, totals and errors ``[repetitions]``, and the truth."""
    model, params, args, truth = case()
    ebipla = EBIPLA(model)

    @jax.vmap
    def repeat(key):
        out = ebipla.log_likelihood(key, params, *args, **options)
        return out.value, out.std_error, jnp.stack(out.total)

    return *(np.asarray(x, np.float64) for x in repeat(random.split(random.key(0), repetitions))), truth


@pytest.mark.slow_but("linear")
@pytest.mark.parametrize("case", SOME)
def test_bias_and_coverage(case):
    """100 repetitions: bias below 0.02 nats for each datum, 90 % intervals of data and of totals cover at 90 %.

    Data of one repetition have errors of their own but for log Z; 5 data count as 300 independent intervals here, and
    the limits are three standard deviations of a binomial count.
    """
    value, error, totals, truth = estimates(case, 100)
    assert np.abs(np.mean(value - truth, 0)).max() < 0.02
    covered = np.mean(np.abs(value - truth) < 1.645 * error)
    assert abs(covered - 0.9) < 3 * np.sqrt(0.09 / 300)
    covered = np.mean(np.abs(totals[:, 0] - truth.sum()) < 1.645 * totals[:, 1])
    assert abs(covered - 0.9) < 3 * np.sqrt(0.09 / 100)


@pytest.mark.slow
def test_a_thousand_data_are_known_to_a_hundredth():
    """A likelihood-ratio statistic needs that: populations alone are off by half a nat."""
    y = np.random.default_rng(0).poisson(np.exp(np.random.default_rng(1).normal(0.5, 1.2, 1000)))
    model, params, *_ = poisson()
    counts, inverse = np.unique(y, return_inverse=True)
    log_lik = stats.poisson.logpmf(counts[:, None], np.exp(GRID))
    truth = by_quadrature(stats.norm.logpdf(GRID, 0.5, 1.2), log_lik)[inverse]
    out = EBIPLA(model).log_likelihood(random.key(0), params, y)
    total, error = map(float, out.total)
    assert error < 0.01 and abs(total - truth.sum()) < 4 * error
    assert abs(np.mean(np.abs(out.value - truth) < 1.645 * out.std_error) - 0.9) < 3 * np.sqrt(0.09 / 1000)


@pytest.mark.unit
def test_importance_weights_are_those_of_the_law():
    """A law fitted to draws that are off in place and width, and a heavy tail: the integral is one."""
    x = 0.7 + 1.3 * random.normal(random.key(0), (512, 3, 2))
    for log_joint in (
        lambda x: jax.scipy.stats.norm.logpdf(x).sum(-1),
        lambda x: jax.scipy.stats.t.logpdf(x, 3.0).sum(-1),
    ):
        found, share = by_importance(random.key(1), log_joint, x, jnp.zeros((512, 3)), 128)
        assert np.all(np.abs(found.value) < 4 * found.std_error + 1e-5) and np.all(found.std_error < 0.01)
        assert np.all((share > 0.2) & (share <= 1))


@pytest.mark.parametrize("case", [linear_gaussian, pytest.param(conditional_energy, marks=pytest.mark.slow)])
def test_blocks_and_order_change_nothing(case):
    """Worked off in blocks of two (the last one filled up), and in another order: within the errors."""
    model, params, args, truth = case()
    order = np.random.default_rng(1).permutation(len(truth))
    ebipla = EBIPLA(model)
    for out, expected in (
        (ebipla.log_likelihood(random.key(1), params, *args, batch_size=2), truth),
        (ebipla.log_likelihood(random.key(2), params, *(a[order] for a in args)), truth[order]),
    ):
        assert out.value.shape == truth.shape
        assert np.all(np.abs(out.value - expected) < 4.5 * out.std_error)  # ten of them
        assert np.all((out.ess > 20) & (out.ess <= 512 + 1e-3))
        assert float(out.rest) == 0


@pytest.mark.slow
@pytest.mark.parametrize("case", [poisson, energy])
def test_bounds_of_simulated_data_close(case):
    """The gap is positive on average and small; a coarse ladder widens it. No datum of the arguments enters."""
    model, params, args, truth = case()
    many = [np.repeat(a, 10, 0) for a in args]
    gap = np.asarray(EBIPLA(model).bidirectional(random.key(0), params, *many).gap)
    error = gap.std(ddof=1) / np.sqrt(len(gap))
    assert gap.shape == (10 * len(truth),) and -3 * error < gap.mean() < 0.05 + 3 * error
    coarse = EBIPLA(model).bidirectional(
        random.key(1), params, *many, num_particles=4, annealing=Annealing(1, 0.5, 500)
    )
    assert coarse.gap.mean() > gap.mean() + 2 * error


@pytest.mark.slow
def test_errors_of_log_z_are_shared():
    model, params, args, truth = energy()
    out = EBIPLA(model).log_likelihood(random.key(0), params, *args)
    assert np.allclose(out.log_z_error, out.log_z_error[0]) and out.log_z_error[0] > 0
    own = np.sqrt(np.square(out.std_error) - np.square(out.log_z_error))
    expected = np.sqrt(np.sum(own**2) + (len(truth) * out.log_z_error[0]) ** 2)
    np.testing.assert_allclose(out.total.std_error, expected, rtol=1e-5)


def test_global_latents_give_one_number():
    y = np.array([1.0, 0.3, -0.5, 2.0])
    covariance = np.ones((4, 4)) + (0.25 + 0.5) * np.eye(4)

    def model(y, batch_size=None):
        m = numpyro.sample("m", dist.Normal(0, 1))
        with numpyro.plate("data", len(y), subsample_size=batch_size):
            x = numpyro.sample("x", dist.Normal(m, 0.5))
            numpyro.sample("y", dist.Normal(x, np.sqrt(0.5)), obs=numpyro.subsample(y, event_dim=0))

    truth = stats.multivariate_normal(np.zeros(4), covariance).logpdf(y)
    ebipla = EBIPLA(model)
    for out in (
        ebipla.log_likelihood(random.key(0), {}, y),
        ebipla.log_likelihood(random.key(0), {}, y, batch_size=2),
    ):
        assert out.value.shape == () and abs(out.value - truth) < 4 * out.std_error < 0.5
        assert float(out.total.value) == float(out.value)
    with pytest.raises(ModelError, match="couple the data"):
        ebipla.anomaly_score(random.key(0), {}, y)


def test_an_observed_energy_is_normalised():
    """No latents: the exact log density but for log Z, whose error is all there is."""
    y = np.array([1.5, -1.0, 0.0])

    def model(y):
        with numpyro.plate("data", len(y)):
            numpyro.sample("y", EnergyPrior(double_well, dist.Normal(0, 1.5)), obs=y)

    density = stats.norm.logpdf(GRID, 0, 1.5) - double_well(GRID)
    log_z = special.logsumexp(density) + np.log(GRID[1] - GRID[0])
    truth = stats.norm.logpdf(y, 0, 1.5) - double_well(y) - log_z
    out = EBIPLA(model).log_likelihood(random.key(0), {}, y)
    difference = np.asarray(out.value) - truth
    assert np.ptp(difference) < 1e-5 and np.all(np.abs(difference) < 4 * out.std_error)
    np.testing.assert_allclose(out.std_error, out.log_z_error)


def test_what_lies_outside_the_plate():
    """An observed site and a factor outside the plate belong to no datum: they are in ``rest`` and in ``total``."""
    y = np.array([0.5, -1.0])

    def model(y, batch_size=None):
        numpyro.sample("z", dist.Normal(0, 1), obs=2.0)
        numpyro.factor("f", jnp.array(0.25))
        with numpyro.plate("data", len(y), subsample_size=batch_size):
            x = numpyro.sample("x", dist.Normal(0, 1))
            numpyro.sample("y", dist.Normal(x, 1), obs=numpyro.subsample(y, event_dim=0))

    for batch_size in (None, 1):
        out = EBIPLA(model).log_likelihood(random.key(0), {}, y, batch_size=batch_size)
        assert float(out.rest) == pytest.approx(stats.norm.logpdf(2.0) + 0.25, abs=1e-5)
        assert np.all(np.abs(out.value - stats.norm.logpdf(y, 0, np.sqrt(2))) < 4 * out.std_error)
        assert float(out.total.value) == pytest.approx(float(out.value.sum() + out.rest), abs=1e-5)


def test_inner_plates_and_masks_count_the_normaliser():
    """Two latents of one energy for each datum, and a masked datum, whose density is that of nothing."""
    y = np.array([[0.3, 1.0], [-1.0, 0.0], [0.0, 0.0]])

    def model(y, keep):
        with numpyro.plate("data", len(y), dim=-2), handlers.mask(mask=keep[:, None]), numpyro.plate("inner", 2):
            x = numpyro.sample("x", EnergyPrior(lambda x: 1.5 * x**2 - x, dist.Normal(0, 1)))
            numpyro.sample("y", dist.Normal(x, 1), obs=y)

    # N(0, 1) tilted by exp(x − 3x²/2) is N(1/4, 1/4).
    out = EBIPLA(model).log_likelihood(random.key(0), {}, y, np.array([True, True, False]))
    truth = stats.norm.logpdf(y, 0.25, np.sqrt(1.25)).sum(1) * np.array([1, 1, 0])
    assert np.all(np.abs(out.value - truth) < 4 * out.std_error) and np.all(out.std_error < 0.1)


def masked_model(y, observed=None):
    with numpyro.plate("data", len(y)):
        x = numpyro.sample("x", dist.Normal(0, 1))
        if observed is None:
            numpyro.sample("y", dist.Normal(x[:, None] * jnp.ones(2), 1).to_event(1), obs=y)
        else:
            for j in range(2):
                numpyro.sample(f"y{j}", dist.Normal(x, 1), obs=y[:, j], obs_mask=observed[:, j])


def test_missing_values():
    """NaN left out element by element, and ``obs_mask``, give the density of what is there."""
    y = np.array([[1.0, 2.0], [0.5, np.nan], [np.nan, np.nan]])
    both = stats.multivariate_normal([0, 0], [[2, 1], [1, 2]]).logpdf(y[0])
    truth = np.array([both, stats.norm.logpdf(0.5, 0, np.sqrt(2)), 0.0])
    out = EBIPLA(nan_masked(masked_model)).log_likelihood(random.key(0), {}, y)
    assert np.all(np.abs(out.value - truth) < 4 * out.std_error + 1e-5)
    observed = ~np.isnan(y)
    out = EBIPLA(masked_model).log_likelihood(random.key(0), {}, np.nan_to_num(y), observed)
    assert np.all(np.abs(out.value - truth) < 4 * out.std_error + 1e-5)


def test_what_cannot_be_left_out_is_refused():
    def model(y):
        with numpyro.plate("data", len(y)):
            x = numpyro.sample("x", dist.Normal(0, 1))
            numpyro.sample("y", dist.MultivariateNormal(x[:, None] * jnp.ones(2), jnp.eye(2)), obs=y)

    y = np.array([[1.0, np.nan]])
    with pytest.raises(ModelError, match="'y' are not independent under MultivariateNormal"):
        EBIPLA(nan_masked(model)).log_likelihood(random.key(0), {}, y)
    with pytest.raises(ModelError, match="wrap the model in nan_masked"):
        EBIPLA(model).log_likelihood(random.key(0), {}, y)


def test_an_anomaly_score_is_minus_the_log_density():
    model, params, args, truth = poisson()
    score = EBIPLA(model).anomaly_score(random.key(0), params, *args, num_particles=256)
    assert np.all(np.abs(score + truth) < 0.2) and int(np.argmax(score)) == 5


@pytest.mark.unit
def test_populations_that_contradict_their_errors():
    """Each claims 0.01 nats but they differ by one: then the spread is the error. A usual spread is not."""
    value, variance = pooled(jnp.array([0.0, 1.0, 0.0, 1.0]), jnp.full(4, 1e-4))
    share = np.exp([0.0, 1.0, 0.0, 1.0]) / np.mean(np.exp([0.0, 1.0]))
    assert float(variance) == pytest.approx(np.var(share, ddof=1) / 4, rel=1e-5)
    assert float(value) == pytest.approx(np.log(np.mean(np.exp([0.0, 1.0]))) + float(variance) / 2, rel=1e-5)
    _, variance = pooled(jnp.array([0.0, 0.01, 0.02, 0.0]), jnp.full(4, 1e-4))
    assert float(variance) == pytest.approx(1e-4 / 4, rel=0.05)


def test_refusals():
    y = np.zeros(3)

    def improper(y):
        with numpyro.plate("data", len(y)):
            x = numpyro.sample("level", dist.ImproperUniform(constraints.real, (), ()))
            numpyro.sample("y", dist.Normal(x, 1), obs=y)

    def scaled(y):
        with numpyro.plate("data", len(y)):
            x = numpyro.sample("x", dist.Normal(0, 1))
            with handlers.scale(scale=0.5):
                numpyro.sample("y", dist.Normal(x, 1), obs=y)

    for method in ("log_likelihood", "infer", "reconstruct", "anomaly_score"):
        with pytest.raises(ModelError, match="'level' has no proper prior"):
            getattr(EBIPLA(improper), method)(random.key(0), {}, y)
    with pytest.raises(ModelError, match="'y' is scaled"):
        EBIPLA(scaled).log_likelihood(random.key(0), {}, y)
    model, params, args, _ = linear_gaussian()
    ebipla = EBIPLA(model)
    with pytest.raises(ModelError, match=r"params lacks \['loading'\]"):
        ebipla.log_likelihood(random.key(0), {}, *args)
    with pytest.raises(ModelError, match="no parameter 'other'"):
        ebipla.log_likelihood(random.key(0), {**params, "other": 1.0}, *args)
    with pytest.raises(ModelError, match="'loading' has shape"):
        ebipla.log_likelihood(random.key(0), {"loading": jnp.ones((3, 2))}, *args)
    with pytest.raises(ValueError, match="num_particles must be an integer of at least 2"):
        ebipla.log_likelihood(random.key(0), params, *args, num_particles=1)
    with pytest.raises(ValueError, match="stage_ess"):
        ebipla.log_likelihood(random.key(0), params, *args, annealing=Annealing(stage_ess=1.5))


@pytest.mark.slow
def test_one_log_z_for_all():
    """There were three formulas: those of fit.log_normalizer and of log_likelihood differed by half a variance."""

    def model(y):
        slope = numpyro.param("slope", 0.4)
        with numpyro.plate("data", len(y)):
            prior = EnergyPrior(lambda y: slope * y**2, dist.Normal(0, 1), num_walkers=64, annealing=Annealing(1))
            numpyro.sample("y", prior, obs=y)

    y, key = jnp.array([0.3, -1.0]), random.key(3)
    fitter = EBIPLA(model, num_steps=1)
    fit = fitter.run(random.key(0), y, progress_bar=False)
    latent_model, batch = fit.config.model, fit.batch(None, key)
    inside = shared_normalisers(latent_model, 4, fit.params, batch)["y"]
    outside = fit.log_normalizer(rng_key=random.fold_in(key, 0))
    assert float(inside.value) == pytest.approx(float(outside.value), abs=1e-6)
    assert float(inside.std_error) == pytest.approx(float(outside.std_error), rel=1e-4)
    # An observed energy is evaluated, not annealed: all that is random in its likelihood is this log Z.
    found = fitter.log_likelihood(random.key(5), fit.params, y)
    key_z, _ = random.split(random.key(5))
    log_z = fit.log_normalizer(rng_key=random.fold_in(key_z, 0))
    density = dist.Normal(0, 1).log_prob(y) - fit.params["slope"] * y**2
    np.testing.assert_allclose(found.value, density - log_z.value, rtol=1e-5)
    np.testing.assert_allclose(found.log_z_error, log_z.std_error, rtol=1e-3)
