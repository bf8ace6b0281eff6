"""Models whose maximum marginal likelihood is known: estimates, rates, subsampling, resume."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jax import random
from numpyro.distributions import constraints
from scipy import linalg, optimize, special, stats

from numpyro_ebipla import EBIPLA, MALA, ULA, Annealing, EnergyPrior, Persistent, Tempered, langevin_noise

#: See tests/conftest.py.
RUNS_LONG = True


def scan_steps(fit, states, y, steps, keep, **kwargs):
    """Run many fits side by side, one for each leading index of ``states``; ``keep(state)`` of every step."""

    @jax.jit
    @jax.vmap
    def run(state):
        def body(state, _):
            state, _ = fit.update(state, y, **kwargs)
            return state, keep(state)

        return jax.lax.scan(body, state, None, steps)

    return run(states)


def starts(fit, y, repetitions, **kwargs):
    """Independent initial states, stacked."""
    first = fit.init(random.key(0), y, **kwargs)
    latents = first.posterior.local["x"]

    def start(key):
        noise = random.normal(key, latents.shape, latents.dtype)
        return first._replace(rng_key=key, posterior=first.posterior._replace(local={"x": noise}))

    return jax.vmap(start)(random.split(random.key(1), repetitions))


# --- the rate 1/(MN) ----------------------------------------------------------------------------------


def shifted_energy_model(y):
    """U_α(x) = x²/2 − αx, that is p_α = N(α, 1), and y | x ~ N(x, 1): the MMLE is the mean of y."""
    alpha = numpyro.param("alpha", 0.0)
    with numpyro.plate("data", len(y)):
        x = numpyro.sample("x", EnergyPrior(lambda x: -alpha * x, dist.Normal(0, 1)))
        numpyro.sample("y", dist.Normal(x, 1), obs=y)


def stationary_variance(h):
    """``MN`` times the stationary variance of α under the paper's scheme, with ``P = MN`` walkers.

    α and the means x, w of particles and walkers follow a linear recursion,
        α' = α + h (x − w),   x' = x + h (α − 2x + ȳ),   w' = w + h (α − w),
    each with noise of variance 2h/(MN): a discrete Lyapunov equation.
    """
    A = np.eye(3) + h * np.array([[0, 1, -1], [1, -2, 0], [1, 0, -1]])
    return linalg.solve_discrete_lyapunov(A, 2 * h * np.eye(3))[0, 0]


def test_square_error_falls_like_one_over_MN():
    h, repetitions, steps, burn_in = 0.1, 32, 600, 150
    sizes, errors = [(10, 10), (10, 100), (40, 100)], []
    for M, N in sizes:
        y = 0.7 + np.sqrt(2) * np.random.default_rng(M).normal(size=M).astype(np.float32)
        fit = EBIPLA(
            shifted_energy_model,
            num_particles=N,
            kernel=ULA(h),
            prior=Persistent(num_walkers=M * N, kernel=ULA(h)),
            optim=optax.chain(optax.sgd(h), langevin_noise(h)),
            averaging=None,
        )
        _, alpha = scan_steps(fit, starts(fit, y, repetitions), y, steps, lambda s: s.params["alpha"])
        each = np.mean((np.asarray(alpha, np.float64)[:, burn_in:] - y.mean()) ** 2, 1)
        want = stationary_variance(h) / (M * N)
        # 32 independent time averages; the truth lies within 4 of their standard errors.
        assert abs(each.mean() - want) < 4 * each.std(ddof=1) / np.sqrt(repetitions), (M, N, each.mean(), want)
        # The estimate itself is unbiased: the means do not depend on h.
        mean = np.asarray(alpha)[:, burn_in:].mean(1)
        assert abs(mean.mean() - y.mean()) < 4 * mean.std(ddof=1) / np.sqrt(repetitions)
        errors.append(each.mean())
    slope = np.polyfit(np.log([M * N for M, N in sizes]), np.log(errors), 1)[0]
    print(f"slope {slope:.3f}, MN times the error {np.array(errors) * [m * n for m, n in sizes]}")
    assert abs(slope + 1) < 0.15


# --- a linear-Gaussian model with a quadratic energy --------------------------------------------------


def factor_model(y, batch_size=None):
    """x ~ N(a/(1 + b), 1/(1 + b)) through the energy b x²/2 − a x; y | x ~ N(x, 0.5²).

    The marginal of y is normal with free mean and variance: the MMLE matches both moments.
    """
    a = numpyro.param("a", 0.0)
    b = numpyro.param("b", 0.5, constraint=constraints.greater_than(-0.9))
    with numpyro.plate("data", len(y), subsample_size=batch_size) as i:
        x = numpyro.sample("x", EnergyPrior(lambda x: b * x**2 / 2 - a * x, dist.Normal(0, 1)))
        numpyro.sample("y", dist.Normal(x, 0.5), obs=y[i])


def factor_mmle(y):
    variance = y.var() - 0.25
    return {"a": y.mean() / variance, "b": 1 / variance - 1}


def statistical_errors(y, log_likelihood, params):
    """Standard errors of the MMLE by the observed information, the natural unit of its errors."""
    names = list(params)
    f = lambda v: log_likelihood(y, **dict(zip(names, v, strict=True)))
    with jax.enable_x64(True):
        information = -jax.hessian(f)(jnp.array([params[k] for k in names], jnp.float64))
    return dict(zip(names, np.sqrt(np.diag(np.linalg.inv(information))), strict=True))


def factor_log_likelihood(y, a, b):
    return jnp.sum(-0.5 * (y - a / (1 + b)) ** 2 / (1 / (1 + b) + 0.25) - 0.5 * jnp.log(1 / (1 + b) + 0.25))


@pytest.fixture(scope="module")
def factor_data():
    return (0.8 + np.sqrt(0.4 + 0.25) * np.random.default_rng(5).normal(size=300)).astype(np.float32)


@pytest.fixture(scope="module")
def factor_fits(factor_data):
    """Fits on all data and on a tenth of them at a time.

    All defaults but the optimiser: the default one is slow enough for networks, and needs some 9000 steps to
    bring these two strongly correlated numbers to within 0.1 standard errors (3000 leave 1.1).
    """
    options = dict(
        optim=optax.adam(lambda k: 2e-2 / jnp.sqrt(1 + k / 500)),
        num_steps=3000,
        num_particles=8,
        num_samples=20,
        warmup=20,
    )
    full = EBIPLA(factor_model, **options)
    tenth = EBIPLA(factor_model, batch_size=30, **options)
    return (
        full.run(random.key(0), factor_data, progress_bar=False),
        tenth.run(random.key(1), factor_data, progress_bar=False),
    )


@pytest.mark.parametrize("which", [0, 1], ids=["full", "tenth"])
def test_energy_prior_reaches_the_mmle(factor_fits, factor_data, which):
    fit, y = factor_fits[which], factor_data
    truth = factor_mmle(y)
    unit = statistical_errors(y, factor_log_likelihood, truth)
    off = {k: float(fit.params[k] - truth[k]) / unit[k] for k in truth}
    print("errors in standard errors of the MMLE:", off)
    # Over six keys the fits scatter by 0.06 to 0.10 of these units, about a mean within 0.03 of zero, whether
    # on all data or on a tenth: four such deviations.
    assert max(map(abs, off.values())) < 0.35


def test_a_tenth_of_the_data_gives_the_same_posterior(factor_fits, factor_data):
    """Latents against the exact posterior N(μ, v) at each fit's own parameters."""
    for fit in factor_fits:
        a, b = float(fit.params["a"]), float(fit.params["b"])
        v = 1 / (1 + b + 4)
        exact = v * (a + 4 * factor_data)
        x = np.asarray(fit.get_samples()["x"], np.float64)
        z = (x - exact) / np.sqrt(v)  # [particles, draws, M], standard normal
        per_chain = z.reshape(z.shape[0], z.shape[1], -1)
        # Chains of different data and particles are independent: 2400 of them.
        mean, square = per_chain.mean(1), (per_chain**2).mean(1)
        assert abs(mean.mean()) < 4 * mean.std() / np.sqrt(mean.size)
        assert abs(square.mean() - 1) < 4 * square.std() / np.sqrt(square.size)


