"""The step of EBIPLA as one would write it by hand for one model: plain JAX, no NumPyro, nothing general.

Latents ``x ~ exp(−E(x)) N(0, I)``, data ``y ~ N(g(x), σ² I)``, persistent walkers, Adam. It draws the same random
numbers as the package, so that both must give the same states; what is left to compare is time.
"""

from functools import partial

import jax
import jax.numpy as jnp
import optax
from jax import lax, random
from jax.scipy.linalg import solve_triangular

from numpyro_ebipla.training.minibatch import minibatch


def noise_for(key, x):
    """The package's noise for one latent site."""
    return random.normal(random.split(key, 1)[0], x.shape, x.dtype)


def make_run(energy, decoder, sigma, optim, batch_size, adjusted, step_size, by_step=False):
    """A function ``run(state, y, num_steps)``, a jitted loop or, with ``by_step``, jitted steps called from Python.

    ``energy(params, x)`` and ``decoder(params, x)`` map ``[..., d]``; the state is a dictionary of arrays. On a CPU
    convolutions written as usual are slow inside a loop: there ``by_step`` is the faster way.
    """

    def log_prior(params, x):
        return -energy(params["energy$params"], x) - 0.5 * (x**2 + jnp.log(2 * jnp.pi)).sum(-1)

    def log_joint(params, x, y):
        z = (y - decoder(params["decoder$params"], x)) / sigma
        log_lik = -(0.5 * z**2 + jnp.log(sigma) + 0.5 * jnp.log(2 * jnp.pi)).sum(-1)
        return log_lik + log_prior(params, x)

    def step(state, y):
        N, M = state["x"].shape[:2]
        key = random.fold_in(state["key"], state["step"])
        _, _, key_x, _, key_w = random.split(key, 5)
        order = random.fold_in(state["key"], jnp.uint32(0xFFFFFFFF))
        indices = minibatch(order, state["step"], M, batch_size)
        x, w, y = state["x"][:, indices], state["walkers"], y[indices]

        def contrast(params, x, w):
            joint, prior = log_joint(params, x, y), log_prior(params, w)
            return prior.mean() - joint.mean(), (joint, prior)

        (value, (log_x, log_w)), (grad, grad_x, grad_w) = jax.value_and_grad(contrast, (0, 1, 2), has_aux=True)(
            state["params"], x, w
        )
        grad_x, grad_w = -N * batch_size * grad_x, len(w) * grad_w
        updates, optim_state = optim.update(grad, state["optim"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        key_x = random.split(random.split(key_x, 1)[0])[0]
        key_w = random.split(random.fold_in(key_w, 0), 1)[0]
        if adjusted:
            joint = partial(log_joint, state["params"], y=y)
            mine = tuple(a[indices] for a in state["by_datum"])
            x, adapt_x, mine = mala(key_x, joint, x, log_x, grad_x, state["adapt_x"], mine)
            by_datum = tuple(
                a.at[indices].set(b, unique_indices=True) for a, b in zip(state["by_datum"], mine, strict=True)
            )
            prior = partial(log_prior, state["params"])
            w, adapt_w, _ = mala(key_w, prior, w, log_w, grad_w, state["adapt_w"])
        else:
            h, adapt_x, adapt_w, by_datum = step_size, state["adapt_x"], state["adapt_w"], None
            x = x + h * grad_x + jnp.sqrt(2 * h) * noise_for(key_x, x)
            w = w + h * grad_w + jnp.sqrt(2 * h) * noise_for(key_w, w)
        k = state["step"]
        average = jax.tree.map(lambda a, p: a + 9 / (9 + k) * (p - a), state["average"], params)
        new = {
            "step": k + 1,
            "key": state["key"],
            "params": params,
            "average": average,
            "optim": optim_state,
            "x": state["x"].at[:, indices].set(x, unique_indices=True),
            "walkers": w,
            "adapt_x": adapt_x,
            "by_datum": by_datum,
            "adapt_w": adapt_w,
        }
        return new, value

    one_step = jax.jit(step, donate_argnums=0)

    def run_by_step(state, y, num_steps):
        values = []
        for _ in range(num_steps):
            state, value = one_step(state, y)
            values.append(value)
        return state, values

    @partial(jax.jit, donate_argnums=0)
    def run(state, y, num_steps):
        values = jnp.zeros(100)

        def body(i, carry):
            state, values = carry
            state, value = step(state, y)
            return state, values.at[i].set(value)

        return lax.fori_loop(0, num_steps, body, (state, values))

    return run_by_step if by_step else run


def mala(key, log_density, x, value, grad, adapt, by_datum=None):
    """One adapted, preconditioned MALA move of all chains; ``adapt`` is (log step, curvature, factor, count).

    ``by_datum`` is (log step over the shared one, count) of the chains of each datum.
    """
    log_step, curvature, factor, count = adapt
    h, scale, k = jnp.exp(log_step), 1 / jnp.sqrt(curvature), count.astype(log_step.dtype)
    if by_datum is not None:
        scale = jnp.exp(0.5 * by_datum[0])[:, None] * scale
    dim, axes = x.shape[-1], tuple(range(x.ndim - 1))
    inverse = solve_triangular(factor, jnp.eye(dim), lower=True)
    key_noise, key_accept = random.split(key)
    noise = noise_for(key_noise, x)
    sd = jnp.sqrt(2 * h)
    drift = lambda u: jnp.clip(h * u, -4 * sd, 4 * sd)
    u = (scale * grad) @ inverse.T
    w = drift(u) + sd * noise
    new = x + scale * (w @ inverse)
    (_, new_value), new_grad = jax.value_and_grad(lambda z: (lambda v: (v.sum(), v))(log_density(z)), has_aux=True)(new)
    new_u = (scale * new_grad) @ inverse.T
    backward = ((w + drift(new_u)) ** 2 / (4 * h)).sum(-1)
    prob = jnp.exp(jnp.minimum(new_value - value + 0.5 * (noise**2).sum(-1) - backward, 0.0))
    accept = random.uniform(key_accept, prob.shape) < prob
    turned = (new_u - u).reshape(-1, dim)
    w2 = w.reshape(-1, dim)
    ratio = jnp.sqrt((turned**2).sum(-1, keepdims=True) / (w2**2).sum(-1, keepdims=True))
    product = -(turned / (1 + ratio)).T @ w2
    coupled = factor @ (product + product.T) @ factor.T
    mean = factor @ factor.T
    mean = mean + jnp.maximum(1 / (10 + k), 0.01) * (coupled * dim / jnp.trace(coupled) - mean)
    sd = jnp.sqrt(jnp.diag(mean))
    cholesky = jnp.linalg.cholesky(mean / (sd[:, None] * sd))
    factor = jnp.where(jnp.diag(cholesky).min() > 3e-4, cholesky, factor)
    secant = jnp.sqrt(((new_grad - grad) ** 2).sum(axes) / ((scale * w) ** 2).sum(axes))
    square = jnp.minimum((grad**2).mean(axes), secant)
    curvature = curvature + jnp.maximum(1 / (1 + k), 0.01) * (square - curvature)
    log_step = log_step + jnp.maximum(0.5 / (1 + k) ** 0.5, 0.02) * (prob.mean() - 0.65)
    if by_datum is not None:
        own, visits = by_datum
        by_datum = own + 0.5 / (1 + visits) ** 0.5 * (prob.mean(0) - prob.mean()), visits + 1
    return jnp.where(accept[..., None], new, x), (log_step, curvature, factor, count + 1), by_datum
