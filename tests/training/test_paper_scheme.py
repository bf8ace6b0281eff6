"""The paper's algorithm to the letter: a plain NumPy loop, fed the same noise, walks the same path.

The model has a nonquadratic energy with a parameter and a nonlinear generator with a parameter:

    U_α(x) = ½‖x‖² + Σ_d α_d log cosh(2 x_d) + ¼ Σ_d α_d² x_d⁴        y | x ~ N(tanh(x β), σ²)

All gradients below are written by hand, and all three updates use the same ``(θ_k, X_k, X̄_k)``.
"""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jax import random

from numpyro_ebipla import EBIPLA, ULA, EnergyPrior, Persistent, langevin_noise
from numpyro_ebipla.training.minibatch import minibatch

M, N, P, H, SIGMA, STEPS = 12, 3, 7, 0.02, 0.4, 200


@pytest.fixture(autouse=True)
def x64():
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)


def model(y, batch_size=None):
    alpha = numpyro.param("alpha", jnp.array([0.3, -0.2]))
    beta = numpyro.param("beta", jnp.array([[0.5, -0.3, 0.1], [0.2, 0.4, -0.6]]))

    def energy(x):
        return jnp.sum(alpha * jnp.log(jnp.cosh(2 * x)) + alpha**2 * x**4 / 4, -1)

    base = dist.Normal(0, 1).expand([2]).to_event(1)
    with numpyro.plate("data", M, subsample_size=batch_size) as i:
        x = numpyro.sample("x", EnergyPrior(energy, base))
        numpyro.sample("y", dist.Normal(jnp.tanh(x @ beta), SIGMA).to_event(1), obs=y[i])


def grad_x_energy(alpha, x):
    """∇_x U_α."""
    return x + 2 * alpha * np.tanh(2 * x) + alpha**2 * x**3


def grad_alpha_energy(alpha, x):
    """∇_α U_α, one row for each x."""
    return np.log(np.cosh(2 * x)) + alpha * x**4 / 2


def grad_x_phi(alpha, beta, x, y):
    mean = np.tanh(x @ beta)
    return grad_x_energy(alpha, x) + ((mean - y) / SIGMA**2 * (1 - mean**2)) @ beta.T


def grad_beta_phi(beta, x, y):
    mean = np.tanh(x @ beta)
    return np.einsum("nbi,nbj->nbij", x, (mean - y) / SIGMA**2 * (1 - mean**2))


def draw(key, *shapes):
    """The noise that the package uses for a pytree with leaves of these shapes."""
    keys = random.split(key, len(shapes))
    return [random.normal(k, s, jnp.float64) for k, s in zip(keys, shapes, strict=True)]


def randomness(rng_key, batch_size):
    """Minibatch and noises of every step, all that the reference takes from JAX."""
    size = M if batch_size is None else batch_size

    @jax.jit
    @jax.vmap
    def of_step(k):
        _, key_theta, key_x, _, key_walkers = random.split(random.fold_in(rng_key, k), 5)
        batch = jnp.arange(M)
        if batch_size is not None:
            batch = minibatch(random.fold_in(rng_key, jnp.uint32(0xFFFFFFFF)), k, M, batch_size)
        return (
            batch,
            *draw(key_theta, (2,), (2, 3)),
            *draw(random.split(random.split(key_x, 1)[0])[0], (N, size, 2)),
            *draw(random.split(random.fold_in(key_walkers, 0), 1)[0], (P, 2)),
        )

    return [np.asarray(a) for a in of_step(jnp.arange(STEPS))]


def reference(state, y, batch_size):
    """Eqs. (8)–(10) by Euler–Maruyama in NumPy."""
    y = np.asarray(y)
    alpha, beta = (np.array(state.params[k]) for k in ("alpha", "beta"))
    x = np.array(state.posterior.local["x"])
    walkers = np.array(state.prior["x"].position)
    path = []
    for batch, noise_alpha, noise_beta, noise_x, noise_walkers in zip(
        *randomness(state.rng_key, batch_size), strict=True
    ):
        xb, yb = x[:, batch], y[batch]
        from_posterior = grad_alpha_energy(alpha, xb).mean((0, 1))
        from_prior = grad_alpha_energy(alpha, walkers).mean(0)
        temperature = np.sqrt(2 * H / (M * N))
        new_alpha = alpha - H * (from_posterior - from_prior) + temperature * noise_alpha
        new_beta = beta - H * grad_beta_phi(beta, xb, yb).mean((0, 1)) + temperature * noise_beta
        new_x = xb - H * grad_x_phi(alpha, beta, xb, yb) + np.sqrt(2 * H) * noise_x
        walkers = walkers - H * grad_x_energy(alpha, walkers) + np.sqrt(2 * H) * noise_walkers
        alpha, beta = new_alpha, new_beta
        x = x.copy()
        x[:, batch] = new_x
        path.append((alpha, beta, x, walkers))
    return path


@pytest.mark.parametrize("batch_size", [None, 5], ids=["full", "subsampled"])
def test_euler_maruyama_to_the_letter(batch_size):
    y = np.asarray(random.normal(random.key(1), (M, 3), jnp.float64))
    fit = EBIPLA(
        model,
        num_particles=N,
        kernel=ULA(step_size=H),
        prior=Persistent(kernel=ULA(step_size=H), num_walkers=P),
        optim=optax.chain(optax.sgd(H), langevin_noise(H)),
        averaging=None,
        batch_size=batch_size,
    )
    state = fit.init(random.key(0), y)
    assert state.params["alpha"].dtype == jnp.float64
    path = reference(state, y, batch_size)

    @jax.jit
    def run(state):
        def body(state, _):
            state, _ = fit.update(state, y)
            seen = (*(state.params[k] for k in ("alpha", "beta")), state.posterior.local["x"])
            return state, (*seen, state.prior["x"].position)

        return jax.lax.scan(body, state, None, STEPS)[1]

    ours = run(state)
    for name, got, want in zip(
        ("alpha", "beta", "x", "walkers"), ours, map(np.stack, zip(*path, strict=True)), strict=True
    ):
        np.testing.assert_allclose(got, want, atol=1e-5, rtol=0, err_msg=name)
    # The parameters have moved far more than the tolerance.
    assert np.abs(np.asarray(ours[1][-1]) - np.asarray(state.params["beta"])).max() > 0.05
    assert np.abs(np.asarray(ours[0][-1]) - np.asarray(state.params["alpha"])).max() > 0.05
    if batch_size is not None:  # only the batch's particles have moved
        first = np.asarray(path[0][2] != state.posterior.local["x"]).any((0, 2))
        moved = np.asarray(ours[2][0] != state.posterior.local["x"]).any((0, 2))
        assert first.sum() == batch_size
        np.testing.assert_array_equal(moved, first)