# --- normalised priors --------------------------------------------------------------------------------


def gaussian_model(y):
    mu = numpyro.param("mu", 0.0)
    tau = numpyro.param("tau", 1.0, constraint=constraints.positive)
    with numpyro.plate("data", len(y)):
        x = numpyro.sample("x", dist.Normal(mu, tau))
        numpyro.sample("y", dist.Normal(x, 1), obs=y)


def poisson_lognormal_model(y):
    mu = numpyro.param("mu", 0.0)
    tau = numpyro.param("tau", 1.0, constraint=constraints.positive)
    with numpyro.plate("data", len(y)):
        rate = numpyro.sample("x", dist.LogNormal(mu, tau))  # a constrained latent
        numpyro.sample("y", dist.Poisson(rate), obs=y)


def beta_binomial_model(y):
    a = numpyro.param("a", 1.0, constraint=constraints.positive)
    b = numpyro.param("b", 1.0, constraint=constraints.positive)
    with numpyro.plate("data", len(y)):
        p = numpyro.sample("x", dist.Beta(a, b))
        numpyro.sample("y", dist.Binomial(20, p), obs=y)


RNG = np.random.default_rng(11)
GAUSSIAN_Y = (1.0 + 1.6 * RNG.normal(size=200)).astype(np.float32)
POISSON_Y = RNG.poisson(np.exp(1.2 + 0.7 * RNG.normal(size=200))).astype(np.float32)
BINOMIAL_Y = RNG.binomial(20, RNG.beta(2.0, 4.0, size=200)).astype(np.float32)

GRID = np.linspace(-6, 8, 2001)
UNIT_GRID = (np.arange(2000) + 0.5) / 2000


def joint(name, y, first, second):
    """``(grid of x, log p(x, y) [M, grid])`` by NumPy and SciPy alone; densities are in the grid's variable."""
    y = np.asarray(y, np.float64)[:, None]
    if name == "gaussian":
        return GRID, stats.norm.logpdf(GRID, first, second) + stats.norm.logpdf(y, GRID, 1)
    if name == "poisson":  # the grid is of log x
        return GRID, stats.norm.logpdf(GRID, first, second) + stats.poisson.logpmf(y, np.exp(GRID))
    return UNIT_GRID, stats.beta.logpdf(UNIT_GRID, first, second) + stats.binom.logpmf(y, 20, UNIT_GRID)


def log_marginal(name, y, first, second):
    grid, log_p = joint(name, y, first, second)
    return special.logsumexp(log_p, axis=1).sum() + len(y) * np.log(grid[1] - grid[0])


def posterior_moments(name, y, first, second):
    """Means and variances of x given each y; of log x for the Poisson model."""
    grid, log_p = joint(name, y, first, second)
    weight = special.softmax(log_p, axis=1)
    mean = weight @ grid
    return mean, weight @ grid**2 - mean**2


@pytest.mark.slow_but("gaussian_model")
@pytest.mark.parametrize(
    ("name", "model", "names", "y"),
    [
        ("gaussian", gaussian_model, ("mu", "tau"), GAUSSIAN_Y),
        ("poisson", poisson_lognormal_model, ("mu", "tau"), POISSON_Y),
        ("binomial", beta_binomial_model, ("a", "b"), BINOMIAL_Y),
    ],
)
def test_normalised_priors_with_default_settings(name, model, names, y):
    """Parameters by the log likelihood they lose against the MMLE, latents against quadrature."""
    fit = EBIPLA(model, num_steps=3000, num_samples=20).run(random.key(2), y, progress_bar=False)
    found = [float(fit.params[k]) for k in names]
    start = {"gaussian": (1.0, 1.2), "poisson": (1.2, 0.7), "binomial": (2.0, 4.0)}[name]
    best = optimize.minimize(lambda v: -log_marginal(name, y, *np.exp(v)), np.log(start), method="Nelder-Mead")
    if name == "gaussian":  # known in closed form
        closed = (y.mean(), np.sqrt(y.var() - 1))
        np.testing.assert_allclose(np.exp(best.x), closed, rtol=1e-3)
    lost = -best.fun - log_marginal(name, y, *found)
    print(f"{name}: found {found}, best {np.exp(best.x)}, lost {lost:.2e} nats")
    # An error of z standard errors of the MMLE costs z²/2 nats: 0.02 nats are a fifth of one standard error.
    # Monte Carlo errors of 0.05 standard errors in two parameters would lose 0.003.
    assert -1e-3 < lost < 0.02

    x = np.asarray(fit.get_samples()["x"], np.float64)
    mean, variance = posterior_moments(name, y, *found)
    z = ((np.log(x) if name == "poisson" else x) - mean) / np.sqrt(variance)
    # Independent chains for each particle and datum; draws within one are averaged first.
    first, second = z.mean(1), (z**2).mean(1)
    assert abs(first.mean()) < 4 * first.std() / np.sqrt(first.size)
    assert abs(second.mean() - 1) < 4 * second.std() / np.sqrt(second.size)


# --- conditional on covariates ----------------------------------------------------------------------------


@pytest.mark.slow
def test_an_energy_prior_conditional_on_covariates_of_another_plate():
    """It used to end in JAX's error on a reshape. Here p(w_j) = N(b c_j, 1) and z_j ~ N(w_j, 1)."""
    c, z = jnp.array([[1.0], [-0.5], [2.0]]), jnp.array([[1.5], [0.5], [1.0]])

    def model(y):
        b = numpyro.param("b", 0.0)
        with numpyro.plate("group", 3, dim=-2):
            w = numpyro.sample(
                "w", EnergyPrior(lambda w: -b * c * w, dist.Normal(0, 1), annealing=Annealing(stage_ess=0.98))
            )
            numpyro.sample("z", dist.Normal(w, 1), obs=z)
        with numpyro.plate("data", len(y), dim=-1):
            numpyro.sample("y", dist.Normal(numpyro.sample("x", dist.Normal(0, 1)), 1), obs=y)

    fit = EBIPLA(model, num_steps=900, num_samples=20).run(random.key(0), GAUSSIAN_Y[:10], progress_bar=False)
    best, error = float((c * z).sum() / (c**2).sum()), float((2 / (c**2).sum()) ** 0.5)
    assert abs(fit.params["b"] - best) < 0.2 * error
    assert fit.prior_samples()["w"].shape == (128, 3, 1)
    assert fit.diagnostics()["w: MMD², walkers − fresh"].passed


# --- subsampling --------------------------------------------------------------------------------------


def rested_model(y, batch_size=None):
    """Fixed parameters: posterior N(4y/5, 1/5) of every x."""
    mu = numpyro.param("mu", 0.0)
    with numpyro.plate("data", len(y), subsample_size=batch_size) as i:
        x = numpyro.sample("x", dist.Normal(mu, 1))
        numpyro.sample("y", dist.Normal(x, 0.5), obs=y[i])


@pytest.mark.slow_but("ULA")
@pytest.mark.parametrize("kernel", [ULA(0.05), MALA()], ids=["ULA", "MALA"])
def test_stationary_variance_of_a_local_latent_whatever_the_batch(kernel):
    """A plate's M/B scale must not reach the particles: at B = M/10 it would cool them tenfold."""
    M, N = 100, 60
    y = np.linspace(-2, 2, M).astype(np.float32)
    exact = 0.2 / (1 - 0.05 * 5 / 2) if isinstance(kernel, ULA) else 0.2
    for batch_size, steps in ((None, 60), (50, 120), (10, 600)):  # 60 moves for every datum
        fit = EBIPLA(rested_model, num_particles=N, kernel=kernel, optim=optax.sgd(0.0), batch_size=batch_size)
        state = fit.init(random.key(3), y)
        run = jax.jit(lambda s, f=fit, n=steps: jax.lax.scan(lambda s, _: (f.update(s, y)[0], None), s, None, n)[0])
        x = np.asarray(run(state).posterior.local["x"], np.float64)
        centred = x - 0.8 * y
        # 6000 independent chains: relative error √(2/6000) = 1.8 %, of which four are allowed.
        assert abs(np.mean(centred**2) / exact - 1) < 4 * np.sqrt(2 / (M * N)), batch_size
        assert abs(np.mean(centred)) < 4 * np.sqrt(exact / (M * N))


# --- resume and compilation ---------------------------------------------------------------------------


def same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = random.key_data(x), random.key_data(y)
        assert x.dtype == y.dtype and x.weak_type == y.weak_type
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(
            kernel=ULA(lambda k: 0.05 / (1.0 + k / 100)),
            prior=Persistent(50, ULA(0.05), weighted=True),
            optim=numpyro.optim.Adam(1e-2),
        ),
    ],
    ids=["default", "jarzynski"],
)
def test_a_resumed_run_is_the_same_bit_for_bit_and_compiles_nothing(factor_data, options):
    y = factor_data[:40]
    make = lambda: EBIPLA(factor_model, num_particles=4, batch_size=12, num_samples=1, warmup=0, thinning=1, **options)
    run = dict(progress_bar=False)
    first, fresh = make(), make()
    whole = first.run(random.key(0), y, num_steps=100, **run)
    part = first.run(random.key(0), y, num_steps=60, **run)
    traces = [s.run_chunk._cache_size() for s in first._systems.made.values()]
    rest = first.run(random.key(9), y, num_steps=40, init_state=part.state, **run)
    same(whole.state, rest.state)
    same(whole.params, rest.params)
    np.testing.assert_array_equal(whole.losses, np.concatenate([part.losses, rest.losses]))
    # One compilation of the steps over all runs and their resume.
    assert traces == [s.run_chunk._cache_size() for s in first._systems.made.values()] == [1]
    # A fresh object, as in another process, knows all from the state.
    other = fresh.run(random.key(9), y, num_steps=40, init_state=part.state, **run)
    same(whole.state, other.state)
    assert [s.run_chunk._cache_size() for s in fresh._systems.made.values()] == [1]


@pytest.mark.slow
def test_runs_of_one_key_agree_and_of_two_keys_differ(factor_data):
    fit = EBIPLA(factor_model, num_particles=4, prior=Tempered(16, 4), num_samples=1, warmup=0)
    one, again, other = (fit.run(random.key(k), factor_data[:40], num_steps=5, progress_bar=False) for k in (0, 0, 1))
    same(one.state, again.state)
    assert (one.state.posterior.local["x"] != other.state.posterior.local["x"]).any()
